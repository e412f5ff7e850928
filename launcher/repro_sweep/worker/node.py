"""The process in which the workers of a Ray node run: an agent for each actor of the sweep that is there.

They share one zygote, so the task is imported once a node. An actor is a connection (:mod:`repro_sweep.worker.ray`);
JSON lines::

    actor -> node   {"worker": id, "directory": …, "socket": … or null, "address": … or null, "visible": "0,1",
                     "slots": 2, "gpus": of a trial}, then
                    {"stop": true}, or {"address": …}: there is another coordinator
    node -> actor   {"trouble": "one line" or null}, when its agent has left

``address`` is the text of the coordinator's ``coordinator.json``. Where the sweep's directory, with that file in it, is
not to be seen, trials run in a folder of this machine (:mod:`repro_sweep.worker.scratch`).

When an actor is gone, so is its worker: its trial is killed, and whoever looks after the actors says why. The process
leaves some seconds after the last of them.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import json
import logging
import os
import select
import shutil
import signal
import socket
import sys
import threading
import time
from pathlib import Path
from typing import Any

from repro_sweep import machine
from repro_sweep.lease import address_of
from repro_sweep.spool import worker_directory
from repro_sweep.sweep import Resources
from repro_sweep.worker.agent import Agent
from repro_sweep.worker.nursery import Nursery
from repro_sweep.worker.ray import LOCK
from repro_sweep.worker.scratch import Scratch
from repro_sweep.worker.wire import LEAVE_SIGNAL, STACKS_SIGNAL

_LINGER_S = 10.0
_LOOK_S = 1.0

log = logging.getLogger(__name__)


class _Shared(Nursery):
    """A zygote for all agents of this process, with which it ends."""

    def close(self) -> None:
        """The others still need it."""


class Node:
    """Serves actors until there are none.

    Args:
        folder: its own, where the listening socket and the lock are.
        listener: the socket.
    """

    def __init__(self, folder: Path, listener: socket.socket) -> None:
        self._folder = folder
        self._listener = listener
        self._lock = threading.Lock()
        self._scratch: Scratch | None = None
        self._nurseries: dict[str, _Shared] = {}
        self._actors = 0
        self._alone_since = time.monotonic()

    def serve(self) -> None:
        """Accept actors; returns when the last one has long gone."""
        while True:
            if select.select([self._listener], [], [], _LOOK_S)[0]:
                connection, _ = self._listener.accept()
                with self._lock:
                    self._actors += 1
                threading.Thread(target=self._attend, args=(connection,), daemon=True).start()
            elif not self._actors and time.monotonic() > self._alone_since + _LINGER_S and self._leave():
                return

    def _leave(self) -> bool:
        """Leave, if nobody is just coming."""
        with (self._folder.parent / LOCK).open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if select.select([self._listener], [], [], 0)[0]:
                return False
            shutil.rmtree(self._folder, ignore_errors=True)
            return True

    def _attend(self, connection: socket.socket) -> None:
        with connection, connection.makefile("rb") as lines:
            try:
                self._host(connection, json.loads(next(lines)), lines)
            except (OSError, ValueError, StopIteration):  # it is gone
                pass
            except Exception:
                log.exception("an actor")
        with self._lock:
            self._actors -= 1
            self._alone_since = time.monotonic()

    def _host(self, connection: socket.socket, hello: dict[str, Any], lines: Any) -> None:
        worker, directory, site = hello["worker"], Path(hello["directory"]), self._site(hello)
        if site is not None:
            directory = site.directory
        worker_directory(directory, worker).mkdir(parents=True, mode=0o700, exist_ok=True)
        has = machine.inspect({"CUDA_VISIBLE_DEVICES": hello["visible"]})
        slots = machine.slots(has, Resources(gpus=hello["gpus"]), hello["slots"])
        agent = Agent(worker, directory, hello["socket"], slots, nursery=self._nursery, site=site)

        def hear() -> None:
            with contextlib.suppress(OSError):
                for line in lines:
                    _obey(json.loads(line), agent, site)
            agent.abandon()

        threading.Thread(target=hear, daemon=True, name=f"{worker} actor").start()
        well = agent.work()
        connection.sendall(json.dumps({"trouble": None if well else agent.trouble}).encode() + b"\n")
        connection.shutdown(socket.SHUT_RDWR)

    def _site(self, hello: dict[str, Any]) -> Scratch | None:
        """Where trials run; None: the sweep's directory is to be seen here."""
        if hello["address"] is None or _sees(Path(hello["directory"]), json.loads(hello["address"])):
            return None
        with self._lock:
            if self._scratch is None:
                self._scratch = Scratch(self._folder / "scratch")
                log.info(
                    "%s is not to be seen here: trials run in %s", hello["directory"], self._scratch.directory
                )
            self._scratch.announce(hello["address"])
            return self._scratch

    def _nursery(self, spec: str) -> Nursery:
        with self._lock:
            found = self._nurseries.get(spec)
            if found is None or found.failed is not None:
                found = self._nurseries[spec] = _Shared(spec)
            return found


def _obey(said: dict[str, Any], agent: Agent, site: Scratch | None) -> None:
    if "stop" in said:
        agent.stop()
    elif site is not None:
        try:
            site.announce(said["address"])
        except OSError:
            log.exception("the next coordinator's address cannot be noted")


def _sees(directory: Path, address: dict[str, Any]) -> bool:
    """Whether a directory is that of the sweep whose coordinator listens at the address, or of a later one."""
    found = address_of(directory)
    if found is None or found.epoch != address["epoch"]:
        return found is not None and found.epoch > address["epoch"]
    return bool(found.token == address["token"])


def main() -> None:
    """Entry point: ``python -m repro_sweep.worker.node FOLDER FD``."""
    parser = argparse.ArgumentParser(prog="repro-sweep-node")
    parser.add_argument("folder", type=Path)
    parser.add_argument("listener", type=int, help="the descriptor of the listening socket")
    args = parser.parse_args()
    os.environ.pop("CUDA_VISIBLE_DEVICES", None)  # one actor's: each trial gets its own
    for number in (signal.SIGINT, signal.SIGHUP, STACKS_SIGNAL, LEAVE_SIGNAL):
        signal.signal(number, signal.SIG_IGN)
    logging.basicConfig(
        format="%(asctime)s %(threadName)s %(name)s %(levelname)s %(message)s",
        level=logging.INFO,
        stream=sys.stderr,
    )
    listener = socket.socket(fileno=args.listener)
    listener.set_inheritable(False)
    Node(args.folder, listener).serve()
    os._exit(0)  # no thread here has anything left to do


if __name__ == "__main__":
    main()
