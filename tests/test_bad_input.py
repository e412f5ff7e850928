"""Every mistake of a user ends with exit status 2 and one clear line, before anything is started or written."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TypeGuard

import pytest
from helpers import CONSOLE_SCRIPT, Project, environment, run

MakeProject = Callable[..., Project]

HEAD = "defaults: [base_sweep, sampler: grid, executor: local, _self_]\n"
FILES = {
    "conf/config.yaml": """
        defaults: [optimizer: sgd, _self_]
        x: 1
        y: 2
        must: 0
        sum: ${x}
    """,
    "conf/optimizer/sgd.yaml": "lr: 0.1",
    "conf/sweep/good.yaml": HEAD + "task: tasks.train\nmetric: score\nparams: {x: '1,2'}\n",
    "tasks.py": """
        from pathlib import Path

        value = 5

        def train(cfg):
            with open("ran", "a") as ran:
                print(cfg.x, file=ran)
            return {"score": cfg.x, "other": 1, "third": 1}

        def no_argument():
            pass

        def two_arguments(cfg, other):
            pass
    """,
    "broken.py": "import tasks\n\ndef train(cfg):\n    pass\n\nraise ValueError('first\\nbroken on line 6')\n",
    "leaves.py": "import sys\nsys.exit('left at import')\n",
}


def sweep_file(**options: str) -> dict[str, str]:
    """A sweep file ``conf/sweep/mine.yaml`` with these options."""
    options = {"task": "tasks.train", "metric": "score", "params": "{x: '1,2'}"} | options
    return {
        "conf/sweep/mine.yaml": HEAD + "".join(f"{key}: {value}\n" for key, value in options.items() if value)
    }


@dataclass(frozen=True)
class Bad:
    """A command, what is wrong in the project, and what the one line must name; ``app``: for ``python app.py``."""

    arguments: tuple[str, ...]
    says: tuple[str, ...]
    files: dict[str, str] = field(default_factory=dict)
    env: dict[str, str] = field(default_factory=dict)
    lines: int = 1


GOOD = "+sweep=good"
MINE = "+sweep=mine"

CASES = {
    # --- names
    "command": Bad(("optimizer_grid",), ("'optimizer_grid' is not a command", "plan", "'='")),
    "empty argument": Bad(("",), ("''",)),
    "sweep": Bad(("+sweep=nosuch",), ("sweep/nosuch", "good")),
    "group": Bad((GOOD, "nogroup=sgd"), ("nogroup",)),
    "choice of a group": Bad((GOOD, "optimizer=nosuch"), ("optimizer/nosuch", "sgd")),
    "choice of a group in params": Bad(
        (MINE,), ("optimizer/nosuch", "sgd"), sweep_file(params="{optimizer: 'sgd,nosuch'}")
    ),
    "key on the command line": Bad((GOOD, "nokey=1"), ("nokey",)),
    "swept key on the command line": Bad((GOOD, "optimizer.nokey=1,2"), ("optimizer.nokey",), lines=2),
    "key in params": Bad((MINE,), ("nokey",), sweep_file(params="{nokey: '1,2'}"), lines=2),
    "key in repeats": Bad((MINE,), ("seed",), sweep_file(repeats="{seed: range(3)}"), lines=3),
    "option": Bad((GOOD, "sweep.nooption=1"), ("nooption", "metric, direction, params")),
    "option that is added": Bad((GOOD, "+sweep.nooption=1"), ("sweep.nooption", "metric, direction, params")),
    "option in the file": Bad((MINE,), ("nooption", "metric, direction, params"), sweep_file(nooption="1")),
    "option of the executor": Bad((GOOD, "sweep.executor.nooption=1"), ("nooption", "(slots)")),
    "option of a sampler": Bad(
        (GOOD, "sweep/sampler=tpe", "+sweep.sampler.no=1"), ("sweep.sampler.no", "n_startup_trials")
    ),
    "option of another pruner": Bad(
        (MINE, "sweep/pruner=median"), ("min_resource", "n_warmup_steps"),
        {"conf/sweep/mine.yaml": HEAD.replace("grid", "tpe, pruner: successive_halving")
        + "task: tasks.train\nmetric: score\nparams: {x: 'interval(1, 2)'}\npruner: {min_resource: 1}\n"},
    ),
    "choice with a dot": Bad(
        (GOOD, "sweep.pruner=median"), ("sweep.pruner: choose it with sweep/pruner=median,", "got 'median'")
    ),
    "choice in the file's body": Bad((MINE,), ("sweep.pruner", "'pruner: median'"), sweep_file(pruner="median")),
    "type of an option": Bad((GOOD, "sweep.log_limit_mb=much"), ("log_limit_mb", "much")),
    "option of hydra": Bad(("--nosuch", GOOD), ("--nosuch",)),
    "executor": Bad((GOOD, "sweep/executor=mars"), ("executor/mars", "local")),
    "sampler": Bad((GOOD, "sweep/sampler=luck"), ("sampler/luck", "grid")),
    "name of a sweep": Bad((GOOD, "sweep.name=a/b"), ("sweep.name", "a/b")),
    "override": Bad((GOOD, "x=[1,"), ("'[1,'",)),
    "two sweeps": Bad(("+sweep=good,mine",), ("sweep=good,mine",), sweep_file()),
    # --- the task
    "no task": Bad((MINE,), ("sweep.task", "missing"), sweep_file(task="")),
    "task without a module": Bad((GOOD, "sweep.task=train"), ("sweep.task", "'train'", "package.module.function")),
    "module of the task": Bad((GOOD, "sweep.task=nosuch.train"), ("nosuch.train", "ModuleNotFoundError", "nosuch")),
    "function of the task": Bad((GOOD, "sweep.task=tasks.nosuch"), ("tasks has no 'nosuch'",)),
    "import of the task": Bad((GOOD, "sweep.task=broken.train"), ("broken", "ValueError: first")),
    "exit at the task's import": Bad((GOOD, "sweep.task=leaves.train"), ("leaves", "SystemExit: left at import")),
    "task that is no function": Bad((GOOD, "sweep.task=tasks.value"), ("tasks.value", "int")),
    "task without an argument": Bad((GOOD, "sweep.task=tasks.no_argument"), ("one argument", "no_argument()")),
    "task with two arguments": Bad((GOOD, "sweep.task=tasks.two_arguments"), ("one argument", "(cfg, other)")),
    # --- the configs of the trials
    "missing value": Bad((GOOD, "must='???'"), ("must",)),
    "missing value of a choice": Bad(
        (MINE,), ("optimizer.lr",),
        sweep_file(params="{optimizer: 'sgd,bare'}") | {"conf/optimizer/bare.yaml": "lr: ???"},
    ),
    "interpolation": Bad((GOOD, "sum=${nowhere}"), ("nowhere", "sum")),
    "interpolation of an option": Bad((GOOD, "sweep.name=${nowhere}"), ("nowhere",)),
    "YAML": Bad((GOOD,), ("config.yaml", "line 2"), {"conf/config.yaml": "x: 1\ny: [1, 2\n"}),
    "several trials": Bad(
        (MINE,), ("optimizer.lr", "optimizer.momentum"),
        sweep_file(params="{optimizer: 'one,two', x: '1,2'}")
        | {"conf/optimizer/one.yaml": "lr: ???", "conf/optimizer/two.yaml": "momentum: ${nowhere}"},
        lines=2,
    ),
    "no config": Bad((GOOD, "--config-name=nosuch"), ("nosuch",)),
    # --- the space
    "excluded space": Bad((MINE,), ("exclude",), sweep_file(exclude="[{x: '1,2'}]")),
    "empty list of values": Bad((GOOD, "x=range(3,3)"), ("range(3,3)",)),
    "continuous interval": Bad((GOOD, "x=interval(0,1)"), ("x", "interval", "grid")),
    "continuous interval in params": Bad(
        (MINE,), ("x", "interval", "grid"), sweep_file(params="{x: 'interval(0, 1)'}")
    ),
    "zip of different lengths": Bad((MINE,), ("zip",), sweep_file(params="{x: '1,2', y: '1,2,3'}", zip="[[x, y]]")),
    # --- places
    "sweep's directory": Bad((GOOD,), ("multirun", "not a writable directory"), {"multirun": "a file"}),
    "sweep's directory below a file": Bad(
        (GOOD, "hydra.sweep.dir=blocked/sweep"), ("blocked",), {"blocked": "a file"}
    ),
    "config directory": Bad((GOOD, "--config-dir=nosuch"), ("--config-dir", "nosuch")),
    "MLflow URI": Bad((GOOD, "sweep.tracking.uri=htp://mlflow:5000"), ("sweep.tracking.uri", "htp://mlflow:5000")),
    "MLflow store that MLflow cannot make": Bad(
        (GOOD, "sweep.tracking.uri='sqlite:///a\\'b\"c.db'"), ("sweep.tracking.uri", "both kinds of quotes")
    ),
    "MLflow store that MLflow cannot open": Bad(
        (GOOD, "sweep.tracking.uri='sqlite:///a%b.db'"), ("sweep.tracking.uri", "contains '%'")
    ),
    "MLflow URI without a host": Bad((GOOD, "sweep.tracking.uri=http://"), ("sweep.tracking.uri", "http://")),
    "port of the MLflow URI": Bad((GOOD, "sweep.tracking.uri=http://host:port"), ("sweep.tracking.uri", "port")),
    "MLflow URI of the environment": Bad(
        (GOOD,), ("MLFLOW_TRACKING_URI", "nonsense"), env={"MLFLOW_TRACKING_URI": "nonsense"}
    ),
    "MLflow store": Bad((GOOD,), ("mlflow.db",), {"mlflow.db": "no database at all, but long enough to be looked at"}),
    # --- values of options
    "direction": Bad((GOOD, "sweep.direction=up"), ("sweep.direction", "'up'", "maximize, minimize")),
    "no slots": Bad((GOOD, "sweep.executor.slots=0"), ("sweep.executor.slots", "at least 1", "0")),
    "GPUs that are not there": Bad(
        (GOOD, "sweep.resources.gpus_per_trial=2"), ("gpus_per_trial", "2", "this machine has 1"),
        env={"CUDA_VISIBLE_DEVICES": "0"},
    ),
    "strict": Bad(
        (GOOD, "sweep.determinism.strict={a: 1}"), ("determinism.strict: must be true, false or warn, got {'a': 1}",)
    ),
    "strict as a number": Bad((GOOD, "sweep.determinism.strict=1"), ("strict: must be true, false or warn, got 1",)),
    "absolute pattern": Bad(
        (GOOD, "sweep.source.include=[/abs]"), ("sweep.source.include: '/abs' must be a pattern of files below",)
    ),
    "no pattern": Bad((GOOD, "sweep.source.include=['']"), ("source.include: '' must be a pattern of files",)),
    "pattern that leaves": Bad(
        (GOOD, "sweep.source.exclude=[a/../../b]"), ("source.exclude: 'a/../../b' must be a pattern",)
    ),
    "stars within": Bad((GOOD, "sweep.source.include=[a**]"), ("sweep.source.include: 'a**'",)),
    "GPU and a half": Bad((GOOD, "sweep.resources.gpus_per_trial=1.5"), ("gpus_per_trial", "1.5")),
    "more slots than GPUs": Bad(
        (GOOD, "sweep.resources.gpus_per_trial=0.5", "sweep.executor.slots=3"), ("sweep.executor.slots", "3", "2"),
        env={"CUDA_VISIBLE_DEVICES": "0"},
    ),
    "CPUs that are not there": Bad((GOOD, "sweep.resources.cpus_per_trial=9999"), ("cpus_per_trial", "9999")),
    "no CPU": Bad((GOOD, "sweep.resources.cpus_per_trial=0"), ("cpus_per_trial", "0")),
    "memory that is not there": Bad((GOOD, "sweep.resources.mem_gb_per_trial=1e6"), ("mem_gb_per_trial",)),
    "no memory": Bad((GOOD, "sweep.resources.mem_gb_per_trial=0"), ("mem_gb_per_trial", "0")),
    "negative max_failures": Bad((GOOD, "sweep.max_failures=-1"), ("sweep.max_failures", "-1")),
    "negative retries": Bad((GOOD, "sweep.retries.CRASH=-1"), ("sweep.retries.CRASH", "-1")),
    "retries that are no number": Bad((GOOD, "sweep.retries.CRASH=often"), ("retries.CRASH", "often")),
    "retries of an unknown kind": Bad((GOOD, "sweep.retries.BAD_LUCK=1"), ("BAD_LUCK",)),
    "retries of a cancelled trial": Bad((GOOD, "sweep.retries.CANCELLED=1"), ("CANCELLED",)),
    "retries of an unknown kind in the file": Bad((MINE,), ("BAD_LUCK",), sweep_file(retries="{BAD_LUCK: 1}")),
    "no time for a trial": Bad((GOOD, "sweep.trial_timeout_min=0"), ("sweep.trial_timeout_min", "0")),
    "negative time for a report": Bad((GOOD, "sweep.stall_timeout_min=-1"), ("sweep.stall_timeout_min", "-1")),
    "no time for orphans": Bad((GOOD, "sweep.orphan_timeout_min=0"), ("sweep.orphan_timeout_min", "0")),
    "checkpoints nowhere": Bad(
        (GOOD, "sweep.checkpoint_uri=nowhere://x"), ("sweep.checkpoint_uri", "nowhere", "Protocol not known")
    ),
    "negative free space": Bad((GOOD, "sweep.min_free_mb=-1"), ("sweep.min_free_mb", "-1")),
    "time that is no number": Bad((GOOD, "sweep.trial_timeout_min=nan"), ("sweep.trial_timeout_min", "nan")),
    "single run": Bad((GOOD, "--run"), ("--run",)),
}  # fmt: skip


@dataclass(frozen=True)
class Outcome:
    """What a command did: its result, and the project's files before and after it."""

    result: subprocess.CompletedProcess[str]
    before: dict[str, int]
    after: dict[str, int]


