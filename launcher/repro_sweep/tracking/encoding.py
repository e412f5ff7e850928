"""How a sweep looks in MLflow: the names of its tags, and its params and metrics within MLflow's limits.

Pure functions from the ledger's records to plain values; knows nothing of any server and never imports mlflow.
Nothing is lost by shortening: the exact config and values are artifacts of the run as well.
"""

from __future__ import annotations

import hashlib
import json
import math
import posixpath
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import yaml

from repro_sweep.records import Attempt, Trial
from repro_sweep.standings import constraints_of
from repro_sweep.states import FailureKind, TrialState
from repro_sweep.sweep import Chosen, SweepSpec

PREFIX = "repro_sweep."
CONFIG_ARTIFACT = "repro_sweep/config.yaml"
RECORD_ARTIFACT = "repro_sweep/trial.json"
FOLDER = "repro_sweep"
"""Where the artifacts are that repro-sweep makes itself."""

BY_START = "attributes.start_time ASC"

KEY_LIMIT = 250
PARAM_LIMIT = 6000
TAG_LIMIT = 5000
LARGEST = sys.float_info.max
_MESSAGE_LIMIT = 1000

STATUS = {
    TrialState.WAITING: "SCHEDULED",
    TrialState.RUNNING: "RUNNING",
    TrialState.COMPLETE: "FINISHED",
    TrialState.PRUNED: "FINISHED",
    TrialState.FAIL: "FAILED",
}
"""MLflow's status of a run for each state of its trial.

MLflow has none for a pruned trial: it has ended as it should, with a value, and the tag ``state`` says that it is
PRUNED. KILLED is left to what the user has ended.
"""


@dataclass(frozen=True, slots=True)
class Point:
    """One value of a metric, as MLflow identifies it; ``at_ms`` is milliseconds UTC."""

    key: str
    value: float
    at_ms: int
    step: int

    @property
    def identity(self) -> tuple[str, int, int, str]:
        """Equal for the same point before and after a round trip (MLflow stores infinities as the largest float)."""
        value = self.value
        if math.isinf(value):
            value = math.copysign(LARGEST, value)
        return self.key, self.at_ms, self.step, "nan" if math.isnan(value) else repr(float(value))


def restored(value: float) -> float:
    """A value as it was logged: MLflow's stores keep infinities as the largest finite number."""
    return math.copysign(math.inf, value) if abs(value) >= LARGEST else value


def json_number(value: float | None) -> float | str | None:
    """A number for JSON, which has no NaN and no infinities: these are text."""
    return value if value is None or math.isfinite(value) else str(value)


# --- text ----------------------------------------------------------------------------------------------------


def digest(text: str) -> str:
    """Eight hex digits that stand for a text."""
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:8]


def clean(text: str) -> str:
    """``text`` without what databases refuse (NUL, lone surrogates)."""
    return text.replace("\x00", "\\x00").encode("utf-8", "backslashreplace").decode()


def shorten(text: str, limit: int) -> str:
    """``text`` within ``limit`` characters; what is cut is marked and stays distinguishable."""
    if len(text) <= limit:
        return text
    mark = f"… [{len(text)} characters, sha256 {digest(text)}]"
    return text[: limit - len(mark)] + mark


def safe_key(name: str) -> str:
    """The name under which MLflow takes a param or metric: ``name`` itself where possible, else one that is unique."""
    refused = re.search(r"[^/\w.\- :]", name)
    if (
        name
        and not refused
        and len(name) <= KEY_LIMIT
        and posixpath.normpath(name) == name
        and name[0] not in "./"
    ):
        return name
    text = re.sub(r"[^\w\- :]", "_", name)[: KEY_LIMIT - 9].strip()
    return f"{text}-{digest(name)}"


def canonical(value: object) -> str:
    """JSON text in the given order of keys, without spaces."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"), default=str)


# --- params --------------------------------------------------------------------------------------------------


class _Loader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc]  # libyaml may be missing
    """Reads scalars as OmegaConf does, ten times faster."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(
        r"""^(?:[-+]?[0-9]+(?:_[0-9]+)*\.[0-9_]*(?:[eE][-+]?[0-9]+)?
        |[-+]?[0-9]+(?:_[0-9]+)*(?:[eE][-+]?[0-9]+)
        |\.[0-9]+(?:_[0-9]+)*(?:[eE][-+][0-9]+)?
        |[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$""",
        re.VERBOSE,
    ),
    list("-+0123456789."),
)
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:timestamp"]
    for first, resolvers in _Loader.yaml_implicit_resolvers.items()
}
_Loader.add_multi_constructor("tag:yaml.org,2002:python/", lambda loader, _, node: _path_text(loader, node))

