"""Searches, run by the command: what is asked for, in which order, until when, and what of it is kept."""

from __future__ import annotations

import json
import re
from collections import Counter

import pytest
from helpers import MakeProject, Project, kill_all
from search_helpers import FILES, HEAD, WITHOUT_MLFLOW, Searched, searched

from repro_sweep.states import StepKind, TrialState

COMPLETE, PRUNED, FAIL = TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL
SEED = "sweep.sampler.seed=7"
ASKER = "repro_sweep.asker"


@pytest.fixture(scope="module")
def project(make_shared_project: MakeProject) -> Project:
    """One whose search has run once, with two slots."""
    made = make_shared_project(FILES)
    done = made.run("+sweep=search", SEED, "sweep.report=true")
    assert done.returncode == 0, done.stderr
    return made


def run(project: Project, name: str, *overrides: str, status: int = 0) -> Searched:
    """Run the project's search under another name, without MLflow."""
    options = (f"sweep.name={name}", "sweep.report=false", *overrides)
    done = project.run("-c", WITHOUT_MLFLOW, "+sweep=search", *options, python=True)
    assert done.returncode == status, done.stderr
    return searched(project, name)


def test_a_search_runs_as_many_trials_as_its_budget_has(project: Project) -> None:
    found = searched(project)
    assert found.count(COMPLETE) == len(found.trials) == 16
    assert found.over == "16 trials (sweep.budget.trials)"
    assert Counter((project.root / "ran").read_text().split()) == Counter(str(n) for n in range(16))


def test_every_suggestion_is_recorded_before_its_trial_is_handed_out(project: Project) -> None:
    found = searched(project)
    asked = {
        number: step.seq
        for step in found.steps
        if step.kind is StepKind.ASK
        for number in step.data["trials"]
    }
    told = {step.data["trial"]: step.seq for step in found.steps if step.kind is StepKind.TELL}
    assert asked.keys() == told.keys() == {trial.number for trial in found.trials}
    assert all(asked[number] < told[number] for number in asked)


def test_conditional_parameters_exist_only_with_their_choice(project: Project) -> None:
    found = searched(project)
    both = Counter((trial.params["opt"], "z" in trial.params) for trial in found.trials)
    assert both.keys() == {("a", True), ("b", False)}
    assert {trial.params["n"] for trial in found.trials} == {1, 2, 3}


def test_the_recorded_order_of_asks_and_tells_replays_to_the_same_suggestions(project: Project) -> None:
    replayed = project.run("replay", "search")
    assert (replayed.returncode, replayed.stdout) == (0, "the same: 16 suggestions of tpe (seed 7)\n")


def test_a_record_that_was_changed_does_not_replay(make_project: MakeProject) -> None:
    import sqlite3

    project = make_project(FILES)
    assert project.run("+sweep=search", SEED, "sweep.budget.trials=4").returncode == 0
    db = sqlite3.connect(project.root / "multirun" / "search" / "ledger.db")
    seq, data = db.execute(
        "SELECT seq, data FROM steps WHERE kind = 'ASK' ORDER BY seq LIMIT 1 OFFSET 2"
    ).fetchone()
    changed = json.loads(data)
    changed["values"]["x"] += 0.5
    with db:
        db.execute("UPDATE steps SET data = ? WHERE seq = ?", (json.dumps(changed), seq))
    db.close()
    replayed = project.run("replay", "search")
    assert replayed.returncode == 1
    assert "the replay differs: suggestion 2 was" in replayed.stderr


def test_with_one_slot_each_suggestion_knows_all_results(project: Project) -> None:
    found = run(project, "alone", SEED, "sweep.executor.slots=1", "sweep.budget.trials=8")
    assert [step.kind for step in found.steps[1:]] == [StepKind.ASK, StepKind.TELL] * 8


def test_the_same_seed_gives_the_same_search(project: Project) -> None:
    one, other = (
        run(project, name, SEED, "sweep.executor.slots=1", "sweep.budget.trials=8")
        for name in ("alone", "again")
    )
    assert one.values() == other.values()
    assert (
        one.values()
        != run(
            project, "else", "sweep.sampler.seed=8", "sweep.executor.slots=1", "sweep.budget.trials=8"
        ).values()
    )


