"""The front door: a grid from a file or from the command line, run again, and an unchanged Hydra application."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from helpers import Project, Sweep

from repro_sweep.states import FailureKind, TrialState

MakeProject = Callable[..., Project]

SWEEP = """
    defaults: [base_sweep, sampler: grid, executor: local, _self_]
    task: tasks.train
    metric: score
    direction: minimize
    params:
      x: {values}
      optimizer:
        sgd: {{optimizer.momentum: "0,0.9"}}
        adam:
"""
STUDY = {
    "conf/config.yaml": """
        defaults: [optimizer: sgd, _self_]
        x: 0
        y: 1
        name: point-${x}
    """,
    "conf/optimizer/sgd.yaml": "{kind: sgd, momentum: 0.5}",
    "conf/optimizer/adam.yaml": "{kind: adam, beta1: 0.9}",
    "conf/sweep/grid.yaml": SWEEP.format(values="1,2"),
    "tasks.py": """
        from pathlib import Path

        def train(cfg):
            with open("ran", "a") as ran:
                print(cfg.x, cfg.optimizer.kind, cfg.optimizer.get("momentum"), file=ran)
            if cfg.x == 2 and cfg.optimizer.kind == "adam" and Path("broken").exists():
                raise RuntimeError("broken on purpose")
            return {"score": cfg.x * cfg.y, "other": 5}
    """,
    "broken": "",
}


@pytest.fixture(scope="module")
def study(make_shared_project: MakeProject) -> SimpleNamespace:
    """A sweep's life: planned, run with a failure, planned, corrected, run again twice, edited, run."""
    project = make_shared_project(STUDY)
    steps = SimpleNamespace(project=project)

    def step(name: str, *arguments: str) -> None:
        before, ran = project.files(), project.root / "ran"
        ran.unlink(missing_ok=True)
        result = project.run(*arguments)
        ledger = project.root / "multirun" / "grid"
        after = project.files()
        steps.__dict__[name] = SimpleNamespace(
            result=result,
            sweep=Sweep.read(ledger) if ledger.exists() else None,
            ran=sorted(ran.read_text().splitlines()) if ran.exists() else [],
            changed={path for path in before.keys() | after.keys() if before.get(path) != after.get(path)},
        )

    step("first_plan", "plan", "+sweep=grid", "y=10")
    step("first", "+sweep=grid", "y=10")
    step("second_plan", "plan", "+sweep=grid", "y=10")
    (project.root / "broken").unlink()
    step("second", "+sweep=grid", "y=10")
    step("third", "+sweep=grid", "y=10")
    project.write({"conf/sweep/grid.yaml": SWEEP.format(values="2,3")})
    step("edited", "+sweep=grid", "y=10")
    return steps


def test_a_sweep_file_s_grid_runs_every_point_once(study: SimpleNamespace) -> None:
    """Conditional parameters exist only under their choice; Hydra's order of the points is kept."""
    assert study.first.ran == sorted(
        ["1 sgd 0", "1 sgd 0.9", "1 adam None", "2 sgd 0", "2 sgd 0.9", "2 adam None"]
    )
    assert [trial.overrides for trial in study.first.sweep.trials[:3]] == [
        ("x=1", "optimizer=sgd", "optimizer.momentum=0", "y=10"),
        ("x=1", "optimizer=sgd", "optimizer.momentum=0.9", "y=10"),
        ("x=1", "optimizer=adam", "y=10"),
    ]


def test_an_override_on_the_command_line_reaches_every_trial(study: SimpleNamespace) -> None:
    """``y=10`` is in the configs, and what the task made of it in the results."""
    sweep = study.second.sweep
    assert {yaml.safe_load(trial.config)["y"] for trial in sweep.trials} == {10}
    scores = [sweep.last_attempt(trial).metrics for trial in sweep.trials]
    assert sorted(metrics["score"] for metrics in scores) == [10, 10, 10, 20, 20, 20]
    assert all(metrics["other"] == 5 for metrics in scores)


