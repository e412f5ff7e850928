"""``python -m benchmarks``: run the benchmarks, print and write their report."""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

from benchmarks import (
    asha,
    coordinator_load,
    front_door,
    gpu,
    launching,
    provenance,
    quality,
    ranking,
    ray_sweeps,
    search_slots,
    slurm,
    upload,
)
from benchmarks.harness import BenchmarkError
from benchmarks.report import Table, markdown

BENCHMARKS: dict[str, Callable[..., Table]] = {
    "startup": front_door.startup,
    "compose": front_door.compose,
    "noop": launching.noop,
    "sleep": launching.sleep,
    "slow_server": launching.slow_server,
    "search_slots": search_slots.slots,
    "search_handout": search_slots.handout,
    "search_quality": quality.quality,
    "search_asha": asha.asha,
    "slurm_noop": slurm.noop,
    "slurm_slots": slurm.slots,
    "ray_160": ray_sweeps.few,
    "ray_1000": ray_sweeps.many,
    "ray_noop": ray_sweeps.noop,
    "snapshot": provenance.freeze,
    "crowd": coordinator_load.load,
    "ranking": ranking.ranking,
    "upload": upload.upload,
    "gpu_share": gpu.share,
    "gpu_strict": gpu.strict,
}
GROUPS: dict[str, tuple[str, ...]] = {
    "launching": ("startup", "compose", "noop", "sleep", "slow_server"),
    "search": ("search_slots", "search_handout", "search_quality", "search_asha"),
    "slurm": ("slurm_noop", "slurm_slots"),
    "ray": ("ray_160", "ray_1000", "ray_noop"),
    "provenance": ("snapshot",),
    "coordinator": ("crowd",),
    "server": ("ranking", "upload"),
    "gpu": ("gpu_share", "gpu_strict"),
}
_PACKAGES = (
    "repro-sweep",
    "hydra-core",
    "omegaconf",
    "optuna",
    "hydra-joblib-launcher",
    "joblib",
    "ray",
    "torch",
    "mlflow",
    "uvicorn",
    "pydantic",
)


def main() -> int:
    """Run what the command line asks for; returns the exit status: 1 if a target is missed, 2 if one did not run."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument(
        "--only", action="append", choices=(*GROUPS, *BENCHMARKS), help="this one, or group (may be repeated)"
    )
    parser.add_argument("--quick", action="store_true", help="small sizes, to see that all of it runs")
    parser.add_argument("--output", type=Path, help="the Markdown file to write")
    parser.add_argument("--no-check", action="store_true", help="a missed target is no error")
    args = parser.parse_args()
    head = _head(quick=args.quick)
    print(head, flush=True)
    sections, missed, broken = [head], 0, 0
    chosen = args.only or [group for group in GROUPS if group != "gpu"]
    for name in [name for only in chosen for name in GROUPS.get(only, (only,))]:
        began = time.monotonic()
        with tempfile.TemporaryDirectory(prefix=f"benchmark-{name}-", ignore_cleanup_errors=True) as folder:
            try:
                table = BENCHMARKS[name](Path(folder), quick=args.quick)
            except BenchmarkError as error:
                print(f"{name}: {error}", file=sys.stderr, flush=True)
                sections.append(f"## {name}\n\nIt did not run to its end.\n")
                broken += 1
                continue
        sections.append(markdown(table))
        missed += sum(not target.met for target in table.targets)
        print(f"{sections[-1]}\n({name} took {time.monotonic() - began:.0f} s)\n", flush=True)
    if args.output is not None:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text("\n".join(sections), encoding="utf-8")
    return 2 if broken else int(missed > 0 and not args.no_check)


def _head(*, quick: bool) -> str:
    cores = len(os.sched_getaffinity(0))
    load = os.getloadavg()[0]
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30
    facts = {
        "date": f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC",
        "machine": f"{_cpu_model()}, {cores} cores, {memory:.0f} GiB, {platform.system()} {platform.release()}",
        "load before": f"{load:.2f}"
        + (" (**not quiet: take no figure from here**)" if load > cores / 4 else ""),
        "Python": f"{platform.python_version()} ({platform.python_implementation()})",
        "packages": ", ".join(f"{name} {_version(name)}" for name in _PACKAGES),
        "commit": _commit(),
    }
    lines = [
        "# Benchmarks",
        "",
        "Made by `python -m benchmarks`" + (" --quick; small sizes." if quick else "."),
        "",
    ]
    lines += [
        "Each table was measured in one run on one machine, so its ratios say more than its figures.",
        "",
    ]
    return "\n".join([*lines, *(f"- {name}: {value}" for name, value in facts.items()), ""])


def _cpu_model() -> str:
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "(not installed)"


def _commit() -> str:
    command = ["git", "describe", "--always", "--dirty", "--exclude=*"]
    here = Path(__file__).parent
    return (
        subprocess.run(command, cwd=here, capture_output=True, text=True, check=False).stdout.strip()
        or "none"
    )


if __name__ == "__main__":
    sys.exit(main())