_REFERENCE = re.compile(r"\$\{([^${}:]+)\}")
_DEPTH = 8


def params_of(config: str) -> dict[str, str]:
    """A config's leaves by their dotted keys, as MLflow's own clients would log them (``str(value)``).

    References to other nodes are followed. Values that need a resolver (``${oc.env:…}``) are left out: this process
    is not the trial's, and they may be secrets.
    """
    root = yaml.load(config, Loader=_Loader)  # noqa: S506  (a safe loader)
    params: dict[str, str] = {}
    for path, leaf in _leaves(root, ()):
        value = _followed(leaf, root, _DEPTH)
        if "${" in str(value):
            continue
        key = safe_key(".".join(path))
        if key in params:  # {"a.b": …} beside {"a": {"b": …}}
            key = safe_key(".".join(path)[: KEY_LIMIT - 9] + "-" + digest(canonical(path)))
        params[key] = shorten(clean(str(value)), PARAM_LIMIT)
    return params


def _leaves(node: object, path: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], object]]:
    if isinstance(node, dict) and node:
        for key, value in node.items():
            yield from _leaves(value, (*path, str(key)))
    elif path:
        yield path, node


def _followed(leaf: object, root: object, depth: int) -> object:
    if not isinstance(leaf, str) or "${" not in leaf or depth == 0:
        return leaf
    whole = _REFERENCE.fullmatch(leaf)
    if whole is not None:
        return _followed(_node(root, whole[1], leaf), root, depth - 1)
    return _REFERENCE.sub(
        lambda match: str(_followed(_node(root, match[1], match[0]), root, depth - 1)), leaf
    )


def _node(root: object, path: str, missing: object) -> object:
    node = root
    for key in path.strip().split("."):
        if not isinstance(node, dict) or key not in node:
            return missing
        node = node[key]
    return node


def _path_text(loader: Any, node: Any) -> str:
    return posixpath.join(*(str(part) for part in loader.construct_sequence(node)))


# --- tags ----------------------------------------------------------------------------------------------------


def run_name(trial: Trial) -> str:
    """Readable name of a trial's run: its number and what distinguishes it."""
    words = [f"{key}={value}" for key, value in {**trial.params, **trial.repeat}.items()]
    return shorten(clean(" ".join([str(trial.number), *words]).replace("\n", " ")), KEY_LIMIT)


def fixed_tags(spec: SweepSpec, trial: Trial, parent_run: str) -> dict[str, str]:
    """The tags of a trial's run that never change."""
    return {
        "mlflow.runName": run_name(trial),
        "mlflow.parentRunId": parent_run,
        **_origin_tags(spec),
        **_prefixed(
            kind="trial",
            sweep=spec.name,
            sweep_id=spec.sweep_id,
            trial=str(trial.number),
            identity=trial.identity,
            point=trial.point,
            params=_fitting(trial.params),
            repeat=_fitting(trial.repeat),
            overrides=_fitting(trial.overrides),
        ),
        **(_prefixed(reproduces=spec.reproduces[trial.number]) if trial.number in spec.reproduces else {}),
    }


def record_of(trial: Trial) -> str | None:
    """What of a trial's tags is too long for a tag, as JSON; None where all fit."""
    record = {"params": trial.params, "repeat": trial.repeat, "overrides": trial.overrides}
    return (
        canonical(record)
        if any(len(clean(canonical(value))) > TAG_LIMIT for value in record.values())
        else None
    )


