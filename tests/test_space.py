"""The space of a sweep: its points and their order, against Hydra's own sweeper where that can express it."""

from __future__ import annotations

import itertools
import random
import sys
import time
import tracemalloc
from importlib.metadata import EntryPoint, EntryPoints
from pathlib import Path
from types import ModuleType

import pytest
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra._internal.utils import create_config_search_path
from hydra.core.config_loader import ConfigLoader
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.plugins import Plugins
from hydra.errors import HydraException
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

from repro_sweep import plugins
from repro_sweep.config.space import Space
from repro_sweep.errors import SpaceError
from repro_sweep.points import Point
from repro_sweep.search import base
from repro_sweep.search.grid import GridConf, GridSearcher
from repro_sweep.states import TrialState

QUICK = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])


@pytest.fixture(scope="module")
def loader(tmp_path_factory: pytest.TempPathFactory) -> ConfigLoader:
    """Hydra's own loader over a tree with the groups ``db`` and ``model/cell``."""
    conf = tmp_path_factory.mktemp("conf")
    for option in ("db/mysql", "db/mysql_8", "db/postgres", "model/cell/lstm", "model/cell/gru"):
        file = conf / f"{option}.yaml"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("x: 1\n")
    (conf / "config.yaml").write_text("x: 1\n")
    Plugins.instance()
    return ConfigLoaderImpl(config_search_path=create_config_search_path(str(conf)))


def hydra_points(
    overrides: list[str], params: dict[str, str], loader: ConfigLoader | None = None
) -> list[list[str]]:
    """What BasicSweeper hands to its launcher (its ``sweep`` without the launching)."""
    lines = [f"{key}={value}" for key, value in params.items()] + overrides
    parsed = OverridesParser.create(config_loader=loader).parse_overrides(lines)
    (batch,) = BasicSweeper.split_arguments(parsed, None)
    return batch


def points(**kwargs: object) -> list[list[str]]:
    return [list(point.overrides) for point in Space(**kwargs)]  # type: ignore[arg-type]


def lines(**kwargs: object) -> list[str]:
    return [" ".join(point) for point in points(**kwargs)]


def message(**kwargs: object) -> str:
    """The one line that the space is refused with."""
    with pytest.raises(SpaceError) as caught:
        list(Space(**kwargs))  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)
    return str(caught.value)


# --- Hydra's own sweeps ---------------------------------------------------------------------------------

scalars = st.one_of(
    st.integers(-5, 5).map(str),
    st.floats(allow_nan=False, width=32).map(str),
    st.sampled_from(
        ["a", "b", "lstm", "null", "true", "False", "inf", "1e-3", "a b", "x:y", "${lr}", "a/b.c", ""]
    ),
    st.text(st.characters(codec="utf-8", exclude_characters="'\\"), max_size=4).map(lambda text: f"'{text}'"),
    st.sampled_from(
        ["'it\\'s'", '"é, ü"', "'\\\\'", "a\\,b", "[]", "[1,'x, y',[z]]", "{a:1,b:{c:[d]}}", "{}"]
    ),
)
elements = scalars.filter(bool)
lists = st.lists(elements, min_size=1, max_size=4).map(",".join)
numbers = st.lists(st.integers(-9, 9).map(str), min_size=2, max_size=4).map(",".join)
ranges = st.one_of(
    st.tuples(st.integers(-3, 3), st.integers(4, 7), st.integers(1, 3)).map(
        lambda r: f"range({r[0]},{r[1]},{r[2]})"
    ),
    st.tuples(st.integers(-3, 3), st.integers(4, 7)).map(lambda r: f"range({r[0]}.0, {r[1]}, 0.7)"),
    st.sampled_from(["range(3)", "range(5,1,-2)", "range(start=1,stop=4)"]),
)
sweeps = st.one_of(
    scalars,
    lists,
    ranges,
    lists.map("choice({})".format),
    st.one_of(lists.map("choice({})".format), ranges).map("tag(t1, t2, {})".format),
    st.one_of(lists, ranges).map("shuffle({})".format),
    st.one_of(numbers, ranges).map("sort({})".format),
    numbers.map("sort({}, reverse=true)".format),
    numbers.map("shuffle([{}])".format),
    st.tuples(st.sampled_from(["int", "float", "str", "bool"]), numbers).map(lambda c: f"{c[0]}({c[1]})"),
    ranges.map("float({})".format),
)
keys = st.sampled_from(
    ["a", "b", "opt.lr", "+a", "++a", "+new.key", "~b", "db", "db@src", "+db@_global_", "model/cell"]
)
assignments = st.one_of(
    st.tuples(keys, sweeps).map("=".join),
    st.sampled_from(["~a", "~opt.lr", "~db@src"]),
    st.sampled_from(
        ["db=glob(*)", "+db@src=glob(my*)", "model/cell=glob([l*,g*], exclude=lstm)", "db@x=glob(m*)"]
    ),
)


