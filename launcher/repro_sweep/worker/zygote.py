"""The zygote: imports the task once and forks a fresh child for each trial.

It must never run user code itself beyond that import, start a thread, or open CUDA: a forked child of such a process
would hang or crash. If the import did one of these, the zygote says so and forks nothing; the agent then starts a new
process for each trial (``--inline``), which runs that one trial itself.

Messages from the agent: ``{"spec"}`` first, then ``{"run": attempt, ...}`` with the trial's channel and output,
``{"kill": attempt}``, ``{"stacks": attempt}`` (into its log), and ``{"preload": modules}`` that a trial had to import.
To the agent: ``{"ready", "hazard"}`` or ``{"failed"}``, then ``{"refused", "message"}`` or ``{"ended", "status"}`` for
each trial.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import selectors
import signal
import socket
import sys
import threading
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from repro_sweep import collecting
from repro_sweep.errors import UserError
from repro_sweep.sweep import SweepSpec
from repro_sweep.worker import memory, preload, threads, wire

_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36
_libc = ctypes.CDLL(None, use_errno=True)


class Zygote:
    """Forks trials and reaps them. Single-threaded."""

    def __init__(self, sock: socket.socket, runner: Any) -> None:
        self._sock = sock
        self._runner = runner
        self._children: dict[int, str] = {}
        self._wakeup, wakeup_write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        os.set_blocking(wakeup_write, False)
        signal.set_wakeup_fd(wakeup_write, warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        _libc.prctl(_PR_SET_CHILD_SUBREAPER, 1)  # what a trial starts in a session of its own comes to us

    def serve(self) -> None:
        """Serve until the agent is gone; what still runs then is killed."""
        with selectors.DefaultSelector() as selector:
            selector.register(self._sock, selectors.EVENT_READ)
            selector.register(self._wakeup, selectors.EVENT_READ)
            while True:
                ready = {key.fileobj for key, _ in selector.select()}
                if self._wakeup in ready:
                    os.read(self._wakeup, 4096)
                    self._reap()
                if self._sock in ready:
                    message, fds = wire.receive(self._sock)
                    if message is None:
                        break
                    self._handle(message, fds)
        for pid in self._children:
            _kill_group(pid)
        self._kill_orphans("")

    def _handle(self, message: dict[str, Any], fds: list[int]) -> None:
        if "kill" in message:
            self._of(message["kill"], _kill_group)
            return
        if "stacks" in message:
            self._of(message["stacks"], lambda pid: os.kill(pid, wire.STACKS_SIGNAL))
            return
        if "preload" in message:
            preload.load(message["preload"])
            hazard = fork_hazard()
            if hazard is not None:
                wire.send(self._sock, {"ready": True, "hazard": hazard})
            return
        attempt = str(message["run"])
        zygote = os.getpid()
        try:
            if self._runner.prepare(message):
                memory.settle()
            pid = os.fork()
        except Exception as error:  # noqa: BLE001  (one trial's trouble must not end the others, which would die with us)
            traceback.print_exc()
            for fd in fds:
                os.close(fd)
            text = str(error) if isinstance(error, UserError) else f"it could not be forked: {error!r}"
            wire.send(self._sock, {"refused": attempt, "message": text})
            return
        if pid == 0:
            self._child(message, fds, zygote)
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.setpgid(pid, pid)  # here too: a kill may follow before the child has done it
        for fd in fds:
            os.close(fd)
        self._children[pid] = attempt

    def _of(self, attempt: str, do: Callable[[int], None]) -> None:
        for pid in [pid for pid, each in self._children.items() if each == attempt]:
            do(pid)

    def _child(self, message: dict[str, Any], fds: list[int], zygote: int) -> None:
        try:
            _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
            if os.getppid() != zygote:  # it died before prctl
                os._exit(1)
            os.setpgid(0, 0)
            signal.set_wakeup_fd(-1)
            _reset_signals()
            self._sock.close()
            os.close(self._wakeup)
            self._runner.run(message, fds)
        except BaseException:  # noqa: BLE001  (the last frame of a child: nothing may return into the zygote's loop)
            traceback.print_exc()
        finally:
            os._exit(1)

    def _kill_orphans(self, attempt: str) -> None:
        """Kill what this attempt, or with ``""`` any, has started outside of its process group and left to us."""
        mine = f"REPRO_SWEEP_ATTEMPT={attempt}".encode()
        children = Path(f"/proc/self/task/{os.getpid()}/children")
        for pid in map(int, children.read_text().split()) if children.exists() else ():
            if pid not in self._children and any(entry.startswith(mine) for entry in _environment(pid)):
                _kill_group(pid)
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)

    def _reap(self) -> None:
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if pid == 0:
                return
            attempt = self._children.pop(pid, None)
            if attempt is not None:
                _kill_group(pid)  # what the trial left behind
                self._kill_orphans(attempt)
                wire.send(self._sock, {"ended": attempt, "status": os.waitstatus_to_exitcode(status)})


def _reset_signals() -> None:
    """As in a fresh process: the coordinator and the agent ignore some of them."""
    for number in (signal.SIGCHLD, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)


def _environment(pid: int) -> list[bytes]:
    try:
        return Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    except OSError:  # it has ended meanwhile
        return []


def fork_hazard() -> str | None:
    """Why a fork of this process is unsafe after the task's import, None when it is safe."""
    names = [thread.name for thread in threading.enumerate() if thread is not threading.main_thread()]
    if names:
        return f"importing it starts threads ({', '.join(names)})"
    native = len(list(Path("/proc/self/task").iterdir())) - 1
    if native > 0:
        return f"importing it starts {native} native threads"
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        return "importing it initialises CUDA"
    return None


def _kill_group(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, signal.SIGKILL)


def main() -> None:
    """Entry point: ``python -m repro_sweep.worker.zygote FD [--inline]``."""
    signal.signal(
        wire.LEAVE_SIGNAL, signal.SIG_IGN
    )  # SLURM sends it to all processes of a job, and the agent heeds it
    sock = socket.socket(fileno=int(sys.argv[1]))
    sock.set_inheritable(False)
    message, _ = wire.receive(sock)
    if message is None:
        return
    spec = SweepSpec.model_validate_json(message["spec"])
    threads.limit()
    with collecting.rarely_meanwhile():
        from repro_sweep.worker.runner import Runner

    try:
        with collecting.rarely_meanwhile():
            runner = Runner(spec)
    except UserError as error:
        wire.send(sock, {"failed": str(error)})
        return
    if "--inline" in sys.argv:
        _reset_signals()
        _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)  # the agent's slot that started us outlives us
        wire.send(sock, {"ready": True, "hazard": None})
        message, fds = wire.receive(sock)
        if message is not None:
            try:
                runner.prepare(message)
            except UserError as error:
                wire.send(sock, {"refused": message["run"], "message": str(error)})
                return
            runner.run(message, fds)
        return
    hazard = fork_hazard()
    wire.send(sock, {"ready": True, "hazard": hazard})
    if hazard is None:
        Zygote(sock, runner).serve()


if __name__ == "__main__":
    with contextlib.suppress(BrokenPipeError):  # the agent is gone
        main()
