"""Reading a sweep's results back from MLflow: works on any machine that sees the tracking server, and changes nothing.

MLflow is imported when something is read.
"""

from __future__ import annotations

import atexit
import contextlib
import difflib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from repro_sweep.comparison import Difference
from repro_sweep.errors import TrackingError
from repro_sweep.redaction import redacted
from repro_sweep.states import Direction, FailureKind, TrialState, Verdict
from repro_sweep.sweep import Constraint, Objective
from repro_sweep.tracking.encoding import CONFIG_ARTIFACT, PREFIX, RECORD_ARTIFACT, restored, safe_key
from repro_sweep.tracking.store import denial, one_line
from repro_sweep.tracking.uri import (
    EMBEDDED,
    ENVIRONMENT,
    check_is_mlflow,
    checked_uri,
    sqlite_path,
)

_PAGE = 1000
_RETRIES = "MLFLOW_HTTP_REQUEST_MAX_RETRIES"


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    """Why a trial failed, and its message (shortened)."""

    kind: FailureKind | None
    message: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Reproduction:
    """What became of a trial that was run again.

    Attributes:
        verdict: EXACT, WITHIN TOLERANCE, DIFFERS or UNVERIFIABLE.
        run_id: the id of the new MLflow run, None where it did not come to run.
        values: how many values were compared.
        first_difference: metric, step, and the two values; None where all are the same bits.
        reasons: why it is unverifiable, or has failed now.
        differences: what is different around it: the machine, the environment.
    """

    verdict: Verdict
    run_id: str | None
    values: int
    first_difference: tuple[str, int, float | None, float | None] | None
    reasons: tuple[str, ...]
    differences: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    """One trial of a sweep, as MLflow has it.

    Attributes:
        number: its number in the sweep.
        params: the values that distinguish its point.
        repeat: the values that distinguish it from the other trials of its point.
        overrides: Hydra's overrides that it ran with.
        metrics: the final value of each metric, or the latest one reported.
        state: where it stands.
        failure: why it failed, None where it did not.
        run_id: the id of its MLflow run.
        identity: hash of task, config, source and data; equal identities are the same experiment.
        reused_from: the id of the MLflow run of another sweep that its result was taken from, None where it ran here.
        reproduced: what became of it when it was run again (:meth:`reproduce`), None where it never was.
        point: hash of the same without the keys of ``sweep.repeats``; repeats of one point have it in common.
    """

    number: int
    params: Mapping[str, object]
    repeat: Mapping[str, object]
    overrides: tuple[str, ...]
    metrics: Mapping[str, float]
    state: TrialState
    failure: Failure | None
    run_id: str
    identity: str
    reused_from: str | None = None
    reproduced: Verdict | None = None
    point: str = field(default="", repr=False)
    uri: str = field(repr=False)

    @property
    def config(self) -> DictConfig:
        """The config that it ran with.

        Raises:
            TrackingError: MLflow does not have it (yet).
        """
        config = OmegaConf.load(self.artifact(CONFIG_ARTIFACT))
        assert isinstance(config, DictConfig)
        return config

    def reproduce(self, *, rtol: float = 0.0, env: bool = False, anyway: bool = False) -> Reproduction:
        """Run it again, in a process of its own, as ``repro-sweep reproduce`` does; takes as long as the trial.

        Args:
            rtol: relative tolerance; without one only equal bits are equal.
            env: build the recorded Python environment first.
            anyway: run in this Python environment although it is another one.

        Raises:
            TrackingError: the command has failed; the message is its last line.
        """
        command = [
            sys.executable,
            "-P",
            "-m",
            "repro_sweep.cli.main",
            "reproduce",
            self.run_id,
            "--uri",
            self.uri,
        ]
        command += ["--rtol", str(rtol), "--format", "json", *["--env"] * env, *["--anyway"] * anyway]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        try:
            [said] = json.loads(done.stdout)
        except ValueError:
            lines = done.stderr.strip().splitlines() or [f"ended with status {done.returncode}"]
            raise TrackingError(f"trial {self.number} cannot be run again: {lines[-1]}") from None
        first = Difference.parse(said["first_difference"])
        return Reproduction(
            verdict=Verdict(said["verdict"]), run_id=said["run_id"], values=said["values"],
            first_difference=None if first is None else (first.metric, first.step, first.was, first.now),
            reasons=tuple(said["reasons"]), differences=tuple(said["differences"]),
        )  # fmt: skip

    def artifact(self, path: str) -> Path:
        """A local path of one of its artifacts (or a folder of them), which must not be written to.

        It is the artifact itself where that is a local file, else a copy that lasts as long as this process. What the
        run of a trial whose result was reused does not have, the run has that it was taken from.

        Raises:
            TrackingError: there is no such artifact, or it cannot be had.
        """
        error: Exception | None = None
        with _reading(self.uri), _no_progress_bar():
            for run_id in self._runs():
                try:
                    return _download(run_id, path, self.uri)
                except FileNotFoundError as missing:
                    error = missing.__cause__ if isinstance(missing.__cause__, Exception) else None
            raise self._no_artifact(path, error) from error

    def _runs(self) -> Iterator[str]:
        """Its own run, and those that its result was taken from, one from the other."""
        import mlflow.exceptions

        yield self.run_id
        seen, source = {self.run_id}, self.reused_from
        while source is not None and source not in seen:
            yield source
            seen.add(source)
            try:
                tags = _client(self.uri).get_run(source).data.tags
            except mlflow.exceptions.MlflowException as error:
                if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                    raise
                return
            source = tags.get(f"{PREFIX}reused_from") or None

    def _no_artifact(self, path: str, error: Exception | None) -> TrackingError:
        import mlflow.artifacts

        there: list[str] = []
        for run_id in self._runs():
            with contextlib.suppress(mlflow.exceptions.MlflowException, OSError):
                listed = mlflow.artifacts.list_artifacts(run_id=run_id, tracking_uri=self.uri)
                there += [each.path for each in listed or [] if each.path not in there]
        why = f"it has {', '.join(there)}" if there else one_line(error) if error else "it has none"
        return TrackingError(f"trial {self.number} has no artifact {path!r}: {why}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Sweep:
    """A sweep's own run. ``objectives`` are set where there are several, the first one being ``metric``."""

    name: str
    run_id: str
    experiment_id: str
    metric: str | None
    direction: Direction
    uri: str
    objectives: tuple[Objective, ...] = ()
    constraints: tuple[Constraint, ...] = ()
    sweep_id: str = ""


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
    """The newest sweep of a name.

    Raises:
        TrackingError: there is none (the message names similar ones), or the store cannot be read.
    """
    with _reading(uri):
        client = _client(uri)
        experiments = _experiments(client)
        condition = f"tags.`{PREFIX}kind` = 'sweep'"
        exact = condition if "'" in name else f"{condition} and tags.`{PREFIX}sweep` = '{name}'"
        runs = _runs(client, experiments, exact, order_by=["attributes.start_time DESC"])
        named = [run for run in runs if _tag(run, "sweep") == name]
        if named:  # of the newest, not one that a lost and late request has made besides the right one
            newest = [each for each in named if _tag(each, "sweep_id") == _tag(named[0], "sweep_id")]
            return _sweep(next((each for each in newest if _tag(each, "counts")), newest[0]), uri)
        names = {_tag(run, "sweep") for run in _runs(client, experiments, condition)}
    near = difflib.get_close_matches(name, sorted(names), n=3, cutoff=0.5) or sorted(names)[:10]
    hint = f"did you mean {', '.join(near)}?" if near else "there are no sweeps at all"
    raise TrackingError(f"no sweep named {name!r} at {redacted(uri)}: {hint}")


def read_trials(sweep: Sweep) -> list[Trial]:
    """All trials of a sweep that have a run, by number.

    Raises:
        TrackingError: the store cannot be read.
    """
    with _reading(sweep.uri):
        client = _client(sweep.uri)
        condition = f"tags.`mlflow.parentRunId` = '{sweep.run_id}' and tags.`{PREFIX}kind` = 'trial'"
        found: dict[int, Any] = {}
        for run in _runs(client, [sweep.experiment_id], condition, order_by=["attributes.start_time ASC"]):
            number = int(run.data.tags[f"{PREFIX}trial"])
            if number not in found or _completeness(run) > _completeness(found[number]):
                found[number] = run
        return [_trial(found[number], sweep.uri) for number in sorted(found)]


def find_run(run_id: str, uri: str) -> tuple[Sweep, Trial]:
    """A trial and its sweep by the id of its MLflow run.

    Raises:
        TrackingError: there is no such run, it is no trial's, or the store cannot be read.
    """
    with _reading(uri):
        client = _client(uri)
        run = client.get_run(run_id)
        if _tag(run, "kind") != "trial":
            raise TrackingError(f"run {run_id} at {redacted(uri)} is no trial of a sweep")
        return _sweep(client.get_run(run.data.tags["mlflow.parentRunId"]), uri), _trial(run, uri)


def sweep_of(sweep_id: str, uri: str) -> Sweep | None:
    """A sweep by its id; None where it has no run.

    Raises:
        TrackingError: the store cannot be read.
    """
    with _reading(uri):
        client = _client(uri)
        condition = f"tags.`{PREFIX}kind` = 'sweep' and tags.`{PREFIX}sweep_id` = '{sweep_id}'"
        return next((_sweep(run, uri) for run in _runs(client, _experiments(client), condition)), None)


def artifact_of(run_id: str, path: str, uri: str) -> Path:
    """A local path of an artifact of a run, as :meth:`Trial.artifact` gives it.

    Raises:
        FileNotFoundError: the run has none of that name.
        TrackingError: it cannot be had.
    """
    with _reading(uri), _no_progress_bar():
        return _download(run_id, path, uri)


def histories(trial: Trial) -> dict[str, dict[int, list[float]]]:
    """All values of a trial's metrics by name and step, from where it has run; equal ones at one step once.

    Raises:
        TrackingError: the store cannot be read.
    """
    with _reading(trial.uri):
        client = _client(trial.uri)
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
    with _reading(trial.uri):
        status: str = _client(trial.uri).get_run(trial.run_id).info.status
        return status not in ("RUNNING", "SCHEDULED")


def tags_of_trials(sweep: Sweep) -> dict[int, dict[str, str]]:
    """The tags that repro-sweep has set at the runs of a sweep's trials, without their prefix, by trial.

    Raises:
        TrackingError: the store cannot be read.
    """
    with _reading(sweep.uri):
        client = _client(sweep.uri)
        condition = f"tags.`mlflow.parentRunId` = '{sweep.run_id}' and tags.`{PREFIX}kind` = 'trial'"
        found = {}
        for run in _runs(client, [sweep.experiment_id], condition):
            tags = run.data.tags
            own = {key.removeprefix(PREFIX): value for key, value in tags.items() if key.startswith(PREFIX)}
            found[int(own["trial"])] = own
        return found


def tags_of(run_id: str, uri: str) -> dict[str, str]:
    """The tags of a run that repro-sweep has set, without their prefix.

    Raises:
        TrackingError: the store cannot be read.
    """
    with _reading(uri):
        tags = _client(uri).get_run(run_id).data.tags
        return {key.removeprefix(PREFIX): value for key, value in tags.items() if key.startswith(PREFIX)}


def set_tags(run_id: str, tags: Mapping[str, str], uri: str) -> None:
    """Set tags of a run.

    Raises:
        TrackingError: they cannot be set.
    """
    with _reading(uri):
        client = _client(uri)
        for key, value in tags.items():
            client.set_tag(run_id, f"{PREFIX}{key}", value)


def value_of(trial: Trial, metric: str) -> float | None:
    """A trial's value of a metric, under its own name or the one that MLflow took for it."""
    value = trial.metrics.get(metric)
    return trial.metrics.get(safe_key(metric)) if value is None else value


def _tag(run: Any, key: str) -> str:
    value: str = run.data.tags.get(f"{PREFIX}{key}", "")
    return value


def _completeness(run: Any) -> tuple[bool, int]:
    """A run that a lost and late request has made besides the right one has nothing but its tags."""
    return run.info.end_time is not None, len(run.data.params)


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
    )


