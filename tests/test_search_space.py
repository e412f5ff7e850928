"""The space as a search sees it: its parameters, drawing points, and finding the choices that lead to a point."""

from __future__ import annotations

import itertools
import random
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.utils import create_config_search_path
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Transformer
from hydra.core.plugins import Plugins
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

from repro_sweep.config.space import Space
from repro_sweep.errors import SpaceError
from repro_sweep.points import Categorical, Domain, FloatRange, IntRange, Parameter, Point, Scalar
from repro_sweep.search.base import SearchSpace

QUICK = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
OPTIMIZERS = {
    "optimizer": {
        "SGD": {"optimizer.lr": "tag(log, interval(1e-4, 0.1))", "optimizer.momentum": "interval(0, 0.99)"},
        "Adam": {
            "optimizer.lr": "tag(log, interval(1e-5, 1e-2))",
            "optimizer.beta1": {0.9: {"optimizer.amsgrad": "true,false"}, 0.95: None},
        },
        "Rprop": None,
    },
    "layers": "range(1, 4)",
}


def space(**kwargs: object) -> Space:
    return Space(search=True, **kwargs)  # type: ignore[arg-type]


def message(**kwargs: object) -> str:
    """The one line that a search's space is refused with."""
    with pytest.raises(SpaceError) as caught:
        space(**kwargs)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def names(of: Space) -> list[str]:
    return [parameter.name for parameter in of.parameters()]


def domain(text: object) -> Domain:
    (parameter,) = space(params={"x": text}).parameters()
    return parameter.domain


def chooser(values: dict[str, Scalar]) -> Callable[[Parameter], Scalar]:
    """Choose these values, each of them once."""
    left = dict(values)
    return lambda parameter: left.pop(parameter.name)


def draw(of: Space, **values: Scalar) -> list[str]:
    return [" ".join(point.overrides) for point in of.draw(chooser(values))]


def possibilities(of: Domain) -> list[Scalar]:
    """All values of a domain that has finitely many."""
    if isinstance(of, Categorical):
        return list(of.choices)
    if isinstance(of, IntRange):
        return list(range(of.low, of.high + 1, of.step))
    assert of.step is not None
    return [of.low + i * of.step for i in range(round((of.high - of.low) / of.step) + 1)]


def all_draws(of: Space) -> Iterator[tuple[dict[str, Scalar], tuple[Point, ...]]]:
    """Every draw of a space of finitely many points, by counting through the choices as they are asked for."""
    script: list[int] = []
    while True:
        asked: list[tuple[Parameter, int]] = []

        def choose(
            parameter: Parameter, asked: list[tuple[Parameter, int]] = asked, script: list[int] = script
        ) -> Scalar:
            index = script[len(asked)] if len(asked) < len(script) else 0
            asked.append((parameter, index))
            return possibilities(parameter.domain)[index]

        points = of.draw(choose)
        chosen = {parameter.name: possibilities(parameter.domain)[index] for parameter, index in asked}
        assert len(chosen) == len(asked)
        yield chosen, points
        while asked and asked[-1][1] + 1 == len(possibilities(asked[-1][0].domain)):
            asked.pop()
        if not asked:
            return
        script = [index for _, index in asked]
        script[-1] += 1


def hydra_value(override: str) -> object:
    return OverridesParser.create().parse_override(override).value()


# --- what a range means ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("interval(0, 1)", FloatRange(low=0.0, high=1.0)),
        ("interval(-1e-5,1e16)", FloatRange(low=-1e-5, high=1e16)),
        ("float(interval(1,3))", FloatRange(low=1.0, high=3.0)),
        ("tag(log, interval(1e-4, 0.1))", FloatRange(low=1e-4, high=0.1, log=True)),
        ("int(interval(1, 10))", IntRange(low=1, high=10)),
        ("tag(int, interval(1, 10))", IntRange(low=1, high=10)),
        ("tag(int, log, interval(1, 10))", IntRange(low=1, high=10, log=True)),
        ("int(tag(log, interval(1, 10)))", IntRange(low=1, high=10, log=True)),
        ("range(1,3)", IntRange(low=1, high=2)),
        ("range(3)", IntRange(low=0, high=2)),
        ("range(1,10,4)", IntRange(low=1, high=9, step=4)),
        ("range(9,0,-4)", IntRange(low=1, high=9, step=4)),
        ("sort(range(1,5), reverse=true)", IntRange(low=1, high=4)),
        ("tag(int, range(1.0, 4))", IntRange(low=1, high=3)),
        ("tag(log, range(1,100))", IntRange(low=1, high=99, log=True)),
        ("range(10000000000)", IntRange(low=0, high=9999999999)),
        ("range(0, 1, 0.25)", FloatRange(low=0.0, high=0.75, step=0.25)),
        ("range(0.1, 0.6, 0.1)", FloatRange(low=0.1, high=0.5, step=0.1)),
        ("range(1.0, 0.0, -0.3)", FloatRange(low=0.1, high=1.0, step=0.3)),
        ("float(range(1, 4))", FloatRange(low=1.0, high=3.0, step=1.0)),
        ("a,b", Categorical(choices=("a", "b"))),
        ("'x, y', 1.5, null, true", Categorical(choices=("x, y", 1.5, None, True))),
        ("a,b,'a',a", Categorical(choices=("a", "b"))),
        ([0.1, 0.1, "0.1"], Categorical(choices=(0.1, "0.1"))),
        ({"a": None, 2: {}}, Categorical(choices=("a", 2))),
    ],
)
def test_values_of_a_key_become_the_domain_that_they_mean_in_hydra(text: object, expected: Domain) -> None:
    assert domain(text) == expected
    assert repr(domain(text)) == repr(expected)  # 1 and 1.0 are equal