def test_the_same_command_with_a_larger_budget_goes_on(project: Project) -> None:
    before = run(project, "more", "sweep.budget.trials=5", "sweep.executor.slots=1")
    after = run(project, "more", "sweep.budget.trials=9", "sweep.executor.slots=1")
    assert after.values()[:5] == before.values()
    assert len(after.trials) == 9
    assert len([step for step in after.steps if step.kind is StepKind.BEGIN]) == 1
    assert project.run("replay", "more").returncode == 0


def test_a_search_with_another_space_begins_with_what_the_old_one_has_found(project: Project) -> None:
    run(project, "moved", "sweep.budget.trials=8", SEED)
    moved = run(project, "moved", "sweep.budget.trials=3", SEED, "x=interval(-10,10)")
    begin = moved.steps[0]
    assert begin.kind is StepKind.BEGIN
    assert len(begin.data["known"]) == 8
    assert len(moved.asks()) == 3
    assert len(moved.trials) == 11
    assert project.run("replay", "moved").returncode == 0


def test_another_sweep_to_start_from(project: Project) -> None:
    found = run(project, "warm", "sweep.start_from=[search]", "sweep.budget.trials=2")
    assert len(found.steps[0].data["known"]) == 16
    known = {tuple(each["values"].items()): each["objectives"] for each in found.steps[0].data["known"]}
    other = searched(project)
    assert known == {
        tuple(ask["values"].items()): [other.metrics(ask["trials"][0])["loss"]] for ask in other.asks()
    }


def test_points_to_try_first(project: Project) -> None:
    found = run(
        project, "first", "sweep.enqueue=[{x: 1.5, opt: b, n: 2}, {x: -2.5}]", "sweep.budget.trials=3"
    )
    assert found.values()[0] == {"x": 1.5, "opt": "b", "n": 2}
    assert found.values()[1]["x"] == -2.5


@pytest.mark.parametrize(
    ("budget", "over"),
    [
        ("target=4", r"trial \d+ has reached the target 4 \(sweep.budget.target\)"),
        ("plateau=4", r"\d+ points in a row were no better \(sweep.budget.plateau\)"),
        ("hours=0.0003", r"0.0003 h are over \(sweep.budget.hours\)"),
    ],
)
def test_what_is_reached_first_ends_a_search(project: Project, budget: str, over: str) -> None:
    name = budget.partition("=")[0]
    found = run(project, name, f"sweep.budget.{budget}", "sweep.budget.trials=1000", "wait_s=0.02", SEED)
    assert found.over is not None
    assert re.fullmatch(over, found.over)
    begun = {attempt.trial for attempt in found.attempts}
    assert found.withdrawn == {trial.number for trial in found.trials} - begun
    if name == "target":
        assert min(found.metrics(number)["loss"] for number in begun) <= 4


def test_points_that_are_known_already_are_not_run_again(make_project: MakeProject) -> None:
    few = f"{HEAD}\ntask: tasks.train\nmetric: loss\nbudget: {{trials: 50}}\nparams: {{n: 'range(1, 4)', opt: 'a,b'}}\n"
    project = make_project(FILES | {"conf/sweep/search.yaml": few})
    done = project.run("+sweep=search", SEED)
    assert done.returncode == 0, done.stderr
    found = searched(project)
    assert len(found.trials) == 6
    assert found.over == "the last 200 suggestions were points that are known already"
    assert project.run("replay", "search").returncode == 0


def test_brute_force_tries_every_point_once(make_project: MakeProject) -> None:
    few = f"{HEAD}\ntask: tasks.train\nmetric: loss\nbudget: {{trials: 50}}\nparams: {{n: 'range(1, 4)', opt: 'a,b'}}\n"
    project = make_project(FILES | {"conf/sweep/search.yaml": few})
    done = project.run("+sweep=search", "sweep/sampler=bruteforce")
    assert done.returncode == 0, done.stderr
    found = searched(project)
    assert len(found.trials) == len(found.asks()) == 6
    assert found.over == "the sampler has tried every point"