def _listed(run: Any, key: str) -> list[Any]:
    """The items of a tag; none where it was too long for a tag, or was written before there were any."""
    text = _tag(run, key)
    items: list[Any] = json.loads(text) if text.startswith("[") else []
    return items


def _trial(run: Any, uri: str) -> Trial:
    tags = {key.removeprefix(PREFIX): value for key, value in run.data.tags.items() if key.startswith(PREFIX)}
    kind = tags.get("failure_kind")
    state = TrialState(tags["state"])
    record = _record(tags, run.info.run_id, uri)
    metrics = {key: restored(value) for key, value in run.data.metrics.items()}
    for key, value in json.loads(tags.get("metrics") or "{}").items():
        metrics.pop(safe_key(key), None)
        metrics[key] = float(value)
    return Trial(
        number=int(tags["trial"]),
        params=record["params"],
        repeat=record["repeat"],
        overrides=tuple(record["overrides"]),
        metrics=metrics,
        state=state,
        failure=Failure(kind=FailureKind(kind) if kind else None, message=tags.get("failure_message", ""))
        if state is TrialState.FAIL
        else None,
        run_id=run.info.run_id,
        identity=tags["identity"],
        point=tags.get("point", ""),
        reused_from=tags.get("reused_from") or None,
        reproduced=Verdict(tags["reproduced"]) if tags.get("reproduced") else None,
        uri=uri,
    )


