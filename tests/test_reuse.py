"""What another sweep has found with the same code is taken over, not run again."""

from __future__ import annotations

import asyncio
import shutil
import socket
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import pytest
from helpers import Project, free_port
from tracking_helpers import (
    START,
    add_trial,
    drain,
    end,
    make_ledger,
    runs_of,
    shared_server,
    start,
)

from repro_sweep.errors import TrackingError
from repro_sweep.ranking import Trial, best_trial, rank, trials
from repro_sweep.records import Reused
from repro_sweep.states import FailureKind, TrialState
from repro_sweep.tracking import elsewhere
from repro_sweep.tracking.process import TrackerProcess
from repro_sweep.tracking.store import Store, Unavailable, prepare_environment

pytestmark = pytest.mark.filterwarnings(
    "ignore:The ``noload`` loader strategy:sqlalchemy.exc.SADeprecationWarning"  # MLflow's own use of SQLAlchemy
)

MakeProject = Callable[..., Project]

SWEEP = ("+sweep=default", "sweep.task=tasks.train", "sweep.metric=score", "sweep.executor.slots=2")
FILES = {
    "conf/config.yaml": "x: 0",
    "tasks.py": """
        import repro_sweep

        def train(cfg):
            with open("ran", "a") as ran:
                print(cfg.x, file=ran)
            (repro_sweep.artifact_dir() / "model.txt").write_text(f"model {cfg.x}")
            repro_sweep.report(3, score=cfg.x / 2, loss=1 / (1 + cfg.x))
            return {"score": cfg.x / 2}
    """,
}


@dataclass
class Done:
    """What a command has done: what it said, and how often it has run each trial."""

    code: int
    stdout: str
    stderr: str
    ran: Counter[str]


def run(project: Project, name: str, *arguments: str) -> Done:
    """Run a sweep in a project to its end."""
    file = project.root / "ran"
    file.write_text("")
    result = project.run(*SWEEP, f"sweep.name={name}", *arguments)
    return Done(result.returncode, result.stdout, result.stderr, Counter(file.read_text().split()))


def line_of_reuse(done: Done) -> str:
    """The line that says how many results are reused; empty where there is none."""
    return next((line for line in done.stderr.splitlines() if "are reused" in line), "")


# --- on the command line ---------------------------------------------------------------------------------------


@dataclass
class Story:
    """Sweeps that were run in one project, one after another."""

    project: Project
    uri: str
    done: dict[str, Done]

    def trials(self, name: str) -> dict[object, Trial]:
        """The trials of a sweep by their ``x``."""
        return {trial.params["x"]: trial for trial in trials(name, uri=self.uri)}


@pytest.fixture(scope="module")
def story(make_shared_project: MakeProject) -> Story:
    """A sweep; another with some of its points; one with the same points; those that must not reuse anything."""
    project = make_shared_project(FILES)
    story = Story(project, f"sqlite:///{project.root}/mlflow.db", {})
    story.done["first"] = run(project, "first", "x=range(4)")
    plan = project.run("plan", *SWEEP, "sweep.name=equal", "x=range(4)")
    story.done["plan"] = Done(plan.returncode, plan.stdout, plan.stderr, Counter())
    story.done["overlapping"] = run(project, "overlapping", "x=range(2,6)")
    story.done["equal"] = run(project, "equal", "x=range(4)")
    story.done["off"] = run(project, "off", "x=0", "sweep.reuse=false")
    project.write({"helper.py": "A = 1"})
    story.done["changed"] = run(project, "changed", "x=0")
    return story


def test_a_sweep_with_another_name_takes_over_what_is_done_and_runs_the_rest(story: Story) -> None:
    done = story.done["overlapping"]
    assert done.code == 0, done.stderr
    assert done.ran == {"4": 1, "5": 1}, done.stderr
    assert "2 of 4 trials are done in another sweep with the same code (first)" in line_of_reuse(done)
    assert "sweep.reuse=false runs them" in line_of_reuse(done)
    sweep = story.project.sweep("overlapping")
    assert sweep.states() == {TrialState.COMPLETE: 4}
    first, theirs = story.trials("first"), story.trials("overlapping")
    assert {x: trial.reused_from for x, trial in theirs.items()} == {
        2: first[2].run_id, 3: first[3].run_id, 4: None, 5: None,
    }  # fmt: skip
    assert [trial.metrics["score"] for _, trial in sorted(theirs.items())] == [1.0, 1.5, 2.0, 2.5]