@QUICK
@given(
    overrides=st.lists(assignments, max_size=4),
    params=st.dictionaries(keys, sweeps, max_size=2),
    seed=st.integers(0, 99),
)
def test_points_and_their_order_are_those_of_hydras_basic_sweeper(
    loader: ConfigLoader, overrides: list[str], params: dict[str, str], seed: int
) -> None:
    random.seed(seed)
    try:
        expected = hydra_points(overrides, params, loader)
    except HydraException:
        with pytest.raises(SpaceError):
            points(overrides=overrides, hydra_params=params, config_loader=loader)
        return
    random.seed(seed)
    space = Space(overrides=overrides, hydra_params=params, config_loader=loader)
    assert [list(point.overrides) for point in space] == expected
    assert space.size == len(space) == len(expected)
    assert [list(point.overrides) for point in space] == expected  # again, without drawing again


@QUICK
@given(st.dictionaries(keys, sweeps, max_size=3), st.integers(0, 99))
def test_params_with_grammar_strings_are_hydras_own_params(params: dict[str, str], seed: int) -> None:
    assume(len({key.strip("+~") for key in params}) == len(params))
    assume(not any(value.startswith("shuffle([") for value in params.values()))  # drawn while parsing
    random.seed(seed)
    try:
        expected = hydra_points([], params)
    except HydraException:
        message(params=params)
    else:
        random.seed(seed)
        assert points(params=params) == expected


@QUICK
@given(st.text("a1,.()[]{}'\"\\=: $+~@/-é\n", max_size=12))
def test_any_text_is_taken_as_hydra_takes_it_or_refused_with_a_space_error(text: str) -> None:
    try:
        expected = hydra_points([text], {})
    except HydraException:
        message(overrides=[text])
    else:
        assert points(overrides=[text]) == expected


def test_shuffle_draws_as_hydra_does_under_the_same_seed() -> None:
    overrides = [
        "a=shuffle(range(20))",
        "b=shuffle(1,2,3,4,5)",
        "a=shuffle(range(9))",
        "c=shuffle([1,2,3,4,5])",
    ]
    random.seed(7)
    expected = hydra_points(overrides, {})
    random.seed(7)
    assert points(overrides=overrides) == expected


def test_no_params_at_all_is_one_point() -> None:
    assert points() == [[]]
    assert points(params={}, repeats={}) == [[]]


def test_a_point_tells_its_swept_values_as_plain_python_values() -> None:
    (point, *_) = Space(
        params={"+opt.lr": "0.1,0.01", "name": "'a, b'", "shape": "[1,'x']"},
        overrides=["++db@src=x,y", "fixed=1"],
        repeats={"seed": "range(3)"},
    )
    assert point.params == {"opt.lr": 0.1, "name": "a, b", "shape": [1, "x"], "db@src": "x"}
    assert point.repeat == {"seed": 0}
    assert list(point.overrides) == [
        "+opt.lr=0.1",
        "name='a, b'",
        "shape=[1,'x']",
        "++db@src=x",
        "fixed=1",
        "seed=0",
    ]


# --- YAML values ----------------------------------------------------------------------------------------

json_keys = st.one_of(
    st.from_regex(r"[a-z][a-z_]{0,3}", fullmatch=True).filter(
        lambda key: key not in ("nan", "inf", "true", "null")
    ),
    st.integers(),
)
json_values = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False), st.text()),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(json_keys, inner, max_size=3)),
    max_leaves=6,
)


@QUICK
@given(st.lists(json_values, min_size=1, max_size=3))
def test_what_stands_in_a_yaml_list_reaches_hydra_exactly(values: list[object]) -> None:
    space = list(Space(params={"x": values}))
    assert repr([point.params["x"] for point in space]) == repr(values)
    parsed = [OverridesParser.create().parse_override(point.overrides[0]).value() for point in space]
    assert repr(parsed) == repr(values)


def test_plain_names_in_a_yaml_list_stay_without_quotes_so_that_paths_made_of_overrides_look_as_usual() -> (
    None
):
    assert lines(params={"db": ["mysql", "my/sql-8.0", "true", "1", "a b"]}) == [
        "db=mysql",
        "db=my/sql-8.0",
        "db='true'",
        "db='1'",
        "db='a b'",
    ]


