"""A worker that runs as a Ray actor: one slot, with what Ray has given to the actor.

Its slot's GPUs are those that Ray shows to it. What runs here is the agent; trials are processes of its own, which end
with this one.
"""

from __future__ import annotations

import logging
import os
import threading
from pathlib import Path

from repro_sweep import host, machine
from repro_sweep.spool import worker_directory
from repro_sweep.worker.agent import Agent

_GOODBYE_S = 2.0

log = logging.getLogger(__name__)


class RayWorker:
    """What :mod:`repro_sweep.ray_driver` makes an actor of, with several calls at a time.

    Args:
        worker: its id.
        directory: the sweep's.
        socket: where the coordinator listens on this machine; None: over TCP.
        gpus: whether the slot has any.
    """

    def __init__(self, worker: str, directory: str, socket: str | None, *, gpus: bool) -> None:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", "") if gpus else ""
        slot = machine.inspect({"CUDA_VISIBLE_DEVICES": visible}).gpus
        own = worker_directory(Path(directory), worker)
        own.mkdir(parents=True, mode=0o700, exist_ok=True)
        handler = logging.FileHandler(own / "worker.log")
        handler.setFormatter(logging.Formatter("%(asctime)s %(name)s %(levelname)s %(message)s"))
        ours = logging.getLogger("repro_sweep")
        ours.addHandler(handler)
        ours.setLevel(logging.INFO)
        self._agent = Agent(worker, Path(directory), socket, [slot])
        self._lock = threading.Lock()
        self._over = threading.Event()
        self._thread: threading.Thread | None = None
        self._well = False

    def where(self) -> str:
        """The name of the machine: that this is answered means that the actor has its place."""
        return host.name()

    def work(self) -> bool:
        """Work until there is nothing more to do; returns whether all went well. May be called again and again.

        The actor's process ends soon after.
        """
        with self._lock:
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, name="agent")
                self._thread.start()
        self._over.wait()
        return self._well

    def stop(self) -> None:
        """Have the agent stop its trials and leave."""
        self._agent.stop()

    def _work(self) -> None:
        try:
            self._well = self._agent.work()
        except Exception:
            log.exception("the agent")
        self._over.set()
        threading.Timer(_GOODBYE_S, os._exit, (0,)).start()