def test_the_options_of_a_config_group_are_choices(tmp_path: Path) -> None:
    for option in ("db/mysql", "db/postgres", "config"):
        file = tmp_path / f"{option}.yaml"
        file.parent.mkdir(exist_ok=True)
        file.write_text("x: 1\n")
    Plugins.instance()
    loader = ConfigLoaderImpl(config_search_path=create_config_search_path(str(tmp_path)))
    searched = space(params={"+db@src": "glob(*)"}, config_loader=loader)
    assert searched.parameters() == (
        Parameter(
            name="db@src",
            key="db@src",
            where="sweep.params.+db@src",
            domain=Categorical(choices=("mysql", "postgres")),
        ),
    )
    assert draw(searched, **{"db@src": "postgres"}) == ["+db@src=postgres"]


def test_a_shuffled_range_is_a_list_of_choices() -> None:
    choices = domain("shuffle(range(5))")
    assert isinstance(choices, Categorical)
    assert sorted(str(choice) for choice in choices.choices) == list("01234")


@QUICK
@given(
    st.decimals(-5, 5, places=2),
    st.decimals("0.01", 2, places=2),
    st.integers(2, 40),
    st.booleans(),
)
def test_a_range_with_steps_runs_the_points_that_a_grid_runs_and_optuna_takes_it_as_it_is(
    start: object, step: object, number: int, down: bool
) -> None:
    from optuna.distributions import FloatDistribution

    sign = -1 if down else 1
    text = (
        f"range({float(start)}, {float(start) + sign * (number - 0.5) * float(step)}, {sign * float(step)})"  # type: ignore[arg-type]
    )
    grid = sorted(hydra_value(f"x={point.params['x']}") for point in Space(params={"x": text}))  # type: ignore[type-var]
    searched = space(params={"x": text})
    (parameter,) = searched.parameters()
    assert isinstance(parameter.domain, FloatRange)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        distribution = FloatDistribution(
            parameter.domain.low, parameter.domain.high, step=parameter.domain.step
        )
    drawn = []
    for values, (point,) in all_draws(searched):
        drawn.append(point.params["x"])
        assert hydra_value(point.overrides[0]) == point.params["x"]
        again = searched.assign(point.params)
        assert again is not None
        assert again["x"] == pytest.approx(values["x"], abs=1e-9)
        assert distribution._contains(again["x"])
        assert searched.draw(chooser(again)) == (point,)
    assert drawn == grid


@QUICK
@given(st.floats(allow_nan=False, allow_infinity=False, width=64), st.data())
def test_a_number_of_an_interval_reaches_hydra_exactly(number: float, data: st.DataObject) -> None:
    other = data.draw(st.floats(-1e300, 1e300))
    assume(number != other and abs(number) < 1e300)
    low, high = sorted((number, other))
    searched = space(params={"x": f"interval({low!r}, {high!r})"})
    value = data.draw(st.floats(low, high))
    (point,) = searched.draw(lambda _: value)
    assert repr(hydra_value(point.overrides[0])) == repr(point.params["x"]) == repr(value)


@pytest.mark.parametrize("value", [1e-05, 1e16, -1e-05, -0.0, 5e-324, 123456789.123456789, 3])
def test_floats_that_python_writes_with_an_exponent_are_read_back(value: float) -> None:
    (point,) = space(params={"+x": "interval(-1e300,1e300)"}).draw(lambda _: value)
    assert repr(hydra_value(point.overrides[0])) == repr(float(value)) == repr(point.params["x"])


@QUICK
@given(
    st.lists(
        st.one_of(st.none(), st.booleans(), st.integers(2), st.floats(allow_nan=False), st.text()),
        min_size=2,
        max_size=5,
        unique_by=lambda value: (type(value).__name__, value),
    )
)
def test_a_choice_of_any_kind_reaches_hydra_exactly(values: list[Scalar]) -> None:
    assume(len(set(values)) == len(values))
    searched = space(params={"x": values})
    for value in values:
        (point,) = searched.draw(lambda _, value=value: value)  # type: ignore[misc]
        assert repr(hydra_value(point.overrides[0])) == repr(point.params["x"]) == repr(value)


def test_a_range_of_one_value_is_fixed() -> None:
    params = {"a": "interval(2,2)", "b": "range(3,4)", "c": "range(0.5, 0.6, 1)", "d": "1,1", "x": "1,2"}
    searched = space(params=params, overrides=["e=tag(int, interval(7,7))"])
    assert names(searched) == ["x"]
    assert draw(searched, x=2) == ["a=2.0 b=3 c=0.5 d=1 x=2 e=7"]


# --- parameters and draws -------------------------------------------------------------------------------


def test_parameters_stand_in_walking_order_and_are_named_by_key_and_by_what_they_depend_on() -> None:
    searched: SearchSpace = space(params=OPTIMIZERS)
    sgd, adam = "sweep.params.optimizer.SGD", "sweep.params.optimizer.Adam"
    assert [(p.name, p.key, p.where, p.conditional) for p in searched.parameters()] == [
        ("optimizer", "optimizer", "sweep.params.optimizer", False),
        ("optimizer.lr (optimizer=SGD)", "optimizer.lr", f"{sgd}.optimizer.lr", True),
        ("optimizer.momentum", "optimizer.momentum", f"{sgd}.optimizer.momentum", True),
        ("optimizer.lr (optimizer=Adam)", "optimizer.lr", f"{adam}.optimizer.lr", True),
        ("optimizer.beta1", "optimizer.beta1", f"{adam}.optimizer.beta1", True),
        (
            "optimizer.amsgrad",
            "optimizer.amsgrad",
            f"{adam}.optimizer.beta1.0.9.optimizer.amsgrad",
            True,
        ),
        ("layers", "layers", "sweep.params.layers", False),
    ]


