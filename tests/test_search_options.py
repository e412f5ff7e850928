"""The options of a search: what is chosen, what is taken over from ``hydra.sweeper``, and what is refused."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from textwrap import dedent
from types import ModuleType
from typing import Any

import optuna
import pytest
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra

from repro_sweep.config import schema
from repro_sweep.config.hydra_errors import mapped_errors
from repro_sweep.config.optuna_samplers import DEFAULT_TRIALS
from repro_sweep.errors import SweepError, UserError
from repro_sweep.search import samplers, targets
from repro_sweep.states import Direction
from repro_sweep.submission import Submission, prepare
from repro_sweep.sweep import Chosen, SweepSpec

Prepare = Callable[..., Submission]

ROOT = Path(__file__).resolve().parent.parent
MODULE = "task_with_options"
FILES = {
    "conf/config.yaml": "{x: 0.0, y: 0.0}",
    "conf/sweep/search.yaml": f"""
        defaults: [base_sweep, sampler: tpe, executor: local, _self_]
        task: {MODULE}.train
        metric: loss
        budget: {{trials: 16}}
        params: {{x: "interval(0, 1)"}}
    """,
    "conf/sweep/fixed.yaml": f"""
        defaults: [base_sweep, sampler: random, executor: local, _self_]
        task: {MODULE}.train
    """,
    f"{MODULE}.py": """
        def train(cfg):
            return {"loss": cfg.x}

        def configure(cfg, trial):
            trial.suggest_float("y", 0, 1)
    """,
}
WRITTEN_FOR_OPTUNA = f"""
    x: 0.0
    y: 0.0
    hydra:
      sweeper:
        direction: maximize
        n_trials: 7
        n_jobs: 2
        max_failure_rate: 0.5
        custom_search_space: {MODULE}.configure
        sampler: {{_target_: optuna.samplers.TPESampler, seed: 3}}
        params: {{x: "interval(0, 1)"}}
"""
TASK = f"sweep.task={MODULE}.train"


@pytest.fixture
def prepared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Prepare]:
    """Prepares a sweep from a command line, in this process; ``files`` change the project's."""
    schema.register()
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)

    def make(*overrides: str, files: dict[str, str] | None = None) -> Submission:
        for name, text in (FILES | (files or {})).items():
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_text(dedent(text), encoding="utf-8")
        arguments = ["hydra/sweeper=repro_sweep", *overrides]
        with initialize_config_dir(str(tmp_path / "conf"), version_base="1.3", job_name="app"):
            with mapped_errors([]):
                config = compose("config", arguments, return_hydra_config=True)
            loader = GlobalHydra.instance().config_loader()
            return prepare(config, loader, list(config.hydra.overrides.task), None, "repro-sweep …")

    yield make
    GlobalHydra.instance().clear()
    sys.modules.pop(MODULE, None)


def refusal(prepared: Prepare, *overrides: str, files: dict[str, str] | None = None) -> str:
    """What a command line is refused with, which is one line."""
    with pytest.raises(UserError) as caught:
        prepared(*overrides, files=files)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# --- what hydra.sweeper asks for -----------------------------------------------------------------------------


def for_optuna(prepared: Prepare, *overrides: str, node: str = WRITTEN_FOR_OPTUNA) -> SweepSpec:
    """The sweep of an application written for hydra-optuna-sweeper."""
    return prepared(*overrides, files={"conf/config.yaml": node}).spec


@pytest.mark.parametrize(
    ("overrides", "sampler", "seed"),
    [
        (("+sweep=default", TASK), "tpe", 3),
        (("+sweep=default", TASK, "sweep/sampler=random"), "random", None),
        (("+sweep=default", TASK, "sweep/sampler=optuna", "sweep.sampler._target_=optuna.samplers.RandomSampler"),
         "optuna", None),
        (("+sweep=fixed",), "random", None),
    ],
)  # fmt: skip
def test_another_sampler_replaces_nothing_else_of_what_hydra_sweeper_asks_for(
    prepared: Prepare, overrides: tuple[str, ...], sampler: str, seed: int | None
) -> None:
    spec = for_optuna(prepared, *overrides)
    assert spec.search is not None
    assert (spec.sampler, spec.search.sampler.name, spec.search.sampler.options["seed"]) == (
        sampler, sampler, seed,
    )  # fmt: skip
    assert spec.direction is Direction.MAXIMIZE
    assert spec.search.budget.trials == 7
    assert spec.executor["slots"] == 2
    assert spec.max_failures == 3
    assert spec.search.custom_search_space == f"{MODULE}.configure"