def provenance_tags(record: str) -> dict[str, str]:
    """What of a trial's own record (``provenance.record``) runs are looked for by; the rest is an artifact."""
    try:
        about = json.loads(record)
        environment = about["environment"]
        gpus = sorted({gpu["model"] for gpu in environment["gpus"]}) if about["gpus_seen"] else []
        return _prefixed(
            seed="" if about["facts"]["seed"] is None else str(about["facts"]["seed"]),
            snapshot=about["snapshot"] or "",
            python=environment["python"],
            cpu=environment["cpu"] or "",
            gpu=", ".join(gpus),
        )
    except (ValueError, KeyError, TypeError):  # of another version
        return {}


def own_tags(tags: Mapping[str, str]) -> dict[str, str]:
    """The tags of a run that repro-sweep has set, without their prefix."""
    return {key.removeprefix(PREFIX): value for key, value in tags.items() if key.startswith(PREFIX)}


def trials_of(parent_run: str) -> str:
    """The condition by which the runs of a sweep's trials are found below the sweep's own run."""
    return f"tags.`mlflow.parentRunId` = '{parent_run}' and tags.`{PREFIX}kind` = 'trial'"


def bundle_path(submission: str, name: str) -> str:
    """Where a file of what was submitted is in the sweep's run; each submission that differs has a place of its own."""
    return f"{FOLDER}/submissions/{submission}/{name}"


def status(trial: Trial) -> str:
    """MLflow's status of a trial's run."""
    return "KILLED" if is_cancelled(trial) else STATUS[trial.state]


def is_cancelled(trial: Trial) -> bool:
    """Whether it was the user who has ended a trial."""
    return trial.cancelled and trial.state is TrialState.FAIL


def state_tags(trial: Trial, attempts: Sequence[Attempt]) -> dict[str, str]:
    """The tags of a trial's run that follow its state; an empty text where there is nothing to say.

    ``code`` is the fingerprint of the code that its latest attempt ran with.
    """
    latest = attempts[-1] if attempts else None
    kind, message = _failure(trial, latest)
    metrics = (
        canonical(latest.metrics)
        if latest is not None and trial.state.is_finished() and latest.metrics
        else ""
    )
    return _prefixed(
        state=trial.state,
        attempts=str(len(attempts)),
        attempt_history=_history(attempts),
        failure_kind=kind,
        failure_message=shorten(message, _MESSAGE_LIMIT),
        code=latest.code if latest else "",
        reused_from=trial.reused or "",
        host=latest.host if latest else "",
        metrics=clean(metrics) if len(clean(metrics)) <= TAG_LIMIT else "",
    )


def _failure(trial: Trial, latest: Attempt | None) -> tuple[str, str]:
    if trial.state is not TrialState.FAIL:
        return "", ""
    kind = (latest.kind if latest is not None else None) or ""
    message = (latest.message if latest is not None else None) or ""
    # while it waited: its last attempt has its own end
    if is_cancelled(trial) and kind != FailureKind.CANCELLED:
        return FailureKind.CANCELLED, "cancelled while it waited"
    return kind, message


def sweep_tags(spec: SweepSpec) -> dict[str, str]:
    """The tags of a sweep's own run that do not change while it runs."""
    dirty = "" if spec.origin.git_dirty is None else str(spec.origin.git_dirty).lower()
    return {
        "mlflow.runName": shorten(clean(spec.name), KEY_LIMIT),
        **_origin_tags(spec),
        **_prefixed(
            kind="sweep",
            sweep=spec.name,
            sweep_id=spec.sweep_id,
            metric=spec.metric or "",
            direction=spec.direction,
            task=spec.task.name,
            command=spec.origin.command,
            host=spec.origin.host,
            git_dirty=dirty,
            repeats=canonical(spec.repeats),
            sampler=spec.sampler,
            objectives=_fitting([each.model_dump() for each in spec.objectives]),
            constraints=_fitting([each.model_dump() for each in constraints_of(spec)]),
            search=_fitting(search_params(spec)),
            code=spec.code,
            executor=spec.executor_name,
            directory=spec.directory,
        ),
    }