def test_a_name_has_all_conditions_but_no_choice_of_one() -> None:
    inner = {"x": {1: {"+lr": "interval(0,1)"}, "'a, b'": {"lr": "interval(0,2)"}}}
    params = {"only": {"one": {"+o": {"A": inner, "B": {"lr": 5}}}}}
    assert names(space(params=params)) == ["o", "x", "lr (o=A, x=1)", "lr (o=A, x='a, b')"]


def test_each_parameter_that_exists_is_chosen_once_and_the_overrides_stand_as_in_a_grid() -> None:
    searched = space(params=OPTIMIZERS, repeats={"seed": "3,1"}, overrides=["epochs=5"])
    values = {"optimizer": "Adam", "optimizer.lr (optimizer=Adam)": 1e-5, "optimizer.beta1": 0.9}
    asked: list[str] = []

    def choose(parameter: Parameter) -> Scalar:
        asked.append(parameter.name)
        return (values | {"optimizer.amsgrad": True, "layers": 2})[parameter.name]

    points = searched.draw(choose)
    assert asked == [*values, "optimizer.amsgrad", "layers"]
    params = {
        "optimizer": "Adam",
        "optimizer.lr": 1e-5,
        "optimizer.beta1": 0.9,
        "optimizer.amsgrad": True,
        "layers": 2,
    }
    overrides = (
        "optimizer=Adam",
        "optimizer.lr=1e-05",
        "optimizer.beta1=0.9",
        "optimizer.amsgrad=True",
        "layers=2",
        "epochs=5",
    )
    assert points == tuple(
        Point(overrides=(*overrides, f"seed={seed}"), params=params, repeat={"seed": seed}) for seed in (3, 1)
    )
    asked.clear()
    values["optimizer"] = "Rprop"
    assert next(point.overrides for point in searched.draw(choose)) == (
        "optimizer=Rprop",
        "layers=2",
        "epochs=5",
        "seed=3",
    )
    assert asked == ["optimizer", "layers"]


@pytest.mark.parametrize(
    ("text", "value", "allowed"),
    [
        ("interval(0,1)", 1.5, "from 0.0 to 1.0"),
        ("interval(0,1)", True, "from 0.0 to 1.0"),
        ("interval(0,1)", float("nan"), "from 0.0 to 1.0"),
        ("interval(0,1)", "0.5", "from 0.0 to 1.0"),
        ("range(1,8,3)", 3, "an integer from 1 to 7 in steps of 3"),
        ("range(1,8)", 2.5, "an integer from 1 to 7"),
        ("range(0.0,1,0.25)", 0.3, "from 0.0 to 0.75 in steps of 0.25"),
        ("range(0.0,1,0.25)", 1.0, "from 0.0 to 0.75 in steps of 0.25"),
        ("range(0.0,1,0.25)", -0.25, "from 0.0 to 0.75 in steps of 0.25"),
        ("1,a,null", True, "1, a, null"),
        ("1,a,null", "1", "1, a, null"),
    ],
)
def test_a_choice_outside_of_the_domain_is_a_bug_and_no_space_has_such_a_value(
    text: str, value: Scalar, allowed: str
) -> None:
    searched = space(params={"x": text})
    with pytest.raises(ValueError, match=r"^x must be") as caught:
        searched.draw(lambda _: value)
    assert str(caught.value) == f"x must be {allowed}, but {value!r} was chosen"
    assert searched.assign({"x": value}) is None
    with pytest.raises(SpaceError) as refused:
        searched.assign_partial({"x": value}, "sweep.enqueue[3]")
    assert str(refused.value) == f"sweep.enqueue[3].x: must be {allowed}; got {value!r}"


def test_a_whole_number_is_taken_for_an_integer_and_an_integer_for_a_float() -> None:
    searched = space(params={"i": "range(5)", "f": "interval(0,5)"})
    assert draw(searched, i=3.0, f=2) == ["i=3 f=2.0"]


# --- random trees ---------------------------------------------------------------------------------------

leaves = st.sampled_from(
    [
        "1,2,3",
        "a,'b, c',null",
        "true,1.5",
        "range(2,5)",
        "range(0.1,0.5,0.1)",
        "tag(int,log,interval(1,3))",
        "range(4,0,-2)",
        7,
    ]
)
key_names = st.sampled_from([f"k{i}" for i in range(12)])


def trees(depth: int) -> st.SearchStrategy[dict[str, object]]:
    if depth == 0:
        return st.dictionaries(key_names, leaves, max_size=2)
    conditional = st.dictionaries(
        st.sampled_from(["A", "B", 3]), st.one_of(st.none(), trees(depth - 1)), min_size=1, max_size=3
    )
    return st.dictionaries(key_names, st.one_of(leaves, conditional), max_size=3)


forests = st.one_of(trees(2), st.lists(trees(1), min_size=1, max_size=3))
exclusions = st.lists(
    st.dictionaries(
        st.sampled_from(["k0", "k1"]), st.sampled_from(["1", "2,A", "a", "B", "3"]), min_size=1, max_size=2
    ),
    max_size=2,
)