def outcome(bad: Bad, project: Project, *, python: bool = False) -> Outcome:
    """Run the command."""
    before = project.files()
    result = project.run(*bad.arguments, env=bad.env, python=python)
    return Outcome(result, before, project.files())


def check(bad: Bad, ran: Outcome) -> None:
    """Look at everything that the command must and must not have done."""
    result = ran.result
    said = result.stderr.splitlines()
    assert result.returncode == 2, result
    assert result.stdout == ""
    assert len(said) == bad.lines, result.stderr
    assert said[0].startswith("repro-sweep: ")
    assert all(len(line) < 600 for line in said), result.stderr
    explained = result.stderr.partition(" (with ")[0]  # what follows only repeats the command line
    missing = [part for part in bad.says if part not in explained]
    assert not missing, f"{missing} not in: {result.stderr}"
    assert ran.after == ran.before


@pytest.fixture(scope="module")
def outcomes(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Outcome]:
    """The commands of all the cases that were selected, as many at a time as there are CPUs."""
    folder = tmp_path_factory.mktemp("mistakes")
    selected = {item.callspec.params["case"] for item in request.session.items if _is_case(item)}

    def one(number: int, case: str) -> Outcome:
        project = Project(folder / str(number))
        project.write(FILES | CASES[case].files)
        return outcome(CASES[case], project)

    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        return dict(zip(selected, pool.map(one, range(len(selected)), selected), strict=True))


