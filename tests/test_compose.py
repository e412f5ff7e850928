"""Composition equals Hydra's own, whatever the tree and the overrides; is fast; and its errors are clear."""

from __future__ import annotations

import math
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any, Dict, List, Optional, Union  # noqa: UP035  (what users of Hydra write)

import pytest
import yaml
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from omegaconf import MISSING, DictConfig, ListConfig, Node, OmegaConf, open_dict, read_write

from repro_sweep.config.compose import Composer, composition_of
from repro_sweep.config.identity import check, identity, plain
from repro_sweep.config.nodes import clone
from repro_sweep.config.yamltext import hydra_yaml, to_yaml
from repro_sweep.errors import CompositionError
from repro_sweep.sweep import Composition

# Shrinking would compose hundreds of trees more, for minutes.
SLOW = settings(
    max_examples=10,
    deadline=None,
    suppress_health_check=list(HealthCheck),
    phases=[Phase.reuse, Phase.generate],
)


class Color(Enum):
    RED = 1
    GREEN = 2


@dataclass
class Inner:
    depth: int = 1
    rate: Optional[float] = None  # noqa: UP045
    color: Color = Color.RED


@dataclass(frozen=True)
class Frozen:
    size: int = 3


@dataclass
class Typed:
    must: int = MISSING
    maybe: Optional[int] = None  # noqa: UP045
    name: str = "x"
    ratio: float = 0.5
    flag: bool = False
    color: Color = Color.GREEN
    either: Union[int, str] = 1  # noqa: UP007
    where: Path = Path("/data")
    inner: Inner = field(default_factory=Inner)
    frozen: Frozen = field(default_factory=Frozen)
    sizes: List[int] = field(default_factory=lambda: [1, 2])  # noqa: UP006
    inners: List[Inner] = field(default_factory=lambda: [Inner()])  # noqa: UP006
    rates: Dict[str, float] = field(default_factory=lambda: {"a": 1.0})  # noqa: UP006
    by_color: Dict[Color, int] = field(default_factory=lambda: {Color.RED: 1})  # noqa: UP006
    link: int = "${.inner.depth}"  # type: ignore[assignment]
    free: Any = None


@dataclass
class Root:
    typed: Typed = field(default_factory=Typed)
    lr: float = 0.1
    sweep: Any = None


@pytest.fixture(autouse=True, scope="module")
def _typed_configs() -> None:
    store = ConfigStore.instance()
    store.store(group="typed", name="base", node=Typed)
    store.store(group="typed", name="other", node=Typed(must=7, inner=Inner(depth=4)))
    store.store(name="typed_root", node=Root)


@contextmanager
def tree(files: dict[str, str]) -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as name:
        for path, text in files.items():
            file = Path(name, path)
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text, encoding="utf-8")
        yield Path(name)


def spec_of(
    conf: Path, hydra_overrides: tuple[str, ...] = ("hydra.mode=MULTIRUN",), **more: Any
) -> Composition:
    return Composition(
        config_name=more.pop("config_name", "config"),
        search_path=(("hydra", "pkg://hydra.conf"), ("main", f"file://{conf}"), ("schema", "structured://")),
        hydra_overrides=hydra_overrides,
        job_name="app",
        version_base=None,
        **more,
    )


def composed(files: dict[str, str], overrides: list[str], **more: Any) -> DictConfig:
    with tree(files) as conf:
        return Composer(spec_of(conf, **more)).compose(overrides)


def hydras_job(composer: Composer, overrides: list[str]) -> DictConfig:
    """What Hydra's launcher and ``run_job`` make of the overrides, with our stripped nodes taken out."""
    cfg = composer._loader.load_configuration(
        composer.spec.config_name, [*composer.spec.hydra_overrides, *overrides], RunMode.RUN
    )
    with open_dict(cfg):
        cfg.hydra.job.id = 3
        cfg.hydra.job.num = 3
    with read_write(cfg.hydra.runtime), open_dict(cfg.hydra.runtime):
        cfg.hydra.runtime.output_dir = "/out"
    return without(cfg, *composer.spec.strip)


def without(cfg: DictConfig, *names: str) -> DictConfig:
    with read_write(cfg), open_dict(cfg):
        for name in names:
            if name in cfg.keys():  # noqa: SIM118  (a DictConfig hides what is '???')
                del cfg[name]
    return cfg


def anatomy(node: Node, parent: Node | None = None) -> Any:
    """All that makes a node: its class, types, flags, value with its type, and that it knows its parent."""
    state = node.__dict__
    assert state["_parent"] is parent
    meta = {**node._metadata.__dict__, "resolver_cache": None}
    value = state["_val"] if "_val" in state else state["_content"]
    if isinstance(value, dict):
        value = {(type(key), repr(key)): anatomy(child, node) for key, child in value.items()}
    elif isinstance(value, list):
        value = [anatomy(child, node) for child in value]
    elif isinstance(value, Node):
        value = anatomy(value, node)
    else:
        value = (type(value), repr(value))
    return type(node), meta, value


def outcome(act: Callable[[], DictConfig]) -> DictConfig | Exception:
    try:
        return act()
    except Exception as error:  # noqa: BLE001
        return error