def _record(tags: Mapping[str, str], run_id: str, uri: str) -> dict[str, Any]:
    """Params, repeat and overrides: from the tags, or from an artifact where they were too long for tags."""
    keys = ("params", "repeat", "overrides")
    if not any(tags[key].startswith("sha256:") for key in keys):
        return {key: json.loads(tags[key]) for key in keys}
    import mlflow.artifacts

    file = mlflow.artifacts.download_artifacts(
        run_id=run_id, artifact_path=RECORD_ARTIFACT, tracking_uri=uri, dst_path=_copies(run_id, uri)
    )
    record: dict[str, Any] = json.loads(Path(file).read_text(encoding="utf-8"))
    return record


def _download(run_id: str, path: str, uri: str) -> Path:
    """A local path of an artifact of a run.

    Raises:
        FileNotFoundError: the run has none of that name; its cause says more.
    """
    import mlflow.artifacts

    try:
        found = mlflow.artifacts.download_artifacts(
            run_id=run_id, artifact_path=path, tracking_uri=uri, dst_path=_copies(run_id, uri)
        )
    except OSError as error:
        raise FileNotFoundError(path) from error
    except mlflow.exceptions.MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        raise FileNotFoundError(path) from error
    if not Path(found).exists():
        raise FileNotFoundError(path)
    return Path(found)