def made(build: Callable[[], Space]) -> Space:
    """The space, if the tree is one, has something to search and is small enough to be tried out."""
    try:
        result = build()
    except SpaceError as error:
        assume(
            "already stands" not in str(error)
            and "nothing to search" not in str(error)
            and "is no key" not in str(error)
        )
        raise
    assume(len(result.parameters()) < 12)
    return result


def grid_points(
    params: object, exclude: list[dict[str, str]], repeats: dict[str, object]
) -> list[tuple[str, ...]]:
    """What a grid over the same space has; intervals as the list of their values, ranges ascending."""

    def plain(value: object) -> object:
        if isinstance(value, dict):
            return {key: plain(inner) for key, inner in value.items()}
        if isinstance(value, list):
            return [plain(inner) for inner in value]
        return {"tag(int,log,interval(1,3))": "1,2,3", "range(4,0,-2)": "2,4"}.get(str(value), value)

    grid = Space(params=plain(params), exclude=exclude, repeats=repeats)  # type: ignore[arg-type]
    assume(grid.size <= 1000)
    try:
        return [point.overrides for point in grid]
    except SpaceError:
        return []


@QUICK
@given(forests, exclusions, st.sampled_from([{}, {"seed": "2,1"}]))
def test_the_draws_of_a_space_are_the_points_of_its_grid_in_the_same_order(
    params: object, exclude: list[dict[str, str]], repeats: dict[str, object]
) -> None:
    searched = made(lambda: space(params=params, exclude=exclude, repeats=repeats))
    expected = grid_points(params, exclude, repeats)
    drawn = [point.overrides for _, points in all_draws(searched) for point in points]
    assert drawn == expected


@QUICK
@given(forests, st.randoms(use_true_random=False))
def test_the_choices_that_lead_to_a_point_are_found_from_its_params(
    params: object, dice: random.Random
) -> None:
    searched = made(lambda: space(params=params))
    drawn: dict[str, Scalar] = {}

    def choose(parameter: Parameter) -> Scalar:
        drawn[parameter.name] = dice.choice(possibilities(parameter.domain))
        return drawn[parameter.name]

    (point,) = searched.draw(choose)
    found = searched.assign({**point.params, "other": 5})
    assert found is not None
    assert searched.draw(chooser(found))[0].params == point.params
    if not isinstance(params, list):  # the mappings of a list may have points in common
        assert found == pytest.approx(drawn)
        assert list(found) == list(drawn)
    for key in point.params:
        some = searched.assign_partial({key: point.params[key]}, "here")
        again = searched.draw(lambda p, some=some: some.get(p.name, possibilities(p.domain)[0]))  # type: ignore[misc]
        assert again[0].params[key] == point.params[key]
    whole = searched.assign_partial(point.params, "here")
    again = searched.draw(lambda p: whole.get(p.name, possibilities(p.domain)[0]))
    assert point.params.items() <= again[0].params.items()


@QUICK
@given(trees(2), exclusions)
def test_probes_have_every_choice_and_both_ends_of_every_range_that_some_point_has(
    params: object, exclude: list[dict[str, str]]
) -> None:
    searched = made(lambda: space(params=params, exclude=exclude))
    assume(len(grid_points(params, exclude, {})) > 0)

    def tokens(points: tuple[Point, ...]) -> set[tuple[str, str]]:
        found = searched.assign(points[0].params)
        assert found is not None
        return {(name, repr(value)) for name, value in found.items()}

    wanted = {
        (parameter.name, repr(value))
        for parameter in searched.parameters()
        for value in (possibilities(parameter.domain)[0], possibilities(parameter.domain)[-1])
    } | {
        (parameter.name, repr(choice))
        for parameter in searched.parameters()
        if isinstance(parameter.domain, Categorical)
        for choice in parameter.domain.choices
    }
    possible = set().union(*(tokens(points) for _, points in all_draws(searched) if points))
    assert (wanted & possible) <= set().union(*(tokens(points) for points in searched.probes()))


def test_probes_are_no_more_than_needed() -> None:
    unions = space(params=[{"a": "1,2"}, {"a": "interval(0,1)", "b": "3,4,5"}])
    assert [point.overrides for (point,) in unions.probes()] == [
        ("a=1",),
        ("a=2",),
        ("a=0.0", "b=3"),
        ("a=1.0", "b=4"),
        ("a=0.0", "b=5"),
    ]
    searched = space(params=OPTIMIZERS | {"model": "a,b,c"}, repeats={"seed": "1,2"})
    assert [" ".join(first.overrides).replace("optimizer.", "") for first, _ in searched.probes()] == [
        "optimizer=SGD lr=0.0001 momentum=0.0 layers=1 model=a seed=1",
        "optimizer=SGD lr=0.1 momentum=0.99 layers=3 model=b seed=1",
        "optimizer=Adam lr=1e-05 beta1=0.9 amsgrad=True layers=1 model=c seed=1",
        "optimizer=Adam lr=0.01 beta1=0.9 amsgrad=False layers=3 model=a seed=1",
        "optimizer=Adam lr=1e-05 beta1=0.95 layers=1 model=b seed=1",
        "optimizer=Rprop layers=3 model=c seed=1",
    ]


# --- the parts of a sweep -------------------------------------------------------------------------------


