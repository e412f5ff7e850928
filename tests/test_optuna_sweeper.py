"""Applications written for hydra-optuna-sweeper: how Hydra composes them, and what is made of their options."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from enum import Enum
from pathlib import Path
from textwrap import dedent
from typing import Any

import optuna
import pytest
import yaml
from helpers import MakeProject, run
from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import ConfigCompositionException
from omegaconf import DictConfig, OmegaConf, open_dict

from repro_sweep.config import custom_space, schema
from repro_sweep.config.optuna_samplers import DEFAULT_TRIALS
from repro_sweep.config.optuna_sweeper import Translation, results_yaml, translate
from repro_sweep.config.space import Space
from repro_sweep.errors import SweepError
from repro_sweep.search.samplers import build
from repro_sweep.states import Direction

Composed = Callable[..., DictConfig]
OURS = "hydra/sweeper=repro_sweep"
END_NOTICE = (
    "hydra.sweeper.params.x: range(-5.5, 5.5, step=0.5) excludes 5.5, as in Hydra;"
    " hydra-optuna-sweeper 1.2 included it"
)

SPHERE = {
    "app.py": """
        import hydra

        @hydra.main(version_base=None, config_path="conf", config_name="config")
        def sphere(cfg):
            return cfg.x**2 + cfg.y**2

        if __name__ == "__main__":
            sphere()
    """,
    "conf/config.yaml": """
        defaults:
          - override hydra/sweeper: optuna
          - override hydra/sweeper/sampler: tpe
        hydra:
          sweeper:
            sampler:
              seed: 123
            direction: minimize
            study_name: sphere
            storage: null
            n_trials: 12
            n_jobs: 1
            max_failure_rate: 0.0
            params:
              x: range(-5.5, 5.5, step=0.5)
              y: choice(-5 ,0 ,5)
        x: 1
        y: 1
    """,
}
MULTI_OBJECTIVE = {
    "app.py": """
        import hydra

        @hydra.main(version_base=None, config_path="conf", config_name="config")
        def binh_and_korn(cfg):
            return 4 * cfg.x**2 + 4 * cfg.y**2, (cfg.x - 5) ** 2 + (cfg.y - 5) ** 2

        if __name__ == "__main__":
            binh_and_korn()
    """,
    "conf/config.yaml": """
        defaults:
          - override hydra/sweeper: optuna
          - override hydra/sweeper/sampler: nsgaii
        hydra:
          sweeper:
            sampler:
              seed: 123
            direction: [minimize, minimize]
            study_name: multi-objective
            storage: null
            n_trials: 10
            n_jobs: 1
            params:
              x: range(0, 5, step=0.5)
              y: range(0, 3, step=0.5)
        x: 1
        y: 1
    """,
}
CUSTOM_SPACE = {
    "app.py": """
        import hydra

        @hydra.main(version_base=None, config_path="conf", config_name="config")
        def sphere(cfg):
            return cfg.w**2 + cfg.x**2 + cfg.y**2 + cfg.z**2

        def configure(cfg, trial):
            x = trial.params["x"]
            trial.suggest_float("z", x - cfg.max_z_difference_from_x, x + cfg.max_z_difference_from_x)
            trial.suggest_float("+w", 0.0, 1.0)

        if __name__ == "__main__":
            sphere()
    """,
    "conf/config.yaml": """
        defaults:
          - override hydra/sweeper: optuna
        hydra:
          sweeper:
            sampler:
              seed: 123
            direction: minimize
            study_name: custom-search-space
            storage: null
            n_trials: 8
            n_jobs: 1
            params:
              x: range(-5.5, 5.5, 0.5)
              y: choice(-5, 0, 5)
            custom_search_space: app.configure
        x: 1
        y: 1
        z: 100
        max_z_difference_from_x: 0.5
    """,
}


@pytest.fixture
def composed(tmp_path: Path) -> Iterator[Composed]:
    """Hydra's own composition of a config file."""
    schema.register()

    def make(text: str, *overrides: str) -> DictConfig:
        (tmp_path / "config.yaml").write_text(dedent(text), encoding="utf-8")
        with initialize_config_dir(version_base=None, config_dir=str(tmp_path)):
            return compose("config", list(overrides), return_hydra_config=True)

    yield make
    GlobalHydra.instance().clear()