@pytest.mark.parametrize(
    ("value", "expected"),
    [(0.1, "x=0.1"), (True, "x=True"), (None, "x=null"), (3, "x=3"), ("", "x="), (" 1\n", "x=1")],
)
def test_a_yaml_scalar_is_one_value(value: object, expected: str) -> None:
    assert lines(params={"x": value}) == [expected]


def test_omegaconfs_containers_are_taken_unresolved() -> None:
    config = OmegaConf.create({"lr": [0.1, "${base}"], "m": {"a": {"x": "1,2"}, 3: None}})
    assert lines(params=config, exclude=OmegaConf.create([{"x": 2}])) == [
        "lr=0.1 m=a x=1",
        "lr=0.1 m=3",
        "lr='${base}' m=a x=1",
        "lr='${base}' m=3",
    ]


# --- nested conditions, unions, zip, exclude, repeats ---------------------------------------------------

OPTIMIZERS = {
    "optimizer": {
        "SGD": {"optimizer.lr": "0.1,0.01", "optimizer.momentum": "0,0.9"},
        "Adam": {"optimizer.lr": "0.01,0.001", "optimizer.beta1": "0.9"},
        "Rprop": None,
    },
    "model": "lstm,gru",
}


def test_what_stands_under_a_choice_exists_only_with_it_and_varies_faster() -> None:
    space = Space(params=OPTIMIZERS)
    assert [" ".join(point.overrides).replace("optimizer.", "") for point in space] == [
        "optimizer=SGD lr=0.1 momentum=0 model=lstm",
        "optimizer=SGD lr=0.1 momentum=0 model=gru",
        "optimizer=SGD lr=0.1 momentum=0.9 model=lstm",
        "optimizer=SGD lr=0.1 momentum=0.9 model=gru",
        "optimizer=SGD lr=0.01 momentum=0 model=lstm",
        "optimizer=SGD lr=0.01 momentum=0 model=gru",
        "optimizer=SGD lr=0.01 momentum=0.9 model=lstm",
        "optimizer=SGD lr=0.01 momentum=0.9 model=gru",
        "optimizer=Adam lr=0.01 beta1=0.9 model=lstm",
        "optimizer=Adam lr=0.01 beta1=0.9 model=gru",
        "optimizer=Adam lr=0.001 beta1=0.9 model=lstm",
        "optimizer=Adam lr=0.001 beta1=0.9 model=gru",
        "optimizer=Rprop model=lstm",
        "optimizer=Rprop model=gru",
    ]
    assert space.size == 14


def test_conditions_nest_to_any_depth_and_choices_may_be_any_yaml_scalar() -> None:
    params = {
        "s": "1,2",
        "k": {1: {"l": {True: {"m": {None: {"n": "x,y"}, 0.5: {}}}, "no": None}}, "'a, b'": {"z": 3}},
    }
    expected = [
        "k=1 l=True m=null n=x",
        "k=1 l=True m=null n=y",
        "k=1 l=True m=0.5",
        "k=1 l=no",
        "k='a, b' z=3",
    ]
    assert lines(params=params) == [f"s={s} {rest}" for s in (1, 2) for rest in expected]


trees = st.recursive(
    st.lists(st.integers(0, 9), min_size=1, max_size=3, unique=True),
    lambda inner: st.dictionaries(
        st.integers(0, 9), st.one_of(st.none(), st.lists(inner, max_size=2)), min_size=1, max_size=3
    ),
    max_leaves=8,
)


@QUICK
@given(st.lists(trees, max_size=3))
def test_a_tree_of_conditions_expands_as_the_plain_recursive_definition_says(forest: list[object]) -> None:
    counter = itertools.count()

    def build(forest: list[object]) -> tuple[dict[str, object], list[list[str]]]:
        params: dict[str, object] = {}
        expected: list[list[str]] = [[]]
        for tree in forest:
            key = f"k{next(counter)}"
            alternatives: list[list[str]] = []
            if isinstance(tree, list):
                params[key] = tree
                alternatives = [[f"{key}={value}"] for value in tree]
            else:
                assert isinstance(tree, dict)
                nested = {}
                for name, inner in tree.items():
                    nested[name], rests = build(inner or [])
                    alternatives += [[f"{key}={name}", *rest] for rest in rests]
                params[key] = nested
            expected = [head + tail for head in expected for tail in alternatives]
        return params, expected

    params, expected = build(forest)
    space = Space(params=params)
    assert [list(point.overrides) for point in space] == expected
    assert space.size == len(expected)


