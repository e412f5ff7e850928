"""What this machine has: CPUs, memory, GPUs; and how they are divided into slots."""

from __future__ import annotations

import functools
import os
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from repro_sweep.errors import SweepError
from repro_sweep.sweep import Resources

_GIB = 1024**3


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """CPUs this process may use, memory in GiB, and the devices for ``CUDA_VISIBLE_DEVICES``."""

    cpus: int
    mem_gb: float
    gpus: tuple[str, ...]


def inspect(environ: Mapping[str, str] = os.environ) -> Machine:
    """What this process may use: its CPU affinity and control group's limits count, not the whole machine's."""
    return Machine(cpus=_cpus(), mem_gb=_memory_gb(), gpus=_gpus(environ))


def slots(machine: Machine, resources: Resources, wanted: int | None = None) -> tuple[tuple[str, ...], ...]:
    """Divide a machine into slots; each is the tuple of GPUs that its trials see.

    ``wanted`` overrules CPUs and memory (more slots than CPUs are the user's right), never the GPUs.

    Raises:
        SweepError: not one trial fits, or ``wanted`` is more than the GPUs allow.
    """
    shares = _gpu_shares(machine.gpus, resources.gpus)
    if resources.gpus > 0 and not shares:
        raise SweepError(
            f"sweep.resources.gpus_per_trial: {resources.gpus:g} asked for, this machine has {len(machine.gpus)}"
        )
    if wanted is not None:
        if wanted < 1:
            raise SweepError(f"sweep.executor.slots: must be at least 1, got {wanted}")
        if resources.gpus > 0 and wanted > len(shares):
            raise SweepError(
                f"sweep.executor.slots: {wanted} asked for, but {resources.gpus:g} GPUs a trial allow {len(shares)}"
                f" on this machine's {len(machine.gpus)}"
            )
        count = wanted
    else:
        count = _fitting(machine, resources, len(shares))
    return tuple(shares[:count]) if resources.gpus > 0 else ((),) * count


def trials_on(gpus: int, per_trial: float) -> int:
    """How many trials so many GPUs hold at a time: each has whole ones, or a share of one."""
    return gpus * int(1 / per_trial + 1e-9) if per_trial < 1 else gpus // int(per_trial + 1e-9)


def _fitting(machine: Machine, resources: Resources, gpu_slots: int) -> int:
    by_cpu = int(machine.cpus / resources.cpus + 1e-9)
    if by_cpu < 1:
        raise SweepError(
            f"sweep.resources.cpus_per_trial: {resources.cpus:g} asked for, this machine has {machine.cpus}"
        )
    limits = [by_cpu]
    if resources.mem_gb is not None:
        by_memory = int(machine.mem_gb / resources.mem_gb + 1e-9)
        if by_memory < 1:
            raise SweepError(
                f"sweep.resources.mem_gb_per_trial: {resources.mem_gb:g} asked for,"
                f" this machine has {machine.mem_gb:.1f}"
            )
        limits.append(by_memory)
    if resources.gpus > 0:
        limits.append(gpu_slots)
    return min(limits)


def _gpu_shares(gpus: Sequence[str], per_trial: float) -> list[tuple[str, ...]]:
    """The GPUs of each slot; shares of one GPU are dealt round, so that few trials use many GPUs."""
    if per_trial <= 0:
        return []
    if per_trial < 1:
        return [(gpu,) for _ in range(trials_on(1, per_trial)) for gpu in gpus]
    size = int(per_trial)
    return [tuple(gpus[start : start + size]) for start in range(0, len(gpus) - size + 1, size)]


def _cpus() -> int:
    cpus = len(os.sched_getaffinity(0))
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
    except (OSError, ValueError):
        return cpus
    return cpus if quota == "max" else max(1, min(cpus, int(quota) // int(period)))


def _memory_gb() -> float:
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    try:
        limit = Path("/sys/fs/cgroup/memory.max").read_text().strip()
    except OSError:
        limit = "max"
    return min(total, total if limit == "max" else int(limit)) / _GIB


@functools.cache
def _listed_gpus() -> tuple[str, ...]:
    try:
        listed = subprocess.run(
            ["nvidia-smi", "-L"], capture_output=True, text=True, timeout=20, check=True
        ).stdout
    except (OSError, subprocess.SubprocessError):
        return ()
    return tuple(str(index) for index, line in enumerate(listed.splitlines()) if line.startswith("GPU "))


def _gpus(environ: Mapping[str, str]) -> tuple[str, ...]:
    """Names for ``CUDA_VISIBLE_DEVICES``: what it says already, else all that nvidia-smi lists."""
    visible = environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return tuple(part.strip() for part in visible.split(",") if part.strip() and part.strip() != "-1")
    return _listed_gpus()