def sweeper(**values: Any) -> DictConfig:
    """A ``hydra.sweeper`` node, as Hydra would compose it."""
    node = OmegaConf.merge(OmegaConf.structured(schema.SweeperConf), values)
    with open_dict(node):
        node.pop("defaults")  # which Hydra takes out
    config = OmegaConf.create({"sweeper": node})
    return config.sweeper


def refusal(**values: Any) -> str:
    """What translating a node is refused with, which is one line."""
    with pytest.raises(SweepError) as caught:
        translate(sweeper(**values))
    message = str(caught.value)
    assert "\n" not in message
    return message


# --- Hydra's composition -------------------------------------------------------------------------------------


def test_an_application_s_defaults_compose_with_our_sweeper_on_the_command_line(composed: Composed) -> None:
    """``override hydra/sweeper: optuna`` gives way to it, and the chosen sampler comes along."""
    config = composed(SPHERE["conf/config.yaml"], OURS)
    node = config.hydra.sweeper
    assert OmegaConf.get_type(node) is schema.SweeperConf
    assert config.hydra.runtime.choices["hydra/sweeper"] == "repro_sweep"
    assert node._target_ == "hydra_plugins.repro_sweep.sweeper.ReproSweeper"
    assert (node.sampler._target_, node.sampler.seed) == ("optuna.samplers.TPESampler", 123)
    assert (node.direction, node.study_name, node.n_trials, node.n_jobs) == ("minimize", "sphere", 12, 1)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("tpe", "tpe"), ("random", "random"), ("cmaes", "cmaes"), ("nsgaii", "nsgaii"), ("motpe", "tpe"),
        ("grid", "grid"), ("nsgaiii", "nsgaiii"), ("gp", "gp"), ("qmc", "qmc"),
    ],
)  # fmt: skip
def test_each_sampler_that_an_application_may_choose_becomes_one_of_ours(
    composed: Composed, name: str, expected: str
) -> None:
    """Those of all versions of the plugin; left as they are, they say nothing."""
    text = f"defaults: [override hydra/sweeper: optuna, override hydra/sweeper/sampler: {name}]"
    found = translate(composed(text, OURS).hydra.sweeper)
    assert found.sampler is not None
    assert found.sampler.name == expected
    assert found.search is (expected != "grid")
    assert found.notices == ()


def test_without_the_plugin_its_own_name_is_ours_and_a_search_of_its_default_length(
    composed: Composed,
) -> None:
    """An application whose command line is not changed either."""
    config = composed("defaults: [override hydra/sweeper: optuna]")
    found = translate(config.hydra.sweeper)
    assert config.hydra.sweeper._target_ == "hydra_plugins.repro_sweep.sweeper.ReproSweeper"
    assert found.search
    assert found.trials == DEFAULT_TRIALS == 20
    assert found.sampler is not None
    assert found.sampler.name == "tpe"


def test_options_of_the_plugin_that_is_there_are_kept() -> None:
    """Whoever registers them: ours only stand in."""
    store = ConfigStore.instance()
    schema.register()
    before = store.load("hydra/sweeper/sampler/tpe.yaml")
    store.store("tpe", {"_target_": "theirs"}, group="hydra/sweeper/sampler", provider="optuna_sweeper")
    try:
        schema.register()
        assert store.load("hydra/sweeper/sampler/tpe.yaml").node._target_ == "theirs"
        assert store.load("hydra/sweeper/sampler/random.yaml").provider == "repro_sweep"
    finally:
        store.store("tpe", before.node, group="hydra/sweeper/sampler", provider="repro_sweep")


def test_a_plain_application_composes_as_before(composed: Composed) -> None:
    """Its ``hydra.sweeper.params`` is a grid."""
    node = composed("{x: 1, hydra: {sweeper: {params: {x: '1,2'}}}}", OURS).hydra.sweeper
    assert translate(node) == Translation(search=False, params={"x": "1,2"})
    assert translate(composed("x: 1", OURS).hydra.sweeper) == Translation(search=False, params={})
    assert translate(composed("hydra: {sweeper: {params: null}}", OURS).hydra.sweeper).params == {}


