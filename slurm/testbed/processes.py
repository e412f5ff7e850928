"""Processes by pid and start time: to ask whether they live, to end them, and to find what jobs have left.

A pid alone is not enough: the kernel gives it out again. Never ends a process that isn't named to it.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from slurm.testbed.errors import TestbedError

_PROC = Path("/proc")
_POLL_S = 0.02
# a process that is just replacing its program has no environment to be told by
_LOOKS = 2


def wait_until(condition: Callable[[], object], what: str, timeout_s: float, poll_s: float = _POLL_S) -> None:
    """Ask until a condition holds.

    Raises:
        TestbedError: It does not within ``timeout_s``.
    """
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            raise TestbedError(f"not within {timeout_s:g} s: {what}")
        time.sleep(poll_s)


@dataclass(frozen=True, slots=True, kw_only=True)
class Process:
    """One process; ``started_ticks`` is its start in clock ticks since boot."""

    pid: int
    started_ticks: int

    @classmethod
    def find(cls, pid: int) -> Process | None:
        """The process that has this pid now; None where there is none, or only a zombie."""
        fields = _stat(pid)
        return None if fields is None else cls(pid=pid, started_ticks=int(fields[19]))

    @property
    def alive(self) -> bool:
        """Whether it runs; a zombie does not."""
        return Process.find(self.pid) == self

    def send(self, number: signal.Signals) -> None:
        """Send a signal, if it still runs."""
        if self.alive:
            try:
                os.kill(self.pid, number)
            except ProcessLookupError:
                return


def end(processes: Iterable[Process], *, patience_s: float) -> None:
    """End processes: SIGTERM to all, and SIGKILL to those that are still there after ``patience_s``.

    Raises:
        TestbedError: One survives even that.
    """
    group = list(processes)
    for process in group:
        process.send(signal.SIGTERM)
    try:
        wait_until(lambda: not _living(group), "processes end", patience_s)
    except TestbedError:
        kill(group)


def kill(processes: Iterable[Process]) -> None:
    """Kill processes and wait until they are gone.

    Raises:
        TestbedError: One is still there after some seconds.
    """
    group = list(processes)
    for process in group:
        process.send(signal.SIGKILL)
    wait_until(lambda: not _living(group), f"killed processes end: {[process.pid for process in group]}", 10)


def kill_all(find: Callable[[], list[Process]]) -> None:
    """Kill what is found until nothing is: a process may just have started another, which a look can miss as well."""
    looks = 0
    while looks < _LOOKS:
        found = find()
        kill(found)
        looks = 0 if found else looks + 1


def of_jobs(slurm_conf: Path, log: Callable[[str], Path], nodes: Collection[str]) -> list[Process]:
    """What the jobs on some nodes of a cluster run: the tasks and the slurmstepds that own them.

    A task is told by its environment, which it keeps when it leaves its job's process tree. A slurmstepd overwrites
    its own environment with its title, but has its node's ``log`` open.
    """
    conf = f"SLURM_CONF={slurm_conf}".encode()
    wanted = {f"SLURMD_NODENAME={node}".encode() for node in nodes}
    logs = {str(log(node)) for node in nodes}
    found = []
    for pid in _pids():
        environ = _environ(pid)
        if (conf in environ and wanted & environ) or (_name(pid) == "slurmstepd" and logs & _open_files(pid)):
            process = Process.find(pid)
            if process is not None:
                found.append(process)
    return found


def _living(processes: Iterable[Process]) -> list[Process]:
    return [process for process in processes if process.alive]


def _pids() -> Iterator[int]:
    return (int(entry.name) for entry in _PROC.iterdir() if entry.name.isdigit())


def _environ(pid: int) -> frozenset[bytes]:
    try:
        return frozenset((_PROC / str(pid) / "environ").read_bytes().split(b"\0"))
    except OSError:
        return frozenset()


def _name(pid: int) -> str:
    try:
        return (_PROC / str(pid) / "comm").read_text().strip()
    except OSError:
        return ""


def _open_files(pid: int) -> frozenset[str]:
    found = set()
    try:
        for entry in (_PROC / str(pid) / "fd").iterdir():
            with contextlib.suppress(OSError):
                found.add(str(entry.readlink()))
    except OSError:
        return frozenset()
    return frozenset(found)


def _stat(pid: int) -> list[str] | None:
    """The fields of a process's ``stat`` from the state on; None for no process or a zombie."""
    try:
        text = (_PROC / str(pid) / "stat").read_text()
    except OSError:
        return None
    # the name before these may itself contain spaces and parentheses
    fields = text.rpartition(")")[2].split()
    # a first thread is a zombie as long as others of its process still end and hold ports
    return None if fields[0] in {"Z", "X"} and int(fields[17]) <= 1 else fields
