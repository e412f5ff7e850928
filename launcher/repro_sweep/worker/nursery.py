"""Starts trials for an agent, through the zygote or, where forking is unsafe, in a new process each.

An agent's slots call it from their threads; one thread of its own reads the zygote's messages.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from repro_sweep.sweep import SweepSpec
from repro_sweep.worker import seeding, wire
from repro_sweep.worker.wire import STACKS_SIGNAL

_MOST_KILLS = 3

log = logging.getLogger(__name__)


@dataclass(slots=True)
class Child:
    """A trial's process. ``ended`` is an eventfd that becomes readable when it is over.

    ``lost``: it went down with the zygote, through no fault of its own.
    """

    attempt: str
    ended: int
    status: int | None = None
    refused: str | None = None
    lost: bool = False
    process: subprocess.Popen[bytes] | None = field(default=None, repr=False)

    closed: bool = False
    guard: threading.Lock = field(default_factory=threading.Lock, repr=False)

    def over(self, status: int | None = None, refused: str | None = None, *, lost: bool = False) -> None:
        """Set the end and wake the slot, if it still looks."""
        with self.guard:
            self.status, self.refused, self.lost = status, refused, lost
            if not self.closed:
                os.eventfd_write(self.ended, 1)

    def close(self) -> None:
        """The slot does not look any more; the process may still be ending."""
        with self.guard:
            self.closed = True
            os.close(self.ended)


class Nursery:
    """The zygote and the trials that it forked."""

    def __init__(self, spec: str) -> None:
        self._spec = spec
        self._lock = threading.Lock()
        self._children: dict[str, Child] = {}
        self._ready = threading.Event()
        self._hazard: str | None = None
        self._failed: str | None = None
        self._closing = False
        self._kills = 0
        self._preloaded: set[str] = set()
        self._process, self._sock = _start(spec)
        threading.Thread(target=self._read, daemon=True, name="zygote").start()

    @property
    def failed(self) -> str | None:
        """Why no trial can be started here any more."""
        return self._failed

    def wait_ready(self) -> None:
        """Block until the task has been imported, or its import has failed."""
        self._ready.wait()

    def start(self, request: Mapping[str, Any], channel: int, output: int) -> Child:
        """Start a trial; blocks until the task has been imported. The descriptors stay the caller's to close."""
        child = Child(attempt=request["run"], ended=os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK))
        self._ready.wait()
        with self._lock:
            inline = self._hazard is not None
            if self._failed is not None:
                child.over(lost=True)
            elif not inline:
                self._children[child.attempt] = child
                try:
                    wire.send(self._sock, dict(request), [channel, output])
                except OSError:  # the zygote is gone; the reader starts another
                    del self._children[child.attempt]
                    child.over(lost=True)
        if inline:
            self._start_inline(child, request, channel, output)
        return child

    def preload(self, modules: Sequence[str]) -> None:
        """Have the zygote import what a trial had to import, once for all later trials."""
        with self._lock:
            new = [module for module in modules if module not in self._preloaded]
            if new and self._hazard is None:
                self._preloaded.update(new)
                with contextlib.suppress(OSError):
                    wire.send(self._sock, {"preload": new})

    def kill(self, child: Child) -> None:
        """Kill a trial with everything it started."""
        if child.process is not None:
            _kill_group(child.process.pid)
            return
        with self._lock:
            if child.attempt in self._children:
                with contextlib.suppress(OSError):  # the zygote is gone, and took its children with it
                    wire.send(self._sock, {"kill": child.attempt})

    def show_stacks(self, child: Child) -> None:
        """Have a trial write its Python stacks to its log."""
        if child.process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(child.process.pid, STACKS_SIGNAL)
            return
        with self._lock:
            if child.attempt in self._children:
                with contextlib.suppress(OSError):
                    wire.send(self._sock, {"stacks": child.attempt})

    def close(self) -> None:
        """End the zygote and wait for it."""
        self._closing = True
        self._sock.shutdown(socket.SHUT_RDWR)
        self._process.wait()

    def _read(self) -> None:
        while True:
            try:
                message, _ = wire.receive(self._sock)
            except OSError:
                message = None
            if message is None:
                break
            self._take(message)
        killed = self._process.wait() == -signal.SIGKILL and self._kills < _MOST_KILLS
        with self._lock:
            children, self._children = list(self._children.values()), {}
            # from outside, while it imported the task
            if not self._ready.is_set() and killed and not self._closing:
                self._kills += 1
                self._restart()
            elif not self._ready.is_set():
                self._failed = "the process that imports the task died (see the worker's worker.log)"
            elif self._hazard is None and self._failed is None and not self._closing:
                self._ready.clear()
                self._restart()
        for child in children:
            child.over(lost=True)
        if self._failed is not None:
            self._ready.set()

    def _restart(self) -> None:
        self._preloaded.clear()
        self._process, self._sock = _start(self._spec)
        threading.Thread(target=self._read, daemon=True, name="zygote").start()

    def _take(self, message: dict[str, Any]) -> None:
        if "failed" in message:
            self._failed = message["failed"]
            self._ready.set()
        elif "ready" in message:
            self._hazard = message["hazard"]
            if self._hazard is not None:
                log.warning("the task cannot be forked: %s; each trial gets a new process", self._hazard)
            self._ready.set()
        else:
            with self._lock:
                child = self._children.pop(message.get("ended") or message["refused"], None)
            if child is not None:
                child.over(message.get("status"), message.get("message"))

    def _start_inline(self, child: Child, request: Mapping[str, Any], channel: int, output: int) -> None:
        process, sock = _start(self._spec, "--inline")
        child.process = process

        def wait() -> None:
            refused = None
            with sock, contextlib.suppress(OSError):  # it may be killed at any moment
                message, _ = wire.receive(sock)
                if message is not None and "ready" in message:
                    wire.send(sock, dict(request), fds)
                    message, _ = wire.receive(sock)
                if message is not None:
                    refused = message.get("failed") or message.get("message")
            for fd in fds:
                os.close(fd)
            status = process.wait()
            _kill_group(process.pid)
            child.over(status, refused)

        fds = [os.dup(channel), os.dup(output)]
        threading.Thread(target=wait, daemon=True, name=f"trial {child.attempt}").start()


def _start(spec: str, *options: str) -> tuple[subprocess.Popen[bytes], socket.socket]:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    with theirs:
        command = [sys.executable, "-P", "-m", "repro_sweep.worker.zygote", str(theirs.fileno()), *options]
        determinism = SweepSpec.model_validate_json(spec).determinism
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, pass_fds=[theirs.fileno()], start_new_session=True,
            env={**os.environ, **seeding.interpreter(determinism, os.environ)},
        )  # fmt: skip
    wire.send(ours, {"spec": spec})
    return process, ours


def _kill_group(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, signal.SIGKILL)