def test_a_failed_trial_is_told_and_the_search_goes_on(make_project: MakeProject) -> None:
    project = make_project(FILES)
    done = project.run("+sweep=search", SEED, "fail_below=-1")
    found = searched(project)
    assert done.returncode == 1
    assert 0 < found.count(FAIL) < 16 == len(found.trials)
    told = Counter(step.data["state"] for step in found.steps if step.kind is StepKind.TELL)
    assert told[FAIL] == found.count(FAIL)
    (project.root / "mended").touch()
    assert project.run("+sweep=search", SEED, "fail_below=-1").returncode == 0
    mended = searched(project)
    assert mended.count(COMPLETE) == len(mended.trials) == 16
    assert mended.values() == found.values()
    assert project.run("replay", "search").returncode == 0


def test_a_point_with_repeats_is_asked_for_once_and_told_as_their_mean(project: Project) -> None:
    found = run(project, "repeats", "+sweep.repeats.seed='range(3)'", "sweep.budget.trials=12")
    assert [len(ask["trials"]) for ask in found.asks()] == [3] * 4
    for ask in found.asks():
        losses = sorted(found.metrics(number)["loss"] for number in ask["trials"])
        assert losses[2] - losses[0] == pytest.approx(0.02)
    assert project.run("replay", "repeats").returncode == 0


def test_the_repeats_of_a_hopeless_point_are_spared(project: Project) -> None:
    found = run(
        project, "spared", "+sweep.repeats.seed='range(3)'", "sweep/repeats_pruner=median", "sweep.budget.trials=40",
        "sweep.executor.slots=1", SEED,
    )  # fmt: skip
    repeats = Counter(len([t for t in found.trials if t.point == trial.point]) for trial in found.trials)
    assert repeats.keys() == {1, 3} or repeats.keys() == {1, 2, 3}
    best = min(found.trials, key=lambda trial: found.metrics(trial.number)["loss"])
    assert sum(trial.point == best.point for trial in found.trials) == 3
    assert project.run("replay", "spared").returncode == 0


def test_a_trial_that_is_worse_than_the_others_is_pruned(project: Project) -> None:
    found = run(project, "pruned", "sweep/pruner=median", "steps=6", SEED, "sweep.budget.trials=24")
    assert found.count(PRUNED) > 3
    assert found.count(PRUNED) + found.count(COMPLETE) == 24
    assert found.reports < 24 * 6
    complete = [found.metrics(t.number)["loss"] for t in found.trials if t.state is COMPLETE]
    pruned = [t for t in found.trials if t.state is PRUNED]
    last = [found.metrics(trial.number)["loss"] for trial in pruned]
    assert sum(last) / len(last) > sum(complete) / len(complete)
    assert project.run("replay", "pruned").returncode == 0


def test_a_grid_is_pruned_too(make_project: MakeProject) -> None:
    head = HEAD.replace("tpe", "grid")
    grid = f"{head}\ntask: tasks.train\nmetric: loss\nparams: {{x: 'range(1, 11)'}}\n"
    project = make_project(FILES | {"conf/sweep/grid.yaml": grid})
    done = project.run("+sweep=grid", "sweep/pruner=median", "steps=4", "sweep.executor.slots=1")
    assert done.returncode == 0, done.stderr
    found = searched(project, "grid")
    assert [trial.state for trial in found.trials] == [COMPLETE] * 5 + [PRUNED] * 5


def test_several_objectives_and_constraints(project: Project) -> None:
    found = run(
        project, "several", "sweep.metric=[loss,cost]", "sweep.direction=[minimize,minimize]",
        "sweep.constraints=['x >= 0']", "sweep.budget.trials=12", SEED,
    )  # fmt: skip
    assert found.count(COMPLETE) == 12
    assert project.run("replay", "several").returncode == 0