def test_every_key_can_be_set_on_the_command_line(composed: Composed) -> None:
    """Without a sampler in the file, its seed too."""
    node = composed(
        "x: 1", OURS, "hydra.sweeper.n_trials=7", "hydra.sweeper.direction=[minimize,maximize]",
        "hydra.sweeper.sampler.seed=5", "hydra.sweeper.max_failure_rate=0.5", "hydra.sweeper.n_jobs=3",
        "hydra/sweeper/sampler=random",
    ).hydra.sweeper  # fmt: skip
    found = translate(node)
    assert found.sampler is not None
    assert (found.sampler.name, found.sampler.options["seed"]) == ("random", 5)
    assert (found.trials, found.max_failures, found.slots) == (7, 3, 3)
    seeded = translate(composed("x: 1", OURS, "hydra.sweeper.sampler.seed=5").hydra.sweeper)
    assert seeded.sampler is not None
    assert (seeded.sampler.name, seeded.sampler.options["seed"]) == ("tpe", 5)


@pytest.mark.parametrize("key", ["n_trails", "sampler.n_trials", "max_batch_sizes"])
def test_an_unknown_key_stays_an_error(composed: Composed, key: str) -> None:
    """On the command line, for the sweeper and for a chosen sampler."""
    with pytest.raises(ConfigCompositionException, match=key.rpartition(".")[2]):
        composed("x: 1", OURS, "hydra/sweeper/sampler=tpe", f"hydra.sweeper.{key}=3")


def test_an_unknown_key_in_the_file_stays_an_error(composed: Composed) -> None:
    """The schema's, as before."""
    with pytest.raises(ConfigCompositionException, match="n_trails"):
        composed("hydra: {sweeper: {n_trails: 3}}", OURS)


# --- the translation -----------------------------------------------------------------------------------------


def test_the_sample_application_is_translated(composed: Composed) -> None:
    """All that it says, and a word on its range's end."""
    found = translate(composed(SPHERE["conf/config.yaml"], OURS).hydra.sweeper)
    assert found.sampler is not None
    assert found.sampler.name == "tpe"
    assert found.sampler.options == {
        "n_startup_trials": 10, "n_ei_candidates": 24, "multivariate": True, "group": None,
        "constant_liar": True, "seed": 123,
    }  # fmt: skip
    assert found == Translation(
        search=True, params={"x": "range(-5.5, 5.5, step=0.5)", "y": "choice(-5 ,0 ,5)"},
        directions=(Direction.MINIMIZE,), trials=12, sampler=found.sampler, max_failures=0, slots=1, name="sphere",
        notices=(END_NOTICE,),
    )  # fmt: skip


@pytest.mark.parametrize(
    "key",
    ["n_trials", "direction", "sampler", "custom_search_space", "study_name", "storage", "search_space"],
)
def test_any_key_of_the_plugin_s_asks_for_a_search(key: str) -> None:
    """A grid application cannot have one: Hydra's own sweeper has no such key."""
    values: dict[str, Any] = {
        "n_trials": 5, "direction": "maximize", "sampler": {"_target_": "optuna.samplers.RandomSampler"},
        "custom_search_space": "m.f", "study_name": "s", "storage": "sqlite:///x.db",
        "search_space": {"x": {"type": "float", "low": 0, "high": 1}},
    }  # fmt: skip
    found = translate(sweeper(**{key: values[key]}))
    assert found.search
    assert found.sampler is not None
    assert found.sampler.name == ("random" if key == "sampler" else "tpe")


def test_an_interval_asks_for_a_search_in_the_file_and_on_the_command_line() -> None:
    """Since a grid cannot have one."""
    found = translate(sweeper(params={"x": "tag(log, interval(1, 2))"}))
    assert found.search
    assert found.notices == (
        "hydra.sweeper.params.x: an interval makes this a search, of 20 trials (hydra.sweeper.n_trials)",
    )
    assert translate(sweeper(params={"x": "1,2"}), ["x=interval(1,2)"]).search
    assert not translate(sweeper(params={"x": "1,2"}), ["x=range(1,3)", "y=4"]).search
    assert not translate(sweeper(params={"x": "interval(1,2)"}), ["x=1,2"]).search


