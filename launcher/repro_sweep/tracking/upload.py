"""What is sent to MLflow for one trial, or for the sweep itself, and in which order.

Runs in the tracker's threads and touches neither the ledger nor ``tracking.db``: it is given :class:`Work` and keeps
:class:`Sent` up to date as it goes, so that what was done before a failure is not done again.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from repro_sweep.exchange import BUNDLE, BUNDLE_ID, LOG_NAME, RECORD_NAME
from repro_sweep.ledger import Ledger
from repro_sweep.records import Attempt, Trial
from repro_sweep.states import TrialState
from repro_sweep.sweep import SweepSpec
from repro_sweep.tracking import description, encoding, table
from repro_sweep.tracking.description import Standing
from repro_sweep.tracking.encoding import Curve, Point
from repro_sweep.tracking.pages import artifact_page, children_page
from repro_sweep.tracking.sent import Sent
from repro_sweep.tracking.store import Denied, Gone, Refused, Store, StoreError, artifact_name

_REPORTS_AT_ONCE = 5000
_ARTIFACTS = "artifacts"
REPORT = "report.html"
"""A page about the sweep in its directory, which becomes an artifact of its run."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Where the runs of the trials go."""

    experiment: str
    parent_run: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """What the ledger has of a trial that was not sent. ``more``: not all of its reports are here."""

    spec: SweepSpec
    trial: Trial
    attempts: list[Attempt]
    points: list[Point]
    seq: int
    final: list[Point]
    more: bool

    @property
    def latest(self) -> Attempt | None:
        """The latest attempt."""
        return self.attempts[-1] if self.attempts else None


def load_work(ledger: Ledger, spec: SweepSpec, sent: Sent) -> Work:
    """Read from the ledger what is new of a trial."""
    trial = ledger.trial(sent.trial)
    attempts = ledger.attempts(sent.trial)
    while attempts and attempts[-1].id != trial.attempt:  # it has gone on since
        attempts.pop()
    latest = attempts[-1] if attempts else None
    reports = ledger.reports(after=sent.seq, trial=trial.number, limit=_REPORTS_AT_ONCE)
    points: list[Point] = []
    for report in reports:
        points += encoding.points_of(report.metrics, step=report.step, at=report.time)
    more = len(reports) == _REPORTS_AT_ONCE
    final: list[Point] = []
    if (
        trial.state.is_finished()
        and latest is not None
        and latest.metrics
        and sent.final != latest.id
        and not more
    ):
        final = _curve(ledger, trial.number).final(latest.metrics, latest.ended_at)
    seq = reports[-1].seq if reports else sent.seq
    return Work(spec=spec, trial=trial, attempts=attempts, points=points, seq=seq, final=final, more=more)


def _curve(ledger: Ledger, number: int) -> Curve:
    curve = Curve()
    after = 0
    while reports := ledger.reports(after=after, trial=number, limit=_REPORTS_AT_ONCE):
        for report in reports:
            curve.add(encoding.points_of(report.metrics, step=report.step, at=report.time))
        after = reports[-1].seq
    return curve


class Upload(ABC):
    """Bringing one run up to date, in steps: what is said about it, its files, how it ended, what follows from that.

    Every step raises :class:`Unavailable`, :class:`Denied`, :class:`Refused` or :class:`Gone`; ``sent`` says how far
    it came, ``place`` is where it writes.
    """

    sent: Sent
    place: Place | None

    @abstractmethod
    def record(self) -> None:
        """Create or find the run, and log its params, metrics and tags."""

    @abstractmethod
    def put_files(self) -> None:
        """Store its artifacts."""

    @abstractmethod
    def conclude(self) -> None:
        """Set its status."""

    def seal(self) -> None:  # noqa: B027  (most runs need nothing of the kind)
        """Do what needs all the rest to be there."""


_STEPS = (("record", True), ("put_files", False), ("conclude", True), ("seal", False))
"""The steps, and whether those of several uploads are one transaction."""


def perform(store: Store, uploads: Sequence[Upload]) -> list[Exception | None]:
    """Perform uploads side by side, so that each step of all of them can be one transaction.

    Returns:
        What each of them failed of, None where it did not.
    """
    before = [replace(upload.sent) for upload in uploads]
    errors: list[Exception | None] = [None] * len(uploads)
    for step, together in _STEPS:
        try:
            with store.transaction() if together else contextlib.nullcontext():
                for index, upload in enumerate(uploads):
                    if errors[index] is None:
                        errors[index] = _judged(store, upload, step, _attempt(getattr(upload, step)))
        except StoreError as error:  # the transaction itself: nothing of this step was done
            for upload, old in zip(uploads, before, strict=True):
                upload.sent.take(old)
            return [error] * len(uploads)
        before = [replace(upload.sent) for upload in uploads]
    return errors