def test_zipped_keys_are_one_parameter_over_their_rows_whose_values_may_be_anything() -> None:
    params = {
        "w": "32,64,32",
        "a": "1,2",
        "+d": [4, [5, 6], 4],
        "m": {"x": {"lr": "interval(0,1)"}, "y": None},
    }
    searched = space(params=params, zip_=[["d", "w"]])
    (rows, *_) = searched.parameters()
    assert rows == Parameter(
        name="w,d",
        key="w,d",
        where="sweep.zip[0]",
        domain=Categorical(choices=("32, 4", "64, [5,6]")),
    )
    assert draw(searched, **{"w,d": "64, [5,6]", "a": 1, "m": "y"}) == ["w=64 +d=[5,6] a=1 m=y"]
    assert searched.assign({"w": 64, "d": [5, 6], "a": 2, "m": "x", "lr": 0.5}) == {
        "w,d": "64, [5,6]",
        "a": 2,
        "m": "x",
        "lr": 0.5,
    }
    assert searched.assign({"w": 64, "d": 4, "a": 2, "m": "y"}) is None
    assert searched.assign_partial({"d": 4}, "here") == {"w,d": "32, 4"}


def test_a_range_is_zipped_as_its_values_and_what_stands_in_a_row_depends_on_it() -> None:
    params = {"o": {"A": {"x": "1,2"}, "B": None}, "n": "range(3,1,-1)", "x2": 1}
    searched = space(params=params, zip_=[["o", "n"]])
    assert names(searched) == ["o,n", "x"]
    assert draw(searched, **{"o,n": "A, 3", "x": 2}) == ["o=A x=2 n=3 x2=1"]
    assert draw(searched, **{"o,n": "B, 2"}) == ["o=B n=2 x2=1"]


def test_a_list_of_params_is_one_parameter_over_its_mappings() -> None:
    params = [{"a": "1,2", "lr": "interval(0,1)"}, {"b": "3,4", "lr": "interval(0,2)"}, {"a": 7}]
    searched = space(params=params, overrides=["z=5,6"])
    assert names(searched) == ["params", "a (params=0)", "lr (params=0)", "b", "lr (params=1)", "z"]
    assert searched.parameters()[0].domain == Categorical(choices=("0", "1", "2"))
    assert draw(searched, **{"params": "1", "b": 3, "lr (params=1)": 1.5, "z": 6}) == ["b=3 lr=1.5 z=6"]
    assert draw(searched, params="2", z=6) == ["a=7 z=6"]
    assert searched.assign({"b": 4, "lr": 2.0, "z": 5}) == {"params": "1", "b": 4, "lr (params=1)": 2, "z": 5}
    assert searched.assign({"a": 7, "z": 5}) == {"params": "2", "z": 5}
    assert searched.assign({"a": 7, "lr": 0.5, "z": 5}) is None
    assert searched.assign({"z": 5}) == {"params": "2", "z": 5}  # a has one value there, so it may be missing
    assert space(params=[{"a": 7}, {}]).assign({}) == {
        "params": "1"
    }  # but not where a point is this one exactly
    assert names(space(params=[{"a": "1,2"}])) == ["a"]


def test_exclude_drops_what_was_drawn_and_a_repeat_alone() -> None:
    exclude = [{"o": "A", "n": 2}, {"x": 0.5, "seed": 1}, {"n": "nowhere"}]
    searched = space(
        params={"o": "A,B", "n": "range(1,4)", "x": "interval(0,1)"},
        exclude=exclude,
        repeats={"seed": "range(3)"},
    )
    assert draw(searched, o="A", n=2, x=0.1) == []
    assert draw(searched, o="B", n=2, x=0.5) == ["o=B n=2 x=0.5 seed=0", "o=B n=2 x=0.5 seed=2"]
    assert len(draw(searched, o="A", n=1, x=0.1)) == 3


def test_probes_find_other_points_where_the_first_ones_are_excluded() -> None:
    params = {"a": "1,2,3", "b": {"x": {"c": "1,2"}, "y": None}}
    exclude = [{"a": 1, "b": "x"}, {"a": 2, "c": 2}, {"a": 3, "b": "y"}]
    seen = {
        str(item)
        for (point,) in space(params=params, exclude=exclude).probes()
        for item in point.params.items()
    }
    assert seen == {"('a', 1)", "('a', 2)", "('a', 3)", "('b', 'x')", "('b', 'y')", "('c', 1)", "('c', 2)"}
    params = {"o": {"A": {"x": "range(1,5)"}, "B": None}}
    searched = space(params=params, exclude=[{"x": "1,4"}])
    assert {point.params["o"] for (point,) in searched.probes()} == {"A", "B"}
    ((point,),) = space(params={"x": "interval(0,1)"}, exclude=[{"x": "0,1"}]).probes()
    assert 0 < point.params["x"] < 1  # type: ignore[operator]
    with pytest.raises(SpaceError, match=r"^sweep\.exclude: drops every point that was tried"):
        list(space(params={"a": "1,2"}, exclude=[{"a": "1,2"}]).probes())


def test_repeats_are_a_grid_of_values_in_a_search_too() -> None:
    searched = space(params={"x": "1,2"}, repeats={"seed": "range(3,0,-1)"}, overrides=["y=1"])
    assert draw(searched, x=1) == ["x=1 y=1 seed=3", "x=1 y=1 seed=2", "x=1 y=1 seed=1"]
    searched = space(params={"x": "1,2"}, repeats={"seed": 0}, overrides=["seed=range(5,7)"])
    assert names(searched) == ["x"]
    assert draw(searched, x=1) == ["x=1 seed=5", "x=1 seed=6"]


