"""``sweep/executor=ray``: workers as Ray actors, which Ray places wherever there is room.

Ray itself is spoken with by another process (``ray_driver``), which this module keeps alive: Ray ends a driver whose
cluster is lost, and until the next one is connected all that was known stays. Workers are named before they are
started, so that an order is repeated to the next driver without starting anything twice.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from repro_sweep import machine
from repro_sweep.errors import SweepError
from repro_sweep.executors.base import (
    ALIVE,
    GONE,
    Cause,
    Context,
    Executor,
    Outlook,
    WorkerState,
    WorkerStatus,
)
from repro_sweep.lease import ADDRESS_NAME
from repro_sweep.spool import worker_directory

LOG_NAME = "ray.log"
_DRIVER = "repro_sweep.ray_driver"
_WHERE = "sweep.executor"
_ANSWER_S = 60.0
_PAUSE_S = 2.0
_ALL_SEEN_S = 5.0
"""Until then an earlier driver may still be starting what it was told to."""
_LOST_S = 60.0
"""Workers of a Ray that cannot be reached for so long are counted on no more, unless they speak for themselves."""
_GIVE_UP_S = float(os.environ.get("REPRO_SWEEP_RAY_GIVE_UP_S", "600"))  # shorter in tests
_GIB = 1024**3
_ROUNDING = 1e-9

_LOOPBACK_ONLY = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}
"""Elsewhere Ray listens on loopback only; so it says that this is no place for a cluster (``ray_constants``)."""
_TRY_FOR_S = {"RAY_NUM_REDIS_GET_RETRIES": "6"}
"""How often Ray tries to connect, once a second (``ray_constants``)."""

log = logging.getLogger(__name__)


@dataclass
class Options:
    """The names are Ray's, where it has one.

    ``address``: a cluster's, as ``ray.init`` takes it; null: RAY_ADDRESS, else a Ray is started on this machine, and
    stopped afterwards. ``workers``: the most actors at a time; null: as many as the cluster can hold. ``slots``: trials
    at a time in an actor, which asks for what all of them need (``sweep.resources``, and the custom ``resources``).
    ``autoscaling``: nodes may be added, so one that can hold an actor need not be there yet.
    ``scheduling_strategy``: SPREAD, DEFAULT (null), or a node's id. ``runtime_env``: Ray's, for the workers.
    ``host``: the name or address at which the workers reach this machine; null: its own.
    """

    address: str | None = "${oc.env:RAY_ADDRESS,null}"
    workers: int | None = None
    slots: int = 1
    autoscaling: bool = False
    resources: dict[str, float] = field(default_factory=dict)
    scheduling_strategy: str | None = None
    runtime_env: dict[str, Any] = field(default_factory=dict)
    host: str | None = None


def remote(options: Options) -> bool:
    """Whether the workers may be on other machines."""
    return options.address is not None


class RayExecutor(Executor):
    """Workers as detached actors of a Ray cluster.

    Raises:
        SweepError: Ray is not installed, or an option cannot be used.
    """

    def __init__(self, context: Context, options: Options) -> None:
        if find_spec("ray") is None:
            raise SweepError("sweep/executor=ray: Ray is not installed; pip install 'repro-sweep[ray]'")
        _check(options, context)
        self._context = context
        self._options = options
        self._directory = Path(context.spec.directory)
        self._need = need(options, context)
        self._here = machine.inspect() if options.address is None else None
        self._gone = _MISSING if self._here is None else _LOST
        self._lock = threading.Lock()
        self._known: dict[str, WorkerStatus] = dict.fromkeys(self._earlier(), ALIVE)
        self._ordered: set[str] = set()
        self._stopped: set[str] = set()
        self._seen: set[str] = set()
        self._heard_first = math.inf
        self._nodes: Sequence[Mapping[str, float]] | None = None if self._here is None else [self._have()]
        self._failed: SweepError | None = None
        self._process: subprocess.Popen[str] | None = None
        self._thread: threading.Thread | None = None
        self._closing = False
        self._connected = False

    def describe(self) -> str:
        """How many actors, with what each, and where."""
        most = self._options.workers
        actors = "as many Ray actors as fit" if most is None else f"up to {most} Ray actors"
        where = "on this machine" if self._options.address is None else f"at {self._options.address}"
        slots = "" if self._options.slots == 1 else f" and {self._options.slots} slots"
        return f"{actors} with {_described(self._need)}{slots} each, {where}"

    def outlook(self, trials: int) -> Outlook:
        """See that Ray can be reached, and that one of its nodes can hold an actor."""
        del trials
        if self._here is not None:
            nodes: Sequence[Mapping[str, float]] = [self._have()]
        else:
            found = self._ask_once()
            if isinstance(found, str):
                return Outlook(problems=(f"sweep/executor=ray: {found}",))
            nodes = found
        if any(fitting(node, self._need) for node in nodes):
            return Outlook()
        no_room = f"sweep/executor=ray: {self._no_room(nodes)}"
        if self._options.autoscaling:
            return Outlook(notes=(f"{no_room}; it waits for a node that can",))
        return Outlook(
            problems=(f"{no_room}; where nodes are added on demand, set {_WHERE}.autoscaling=true",)
        )

    def wanted(self, trials: int) -> int:
        """As many as have enough slots; not more than the cluster can hold now, or ``workers``; one at least."""
        most = self._options.workers
        if most is None:
            nodes = self._nodes
            most = 1 if nodes is None else max(1, sum(fitting(node, self._need) for node in nodes))
        return min(most, math.ceil(trials / self._options.slots))

    def start(self, count: int) -> list[str]:
        """Order actors; returns at once, and they may have to wait for their place."""
        self._raise_failure()
        workers = [f"ray-{uuid.uuid4().hex[:10]}" for _ in range(count)]
        for worker in workers:
            worker_directory(self._directory, worker).mkdir(parents=True, mode=0o700, exist_ok=True)
        with self._lock:
            self._known |= dict.fromkeys(workers, ALIVE)
            self._ordered.update(workers)
        self._serve()
        self._say({"do": "start", "workers": workers})
        return workers

    def poll(self) -> Mapping[str, WorkerStatus]:
        """What Ray has said last; actors of which it has said nothing yet are alive."""
        self._raise_failure()
        if self._known and self._options.address is not None:
            self._serve()
        with self._lock:
            return dict(self._known)

    def stop(self, workers: Iterable[str]) -> None:
        """Have the agents stop their trials and leave; actors that wait for a place are withdrawn."""
        with self._lock:
            chosen = [worker for worker in workers if self._known[worker].state not in GONE]
            self._stopped.update(chosen)
        if chosen:
            self._serve()
            self._say({"do": "stop", "workers": chosen})

    def close(self, timeout_s: float) -> None:
        """Wait for the actors, which the driver kills if they do not leave; then end it."""
        deadline = time.monotonic() + timeout_s
        self._closing = True
        if self._failed is None:
            self.stop(list(self._known))
            while time.monotonic() < deadline and any(
                each.state not in GONE for each in self._known.values()
            ):
                time.sleep(0.05)
        self._say({"do": "end"})
        process = self._process
        if process is not None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(max(1.0, deadline - time.monotonic()))
            process.kill()
            process.wait()
            if process.stdin is not None:
                with contextlib.suppress(OSError):
                    process.stdin.close()
        if self._thread is not None:
            self._thread.join(_PAUSE_S)
        if self._here is not None:  # that Ray has ended with its driver
            with self._lock:
                self._known |= {
                    name: _LOST for name, status in self._known.items() if status.state not in GONE
                }

    # --- the driver --------------------------------------------------------------------------------------------

    def _raise_failure(self) -> None:
        if self._failed is not None:
            raise self._failed

    def _serve(self) -> None:
        if self._thread is None:
            self._thread = threading.Thread(target=self._keep, daemon=True, name="ray")
            self._thread.start()

    def _keep(self) -> None:
        """Keep a driver running, and note what it says."""
        heard_at = time.monotonic()
        while not self._closing or not self._connected:
            if self._process is not None and self._process.stdin is not None:
                with contextlib.suppress(OSError):
                    self._process.stdin.close()
            self._process = self._start_driver(LOG_NAME)
            self._repeat()
            assert self._process.stdout is not None
            error = "it has ended without a word"
            for line in self._process.stdout:
                said = json.loads(line)
                if "error" in said:
                    error = said["error"]
                    continue
                heard_at = time.monotonic()
                self._connected = True
                self._note(said)
            self._process.stdout.close()
            self._process.wait()
            if self._closing:
                return
            log.warning("the driver has ended: %s", error)
            silent_s = time.monotonic() - heard_at
            if not self._connected or silent_s > _GIVE_UP_S:
                self._failed = SweepError(f"sweep/executor=ray: {error} (see {self._directory / LOG_NAME})")
                return
            if self._here is not None or silent_s > _LOST_S:
                self._lose(error)
            time.sleep(_PAUSE_S)

    def _start_driver(self, log_name: str | None) -> subprocess.Popen[str]:
        spec, options = self._context.spec, self._options
        actors: dict[str, Any] = {
            "num_cpus": self._need.get("CPU", 0.0),
            "num_gpus": self._need.get("GPU", 0.0),
            "resources": dict(options.resources) or None,
            "memory": self._need.get("memory"),
            "scheduling_strategy": options.scheduling_strategy,
            "runtime_env": dict(options.runtime_env) or None,
        }
        here = self._have() if self._here is not None else {}
        order = {
            "address": options.address,
            "namespace": f"repro-sweep-{spec.sweep_id}",
            "local": {"num_cpus": here["CPU"], "num_gpus": here["GPU"], "resources": options.resources} if here else {},
            "actors": {key: value for key, value in actors.items() if value is not None},
            "announced": None if here else str(self._directory / ADDRESS_NAME),
            "arguments": {
                "sweep_id": spec.sweep_id,
                "directory": spec.directory,
                "socket_path": self._context.socket if options.address is None else None,
                "slots": options.slots,
                "gpus": spec.resources.gpus,
            },
        }  # fmt: skip
        command = [sys.executable, "-P", "-m", _DRIVER]
        command += ["--log", str(self._directory / log_name)] if log_name is not None else []
        try:
            process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True,
                env={**_TRY_FOR_S, **os.environ, **(_LOOPBACK_ONLY if options.address is None else {})},
            )  # fmt: skip
        except OSError as error:
            raise SweepError(f"sweep/executor=ray: the driver cannot be started: {error}") from error
        assert process.stdin is not None
        with contextlib.suppress(OSError):  # it has ended, and its reader will see that
            process.stdin.write(json.dumps(order) + "\n")
            process.stdin.flush()
        return process

    def _repeat(self) -> None:
        """Tell a new driver what the last one may not have done."""
        with self._lock:
            open_ones = [name for name, status in self._known.items() if status.state not in GONE]
            start = [name for name in open_ones if name in self._ordered - self._seen]
            stop = [name for name in open_ones if name in self._stopped]
        self._say({"do": "start", "workers": start})
        self._say({"do": "stop", "workers": stop})

    def _say(self, message: Mapping[str, Any]) -> None:
        process = self._process
        if process is None or process.stdin is None:
            return  # it is said to the next one
        with contextlib.suppress(OSError, ValueError):
            process.stdin.write(json.dumps(message) + "\n")
            process.stdin.flush()

    def _note(self, said: Mapping[str, Any]) -> None:
        found = {name: _status(status) for name, status in said["workers"].items()}
        self._heard_first = min(self._heard_first, time.monotonic())
        all_seen = time.monotonic() > self._heard_first + _ALL_SEEN_S
        with self._lock:
            self._nodes = said["nodes"] if self._here is None else self._nodes
            self._seen |= set(found)
            for name, status in self._known.items():
                if name in found:
                    self._known[name] = found[name]
                elif status.state not in GONE and (
                    name in self._seen or (name not in self._ordered and all_seen)
                ):  # it has ended, or this is another cluster, while what is left of the last one goes on
                    self._known[name] = self._gone
            self._known |= {name: status for name, status in found.items() if name not in self._known}

    def _lose(self, why: str) -> None:
        gone = self._gone if self._here is not None else replace(self._gone, detail=f"is out of reach: {why}")
        with self._lock:
            self._known |= {
                name: gone
                for name, status in self._known.items()
                if status.state not in GONE and name in self._seen
            }

    def _earlier(self) -> list[str]:
        """The workers that earlier coordinators of the sweep have ordered."""
        return sorted(path.name for path in self._directory.glob("workers/ray-*"))

    # --- what fits ---------------------------------------------------------------------------------------------

    def _ask_once(self) -> Sequence[Mapping[str, float]] | str:
        """The nodes of the cluster, or why they cannot be seen."""
        process = self._start_driver(None)
        timer = threading.Timer(_ANSWER_S, process.kill)
        timer.start()
        try:
            assert process.stdout is not None
            assert process.stdin is not None
            line = process.stdout.readline()
            process.stdin.close()
            process.stdout.close()
        finally:
            timer.cancel()
            process.kill()
            process.wait()
        if not line:
            return f"Ray at {self._options.address} says nothing for {_ANSWER_S:.0f} s"
        said = json.loads(line)
        return str(said["error"]) if "error" in said else said["nodes"]

    def _have(self) -> dict[str, float]:
        """What a Ray on this machine has."""
        assert self._here is not None
        resources = {"CPU": float(self._here.cpus), "GPU": float(len(self._here.gpus))}
        return {**resources, "memory": self._here.mem_gb * _GIB, **self._options.resources}

    def _no_room(self, nodes: Sequence[Mapping[str, float]]) -> str:
        most = {key: max((node.get(key, 0.0) for node in nodes), default=0.0) for key in self._need}
        slots = self._options.slots
        what, also = (
            ("a trial, which needs", "")
            if slots == 1
            else (f"{slots} trials, which need", f", {_WHERE}.slots")
        )
        return (
            f"no node can hold {what} {_described(self._need)} (sweep.resources, {_WHERE}.resources{also});"
            f" the most that any of {len(nodes)} nodes has is {_described(most)}"
        )


def need(options: Options, context: Context) -> dict[str, float]:
    """What an actor asks Ray for, in Ray's words; memory in bytes."""
    resources = context.spec.resources
    asked = {"CPU": resources.cpus, "GPU": resources.gpus, "memory": (resources.mem_gb or 0.0) * _GIB}
    return {key: value * options.slots for key, value in {**asked, **options.resources}.items() if value > 0}