def test_an_interval_does_not_turn_a_sweep_that_names_its_sampler_into_a_search() -> None:
    assert not translate(sweeper(params={"x": "interval(1,2)"}), sampler_is_named=True).search
    assert not translate(sweeper(), ["x=interval(1,2)"], sampler_is_named=True).search
    assert translate(sweeper(n_trials=5), ["x=interval(1,2)"], sampler_is_named=True).search


class Theirs(Enum):
    """As ``hydra_plugins.hydra_optuna_sweeper.config.Direction``."""

    minimize = 1
    maximize = 2


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("maximize", (Direction.MAXIMIZE,)),
        (Theirs.minimize, (Direction.MINIMIZE,)),
        (["minimize", "maximize"], (Direction.MINIMIZE, Direction.MAXIMIZE)),
        ([Theirs.maximize, "minimize"], (Direction.MAXIMIZE, Direction.MINIMIZE)),
        (None, ()),
    ],
)
def test_directions_are_taken_in_every_form(given: object, expected: tuple[Direction, ...]) -> None:
    """Strings, the plugin's enum, or a list of them."""
    assert translate(sweeper(direction=given)).directions == expected


@pytest.mark.parametrize(
    ("sampler", "name", "options"),
    [
        ({"seed": 3}, "tpe", {"seed": 3, "multivariate": True, "group": None}),
        ({"_target_": "optuna.samplers.TPESampler", "multivariate": False}, "tpe", {"multivariate": False}),
        ({"_target_": "optuna.samplers.MOTPESampler", "n_ehvi_candidates": 7}, "tpe", {"n_ei_candidates": 7}),
        ({"_target_": "optuna.samplers.CmaEsSampler", "use_separable_cma": True}, "cmaes", {"use_separable_cma": True}),
        ({"_target_": "optuna.samplers.NSGAIISampler", "population_size": 8}, "nsgaii", {"population_size": 8}),
        ({"_target_": "optuna.samplers.BruteForceSampler"}, "bruteforce", {"seed": None}),
        (
            {"_target_": "hydra_plugins.hydra_optuna_sweeper._impl.create_nsgaiii_sampler", "dividing_parameter": 4},
            "nsgaiii", {"dividing_parameter": 4},
        ),
        (
            {"_target_": "optuna.samplers.CmaEsSampler", "sigma0": 0.2, "x0": {"x": 1}, "seed": 4},
            "optuna", {"_target_": "optuna.samplers.CmaEsSampler", "sigma0": 0.2, "x0": {"x": 1}, "seed": 4},
        ),
        ({"_target_": "my.Sampler", "a": [1]}, "optuna", {"_target_": "my.Sampler", "a": [1], "seed": None}),
    ],
)  # fmt: skip
def test_a_sampler_by_its_class_becomes_ours_or_is_used_itself(
    sampler: dict[str, Any], name: str, options: dict[str, object]
) -> None:
    """With the options that were given."""
    found = translate(sweeper(sampler=sampler))
    assert found.sampler is not None
    assert found.sampler.name == name
    assert found.sampler.options.items() >= options.items()
    assert found.notices == ()


@pytest.mark.parametrize("name", ["tpe", "random", "nsgaii", "nsgaiii", "qmc", "motpe"])
def test_optuna_takes_what_a_sampler_is_translated_to(composed: Composed, name: str) -> None:
    """Its own class is made of it."""
    text = f"""
        defaults: [override hydra/sweeper: optuna, override hydra/sweeper/sampler: {name}]
        hydra: {{sweeper: {{sampler: {{seed: 1}}}}}}
    """
    found = translate(
        composed(
            text, OURS, *(["hydra.sweeper.sampler.multivariate=false"] if name == "tpe" else [])
        ).hydra.sweeper
    )
    assert found.sampler is not None
    assert isinstance(build(found.sampler.name, found.sampler.options, 1), optuna.samplers.BaseSampler)