def test_a_list_of_params_is_a_union_in_order() -> None:
    space = Space(params=[{"a": "1,2"}, None, {"b": 3}], overrides=["x=0"], repeats={"seed": "1,2"})
    assert [" ".join(point.overrides) for point in space] == [
        "a=1 x=0 seed=1",
        "a=1 x=0 seed=2",
        "a=2 x=0 seed=1",
        "a=2 x=0 seed=2",
        "x=0 seed=1",
        "x=0 seed=2",
        "b=3 x=0 seed=1",
        "b=3 x=0 seed=2",
    ]
    assert space.size == 8


def test_zipped_keys_advance_together_at_the_position_of_the_first() -> None:
    params = {"a": "1,2", "w": "10,20", "b": "x,y", "d": {3: {"e": "5,6"}, 4: None}}
    assert lines(params=params, zip_=[["d", "w"]]) == [
        f"a={a} {rest} b={b}"
        for a in (1, 2)
        for rest in ("w=10 d=3 e=5", "w=10 d=3 e=6", "w=20 d=4")
        for b in ("x", "y")
    ]


def test_zip_works_under_a_choice_in_a_union_among_repeats_and_on_the_command_line() -> None:
    assert lines(params={"o": {"A": {"x": "1,2", "y": "3,4"}, "B": {"x": "5,6"}}}, zip_=[["x", "y"]]) == [
        "o=A x=1 y=3",
        "o=A x=2 y=4",
        "o=B x=5",
        "o=B x=6",
    ]
    assert lines(params=[{"x": "1,2", "y": "3,4"}, {"y": "5,6"}], zip_=[["y", "x"]]) == [
        "x=1 y=3",
        "x=2 y=4",
        "y=5",
        "y=6",
    ]
    assert lines(repeats={"seed": "range(2)", "fold": "range(2)"}, zip_=[["seed", "fold"]]) == [
        "seed=0 fold=0",
        "seed=1 fold=1",
    ]
    assert lines(overrides=["+x=1,2", "y=3,4"], zip_=[["x", "y"]]) == ["+x=1 y=3", "+x=2 y=4"]


def test_a_zipped_key_that_the_command_line_pins_leaves_its_zip() -> None:
    params = {"x": "1,2", "y": "3,4", "z": "5,6"}
    assert lines(params=params, zip_=[["x", "y", "z"]], overrides=["y=0"]) == ["x=1 z=5 y=0", "x=2 z=6 y=0"]
    assert lines(params=params, zip_=[["x", "y"]], overrides=["y=0", "z=7"]) == ["x=1 y=0 z=7", "x=2 y=0 z=7"]


def test_exclude_drops_the_points_that_have_one_of_the_values_for_every_key_named() -> None:
    exclude = [
        {"optimizer.lr": "0.1,0.001", "model": "gru"},
        {"optimizer": "SGD", "optimizer.momentum": 0.90},
        {"seed": 2, "model": ["lstm"]},
    ]
    kept = lines(params=OPTIMIZERS, exclude=exclude, repeats={"seed": "1,2"})
    assert [line.replace("optimizer.", "") for line in kept] == [
        "optimizer=SGD lr=0.1 momentum=0 model=lstm seed=1",
        "optimizer=SGD lr=0.01 momentum=0 model=lstm seed=1",
        "optimizer=SGD lr=0.01 momentum=0 model=gru seed=1",
        "optimizer=SGD lr=0.01 momentum=0 model=gru seed=2",
        "optimizer=Adam lr=0.01 beta1=0.9 model=lstm seed=1",
        "optimizer=Adam lr=0.01 beta1=0.9 model=gru seed=1",
        "optimizer=Adam lr=0.01 beta1=0.9 model=gru seed=2",
        "optimizer=Adam lr=0.001 beta1=0.9 model=lstm seed=1",
        "optimizer=Rprop model=lstm seed=1",
        "optimizer=Rprop model=gru seed=1",
        "optimizer=Rprop model=gru seed=2",
    ]