def test_several_directions_are_kept_with_another_sampler(prepared: Prepare) -> None:
    node = WRITTEN_FOR_OPTUNA.replace("maximize", "[minimize, maximize]")
    spec = for_optuna(prepared, "+sweep=default", TASK, "sweep/sampler=random", node=node)
    assert [(each.metric, each.direction.value) for each in spec.objectives] == [
        ("objective_0", "minimize"), ("objective_1", "maximize"),
    ]  # fmt: skip


def test_options_of_the_sweep_node_go_before_those_of_hydra_sweeper(prepared: Prepare) -> None:
    spec = for_optuna(
        prepared, "+sweep=fixed", "sweep.direction=minimize", "sweep.budget.hours=1", "sweep.executor.slots=1",
        "sweep.max_failures=0",
    )  # fmt: skip
    assert spec.search is not None
    assert spec.direction is Direction.MINIMIZE
    assert (spec.search.budget.trials, spec.search.budget.hours) == (None, 1.0)
    assert (spec.executor["slots"], spec.max_failures) == (1, 0)


@pytest.mark.parametrize(
    ("metric", "direction"),
    [(None, Direction.MINIMIZE), ("objective", Direction.MINIMIZE), ("accuracy", Direction.MAXIMIZE),
     ("loss", Direction.MINIMIZE)],
)  # fmt: skip
def test_without_a_direction_a_number_is_minimized_and_a_metric_goes_by_its_name(
    prepared: Prepare, metric: str | None, direction: Direction
) -> None:
    """The first is hydra-optuna-sweeper's default, the second that of the ``sweep`` node."""
    node = "{x: 0.0, hydra: {sweeper: {study_name: mine, params: {x: 'interval(0, 1)'}}}}"
    named = [] if metric is None else [f"sweep.metric={metric}"]
    spec = for_optuna(prepared, "+sweep=fixed", *named, node=node)
    assert spec.search is not None
    assert (spec.direction, spec.search.budget.trials, spec.name) == (direction, DEFAULT_TRIALS, "mine")


def test_the_direction_and_the_slots_of_a_grid_sampler_are_kept(prepared: Prepare) -> None:
    node = """
        x: 0.0
        hydra:
          sweeper:
            direction: minimize
            n_jobs: 2
            max_failure_rate: 0.5
            sampler: {_target_: optuna.samplers.GridSampler}
            params: {x: "1,2"}
    """
    ready = prepared("+sweep=default", TASK, files={"conf/config.yaml": node})
    assert ready.spec.search is None
    assert len(ready.new) == 2
    assert ready.spec.direction is Direction.MINIMIZE
    assert (ready.spec.executor["slots"], ready.spec.max_failures) == (2, None)


# --- what is chosen ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (("sweep.pruner=median",), ("sweep.pruner: choose it with sweep/pruner=median,", "'pruner: median'")),
        (("sweep.pruner={name: median}",), ("sweep.pruner: choose it with sweep/pruner=median,",)),
        (("sweep.pruner={min_resource: 1}",),
         ("sweep.pruner: choose it with sweep/pruner=NAME (hyperband, median, none,", "{'min_resource': 1}")),
        (("+sweep/pruner=median", "sweep.pruner=percentile"), ("choose it with sweep/pruner=percentile,",)),
        (("+sweep/pruner=median", "sweep.pruner=null"), ("sweep.pruner: choose it with sweep/pruner=none,",)),
        (("sweep.repeats_pruner=median",), ("sweep.repeats_pruner: choose it with sweep/repeats_pruner=median,",)),
        (("sweep.sampler=random",), ("sweep.sampler: choose it with sweep/sampler=random,", "'sampler: random'")),
        (("sweep.sampler=luck",), ("sweep/sampler=NAME (bruteforce, cmaes,", "got 'luck'")),
        (("sweep.sampler=null",), ("sweep/sampler=NAME (bruteforce, cmaes,", "got None")),
        (("sweep.executor=local",), ("sweep.executor: choose it with sweep/executor=local,",)),
    ],
)  # fmt: skip
def test_a_choice_with_a_dot_is_refused_with_the_one_that_has_a_slash(
    prepared: Prepare, overrides: tuple[str, ...], says: tuple[str, ...]
) -> None:
    """It would be ignored, or run something else."""
    line = refusal(prepared, "+sweep=search", *overrides)
    assert all(part in line for part in says), line