def _attempt(step: Callable[[], None]) -> Exception | None:
    try:
        step()
    except Exception as error:  # noqa: BLE001  (handed to the tracker, which tells bugs from troubles)
        return error
    return None


def _judged(store: Store, upload: Upload, step: str, error: Exception | None) -> Exception | None:
    """What an error means: a server with accounts says 403 of runs that are not there as well."""
    if not isinstance(error, Denied) or error.status != 403 or upload.place is None:
        return error
    try:
        if not store.may_write(upload.place.experiment):
            return error
    except StoreError:
        return error
    return Refused(str(error)) if step == "put_files" else Gone(str(error), guessed=True)


class TrialUpload(Upload):
    """The run of one trial. ``doubt``: more than ``sent`` says may be there already."""

    def __init__(self, store: Store, place: Place, work: Work, sent: Sent, *, doubt: bool) -> None:
        self._store = store
        self.place: Place = place
        self._work = work
        self._trial = work.trial
        self._doubt = doubt
        self._changed = False
        self.sent = sent

    def record(self) -> None:
        """See :meth:`Upload.record`."""
        sent, work, trial = self.sent, self._work, self._trial
        fresh = sent.run_id is None and self._ensure_run()
        assert sent.run_id is not None
        self._changed = sent.change != trial.change and not fresh
        points = work.points + work.final
        if self._doubt and points and not fresh:
            points = self._store.missing(sent.run_id, points)
        params = {} if sent.basics else encoding.params_of(trial.config)
        tags = encoding.state_tags(trial, work.attempts) if self._changed else {}
        if self._ends:
            tags |= encoding.provenance_tags(_read(self._folder / RECORD_NAME))
        if self._changed and not sent.basics:  # found on the server: its parent may be another one by now
            tags |= encoding.fixed_tags(work.spec, trial, self.place.parent_run)
            del tags["mlflow.runName"]
        # A param that the task itself has logged with another value stays as it is.
        _log(self._store, sent.run_id, points, params, tags)
        if not sent.basics:
            self._store.log_data(sent.run_id, work.spec.data)
        sent.seq = work.seq

    def put_files(self) -> None:
        """See :meth:`Upload.put_files`."""
        uri = self.sent.artifact_uri
        assert uri is not None
        if not self.sent.basics:
            self._put_basics(uri)
            self.sent.basics = True
        if self._ends and self._work.latest is not None and self.sent.final != self._work.latest.id:
            for path, file in _files(self._folder):
                self._store.put_file(uri, artifact_name(path), file)

    def conclude(self) -> None:
        """See :meth:`Upload.conclude`."""
        sent, trial, latest = self.sent, self._trial, self._work.latest
        assert sent.run_id is not None
        if self._work.more:
            return
        status = encoding.status(trial)
        if self._ends:
            ended = time.time() if latest is None or latest.ended_at is None else latest.ended_at
            if sent.change != trial.change or self._doubt:
                self._store.set_status(sent.run_id, status, ended_ms=encoding.milliseconds(ended))
            sent.final = None if latest is None else latest.id
        elif self._changed or trial.state is TrialState.WAITING:
            self._store.set_status(sent.run_id, status, ended_ms=None)
        sent.change = trial.change

    @property
    def _folder(self) -> Path:
        return self._work.spec.trial_directory(self._trial.directory)

    @property
    def incomplete(self) -> bool:
        """Whether the trial had more reports than are sent at once."""
        return self._work.more

    @property
    def _ends(self) -> bool:
        return self._trial.state.is_finished() and not self._work.more

    def _ensure_run(self) -> bool:
        """Find or create the trial's run; returns whether it is new, so that nothing can be there yet."""
        sent, work, trial = self.sent, self._work, self._trial
        if self._doubt:
            sent.suspect = True  # a lost request may still be on its way, or have been done twice
            search = _trial_search(work.spec, trial.identity)
            found = self._store.find_runs(self.place.experiment, search)
            if found:
                sent.run_id, sent.artifact_uri = found[0].run_id, found[0].artifact_uri
                return False
        started = work.attempts[0].started_at if work.attempts else time.time()
        tags = encoding.state_tags(trial, work.attempts)
        tags = {key: value for key, value in tags.items() if value}
        tags = encoding.fixed_tags(work.spec, trial, self.place.parent_run) | tags
        experiment = self.place.experiment
        try:
            run = self._store.create_run(experiment, tags, started_ms=encoding.milliseconds(started))
        except Gone as error:
            raise Refused(f"the experiment was deleted ({error})") from error
        sent.run_id, sent.artifact_uri = run.run_id, run.artifact_uri
        return True

    def _put_basics(self, artifact_uri: str) -> None:
        self._store.put_text(artifact_uri, encoding.CONFIG_ARTIFACT, self._trial.config)
        record = encoding.record_of(self._trial)
        if record is not None:
            self._store.put_text(artifact_uri, encoding.RECORD_ARTIFACT, record)