@pytest.mark.parametrize(
    ("values", "excluded", "kept"),
    [
        ([1, True, "1", 2], 1.0, ["True", "'1'", "2"]),
        ([1, True, "1"], True, ["1", "'1'"]),
        ([1, "1"], "'1'", ["1"]),
        ([None, "null"], None, ["'null'"]),
        ([float("nan"), 1], float("nan"), ["1"]),
        ([[1, "a"], [1, "b"]], [[1, "a"]], ["[1,b]"]),
        ([{"a": 1, "b": 2}, {}], "{b:2,a:1}", ["{}"]),
    ],
)
def test_exclude_tells_values_apart_as_yaml_does(
    values: list[object], excluded: object, kept: list[str]
) -> None:
    assert lines(params={"x": values}, exclude=[{"x": excluded}]) == [f"x={value}" for value in kept]


def test_fixed_overrides_can_be_named_in_exclude() -> None:
    assert lines(params={"x": "1,2"}, overrides=["mode=fast"], exclude=[{"mode": "fast", "x": 1}]) == [
        "x=2 mode=fast"
    ]


# --- the command line together with params --------------------------------------------------------------


def test_an_override_replaces_the_values_of_its_axis_wherever_the_axis_exists() -> None:
    params = {"o": {"A": {"x": "1,2", "y": 1}, "B": {"z": 3}, "C": {"x": 4}}, "m": "u,v"}
    assert lines(params=params, overrides=["x=9", "m=w"]) == ["o=A x=9 y=1 m=w", "o=B z=3 m=w", "o=C x=9 m=w"]
    assert lines(params=params, overrides=["x=1", "n=0", "x=7,8", "m=w"])[:3] == [
        "o=A x=7 y=1 m=w n=0",
        "o=A x=8 y=1 m=w n=0",
        "o=B z=3 m=w n=0",
    ]


def test_an_override_selects_among_nested_choices_and_a_new_one_has_nothing_nested() -> None:
    params = {"o": {"A": {"x": "1,2"}, 2: {"y": 3}}, "m": "u"}
    assert lines(params=params, overrides=["o=A"]) == ["o=A x=1 m=u", "o=A x=2 m=u"]
    assert lines(params=params, overrides=["o=new,2,'A'"]) == [
        "o=new m=u",
        "o=2 y=3 m=u",
        "o='A' x=1 m=u",
        "o='A' x=2 m=u",
    ]


def test_an_override_whose_axis_is_gone_is_appended() -> None:
    params = {"o": {"A": {"x": "1,2"}, "B": {"y": 3}}}
    assert lines(params=params, overrides=["x=9", "o=B", "z=1"]) == ["o=B y=3 x=9 z=1"]


def test_an_override_replaces_the_repeats_and_stays_one() -> None:
    (point,) = Space(params={"x": 1}, repeats={"seed": "range(3)"}, overrides=["seed=5", "z=0"])
    assert point == Point(overrides=("x=1", "z=0", "seed=5"), params={"x": 1}, repeat={"seed": 5})


def test_an_override_keeps_the_prefix_of_the_key_in_params_unless_it_has_its_own() -> None:
    assert lines(params={"+x": "1,2", "y": "1,2"}, overrides=["x=5"]) == ["+x=5 y=1", "+x=5 y=2"]
    assert lines(params={"+x": "1,2"}, overrides=["++x=5,6"]) == ["++x=5", "++x=6"]
    assert lines(params={"x": {1: {"y": 2}}}, overrides=["~x"]) == ["~x=null"]


def test_hydras_params_come_first_and_give_way_to_equal_keys() -> None:
    hydra_params = {"a": "1,2", "b": "1", "seed": "8,9"}
    params = {"b": "2,3", "o": {"A": {"a": 7}, "B": None}}
    assert lines(hydra_params=hydra_params, params={"b": "2,3"}, overrides=["a=0"]) == [
        "a=0 seed=8 b=2",
        "a=0 seed=8 b=3",
        "a=0 seed=9 b=2",
        "a=0 seed=9 b=3",
    ]
    assert lines(hydra_params={"a": "1"}, params=params, repeats={"seed": 4}) == [
        "b=2 o=A a=7 seed=4",
        "a=1 b=2 o=B seed=4",
        "b=3 o=A a=7 seed=4",
        "a=1 b=3 o=B seed=4",
    ]
    assert lines(hydra_params={"a": "1,2"}, params=[{"a": 3}, {"a": 4}]) == ["a=3", "a=4"]
    assert lines(hydra_params={"a": "1"}, params=[{"a": 3}, {"b": 4}]) == ["a=3", "a=1 b=4"]