def test_a_grid_of_so_many_trials_is_a_search_by_brute_force() -> None:
    """As Optuna's grid sampler it takes so many of the grid's points; without a number, it is a grid."""
    grid = {"_target_": "optuna.samplers.GridSampler", "_partial_": True}
    whole = translate(sweeper(sampler=grid, params={"x": "range(0,3)"}))
    assert whole.sampler is not None
    assert (whole.search, whole.sampler.name, whole.notices) == (False, "grid", ())
    some = translate(sweeper(sampler={**grid, "seed": 2}, n_trials=2, params={"x": "range(0,3)"}))
    assert some.sampler is not None
    assert (some.search, some.sampler.name, some.trials, some.notices) == (True, "bruteforce", 2, ())
    assert some.sampler.options["seed"] == 2


@pytest.mark.parametrize(
    ("rate", "trials", "expected"),
    [(0.0, 20, 0), (0.29, 100, 29), (0.5, 7, 3), (1.0, 10, 10), (0.25, None, 5), (None, 10, None)],
)
def test_a_rate_of_failures_becomes_their_number(
    rate: float | None, trials: int | None, expected: int | None
) -> None:
    """Rounded down, in decimals; of the default number of trials where none is given."""
    assert translate(sweeper(max_failure_rate=rate, n_trials=trials)).max_failures == expected


@pytest.mark.parametrize(
    ("distribution", "values"),
    [
        ({"type": "int", "low": 1, "high": 4}, [1, 2, 3, 4]),
        ({"type": "int", "low": 1, "high": 6, "step": 2}, [1, 3, 5]),
        ({"type": "float", "low": 0, "high": 1, "step": 0.25}, [0.0, 0.25, 0.5, 0.75, 1.0]),
        ({"type": "float", "low": 0.0, "high": 0.3, "step": 0.1}, [0.0, 0.1, 0.2, 0.3]),
        ({"type": "categorical", "choices": ["a, b", 1, True, None]}, ["a, b", 1, True, None]),
    ],
)
def test_a_distribution_of_the_old_search_space_keeps_its_values(
    distribution: dict[str, Any], values: list[Any]
) -> None:
    """Its upper end included, unlike a range's."""
    found = translate(sweeper(search_space={"x": distribution}))
    points = list(Space(hydra_params=dict(found.params)))  # type: ignore[arg-type]
    got = [point.params["x"] for point in points]
    assert got == pytest.approx(values) if distribution["type"] == "float" else got == values
    assert found.notices == ()


@pytest.mark.parametrize(
    ("distribution", "text"),
    [
        ({"type": "float", "low": 0, "high": 1}, "interval(0.0,1.0)"),
        ({"type": "float", "low": 1e-5, "high": 1, "log": True}, "tag(log,interval(1e-05,1.0))"),
        ({"type": "int", "low": 1, "high": 64, "log": True}, "tag(int,log,interval(1,64))"),
    ],
)
def test_a_continuous_distribution_becomes_an_interval(distribution: dict[str, Any], text: str) -> None:
    """A tagged one where it is logarithmic."""
    params = translate(sweeper(search_space={"x": distribution})).params
    assert params == {"x": text}
    assert Space(hydra_params=dict(params), search=True).parameters()  # type: ignore[arg-type]


def test_interpolations_are_resolved_but_in_params(composed: Composed) -> None:
    """Those are for the trial's config to resolve."""
    text = """
        seed: 4
        hydra: {sweeper: {sampler: {seed: "${seed}"}, study_name: "s${seed}", params: {x: "${seed},2"}}}
    """
    found = translate(composed(text, OURS).hydra.sweeper)
    assert found.sampler is not None
    assert (found.sampler.options["seed"], found.name, found.params) == (4, "s4", {"x": "${seed},2"})