def assert_equal_to_hydra(composer: Composer, overrides: list[str]) -> None:
    expected = outcome(lambda: hydras_job(composer, overrides))
    ours = outcome(lambda: composer.compose(overrides))
    job = outcome(lambda: composer.job_config(overrides, num=3, job_id="3", output_dir="/out"))
    if isinstance(expected, Exception):
        assert isinstance(ours, CompositionError), (overrides, expected, ours)
        assert isinstance(job, CompositionError), (overrides, expected, job)
        assert "\n" not in str(ours)
        assert str(ours)
        return
    assert isinstance(ours, DictConfig), (overrides, ours)
    assert isinstance(job, DictConfig), (overrides, job)
    assert anatomy(job) == anatomy(expected), overrides
    assert OmegaConf.to_yaml(job) == OmegaConf.to_yaml(expected)
    assert hydra_yaml(job) == OmegaConf.to_yaml(OmegaConf.masked_copy(expected, "hydra"))
    task = without(expected, "hydra")
    assert anatomy(ours) == anatomy(task), overrides
    assert to_yaml(ours) == OmegaConf.to_yaml(task)


# ---- Generated config trees and overrides ----------------------------------------------------------------------

INTERPOLATIONS = [
    "${a}", "${b.c}", "${.c}", "${db.host}", "x${a}y", "${model}", "${hydra:job.num}", "${hydra.job.name}",
    "${hydra.job}", "${hydra:runtime.choices.db}", "${oc.env:HOME}", "${oc.env:NOT_THERE,7}", "${nowhere}",
    "${oc.select:a,1}", "${oc.dict.keys:b}", "${now:%Y}", r"\${a}", "${sweep.x}", "${lst}", "${b}",
]  # fmt: skip
STRINGS = [
    "", " ", "???", "null", "~", "true", "No", "1", "1.0", "1e3", "0x1f", "1_000", "-", "- a", "a: b", "#c", "'",
    '"', "é☃😀", "a\nb", "\n", "tab\t", "trailing ", " leading", "[1", "{a", "*x", "&x", "!t", "%d", "@at", "`",
    "a,b", "\x7f", "\x85", "word " * 30, "x" * 200, "2020-01-01", "12:30:45", "=", "<<", ".", "...", "---",
    "\ufeff", "\u2028", "a\\b",
]  # fmt: skip
SCALARS: st.SearchStrategy[Any] = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-5, 10**20),
    st.sampled_from([0.0, -0.0, 0.1, 1e-7, 1e22, math.nan, math.inf, -math.inf]),
    st.floats(),
    st.sampled_from(STRINGS),
    st.sampled_from(INTERPOLATIONS),
    st.text(max_size=8),
)
VALUES: st.SearchStrategy[Any] = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["c", "d", "e"]) | st.sampled_from([1, 2, "", "long " * 9]), inner, max_size=3
        )
    ),
    max_leaves=5,
)
CONTENT = st.fixed_dictionaries(
    {"a": VALUES, "b": st.fixed_dictionaries({"c": VALUES, "d": VALUES}), "lst": st.lists(VALUES, max_size=2)}
)
PACKAGES = st.sampled_from(
    ["", "", "", "# @package _global_\n", "# @package foo.bar\n", "# @package _group_\n"]
)
SELF = st.sampled_from([["_self_"], []])


@st.composite
def option(draw: st.DrawFn, defaults: list[Any] | None = None) -> str:
    content = {"host": draw(SCALARS), **draw(CONTENT)}
    if defaults and draw(st.booleans()):
        content["defaults"] = [*draw(SELF), draw(st.sampled_from(defaults))]
    return draw(PACKAGES) + yaml.safe_dump(content, allow_unicode=True)


SLOTS: dict[str, list[Any]] = {  # what a defaults list may hold, at most one of each row
    "db": [{"db": "a"}, {"db": "b"}, {"db": "a"}, {"db": "b"}, {"db": ["a", "b"]}, {"db": "???"}],
    "model": [{"model": "x"}, {"model": "y"}, {"model": None}],
    "src": [{"db@src": "a"}, {"db@src.deep": "b"}, {"db@src": ["a", "b"]}, {"db@_global_": "a"}],
    "typed": [{"typed": "base"}, {"typed": "other"}],
    "other": [{"typed@other": "other"}],
    "both": [{"both": "${db}_${model}"}],
    "m": [{"model/opt@m": "p"}, {"optional db@gone": "missing"}, {"optional nothing": "here"}, "db/a"],
    "sweep": [{"sweep": "s"}],
    "override": [{"override db": "b"}, {"override hydra/job_logging": "disabled"}],
}
NESTED_DEFAULTS = [
    {"opt": "p"},
    {"opt@deep": "q"},
    {"/typed@t": "other"},
    "/db/a",
    {"override /db": "b"},
    {"opt": "???"},
]
HYDRA_NODES: list[Any] = [
    {"job": {"name": "${a}"}},
    {"job": {"env_set": {"A": "${a}"}, "env_copy": ["PATH"]}},
    {"job": {"config": {"override_dirname": {"exclude_keys": ["a"], "kv_sep": "-"}}}},
    {"job": {"config": {"override_dirname": {"exclude_keys": "${lst}"}}}},
    {"job": {"config": {"override_dirname": {"item_sep": "${a}"}}}},
    {"sweep": {"dir": "out/${a}", "subdir": "${hydra.job.num}"}},
]