def _is_case(item: pytest.Item) -> TypeGuard[pytest.Function]:
    return isinstance(item, pytest.Function) and "outcomes" in item.fixturenames


@pytest.mark.parametrize("case", CASES)
def test_a_mistake_gets_exit_status_2_and_one_clear_line_before_anything_is_written(
    case: str, outcomes: dict[str, Outcome]
) -> None:
    """Nothing is started: no folder, no MLflow store."""
    check(CASES[case], outcomes[case])


def test_a_mistake_in_a_plan_gets_exit_status_2_and_one_clear_line(make_bare_project: MakeProject) -> None:
    """The other commands tell them in the same way."""
    bad = Bad(("plan", "+sweep=nosuch"), ("sweep/nosuch", "good"))
    check(bad, outcome(bad, make_bare_project(FILES)))


def test_a_ranking_without_a_store_gets_exit_status_2_and_one_clear_line(
    make_bare_project: MakeProject,
) -> None:
    """It makes no store either."""
    bad = Bad(("rank", "mine"), ("MLFLOW_TRACKING_URI", "mlflow.db"))
    check(bad, outcome(bad, make_bare_project(FILES)))


def test_a_ranking_of_an_unknown_sweep_gets_exit_status_2_and_one_clear_line(
    make_project: MakeProject,
) -> None:
    """With the name that was not found."""
    result = make_project(FILES).run("rank", "nosuch")
    assert result.returncode == 2
    assert result.stdout == ""
    [line] = result.stderr.splitlines()
    assert line.startswith("repro-sweep: ")
    assert "nosuch" in line


