"""Takes over what other sweeps have found already, while the workers of a sweep start."""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter
from collections.abc import AsyncIterator

from repro_sweep.cli.main import say
from repro_sweep.coordinator import Coordinator
from repro_sweep.errors import LeaseLostError, ReproSweepError
from repro_sweep.sweep import SweepSpec
from repro_sweep.tracking import elsewhere
from repro_sweep.tracking.process import TrackerProcess

_SHOWN_SWEEPS = 3


@contextlib.asynccontextmanager
async def reusing(
    spec: SweepSpec, coordinator: Coordinator, tracker: TrackerProcess
) -> AsyncIterator[asyncio.Task[None]]:
    """Look for other sweeps' results within this context; nothing is handed out before the task has ended."""
    task = asyncio.create_task(_reuse(spec, coordinator, tracker))
    await asyncio.sleep(0)  # the coordinator knows of it now
    try:
        yield task
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task


async def _reuse(spec: SweepSpec, coordinator: Coordinator, tracker: TrackerProcess) -> None:
    if spec.search is not None:  # its points are not known beforehand; sweep.start_from is for that
        return
    search = asyncio.ensure_future(elsewhere.results(spec, tracker))
    try:
        count = await coordinator.reuse(search)
    except LeaseLostError:  # the coordinator says so itself
        return
    except ReproSweepError as error:
        say(f"results of other sweeps are not reused, MLflow could not be asked: {error}")
        return
    if count:
        total = sum(coordinator.progress().counts.values())
        sweeps = [name for name, _ in Counter(each.origin for each in search.result().values()).most_common()]
        names = ", ".join(sweeps[:_SHOWN_SWEEPS]) + (", …" if len(sweeps) > _SHOWN_SWEEPS else "")
        one = len(sweeps) == 1
        say(
            f"{count} of {total} trials are done in {'another sweep' if one else 'other sweeps'} with the same code"
            f" ({names}): their results are reused; sweep.reuse=false runs them"
        )
