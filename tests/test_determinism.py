"""Chance in trials: what is seeded, from what, and what a strict sweep refuses."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from helpers import MakeProject, Project, Sweep, environment

from repro_sweep import TrialState
from repro_sweep.sweep import Determinism
from repro_sweep.worker import seeding

DRAW = """
    import json
    import os
    import random
    from pathlib import Path

    import repro_sweep

    AT_IMPORT = random.random()


    def train(cfg):
        import numpy  # neither was imported before
        import torch

        drawn = {
            "seed": repro_sweep.seed(),
            "at_import": AT_IMPORT,
            "random": random.random(),
            "numpy": float(numpy.random.rand()),
            "torch": torch.rand(1).item(),
            "generator": torch.rand(1, generator=repro_sweep.generator()).item(),
            "order": list({"a", "b", "c", "d", "e"}),
            "cublas": os.environ.get("CUBLAS_WORKSPACE_CONFIG"),
            "strict": torch.are_deterministic_algorithms_enabled(),
            "cudnn": [torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark],
            "threads": torch.get_num_threads(),
        }
        folder = Path(os.environ["DRAWN"])
        (folder / f"{cfg.x}.json").write_text(json.dumps(drawn))
        return drawn["random"]


    def scatter(cfg):
        import torch

        return torch.zeros(3).put_(torch.tensor([0, 0]), torch.tensor([1.0, 2.0])).sum().item()
"""


def drawn(make: MakeProject, name: str, *overrides: str, conf: str = "x: 0") -> dict[str, dict[str, Any]]:
    """What the trials of a sweep drew, by their ``x``."""
    project = make({"conf/config.yaml": conf, "draw.py": DRAW}, name=name)
    folder = project.root / "drawn"
    folder.mkdir()
    done = project.run("+sweep=default", "sweep.task=draw.train", *overrides, env={"DRAWN": str(folder)})
    assert done.returncode == 0, done.stderr
    return {path.stem: json.loads(path.read_text()) for path in folder.iterdir()}


@pytest.fixture(scope="module")
def sweeps(make_shared_project: MakeProject) -> SimpleNamespace:
    """The same trials in one order on one slot, and in another one on three; with other seeds; with none."""
    make = make_shared_project
    return SimpleNamespace(
        one=drawn(make, "one", "x=1,2,3", "sweep.executor.slots=1"),
        three=drawn(make, "three", "x=3,1,2", "sweep.executor.slots=3"),
        other=drawn(make, "other", "x=1,2", "sweep.determinism.seed=7"),
        own=drawn(make, "own", "x=1,2", conf="x: 0\nseed: 5\n"),
        chance=drawn(make, "chance", "x=1,2", "sweep.determinism.seed=null"),
        strict=drawn(make, "strict", "x=1", "sweep.determinism.strict=true"),
    )


def test_trials_draw_the_same_whichever_slot_or_order(sweeps: SimpleNamespace) -> None:
    """Python's, numpy's and torch's numbers, also where these are imported by the trial; and the order of sets."""
    assert sweeps.one == sweeps.three
    assert len(sweeps.one) == 3


def test_trials_without_a_seed_get_one_each_from_the_sweep_s_seed(sweeps: SimpleNamespace) -> None:
    """So repeats differ from each other, and another sweep's seed gives others."""
    seeds = [each["seed"] for each in [*sweeps.one.values(), *sweeps.other.values()]]
    assert len(set(seeds)) == len(seeds) == 5
    for what in ("random", "numpy", "torch", "generator"):
        assert len({each[what] for each in sweeps.one.values()}) == 3


def test_a_seed_in_the_config_is_the_trial_s(sweeps: SimpleNamespace) -> None:
    """Its trials draw the same numbers, which is what their user asked for."""
    first, second = sweeps.own.values()
    assert first == second
    assert first["seed"] == 5


def test_what_modules_draw_at_their_import_is_seeded_too(sweeps: SimpleNamespace) -> None:
    """With the sweep's seed."""
    assert len({each["at_import"] for each in (*sweeps.one.values(), *sweeps.own.values())}) == 1
    assert sweeps.other["1"]["at_import"] != sweeps.one["1"]["at_import"]


def test_without_a_seed_all_is_left_to_chance(sweeps: SimpleNamespace) -> None:
    """``sweep.determinism.seed=null``: trials are not seeded, and draw different numbers."""
    first, second = sweeps.chance.values()
    assert first["seed"] is second["seed"] is None
    for what in ("random", "numpy"):
        assert first[what] != second[what]