class SweepUpload(Upload):
    """The sweep's own run. ``place`` is None where the experiment has not been looked at yet, and set afterwards.

    ``suspects`` are trials whose run may exist twice: number, identity and right run; when the sweep is closed the
    others are deleted, and the trial's number is added to ``cleared``. ``found``: a run of this sweep was there that
    ``sent`` knows nothing of. ``report`` is the fingerprint of the report that is there, empty where there is none.
    ``standing`` is what the run's description is to say, None where that can wait, and ``note`` what it said when it
    was written last. ``bundle`` is the same for what was submitted (``provenance.bundle``),
    which is sent as soon as it is there.
    """

    def __init__(
        self,
        store: Store,
        spec: SweepSpec,
        counts: Mapping[TrialState, int],
        sent: Sent,
        *,
        place: Place | None,
        closing: bool,
        suspects: Sequence[tuple[int, str, str]],
        cleared: set[int],
        report: str = "",
        bundle: str = "",
        standing: Standing | None = None,
        note: str = "",
    ) -> None:
        self._store = store
        self._spec = spec
        self._standing = standing
        self._first = place is None
        self.note = note
        self._counts = counts
        self._suspects = suspects
        self._cleared = cleared
        self.closing = closing
        self.sent = sent
        self.place = place
        self.report = report
        self.bundle = bundle
        self.found = False

    def record(self) -> None:
        """See :meth:`Upload.record`."""
        tags = encoding.counts_tag(self._counts) | {table.TAG: ""}  # from now on it may be out of date
        params: dict[str, str] = {}
        if self.place is None:
            experiment = self._store.experiment(self._spec.tracking.experiment)
            tags |= encoding.sweep_tags(self._spec)
            params = encoding.search_params(self._spec)
        else:
            experiment = self.place.experiment
        if self.sent.run_id is None:
            self._ensure_run(experiment)
        assert self.sent.run_id is not None
        # A sweep that was submitted again with other options keeps its params: MLflow changes none. Its tags are new.
        _log(self._store, self.sent.run_id, [], params, tags)
        if self.place is None:
            self._store.log_data(self.sent.run_id, self._spec.data)
        self.place = Place(experiment=experiment, parent_run=self.sent.run_id)

    def put_files(self) -> None:
        """See :meth:`Upload.put_files`."""
        self._put_bundle()
        if self.closing or not self._first:  # it is large, and trials wait for the first one
            self._put_report()

    def _put_report(self) -> None:
        file = Path(self._spec.directory) / REPORT
        stamp = stamp_of(file)
        if not stamp or self.report.startswith(f"{stamp} "):
            return
        assert self.sent.artifact_uri is not None
        content = hashlib.sha256(file.read_bytes()).hexdigest()
        if not self.report.endswith(content):
            self._store.put_file(self.sent.artifact_uri, REPORT, file)
        self.report = f"{stamp} {content}"

    def _put_bundle(self) -> None:
        folder = Path(self._spec.directory) / BUNDLE
        ident = _read(folder / BUNDLE_ID)
        if not ident or ident == self.bundle:
            return
        assert self.sent.artifact_uri is not None
        submission = ident.partition(" ")[0]
        for file in sorted(folder.iterdir()):
            if file.name != BUNDLE_ID:
                self._store.put_file(
                    self.sent.artifact_uri, encoding.bundle_path(submission, file.name), file
                )
        self.bundle = ident

    def conclude(self) -> None:
        """See :meth:`Upload.conclude`."""
        assert self.sent.run_id is not None
        assert self.place is not None
        self._describe(self.place, self.sent.run_id)
        status = encoding.sweep_status(self._counts, closing=self.closing)
        if self.sent.final != status:
            ended_ms = encoding.milliseconds(time.time()) if self.closing else None
            self._store.set_status(self.sent.run_id, status, ended_ms=ended_ms)
            self.sent.final = status
        if self.closing:
            self._delete_others(self._search, self.sent.run_id)
            for number, identity, run_id in self._suspects:
                self._delete_others(_trial_search(self._spec, identity), run_id)
                self._cleared.add(number)

    def _describe(self, place: Place, run_id: str) -> None:
        """Renew our part of the run's description, unless a user has changed it or taken it away."""
        if self._standing is None:
            return
        spec = self._spec
        links = {"Report": artifact_page(place.experiment, run_id, REPORT)} if self.report else {}
        links["Trials"] = children_page(place.experiment, run_id, spec.metric, spec.direction)
        text = functools.partial(description.text_of, spec, self._standing, links)
        said = text(description.OWN_LIMIT)
        if said == self.note:
            return
        note = description.renewed(self._store.tags(run_id).get(description.TAG), text)
        if note is not None:
            self._store.log(run_id, tags={description.TAG: note})
        self.note = said

    def seal(self) -> None:
        """Store the table of all trials, now that all of their runs are there and nothing changes any more."""
        if not self.closing:
            return
        assert self.place is not None
        assert self.sent.artifact_uri is not None
        runs = list(self._store.runs_below(self.place.experiment, self.place.parent_run))
        content, sha256 = table.pack(table.rows_of(runs, self._record))
        self._store.put_text(self.sent.artifact_uri, table.ARTIFACT, content)
        (counts,) = encoding.counts_tag(self._counts).values()
        stamp = table.Stamp(sha256=sha256, runs=len(runs), counts=counts)
        self._store.log(self.place.parent_run, tags={table.TAG: stamp.text()})

    def _record(self, run: Any) -> Mapping[str, Any]:
        """What is too long for a trial's tags."""
        found: Mapping[str, Any] = json.loads(
            self._store.read(run.info.artifact_uri, encoding.RECORD_ARTIFACT)
        )
        return found

    @property
    def _search(self) -> dict[str, str]:
        return {f"{encoding.PREFIX}sweep_id": self._spec.sweep_id, f"{encoding.PREFIX}kind": "sweep"}

    def _delete_others(self, search: Mapping[str, str], run_id: str) -> None:
        """Delete the runs that lost and late requests have made besides the right one."""
        assert self.place is not None
        for run in self._store.find_runs(self.place.experiment, search):
            if run.run_id != run_id:
                self._store.delete_run(run.run_id)

    def _ensure_run(self, experiment: str) -> None:
        runs = self._store.find_runs(experiment, self._search)
        self.found = bool(runs)
        if not runs:
            started_ms = encoding.milliseconds(self._spec.created_at)
            runs = [
                self._store.create_run(experiment, encoding.sweep_tags(self._spec), started_ms=started_ms)
            ]
            self.sent.final = encoding.STATUS[TrialState.RUNNING]  # as MLflow creates them
        self.sent.run_id, self.sent.artifact_uri = runs[0].run_id, runs[0].artifact_uri


