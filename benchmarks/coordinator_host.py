"""A coordinator in a process of its own, for a crowd: ``python -m benchmarks.coordinator_host``.

It is a real one with a real ledger, lease and server; only its executor starts nothing, as the crowd is there already.
It prints where it listens as one line of JSON, runs until no trial is left, and prints what it has measured of itself.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import sys
import time
from collections.abc import Iterable, Mapping
from pathlib import Path

from benchmarks import made
from repro_sweep import protocol
from repro_sweep.coordinator import Coordinator
from repro_sweep.executors.base import ALIVE, Executor, WorkerState, WorkerStatus
from repro_sweep.lease import Lease
from repro_sweep.ledger import Ledger
from repro_sweep.progress import Progress
from repro_sweep.records import NewTrial
from repro_sweep.server import Server
from repro_sweep.states import TrialState

_SHARES = (0.1, 0.25, 0.5, 0.75, 1.0)
_LOOK_S = 0.01
_PAGE_MB = os.sysconf("SC_PAGE_SIZE") / 2**20
# 25 values in four groups, as in the other benchmarks
_CONFIG = """\
data:
  name: digits
  validation_fraction: 0.2
  test_fraction: 0.2
  split_seed: 0
  augment:
  - shift
model:
  name: lstm
  bidirectional: false
  hidden_size: 64
  layers: 2
  dropout: 0.1
  init:
    name: xavier
optimizer:
  name: adam
  lr: 0.01
  beta1: 0.9
  beta2: 0.999
  weight_decay: 0.0
  amsgrad: false
trainer:
  epochs: 20
  batch_size: 32
  clip: 1.0
  patience: 5
x: {x}
y: 0
seed: 0
"""


class Crowd(Executor):
    """Workers that come by themselves, and end as soon as they are told to."""

    def __init__(self, count: int) -> None:
        self._statuses = {f"w{number}": ALIVE for number in range(count)}

    def wanted(self, trials: int) -> int:
        """All of them."""
        return len(self._statuses) if trials else 0

    def start(self, count: int) -> list[str]:
        """None can be missing."""
        raise AssertionError(f"{count} workers are missing")

    def poll(self) -> Mapping[str, WorkerStatus]:
        """As executors do, for all workers in one look."""
        return dict(self._statuses)

    def stop(self, workers: Iterable[str]) -> None:
        """They have ended."""
        self._statuses |= dict.fromkeys(workers, WorkerStatus(state=WorkerState.ENDED, detail="stopped"))

    def close(self, timeout_s: float) -> None:
        """Nothing is to be waited for."""
        del timeout_s
        self.stop(list(self._statuses))


class Nothing:
    """Answers heartbeats, and does nothing at all: the ceiling of the server itself."""

    def __getattr__(self, name: str) -> object:
        return self.heartbeat

    async def heartbeat(self, _message: protocol.Heartbeat) -> protocol.Beat:
        """The smallest reply."""
        return protocol.Beat()


def trial(number: int) -> NewTrial:
    """One of its trials."""
    return NewTrial(
        number=number, identity=f"{number:064x}", directory=f"trials/{number}", overrides=(f"x={number}", "seed=0"),
        params={"x": number}, repeat={"seed": 0}, config=_CONFIG.format(x=number),
    )  # fmt: skip


def fill(directory: Path, trials: int) -> Ledger:
    """The ledger of a sweep with so many trials, none of which has begun."""
    ledger = Ledger.create(directory, made.record(directory))
    ledger.add_trials(map(trial, range(trials)))
    ledger.commit()
    return ledger


def memory_mb() -> float:
    """The resident memory of this process now."""
    return int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[1]) * _PAGE_MB


async def _look(coordinator: Coordinator, trials: int, memory: dict[float, float]) -> None:
    """Note the memory when so large a share of the trials is over."""
    for share in _SHARES:
        while coordinator.progress().counts[TrialState.COMPLETE] < share * trials:  # noqa: ASYNC110
            await asyncio.sleep(_LOOK_S)
        memory[share] = memory_mb()


async def host(args: argparse.Namespace) -> None:
    """Coordinate a sweep of ``args.trials`` trials and ``args.workers`` workers to its end."""
    ledger = fill(args.directory, args.trials)
    lease = Lease.acquire(ledger, "crowd")
    coordinator = Coordinator(ledger.spec, ledger, None, lease)
    server = Server(coordinator, args.host)
    await server.start()
    lease.announce(server.path, server.tcp, server.token)
    _say({"socket": server.path, "tcp": server.tcp, "token": server.token, "memory_mb": memory_mb()})
    memory: dict[float, float] = {}
    looking = asyncio.create_task(_look(coordinator, args.trials, memory))
    began, used = time.monotonic(), time.process_time()
    await coordinator.run(Crowd(args.workers))
    figures = {"seconds": time.monotonic() - began, "cpu_s": time.process_time() - used}
    progress: Progress = coordinator.progress()
    await asyncio.wait_for(looking, 10.0)
    await server.stop()
    await coordinator.close()
    _say({**figures, "memory_mb": memory, "busy": progress.busy, "at_end_mb": memory_mb()})


async def answer(args: argparse.Namespace) -> None:
    """Answer empty messages until the standard input ends."""
    server = Server(Nothing(), args.host)  # type: ignore[arg-type]
    await server.start()
    _say({"socket": server.path, "tcp": server.tcp, "token": server.token, "memory_mb": memory_mb()})
    used = time.process_time()
    await asyncio.to_thread(sys.stdin.read)
    await server.stop()
    _say({"cpu_s": time.process_time() - used})


def _say(record: dict[str, object]) -> None:
    print(json.dumps(record), flush=True)


def main() -> None:
    """Run it."""
    parser = argparse.ArgumentParser(prog="benchmarks.coordinator_host", description=__doc__)
    parser.add_argument("--directory", type=Path, required=True, help="of the sweep; it is there, and empty")
    parser.add_argument("--trials", type=int, default=0, help="0: answer empty messages only")
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--host", help="listen here over TCP, too")
    args = parser.parse_args()
    asyncio.run(host(args) if args.trials else answer(args))


if __name__ == "__main__":
    main()