@st.composite
def trees(draw: st.DrawFn) -> dict[str, str]:
    rare = draw(st.sampled_from([True, False, False]))
    slots = draw(st.sets(st.sampled_from(list(SLOTS)), max_size=6))
    if not rare:
        slots = (slots | {"db"}) - ({"both"} if "model" not in slots else set())
    picked = [draw(st.sampled_from(SLOTS[name][: None if rare else 4])) for name in SLOTS if name in slots]
    root = {**draw(CONTENT), "sweep": {"x": 1}}
    if picked:
        root["defaults"] = [*picked, "_self_"] if draw(st.booleans()) else ["_self_", *picked]
        if "override" in slots:
            root["defaults"] = ["_self_", *picked]
    if draw(st.integers(0, 5)) == 0:
        root["hydra"] = draw(st.sampled_from(HYDRA_NODES))
    nested = NESTED_DEFAULTS if rare else NESTED_DEFAULTS[:3]
    files = {f"db/{name}.yaml": draw(option()) for name in ("a", "b")}
    files |= {f"model/{name}.yaml": draw(option(nested)) for name in ("x", "y")}
    files |= {f"model/opt/{name}.yaml": draw(option()) for name in ("p", "q")}
    both = draw(option())
    files |= {f"both/{db}_{model}.yaml": both for db in "ab" for model in "xy"}
    files["sweep/s.yaml"] = "y: 2\n"
    files["config.yaml"] = yaml.safe_dump(root, allow_unicode=True, sort_keys=False)
    return files


PLACES = ["a", "b", "b.c", "b.d", "b.c.e", "lst", "lst.0", "lst.7", "db.host"]
ODD_PLACES = ["db.a", "model.host", "src.host", "foo.bar.a", "m.host"]
NEW_PLACES = ["new", "new.deep.er", "b.new", "db.new", "$x", "typed.new", "b.c.new", "sweep.new"]
RAW_VALUES = [
    "1", "-3", "0.5", "1e-3", "nan", "inf", "true", "null", "", "abc", "RED", "Color.GREEN", "'quoted, text'",
    '"it\'s"', "'${a}'", "${a}", "${b.c}", "${nowhere}", "x${a}", "${b}", "${hydra:job.num}", "[1,2]", "[]",
    "[a,[b],{c:1}]", "{c:1}", "{}", "{c:{e:2},z:null}", "{depth:3}", "[{depth:2}]", "???", "'é☃'", "'a\\nb'", "a b c",
    "int('3')", "str(3)", "[${a}]", "{c:${a}}", "'1'", "/tmp/x", "a:b",
]  # fmt: skip
BAD_VALUES = ["1,2", "choice(1,2)", "glob(*)", "'''", "[1", "é☃"]
TYPED_VALUES: dict[str, list[str]] = {
    "must": ["3", "'4'", "???", "x", "1.5"], "maybe": ["null", "2", "${.must}"],
    "color": ["RED", "2", "Color.GREEN", "BLUE"], "name": ["y", "1", "null", "'${.must}'"],
    "ratio": ["1", "nan", "1e-3", "x"], "flag": ["yes", "0", "true", "3.0"], "either": ["x", "2", "[1]"],
    "where": ["/tmp", "a/b", "3"], "inner": ["{depth: 3}", "{nope: 1}", "${other}", "null", "???"],
    "inner.rate": ["0.5", "null", "x"], "inner.color": ["GREEN", "1"], "inner.depth": ["${..must}", "4"],
    "frozen.size": ["4"], "sizes": ["[3]", "[]", "[x]", "3"], "sizes.0": ["9", "x"],
    "inners": ["[{depth: 2}]", "[]"], "inners.0.depth": ["5", "x"], "rates": ["{b: 2}", "{}", "{a: x}"],
    "rates.a": ["3", "x"], "by_color": ["{GREEN: 2}"], "link": ["${.must}", "7", "x"],
    "free": ["[1]", "{a: 1}", "x", "null"], "nope": ["1"],
}  # fmt: skip
PREFIXES = st.sampled_from(["", "", "", "++"])
CHANGES = st.builds("{}{}={}".format, PREFIXES, st.sampled_from(PLACES), st.sampled_from(RAW_VALUES))
ADDITIONS = st.builds(
    "{}{}={}".format, st.sampled_from(["+", "++"]), st.sampled_from(NEW_PLACES), st.sampled_from(RAW_VALUES)
)
REMOVALS = st.builds("~{}".format, st.sampled_from(PLACES))
ODD = st.builds(
    "{}{}={}".format,
    st.sampled_from(["", "+", "++", "~"]),
    st.sampled_from(PLACES + ODD_PLACES + NEW_PLACES),
    st.sampled_from(RAW_VALUES + BAD_VALUES),
)
GROUPS = st.sampled_from(
    [
        "db=a", "db=b", "db=[a,b]", "+db@src2=b", "+db@z=a", "+model/opt=q", "+typed@more=base",
        "hydra/job_logging=disabled",
    ]
)  # fmt: skip
ODD_GROUPS = st.sampled_from(
    [
        "db=none", "+db=a", "++db=a", "db@src=b", "+db@src.deep=a", "~db", "~db=a", "~db@src", "+db@_global_=a",
        "db@src:dst=b", "model=x", "model=y", "+model=y", "~model", "model/opt=q", "model=null", "typed=other",
        "+typed=base", "db={host:9}", "model={}", "+both=a_x", "sweep.x=5", "+sweep.new=1", "~sweep", "+sweep=s",
        "sweep=s", "nogroup@x=1", "db@a.b=1", "hydra.job.name=z", "+hydra.job.env_set.K=v", "hydra.run.dir=o/${a}",
        "hydra={verbose:true}", "~hydra.verbose", "hydra.searchpath=[pkg://hydra.conf]", "+hydra.new=1",
        "hydra.job.env_copy=[NOT_SET_ANYWHERE]", "hydra.job.config.override_dirname.exclude_keys=[a]", ".a=1", "a.=1",
        "_global_=1", "=1", "a", "",
    ]
)  # fmt: skip


