"""The projection of a sweep's ledger into MLflow: one run for the sweep, one for each trial, however many attempts.

Only schedules: what is uploaded is in :mod:`.upload`, how in :mod:`.store`. Uploads run in a few threads; the ledger
and ``tracking.db`` are touched by the caller's thread alone. A failed upload is repeated with a growing pause, forever;
while the server is down, one request at a time finds out whether it is back. The same while it denies the user
access: nothing is given up, and credentials that were renewed meanwhile are tried at once.
"""

from __future__ import annotations

import heapq
import logging
import time
from collections.abc import Callable, Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from repro_sweep.errors import LedgerError, TrackingError
from repro_sweep.ledger import Ledger
from repro_sweep.records import Reused
from repro_sweep.states import TrialState
from repro_sweep.tracking import credentials, elsewhere
from repro_sweep.tracking.base import Answer, AnswerElsewhere, Progress, RunRef, Tracker, Trouble
from repro_sweep.tracking.description import Board, Standing
from repro_sweep.tracking.sent import SWEEP, Sent, SentLog
from repro_sweep.tracking.store import Denied, Gone, Refused, Store, StoreError, Unavailable, denial, one_line
from repro_sweep.tracking.upload import (
    REPORT,
    Place,
    SweepUpload,
    TrialUpload,
    Upload,
    load_work,
    perform,
    stamp_of,
)
from repro_sweep.tracking.uri import check_writable, is_http, resolve_uri

__all__ = ["MlflowTracker", "check_writable", "resolve_uri"]

POLL_S = 0.5
REPORTS_S = 2.0
"""A running trial's reports are sent at most this often, and nothing before it has run for so long."""
_COUNTS_S = 5.0
_BOARD_SHARE = 0.02
"""The part of one CPU that ranking a sweep for its description may take while it runs."""
_PAUSE_S = 0.5
_LONGEST_PAUSE_S = 15.0
_LAST_TRIES = 3

_AT_ONCE = 32
"""Uploads under way or next in line."""
_TOGETHER = 16
"""Trials that share a transaction of an embedded store."""
_logger = logging.getLogger(__name__)


@dataclass(slots=True)
class _Pending:
    """A trial that has something to upload, not before ``due``."""

    due: float
    failures: int = 0
    error: str | None = None
    refused: bool = False


@dataclass(slots=True)
class _Job:
    """An upload under way."""

    upload: Upload
    failures: int
    cleared: int
    future: Future[list[Exception | None]]
    index: int
    sent_with: str | None