def test_where_everything_is_done_nothing_runs_and_the_ranking_is_the_same(story: Story) -> None:
    done = story.done["equal"]
    assert done.code == 0, done.stderr
    assert done.ran == Counter(), done.stderr
    assert "4 of 4 trials" in line_of_reuse(done)
    assert "4 complete" in done.stdout
    assert rank("equal", uri=story.uri).rows == rank("first", uri=story.uri).rows
    assert (
        rank("equal", metric="loss", uri=story.uri).rows == rank("first", metric="loss", uri=story.uri).rows
    )
    (ranked,) = (text.partition("by score")[2].partition("equal:")[0] for text in [done.stdout])
    assert ranked == story.done["first"].stdout.partition("by score")[2].partition("first:")[0]


def test_a_reused_trial_has_its_own_config_and_the_artifacts_of_the_run_that_it_was_taken_from(
    story: Story,
) -> None:
    best = best_trial("equal", uri=story.uri)
    assert best.config == {"x": 3}
    assert best.overrides == ("x=3",)
    assert best.artifact("model.txt").read_text() == "model 3"
    assert best.artifact("trial.log").is_file()
    with pytest.raises(
        TrackingError, match=r"no artifact 'nothing': it has repro_sweep, model\.txt, trial\.log"
    ):
        best.artifact("nothing")


def test_a_trial_that_is_reused_twice_refers_to_the_run_that_executed_it(story: Story) -> None:
    first, equal = story.trials("first"), story.trials("equal")
    assert {x: trial.reused_from for x, trial in equal.items()} == {x: first[x].run_id for x in range(4)}


def test_nothing_is_reused_where_a_python_file_has_changed_or_the_user_does_not_want_it(story: Story) -> None:
    for name in ("off", "changed"):
        assert story.done[name].code == 0, story.done[name].stderr
        assert story.done[name].ran == {"0": 1}
        assert line_of_reuse(story.done[name]) == ""
        assert story.trials(name)[0].reused_from is None


def test_a_plan_says_what_the_sweep_itself_has_not_run(story: Story) -> None:
    assert story.done["plan"].code == 0, story.done["plan"].stderr
    assert all(f"x={x}" in story.done["plan"].stdout for x in range(4))
    assert not (story.project.root / "multirun/equal/plan").exists()


@pytest.mark.slow
def test_results_are_reused_through_a_server(
    make_bare_project: MakeProject, pytestconfig: pytest.Config, tmp_path_factory: pytest.TempPathFactory
) -> None:
    server = shared_server(pytestconfig, tmp_path_factory)
    project = make_bare_project(FILES)
    first = run(project, "server_first", "x=0,1", f"sweep.tracking.uri={server}")
    assert (first.code, first.ran) == (0, {"0": 1, "1": 1}), first.stderr
    second = run(project, "server_second", "x=range(3)", f"sweep.tracking.uri={server}")
    assert (second.code, second.ran) == (0, {"2": 1}), second.stderr
    assert "2 of 3 trials are done in another sweep with the same code (server_first)" in line_of_reuse(
        second
    )
    reused = trials("server_second", uri=server)[1]
    assert reused.metrics["score"] == 0.5
    assert reused.artifact("model.txt").read_text() == "model 1"


@pytest.mark.slow
def test_a_server_that_is_down_is_one_line_and_the_sweep_runs(make_bare_project: MakeProject) -> None:
    project = make_bare_project(FILES)
    uri = f"http://127.0.0.1:{free_port()}"
    with project.start(*SWEEP, "x=0,1", f"sweep.tracking.uri={uri}") as command:
        command.until((project.root / "multirun/default/ledger.db").exists, "it has begun")
        command.until(
            lambda: (
                project.sweep("default").states() == {TrialState.COMPLETE: 2}
                and not project.processes_of("repro_sweep.worker.agent")
            ),
            "all trials have run",
        )
        command.process.kill()  # it would wait a minute for the server
        said = [line for line in command.stderr.splitlines() if "could not be asked" in line]
    assert len(said) == 1, said
    assert "results of other sweeps are not reused" in said[0]
    assert "127.0.0.1" in said[0]
    assert project.sweep("default").states() == {TrialState.COMPLETE: 2}