def test_a_trial_s_config_and_overrides_know_nothing_of_the_sweep(study: SimpleNamespace) -> None:
    """So a trial's own files run under plain Hydra too."""
    for trial in study.first.sweep.trials:
        folder = study.first.sweep.folder(trial) / ".hydra"
        assert set(yaml.safe_load(trial.config)) == {"optimizer", "x", "y", "name"}
        assert (folder / "config.yaml").read_text() == trial.config
        assert yaml.safe_load((folder / "overrides.yaml").read_text()) == list(trial.overrides)
        hydra = yaml.safe_load((folder / "hydra.yaml").read_text())["hydra"]
        assert not any("sweep=" in override for override in hydra["overrides"]["task"])
        assert "sweep" not in hydra["runtime"]["choices"]


def test_plan_shows_the_trials_to_come(study: SimpleNamespace) -> None:
    """Counts, resources and the points."""
    plan = study.first_plan.result
    assert plan.returncode == 0, plan.stderr
    assert re.search(r"to run +6\n", plan.stdout)
    assert re.search(r"done +0\n", plan.stdout)
    assert "minimize" in plan.stdout
    assert "1 CPUs" in plan.stdout
    assert "optimizer=sgd optimizer.momentum=0.9" in plan.stdout


def test_plan_starts_nothing_and_writes_nothing(study: SimpleNamespace) -> None:
    """Not even a folder, before the sweep exists and afterwards."""
    assert study.first_plan.changed == set()
    assert study.first_plan.ran == []
    assert study.second_plan.changed - {"ran"} <= _SHARED_MEMORY
    assert study.second_plan.ran == []


_SHARED_MEMORY = {  # SQLite's own, made by every reader and removed by the last
    "multirun/grid",
    "multirun/grid/ledger.db-shm",
    "multirun/grid/ledger.db-wal",
}


def test_plan_counts_the_trials_that_are_done(study: SimpleNamespace) -> None:
    """After a run, only the failed one is left."""
    plan = study.second_plan.result
    assert re.search(r"to run +1\n", plan.stdout)
    assert re.search(r"done +5\n", plan.stdout)


def test_one_failed_trial_makes_the_exit_status_1_and_stops_no_other(study: SimpleNamespace) -> None:
    """The failure is recorded with its kind and message, and shown."""
    first = study.first
    assert first.result.returncode == 1
    assert first.sweep.states() == {TrialState.COMPLETE: 5, TrialState.FAIL: 1}
    [failed] = [trial for trial in first.sweep.trials if trial.state is TrialState.FAIL]
    attempt = first.sweep.last_attempt(failed)
    assert (attempt.kind, attempt.message) == (FailureKind.EXCEPTION, "RuntimeError: broken on purpose")
    assert "RuntimeError: broken on purpose" in first.result.stdout
    assert f"trials/{failed.number}/trial.log" in first.result.stdout
    assert "Traceback" in (first.sweep.folder(failed) / "trial.log").read_text()


def test_the_same_command_runs_a_failed_trial_again_and_no_other(study: SimpleNamespace) -> None:
    """Its first attempt stays on record."""
    assert study.second.result.returncode == 0, study.second.result.stderr
    assert study.second.ran == ["2 adam None"]
    attempts = Counter(attempt.trial for attempt in study.second.sweep.attempts)
    assert sorted(attempts.values()) == [1, 1, 1, 1, 1, 2]
    assert study.second.sweep.states() == {TrialState.COMPLETE: 6}


def test_the_same_command_once_more_runs_nothing_and_says_so(study: SimpleNamespace) -> None:
    """Done is done."""
    third = study.third
    assert third.result.returncode == 0
    assert third.ran == []
    assert third.sweep.attempts == study.second.sweep.attempts
    assert re.search(r"nothing (left )?to run|already", third.result.stdout + third.result.stderr)