@pytest.mark.parametrize(
    ("defaults", "body", "line"),
    [
        (
            "sampler: tpe, executor: local",
            "pruner: median",
            "sweep.pruner: choose it with sweep/pruner=median,",
        ),
        ("sampler: tpe, executor: local", "pruner: {name: median}", "choose it with sweep/pruner=median,"),
        ("sampler: tpe, executor: local", "sampler: random", "value: random; what a sampler"),
        ("executor: local", "sampler: {n_startup_trials: 3}", "choose it with sweep/sampler=NAME"),
        ("sampler: tpe", "executor: {slots: 2}", "choose it with sweep/executor=NAME (local, ray, slurm)"),
        ("executor: local", "", "sweep.sampler: has no value; put 'sampler: …' into the defaults"),
    ],
)
def test_a_choice_in_the_file_s_body_is_refused_with_its_place_in_the_defaults(
    prepared: Prepare, defaults: str, body: str, line: str
) -> None:
    text = f"defaults: [base_sweep, {defaults}, _self_]\ntask: {MODULE}.train\n{body}\n"
    assert line in refusal(prepared, "+sweep=mine", files={"conf/sweep/mine.yaml": text})


def test_options_of_what_is_chosen_may_be_a_mapping(prepared: Prepare) -> None:
    """With any of the choices that have options."""
    spec = prepared(
        "+sweep=search", "+sweep/pruner=median", "sweep.pruner={n_warmup_steps: 2}", "sweep.sampler={seed: 5}",
        "sweep.executor={slots: 1}", "+sweep/repeats_pruner=none",
    ).spec  # fmt: skip
    assert spec.search is not None
    assert spec.search.seed == 5
    assert spec.pruner is not None
    assert (spec.pruner.name, spec.pruner.options["n_warmup_steps"]) == ("median", 2)
    assert spec.search.repeats_pruner is None


def test_a_pruner_without_a_metric_is_refused(prepared: Prepare) -> None:
    """The number that a task returns is never reported."""
    line = "sweep/pruner=median: a pruner needs a metric that the task reports: sweep.metric=NAME"
    assert refusal(prepared, "+sweep=search", "+sweep/pruner=median", "sweep.metric=null") == line
    grid = ("+sweep=default", TASK, "sweep.params={x: '1,2'}", "+sweep/pruner=median")
    assert refusal(prepared, *grid) == line
    assert prepared(*grid, "sweep.metric=loss").spec.pruner is not None
    assert prepared(*grid[:-1], "+sweep/pruner=none").spec.pruner is None


# --- options of samplers -------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", ["abc", "-1", "4294967296", "1.5", "true", "[1]"])
def test_a_seed_that_is_none_is_refused(prepared: Prepare, seed: str) -> None:
    """A chosen class takes anything as its options."""
    by_class = ("sweep/sampler=optuna", "sweep.sampler._target_=optuna.samplers.RandomSampler")
    line = refusal(prepared, "+sweep=search", *by_class, f"sweep.sampler.seed={seed}")
    assert line.startswith("sweep.sampler.seed: must be a whole number from 0 to 4294967295, got ")


