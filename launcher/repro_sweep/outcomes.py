"""One trial of a sweep as MLflow has it, and what became of it.

MLflow is imported when something is read.
"""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from repro_sweep.comparison import Difference
from repro_sweep.errors import TrackingError
from repro_sweep.reading import client_of, download, no_progress_bar, reading
from repro_sweep.states import FailureKind, TrialState, Verdict
from repro_sweep.tracking.encoding import CONFIG_ARTIFACT, PREFIX
from repro_sweep.tracking.store import one_line


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
        sweep: the name of its sweep.
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
    sweep: str = ""
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
        """A local path of one of its artifacts (or a folder of them): a copy that lasts as long as this process.

        What the run of a trial whose result was reused does not have, the run has that it was taken from.

        Raises:
            TrackingError: there is no such artifact, or it cannot be had.
        """
        error: Exception | None = None
        with reading(self.uri), no_progress_bar():
            for run_id in self._runs():
                try:
                    return download(run_id, path, self.uri)
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
                tags = client_of(self.uri).get_run(source).data.tags
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
