"""Two trials side by side: config, code, environment, data and metrics."""

from __future__ import annotations

import difflib
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from repro_sweep.comparison import compare
from repro_sweep.errors import SweepError
from repro_sweep.originals import Original
from repro_sweep.provenance import archive
from repro_sweep.provenance.snapshot import digest_of
from repro_sweep.reproducing import check_environment, differences
from repro_sweep.results import histories
from repro_sweep.tracking.encoding import params_of

_LARGEST_TEXT = 1_000_000
_SECTIONS = ("config", "code", "environment", "data", "metrics")


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """Something that differs; None: it is not there. ``text`` is a unified diff, for code."""

    what: str
    one: str | None
    other: str | None
    text: str = ""


def diff(one: Original, other: Original) -> dict[str, list[Line]]:
    """All differences by section; empty where there are none. What MLflow lacks of either is a line of its own.

    Raises:
        SweepError: a source is not the recorded one.
        TrackingError: MLflow cannot be read.
    """
    found: dict[str, list[Line]] = {name: [] for name in _SECTIONS}
    found["config"] = list(_mapping(params_of(one.config or "{}"), params_of(other.config or "{}")))
    found["code"] = list(_code(one, other))
    if one.record is not None and other.record is not None:
        told = (
            *check_environment(one.record.environment, other.record.environment, ()),
            *differences(one.record, other.record),
        )
        found["environment"] = [_told(line) for line in told]
        known = {line.what for line in found["environment"]}
        variables = _mapping(one.record.facts.variables, other.record.facts.variables)
        found["environment"] += (line for line in variables if line.what not in known)
        seeds = (str(each.record.facts.seed) for each in (one, other) if each.record is not None)
        found["config"] += _mapping({"(seed)": next(seeds)}, {"(seed)": next(seeds)})
        digests = (
            {name: f"{data.uri} {data.digest}" for name, data in each.data.items()}
            for each in (one.record, other.record)
        )
        found["data"] = list(_mapping(next(digests), next(digests)))
    else:
        lacking = [_lacking(each) for each in (one, other)]
        found["environment"] = [Line(what="record", one=lacking[0], other=lacking[1])]
    finals = [{name: repr(value) for name, value in each.trial.metrics.items()} for each in (one, other)]
    found["metrics"] = list(_mapping(*finals))
    first = compare(histories(one.trial), histories(other.trial)).first
    if first is not None:
        found["metrics"].append(
            Line(what=f"first: {first.metric} at step {first.step}", one=str(first.was), other=str(first.now))
        )
    return found


def _lacking(original: Original) -> str:
    return "not in MLflow" if original.record is None else "there"


def _mapping(one: Mapping[str, str], other: Mapping[str, str]) -> Iterator[Line]:
    for key in [*one, *(key for key in other if key not in one)]:
        if one.get(key) != other.get(key):
            yield Line(what=key, one=one.get(key), other=other.get(key))


def _told(line: str) -> Line:
    what, _, values = line.partition(": ")
    before, _, now = values.partition(" before, ")
    return (
        Line(what=what, one=before, other=now.removesuffix(" now"))
        if now
        else Line(what=line, one="", other="")
    )


def _code(one: Original, other: Original) -> Iterator[Line]:
    ids = [each.record.snapshot if each.record is not None else None for each in (one, other)]
    if ids[0] is not None and ids[0] == ids[1]:
        return
    commits = [each.record.commit if each.record is not None else None for each in (one, other)]
    if commits[0] != commits[1]:
        yield Line(what="git commit", one=commits[0], other=commits[1])
    if one.archive is None or other.archive is None:
        yield Line(what="source", one=_there(one), other=_there(other))
        return
    with tempfile.TemporaryDirectory(prefix="repro-sweep-") as temporary:
        folders = [Path(temporary, name) for name in ("one", "other")]
        for folder, each, ident in zip(folders, (one, other), ids, strict=True):
            assert each.archive is not None
            try:
                archive.unpack_verified(each.archive, folder, ident)
            except SweepError as error:
                raise SweepError(f"{each.name}: {error}") from error
        names = [
            {path.relative_to(folder).as_posix() for path in folder.rglob("*/*") if path.is_file()}
            for folder in folders
        ]
        for name in sorted(names[0] | names[1]):
            paths = [folder / name for folder in folders]
            states = [_state(each) for each in paths]
            text = _changes(paths, name.partition("/")[2])
            if text or states[0] != states[1]:
                yield Line(what=name.partition("/")[2], one=states[0], other=states[1], text=text)


def _there(original: Original) -> str:
    return "not in MLflow" if original.archive is None else "there"


def _state(path: Path) -> str | None:
    if not path.is_file():
        return None
    return "there, executable" if os.access(path, os.X_OK) else "there"


def _changes(paths: Sequence[Path], name: str) -> str:
    """A unified diff, of sizes and hashes where there are no lines to show; empty where both hold the same."""
    digests = [digest_of(path) if path.is_file() else None for path in paths]
    if digests[0] == digests[1]:
        return ""
    before, now = (_lines(path) for path in paths)
    if before is None or now is None or before == now:  # the same but for the ends of lines
        before, now = (
            [f"({path.stat().st_size} bytes, sha256 {digest[:16]})"] if digest is not None else []
            for path, digest in zip(paths, digests, strict=True)
        )
    return "\n".join(difflib.unified_diff(before, now, name, name, lineterm="", n=1))


def _lines(path: Path) -> list[str] | None:
    """The lines of a file, none where there is no file; None of what is large or no text."""
    if not path.is_file():
        return []
    if path.stat().st_size > _LARGEST_TEXT:
        return None
    try:
        return path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError:
        return None
