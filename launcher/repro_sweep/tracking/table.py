"""The table of a sweep's trials: what all their runs say, in one small artifact of the sweep's own run.

MLflow takes seconds to find and send thousands of runs. So the tracker reads them once, when a sweep's run is closed,
and stores them as one file; a tag of the sweep's run says which file is current. A ranking that finds it needs a
handful of requests, however many trials there are. The rows are made from MLflow's runs by the same function in both
ways (:func:`row_of`), so that the table says what the runs say, with what tasks have logged themselves.

Knows no server and never imports mlflow; runs are MLflow's entities.
"""

from __future__ import annotations

import gzip
import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from repro_sweep.tracking.encoding import FOLDER, PREFIX, canonical, own_tags, restored, safe_key

ARTIFACT = f"{FOLDER}/trials.json.gz"
TAG = f"{PREFIX}table"
REPRODUCED = f"{PREFIX}reproduced."
"""Begins the tags of a sweep's run that say what became of its trials when they were run again, by their number."""

_VERSION = 1
_LEVEL = 6
_LONG = "sha256:"

Row = list[Any]
"""A trial: number, run id, identity, point, state, params, repeat, overrides, metrics, failure, reused from, verdict.

All are plain values; ``failure`` is the pair of kind and message, or None.
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Stamp:
    """What the tag says of the current table: its hash, how many runs it is made from, and the trials in each state."""

    sha256: str
    runs: int
    counts: str

    def text(self) -> str:
        """The tag's value."""
        return canonical({
            "version": _VERSION, "sha256": self.sha256, "runs": self.runs, "counts": self.counts,
        })  # fmt: skip


def stamp_of(run: Any) -> Stamp | None:
    """The stamp of a sweep's run; None where there is no table, or none that is current.

    The tracker takes the stamp away before it changes anything. One of a version that knew no tables does not: it is
    noticed by the run's status and by the trials in each state, which it does keep.
    """
    try:
        found = json.loads(run.data.tags.get(TAG) or "{}")
        if found.pop("version", None) != _VERSION:
            return None
        stamp = Stamp(**found)
    except (ValueError, TypeError, AttributeError):  # somebody else has written it
        return None
    counts = run.data.tags.get(f"{PREFIX}counts", "")
    return stamp if stamp.counts == counts and run.info.status != "RUNNING" else None


def pack(rows: Sequence[Row]) -> tuple[bytes, str]:
    """The artifact, and its hash for the stamp."""
    content = gzip.compress(canonical(rows).encode("utf-8", "surrogatepass"), _LEVEL, mtime=0)
    return content, hashlib.sha256(content).hexdigest()


def unpack(content: bytes, stamp: Stamp) -> list[Row] | None:
    """The rows of an artifact; None where it is not the one that the stamp is about."""
    if hashlib.sha256(content).hexdigest() != stamp.sha256:
        return None
    rows: list[Row] = json.loads(gzip.decompress(content).decode("utf-8", "surrogatepass"))
    return rows


def rows_of(runs: Iterable[Any], record: Callable[[Any], Mapping[str, Any]]) -> list[Row]:
    """The trials of a sweep by number, from all runs below its own. Of two of one trial the more complete one counts.

    Args:
        runs: in the order of their start.
        record: reads the artifact ``RECORD_ARTIFACT`` of a run.
    """
    found: dict[int, Any] = {}
    for run in runs:
        number = int(run.data.tags[f"{PREFIX}trial"])
        if number not in found or _completeness(run) > _completeness(found[number]):
            found[number] = run
    return [row_of(found[number], record) for number in sorted(found)]


def row_of(run: Any, record: Callable[[Any], Mapping[str, Any]]) -> Row:
    """What a run says about its trial."""
    tags = own_tags(run.data.tags)
    kept = ("params", "repeat", "overrides")
    long = any(tags[key].startswith(_LONG) for key in kept)
    said = record(run) if long else {key: json.loads(tags[key]) for key in kept}
    metrics = {key: restored(value) for key, value in run.data.metrics.items()}
    for key, value in json.loads(tags.get("metrics") or "{}").items():
        metrics.pop(safe_key(key), None)
        metrics[key] = float(value)
    failed = tags["state"] == "FAIL"
    return [
        int(tags["trial"]), run.info.run_id, tags["identity"], tags.get("point", ""), tags["state"],
        said["params"], said["repeat"], said["overrides"], metrics,
        [tags.get("failure_kind") or None, tags.get("failure_message", "")] if failed else None,
        tags.get("reused_from") or None, tags.get("reproduced") or None,
    ]  # fmt: skip


def _completeness(run: Any) -> tuple[bool, int]:
    """A run that a lost and late request has made besides the right one has nothing but its tags."""
    return run.info.end_time is not None, len(run.data.params)