def test_the_command_line_replaces_values_in_every_branch_and_adds_keys() -> None:
    searched = space(
        params={"o": {"A": {"+lr": "1,2"}, "B": {"lr": "3,4"}, "C": None}},
        overrides=["lr=tag(log,interval(0.1,1))", "+new=range(2)", "fixed=3"],
    )
    assert names(searched) == ["o", "lr (o=A)", "lr (o=B)", "new"]
    assert {p.where for p in searched.parameters() if p.key == "lr"} == {"command line, lr"}
    assert draw(searched, **{"o": "A", "lr (o=A)": 0.5, "new": 1}) == ["o=A +lr=0.5 +new=1 fixed=3"]
    assert draw(searched, o="C", new=0) == ["o=C +new=0 fixed=3"]


def test_a_fixed_override_pins_a_parameter_and_leaves_only_its_branch() -> None:
    searched = space(params=OPTIMIZERS, overrides=["optimizer=SGD", "layers=9"])
    assert names(searched) == ["optimizer.lr", "optimizer.momentum"]
    assert not any(parameter.conditional for parameter in searched.parameters())
    assert draw(searched, **{"optimizer.lr": 0.1, "optimizer.momentum": 0}) == [
        "optimizer=SGD optimizer.lr=0.1 optimizer.momentum=0.0 layers=9"
    ]
    assert searched.assign({"optimizer": "Adam", "optimizer.lr": 0.01, "optimizer.momentum": 0.5}) is None
    assert searched.assign({"optimizer.lr": 0.01, "optimizer.momentum": 0.5}) is not None


def test_a_range_on_the_command_line_selects_among_nested_choices() -> None:
    searched = space(params={"n": {1: {"a": "1,2"}, 2: None, 3: None}}, overrides=["n=range(1,3)"])
    assert [p.domain for p in searched.parameters()] == [
        Categorical(choices=(1, 2)),
        Categorical(choices=(1, 2)),
    ]
    assert draw(searched, n=1, a=2) == ["n=1 a=2"]


def test_hydras_params_exist_only_where_no_branch_has_the_key() -> None:
    searched = space(
        hydra_params={"a": "interval(0,1)", "b": "1,2"},
        params={"o": {"A": {"a": "range(5,8)"}, "B": None}},
    )
    assert [(p.name, p.conditional) for p in searched.parameters()] == [
        ("a", True),
        ("b", False),
        ("o", False),
        ("a (o=A)", True),
    ]
    assert draw(searched, **{"b": 1, "o": "A", "a (o=A)": 6}) == ["b=1 o=A a=6"]
    assert draw(searched, a=0.5, b=1, o="B") == ["a=0.5 b=1 o=B"]
    assert searched.assign({"a": 6, "b": 2, "o": "A"}) == {"b": 2, "o": "A", "a (o=A)": 6}
    assert searched.assign({"a": 0.5, "b": 2, "o": "B"}) == {"a": 0.5, "b": 2, "o": "B"}
    assert searched.assign({"a": 0.5, "b": 2, "o": "A"}) is None
    assert {(p[0].params["o"], p[0].params["a"]) for p in searched.probes()} >= {
        ("A", 5),
        ("A", 7),
        ("B", 0.0),
    }


def test_a_search_space_without_intervals_is_still_a_grid() -> None:
    params = {"o": {"A": {"x": "range(3,0,-2)"}, "B": None}, "y": "range(0.0,0.3,0.1)"}
    searched = space(params=params, repeats={"s": "1,2"})
    assert list(searched) == list(Space(params=params, repeats={"s": "1,2"}))
    assert len(searched) == 18


def test_a_grid_over_the_interval_of_a_search_is_the_error_of_a_grid() -> None:
    searched = space(params={"x": "interval(0,1)"})
    with pytest.raises(SpaceError) as in_search:
        next(iter(searched))
    with pytest.raises(SpaceError) as in_grid:
        Space(params={"x": "interval(0,1)"})
    assert str(in_search.value) == str(in_grid.value)
    assert "interval is continuous; a grid needs values" in str(in_grid.value)


# --- points of elsewhere --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("params", "expected"),
    [
        (
            {"optimizer": "SGD", "optimizer.lr": 0.1, "optimizer.momentum": 0, "layers": 1.0, "epochs": 5},
            {"optimizer": "SGD", "optimizer.lr (optimizer=SGD)": 0.1, "optimizer.momentum": 0.0, "layers": 1},
        ),
        ({"optimizer": "Rprop", "layers": 3}, {"optimizer": "Rprop", "layers": 3}),
        ({"optimizer": "Rprop", "layers": 4}, None),
        ({"optimizer": "Rprop"}, None),
        ({"optimizer": "Rprop", "layers": "3"}, None),
        ({"optimizer": "Rprop", "layers": True}, None),
        ({"optimizer": "Rprop", "layers": 3, "optimizer.lr": 0.1}, None),
        ({"optimizer": "SGD", "optimizer.lr": 0.2, "optimizer.momentum": 0, "layers": 1}, None),
        ({"optimizer": "SGD", "optimizer.lr": 0.1, "layers": 1}, None),
        ({"optimizer": "AdamW", "layers": 1}, None),
        ({}, None),
    ],
)
def test_a_trial_of_another_sweep_is_found_or_the_space_does_not_have_it(
    params: dict[str, object], expected: dict[str, Scalar] | None
) -> None:
    assert space(params=OPTIMIZERS).assign(params) == expected