# --- notices -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "notice"),
    [
        (
            {"storage": "sqlite:///x.db"},
            "hydra.sweeper.storage: not used: the sweep's ledger takes its place",
        ),
        (
            {"sampler": {"consider_endpoints": True}},
            "hydra.sweeper.sampler.consider_endpoints: not used: Optuna 5 has deprecated it",
        ),
        (
            {"sampler": {"constraints_func": "m.f"}},
            "hydra.sweeper.sampler.constraints_func: not used: sweep.constraints takes its place",
        ),
        (
            {"sampler": {"_target_": "optuna.samplers.CmaEsSampler", "restart_strategy": "ipop"}},
            "hydra.sweeper.sampler.restart_strategy: not used: Optuna 5 ignores it",
        ),
        (
            {"search_space": {"x": {"type": "int", "low": 1, "high": 2}}, "params": {"x": "1,2"}},
            "hydra.sweeper.search_space: not used: hydra.sweeper.params takes its place",
        ),
        (
            {"study_name": "my study/1"},
            "hydra.sweeper.study_name: 'my study/1' cannot be a sweep's name; it is called 'my-study-1'",
        ),
        (
            {"n_trials": 3, "params": {"x": "range(1,3)"}},
            "hydra.sweeper.params.x: range(1,3) excludes 3, as in Hydra; hydra-optuna-sweeper 1.2 included it",
        ),
    ],
)
def test_what_has_no_equivalent_is_named_in_one_line(values: dict[str, Any], notice: str) -> None:
    """Each by the name it has in the file."""
    assert translate(sweeper(**values)).notices == (notice,)


def test_what_has_its_default_is_not_named() -> None:
    """Such as where a file repeats all that the plugin's ``--cfg`` shows."""
    defaults = {
        "_target_": "optuna.samplers.TPESampler", "seed": 1, "consider_prior": True, "prior_weight": 1.0,
        "consider_magic_clip": True, "consider_endpoints": False, "n_startup_trials": 10, "n_ei_candidates": 24,
        "multivariate": False, "warn_independent_sampling": True,
    }  # fmt: skip
    assert translate(sweeper(sampler=defaults, storage=None, n_trials=20)).notices == ()


@pytest.mark.parametrize(
    "text", ["range(0,10,3)", "shuffle(range(1,3))", "choice(1,3)", "interval(1,3)", "range(0,1,0.3)"]
)
def test_a_range_that_means_the_same_is_not_named(text: str) -> None:
    """Its end is no value of it, or its order is drawn."""
    assert translate(sweeper(n_trials=3, params={"x": text})).notices == ()


def test_a_range_on_the_command_line_is_named_in_place_of_the_file_s() -> None:
    """It is the one that is used."""
    found = translate(sweeper(n_trials=3, params={"x": "range(1,3)"}), ["x=range(0,1,0.1)", "+y=range(1)"])
    assert found.notices == (
        "command line, x: range(0,1,0.1) excludes 1, as in Hydra; hydra-optuna-sweeper 1.2 included it",
        "command line, y: range(1) excludes 1, as in Hydra; hydra-optuna-sweeper 1.2 included it",
    )


# --- bad input -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"direction": "up"},
            "hydra.sweeper.direction: must be maximize or minimize, or a list of them, got 'up'",
        ),
        (
            {"direction": []},
            "hydra.sweeper.direction: must be maximize or minimize, or a list of them, got []",
        ),
        ({"n_trials": 0}, "hydra.sweeper.n_trials: must be at least 1, got 0"),
        ({"n_jobs": -1}, "hydra.sweeper.n_jobs: must be at least 1, got -1"),
        ({"max_failure_rate": 1.5}, "hydra.sweeper.max_failure_rate: must be from 0 to 1, got 1.5"),
        (
            {"sampler": "tpe"},
            "hydra.sweeper.sampler: must be a mapping with _target_ (or choose hydra/sweeper/sampler=tpe), got 'tpe'",
        ),
        (
            {"sampler": {"_target_": 3}},
            "hydra.sweeper.sampler._target_: must be the dotted name of a sampler, got 3",
        ),
        (
            {"sampler": {"_target_": "optuna.samplers.RandomSampler", "sead": 3}},
            "hydra.sweeper.sampler.sead: not an option of random (seed)",
        ),
        (
            {"sampler": {"n_startup_trials": "many"}},
            "hydra.sweeper.sampler.n_startup_trials: Value 'many' of type 'str' could not be converted to Integer",
        ),
        (
            {"sampler": {"_target_": "optuna.samplers.GridSampler", "search_space": {"x": [1]}}},
            "hydra.sweeper.sampler.search_space: not an option of grid (seed)",
        ),
        (
            {"search_space": {"x": {"type": "bool"}}},
            "hydra.sweeper.search_space.x.type: must be int, float or categorical, got 'bool'",
        ),
        (
            {"search_space": {"x": {"type": "int", "low": "a", "high": 3}}},
            "hydra.sweeper.search_space.x.low: must be a number, got 'a'",
        ),
        (
            {"search_space": {"x": {"type": "categorical"}}},
            "hydra.sweeper.search_space.x.choices: must be a list of values, got None",
        ),
        (
            {"search_space": {"x": {"kind": "int"}}},
            "hydra.sweeper.search_space.x.kind: not a key of a distribution (type, choices, low, high, log, step)",
        ),
        (
            {"search_space": {"x": 3}},
            "hydra.sweeper.search_space.x: must be a mapping of type, choices, low, high, log, step, got 3",
        ),
        ({"study_name": "${nowhere}"}, "hydra.sweeper.study_name: Interpolation key 'nowhere' not found"),
    ],
)
def test_a_wrong_value_is_one_line_that_names_it(values: dict[str, Any], message: str) -> None:
    """Where it stands, what is allowed, what was got."""
    assert refusal(**values) == message