def fitting(node: Mapping[str, float], wanted: Mapping[str, float]) -> int:
    """How many actors a node can hold when nothing else is there. Shares of a GPU are of one GPU."""
    counts = []
    for key, each in wanted.items():
        has = node.get(key, 0.0)
        counts.append(machine.trials_on(int(has), each) if key == "GPU" else int(has / each + _ROUNDING))
    return min(counts, default=0)


def _described(amounts: Mapping[str, float]) -> str:
    words = []
    for key, value in amounts.items():
        if key == "memory":
            words.append(f"{math.floor(10 * value / _GIB) / 10:g} GiB")
        else:
            words.append(f"{value:g} {key if key not in ('CPU', 'GPU') else key + 's'}")
    return ", ".join(words) or "nothing"


def _check(options: Options, context: Context) -> None:
    if options.slots < 1:
        raise SweepError(f"{_WHERE}.slots: must be at least 1, got {options.slots}")
    share = context.spec.resources.gpus
    gpus = share * options.slots
    need = f"{_WHERE}.slots: {options.slots} slots with {share:g} GPUs each need {gpus:g} GPUs"
    if gpus > 1 and abs(gpus - round(gpus)) > _ROUNDING:
        raise SweepError(f"{need}, which is not a whole number")
    if gpus > 1 and options.slots > (fit := machine.trials_on(round(gpus), share)):
        raise SweepError(f"{need}, but these hold {fit}, as a trial has its share of one GPU")
    if options.workers is not None and options.workers < 1:
        raise SweepError(f"{_WHERE}.workers: must be at least 1, got {options.workers}")
    for key, value in options.resources.items():
        if key in ("CPU", "GPU", "memory"):
            raise SweepError(f"{_WHERE}.resources.{key}: set sweep.resources instead")
        if not value > 0:
            raise SweepError(f"{_WHERE}.resources.{key}: must be greater than 0, got {value}")
    if options.autoscaling and options.workers is None:
        raise SweepError(f"{_WHERE}.autoscaling: needs {_WHERE}.workers, the most actors to ask for")
    if options.runtime_env and options.address is None:
        raise SweepError(
            f"{_WHERE}.runtime_env: needs {_WHERE}.address: a Ray of this machine has its environment"
        )


def _status(said: Mapping[str, str]) -> WorkerStatus:
    return WorkerStatus(
        state=WorkerState(said["state"]), detail=said.get("detail"), cause=Cause(said.get("cause", Cause.OWN))
    )


_LOST = WorkerStatus(state=WorkerState.ENDED, detail="is gone", cause=Cause.LOST)
_MISSING = replace(_LOST, state=WorkerState.MISSING)


REMOTE = SHIPS_SOURCE = remote
SHARES_MACHINE = True
OPTIONS = Options
EXECUTOR = RayExecutor