def search_params(spec: SweepSpec) -> dict[str, str]:
    """The params of a sweep's own run: what it looks for, and how."""
    found: dict[str, object] = {
        "sampler": spec.sampler,
        "objectives": ", ".join(f"{each.direction} {each.metric}" for each in spec.all_objectives),
    }
    search = spec.search
    if search is not None:
        found |= _chosen("sampler", search.sampler)
        found["seed"] = search.seed
        budget = search.budget.model_dump(exclude_none=True)
        found |= {f"budget.{key}": value for key, value in budget.items()}
        found |= _chosen("repeats_pruner", search.repeats_pruner)
        if search.constraints:
            found["constraints"] = ", ".join(
                f"{each.metric} {each.operator} {each.bound:g}" for each in search.constraints
            )
    found |= _chosen("pruner", spec.pruner)
    return {safe_key(key): shorten(clean(str(value)), PARAM_LIMIT) for key, value in found.items()}


def _chosen(kind: str, chosen: Chosen | None) -> dict[str, object]:
    if chosen is None:
        return {}
    return {kind: chosen.name} | {f"{kind}.{key}": value for key, value in chosen.options.items()}


def counts_tag(counts: Mapping[TrialState, int]) -> dict[str, str]:
    """How many trials are in each state, as a tag of the sweep's run."""
    return _prefixed(counts=canonical({state: count for state, count in counts.items() if count}))


def sweep_status(counts: Mapping[TrialState, int], *, closing: bool) -> str:
    """MLflow's status of the sweep's run; KILLED stands for a sweep that was interrupted."""
    if not closing:
        return "RUNNING"
    if counts[TrialState.WAITING] or counts[TrialState.RUNNING]:
        return "KILLED"
    return "FAILED" if counts[TrialState.FAIL] else "FINISHED"


def _prefixed(**tags: str) -> dict[str, str]:
    return {f"{PREFIX}{key}": shorten(clean(value), TAG_LIMIT) for key, value in tags.items()}


def _origin_tags(spec: SweepSpec) -> dict[str, str]:
    tags = {
        "mlflow.user": spec.origin.user,
        "mlflow.source.name": spec.task.name,
        "mlflow.source.type": "LOCAL",
    }
    if spec.origin.git_commit:
        tags["mlflow.source.git.commit"] = spec.origin.git_commit
    return {key: shorten(clean(value), TAG_LIMIT) for key, value in tags.items()}


def _fitting(value: object) -> str:
    text = clean(canonical(value))
    return text if len(text) <= TAG_LIMIT else f"sha256:{hashlib.sha256(text.encode()).hexdigest()}"


def _history(attempts: Sequence[Attempt]) -> str:
    """Every attempt's end and host as JSON; of too many the latest."""
    entries = [
        {
            "state": each.state,
            "kind": each.kind,
            "host": each.host,
            "started": each.started_at,
            "ended": each.ended_at,
        }
        for each in attempts
    ]
    while len(text := canonical(entries)) > TAG_LIMIT:
        entries = entries[max(1, len(entries) // 2) :]
    return text


# --- metrics -------------------------------------------------------------------------------------------------


def milliseconds(seconds: float) -> int:
    """MLflow's stamp for seconds UTC."""
    return max(0, round(seconds * 1000))


class Curve:
    """What the reports of a trial have led to: where its final metrics belong. Reports are fed in their order."""

    def __init__(self) -> None:
        self.step = 0
        self.at_ms = 0
        self._seen = False
        self._latest: dict[str, Point] = {}

    def add(self, points: Sequence[Point]) -> None:
        """Take notice of reported points."""
        for point in points:
            self.step = max(self.step, point.step) if self._seen else point.step
            self._seen = True
            self.at_ms = max(self.at_ms, point.at_ms)
            latest = self._latest.get(point.key)
            if latest is None or (point.step, point.at_ms) >= (latest.step, latest.at_ms):
                self._latest[point.key] = point

    def final(self, metrics: Mapping[str, float], ended_at: float | None) -> list[Point]:
        """The final metrics as points after all others, without those that say what the last report said."""
        at_ms = max(self.at_ms, milliseconds(ended_at or 0.0))
        points = [Point(safe_key(key), float(value), at_ms, self.step) for key, value in metrics.items()]
        return [point for point in points if not self._said(point)]

    def _said(self, point: Point) -> bool:
        latest = self._latest.get(point.key)
        return latest is not None and latest.identity[3] == point.identity[3]


def points_of(metrics: Mapping[str, float], *, step: int, at: float) -> list[Point]:
    """One report's metrics as points."""
    return [Point(safe_key(key), float(value), milliseconds(at), step) for key, value in metrics.items()]
