"""Reading a sweep's results back from MLflow: works on any machine that sees the tracking server, and changes nothing.

MLflow is imported when something is read.
"""

from __future__ import annotations

import difflib
import json
import os
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from repro_sweep.errors import TrackingError
from repro_sweep.outcomes import Failure, Reproduction, Trial
from repro_sweep.reading import (
    client_of,
    download,
    experiments_of,
    no_progress_bar,
    one_request,
    reading,
    runs_of,
)
from repro_sweep.redaction import redacted
from repro_sweep.states import Direction, FailureKind, TrialState, Verdict
from repro_sweep.sweep import Constraint, Objective
from repro_sweep.tracking import table
from repro_sweep.tracking.encoding import (
    BY_START,
    PREFIX,
    RECORD_ARTIFACT,
    own_tags,
    restored,
    safe_key,
    trials_of,
)
from repro_sweep.tracking.store import read_artifact
from repro_sweep.tracking.uri import (
    EMBEDDED,
    ENVIRONMENT,
    check_is_mlflow,
    checked_uri,
    sqlite_path,
)

__all__ = [
    "Failure", "Reproduction", "Sweep", "Trial", "artifact_of", "find_run", "find_sweep", "histories", "is_whole",
    "note_verdict", "read_trials", "reading_uri", "set_tags", "sweep_of", "tags_of", "tags_of_trials", "value_of",
]  # fmt: skip

_IS_SWEEP = f"tags.`{PREFIX}direction` != ''"
"""What only a sweep's own run has.

A database of 100,000 runs finds a tag by its key: by one that every run has, such as ``kind``, it takes a thousand
times as long (350 ms instead of 0.2 ms on PostgreSQL).
"""
_NEWEST = "attributes.start_time DESC"
_FEW = 20
_USER = "mlflow.user"


@dataclass(frozen=True, slots=True, kw_only=True)
class Sweep:
    """A sweep's own run. ``objectives`` are set where there are several, the first one being ``metric``.

    ``stamp`` says which table of its trials is current, None where none is. ``verdicts`` say what became of trials
    that were run again, by their numbers.
    """

    name: str
    run_id: str
    experiment_id: str
    metric: str | None
    direction: Direction
    uri: str
    objectives: tuple[Objective, ...] = ()
    constraints: tuple[Constraint, ...] = ()
    sweep_id: str = ""
    user: str = ""
    artifact_uri: str = ""
    stamp: table.Stamp | None = None
    verdicts: Mapping[int, Verdict] = field(default_factory=dict)


def reading_uri(uri: str | None) -> str:
    """The tracking URI to read from: the given one, else the environment's, else ``mlflow.db`` in this folder.

    Raises:
        TrackingError: there is none, or it cannot be used. Nothing is created.
    """
    cwd = Path.cwd()
    if uri:
        found = checked_uri(uri, where="uri", cwd=cwd)
    elif os.environ.get(ENVIRONMENT):
        found = checked_uri(os.environ[ENVIRONMENT], where=ENVIRONMENT, cwd=cwd)
    elif (cwd / EMBEDDED).exists():
        found = checked_uri(f"sqlite:///{cwd / EMBEDDED}", where="working directory", cwd=cwd)
    else:
        raise TrackingError(
            f"no MLflow store: {ENVIRONMENT} is not set and there is no {EMBEDDED} in {cwd};"
            " name the store with uri=… (--uri on the command line)"
        )
    path = sqlite_path(found)
    if path is not None:
        if not path.is_file():
            raise TrackingError(f"{path}: there is no MLflow store")
        check_is_mlflow(path)
    return found


def find_sweep(name: str, uri: str) -> Sweep:
    """The newest sweep of a name, or for ``USER/NAME`` the newest one of that user.

    Raises:
        TrackingError: there is none (the message names similar ones), or the store cannot be read.
    """
    with reading(uri):
        client = client_of(uri)
        experiments = experiments_of(client)
        user, slash, rest = name.partition("/")
        meanings = [(name, ""), (rest, user)] if user and slash and rest else [(name, "")]
        for wanted, of in meanings:  # a sweep whose own name has a slash comes first
            found = _newest(client, experiments, wanted, of)
            if found is not None:
                return _sweep(found, uri)
        runs = list(runs_of(client, experiments, _IS_SWEEP))
    names = {_tag(run, "sweep") for run in runs}
    names |= {f"{run.data.tags.get(_USER, '')}/{_tag(run, 'sweep')}" for run in runs if len(meanings) > 1}
    near = difflib.get_close_matches(name, sorted(names), n=3, cutoff=0.5) or sorted(names)[:10]
    hint = f"did you mean {', '.join(near)}?" if near else "there are no sweeps at all"
    raise TrackingError(f"no sweep named {name!r} at {redacted(uri)}: {hint}")