def _log(
    store: Store, run_id: str, points: list[Point], params: Mapping[str, str], tags: Mapping[str, str]
) -> None:
    """Log all of these, without the params that the run has with another value: the first word stands."""
    try:
        store.log(run_id, points=points, params=params, tags=tags)
    except Refused:
        there = store.params(run_id) if params else {}
        if all(there.get(key, value) == value for key, value in params.items()):
            raise
        rest = {key: value for key, value in params.items() if key not in there}
        store.log(run_id, points=points, params=rest, tags=tags)


def _files(folder: Path) -> Iterator[tuple[str, Path]]:
    """The log of a trial, its record and its artifacts: paths in the run, and files."""
    log = folder / LOG_NAME
    if log.is_file():
        yield LOG_NAME, log
    record = folder / RECORD_NAME
    if record.is_file():
        yield f"{encoding.FOLDER}/{RECORD_NAME}", record
    root = folder / _ARTIFACTS
    for parent, folders, names in os.walk(root):
        folders.sort()
        for name in sorted(names):
            file = Path(parent) / name
            if file.is_file():
                path = file.relative_to(root).as_posix()
                reserved = path == LOG_NAME or path.startswith(f"{encoding.FOLDER}/")
                yield (f"{_ARTIFACTS}/{path}" if reserved else path), file


def stamp_of(file: Path) -> str:
    """What is another one when a file was written anew; empty where there is none."""
    try:
        about = file.stat()
    except OSError:
        return ""
    return f"{about.st_mtime_ns}-{about.st_size}"


def _read(file: Path) -> str:
    """A file's text; empty where there is none."""
    try:
        return file.read_text(encoding="utf-8")
    except FileNotFoundError:
        return ""


def _trial_search(spec: SweepSpec, identity: str) -> dict[str, str]:
    return {f"{encoding.PREFIX}sweep_id": spec.sweep_id, f"{encoding.PREFIX}identity": identity}
