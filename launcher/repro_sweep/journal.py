"""Group commit: many coroutines' changes to the ledger in one transaction, each told when it is durable."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from repro_sweep.errors import LeaseLostError, UnwritableError
from repro_sweep.failpoints import failpoint
from repro_sweep.ledger import Ledger

_T = TypeVar("_T")
_Change = Callable[[Ledger], Any]
_RETRY_S = 1.0


class Journal:
    """Serialises all use of a ledger in one thread. Owned by the coordinator's event loop.

    While one batch is being committed, the next one gathers; so the cost of a sync to disk is shared by all that wait.
    While the disk is full they wait, and are committed when it is not any more.
    """

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="ledger")
        self._pending: list[tuple[_Change, asyncio.Future[Any]]] = []
        self._committing: asyncio.Task[None] | None = None
        self._ending = False
        self.trouble: str | None = None
        """Why nothing can be written now, None where it can."""

    async def write(self, change: Callable[[Ledger], _T]) -> _T:
        """Apply a change and return its result when it is durable. It may be applied again after it was rolled back.

        Raises:
            LedgerError: it could not be written; nothing of its batch was.
        """
        return await self.enter(change)

    def enter(self, change: Callable[[Ledger], _T]) -> asyncio.Future[_T]:
        """The same, for one who need not wait: the change is made whatever becomes of the caller."""
        future: asyncio.Future[_T] = asyncio.get_running_loop().create_future()
        self._pending.append((change, future))
        if self._committing is None:
            self._committing = asyncio.create_task(self._commit_all())
        return future

    def give_up(self) -> None:
        """Wait for no disk any more: from now on a change that cannot be written is an error."""
        self._ending = True

    async def close(self, last: Callable[[Ledger], object] | None = None) -> None:
        """Commit what is pending and a ``last`` change, then close the ledger; a full disk's share is given up."""
        self.give_up()
        if last is not None:
            with contextlib.suppress(LeaseLostError, UnwritableError):
                await self.write(last)
        if self._committing is not None:
            await self._committing
        await asyncio.get_running_loop().run_in_executor(self._thread, self._ledger.close)
        self._thread.shutdown()

    async def _commit_all(self) -> None:
        while self._pending:
            batch, self._pending = self._pending, []
            try:
                results = await self._commit([change for change, _ in batch])
            except Exception as error:  # noqa: BLE001  (handed to every caller of the batch)
                for _, future in batch:
                    if not future.done():
                        future.set_exception(error)
            else:
                for (_, future), result in zip(batch, results, strict=True):
                    if not future.done():
                        future.set_result(result)
        self._committing = None

    async def _commit(self, changes: list[_Change]) -> list[Any]:
        loop = asyncio.get_running_loop()
        while True:
            try:
                results = await loop.run_in_executor(self._thread, self._apply, changes)
            except UnwritableError as error:
                self.trouble = str(error)
                if self._ending:
                    raise
                await asyncio.sleep(_RETRY_S)
            else:
                self.trouble = None
                return results

    def _apply(self, changes: list[_Change]) -> list[Any]:
        failpoint("journal.before_change")
        try:
            self._ledger.begin_change()
            results = [change(self._ledger) for change in changes]
            failpoint("journal.before_commit")
            self._ledger.commit()
        except BaseException:
            self._ledger.rollback()
            raise
        failpoint("journal.committed")
        return results
