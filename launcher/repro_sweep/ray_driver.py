"""The process that speaks with Ray for a sweep's executor; the only module that imports it.

Ray ends a driver whose cluster is lost: that must not be the coordinator. The two sides speak JSON lines::

    executor -> driver   {"do": "start", "workers": ["ray-1a2b3c4d", …]}    {"do": "stop", "workers": […]}
                         {"do": "end"}    (end of file: the executor is gone)
    driver -> executor   {"nodes": [{"CPU": 4.0, …}, …], "workers": {worker: {"state": …, "detail": …, "cause": …}}}
                         {"error": "one line"}, then it ends

Workers are detached actors with their ids as names, in a namespace of the sweep's: they outlive this process, and the
next one finds them. Ray never restarts one, nor repeats a call; which trials run again is the coordinator's decision.
A Ray that was started here, as there is no address, ends with this process.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import os
import queue
import re
import signal
import socket
import sys
import threading
import time
from pathlib import Path
from typing import IO, Any

import ray
from ray import exceptions
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from repro_sweep.childio import private_stdout
from repro_sweep.executors.base import Cause, WorkerState
from repro_sweep.worker.ray import RayWorker

_CONNECT_S = 5.0
_TELL_S = 0.5
_WAIT_S = 0.1
_SURVEY_S = 2.0
_LEAVE_S = 15.0
_CALLS_AT_A_TIME = 8
_PRINTED = re.compile(r"^[\w.]+(?:Error|Exception): (.+)$", re.MULTILINE)
_DEATH = re.compile(r"The actor (?:is dead|died) because (.+)", re.DOTALL)

log = logging.getLogger(__name__)


class _Worker:
    """An actor, what was asked of it, and since when it has been asked to leave."""

    def __init__(self, handle: Any) -> None:
        self.handle = handle
        self.placed = handle.where.remote()
        self.over = handle.work.remote()
        self.host: str | None = None
        self.stop_at: float | None = None
        self.ended: dict[str, str] | None = None

    def status(self) -> dict[str, str]:
        return self.ended or {"state": WorkerState.ALIVE}


class _Driver:
    """Runs in one thread; another one reads what the executor says.

    Args:
        actors: what each actor asks for, as Ray's ``options`` have it.
        arguments: the rest of what a :class:`RayWorker` gets.
        announced: the file in which the coordinator says where it listens; None: workers need not know.
    """

    def __init__(
        self, out: IO[str], actors: dict[str, Any], arguments: dict[str, Any], announced: Path | None
    ) -> None:
        self._announced = announced
        self._address: str | None = None
        self._out = out
        self._actors = actors
        self._arguments = arguments
        self._orders: queue.SimpleQueue[dict[str, Any] | None] = queue.SimpleQueue()
        self._workers: dict[str, _Worker] = {}
        self._told = ""
        self._told_at = 0.0
        self._survey_at = 0.0
        self._nodes: list[dict[str, float]] = []
        self._unknown: set[str] = set()
        """Workers that are to be stopped as soon as they are there."""
        self._class = ray.remote(RayWorker)

    def run(self) -> None:
        """Obey until told to end."""
        threading.Thread(target=self._read, daemon=True, name="stdin").start()
        while True:
            self._survey()
            if not self._obey():
                return
            self._look()
            self._tell()

    def _survey(self) -> None:
        """See which nodes there are, and take on actors that an earlier driver has started, or still starts."""
        if time.monotonic() < self._survey_at:
            return
        self._survey_at = time.monotonic() + _SURVEY_S
        known: list[dict[str, Any]] = ray.nodes()  # type: ignore[no-untyped-call]
        self._announce()
        self._nodes = [node["Resources"] for node in known if node["Alive"]]
        for name in ray.util.list_named_actors():
            if name not in self._workers:
                with contextlib.suppress(ValueError):  # it has just ended
                    self._take_on(name, ray.get_actor(name))
                    if self._address is not None:
                        self._workers[name].handle.announce.remote(self._address)

    def _announce(self) -> None:
        """Tell workers of earlier coordinators where this one listens."""
        if self._announced is None:
            return
        try:
            address = self._announced.read_text()
        except OSError:  # it has left
            return
        if address != self._address:
            self._address = address
            for worker in self._workers.values():
                if worker.ended is None:
                    worker.handle.announce.remote(address)

    def _read(self) -> None:
        for line in sys.stdin:
            self._orders.put(json.loads(line))
        self._orders.put(None)

    def _obey(self) -> bool:
        """Do what there is to do; returns whether to go on."""
        while True:
            try:
                order = self._orders.get_nowait()
            except queue.Empty:
                return True
            if order is None or order["do"] == "end":
                return False
            for worker in order["workers"]:
                if order["do"] == "start":
                    self._start(worker)
                else:
                    self._stop(worker)

    def _start(self, worker: str) -> None:
        actor = self._class.options(
            name=worker, lifetime="detached", get_if_exists=True, max_restarts=0, max_task_retries=0,
            max_concurrency=_CALLS_AT_A_TIME, **self._actors,
        )  # fmt: skip
        self._take_on(worker, actor.remote(worker, address=self._address, **self._arguments))

    def _take_on(self, name: str, handle: Any) -> None:
        self._workers[name] = _Worker(handle)
        if name in self._unknown:
            self._unknown.discard(name)
            self._stop(name)

    def _stop(self, name: str) -> None:
        worker = self._workers.get(name)
        if worker is None:
            self._unknown.add(name)
            return
        if worker.ended is not None or worker.stop_at is not None:
            return
        worker.stop_at = time.monotonic()
        if worker.host is None:  # it has no place yet
            ray.kill(worker.handle)
        else:
            worker.handle.stop.remote()

    def _look(self) -> None:
        """See which actors have got their places, and which have ended."""
        open_ones = {name: worker for name, worker in self._workers.items() if worker.ended is None}
        calls = {worker.over: (name, worker) for name, worker in open_ones.items()}
        calls |= {worker.placed: (name, worker) for name, worker in open_ones.items() if worker.host is None}
        if not calls:
            time.sleep(_WAIT_S)
            return
        ready, _ = ray.wait(list(calls), num_returns=len(calls), timeout=_WAIT_S)
        for call in ready:
            name, worker = calls[call]
            if call is worker.over:
                self._end(name, worker)
            else:
                with contextlib.suppress(exceptions.RayError):  # its other call says so, too
                    worker.host = ray.get(call)
        now = time.monotonic()
        for worker in open_ones.values():
            if worker.ended is None and worker.stop_at is not None and now > worker.stop_at + _LEAVE_S:
                worker.stop_at = now
                ray.kill(worker.handle)

    def _end(self, name: str, worker: _Worker) -> None:
        where = f" on {worker.host}" if worker.host else ""
        try:
            trouble = ray.get(worker.over)
        except exceptions.ActorUnavailableError:  # a call was lost, not the actor
            worker.over = worker.handle.work.remote()
            return
        except exceptions.RayError as error:
            cause, detail = _why(error)
            log.info("%s has ended: %s", name, error)
        else:
            cause, detail = Cause.OWN, "left" if trouble is None else f"failed: {trouble}"
        if worker.stop_at is not None:
            cause, detail = Cause.OWN, "was stopped"
        worker.ended = {"state": WorkerState.ENDED, "detail": f"{detail}{where}", "cause": cause}

    def _tell(self) -> None:
        workers = {name: worker.status() for name, worker in self._workers.items()}
        text = json.dumps({"nodes": self._nodes, "workers": workers})
        if text != self._told or time.monotonic() > self._told_at + _TELL_S:
            self._told, self._told_at = text, time.monotonic()
            self._out.write(text + "\n")


def _why(error: exceptions.RayError) -> tuple[Cause, str]:
    """Whose doing the end of an actor was, by what Ray says of it, and that in few words."""
    text = str(error)
    found = _DEATH.search(text)
    if found is None and isinstance(
        error, exceptions.ActorDiedError
    ):  # the node's end may be seen a moment later
        return Cause.KILLED, "died, and Ray does not say why"
    if "raised in its creation task" in text:
        return Cause.OWN, f"could not start: {text.strip().splitlines()[-1][:300]}"
    reason = " ".join((found[1] if found else text).split())
    if "killed by `ray.kill`" in reason:
        return Cause.CANCELLED, "was killed by ray.kill"
    if "its node has died" in reason:
        expected = getattr(error, "preempted", False) or "terminated expectedly" in reason
        return (Cause.EVICTED if expected else Cause.LOST), "ended with its node"
    if "memory" in reason and "OOM killer due to high memory usage" not in reason:
        return Cause.KILLED, f"was killed by Ray: {reason[:300]}"
    if "its worker process has died" in reason:
        return Cause.KILLED, "died: its process was killed, or has crashed"
    return Cause.OWN, f"ended: {reason[:300]}"


class _RefusedError(Exception):
    """Ray cannot be used; one line."""


def _connect(address: str | None, namespace: str, local: dict[str, Any]) -> None:
    common: dict[str, Any] = {
        "namespace": namespace, "log_to_driver": False, "logging_level": logging.ERROR, "configure_logging": False,
    }  # fmt: skip
    if address is None:
        os.environ.pop("RAY_ADDRESS", None)
        ray.init("local", include_dashboard=False, **local, **common)
        return
    _probe(address)
    try:
        ray.init(address, **common)
    except Exception as error:
        raise _RefusedError(f"Ray at {address} cannot be used: {_one_line(error)}") from error


def _probe(address: str) -> None:
    """Ray itself would try for a long time."""
    found = re.fullmatch(r"(?:ray://)?(.+):(\d+)", address)
    if found is None:  # "auto"
        return
    try:
        socket.create_connection((found[1].strip("[]"), int(found[2])), timeout=_CONNECT_S).close()
    except OSError as error:
        raise _RefusedError(f"there is no Ray at {address}: {_one_line(error)}") from error


def _one_line(error: BaseException) -> str:
    """What an error says, or what it comes from: Ray's own words are in there."""
    while error.__cause__ is not None or error.__context__ is not None:
        error = error.__cause__ or error.__context__  # type: ignore[assignment]  # one of them is there
    text = str(error)
    if "Traceback" in text:  # Ray's message is another error's, as Python prints it
        text = (_PRINTED.findall(text) or [text])[-1]
    return " ".join(text.split())[:500] or type(error).__name__