@pytest.mark.parametrize(
    ("params", "expected"),
    [
        ({"layers": 2}, {"layers": 2}),
        ({"optimizer.momentum": 0.5}, {"optimizer": "SGD", "optimizer.momentum": 0.5}),
        ({"optimizer.lr": 1e-5}, {"optimizer": "Adam", "optimizer.lr (optimizer=Adam)": 1e-5}),
        ({"optimizer.lr": 1e-3}, {"optimizer": "SGD", "optimizer.lr (optimizer=SGD)": 1e-3}),
        (
            {"optimizer.lr": 1e-3, "optimizer": "Adam"},
            {"optimizer": "Adam", "optimizer.lr (optimizer=Adam)": 1e-3},
        ),
        (
            {"optimizer.amsgrad": False, "optimizer.lr": 1e-3},
            {
                "optimizer": "Adam",
                "optimizer.lr (optimizer=Adam)": 1e-3,
                "optimizer.beta1": 0.9,
                "optimizer.amsgrad": False,
            },
        ),
        ({"epochs": 5}, {}),
        ({}, {}),
        ({"+layers": 1}, {"layers": 1}),
    ],
)
def test_some_keys_fix_their_parameters_and_bring_along_what_they_depend_on(
    params: dict[str, object], expected: dict[str, Scalar]
) -> None:
    searched = space(params=OPTIMIZERS, overrides=["epochs=5"])
    assert searched.assign_partial(params, "sweep.enqueue[0]") == expected
    assert searched.assign_partial(OmegaConf.create(params), "sweep.enqueue[0]") == expected


@pytest.mark.parametrize(
    ("params", "text"),
    [
        (
            {"bogus": 1},
            (
                "sweep.enqueue[0]: 'bogus' is no key of this space (epochs, layers, optimizer, optimizer.amsgrad, "
                "optimizer.beta1, optimizer.lr, optimizer.momentum)"
            ),
        ),
        ({"optimizer": "AdamW"}, "sweep.enqueue[0].optimizer: must be SGD, Adam, Rprop; got 'AdamW'"),
        ({"epochs": 6}, "sweep.enqueue[0].epochs: must be 5; got 6"),
        ({"layers": 9}, "sweep.enqueue[0].layers: must be an integer from 1 to 3; got 9"),
        (
            {"optimizer.lr": 3},
            (
                "sweep.enqueue[0].optimizer.lr: must be from 0.0001 to 0.1 (with optimizer=SGD); or from 1e-05 to "
                "0.01 (with optimizer=Adam); got 3"
            ),
        ),
        (
            {"optimizer.amsgrad": True, "optimizer": "SGD"},
            (
                "sweep.enqueue[0].optimizer.amsgrad: True does not go with the other keys: it exists only with "
                "optimizer=Adam, optimizer.beta1=0.9"
            ),
        ),
        (
            {"optimizer.momentum": 0.5, "optimizer.beta1": 0.9},
            (
                "sweep.enqueue[0].optimizer.beta1: 0.9 does not go with the other keys: it exists only with "
                "optimizer=Adam"
            ),
        ),
        ("lr=1", "sweep.enqueue[0]: must be a mapping of keys to values, got 'lr=1'"),
    ],
)
def test_a_key_or_value_that_no_branch_has_is_refused(params: dict[str, object], text: str) -> None:
    searched = space(params=OPTIMIZERS, overrides=["epochs=5"])
    with pytest.raises(SpaceError) as caught:
        searched.assign_partial(params, "sweep.enqueue[0]")
    assert str(caught.value) == text


# --- errors ---------------------------------------------------------------------------------------------

BIG = "9" * 25