def test_a_typed_seed_is_checked_too(prepared: Prepare) -> None:
    line = "sweep.sampler.seed: must be a whole number from 0 to 4294967295, got -1"
    assert refusal(prepared, "+sweep=search", "sweep.sampler.seed=-1") == line
    line = f"hydra.{line.replace('sweep.', 'sweeper.')}"
    node = WRITTEN_FOR_OPTUNA.replace("seed: 3", "seed: -1")
    assert refusal(prepared, "+sweep=default", TASK, files={"conf/config.yaml": node}) == line


@pytest.mark.parametrize("seed", [0, 4294967295])
def test_the_smallest_and_the_largest_seed_are_used(prepared: Prepare, seed: int) -> None:
    spec = prepared("+sweep=search", f"sweep.sampler.seed={seed}").spec
    assert spec.search is not None
    assert spec.search.seed == seed


@pytest.mark.parametrize(
    ("options", "multivariate", "group"),
    [
        ((), True, True),
        (("sweep.sampler.multivariate=false",), False, False),
        (("sweep.sampler.multivariate=null",), None, False),
        (("sweep.sampler.group=false",), True, False),
        (("sweep.sampler.multivariate=null", "sweep.sampler.group=true"), None, True),
    ],
)
def test_tpe_groups_parameters_where_it_models_them_jointly(
    prepared: Prepare, options: tuple[str, ...], multivariate: bool | None, group: bool
) -> None:
    """As far as nothing else is said: Optuna refuses the one without the other."""
    spec = prepared("+sweep=search", *options).spec
    assert spec.search is not None
    made: Any = samplers.build("tpe", spec.search.sampler.options, 1)
    assert isinstance(made, optuna.samplers.TPESampler)
    assert (made._multivariate, made._group) == (multivariate, group)


def test_tpe_that_is_told_to_group_but_not_to_model_jointly_is_refused(prepared: Prepare) -> None:
    options = ("sweep.sampler.multivariate=false", "sweep.sampler.group=true")
    assert "group" in refusal(prepared, "+sweep=search", *options)


# --- packages ------------------------------------------------------------------------------------------------


def without(monkeypatch: pytest.MonkeyPatch, *packages: str) -> None:
    """As if packages were not installed."""
    found = targets.importlib.util.find_spec
    monkeypatch.setattr(
        targets.importlib.util, "find_spec", lambda name: None if name in packages else found(name)
    )


