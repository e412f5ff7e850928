"""The claims that wait for a trial, in their order: whoever has some wakes as many as can take one, not all."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from repro_sweep.protocol import Claim


class Waiters:
    """Belongs to one event loop.

    A claim may wait more than once: its worker repeats it where the connection broke. All of these are woken together,
    as the trial that one of them gets is the answer of the others too.
    """

    def __init__(self) -> None:
        self._claims: dict[str, tuple[Claim, list[asyncio.Future[None]]]] = {}

    def __len__(self) -> int:
        return len(self._claims)

    async def wait(self, claim: Claim, timeout_s: float) -> None:
        """Wait until woken, or for so long."""
        loop = asyncio.get_running_loop()
        future: asyncio.Future[None] = loop.create_future()
        _, futures = self._claims.setdefault(claim.attempt, (claim, []))
        futures.append(future)
        timer = loop.call_later(timeout_s, _wake, future)
        try:
            await future
        finally:
            timer.cancel()
            futures.remove(future)
            if not futures and self._claims.get(claim.attempt, (None, None))[1] is futures:
                del self._claims[claim.attempt]

    def wake(self, count: int, fits: Callable[[Claim], bool]) -> None:
        """Wake the first ``count`` claims that fit; they look again, and wait at the end of the queue otherwise."""
        chosen: list[str] = []
        for attempt, (claim, _) in self._claims.items():
            if len(chosen) >= count:
                break
            if fits(claim):
                chosen.append(attempt)
        for attempt in chosen:
            for future in self._claims.pop(attempt)[1]:
                _wake(future)

    def wake_all(self) -> None:
        """Something has changed for all of them."""
        claims, self._claims = self._claims, {}
        for _, futures in claims.values():
            for future in futures:
                _wake(future)


def _wake(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)