# --- errors ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kwargs", "parts"),
    [
        (
            {"params": {"o": {"SGD": {"o.lr": "0.1,"}}}},
            ["sweep.params.o.SGD.o.lr: ", "'o.lr=0.1,'", "grammar: mismatched input end of the value ("],
        ),
        ({"params": {"x": "json_str(1)"}}, ["sweep.params.x: ", "json_str", "Available: bool,choice"]),
        ({"params": {"x": "größe"}}, ["sweep.params.x: ", "'ö'", "needs quotes"]),
        (
            {"params": {"x": "interval(0,1)"}},
            [
                "sweep.params.x: interval is continuous; a grid needs values: use range(…), choice(…) or ",
                "a comma list; got 'interval(0,1)'",
            ],
        ),
        ({"overrides": ["x=tag(log, interval(1,2))"]}, ["command line, x: interval is continuous"]),
        ({"hydra_params": {"x": "interval(1,2)"}}, ["hydra.sweeper.params.x: interval is continuous"]),
        ({"params": {"x": "range(3,3)"}}, ["sweep.params.x: 'range(3,3)' has no values"]),
        ({"params": {"x": "range(0,1,0)"}}, ["sweep.params.x: 'range(0,1,0)' cannot be expanded", "zero"]),
        ({"params": {"x": "range(0.0,1,0)"}}, ["sweep.params.x: ", "Invalid range values"]),
        ({"params": {"x": "range(0,nan)"}}, ["sweep.params.x: ", "cannot be expanded"]),
        ({"params": {"x": "range(0,inf)"}}, ["sweep.params.x: ", "at most 1,000,000 values"]),
        ({"params": {"x": "shuffle(range(10000000000))"}}, ["sweep.params.x: ", "at most 1,000,000 values"]),
        ({"params": {"x": []}}, ["sweep.params.x: the list has no values", "[[]]"]),
        ({"params": {"x": {}}}, ["sweep.params.x: the mapping has no choices"]),
        ({"params": []}, ["sweep.params: the list has no grid"]),
        ({"params": "x=1"}, ["sweep.params: must be a mapping of keys to values, got 'x=1'"]),
        ({"params": [{"x": 1}, 5]}, ["sweep.params[1]: must be a mapping", "got 5"]),
        ({"params": {3: 1}}, ["sweep.params.3: a key must be a string, got 3 (int)"]),
        ({"params": {"": 1}}, ["sweep.params.: '' is not a key"]),
        ({"params": {"x='a": "b'"}}, ["is not a key"]),
        ({"params": {"a b": 1}}, ["sweep.params.a b: 'a b=' is not in Hydra's override grammar"]),
        ({"params": {"x": "???"}}, ["sweep.params.x: is missing (???)"]),
        ({"params": {"x": {1, 2}}}, ["sweep.params.x: a value must be a string, number", "got {1, 2} (set;"]),
        ({"params": {"x": [{"é": 1}]}}, ["sweep.params.x[0]: "]),
        ({"params": {"x": [{"true": 1}]}}, ["sweep.params.x[0]: {'true': 1} cannot be written in Hydra's"]),
        (
            {"params": {"x": [{(1, 2): 1}]}},
            ["sweep.params.x[0]: (1, 2) (tuple) cannot be the key of a mapping"],
        ),
        (
            {"params": {"o": {"A": "1,2"}}},
            ["sweep.params.o.A: must be a mapping of params that go with this choice, got '1,2'"],
        ),
        ({"params": {"o": {"A,B": None}}}, ["sweep.params.o.A,B: must be one choice, got 'A,B'"]),
        ({"params": {"o": {1: None, "1": None}}}, ["sweep.params.o.1: the choice 1 stands here twice"]),
        ({"params": {"x": 1, "+x": 2}}, ["sweep.params.+x: the key 'x' already stands at sweep.params.x"]),
        (
            {"params": {"x": 1, "o": {"A": {"x": 2}}}},
            ["sweep.params.o.A.x: the key 'x' already stands at sweep.params.x"],
        ),
        ({"params": {"o": {"A": {"o": 2}}}}, ["the key 'o' already stands at sweep.params.o.A.o"]),
        (
            {"params": {"o": {"A": {"x": 2}}, "p": {"B": {"x": 1}}}},
            ["sweep.params.p.B.x: the key 'x' already stands at sweep.params.o.A.x"],
        ),
        (
            {"params": {"o": {"A": {"seed": 2}}}, "repeats": {"+seed": 1}},
            ["sweep.repeats.seed: the key stands in sweep.params too"],
        ),
        ({"repeats": {"seed": {1: None}}}, ["sweep.repeats.seed: repeats are never conditional"]),
        ({"repeats": [1]}, ["sweep.repeats: must be a mapping of keys to values, got [1]"]),
        (
            {"params": {"hydra.job.chdir": "true,false"}},
            ["sweep.params.hydra.job.chdir: Sweeping over Hydra's configuration is not supported"],
        ),
        (
            {"params": {"o": {"A": {"hydra/launcher": "basic"}}}},
            ["sweep.params.o.A.hydra/launcher: Sweeping over Hydra's"],
        ),
        ({"overrides": ["hydra.verbose=true,false"]}, ["command line, hydra.verbose: Sweeping over Hydra's"]),
        (
            {"params": {"sweep.name": "x"}},
            ["sweep.params.sweep.name: the options of a sweep cannot be swept"],
        ),
        (
            {"repeats": {"sweep/executor": "a,b"}},
            ["sweep.repeats.sweep/executor: the options of a sweep cannot be swept"],
        ),
        ({"overrides": ["+sweep=a,b"]}, ["command line, +sweep: the options of a sweep cannot be swept"]),
        ({"overrides": ["x=1,2", "y"]}, ["command line: 'y' is not in Hydra's override grammar"]),
        (
            {"params": {"x": "1,2", "y": "1,2,3"}, "zip_": [["x", "y"]]},
            ["sweep.zip[0]: keys that advance together must have equally many values, but x has 2, y has 3"],
        ),
        ({"params": {"x": "1,2", "y": 1}, "zip_": [["x", "y"]]}, ["sweep.zip[0]: ", "x has 2, y has 1"]),
        (
            {"params": {"x": "1,2", "y": "1,2"}, "zip_": [["x", "y"]], "overrides": ["y=1,2,3"]},
            ["x has 2, y has 3"],
        ),
        ({"params": {"x": 1}, "zip_": [["x", "z"]]}, ["sweep.zip[0]: 'z' is no key of this space (x)"]),
        (
            {"params": {"x": 1, "o": {"A": {"y": 1}}}, "zip_": [["x", "y"]]},
            ["sweep.zip[0]: the keys x, y must stand in one mapping"],
        ),
        (
            {"params": [{"x": 1, "y": 1, "z": 1}, {"x": 1, "y": 1}], "zip_": [["x", "y", "z"]]},
            ["sweep.zip[0]: the keys must stand in one mapping, but z is missing beside sweep.params[1].x"],
        ),
        (
            {"params": {"x": 1}, "repeats": {"s": 1}, "zip_": [["x", "s"]]},
            ["sweep.zip[0]: the keys s, x must stand in one mapping"],
        ),
        (
            {"params": {"x": 1}, "zip_": [["x"]]},
            ["sweep.zip[0]: must name at least two different keys, got ['x']"],
        ),
        (
            {"params": {"x": 1, "y": 1}, "zip_": [["x", "+x"]]},
            ["sweep.zip[0]: must name at least two different keys"],
        ),
        (
            {"params": {"x": 1, "y": 1, "z": 1}, "zip_": [["x", "y"], ["y", "z"]]},
            ["sweep.zip[1]: 'y' stands in sweep.zip[0] too"],
        ),
        ({"params": {"x": 1}, "zip_": ["xy"]}, ["sweep.zip[0]: must be a list of keys, got 'xy'"]),
        ({"params": {"x": 1}, "zip_": "xy"}, ["sweep.zip: must be a list of lists of keys", "got 'xy'"]),
        ({"params": {"x": 1}, "exclude": [{"y": 1}]}, ["sweep.exclude[0]: 'y' is no key of this space (x)"]),
        ({"params": {"x": 1}, "exclude": [{}]}, ["sweep.exclude[0]: names no key"]),
        (
            {"params": {"x": 1}, "exclude": {"x": 1}},
            ["sweep.exclude: must be a list of mappings of keys to values"],
        ),
        (
            {"params": {"x": 1}, "exclude": ["x"]},
            ["sweep.exclude[0]: must be a mapping of keys to values, got 'x'"],
        ),
        ({"params": {"x": 1}, "exclude": [{"x": "1,"}]}, ["sweep.exclude[0].x: 'x=1,' is not in Hydra's"]),
        (
            {"params": {"x": "1,2"}, "exclude": [{"x": "range(5)"}]},
            ["sweep.exclude: drops all of the 2 points"],
        ),
        (
            {"params": {"x": "glob(*)"}},
            ["sweep.params.x: 'glob(*)' cannot be expanded: ConfigLoader is not set"],
        ),
    ],
)
def test_what_cannot_be_expanded_is_refused_with_one_line_that_names_the_place(
    kwargs: dict[str, object], parts: list[str]
) -> None:
    text = message(**kwargs)
    assert all(part in text for part in parts), text