@pytest.mark.parametrize("sampler", ["cmaes", "nsgaii"])
def test_a_sampler_that_remembers_goes_on_where_its_search_was_cut_off(
    project: Project, sampler: str
) -> None:
    plain = ("~sweep.params.opt", f"sweep/sampler={sampler}", SEED, "sweep.executor.slots=1")
    whole = run(project, f"{sampler}-whole", *plain, "sweep.budget.trials=14")
    run(project, sampler, *plain, "sweep.budget.trials=6")
    parts = run(project, sampler, *plain, "sweep.budget.trials=14")
    assert parts.values() == whole.values()
    assert len({json.dumps(values) for values in parts.values()}) > 10


def test_any_sampler_of_optuna_by_its_class(project: Project) -> None:
    options = (
        "sweep/sampler=optuna", "+sweep.sampler._target_=optuna.samplers.TPESampler",
        "+sweep.sampler.n_startup_trials=3", SEED, "sweep.executor.slots=1",
    )  # fmt: skip
    whole = run(project, "by-class-whole", *options, "sweep.budget.trials=9")
    run(project, "by-class", *options, "sweep.budget.trials=5")
    assert run(project, "by-class", *options, "sweep.budget.trials=9").values() == whole.values()


def test_a_sampler_whose_process_dies_is_made_again(make_project: MakeProject) -> None:
    undisturbed = make_project(FILES, name="undisturbed")
    options = ("+sweep=search", SEED, "sweep.executor.slots=1", "wait_s=0.1")
    assert undisturbed.run(*options).returncode == 0
    project = make_project(FILES)
    with project.start(*options) as command:
        for number in (3, 7):
            command.until(lambda n=number: _ended(project) >= n, f"{number} trials have ended")
            kill_all(project.processes_of(ASKER))
        assert command.wait() == 0, command.stderr
    assert searched(project).values() == searched(undisturbed).values()
    assert Counter((project.root / "ran").read_text().split()) == Counter(str(n) for n in range(16))


def test_a_search_that_was_interrupted_goes_on_with_resume(make_project: MakeProject) -> None:
    project = make_project(FILES)
    with project.start("+sweep=search", SEED, "wait_s=0.1") as command:
        command.until(lambda: _ended(project) >= 4, "4 trials have ended")
        command.interrupt("nothing new starts")
        assert command.wait() == 130
    between = searched(project)
    assert 4 <= between.count(COMPLETE) < 16
    assert between.over is None
    status = project.run("status", "search")
    assert status.returncode == 0
    resumed = project.run("resume", "search")
    assert resumed.returncode == 0, resumed.stderr
    found = searched(project)
    assert found.count(COMPLETE) == 16
    assert found.values()[: len(between.values())] == between.values()
    assert project.run("replay", "search").returncode == 0
    assert "is finished; nothing to run" in project.run("resume", "search").stderr


def _ended(project: Project) -> int:
    directory = project.root / "multirun" / "search"
    if not (directory / "ledger.db").exists():
        return 0
    return sum(step.kind is StepKind.TELL for step in Searched.read(directory).steps)


def test_plan_shows_what_is_searched_and_starts_nothing(make_project: MakeProject) -> None:
    project = make_project(FILES)
    before = project.files().keys()
    shown = project.run("plan", "+sweep=search", SEED, "sweep.budget.hours=2")
    assert shown.returncode == 0, shown.stderr
    lines = shown.stdout.splitlines()
    assert lines[0] == "sweep       search: a search (tasks.train)"
    assert "sampler     tpe (seed 7)" in lines
    assert "until       16 trials, or 2 h" in lines
    assert "  x    numbers from -5 to 5" in lines
    assert "  opt  a, b" in lines
    assert "  n    integers from 1 to 3" in lines
    assert {path for path in project.files().keys() - before if "__pycache__" not in path} == set()


def test_the_report_is_there_when_the_search_is_over(project: Project) -> None:
    page = (project.root / "multirun" / "search" / "report.html").read_text()
    assert "Plotly" in page
    assert "search" in page


