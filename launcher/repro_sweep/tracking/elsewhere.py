"""Results that other sweeps in the same MLflow store have of the same points, found with the same code.

Whether there can be any is decided without MLflow where the store is a SQLite file, because importing MLflow takes
seconds; the search itself is the tracker's.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
import sqlite3
from collections.abc import Iterator, Mapping
from collections.abc import Set as AbstractSet
from pathlib import Path

from repro_sweep.ledger import Ledger
from repro_sweep.records import Reused
from repro_sweep.redaction import redacted
from repro_sweep.standings import constraints_of
from repro_sweep.states import TrialState
from repro_sweep.sweep import SweepSpec
from repro_sweep.tracking.encoding import PREFIX, restored, safe_key
from repro_sweep.tracking.process import TrackerProcess
from repro_sweep.tracking.store import FinishedRun, Store, Unavailable, one_line
from repro_sweep.tracking.uri import is_http, sqlite_path

_SERVER_S = 30.0
_FILE_S = 120.0  # importing MLflow from a cold or distant disk may take a minute, and here there is something to find
_REACH_S = 10.0
_BUSY_S = 5.0

_KEYS = {"sweep": "sweep_id", "identity": "identity", "code": "code"}
_CANDIDATES = """
SELECT identity.value FROM tags code
JOIN tags sweep ON sweep.run_uuid = code.run_uuid AND sweep.key = :sweep_key AND sweep.value <> :sweep
JOIN tags identity ON identity.run_uuid = code.run_uuid AND identity.key = :identity_key
WHERE code.key = :code_key AND code.value = :code
"""


def waiting(ledger: Ledger) -> frozenset[str]:
    """The identities of the trials of a sweep that wait."""
    withdrawn = ledger.withdrawn
    return frozenset(
        identity
        for identity, (number, state) in ledger.identities().items()
        if state is TrialState.WAITING and number not in withdrawn
    )


def may_exist(spec: SweepSpec) -> bool:
    """Whether it is worth asking MLflow; takes milliseconds.

    Raises:
        LedgerError: the sweep's ledger cannot be read.
    """
    if not (spec.reuse and spec.code):
        return False
    path = sqlite_path(spec.tracking.uri)
    candidates = None if path is None else _candidates(path, spec)
    if candidates is not None and not candidates:
        return False
    ledger = Ledger.open(Path(spec.directory), readonly=True)
    try:
        wanted = waiting(ledger)
    finally:
        ledger.close()
    return bool(wanted if candidates is None else wanted & candidates)


def _candidates(path: Path, spec: SweepSpec) -> set[str] | None:
    """The identities that runs of other sweeps with the same code have; None where only MLflow can tell."""
    if not path.exists():
        return set()
    try:
        with contextlib.closing(
            sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True, timeout=_BUSY_S)
        ) as db:
            if db.execute("SELECT 1 FROM sqlite_master WHERE name = 'tags'").fetchone() is None:
                return set()
            keys = {f"{name}_key": f"{PREFIX}{tag}" for name, tag in _KEYS.items()}
            rows = db.execute(_CANDIDATES, {**keys, "sweep": spec.sweep_id, "code": spec.code})
            return {identity for (identity,) in rows}
    except sqlite3.Error:
        return None


def search(store: Store, spec: SweepSpec, wanted: AbstractSet[str]) -> dict[str, Reused]:
    """The results of other sweeps for those of the identities that have one: of several the newest.

    Raises:
        Unavailable, Refused, Gone: MLflow cannot be asked.
    """
    if not (spec.code and wanted):
        return {}
    if is_http(spec.tracking.uri):
        _reach(spec.tracking.uri)
    tags = {"kind": "trial", "state": TrialState.COMPLETE, "code": spec.code}
    found: dict[str, tuple[tuple[bool, int], Reused]] = {}
    with store.transaction():
        for run in store.finished_runs({f"{PREFIX}{key}": value for key, value in tags.items()}):
            identity = run.tags.get(f"{PREFIX}identity", "")
            if identity not in wanted or run.tags.get(f"{PREFIX}sweep_id") == spec.sweep_id:
                continue
            result = _result(run, spec)
            # One that was itself taken over counts where the run that it was taken from was deleted.
            order = not run.tags.get(f"{PREFIX}reused_from"), run.ended_ms
            if result is not None and (identity not in found or order > found[identity][0]):
                found[identity] = order, result
    return {identity: result for identity, (_, result) in found.items()}


def _reach(uri: str) -> None:
    """Make sure within seconds that a server answers at all: MLflow itself would wait longer for one that hangs."""
    import requests

    try:
        requests.get(f"{uri}/health", timeout=_REACH_S, allow_redirects=False, stream=True).close()
    except (requests.ConnectionError, requests.Timeout) as error:
        raise Unavailable(f"{redacted(uri)}: {one_line(error).removeprefix('server: ')}") from error
    except requests.RequestException:  # such as a certificate that MLflow is told to accept
        return


def _result(run: FinishedRun, spec: SweepSpec) -> Reused | None:
    """What a run has found; None where that is not all that the sweep needs."""
    metrics = {key: restored(value) for key, value in run.metrics.items()}
    for key, value in _final(run.tags):
        metrics.pop(safe_key(key), None)
        metrics[key] = value
    named = {each.metric for each in spec.all_objectives} | {each.metric for each in constraints_of(spec)}
    for name in named:
        if name not in metrics and safe_key(name) in metrics:
            metrics[name] = metrics.pop(safe_key(name))
    lacks = any(math.isnan(metrics.get(name, math.nan)) for name in named)
    if not metrics or (spec.metric is not None and lacks):
        return None
    return Reused(
        run_id=run.run_id,
        origin=run.tags.get(f"{PREFIX}sweep", "?"),
        host=run.tags.get(f"{PREFIX}host", ""),
        metrics=metrics,
        started_at=run.started_ms / 1000,
        ended_at=run.ended_ms / 1000,
    )


def _final(tags: Mapping[str, str]) -> Iterator[tuple[str, float]]:
    for key, value in json.loads(tags.get(f"{PREFIX}metrics") or "{}").items():
        yield key, float(value)


async def results(spec: SweepSpec, tracker: TrackerProcess) -> dict[str, Reused]:
    """What other sweeps have of the trials of this one that wait, by identity; the coordinator's end of the search.

    Raises:
        LedgerError: the sweep's ledger cannot be read.
        TrackingError: MLflow cannot be asked, or has not answered within 30 s (a server) or 120 s (a file).
    """
    if not await asyncio.to_thread(may_exist, spec):
        return {}
    return await tracker.done_elsewhere(_SERVER_S if is_http(spec.tracking.uri) else _FILE_S)