def test_a_value_nested_too_deep_for_the_parser_is_refused() -> None:
    assert message(params={"x": "[" * 2000 + "]" * 2000}).startswith("sweep.params.x: ")


def test_a_glob_that_matches_nothing_names_the_options(loader: ConfigLoader) -> None:
    text = message(params={"db@src": "glob(x*)"}, config_loader=loader)
    assert (
        text
        == "sweep.params.db@src: 'glob(x*)' has no values (the options of db are: mysql, mysql_8, postgres)"
    )
    assert lines(params={"+db@src": "glob(my*)"}, config_loader=loader) == [
        "+db@src=mysql",
        "+db@src=mysql_8",
    ]


def test_keys_of_a_branch_that_the_command_line_deselects_are_no_typo() -> None:
    params = {"o": {"A": {"x": "1,2", "y": "1,2"}, "B": None}}
    assert lines(params=params, overrides=["o=B"], zip_=[["x", "y"]], exclude=[{"x": 1}]) == ["o=B"]


# --- speed and memory -----------------------------------------------------------------------------------


def test_ten_thousand_points_take_well_under_a_second() -> None:
    axis = "range(10)"
    started = time.perf_counter()
    space = Space(
        params={"o": {"A": {"a": axis, "b": axis}, "B": {"c": axis, "d": axis}}, "e": axis},
        exclude=[{"a": 0, "e": 0}],
        repeats={"seed": "range(5)"},
    )
    number = sum(1 for _ in space)
    assert space.size == 10_000
    assert number == 9_950
    assert time.perf_counter() - started < 1.0


