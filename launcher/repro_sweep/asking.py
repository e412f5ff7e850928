"""The coordinator's end of the process that chooses points and prunes (``asker``): asks it, tells it, keeps it up."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from repro_sweep.errors import SweepError
from repro_sweep.records import NewTrial
from repro_sweep.states import StepKind, TrialState

LOG_NAME = "search.log"
_MODULE = "repro_sweep.asker"
_LINE_LIMIT = 64_000_000
_KILL_S = 5.0
_MOST_DEATHS = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """The steps to record, the new trials, old ones that wait again, and why there is nothing more, if that is so."""

    steps: tuple[tuple[StepKind, dict[str, Any]], ...]
    trials: tuple[NewTrial, ...]
    again: tuple[int, ...]
    over: str | None


class AskingProcess:
    """Belongs to one event loop. What was asked is asked again when the process has died; it knows the rest.

    It has read the ledger when it is ready, so only what was told after that need be passed on, which it tells apart by
    the numbers of the steps.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._process: asyncio.subprocess.Process | None = None
        self._keeper: asyncio.Task[None] | None = None
        self._ids = itertools.count()
        self._open: dict[int, tuple[dict[str, Any], asyncio.Future[dict[str, Any]]]] = {}
        self._deaths = 0
        self._stopping = False
        self.failed: SweepError | None = None
        """Why it cannot go on."""

    async def start(self) -> None:
        """Start the process; it is ready some seconds later, and works off then what it was asked meanwhile."""
        await self._spawn()
        self._keeper = asyncio.create_task(self._keep())

    async def ask(self, number: int, *, new: bool) -> Asked:
        """The next trials, of which the first has this number; without ``new``, of points that have begun.

        Raises:
            SweepError: the search cannot go on.
        """
        answer = await self._request({"do": "ask", "number": number, "new": new})
        if answer["error"] is not None:
            raise SweepError(f"sweep/sampler: {answer['error']}")
        return Asked(
            steps=tuple((StepKind(kind), data) for kind, data in answer["steps"]),
            trials=tuple(
                NewTrial(**{**trial, "overrides": tuple(trial["overrides"])}) for trial in answer["trials"]
            ),
            again=tuple(answer["again"]),
            over=answer["over"],
        )

    def tell(self, seq: int, number: int, state: TrialState, metrics: Mapping[str, float]) -> None:
        """A trial has ended, which step ``seq`` records."""
        self._send({"do": "tell", "seq": seq, "trial": number, "state": state, "metrics": dict(metrics)})

    def note(self, number: int, step: int, value: float) -> None:
        """A trial's value at a step, of which nothing need be said."""
        self._send({"do": "note", "trial": number, "step": step, "value": value})

    async def report(self, number: int, step: int, value: float) -> bool:
        """A trial's value at a step; returns whether it is to be pruned.

        Raises:
            SweepError: the process cannot go on.
        """
        answer = await self._request({"do": "report", "trial": number, "step": step, "value": value})
        return bool(answer["prune"])

    async def kill(self) -> None:
        """End the process: politely, by closing its input, then by force. It keeps nothing of its own."""
        self._stopping = True
        process = self._process
        if process is not None and process.returncode is None:
            if process.stdin is not None:
                process.stdin.close()
            try:
                await asyncio.wait_for(process.wait(), _KILL_S)
            except TimeoutError:
                process.kill()
                await process.wait()
        if self._keeper is not None:
            await self._keeper

    async def _spawn(self) -> None:
        self._process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            _MODULE,
            str(self._directory),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            limit=_LINE_LIMIT,
            start_new_session=True,
            env={"OMP_NUM_THREADS": "1", **os.environ},  # the CPUs are for the trials
        )
        for message, _ in self._open.values():
            self._send(message)

    async def _request(self, message: dict[str, Any]) -> dict[str, Any]:
        if self.failed is not None:
            raise self.failed
        ident = next(self._ids)
        future: asyncio.Future[dict[str, Any]] = asyncio.get_running_loop().create_future()
        self._open[ident] = ({**message, "id": ident}, future)
        self._send(self._open[ident][0])
        try:
            return await future
        finally:
            self._open.pop(ident, None)

    def _send(self, message: Mapping[str, Any]) -> None:
        process = self._process
        if process is not None and process.stdin is not None and not process.stdin.is_closing():
            with contextlib.suppress(ConnectionError):  # it has died, and will be asked again
                process.stdin.write(json.dumps(message).encode() + b"\n")

    async def _keep(self) -> None:
        try:
            await self._follow()
        except (OSError, ValueError) as error:  # it cannot be started again, or has said what is no message
            self._fail(
                SweepError(f"sweep/sampler: its process failed: {error}, see {self._directory / LOG_NAME}")
            )

    async def _follow(self) -> None:
        while True:
            process = self._process
            assert process is not None
            assert process.stdout is not None
            async for line in process.stdout:
                if line.endswith(b"\n"):  # else it died while it wrote
                    self._heard(json.loads(line))
            code = await process.wait()
            if self._stopping:
                break
            self._deaths += 1
            if self.failed is None and self._deaths < _MOST_DEATHS:
                await self._spawn()
                continue
            log = self._directory / LOG_NAME
            self._fail(self.failed or SweepError(f"sweep/sampler: its process died ({code}), see {log}"))
            return
        self._fail(SweepError("the search was stopped"))

    def _heard(self, message: dict[str, Any]) -> None:
        if "id" in message:
            self._deaths = 0
            _, future = self._open.get(message["id"], (None, None))
            if future is not None and not future.done():
                future.set_result(message)
        elif "error" in message:
            self.failed = SweepError(message["error"])

    def _fail(self, error: SweepError) -> None:
        self.failed = error
        for _, future in list(self._open.values()):
            if not future.done():
                future.set_exception(error)