@st.composite
def override_lists(draw: st.DrawFn) -> list[str]:
    usual = st.one_of(CHANGES, CHANGES, CHANGES, ADDITIONS, GROUPS)
    lines = draw(st.lists(usual, max_size=4, unique_by=lambda line: line.split("=")[0]))
    if draw(st.integers(0, 3)) == 0:
        lines.insert(draw(st.integers(0, len(lines))), draw(st.one_of(ODD, ODD_GROUPS, REMOVALS)))
    return lines


HYDRA_OVERRIDES = st.sampled_from(
    [
        ("hydra.mode=MULTIRUN",),
        ("hydra.mode=MULTIRUN", "hydra.job.name=z", "hydra/job_logging=disabled"),
        ("hydra.sweep.dir=out/${a}", "a=5"),
        ("+hydra.job.env_set.A=${a}", "hydra.job.config.override_dirname.exclude_keys=[b.c]"),
    ]
)


@SLOW
@given(
    files=trees(), hydra_overrides=HYDRA_OVERRIDES, lists=st.lists(override_lists(), min_size=3, max_size=5)
)
def test_every_config_is_the_one_that_hydra_composes(
    files: dict[str, str], hydra_overrides: tuple[str, ...], lists: list[list[str]]
) -> None:
    with warnings.catch_warnings(), tree(files) as conf:
        warnings.simplefilter("ignore")
        composer = outcome(lambda: Composer(spec_of(conf, hydra_overrides)))  # type: ignore[arg-type,return-value]
        assert isinstance(composer, Composer)
        for overrides in lists:
            assert_equal_to_hydra(composer, overrides)


TYPED_TREES = st.sampled_from(
    [
        {"config.yaml": "defaults:\n- typed_root\n- _self_\nlr: 0.2\ntyped:\n  must: 3\n"},
        {
            "config.yaml": "defaults:\n- typed: base\n- typed@other: other\n- _self_\na: 1\nb:\n  c: ${typed.inner}\n"
        },
        {
            "config.yaml": "defaults:\n- typed: other\n- _self_\n"
            "typed:\n  link: ${other.depth}\n  free: ${other}\nother:\n  depth: 5\n"
        },
    ]
)


@st.composite
def typed_override_lists(draw: st.DrawFn) -> list[str]:
    lines: list[str] = []
    for key in draw(st.lists(st.sampled_from(list(TYPED_VALUES)[:-1]), max_size=4, unique=True)):
        values = TYPED_VALUES[key]
        lines.append(f"{draw(PREFIXES)}typed.{key}={draw(st.sampled_from(values[:1] * 4 + values))}")
    if draw(st.integers(0, 2)) == 0:
        key = draw(st.sampled_from(list(TYPED_VALUES)))
        value = draw(st.sampled_from(TYPED_VALUES[key]) | st.sampled_from(RAW_VALUES))
        prefix = draw(st.sampled_from(["", "+", "++", "~"]))
        odd = [f"{prefix}typed.{key}={value}", f"~typed.{key}", "typed=other", "~typed", "lr=1", "lr=x"]
        lines.append(draw(st.sampled_from(odd)))
    return lines


@SLOW
@given(files=TYPED_TREES, lists=st.lists(typed_override_lists(), min_size=3, max_size=6))
def test_structured_configs_keep_their_types(files: dict[str, str], lists: list[list[str]]) -> None:
    with tree(files) as conf:
        composer = Composer(spec_of(conf))
        for overrides in lists:
            assert_equal_to_hydra(composer, overrides)


def test_a_structured_primary_config_is_composed_too() -> None:
    with tree({}) as conf:
        composer = Composer(spec_of(conf, config_name="typed_root"))
        for overrides in (
            ["lr=1"],
            ["typed.color=RED", "typed.must=2"],
            ["+x=1"],
            ["++x=1"],
            ["lr=x"],
            ["sweep=3"],
        ):
            assert_equal_to_hydra(composer, overrides)
        assert OmegaConf.get_type(composer.compose(["lr=1"])) is Root