def test_points_are_made_one_by_one_and_never_held() -> None:
    space = Space(params=dict.fromkeys("abcd", "range(1000)"))
    assert space.size == 10**12
    tracemalloc.start()
    try:
        last = next(itertools.islice(space, 50_000, None))
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert last.overrides == ("a=0", "b=0", "c=50", "d=0")
    assert peak < 100_000


# --- searchers ------------------------------------------------------------------------------------------


def test_the_grid_searcher_hands_out_every_point_once_and_then_stays_exhausted() -> None:
    searcher = GridSearcher(Space(params={"x": "1,2"}))
    first = searcher.ask()
    searcher.tell(0, TrialState.COMPLETE, [0.5])
    second = searcher.ask()
    assert first is not None
    assert second is not None
    assert (first.overrides, second.overrides) == (("x=1",), ("x=2",))
    assert searcher.ask() is None
    searcher.tell(1, TrialState.FAIL, None)
    assert searcher.ask() is None


def test_searchers_are_found_by_name_and_an_unknown_name_lists_them() -> None:
    assert base.load("grid") == base.Sampler(name="grid", options=GridConf, searcher=GridSearcher)
    assert "grid" in base.names()
    assert base.options()["grid"] is GridConf
    assert OmegaConf.structured(GridConf) == {"name": "grid"}
    for wrong in ("gird", "base", "__init__", "../grid", ""):
        with pytest.raises(SpaceError, match=rf"^sweep.sampler: '{wrong}' is not a sampler \(.*grid.*\)$"):
            base.load(wrong)


def test_a_searcher_of_an_installed_package_is_found_by_its_entry_point(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    module = ModuleType("other_package")
    monkeypatch.setitem(sys.modules, "other_package", module)
    entry = EntryPoint(name="other", value="other_package", group=base.ENTRY_POINT_GROUP)
    monkeypatch.setattr(plugins, "_declared", lambda group, path: EntryPoints([entry]).select(group=group))
    assert set(base.names()) >= {"grid", "other"}
    with pytest.raises(SpaceError, match=r"other_package\.OPTIONS must be a dataclass, got None"):
        base.load("other")
    module.OPTIONS = GridConf  # type: ignore[attr-defined]
    with pytest.raises(SpaceError, match=r"other_package\.SEARCHER must be a Searcher, got None"):
        base.load("other")
    module.SEARCHER = GridSearcher  # type: ignore[attr-defined]
    assert base.load("other").searcher is GridSearcher


def test_search_base_and_points_need_neither_hydra_nor_optuna(tmp_path: Path) -> None:
    import subprocess

    heavy = {"hydra", "optuna", "omegaconf"}
    code = f"import sys, repro_sweep.search.grid; print(sorted({heavy} & set(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=300
    )
    assert done.stdout.strip() == "[]"
