"""Trials as MLflow has them, with all that is needed to run them again: record, config, source, what was submitted."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from pydantic import ValidationError

from repro_sweep.errors import SweepError, TrackingError
from repro_sweep.exchange import ARCHIVE_NAME, RECORD_NAME
from repro_sweep.provenance.bundle import DATA_NAME, SWEEP_NAME
from repro_sweep.provenance.record import TrialRecord
from repro_sweep.ranking import best_trial
from repro_sweep.results import (
    Sweep,
    Trial,
    artifact_of,
    find_run,
    find_sweep,
    read_trials,
    sweep_of,
)
from repro_sweep.sweep import SweepSpec
from repro_sweep.tracking.encoding import CONFIG_ARTIFACT, FOLDER, bundle_path

_Fetch = Callable[[str, str, str], Path]
_RUN_ID = re.compile(r"[0-9a-f]{32}")
_BEST = re.compile(r"best\s+of\s+(?P<name>.+)")
_NUMBERED = re.compile(r"(?P<name>.+)/(?P<number>\d+)")


@dataclass(frozen=True, slots=True, kw_only=True)
class Original:
    """A trial that has run, and what MLflow has of it; ``missing`` names what it does not have.

    ``manifests`` are the hashes of the files of its data, by the data's digests, as far as they are known.
    """

    sweep: Sweep
    trial: Trial
    record: TrialRecord | None = None
    config: str = ""
    spec: SweepSpec | None = None
    archive: Path | None = None
    manifests: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    missing: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """How the user calls it."""
        return f"{self.sweep.name}/{self.trial.number}"


def find(what: str, uri: str) -> tuple[Sweep, Trial]:
    """The trial that a user means: a run id, ``SWEEP/NUMBER``, or ``best of SWEEP``.

    Raises:
        TrackingError: there is none.
    """
    what = what.strip()
    if best := _BEST.fullmatch(what):
        return find_sweep(best["name"], uri), best_trial(best["name"], uri=uri)
    if numbered := _NUMBERED.fullmatch(what):
        sweep = find_sweep(numbered["name"], uri)
        number = int(numbered["number"])
        trials = {trial.number: trial for trial in read_trials(sweep)}
        if number not in trials:
            has = f"{min(trials)} to {max(trials)}" if trials else "none yet"
            raise TrackingError(f"sweep {sweep.name!r} has no trial {number}: its trials are {has}")
        return sweep, trials[number]
    if _RUN_ID.fullmatch(what):
        return find_run(what, uri)
    raise TrackingError(
        f"{what!r} is no trial: write SWEEP/NUMBER, 'best of SWEEP', or the id of an MLflow run"
    )


def all_of(name: str, uri: str) -> list[tuple[Sweep, Trial]]:
    """The trials of a sweep that have a result.

    Raises:
        TrackingError: there is no such sweep, or none of its trials has one.
    """
    sweep = find_sweep(name, uri)
    found = [(sweep, trial) for trial in read_trials(sweep) if trial.state.is_done()]
    if not found:
        raise TrackingError(f"sweep {name!r} has no trial with a result")
    return found


def load(found: Sequence[tuple[Sweep, Trial]]) -> Iterator[Original]:
    """What MLflow has of these trials; files that several of them share are fetched once."""
    shared: dict[tuple[str, str], Path | str] = {}

    def fetch(run_id: str, path: str, uri: str) -> Path:
        if (run_id, path) not in shared:
            try:
                shared[run_id, path] = artifact_of(run_id, path, uri)
            except (TrackingError, FileNotFoundError) as error:
                shared[run_id, path] = str(error)
        there = shared[run_id, path]
        if isinstance(there, str):
            raise FileNotFoundError(path)
        return there

    for sweep, trial in found:
        yield _load(Original(sweep=sweep, trial=trial), fetch)


def _load(found: Original, fetch: _Fetch) -> Original:
    trial, sweep = found.trial, found.sweep
    missing: list[str] = []
    if not trial.state.is_done():
        missing.append(f"a result (it is {trial.state})")
    record, config, spec, archive = None, "", None, None
    manifests: dict[str, dict[str, str]] = {}
    try:
        record = TrialRecord.parse(trial.artifact(f"{FOLDER}/{RECORD_NAME}").read_text(encoding="utf-8"))
    except TrackingError:
        missing.append("its record")
    except SweepError as error:
        missing.append(f"its record ({error})")
    try:
        config = trial.artifact(CONFIG_ARTIFACT).read_text(encoding="utf-8")
    except TrackingError:
        missing.append("its config")
    if record is not None and record.snapshot is None:
        missing.append("its source (it was not frozen)")
    elif record is not None and record.snapshot is not None:
        # of a result that was taken over, the sweep is another one: the one that has run it
        home = sweep if record.sweep_id == sweep.sweep_id else sweep_of(record.sweep_id, sweep.uri)
        run_id = "" if home is None else home.run_id
        with contextlib.suppress(FileNotFoundError):
            spec = _spec(
                fetch(run_id, bundle_path(record.submission, SWEEP_NAME), sweep.uri).read_text("utf-8")
            )
        with contextlib.suppress(FileNotFoundError, ValueError):
            file = fetch(run_id, bundle_path(record.submission, DATA_NAME), sweep.uri)
            manifests = json.loads(file.read_text("utf-8"))
        if spec is None:
            missing.append("what was submitted")
        try:
            archive = fetch(run_id, bundle_path(record.submission, ARCHIVE_NAME), sweep.uri)
        except FileNotFoundError:
            missing.append("its source")
    return replace(
        found,
        record=record,
        config=config,
        spec=spec,
        archive=archive,
        manifests=manifests,
        missing=tuple(missing),
    )


def _spec(text: str) -> SweepSpec | None:
    try:
        return SweepSpec.model_validate(json.loads(text))
    except (ValidationError, ValueError):
        return None