@pytest.mark.parametrize(
    ("kwargs", "text"),
    [
        (
            {"params": {"lr": "tag(log, interval(0, 1))"}},
            "sweep.params.lr: a logarithmic range must begin above 0, got tag(log, interval(0, 1))",
        ),
        (
            {"overrides": ["n=tag(log, range(10))"]},
            "command line, n: a logarithmic range must begin above 0, got tag(log, range(10))",
        ),
        (
            {"hydra_params": {"n": "tag(int, log, interval(-1, 5))"}},
            "hydra.sweeper.params.n: a logarithmic range must begin above 0, got tag(int, log, interval(-1, 5))",
        ),
        (
            {"params": {"o": {"A": {"n": "tag(log, range(1, 9, 2))"}}}},
            (
                "sweep.params.o.A.n: a logarithmic range has no steps: use integers in steps of 1, or "
                "tag(log, interval(…)); got tag(log, range(1, 9, 2))"
            ),
        ),
        (
            {"params": {"n": "tag(log, range(1.0, 9))"}},
            (
                "sweep.params.n: a logarithmic range has no steps: use integers in steps of 1, or "
                "tag(log, interval(…)); got tag(log, range(1.0, 9))"
            ),
        ),
        (
            {"params": {"x": "interval(5, 1)"}},
            "sweep.params.x: an interval must begin at its lower end, got interval(5, 1)",
        ),
        ({"params": {"x": "range(5, 1)"}}, "sweep.params.x: 'range(5, 1)' has no values"),
        ({"params": {"x": "range(5.0, 1)"}}, "sweep.params.x: 'range(5.0, 1)' has no values"),
        (
            {"params": {"x": "tag(lg, int, interval(1, 2))"}},
            "sweep.params.x: 'lg' is no tag of a search (log, int), got tag(lg, int, interval(1, 2))",
        ),
        (
            {"params": {"x": "tag(log, choice(1, 2))"}},
            "sweep.params.x: the tags log and int go with interval(…) and range(…), got tag(log, choice(1, 2))",
        ),
        (
            {"params": {"x": "shuffle(tag(log, range(1, 9)))"}},
            (
                "sweep.params.x: the tags log and int go with interval(…) and range(…), "
                "got shuffle(tag(log, range(1, 9)))"
            ),
        ),
        (
            {"params": {"x": "interval(0, inf)"}},
            "sweep.params.x: the ends of a range must be finite 64-bit numbers, got interval(0, inf)",
        ),
        (
            {"params": {"x": "range(0.0, nan)"}},
            "sweep.params.x: the ends of a range must be finite 64-bit numbers, got range(0.0, nan)",
        ),
        (
            {"params": {"x": "interval(-1e308, 1e308)"}},
            "sweep.params.x: a range must not be wider than the largest 64-bit float, got interval(-1e308, 1e308)",
        ),
        (
            {"params": {"x": f"range({BIG})"}},
            (
                "sweep.params.x: a range of integers must lie between -9007199254740992 and 9007199254740992, "
                f"got range({BIG})"
            ),
        ),
        (
            {"params": {"x": "tag(int, interval(0.5, 3))"}},
            (
                "sweep.params.x: a range of integers must have integers as its ends and step, "
                "got tag(int, interval(0.5, 3))"
            ),
        ),
        (
            {"params": {"x": "range(0.0, 1e9, 0.1)"}},
            "sweep.params.x: an axis may have at most 1,000,000 values, got range(0.0, 1000000000.0, 0.1)",
        ),
        (
            {"params": {"x": [1, [2, 3]]}},
            "sweep.params.x: a search chooses among strings, numbers, true, false and null, got [2, 3]",
        ),
        (
            {"overrides": ["x={a:1},{a:2}"]},
            "command line, x: a search chooses among strings, numbers, true, false and null, got {'a': 1}",
        ),
        (
            {"params": {"x": [float("nan"), 2]}},
            "sweep.params.x: a search chooses among strings, numbers, true, false and null, got nan",
        ),
        (
            {"params": {"x": "1,true"}},
            "sweep.params.x: a search cannot tell the choices 1 and True apart; keep one of them",
        ),
        (
            {"params": {"x": {1: None, "a": None, False: None}}, "overrides": ["x=2,0,false"]},
            "command line, x: a search cannot tell the choices 0 and False apart; keep one of them",
        ),
        (
            {"params": {"x": "1,2,1.0"}},
            "sweep.params.x: a search cannot tell the choices 1 and 1.0 apart; keep one of them",
        ),
        (
            {"params": {"a": "1,2", "b": "interval(0, 1)"}, "zip_": [["a", "b"]]},
            "sweep.zip[0]: keys that advance together need choices; got b=interval(0, 1)",
        ),
        (
            {"params": {"a": "1,2", "b": "range(3)"}, "zip_": [["a", "b"]]},
            "sweep.zip[0]: keys that advance together must have equally many values, but a has 2, b has 3",
        ),
        (
            {"params": {"o": {"A": {"x": "1,2"}, "B": None}}, "overrides": ["o=interval(0, 1)"]},
            "command line, o: choices here have params of their own, so give choices; got o=interval(0, 1)",
        ),
        (
            {"params": {"x": "1,2"}, "repeats": {"seed": "interval(0, 1)"}},
            (
                "sweep.repeats.seed: interval is continuous; a grid needs values: use range(…), choice(…) or "
                "a comma list; got 'interval(0, 1)'"
            ),
        ),
        (
            {"params": {"x": "1,2"}, "repeats": {"seed": 1}, "overrides": ["seed=interval(0, 1)"]},
            (
                "command line, seed: interval is continuous; a grid needs values: use range(…), choice(…) or "
                "a comma list; got 'interval(0, 1)'"
            ),
        ),
        (
            {"params": {"x": "interval(0, 1)"}, "exclude": [{"x": "interval(0, 0.5)"}]},
            (
                "sweep.exclude[0].x: interval is continuous; a grid needs values: use range(…), choice(…) or "
                "a comma list; got 'interval(0, 0.5)'"
            ),
        ),
        (
            {"overrides": ["x=1,2", "+x=3,4"]},
            "command line, +x: the key 'x' already stands at command line, x, and both would exist at once",
        ),
        (
            {"params": {"x": 1, "o": {"A": None}}, "repeats": {"seed": "1,2"}},
            (
                "sweep.params: there is nothing to search: no key has several values; give one choices or a range, "
                "such as interval(0, 1)"
            ),
        ),
        (
            {},
            (
                "sweep.params: there is nothing to search: no key has several values; give one choices or a range, "
                "such as interval(0, 1)"
            ),
        ),
    ],
)
def test_what_cannot_be_searched_is_refused_with_one_line_that_names_the_place(
    kwargs: dict[str, object], text: str
) -> None:
    assert message(**kwargs) == text


def test_a_value_that_stands_alone_may_be_a_list() -> None:
    searched = space(params={"shape": [[1, 2]], "x": "1,2"})
    assert draw(searched, x=1) == ["shape=[1,2] x=1"]


def test_what_hydra_writes_for_a_number_is_what_a_draw_writes() -> None:
    searched = space(params={"x": "interval(-1e20,1e20)"})
    for value in (1e-5, 1e16, -0.25, 100.0):
        assert draw(searched, x=value) == [f"x={Transformer.str(value)}"]


def test_a_draw_from_many_parameters_takes_a_small_part_of_a_slots_time() -> None:
    searched = space(params={f"k{i}": "interval(0,1)" for i in range(20)} | OPTIMIZERS)
    values = {p.name: 0.5 for p in searched.parameters()} | {"optimizer": "Rprop", "layers": 2}
    started = time.perf_counter()
    for _ in itertools.repeat(None, 200):
        searched.draw(lambda parameter: values[parameter.name])
    assert (time.perf_counter() - started) / 200 < 0.002