# --- custom_search_space -------------------------------------------------------------------------------------

MODULE = """
    taken = []

    def configure(cfg, trial):
        taken.append(cfg)
        x = trial.params["x"]
        trial.suggest_float("z", x - cfg.distance, x + cfg.distance)

    def one(cfg): ...

    def broken(cfg, trial):
        raise KeyError("x")

    number = 3
"""


@pytest.fixture
def user_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The name of an importable module."""
    (tmp_path / "of_the_users.py").write_text(dedent(MODULE), encoding="utf-8")
    (tmp_path / "not-importable.py").write_text("import nowhere_to_be_found", encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    yield "of_the_users"
    sys.modules.pop("of_the_users", None)


@pytest.mark.parametrize(
    "dotted", ["of_the_users.configure", ".of_the_users.configure", "__main__.configure"]
)
def test_a_custom_space_extends_a_trial_with_the_config(user_module: str, dotted: str) -> None:
    """With Optuna's own trial, by the forms that the plugin takes."""
    config = OmegaConf.create({"distance": 0.5})
    extend = custom_space.bind(dotted, config, "here", main=user_module)
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=1))
    trial = study.ask()
    x = trial.suggest_float("x", 0, 1)
    extend(trial)
    assert sys.modules[user_module].taken == [config]
    assert set(trial.params) == {"x", "z"}
    assert abs(trial.params["z"] - x) <= 0.5


@pytest.mark.parametrize(
    ("dotted", "message"),
    [
        (
            "of_the_users.number",
            "here: must be the dotted name of a function, but of_the_users.number is a int",
        ),
        (
            "of_the_users.one",
            "here: of_the_users.one must take two arguments, the config and the trial; it is one(cfg)",
        ),
        ("of_the_users.none", "here: Error loading 'of_the_users.none'"),
        ("not-importable.f", "No module named 'nowhere_to_be_found'"),
        ("nowhere.f", "Are you sure that module 'nowhere' is installed?"),
        ("", "here: Empty path"),
        ("a..b", "here: Error loading 'a..b': invalid dotstring."),
    ],
)
def test_a_custom_space_that_cannot_be_called_is_one_line(
    user_module: str, dotted: str, message: str
) -> None:
    """Before anything starts."""
    with pytest.raises(SweepError) as caught:
        custom_space.resolve(dotted, "here")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_what_a_custom_space_raises_is_told_in_one_line(user_module: str) -> None:
    """With the kind of error."""
    extend = custom_space.bind(f"{user_module}.broken", OmegaConf.create({}), "here")
    with pytest.raises(SweepError, match=r"^here: of_the_users\.broken failed: KeyError: 'x'$"):
        extend(None)


# --- the results' file ---------------------------------------------------------------------------------------