def _newest(client: Any, experiments: list[str], name: str, user: str) -> Any | None:
    """The run of the newest sweep of a name, and of a user unless that is empty."""
    wanted = {f"{PREFIX}sweep": name} | ({_USER: user} if user else {})
    searched = [f"tags.`{key}` = '{value}'" for key, value in wanted.items() if "'" not in value]
    runs = runs_of(client, experiments, " and ".join([_IS_SWEEP, *searched]), [_NEWEST], page=_FEW)
    found: list[Any] = []
    for run in runs:
        if any(run.data.tags.get(key) != value for key, value in wanted.items()):
            continue
        if found and _tag(run, "sweep_id") != _tag(found[0], "sweep_id"):
            break
        found.append(run)
    # not one that a lost and late request has made besides the right one
    return next((each for each in found if _tag(each, "counts")), found[0] if found else None)


def read_trials(sweep: Sweep, *, fresh: bool = False) -> list[Trial]:
    """All trials of a sweep that have a run, by number.

    They come from the sweep's table (see :mod:`.tracking.table`) if it is current, else from their runs, with the same
    outcome. What was logged to a trial's run after its sweep was over is in its run alone.

    Args:
        sweep: as it was found.
        fresh: read the runs in any case.

    Raises:
        TrackingError: the store cannot be read.
    """
    with reading(sweep.uri):
        rows = None if fresh else _rows_of_table(sweep)
        if rows is None:
            client = client_of(sweep.uri)
            runs = runs_of(client, [sweep.experiment_id], trials_of(sweep.run_id), [BY_START])
            rows = table.rows_of(runs, _record_at(sweep.uri))
        return [_trial(row, sweep) for row in rows]


def _rows_of_table(sweep: Sweep) -> list[table.Row] | None:
    """The rows of a sweep's table; None where it has none that is whole and current."""
    stamp = sweep.stamp
    if stamp is None:
        return None
    with ThreadPoolExecutor(1) as beside, one_request():
        whole = beside.submit(_none_was_deleted, sweep)
        try:
            content = read_artifact(sweep.artifact_uri, table.ARTIFACT, sweep.uri)
        except Exception:  # noqa: BLE001  (of any artifact store; the runs say the same, and their errors are shown)
            return None
        rows = table.unpack(content, stamp)
        return rows if whole.result() else None


def _none_was_deleted(sweep: Sweep) -> bool:
    """Whether no run of a trial was deleted in MLflow, which nothing else tells."""
    from mlflow.entities import ViewType

    condition = trials_of(sweep.run_id)
    found = client_of(sweep.uri).search_runs(
        [sweep.experiment_id], condition, run_view_type=ViewType.DELETED_ONLY, max_results=1
    )
    return not found


def find_run(run_id: str, uri: str) -> tuple[Sweep, Trial]:
    """A trial and its sweep by the id of its MLflow run.

    Raises:
        TrackingError: there is no such run, it is no trial's, or the store cannot be read.
    """
    with reading(uri):
        client = client_of(uri)
        run = client.get_run(run_id)
        if _tag(run, "kind") != "trial":
            raise TrackingError(f"run {run_id} at {redacted(uri)} is no trial of a sweep")
        sweep = _sweep(client.get_run(run.data.tags["mlflow.parentRunId"]), uri)
        return sweep, _trial(table.row_of(run, _record_at(uri)), sweep)


def sweep_of(sweep_id: str, uri: str) -> Sweep | None:
    """A sweep by its id; None where it has no run.

    Raises:
        TrackingError: the store cannot be read.
    """
    with reading(uri):
        client = client_of(uri)
        condition = f"{_IS_SWEEP} and tags.`{PREFIX}sweep_id` = '{sweep_id}'"
        return next((_sweep(run, uri) for run in runs_of(client, experiments_of(client), condition)), None)


def artifact_of(run_id: str, path: str, uri: str) -> Path:
    """A local path of an artifact of a run, as :meth:`Trial.artifact` gives it.

    Raises:
        FileNotFoundError: the run has none of that name.
        TrackingError: it cannot be had.
    """
    with reading(uri), no_progress_bar():
        return download(run_id, path, uri)


def histories(trial: Trial) -> dict[str, dict[int, list[float]]]:
    """All values of a trial's metrics by name and step, from where it has run; equal ones at one step once.

    Raises:
        TrackingError: the store cannot be read.
    """
    with reading(trial.uri):
        client = client_of(trial.uri)
        *_, run_id = trial._runs()
        found: dict[str, dict[int, list[float]]] = {}
        for metric in client.get_run(run_id).data.metrics:
            by_step = found.setdefault(metric, {})
            for point in client.get_metric_history(run_id, metric):
                values, value = by_step.setdefault(point.step, []), restored(point.value)
                if value not in values:
                    values.append(value)
        return found