def _client(uri: str) -> Any:
    import mlflow

    return mlflow.MlflowClient(uri)


def _experiments(client: Any) -> list[str]:
    found: list[str] = []
    token = None
    while True:
        page = client.search_experiments(max_results=_PAGE, page_token=token)
        found += [each.experiment_id for each in page]
        token = page.token
        if not token:
            return found


def _runs(
    client: Any, experiments: list[str], condition: str, order_by: list[str] | None = None
) -> Iterator[Any]:
    token = None
    while experiments:
        page = client.search_runs(
            experiments, condition, max_results=_PAGE, order_by=order_by, page_token=token
        )
        yield from page
        token = page.token
        if not token:
            return


@contextlib.contextmanager
def _no_progress_bar() -> Iterator[None]:
    """MLflow draws one for each artifact, unless the environment says otherwise."""
    name = "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR"
    if name in os.environ:
        yield
        return
    os.environ[name] = "false"
    try:
        yield
    finally:
        del os.environ[name]


@contextlib.contextmanager
def _reading(uri: str) -> Iterator[None]:
    """Map MLflow's errors, and do not let it try for minutes to reach a server that is down."""
    import mlflow.exceptions

    patient = _RETRIES in os.environ
    os.environ.setdefault(_RETRIES, "2")
    try:
        yield
    except mlflow.exceptions.MlflowException as error:
        raise TrackingError(f"{redacted(uri)}: {denial(error, uri, 'do this') or one_line(error)}") from error
    finally:
        if not patient:
            os.environ.pop(_RETRIES, None)


_temporary: dict[str, str] = {}


def _copies(run_id: str, uri: str) -> str | None:
    """A folder for copies of a run's artifacts, one for each run; none is needed for local files."""
    if sqlite_path(uri) is not None:
        return None
    if run_id not in _temporary:
        _temporary[run_id] = tempfile.mkdtemp(prefix="repro-sweep-")
        atexit.register(shutil.rmtree, _temporary[run_id], ignore_errors=True)
    return _temporary[run_id]