def test_without_a_mistake_the_same_project_has_a_plan(make_bare_project: MakeProject) -> None:
    """So that each case above fails for its own reason."""
    project = make_bare_project(FILES | sweep_file())
    assert [project.run("plan", sweep).returncode for sweep in (GOOD, MINE)] == [0, 0]


def test_without_a_config_directory_the_line_says_where_to_start(tmp_path: Path) -> None:
    """A frequent mistake: the wrong working directory."""
    result = run("+sweep=good", cwd=tmp_path)
    assert result.returncode == 2
    assert len(result.stderr.splitlines()) == 1
    assert f"{tmp_path}/conf" in result.stderr
    assert list(tmp_path.iterdir()) == []


APP = """
    import hydra

    {before}
    @hydra.main(version_base="1.3", config_path="conf", config_name="config")
    def train(cfg):
        return 1.0

    if __name__ == "__main__":
        {main}()
"""
DECORATE = "decorate = hydra.main(version_base='1.3', config_path='conf', config_name='config')"
IN_APP = {
    "key": Bad(("nokey=1,2",), ("nokey",), lines=2),
    "interval of the repeats": Bad(
        ("+sweep=app", "y=1,2"), ("sweep.repeats.x", "interval", "values"),
        {"conf/sweep/app.yaml": HEAD + "metric: score\nrepeats: {x: 'interval(0,1)'}\n"},
    ),
    "missing value": Bad(("x=1,2", "must='???'"), ("must",)),
    "nested task": Bad(
        ("x=1,2",), ("top level",),
        {"app.py": APP.format(before=DECORATE, main="decorate(lambda cfg: 1.0)")},
    ),
}  # fmt: skip