# ---- Where Hydra's way is taken, and where not -----------------------------------------------------------------

SMALL = {
    "config.yaml": "defaults: [{db: a}, _self_]\na: 1\nb: {c: 2}\nlink: ${b}\n",
    "db/a.yaml": "host: h\n",
    "db/b.yaml": "host: i\n",
}


@pytest.fixture
def small() -> Iterator[Composer]:
    with tree(SMALL) as conf:
        yield Composer(spec_of(conf))


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The override lists with which Hydra composed."""
    seen: list[list[str]] = []
    original = ConfigLoaderImpl.load_configuration

    def load(
        self: ConfigLoaderImpl, config_name: Any, overrides: list[str], *args: Any, **more: Any
    ) -> DictConfig:
        seen.append(overrides)
        return original(self, config_name, overrides, *args, **more)

    monkeypatch.setattr(ConfigLoaderImpl, "load_configuration", load)
    return seen


def test_hydra_composes_once_for_each_combination_of_options(small: Composer, loads: list[list[str]]) -> None:
    for host in ("a", "b", "a"):
        for value in range(5):
            small.compose([f"a={value}", f"db={host}", "+new=[1]", "link.c=1" if value > 9 else "b.c=${a}"])
            small.job_config([f"db={host}", f"a={value}"], num=value, job_id="", output_dir="/o")
    assert loads == [["hydra.mode=MULTIRUN", "db=a"], ["hydra.mode=MULTIRUN", "db=b"]]


@pytest.mark.parametrize(
    "override",
    [
        "hydra.job.name=x",
        "hydra={verbose: true}",
        "++sweep.x=1",
        "++link.c=3",
        "~link",
        "+link={d:1}",
        "link={d:1}",
    ],
)
def test_hydra_composes_what_it_alone_can(small: Composer, loads: list[list[str]], override: str) -> None:
    small.prepare([override])
    loads.clear()
    cfg = small.compose([override])
    assert loads == [["hydra.mode=MULTIRUN", override]]
    assert {"sweep", "hydra"}.isdisjoint(cfg)


def test_an_override_that_brings_an_interpolation_is_followed_by_one_that_crosses_it(small: Composer) -> None:
    assert_equal_to_hydra(small, ["+way=${b}", "way.c=9"])
    assert_equal_to_hydra(small, ["+way=${hydra.job}", "way.name=nine"])
    with tree({"config.yaml": "a: 1\n"}) as conf:
        plainly = Composer(spec_of(conf))
        assert_equal_to_hydra(plainly, ["+way=${hydra.verbose}", "~way"])
        assert "way" not in plainly.compose(["+way=${hydra.verbose}", "~way"])


def test_the_overrides_name_of_a_job_is_hydras() -> None:
    naming = "{kv_sep: '-', item_sep: '__', exclude_keys: [a, db]}"
    with tree(
        {
            **SMALL,
            "config.yaml": SMALL["config.yaml"]
            + f"hydra: {{job: {{config: {{override_dirname: {naming}}}}}}}\n",
        }
    ) as conf:
        composer = Composer(spec_of(conf, ("hydra.mode=MULTIRUN", "b.c=3")))
        overrides = ["a=5", "+z=1", "db=b", "hydra/job_logging=disabled", "+y=x y"]
        assert_equal_to_hydra(composer, overrides)
        job = composer.job_config(overrides, num=3, job_id="3", output_dir="/out").hydra
        assert job.job.override_dirname == "+y-x y__+z-1__b.c-3"
        assert list(job.overrides.task) == ["b.c=3", "a=5", "+z=1", "db=b", "+y=x y"]
        assert list(job.overrides.hydra) == ["hydra.mode=MULTIRUN", "hydra/job_logging=disabled"]


def test_a_value_may_cure_what_the_bookkeeping_of_its_options_fails_by() -> None:
    node = "hydra: {job: {config: {override_dirname: {exclude_keys: '${skip}'}}}}\n"
    with tree({"config.yaml": f"{node}skip: null\na: 1\n"}) as conf:
        composer = Composer(spec_of(conf))
        for overrides in ([], ["skip=[a]", "a=3"], ["skip=null"], ["skip=[]", "a=3"]):
            assert_equal_to_hydra(composer, overrides)
        composer.prepare(["skip=[a]"])
        assert composer.compose(["skip=[a]"]).skip == ["a"]
        assert composer.hydra(["skip=[a]", "a=3"]).job.override_dirname == "skip=[a]"


def test_a_failing_combination_is_composed_once(small: Composer, loads: list[list[str]]) -> None:
    for value in range(3):
        with pytest.raises(CompositionError, match="db/nope"):
            small.compose(["db=nope", f"a={value}"])
    assert len(loads) == 1


def test_a_result_shares_nothing_with_the_next_one(small: Composer) -> None:
    before = small.compose(["db=b", "+list=[1,{x:2}]"])
    with open_dict(before):
        before.b.c = 99
        before.db.host = "changed"
        before.list.append(3)
        before.db.new = 1
        OmegaConf.set_readonly(before.b, True)
    OmegaConf.get_cache(before)["now"][("x",)] = 1
    after = small.compose(["db=b", "+list=[1,{x:2}]"])
    assert OmegaConf.to_container(after) == {
        "a": 1, "b": {"c": 2}, "db": {"host": "i"}, "link": "${b}", "list": [1, {"x": 2}],
    }  # fmt: skip
    assert not OmegaConf.is_readonly(after.b)
    assert not OmegaConf.get_cache(after)["now"]


def test_a_job_may_consume_the_prepared_config(small: Composer) -> None:
    overrides = ["db=b", "a=5"]
    expected = anatomy(hydras_job(small, overrides))
    small.prepare(overrides)
    for _ in range(2):
        job = small.job_config(overrides, num=3, job_id="3", output_dir="/out", consume=True)
        assert anatomy(job) == expected


def test_times_are_those_of_the_sweep(small: Composer) -> None:
    master = small._loader.load_configuration("config", ["hydra.mode=MULTIRUN"], RunMode.MULTIRUN)
    OmegaConf.get_cache(master)["now"][("%Y",)] = "1999"
    spec = Composition.model_validate_json(composition_of(master, small._loader).model_dump_json())
    later = Composer(spec, loader=small._loader)
    assert later.compose(["+t=${now:%Y}"]).t == "1999"
    assert later.job_config(["+t=${now:%Y}"], num=0, job_id="0", output_dir="/").t == "1999"
    assert later.compose(["+t=${now:%m}"]).t != "1999"


def test_another_process_composes_the_same(small: Composer) -> None:
    spec = Composition.model_validate_json(small.spec.model_dump_json())
    assert spec == small.spec
    program = (
        "import sys; from repro_sweep.config.compose import *\n"
        "print(Composer(Composition.model_validate_json(sys.argv[1])).compose(sys.argv[2:]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, spec.model_dump_json(), "a=7", "db=b"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == str(small.compose(["a=7", "db=b"]))


def test_the_spec_of_a_running_sweep_composes_like_its_loader(small: Composer) -> None:
    master = small._loader.load_configuration(
        "config", ["hydra.mode=MULTIRUN", "hydra.job.name=z"], RunMode.MULTIRUN
    )
    spec = composition_of(master, small._loader)
    assert spec.hydra_overrides == ("hydra.mode=MULTIRUN", "hydra.job.name=z")
    assert spec.search_path == small.spec.search_path
    assert_equal_to_hydra(Composer(spec, loader=small._loader), ["a=3"])


# ---- Errors ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["a=1", "lr=3"],
            "Could not override 'lr'. To append to your config use +lr=3: Key 'lr' is not in struct",
        ),
        (["db=nope"], "In 'config': Could not find 'db/nope' Available options in 'db': a, b"),
        (["+a=3"], "Could not append to config. An item is already at 'a'."),
        (
            ["nogroup@x=1"],
            "Override nogroup@x=1 looks like a config group override, but config group 'nogroup'",
        ),
        (["a=[1"], "a=[1"),
        (["a=1,2"], "Ambiguous value for argument 'a=1,2'"),
        (["~zzz"], "Could not delete from config. 'zzz' does not exist."),
        (
            ["+typed=other", "typed.must=x"],
            "Error merging override typed.must=x: Value 'x' of type 'str' could not be",
        ),
        (["+typed=other", "typed.color=BLUE"], "Invalid value 'BLUE', expected one of [RED, GREEN]"),
    ],
)
def test_an_error_is_one_line_with_hydras_words_and_the_override(
    small: Composer, overrides: list[str], message: str
) -> None:
    with pytest.raises(CompositionError) as raised:
        small.compose(overrides)
    text = str(raised.value)
    assert message in text
    assert "\n" not in text
    assert overrides[-1] in text
    assert "search path" not in text.lower()
    assert raised.value.__cause__ is None or "Traceback" not in text


def test_a_config_that_cannot_be_read_is_an_error_that_names_the_place() -> None:
    with pytest.raises(CompositionError, match=r"config\.yaml"):
        composed({"config.yaml": "a: [1\nb: 2\n"}, [])
    with pytest.raises(CompositionError, match="Cannot find primary config 'config'"):
        composed({"other.yaml": "a: 1\n"}, [])
    with pytest.raises(CompositionError, match="Primary config directory not found"):
        Composer(spec_of(Path("/nowhere/at/all")))


# ---- YAML ------------------------------------------------------------------------------------------------------

TEXTS = st.sampled_from(STRINGS) | st.text(max_size=120) | st.text("ab '\":#-\n\\é", max_size=200)
LEAVES = (
    TEXTS
    | SCALARS
    | st.binary(max_size=70)
    | st.builds(Path, st.text("ab/ ", max_size=90))
    | st.sampled_from(Color)
)
NESTED: st.SearchStrategy[Any] = st.recursive(
    LEAVES,
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(
            TEXTS | st.integers() | st.booleans() | st.sampled_from(Color) | st.floats(), inner, max_size=4
        )
    ),
    max_leaves=12,
)


@settings(max_examples=250, deadline=None, suppress_health_check=list(HealthCheck))
@given(content=st.dictionaries(TEXTS, NESTED, max_size=6) | st.lists(NESTED, max_size=4))
def test_the_yaml_text_is_omegaconfs(content: Any) -> None:
    cfg = outcome(lambda: OmegaConf.create(content))
    if isinstance(cfg, DictConfig | ListConfig):
        assert to_yaml(cfg) == OmegaConf.to_yaml(cfg)


def test_a_text_is_folded_where_pyyaml_folds_it() -> None:
    for length in range(60, 100):
        for text in ("ab " * 40, "a: b" * 30, "é\x07 b" * 30, "ab" * 80, "a b\n" * 20):
            value = text[:length].strip()
            cfg = OmegaConf.create(
                {"k": value, "l": [value, [value]], "m": {"key": {"n": [{"o": value, "p": [value]}]}}}
            )
            assert to_yaml(cfg) == OmegaConf.to_yaml(cfg)


def test_a_path_that_occurs_twice_is_written_as_omegaconf_does() -> None:
    path = Path("/data/x")
    cfg = OmegaConf.create({"a": path, "b": {"c": [path]}, "d": "word " * 40})
    assert "&id001" in to_yaml(cfg)
    assert to_yaml(cfg) == OmegaConf.to_yaml(cfg)


def test_a_copy_is_equal_and_its_own_root() -> None:
    cfg = OmegaConf.structured(Root(typed=Typed(must=1)))
    OmegaConf.set_readonly(cfg.typed.inner, True)
    assert anatomy(clone(cfg)) == anatomy(cfg)
    assert anatomy(clone(cfg.typed)) == anatomy(cfg.typed, cfg)[:2] + anatomy(clone(cfg.typed))[2:]
    assert list(clone(cfg, without=("lr",))) == ["typed", "sweep"]


# ---- Problems and identities -----------------------------------------------------------------------------------


def problems(text: str, hydra: DictConfig | None = None) -> dict[str, str]:
    found = check(OmegaConf.create(text), hydra=hydra).problems
    return {problem.key: problem.message for problem in found}


def test_all_problems_are_found_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NOT_SET", raising=False)
    found = problems(
        """
        a: ???
        b: {c: '???', d: [1, '???', {e: '???'}]}
        f: ${nowhere}
        g: [ok, '${oc.env:NOT_SET}']
        h: ${nosuch:1}
        i: ${a}
        j: 'x${b.c}'
        k: ${k}
        l: {m: '${l}'}
        n: '${oc.decode:"[1"}'
        """
    )
    assert set(found) == {"a", "b.c", "b.d[1]", "b.d[2].e", "f", "g[1]", "h", "k", "l.m", "n"}
    assert "Interpolation key 'nowhere' not found" in found["f"]
    assert "Environment variable 'NOT_SET' not found" in found["g[1]"]
    assert "Unsupported interpolation type nosuch" in found["h"]


def test_an_interpolation_to_what_is_missing_elsewhere_is_a_problem() -> None:
    cfg = OmegaConf.create({"a": "???", "b": {"c": "${a}"}})
    assert [str(problem) for problem in check(cfg.b).problems] == [
        "b.c: MissingMandatoryValue while resolving interpolation: Missing mandatory value: a"
    ]


def test_containers_that_lead_into_each_other_are_a_problem() -> None:
    found = problems("a: {b: '${c}'}\nc: {d: '${a}'}")
    assert set(found.values()) == {"Recursive interpolation detected"}


def test_typed_values_are_checked_against_their_types(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GOOD", "8")
    monkeypatch.setenv("BAD", "s3cret")
    cfg = OmegaConf.structured(Typed(must=1))
    cfg.maybe = "${oc.env:GOOD}"
    cfg.link = "${hydra:job.num}"
    assert not check(cfg).problems
    cfg.maybe = "${oc.env:BAD}"
    cfg.link = "${name}"
    messages = [str(problem) for problem in check(cfg).problems]
    assert [message.split(":")[0] for message in messages] == ["maybe", "link"]
    assert "s3cret" not in messages[0]
    assert "Value 'x' of type 'str' could not be converted to Integer" in messages[1]


def test_what_only_the_running_job_knows_is_no_problem(small: Composer) -> None:
    text = "a: ${hydra:job.num}\nb: ${hydra:runtime.output_dir}/x\nc: ${hydra:job.num}\nd: ${hydra:job.num}${nowhere}"
    HydraConfig.instance().cfg = None
    assert set(problems(text, small.hydra([]))) == {"d"}
    assert set(problems(text)) == {"d"}


def test_secrets_paths_and_times_keep_their_text(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOKEN", "s3cret")
    checked = check(
        OmegaConf.create(
            """
            token: ${oc.env:TOKEN}
            url: 'https://${token}@host'
            nested: {all: '${auth}'}
            auth: {key: '${token}', user: me}
            started: ${now:%Y}
            out: ${hydra:runtime.output_dir}
            size: ${oc.decode:'3'}
            twice: ['${size}', '${auth.user}']
            """
        )
    )
    assert not checked.problems
    assert "s3cret" not in repr(checked)
    kept = {"$interpolation": "${token}"}
    assert checked.container == {
        "token": {"$interpolation": "${oc.env:TOKEN}"},
        "url": {"$interpolation": "https://${token}@host"},
        "nested": {"all": {"key": kept, "user": "me"}},
        "auth": {"key": kept, "user": "me"},
        "started": {"$interpolation": "${now:%Y}"},
        "out": {"$interpolation": "${hydra:runtime.output_dir}"},
        "size": 3,
        "twice": [3, "me"],
    }
    assert checked.params["nested.all.user"] == "me"
    assert checked.params["token"] == "${oc.env:TOKEN}"
    before = checked.digest
    monkeypatch.setenv("TOKEN", "another")
    assert check(OmegaConf.create({"token": "${oc.env:TOKEN}"})).digest != before


def test_a_choice_that_the_config_shows_is_part_of_the_identity(small: Composer) -> None:
    overrides = [["+name=${hydra:runtime.choices.db}", f"db={db}", "db.host=same"] for db in ("a", "b")]
    first, second = (check(small.compose(o), hydra=small.hydra(o)) for o in overrides)
    assert first.yaml == second.yaml
    assert first.container["name"] == "a"
    assert first.digest != second.digest


def test_resolvers_are_left_as_they_were_and_other_threads_are_not_observed(small: Composer) -> None:
    before = dict(OmegaConf.create({})._resolvers)
    seen: list[Any] = []
    cfg = OmegaConf.create({"a": "${from_thread:}", "b": "${oc.env:HOME}"})

    def resolve_elsewhere() -> str:
        thread = threading.Thread(target=lambda: seen.append(OmegaConf.create({"x": "${oc.env:HOME}"}).x))
        thread.start()
        thread.join()
        return "done"

    OmegaConf.register_new_resolver("from_thread", resolve_elsewhere)
    try:
        assert check(cfg).container["a"] == "done"
    finally:
        OmegaConf.clear_resolver("from_thread")
    assert seen
    assert dict(cfg._resolvers) == before


DISTINCT = [
    1, 1.0, "1", True, None, "None", "null", 0, 0.0, -0.0, False, "", math.nan, "nan", math.inf, -math.inf, b"a",
    "a", Path("a"), Color.RED, "RED", [], {}, [1], ["1"], {"1": 1}, {1: 1}, {True: 1}, {"$int:1": 1},
    {"$enum": "Color.RED"}, "???x", 10**30,
]  # fmt: skip


def test_values_of_different_types_have_different_identities() -> None:
    made = {identity("t", check(OmegaConf.create({"x": value})).container) for value in DISTINCT}
    assert len(made) == len(DISTINCT)


def test_an_identity_depends_on_task_source_data_and_config_but_not_on_order() -> None:
    base = identity("t", {"a": 1, "b": {"c": 2}}, "s", "d")
    assert base == identity("t", {"b": {"c": 2}, "a": 1}, "s", "d")
    others = [
        ("u", {"a": 1}, "s", "d"),
        ("t", {"a": 1, "b": {"c": 2}}, "x", "d"),
        ("t", {"a": 1, "b": {"c": 2}}, "s", "x"),
    ]
    assert len({base, identity("t", {"b": 1}), *(identity(*other) for other in others)}) == 5
    assert base == "3a289216f7920cae00ea7ea88b96626229d186748ca5af7551525f5162a7a7c3"


def test_plain_data_is_json_and_an_identity_says_the_same_everywhere() -> None:
    assert plain({"a": (1, {2}), "$b": Color.RED, 3: b"\xff"}) == {
        "a": [1, {"$set": [2]}],
        "$$b": {"$enum": "Color.RED"},
        "$int:3": {"$bytes": "ff"},
    }


@settings(max_examples=100, deadline=None)
@given(content=st.dictionaries(st.sampled_from("abcd"), VALUES))
def test_without_problems_the_container_is_what_omegaconf_resolves(content: dict[str, Any]) -> None:
    cfg = OmegaConf.create(content)
    checked = check(cfg)
    if "${" not in checked.yaml and "???" not in checked.yaml:
        assert checked.container == plain(OmegaConf.to_container(cfg, resolve=True))
        assert not checked.problems


# ---- Speed -----------------------------------------------------------------------------------------------------


def test_a_changed_value_costs_less_than_a_millisecond() -> None:
    values = "".join(f"  v{number}: {number}.5\n" for number in range(20))
    files = {
        "config.yaml": f"defaults: [{{optimizer: sgd}}, _self_]\nname: run\nseed: 0\ngroup:\n{values}",
        "optimizer/sgd.yaml": "lr: 0.1\nmomentum: 0.9\nnesterov: false\n",
    }
    with tree(files) as conf:
        composer = Composer(spec_of(conf))

        def point(number: int) -> str:
            overrides = ["optimizer=sgd", f"optimizer.lr={number % 50}", f"seed={number % 7}", "group.v3=8"]
            checked = check(composer.compose(overrides), hydra=composer.hydra(overrides))
            return identity("task", checked.container, checked.yaml)

        point(0)
        best_s = math.inf
        for _ in range(5):
            start = time.thread_time()
            for number in range(200):
                point(number)
            best_s = min(best_s, (time.thread_time() - start) / 200)
        assert best_s < 1.2e-3