def _resolved(runtime_env: dict[str, Any]) -> dict[str, Any]:
    """With the secrets of this process's environment, which the sweep's record does not have."""
    from omegaconf import OmegaConf

    found = OmegaConf.to_container(OmegaConf.create(runtime_env), resolve=True)
    assert isinstance(found, dict)
    return {str(key): value for key, value in found.items()}


def _strategy(text: str) -> object:
    """``SPREAD``, ``DEFAULT``, or a node's id (all of its actors on that node)."""
    return text if text in ("SPREAD", "DEFAULT") else NodeAffinitySchedulingStrategy(text, soft=False)


def main() -> None:
    """Entry point; what to do with which Ray comes as the first line of JSON."""
    parser = argparse.ArgumentParser(prog="repro-sweep-ray-driver")
    parser.add_argument("--log", type=Path, default=Path(os.devnull))
    args = parser.parse_args()
    order: dict[str, Any] = json.loads(sys.stdin.readline())
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the coordinator, which tells us what to do
    with private_stdout(args.log) as out:
        try:
            _connect(order["address"], order["namespace"], order["local"])
            signal.signal(signal.SIGTERM, signal.SIG_IGN)  # and so is this, which all of a Ray job get
            actors = order["actors"]
            if "scheduling_strategy" in actors:
                actors["scheduling_strategy"] = _strategy(actors["scheduling_strategy"])
            if "runtime_env" in actors:
                actors["runtime_env"] = _resolved(actors["runtime_env"])
            announced = None if order["announced"] is None else Path(order["announced"])
            _Driver(out, actors, order["arguments"], announced).run()
        except _RefusedError as error:
            out.write(json.dumps({"error": str(error)}) + "\n")
        except BrokenPipeError:
            pass
        except Exception as error:
            log.exception("a bug, or Ray's end")
            with contextlib.suppress(BrokenPipeError):
                out.write(json.dumps({"error": f"Ray has failed: {_one_line(error)}"}) + "\n")
        ray.shutdown()


if __name__ == "__main__":
    main()