def test_the_results_file_has_the_plugin_s_keys() -> None:
    """Of the best point, or of the Pareto front."""
    best = [({"x": 0.5, "+db": "a b"}, [1.5, 2.0]), ({"x": 1}, [1.0, 3.0])]
    assert yaml.safe_load(results_yaml(best[:1])) == {
        "name": "optuna", "best_params": {"x": 0.5, "+db": "a b"}, "best_value": 1.5,
    }  # fmt: skip
    assert yaml.safe_load(results_yaml(best, 2)) == {
        "name": "optuna",
        "solutions": [
            {"params": {"x": 0.5, "+db": "a b"}, "values": [1.5, 2.0]},
            {"params": {"x": 1}, "values": [1.0, 3.0]},
        ],
    }


# --- applications, as their users run them -------------------------------------------------------------------


def test_a_single_job_of_the_application_runs_without_the_plugin(make_bare_project: MakeProject) -> None:
    """Its defaults name the plugin's options, which Hydra must find even then."""
    project = make_bare_project(SPHERE)
    done = run("app.py", "x=2", cwd=project.root, python=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("changed", [True, False])
def test_a_sphere_written_for_the_plugin_runs_unchanged(make_project: MakeProject, changed: bool) -> None:
    """With our sweeper on the command line, and with the command line unchanged too."""
    project = make_project(SPHERE)
    done = project.run("app.py", "--multirun", *([OURS] if changed else []), python=True)
    assert done.returncode == 0, done.stderr
    assert END_NOTICE in done.stderr
    assert ("hydra-optuna-sweeper is not installed" in done.stderr) is not changed
    trials = project.sweep("sphere").trials
    assert len(trials) == 12
    values = [trial.params["x"] ** 2 + trial.params["y"] ** 2 for trial in trials]  # type: ignore[operator]
    results = yaml.safe_load((project.root / "multirun" / "sphere" / "optimization_results.yaml").read_text())
    assert results["best_value"] == pytest.approx(min(values))


def test_a_class_of_the_plugin_s_in_the_file_is_ours(make_bare_project: MakeProject) -> None:
    """Many an application's YAML repeats ``_target_``. Hydra makes no sampler: Optuna 5 has none of this name."""
    named = "_target_: hydra_plugins.hydra_optuna_sweeper.optuna_sweeper.OptunaSweeper"
    config = SPHERE["conf/config.yaml"].replace(
        "direction: minimize", f"direction: minimize\n            {named}"
    )
    assert named in config
    project = make_bare_project({**SPHERE, "conf/config.yaml": config})
    options = (OURS, "hydra/sweeper/sampler=motpe", "hydra.sweeper.plan=true")
    done = run("app.py", "--multirun", *options, cwd=project.root, python=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout
    assert not (project.root / "multirun").exists()


@pytest.mark.slow
def test_several_objectives_written_for_the_plugin_run_unchanged(make_project: MakeProject) -> None:
    """The task returns a tuple; the results are the Pareto front."""
    project = make_project(MULTI_OBJECTIVE)
    done = project.run("app.py", "--multirun", OURS, python=True)
    assert done.returncode == 0, done.stderr
    assert len(project.sweep("multi-objective").trials) == 10
    path = project.root / "multirun" / "multi-objective" / "optimization_results.yaml"
    solutions = yaml.safe_load(path.read_text())["solutions"]
    assert solutions
    for one in solutions:
        x, y = one["params"]["x"], one["params"]["y"]
        assert one["values"] == pytest.approx([4 * x**2 + 4 * y**2, (x - 5) ** 2 + (y - 5) ** 2])


@pytest.mark.slow
def test_a_custom_space_written_for_the_plugin_runs_unchanged(make_project: MakeProject) -> None:
    """Its parameters are overrides of the trials, with a ``+`` where their names have one."""
    project = make_project(CUSTOM_SPACE)
    done = project.run("app.py", "--multirun", OURS, python=True)
    assert done.returncode == 0, done.stderr
    trials = project.sweep("custom-search-space").trials
    assert len(trials) == 8
    for trial in trials:
        assert abs(trial.params["z"] - trial.params["x"]) <= 0.5  # type: ignore[operator]
        assert 0 <= trial.params["w"] <= 1  # type: ignore[operator]