BAD: dict[str, tuple[tuple[str, ...], str]] = {
    "no budget": (
        ("sweep.budget.trials=null",),
        "sweep.budget: a search needs an end: sweep.budget.trials=100",
    ),
    "an empty budget": (("sweep.budget.trials=0",), "sweep.budget.trials: must be at least 1, got 0"),
    "an unknown option": (("+sweep.sampler.n_starts=3",), "n_starts"),
    "an unknown sampler": (("sweep/sampler=bayes",), "bayes"),
    "an option that Optuna refuses": (
        ("sweep.sampler.n_ei_candidates=0",),
        "sweep.sampler.n_ei_candidates: must be at least 1",
    ),
    "a pruner with several objectives": (
        ("sweep.metric=[loss,cost]", "sweep/pruner=median"),
        "pruning needs one objective, got 2 (loss, cost)",
    ),
    "a choice that is a list": (("x=[1],[2]",), "a search chooses among"),
    "a log range that reaches 0": (("x=tag(log, interval(0, 1))",), "logarithmic"),
    "an interval the wrong way round": (("x=interval(5, 1)",), "interval(5"),
    "a sampler that knows no conditions": (
        ("sweep/sampler=cmaes",),
        "cannot handle parameters that exist only with some choice of another: z",
    ),
    "brute force over an interval": (
        ("sweep/sampler=bruteforce",),
        "sweep/sampler=bruteforce tries every value",
    ),
    "a metric twice": (("sweep.metric=[loss,loss]",), "sweep.metric: names a metric twice"),
    "too few directions": (
        ("sweep.metric=[loss,cost]", "sweep.direction=[minimize]"),
        "sweep.direction: must have one direction for each metric",
    ),
    "no such direction": (("sweep.direction=down",), "sweep.direction: 'down' is not one of"),
    "a constraint without a bound": (
        ("sweep.constraints=['cost < 3']",),
        "sweep.constraints[0]: must be like 'latency_ms <= 50'",
    ),
    "an enqueued key that is not there": (("sweep.enqueue=[{y: 1}]",), "sweep.enqueue[0]"),
    "an enqueued value out of range": (("sweep.enqueue=[{x: 50}]",), "sweep.enqueue[0]"),
    "a sweep to start from that is not there": (("sweep.start_from=[nothing]",), "sweep.start_from"),
    "a repeats pruner without repeats": (("sweep/repeats_pruner=median",), "there are no repeats to prune"),
    "a key that the config has not": (("nix=interval(0,1)",), "nix"),
    "a budget for a grid": (("sweep/sampler=grid", "x=1,2", "opt=a", "n=1"), "sweep.budget: is for searches"),
    "a pruner without what it needs": (
        ("sweep/pruner=percentile",),
        "sweep.pruner.percentile: must be given",
    ),
    "nothing to search": (("x=1", "opt=b", "n=1"), "nothing to search"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_mistake_is_said_in_one_line_before_anything_starts(
    make_bare_project: MakeProject, case: str
) -> None:
    project = make_bare_project(FILES)
    overrides, expected = BAD[case]
    done = project.run("+sweep=search", *overrides)
    assert done.returncode == 2, done.stderr
    assert expected in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr
    assert not (project.root / "multirun").exists()


def test_a_metric_that_is_never_reported_ends_the_search(make_project: MakeProject) -> None:
    project = make_project(FILES)
    done = project.run("+sweep=search", "sweep.metric=accuracy")
    assert done.returncode == 2
    assert "sweep.metric: the task does not return 'accuracy' (cost, loss, x)" in done.stderr


def test_a_missing_package_is_named_with_the_command_that_installs_it(make_project: MakeProject) -> None:
    project = make_project(FILES | {"sitecustomize.py": "import sys\nsys.modules['cmaes'] = None\n"})
    done = project.run(
        "+sweep=search", "sweep/sampler=cmaes", "~sweep.params.opt", env={"PYTHONPATH": str(project.root)}
    )
    assert done.returncode == 2
    assert "pip install cmaes" in done.stderr