def test_a_strict_sweep_sets_what_torch_documents(sweeps: SimpleNamespace) -> None:
    """And no other does."""
    strict, usual = sweeps.strict["1"], sweeps.one["1"]
    assert (strict["cublas"], strict["strict"], strict["cudnn"]) == (":4096:8", True, [True, False])
    assert (usual["cublas"], usual["strict"]) == (None, False)
    assert strict["threads"] == usual["threads"] == 1


@pytest.fixture(scope="module")
def scattered(make_shared_project: MakeProject) -> dict[str, Sweep]:
    """An operation without a deterministic implementation, under each setting."""
    found = {}
    for strict in ("true", "false", "warn"):
        project: Project = make_shared_project(
            {"conf/config.yaml": "x: 0", "draw.py": DRAW}, name=f"scatter-{strict}"
        )
        project.run("+sweep=default", "sweep.task=draw.scatter", f"sweep.determinism.strict={strict}")
        found[strict] = project.sweep("default")
    return found


def test_strict_refuses_what_has_no_deterministic_implementation(scattered: dict[str, Sweep]) -> None:
    """The trial fails and says what it was."""
    [attempt] = scattered["true"].attempts
    assert attempt.state is TrialState.FAIL
    assert "does not have a deterministic implementation" in (attempt.message or "")
    assert scattered["false"].states() == {TrialState.COMPLETE: 1}


def test_strict_warn_only_says_so(scattered: dict[str, Sweep]) -> None:
    """In the trial's log."""
    sweep = scattered["warn"]
    assert sweep.states() == {TrialState.COMPLETE: 1}
    log = (sweep.folder(sweep.trials[0]) / "trial.log").read_text()
    assert "does not have a deterministic implementation" in log


@pytest.mark.parametrize(
    ("override", "said"),
    [
        (
            "sweep.determinism.strict=maybe",
            "sweep.determinism.strict: must be true, false or warn, got 'maybe'",
        ),
        ("sweep.determinism.seed=-1", "sweep.determinism.seed: must be at least 0, got -1"),
    ],
)
def test_wrong_options_are_one_line(make_bare_project: MakeProject, override: str, said: str) -> None:
    """Before anything has started."""
    project = make_bare_project({"conf/config.yaml": "x: 0", "draw.py": DRAW})
    done = project.run("+sweep=default", "sweep.task=draw.train", override)
    assert done.returncode == 2
    assert done.stderr.strip().splitlines()[-1].endswith(said)


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"seed": 3}, 3),
        ({"seed": 0}, 0),
        ({"seed": True}, None),
        ({"seed": None}, None),
        ({"seed": "x"}, None),
    ],
)
def test_only_a_whole_number_is_a_seed(config: dict[str, object], expected: int | None) -> None:
    """Else it is derived."""
    derived = seeding.seed_of(Determinism(), {}, "identity")
    assert derived is not None
    assert 0 <= derived < 2**32
    assert seeding.seed_of(Determinism(), config, "identity") == (derived if expected is None else expected)


def test_the_user_s_own_hash_seed_stays() -> None:
    """Unless it says random, which is Python's default."""
    usual = {"PYTHONHASHSEED": "9"}
    assert seeding.interpreter(Determinism(seed=9), {}) == usual
    assert seeding.interpreter(Determinism(seed=9), {"PYTHONHASHSEED": "random"}) == usual
    assert seeding.interpreter(Determinism(seed=9), {"PYTHONHASHSEED": "3"}) == {}
    assert seeding.interpreter(Determinism(seed=None), {}) == {}


def test_workers_of_a_data_loader_draw_different_numbers_and_the_same_in_each_run(tmp_path: Path) -> None:
    """With ``worker_init_fn`` and ``generator``, also outside of a sweep."""
    script = tmp_path / "load.py"
    script.write_text(
        "import random, sys\n"
        "import numpy, torch\n"
        "import repro_sweep\n"
        "class Data(torch.utils.data.Dataset):\n"
        "    def __len__(self): return 4\n"
        "    def __getitem__(self, index): return [random.random(), numpy.random.rand(), index]\n"
        "if __name__ == '__main__':\n"
        "    torch.manual_seed(int(sys.argv[1]))\n"
        "    made = torch.utils.data.DataLoader(\n"
        "        Data(), num_workers=2, shuffle=True, worker_init_fn=repro_sweep.worker_init_fn,\n"
        "        generator=repro_sweep.generator())\n"
        "    print([[float(value) for value in row] for row in made])\n"
    )
    first, again, other = (
        subprocess.run(
            [sys.executable, script, seed], env=environment(), capture_output=True, text=True, check=True
        ).stdout
        for seed in ("1", "1", "2")
    )
    assert first == again != other
    rows = json.loads(first)
    assert len({row[0] for row in rows}) == len({row[1] for row in rows}) == 4