@pytest.mark.parametrize("bad", IN_APP.values(), ids=IN_APP.keys())
def test_a_mistake_in_an_application_s_sweep_gets_the_same_one_line(
    bad: Bad, make_bare_project: MakeProject
) -> None:
    """Also without the ``repro-sweep`` command."""
    project = make_bare_project(FILES | {"app.py": APP.format(before="", main="train")} | bad.files)
    bad = replace(bad, arguments=("app.py", "--multirun", "hydra/sweeper=repro_sweep", *bad.arguments))
    check(bad, outcome(bad, project, python=True))


def test_a_metric_that_the_task_does_not_return_ends_the_sweep_after_the_first_trials(
    make_project: MakeProject,
) -> None:
    """The line names what it does return; 50 trials are not wasted."""
    project = make_project(FILES | sweep_file(metric="accuracy", params="{x: range(50)}"))
    result = project.run("+sweep=mine", "sweep.executor.slots=2")
    assert result.returncode == 2
    said = result.stderr.splitlines()
    assert "sweep.metric: the task does not return 'accuracy' (other, score, third)" in said[-1]
    assert sum("accuracy" in line for line in said) == 1
    assert "Traceback" not in result.stderr
    assert len((project.root / "ran").read_text().splitlines()) < 12


def test_a_reader_that_closes_the_pipe_early_causes_no_traceback(make_bare_project: MakeProject) -> None:
    """``repro-sweep plan … | head -1``."""
    project = make_bare_project(FILES)
    with subprocess.Popen(
        [CONSOLE_SCRIPT, "plan", "+sweep=good", "x=range(2000)"],
        cwd=project.root, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    ) as process:  # fmt: skip
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == ""
        assert process.wait(60) == 141