def test_edited_params_run_only_the_points_that_are_new(study: SimpleNamespace) -> None:
    """Points that are no part of the sweep any more keep their results."""
    edited = study.edited
    assert edited.result.returncode == 0, edited.result.stderr
    assert edited.ran == sorted(["3 sgd 0", "3 sgd 0.9", "3 adam None"])
    assert edited.sweep.states() == {TrialState.COMPLETE: 9}
    assert [trial.number for trial in edited.sweep.trials] == list(range(9))


def test_a_run_prints_no_warning_and_no_traceback(study: SimpleNamespace) -> None:
    """Nothing that a user could not read."""
    for step in (study.first, study.second, study.third, study.edited):
        assert "Warning" not in step.result.stderr
        assert "Traceback" not in step.result.stderr + step.result.stdout


def test_what_a_sweep_writes_only_its_user_can_read(study: SimpleNamespace) -> None:
    """The ledger holds configs, the coordinator's file a way to it."""
    directory = study.edited.sweep.directory
    assert directory.stat().st_mode & 0o077 == 0
    for name in ("ledger.db", "coordinator.lock"):
        assert (directory / name).stat().st_mode & 0o077 == 0


def test_a_grid_needs_no_sweep_file(make_project: MakeProject) -> None:
    """Everything on the command line; strings, numbers and several axes, in Hydra's order."""
    project = make_project(STUDY)
    result = project.run(
        "+sweep=default", "sweep.task=tasks.train", "sweep.metric=score", "sweep.name=quick", "sweep.executor.slots=1",
        "x=4,5", "optimizer=adam,sgd", "+extra=a b",
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    sweep = project.sweep("quick")
    assert (project.root / "ran").read_text().splitlines() == [
        "4 adam None", "4 sgd 0.5", "5 adam None", "5 sgd 0.5",
    ]  # fmt: skip
    assert [trial.params for trial in sweep.trials][:2] == [
        {"x": 4, "optimizer": "adam", "extra": "a b"},
        {"x": 4, "optimizer": "sgd", "extra": "a b"},
    ]
    assert yaml.safe_load(sweep.trials[0].config)["extra"] == "a b"


def test_hydra_s_own_options_show_the_config_and_start_nothing(make_bare_project: MakeProject) -> None:
    """``--cfg job`` and ``--info``, as in any Hydra application."""
    project = make_bare_project(STUDY)
    before = project.files()
    config = project.run("+sweep=grid", "x=7", "--cfg", "job")
    assert config.returncode == 0, config.stderr
    assert yaml.safe_load(config.stdout)["x"] == 7
    assert yaml.safe_load(config.stdout)["sweep"]["task"] == "tasks.train"
    info = project.run("--info", "config")
    assert info.returncode == 0, info.stderr
    assert str(project.root / "conf") in info.stdout
    assert project.files() == before


def test_help_and_version_say_what_there_is(tmp_path: Path) -> None:
    """Commands and exit statuses."""
    project = Project(tmp_path)
    shown = project.run("--help")
    assert shown.returncode == 0
    assert {"plan", "rank", "+sweep=NAME"} <= set(shown.stdout.split())
    assert project.run("--version").stdout.startswith("repro-sweep 0.")


# --- an unchanged Hydra application --------------------------------------------------------------------------

APP = {
    "conf/config.yaml": """
        defaults: [schema, optimizer: sgd, _self_]
        name: ${optimizer.kind}-${x}
        hydra:
          job: {chdir: true, env_set: {APP_SETS: "some value"}}
          sweeper: {params: {optimizer: "sgd,adam"}}
          callbacks: {recorder: {_target_: recorder.Recorder, folder: "${hydra.runtime.cwd}"}}
    """,
    "conf/optimizer/sgd.yaml": "{kind: sgd}",
    "conf/optimizer/adam.yaml": "{kind: adam}",
    "recorder.py": """
        import json
        import os
        from pathlib import Path

        from hydra.experimental.callback import Callback

        class Recorder(Callback):
            def __init__(self, folder):
                self.folder = Path(folder)

            def note(self, name, **facts):
                with (self.folder / "callbacks").open("a") as file:
                    print(json.dumps({"name": name, **facts}), file=file)

            def on_multirun_start(self, config, **kwargs):
                self.note("on_multirun_start")

            def on_job_start(self, config, *, task_function, **kwargs):
                self.note("on_job_start", x=config.x, num=config.hydra.job.num, task=task_function.__name__,
                          directory=os.path.basename(os.getcwd()))

            def on_job_end(self, config, job_return, **kwargs):
                self.note("on_job_end", x=config.x, status=job_return.status.name, overrides=job_return.overrides,
                          returned=job_return.return_value, name_of=job_return.task_name, cfg=job_return.cfg.name)

            def on_multirun_end(self, config, **kwargs):
                self.note("on_multirun_end")
    """,
    "app.py": """
        import json
        import logging
        import os
        from dataclasses import dataclass, field
        from enum import Enum
        from typing import Any

        import hydra
        from hydra.core.config_store import ConfigStore
        from hydra.core.hydra_config import HydraConfig
        from omegaconf import OmegaConf

        class Color(Enum):
            RED = 1
            BLUE = 2

        @dataclass
        class Config:
            x: int = 0
            color: Color = Color.RED
            name: str = ""
            optimizer: Any = None

        ConfigStore.instance().store(name="schema", node=Config)
        log = logging.getLogger("app")

        @hydra.main(version_base="1.3", config_path="conf", config_name="config")
        def train(cfg):
            hydra_config = HydraConfig.get()
            log.info("training %s", cfg.name)
            log.debug("not shown")
            print("printed by", cfg.name)
            with open("seen.json", "w") as file:
                json.dump({
                    "num": hydra_config.job.num,
                    "output_dir": hydra_config.runtime.output_dir,
                    "task": list(hydra_config.overrides.task),
                    "sweep_dir": hydra_config.sweep.dir,
                    "override_dirname": hydra_config.job.override_dirname,
                    "mode": hydra_config.mode.name,
                    "cwd": os.getcwd(),
                    "original": hydra.utils.get_original_cwd(),
                    "env": os.environ["APP_SETS"],
                    "type": OmegaConf.get_type(cfg).__name__,
                    "color": cfg.color is Color.BLUE,
                    "config": OmegaConf.to_yaml(cfg, resolve=True),
                }, file)
            return float(cfg.x)

        if __name__ == "__main__":
            train()
    """,
}


@pytest.fixture(scope="module")
def application(make_shared_project: MakeProject) -> SimpleNamespace:
    """The same application with the same command, under plain Hydra and under repro-sweep."""
    arguments = (
        "--multirun",
        "x=1,2",
        "color=BLUE",
        "hydra.sweep.dir=out",
        "hydra.sweep.subdir=job_${hydra.job.num}",
    )
    plain = make_shared_project(APP, name="plain")
    ours = make_shared_project(APP, name="ours")
    return SimpleNamespace(
        plain=plain,
        ours=ours,
        plain_result=plain.run("app.py", *arguments, python=True),
        result=ours.run("app.py", *arguments, "hydra/sweeper=repro_sweep", python=True),
    )


def _of_each_job(project: Project, file: str) -> list[str]:
    """A file of each job, the project's own folder left out of it."""
    folders = [project.root / "out" / f"job_{number}" for number in range(4)]
    return [(folder / file).read_text().replace(str(project.root), "ROOT") for folder in folders]


def test_an_unchanged_hydra_application_runs_with_one_more_override(application: SimpleNamespace) -> None:
    """Its ``hydra.sweeper.params`` and its command line make the grid, as under Hydra."""
    ran: CompletedProcess[str] = application.result
    assert application.plain_result.returncode == 0, application.plain_result.stderr
    assert ran.returncode == 0, ran.stderr
    sweep = Sweep.read(application.ours.root / "out")
    assert sweep.states() == {TrialState.COMPLETE: 4}
    assert [sweep.last_attempt(trial).metrics for trial in sweep.trials] == [
        {"objective": value} for value in (1, 2, 1, 2)
    ]


def test_an_application_s_task_sees_hydra_s_world_as_it_was(application: SimpleNamespace) -> None:
    """HydraConfig, the changed directory, env_set, and a config with its dataclass and enum."""
    seen = [json.loads(text) for text in _of_each_job(application.ours, "seen.json")]
    assert seen == [json.loads(text) for text in _of_each_job(application.plain, "seen.json")]
    assert seen[1] == seen[1] | {
        "num": 1,
        "output_dir": "ROOT/out/job_1",
        "cwd": "ROOT/out/job_1",
        "original": "ROOT",
        "env": "some value",
        "type": "Config",
        "color": True,
    }


@pytest.mark.parametrize("name", ["config.yaml", "overrides.yaml"])
def test_an_application_s_hydra_files_equal_those_of_plain_hydra(
    application: SimpleNamespace, name: str
) -> None:
    """Byte for byte."""
    assert _of_each_job(application.ours, f".hydra/{name}") == _of_each_job(
        application.plain, f".hydra/{name}"
    )


def test_an_application_s_hydra_yaml_differs_from_plain_hydra_s_only_in_the_sweeper(
    application: SimpleNamespace,
) -> None:
    """The sweeper's node, its choice, and the override that chose it."""
    for ours, plain in zip(
        _of_each_job(application.ours, ".hydra/hydra.yaml"),
        _of_each_job(application.plain, ".hydra/hydra.yaml"),
        strict=True,
    ):
        expected, found = yaml.safe_load(plain)["hydra"], yaml.safe_load(ours)["hydra"]
        assert found["sweeper"]["params"] == expected["sweeper"]["params"]
        assert "hydra/sweeper=repro_sweep" in found["overrides"]["hydra"]
        assert found["runtime"]["choices"]["hydra/sweeper"] == "repro_sweep"
        for node in (expected, found):
            _forget_the_sweeper(node)
        sources = found["runtime"]["config_sources"]  # from the frozen source
        sources[:] = [each | {"path": re.sub(r".*/\.source/\w+/0", "ROOT", each["path"])} for each in sources]
        assert found == expected
        assert list(found) == list(expected)


def _forget_the_sweeper(hydra: dict[str, Any]) -> None:
    hydra["sweeper"] = None
    del hydra["runtime"]["choices"]["hydra/sweeper"]
    hydra["runtime"]["choices"].pop("hydra/sweeper/sampler", None)
    hydra["overrides"]["hydra"] = [
        each for each in hydra["overrides"]["hydra"] if "hydra/sweeper" not in each
    ]


def test_an_application_s_logging_goes_to_the_job_s_log_file(application: SimpleNamespace) -> None:
    """As under Hydra; and to the trial's log, with what it prints."""
    stamp = re.compile(r"^\[[^]]*\]", re.MULTILINE)
    logs = [stamp.sub("[time]", text) for text in _of_each_job(application.ours, "app.log")]
    assert logs == [stamp.sub("[time]", text) for text in _of_each_job(application.plain, "app.log")]
    assert logs[0] == "[time][app][INFO] - training sgd-1\n"
    trial_log = _of_each_job(application.ours, "trial.log")[0]
    assert "[app][INFO] - training sgd-1\n" in trial_log
    assert "printed by sgd-1\n" in trial_log


def test_an_application_s_callbacks_are_called_as_under_hydra(application: SimpleNamespace) -> None:
    """Around each job and around the sweep, with the same facts."""
    ours, plain = (
        [json.loads(line) for line in (project.root / "callbacks").read_text().splitlines()]
        for project in (application.ours, application.plain)
    )
    assert ours[0]["name"] == "on_multirun_start"
    assert ours[-1]["name"] == "on_multirun_end"
    assert len(ours) == len(plain) == 10
    assert sorted(map(json.dumps, ours)) == sorted(map(json.dumps, plain))


def test_an_application_is_imported_without_running_its_main_part(application: SimpleNamespace) -> None:
    """What stands under ``if __name__ == "__main__"`` would start the sweep again in every worker."""
    assert application.result.stderr.count("0/4 done") <= 1
    assert len(list((application.ours.root / "out" / "workers").iterdir())) == 1