# --- the search ------------------------------------------------------------------------------------------------


@pytest.fixture
def uri(tmp_path: Path, empty_store: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A store of one test's own."""
    for name in ("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "MLFLOW_HTTP_REQUEST_TIMEOUT", "MLFLOW_DISABLE_TELEMETRY",
                 "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR"):  # fmt: skip
        monkeypatch.setenv(name, "")  # restored at the end
        monkeypatch.delenv(name)
    prepare_environment()
    shutil.copy(empty_store, tmp_path / "mlflow.db")
    return f"sqlite:///{tmp_path}/mlflow.db"


@dataclass
class Sweeps:
    """Makes sweeps by hand in one store, and looks for results as a last one with trials 0 to 9 would."""

    folder: Path
    uri: str

    def done(
        self, name: str, *numbers: int, code: str = "c1", at: float = START, **changes: object
    ) -> list[str]:
        """A sweep that has completed some trials; returns their runs."""
        ledger = make_ledger(self.folder / name, self.uri, name=name, code=code, **changes)
        for number in numbers:
            add_trial(ledger, number)
            attempt = start(ledger, number, at=at, host=f"host of {name}")
            end(ledger, number, attempt, {"accuracy": number + at - START}, at=at + 1)
        drain(self.folder / name)
        runs = runs_of(self.uri, sweep_id=ledger.spec.sweep_id)
        ledger.close()
        return [run.info.run_id for run in runs]

    def last(self, name: str = "last", **changes: object) -> Path:
        """A sweep whose trials all wait."""
        ledger = make_ledger(self.folder / name, self.uri, name=name, **{"code": "c1", **changes})
        for number in range(10):
            add_trial(ledger, number)
        ledger.close()
        return self.folder / name

    def found(self, name: str = "last", **changes: object) -> dict[int, Reused]:
        """What there is for it, by the number of the trial."""
        from repro_sweep.ledger import Ledger

        ledger = Ledger.open(self.last(name, **changes), readonly=True)
        try:
            results = elsewhere.search(Store(self.uri), ledger.spec, elsewhere.waiting(ledger))
            worth = elsewhere.may_exist(ledger.spec)
        finally:
            ledger.close()
        assert worth or not results
        return {int(identity, 16): result for identity, result in results.items()}


@pytest.fixture
def sweeps(tmp_path: Path, uri: str) -> Sweeps:
    """Sweeps in a store of one test's own."""
    return Sweeps(tmp_path / "multirun", uri)


def test_of_several_results_the_newest_counts(sweeps: Sweeps) -> None:
    sweeps.done("old", 0, 1)
    newer = sweeps.done("new", 1, at=START + 50)
    sweeps.done("other_code", 1, 2, code="c2", at=START + 90)
    found = sweeps.found()
    assert {number: each.origin for number, each in found.items()} == {0: "old", 1: "new"}
    assert found[1] == Reused(
        run_id=newer[0], origin="new", host="host of new", metrics={"accuracy": 51.0},
        started_at=START + 50, ended_at=START + 51,
    )  # fmt: skip


def test_a_result_without_the_metric_that_the_sweep_needs_is_none(sweeps: Sweeps) -> None:
    sweeps.done("done", 0)
    assert sweeps.found("asks_another", metric="f1") == {}
    assert list(sweeps.found("asks_none", metric=None)) == [0]


def test_trials_that_failed_run_or_have_not_reached_mlflow_whole_are_not_reused(sweeps: Sweeps) -> None:
    import mlflow

    ledger = make_ledger(sweeps.folder / "odd", sweeps.uri, name="odd", code="c1")
    for number in range(3):
        add_trial(ledger, number)
        attempt = start(ledger, number)
        if number:
            state = TrialState.FAIL if number == 1 else TrialState.COMPLETE
            kind = FailureKind.CRASH if number == 1 else None
            end(ledger, number, attempt, {"accuracy": 1.0}, state=state, kind=kind)
    drain(sweeps.folder / "odd")
    runs = runs_of(sweeps.uri, sweep_id=ledger.spec.sweep_id)
    mlflow.MlflowClient(sweeps.uri).update_run(
        runs[2].info.run_id, status="RUNNING"
    )  # its files are on their way
    assert sweeps.found() == {}


def test_what_was_taken_over_counts_where_the_run_that_it_was_taken_from_is_deleted(sweeps: Sweeps) -> None:
    import mlflow

    (original,) = sweeps.done("original", 0)
    ledger = make_ledger(sweeps.folder / "copy", sweeps.uri, name="copy", code="c1")
    add_trial(ledger, 0)
    ledger.reuse(0, sweeps.found("for_copy")[0], "c1")
    ledger.commit()
    drain(sweeps.folder / "copy")
    (copy,) = runs_of(sweeps.uri, sweep_id=ledger.spec.sweep_id)
    assert copy.data.tags["repro_sweep.reused_from"] == original
    assert sweeps.found("before")[0].run_id == original
    mlflow.MlflowClient(sweeps.uri).delete_run(original)
    assert sweeps.found("after")[0].run_id == copy.info.run_id


def test_without_other_sweeps_runs_mlflow_is_not_even_asked(sweeps: Sweeps, tmp_path: Path) -> None:
    """Importing it takes seconds, in which no trial could start."""
    from repro_sweep.ledger import Ledger

    def worth(name: str, **changes: object) -> bool:
        ledger = Ledger.open(sweeps.last(name, **changes), readonly=True)
        spec = ledger.spec
        ledger.close()
        return elsewhere.may_exist(spec)

    sweeps.done("done", 0)
    sweeps.done("other_trials", 77, code="c3")
    (tmp_path / "empty.db").touch()
    assert worth("asks")
    assert not worth("off", reuse=False)
    assert not worth("no_code", code="")
    assert not worth("other_code", code="c2")
    assert not worth("other_points", code="c3")
    for file in ("nothing.db", "empty.db"):
        folder = Sweeps(tmp_path / file.partition(".")[0], f"sqlite:///{tmp_path}/{file}")
        ledger = Ledger.open(folder.last(), readonly=True)
        assert not elsewhere.may_exist(ledger.spec)
        ledger.close()
    assert not (tmp_path / "nothing.db").exists()


def test_a_server_is_asked_only_when_trials_wait(tmp_path: Path) -> None:
    ledger = make_ledger(tmp_path / "sweep", "http://127.0.0.1:9", code="c1")
    assert not elsewhere.may_exist(ledger.spec)
    add_trial(ledger, 0)
    assert elsewhere.may_exist(ledger.spec)
    ledger.set_withdrawn([0])
    ledger.commit()
    assert not elsewhere.may_exist(ledger.spec)


def test_a_server_that_accepts_and_never_answers_is_given_up_soon(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(elsewhere, "_REACH_S", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        server = f"http://127.0.0.1:{silent.getsockname()[1]}"
        ledger = make_ledger(tmp_path / "sweep", server, code="c1")
        with pytest.raises(Unavailable, match="timed out"):
            elsewhere.search(Store(server), ledger.spec, {"identity"})


def test_the_tracker_process_passes_on_many_results_and_gives_up_in_time(sweeps: Sweeps) -> None:
    sweeps.done("done", *range(8))
    directory = sweeps.last()

    async def ask(timeout_s: float) -> dict[str, Reused]:
        tracker = TrackerProcess(directory)
        await tracker.start()
        try:
            return await tracker.done_elsewhere(timeout_s)
        finally:
            await tracker.kill()

    found = asyncio.run(ask(120))
    assert sorted(int(identity, 16) for identity in found) == list(range(8))
    assert {each.origin for each in found.values()} == {"done"}
    with pytest.raises(TrackingError, match=r"no answer within 0\.01 s"):
        asyncio.run(ask(0.01))


@pytest.mark.parametrize(
    ("uri_of", "limit_s"), [("sqlite:///{}/mlflow.db", 120.0), ("http://127.0.0.1:9", 30.0)]
)
def test_a_file_known_to_have_results_is_waited_for_longer_than_a_server(
    tmp_path: Path, uri_of: str, limit_s: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A slow start of MLflow must not run again what is known to be done."""
    limits: list[float] = []

    class Slow:
        async def done_elsewhere(self, timeout_s: float) -> dict[str, Reused]:
            limits.append(timeout_s)
            return {}

    monkeypatch.setattr(elsewhere, "may_exist", lambda spec: True)
    ledger = make_ledger(tmp_path / "sweep", uri_of.format(tmp_path), code="c1")
    asyncio.run(elsewhere.results(ledger.spec, cast("TrackerProcess", Slow())))
    assert limits == [limit_s]
