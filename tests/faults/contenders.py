"""Processes that want the same lease at the same instant. A module of its own, as it is imported by each of them."""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterator
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any

from repro_sweep.errors import SweepError
from repro_sweep.lease import Lease
from repro_sweep.ledger import Ledger


def contend(directory: Path, rounds: int, rank: int, barrier: Barrier, results: Any) -> None:
    """Try to take the lease in each round, and let go of it: back to the ledger, or as one that has died."""
    for number in range(rounds):
        ledger = Ledger.open(directory)
        barrier.wait(120)
        try:
            lease = Lease.acquire(ledger, "grid")
        except SweepError as error:
            results.put((number, rank, None, str(error)))
            lease = None
        else:
            results.put((number, rank, lease.holder.epoch, ""))
        barrier.wait(120)
        if lease is not None:
            if number % 2:
                lease.release(ledger)
                ledger.commit()
            lease.drop()
        ledger.close()


def outcomes(directory: Path, processes: int, rounds: int) -> Iterator[tuple[int, int, int | None, str]]:
    """Round, process, epoch (None where it was refused) and the refusal, of so many processes in so many rounds."""
    context = multiprocessing.get_context("spawn")
    barrier, results = context.Barrier(processes), context.Queue()
    made = [
        context.Process(target=contend, args=(directory, rounds, rank, barrier, results), daemon=True)
        for rank in range(processes)
    ]
    try:
        for process in made:
            process.start()
        for _ in range(rounds * processes):
            yield results.get(timeout=300)
        for process in made:
            process.join(60)
            assert process.exitcode == 0
    finally:
        for process in made:
            process.kill()
            process.join()
        results.close()