@pytest.mark.parametrize(
    ("options", "missing", "line"),  # the line after sweep.sampler
    [
        ({"_target_": "optuna.samplers.CmaEsSampler"}, ("cmaes",),
         "._target_: optuna.samplers.CmaEsSampler needs the package cmaes: pip install cmaes"),
        ({"_target_": "optuna.samplers.GPSampler"}, ("torch",),
         "._target_: optuna.samplers.GPSampler needs the package torch: pip install torch"),
        ({"_target_": "optuna.samplers.GPSampler"}, ("scipy", "torch"),
         "._target_: optuna.samplers.GPSampler needs the packages scipy and torch: pip install scipy torch"),
        ({"_target_": "optuna.samplers.QMCSampler"}, ("scipy",),
         "._target_: optuna.samplers.QMCSampler needs the package scipy: pip install scipy"),
        ({"_target_": f"{MODULE}.Mine"}, ("cmaes",),
         f"._target_: {MODULE}.Mine needs the package cmaes: pip install cmaes"),
        ({"_target_": "optuna.samplers.PartialFixedSampler", "fixed_params": {"x": 1.0},
          "base_sampler": {"_target_": "optuna.samplers.CmaEsSampler"}}, ("cmaes",),
         ".base_sampler._target_: optuna.samplers.CmaEsSampler needs the package cmaes: pip install cmaes"),
    ],
)  # fmt: skip
def test_a_sampler_by_its_class_whose_package_is_missing_is_refused_with_the_pip_command(
    options: dict[str, Any], missing: tuple[str, ...], line: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Optuna imports it only when it first suggests something."""
    mine = ModuleType(MODULE)
    mine.Mine = type("Mine", (optuna.samplers.CmaEsSampler,), {"__module__": MODULE})  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, MODULE, mine)
    assert samplers.build("optuna", options, 1)
    without(monkeypatch, *missing)
    with pytest.raises(SweepError) as caught:
        samplers.build("optuna", options, 1)
    assert str(caught.value) == f"sweep.sampler{line}"


def test_a_pruner_by_its_class_whose_package_is_missing_is_refused_with_the_pip_command(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from repro_sweep.search import pruning

    without(monkeypatch, "scipy")
    with pytest.raises(SweepError, match=r"WilcoxonPruner needs the package scipy: pip install scipy$"):
        pruning.build(Chosen(name="optuna", options={"_target_": "optuna.pruners.WilcoxonPruner"}))


@pytest.mark.parametrize(
    ("source", "line"),
    [
        ("import nowhere.deep", "cannot be imported: No module named 'nowhere' (pip install nowhere)"),
        ("import skopt", "cannot be imported: No module named 'skopt' (pip install scikit-optimize)"),
        ("import repro_sweep.nowhere", "cannot be imported: No module named 'repro_sweep.nowhere'"),
        ("def __getattr__(name): import nowhere",
         "cannot be imported: No module named 'nowhere' (pip install nowhere)"),
        ("def Mine():\n    import nowhere", "Mine cannot be imported: No module named 'nowhere' (pip install nowhere)"),
    ],
)  # fmt: skip
def test_a_module_that_lacks_a_package_names_the_pip_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str, line: str
) -> None:
    """Wherever it imports it; not for a part of a package that is there."""
    (tmp_path / f"{MODULE}.py").write_text(source)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, MODULE, raising=False)
    with pytest.raises(SweepError) as caught:
        samplers.build("optuna", {"_target_": f"{MODULE}.Mine"}, 1)
    sys.modules.pop(MODULE, None)
    assert str(caught.value).endswith(line)


def test_a_module_that_is_not_there_may_have_to_be_installed() -> None:
    with pytest.raises(
        SweepError, match=r"no module 'nowhere'; .* \(if it is not installed: pip install nowhere\)$"
    ):
        targets.locate("nowhere.Sampler", "here")
    with pytest.raises(SweepError, match=r"no module 'Sampler'; it must be a dotted name .*\[:Class\]$"):
        targets.locate("Sampler", "here")


def test_a_package_of_optunahub_that_lacks_a_package_names_the_pip_command(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    hub = ModuleType("optunahub")

    def load_module(package: str) -> ModuleType:
        import nowhere_to_be_found  # type: ignore[import-not-found]  # noqa: F401

        raise AssertionError(package)

    hub.load_module = load_module  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "optunahub", hub)
    found = targets.importlib.util.find_spec
    monkeypatch.setattr(
        targets.importlib.util, "find_spec", lambda name: hub if name == "optunahub" else found(name)
    )
    line = r"from OptunaHub: No module named 'nowhere_to_be_found' \(pip install nowhere_to_be_found\)$"
    with pytest.raises(SweepError, match=line):
        targets.locate("hub:samplers/x", "here")


def test_the_extra_for_everything_has_all_that_samplers_and_pruners_need() -> None:
    """With the names that docs/search.md gives to the extras."""
    import tomllib

    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    [everything] = extras["all"]
    names = everything.partition("[")[2].rstrip("]").split(",")
    included = {line.partition(">")[0] for name in names for line in extras[name]}
    needed = {package for packages in targets.PACKAGES.values() for package in packages}
    assert included >= needed | {"optunahub"}
    documented = (ROOT / "docs" / "search.md").read_text()
    for name in ("cmaes", "gp", "hub", "scipy"):
        assert f"repro-sweep[{name}]" in documented


# --- the documentation ---------------------------------------------------------------------------------------


def test_the_example_of_the_documentation_is_the_file_that_it_names() -> None:
    heading = "conf/sweep/optimizer_search.yaml"
    text = (ROOT / "docs" / "search.md").read_text(encoding="utf-8")
    shown = text.partition(f"```yaml\n# {heading}\n")[2].partition("```")[0]
    _, _, file = (ROOT / heading).read_text(encoding="utf-8").partition("\n")
    assert shown == file