class MlflowTracker(Tracker):
    """Projects the ledger in ``directory`` into the MLflow store that the sweep's record names.

    Args:
        directory: the sweep's directory.
        epoch: of the coordinator that this is the tracker of; None: whichever the sweep has now.
        wake: called from any thread when an upload has ended, so that the owner calls :meth:`sync` soon.
        clock: monotonic seconds.

    Raises:
        LedgerError: there is no sweep, or its ledger cannot be read.
        BlockingIOError: another tracker works on this sweep.
    """

    def __init__(
        self,
        directory: Path,
        *,
        epoch: int | None = None,
        wake: Callable[[], None] = lambda: None,
        clock: Callable[[], float] = time.monotonic,
        store: Store | None = None,
    ) -> None:
        self._ledger = Ledger.open(directory, readonly=True)
        self._spec = self._ledger.spec
        self._epoch = _epoch(self._ledger) if epoch is None else epoch
        self._log = SentLog(directory)
        self._store = store or Store(self._spec.tracking.uri)
        self._wake = wake
        self._clock = clock
        self._place: Place | None = None
        self._search_first = False
        self._pending: dict[int, _Pending] = {}
        self._queue: list[tuple[float, int]] = []
        self._jobs: dict[int, _Job] = {}
        self._answers: dict[int, list[Answer]] = {}
        self._quiet_until: dict[int, float] = {}
        self._change = -1
        self._seq = 0
        self._outages = 0
        self._cleared: set[int] = set()
        self._closed_until = 0.0
        self._error: str | None = None
        self._trouble: Trouble | None = None
        self._denied_with: str | None = None
        self._guessed: set[int] = set()
        self._finishing = False
        self._closed = False
        self._replaced = False
        self._board = Board(self._ledger)
        self._board_due = 0.0
        self._behind = False
        self._note = ""
        self._report = Path(self._spec.directory) / REPORT
        self._report_seen = stamp_of(self._report)
        self._elsewhere: list[tuple[Future[dict[str, Reused]], AnswerElsewhere]] = []
        self._threads = ThreadPoolExecutor(self._store.parallel, thread_name_prefix="tracking")
        self._urgent = ThreadPoolExecutor(1, thread_name_prefix="tracking-urgent")
        self._searches = ThreadPoolExecutor(1, thread_name_prefix="tracking-search")
        self._forget_other_server()
        self._start_over()

    # --- the port -------------------------------------------------------------------------------------------

    def sync(self) -> float:
        """See :meth:`Tracker.sync`."""
        self._record_ended()
        self._answer_all()
        self._answer_elsewhere()
        if not self._replaced and _epoch(self._ledger) > self._epoch:
            _logger.info("the sweep has another coordinator, whose own tracker goes on")
            self._replaced = True
        if self._replaced:
            return POLL_S
        self._discover()
        if self._finishing and not self._closed and SWEEP not in self._jobs:
            self._add(SWEEP, self._clock())
        self._submit_due()
        return self._next_due()

    def request_run(self, trial: int, answer: Answer) -> None:
        """See :meth:`Tracker.request_run`."""
        try:
            self._ledger.trial(trial)
        except LedgerError as error:
            answer(one_line(error))
            return
        self._answers.setdefault(trial, []).append(answer)
        self._answer_all()

    def request_elsewhere(self, answer: AnswerElsewhere) -> None:
        """See :meth:`Tracker.request_elsewhere`."""
        wanted = elsewhere.waiting(self._ledger)
        future = self._searches.submit(elsewhere.search, self._store, self._spec, wanted)
        self._elsewhere.append((future, answer))
        future.add_done_callback(lambda _: self._wake())

    def finish(self) -> None:
        """See :meth:`Tracker.finish`."""
        self._finishing = True
        self._start_over()
        for pending in self._pending.values():
            pending.failures = 0
        self._try_now()

    @property
    def progress(self) -> Progress:
        """See :meth:`Tracker.progress`."""
        left = set(self._pending) | set(self._jobs)
        error = self._error
        if error is None:
            errors = (
                f"{_name(number)}: {each.error}" for number, each in self._pending.items() if each.error
            )
            error = next(errors, None)
        over = self._finishing and not self._jobs and self._is_over()
        moved = self._store.moved + len(self._cleared)
        trouble = self._trouble or (Trouble.BUSY if self._jobs and self._store.slow else None)
        return Progress(
            left=len(left), error=error, done=over or self._replaced, moved=moved, trouble=trouble
        )

    def close(self) -> None:
        """See :meth:`Tracker.close`."""
        error = self._error
        self._store.stop()
        for threads in (self._threads, self._urgent, self._searches):
            threads.shutdown(wait=True, cancel_futures=True)
        self._record_ended()
        self._error = error  # not that of the uploads that were stopped
        for trial in list(self._answers):
            for answer in self._answers.pop(trial):
                answer("the tracker has stopped")
        self._answer_elsewhere()
        self._log.close()
        self._ledger.close()

    # --- what is new ----------------------------------------------------------------------------------------

    def _forget_other_server(self) -> None:
        tracking = self._spec.tracking
        here = f"{tracking.uri} {tracking.experiment}"
        if self._log.meta("server") not in {None, here}:
            self._log.forget()
        self._log.set_meta(server=here)
        self._search_first = self._log.meta("search_first") == "1"

    def _start_over(self) -> None:
        """Compare the whole ledger with what was sent."""
        self._add(SWEEP, self._clock())
        heads = self._log.heads()
        changes = self._ledger.changes()
        reports = self._ledger.report_heads()
        for number, change, state, started in changes:
            sent_change, sent_seq = heads.get(number, (-1, 0))
            unsent = sent_change != change or reports.get(number, 0) > sent_seq
            if unsent and self._wanted(state, started=started):
                self._add(number, self._clock())
        self._change = max((change for _, change, _, _ in changes), default=-1)
        self._seq = max(reports.values(), default=0)

    def _discover(self) -> None:
        changes = self._ledger.changes(after=self._change)
        for number, change, state, started in changes:
            self._change = change
            if self._wanted(state, started=started):
                self._add(number, self._due(number, state))
        report, self._report_seen = self._report_seen, stamp_of(self._report)
        if changes or report != self._report_seen:
            self._add(SWEEP, self._quiet(SWEEP))
        elif self._behind:
            self._add(SWEEP, max(self._board_due, self._quiet(SWEEP)))
        for number, seq in self._ledger.report_heads(after=self._seq).items():
            self._seq = max(self._seq, seq)
            self._add(number, self._quiet(number))

    def _quiet(self, number: int) -> float:
        """Until when news of a run that is not urgent are gathered."""
        return 0.0 if self._finishing else self._quiet_until.get(number, 0.0)

    def _due(self, number: int, state: TrialState) -> float:
        """When a trial's change is to be sent: a start after a while, as a trial that is over by then costs less."""
        now = self._clock()
        if state is not TrialState.RUNNING:
            return now
        self._quiet_until.setdefault(number, now + REPORTS_S)
        return self._quiet(number)

    def _wanted(self, state: TrialState, *, started: bool) -> bool:
        return self._finishing or started or state is not TrialState.WAITING

    def _add(self, number: int, due: float) -> None:
        pending = self._pending.get(number)
        if pending is None:
            self._pending[number] = _Pending(due)
        elif pending.error is not None or pending.due <= due:
            return
        else:
            pending.due = due
        heapq.heappush(self._queue, (due, number))

    # --- uploading ------------------------------------------------------------------------------------------

    def _try_now(self) -> None:
        """Let nothing wait that a server was away, or has denied."""
        now = self._clock()
        self._closed_until = now
        for number, pending in self._pending.items():
            if pending.due > now:
                pending.due = now
                heapq.heappush(self._queue, (now, number))

    def _credentials(self) -> str | None:
        """What is sent to a server for this user now; compared only."""
        if not is_http(self._store.uri):
            return None
        try:
            return credentials.find(self._store.uri).header
        except TrackingError:  # just being written
            return self._denied_with

    def _submit_due(self) -> None:
        if self._trouble is Trouble.DENIED and not self._jobs:
            present = self._credentials()
            if present != self._denied_with:
                self._denied_with = present
                _logger.info("the credentials were renewed")
                self._try_now()
        now = self._clock()
        if self._outages and (now < self._closed_until or self._jobs):
            return
        if self._place is None:  # first of all the sweep's own run
            pending = self._pending.get(SWEEP)
            if pending is not None and pending.due <= now and SWEEP not in self._jobs:
                self._submit([SWEEP], self._threads)
            return
        room = (1 if self._outages else _AT_ONCE) - len(self._jobs)
        chosen: list[int] = []
        held: list[tuple[float, int]] = []
        while len(chosen) < room and self._queue and self._queue[0][0] <= now:
            due, number = heapq.heappop(self._queue)
            pending = self._pending.get(number)
            if pending is None or pending.due != due or number in chosen:
                continue  # the entry is out of date
            waits = number in self._jobs or (
                number == SWEEP and self._finishing and self._others_left(chosen)
            )
            if waits:
                held.append((due, number))
            else:
                chosen.append(number)
        for entry in held:
            heapq.heappush(self._queue, entry)
        self._submit(chosen, self._threads)

    def _is_over(self) -> bool:
        """Whether all that a finishing tracker could still do was refused, again and again."""
        own = self._pending.get(SWEEP)
        if self._place is None:
            return own is not None and _is_hopeless(own)
        return (self._closed or own is not None) and all(map(_is_hopeless, self._pending.values()))

    def _others_left(self, chosen: Sequence[int] = ()) -> bool:
        """Whether there are trials to upload before the sweep's own run is closed."""
        hopeful = (
            number for number, each in self._pending.items() if number != SWEEP and not _is_hopeless(each)
        )
        return bool(chosen or self._jobs) or next(hopeful, None) is not None

    def _submit(self, numbers: list[int], threads: ThreadPoolExecutor) -> None:
        """Start uploads; that they are under way is recorded before."""
        if not numbers:
            return
        rows = {number: self._log.get(number) for number in numbers}
        doubts = {
            number: row.unsure or (self._search_first and row.run_id is None) for number, row in rows.items()
        }
        for row in rows.values():
            row.unsure = True
        self._cleared -= {number for number, doubt in doubts.items() if doubt}
        self._log.put(rows.values())
        size = _TOGETHER if self._store.embedded else 1
        sent_with = self._credentials()
        for start in range(0, len(numbers), size):
            group = numbers[start : start + size]
            uploads = [self._upload(rows[number], doubt=doubts[number]) for number in group]
            future = threads.submit(perform, self._store, uploads)
            for index, number in enumerate(group):
                pending = self._pending.pop(number, None)
                failures = 0 if pending is None else pending.failures
                self._jobs[number] = _Job(
                    uploads[index], failures, len(self._cleared), future, index, sent_with
                )
            future.add_done_callback(lambda _: self._wake())

    def _upload(self, row: Sent, *, doubt: bool) -> Upload:
        if row.trial == SWEEP:
            closing = self._finishing and not self._others_left()
            self._quiet_until[SWEEP] = self._clock() + _COUNTS_S
            suspects = self._log.suspects() if closing else {}
            return SweepUpload(
                self._store,
                self._spec,
                self._ledger.counts(),
                row,
                place=self._place,
                closing=closing,
                suspects=[
                    (n, self._ledger.trial(n).identity, run_id)
                    for n, run_id in suspects.items()
                    if n != SWEEP and n not in self._cleared
                ],
                cleared=self._cleared,
                report=self._log.meta("report") or "",
                bundle=self._log.meta("bundle") or "",
                standing=self._standing(closing=closing),
                note=self._note,
            )
        assert self._place is not None
        work = load_work(self._ledger, self._spec, row)
        if work.trial.state is TrialState.RUNNING:
            self._quiet_until[row.trial] = self._clock() + REPORTS_S
        else:
            self._quiet_until.pop(row.trial, None)
        return TrialUpload(self._store, self._place, work, row, doubt=doubt)

    def _standing(self, *, closing: bool) -> Standing | None:
        """How the sweep is, for its description; None where trials wait, or where it would take too much of a CPU."""
        self._behind = not closing and (self._place is None or self._clock() < self._board_due)
        if self._behind:
            return None
        began = time.thread_time()
        standing = self._board.look()
        self._board_due = self._clock() + (time.thread_time() - began) / _BOARD_SHARE
        return standing

    # --- results --------------------------------------------------------------------------------------------

    def _record_ended(self) -> None:
        rows: list[Sent] = []
        for number in [number for number, job in self._jobs.items() if job.future.done()]:
            job = self._jobs.pop(number)
            if job.future.cancelled():
                continue
            error = job.future.result()[job.index]
            if error is None:
                self._succeeded(number, job.upload)
            else:
                self._failed(number, job, error)
            rows.append(job.upload.sent)
        if rows:
            self._log.put(rows)

    def _succeeded(self, number: int, upload: Upload) -> None:
        upload.sent.unsure = False
        self._outages = 0
        self._error = self._trouble = None
        self._guessed.discard(number)
        if isinstance(upload, SweepUpload):
            self._place = upload.place
            self._closed = upload.closing
            self._note = upload.note
            if upload.report != (self._log.meta("report") or ""):
                self._log.set_meta(report=upload.report)
            if upload.bundle != (self._log.meta("bundle") or ""):
                self._log.set_meta(bundle=upload.bundle)
            if upload.found:  # this sweep has runs already, and the notes about them are lost
                self._search_always()
        elif isinstance(upload, TrialUpload) and upload.incomplete:
            self._add(number, self._clock())

    def _search_always(self) -> None:
        self._search_first = True
        self._log.set_meta(search_first="1")

    def _failed(self, number: int, job: _Job, error: Exception) -> None:
        text = one_line(error)
        if isinstance(error, Gone) and error.guessed and number in self._guessed:
            error = Refused(text)  # it was there after all, or another one is denied as well
        if isinstance(error, Gone):
            if error.guessed:
                self._guessed.add(number)
            self._restore(job.upload.sent)
        elif isinstance(error, (Unavailable, Denied)):
            text = self._fails(error, job.sent_with)
        elif not isinstance(error, Refused):
            _logger.error("uploading %s: a bug", _name(number), exc_info=error)
            text = f"{type(error).__name__}: {text}"
        if isinstance(error, (Refused, Gone)) and number != SWEEP:
            self._add(SWEEP, self._clock())  # finds out whether the server has lost the whole sweep
        failures = 1 if len(self._cleared) > job.cleared else job.failures + 1
        due = self._clock() + _pause(failures)
        self._pending[number] = _Pending(
            due, failures, text, refused=not isinstance(error, (Unavailable, Denied, Gone))
        )
        heapq.heappush(self._queue, (due, number))
        for trial in [number] if number != SWEEP else list(self._answers):
            for answer in self._answers.pop(trial, []):
                answer(text)

    def _fails(self, error: Unavailable | Denied, sent_with: str | None) -> str:
        """Nothing can be sent now; returns why."""
        answered, self._store.answered = self._store.answered, False
        self._outages = 1 if answered else self._outages + 1  # a server that answers now and then is not away
        self._closed_until = self._clock() + _pause(self._outages)
        before = self._trouble
        if isinstance(error, Denied):
            self._trouble, self._denied_with = Trouble.DENIED, sent_with
            what = f"write into experiment {self._spec.tracking.experiment!r}"
            self._error = denial(error, self._store.uri, what) or one_line(error)
        else:
            self._trouble = Trouble.BUSY if error.busy else Trouble.AWAY
            self._error = one_line(error)
        if self._trouble is not before:
            _logger.warning("MLflow is %s: %s", self._trouble, self._error)
        return self._error

    def _restore(self, sent: Sent) -> None:
        """The server has lost this run: everything of it is sent again (of the whole sweep, if it was the sweep's)."""
        if sent.trial == SWEEP:
            self._log.forget()
            self._forget_other_server()
            self._search_always()
            self._place = None
            self._note = ""
            self._start_over()
        sent.run_id = sent.artifact_uri = sent.final = None
        sent.change, sent.seq, sent.basics = -1, 0, False

    def _answer_all(self) -> None:
        """Tell those who wait for a trial's run, if it is known by now; else see that it soon will be."""
        for number in list(self._answers):
            job = self._jobs.get(number)
            early = job is not None and not self._store.embedded  # else the run may not be visible yet
            run_id = (job.upload.sent if job is not None and early else self._log.get(number)).run_id
            if self._place is None:
                number = SWEEP  # noqa: PLW2901
            elif run_id is not None:
                ref = RunRef(uri=self._store.uri, run_id=run_id, experiment_id=self._place.experiment)
                for answer in self._answers.pop(number):
                    answer(ref)
                continue
            if number not in self._jobs:
                self._submit([number], self._urgent)

    def _answer_elsewhere(self) -> None:
        for each in [each for each in self._elsewhere if each[0].done()]:
            self._elsewhere.remove(each)
            future, answer = each
            try:
                answer(future.result())
            except (CancelledError, StoreError) as error:
                answer(one_line(error))
            except Exception as error:
                _logger.exception("looking for results of other sweeps: a bug")
                answer(f"{type(error).__name__}: {one_line(error)}")

    def _next_due(self) -> float:
        if self._answers:
            return 0.02  # the run's id is known before the upload has ended
        if not self._queue or self._jobs:
            return POLL_S
        due = max(self._queue[0][0], self._closed_until if self._outages else 0.0)
        return min(POLL_S, max(0.01, due - self._clock()))


def _pause(failures: int) -> float:
    return float(min(_LONGEST_PAUSE_S, _PAUSE_S * 2 ** min(failures - 1, 10)))


def _is_hopeless(pending: _Pending) -> bool:
    return pending.refused and pending.failures >= _LAST_TRIES


def _epoch(ledger: Ledger) -> int:
    return int(ledger.meta("epoch") or 0)


def _name(number: int) -> str:
    return "the sweep's run" if number == SWEEP else f"trial {number}"