def is_whole(trial: Trial) -> bool:
    """Whether a trial's run has ended for MLflow, so that nothing of it is on its way.

    Raises:
        TrackingError: the store cannot be read.
    """
    with reading(trial.uri):
        status: str = client_of(trial.uri).get_run(trial.run_id).info.status
        return status not in ("RUNNING", "SCHEDULED")


def tags_of_trials(sweep: Sweep) -> dict[int, dict[str, str]]:
    """The tags that repro-sweep has set at the runs of a sweep's trials, without their prefix, by trial.

    Raises:
        TrackingError: the store cannot be read.
    """
    with reading(sweep.uri):
        client = client_of(sweep.uri)
        found = {}
        for run in runs_of(client, [sweep.experiment_id], trials_of(sweep.run_id)):
            own = own_tags(run.data.tags)
            found[int(own["trial"])] = own
        return found


def tags_of(run_id: str, uri: str) -> dict[str, str]:
    """The tags of a run that repro-sweep has set, without their prefix.

    Raises:
        TrackingError: the store cannot be read.
    """
    with reading(uri):
        return own_tags(client_of(uri).get_run(run_id).data.tags)


def note_verdict(trial: Trial, verdict: Verdict, again: str | None) -> None:
    """Note what became of a trial when it was run again, at its run and at its sweep's, which knows all of them.

    Args:
        trial: the original.
        verdict: what became of it.
        again: the new run's id, None where it did not come to run.

    Raises:
        TrackingError: it cannot be noted.
    """
    with reading(trial.uri):
        client = client_of(trial.uri)
        parent = client.get_run(trial.run_id).data.tags["mlflow.parentRunId"]
        client.set_tag(parent, f"{table.REPRODUCED}{trial.number}", str(verdict))
    set_tags(trial.run_id, {"reproduced": verdict, "reproduced_by": again or ""}, trial.uri)


def set_tags(run_id: str, tags: Mapping[str, str], uri: str) -> None:
    """Set tags of a run.

    Raises:
        TrackingError: they cannot be set.
    """
    with reading(uri):
        client = client_of(uri)
        for key, value in tags.items():
            client.set_tag(run_id, f"{PREFIX}{key}", value)


def value_of(trial: Trial, metric: str) -> float | None:
    """A trial's value of a metric, under its own name or the one that MLflow took for it."""
    value = trial.metrics.get(metric)
    return trial.metrics.get(safe_key(metric)) if value is None else value


def _tag(run: Any, key: str) -> str:
    value: str = run.data.tags.get(f"{PREFIX}{key}", "")
    return value


def _sweep(run: Any, uri: str) -> Sweep:
    tags = run.data.tags
    return Sweep(
        name=tags[f"{PREFIX}sweep"],
        run_id=run.info.run_id,
        experiment_id=run.info.experiment_id,
        metric=tags.get(f"{PREFIX}metric") or None,
        direction=Direction(tags.get(f"{PREFIX}direction", Direction.MAXIMIZE)),
        uri=uri,
        objectives=tuple(map(Objective.model_validate, _listed(run, "objectives"))),
        constraints=tuple(map(Constraint.model_validate, _listed(run, "constraints"))),
        sweep_id=_tag(run, "sweep_id"),
        user=tags.get(_USER, ""),
        artifact_uri=run.info.artifact_uri,
        stamp=table.stamp_of(run),
        verdicts={
            int(key.removeprefix(table.REPRODUCED)): Verdict(value)
            for key, value in tags.items()
            if key.startswith(table.REPRODUCED)
        },
    )


def _listed(run: Any, key: str) -> list[Any]:
    """The items of a tag; none where it was too long for a tag, or was written before there were any."""
    text = _tag(run, key)
    items: list[Any] = json.loads(text) if text.startswith("[") else []
    return items


def _trial(row: table.Row, sweep: Sweep) -> Trial:
    number, run_id, identity, point, state, params, repeat, overrides, metrics, failure, reused, verdict = row
    return Trial(
        number=number,
        params=params,
        repeat=repeat,
        overrides=tuple(overrides),
        metrics=metrics,
        state=TrialState(state),
        failure=failure and Failure(kind=failure[0] and FailureKind(failure[0]), message=failure[1]),
        run_id=run_id,
        identity=identity,
        point=point,
        reused_from=reused,
        reproduced=sweep.verdicts.get(number) or (verdict and Verdict(verdict)),
        sweep=sweep.name,
        uri=sweep.uri,
    )


def _record_at(uri: str) -> Callable[[Any], Mapping[str, Any]]:
    """Reads what is too long for a trial's tags."""

    def record(run: Any) -> Mapping[str, Any]:
        with one_request():
            found: Mapping[str, Any] = json.loads(read_artifact(run.info.artifact_uri, RECORD_ARTIFACT, uri))
        return found

    return record
