"""Trials on a real GPU: `make gpu`, on a machine that has one. Nothing here is skipped: without a GPU it fails."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from helpers import MakeProject, Project, Sweep, run

from repro_sweep import TrialState
from repro_sweep.states import FailureKind

ROOT = Path(__file__).parents[1]
SHARING = 4
HELD_MB = 512
SEES_GPUS = {"CUDA_VISIBLE_DEVICES": None}
TASKS = """
    import os
    import time
    from pathlib import Path

    import torch

    MIB = 2**20


    def meet(folder, how_many):
        # returns when so many processes have come here
        folder = Path(folder)
        (folder / str(os.getpid())).touch()
        ends = time.monotonic() + 120
        while len(list(folder.iterdir())) < how_many:
            if time.monotonic() > ends:
                raise TimeoutError(f"{len(list(folder.iterdir()))} of {how_many} trials ran at the same time")
            time.sleep(0.05)


    def share(cfg):
        held = torch.full((cfg.mb * MIB // 4,), float(cfg.x), device="cuda")
        meet("holding", cfg.trials)
        free, total = torch.cuda.mem_get_info()
        seen = {
            "gpus": torch.cuda.device_count(),
            "own_mb": torch.cuda.memory_allocated() / MIB,
            "used_mb": (total - free) / MIB,
            "mean": held.mean().item(),
        }
        meet("seen", cfg.trials)
        return seen


    def too_much(cfg):
        total = torch.cuda.mem_get_info()[1]
        meet("holding", 2)  # a second attempt finds both there
        held = torch.empty(int(0.6 * total), dtype=torch.uint8, device="cuda")
        time.sleep(5)  # the other one finds no room meanwhile
        return {"held": held.numel() / total}
"""


@pytest.fixture(autouse=True)
def gpu(tmp_path: Path) -> None:
    """These tests need one that torch can use."""
    code = "import torch; torch.zeros(1, device='cuda')"
    seen = run("-W", "ignore", "-c", code, cwd=tmp_path, env=SEES_GPUS, python=True)
    assert seen.returncode == 0, f"no GPU that torch can use: {seen.stderr.strip().splitlines()[-1]}"


@pytest.fixture
def project(make_project: MakeProject) -> Project:
    """A project with both tasks, and the folders where trials meet."""
    made = make_project({"conf/config.yaml": f"x: 0\nmb: {HELD_MB}\ntrials: {SHARING}\n", "tasks.py": TASKS})
    for name in ("holding", "seen"):
        (made.root / name).mkdir()
    return made


def swept(project: Project, *overrides: str) -> Sweep:
    """The default sweep, run to its end."""
    done = project.run("+sweep=default", *overrides, env=SEES_GPUS)
    assert done.returncode == 0, done.stderr
    return project.sweep("default")


def test_four_trials_share_one_gpu_each_with_memory_of_its_own(project: Project) -> None:
    """They run at the same time, forked from one process; each sees one GPU and holds its own memory on it."""
    sweep = swept(
        project, "sweep.task=tasks.share", "sweep.metric=mean", "sweep.direction=maximize",
        f"sweep.resources.gpus_per_trial={1 / SHARING}", f"x=range({SHARING})",
    )  # fmt: skip
    assert sweep.states() == {TrialState.COMPLETE: SHARING}
    for number, trial in sweep.by("x").items():
        seen = sweep.last_attempt(trial).metrics
        assert seen["gpus"] == 1
        assert seen["mean"] == number
        assert seen["own_mb"] == pytest.approx(HELD_MB, rel=0.01)
        assert seen["used_mb"] >= SHARING * HELD_MB


def test_a_trial_without_room_on_its_gpu_gets_it_for_itself(project: Project) -> None:
    """Two trials want 60 % of the memory each: torch's error is told from others, and nobody's result is lost."""
    sweep = swept(
        project, "sweep.task=tasks.too_much", "sweep.metric=held", "sweep.direction=maximize",
        "sweep.resources.gpus_per_trial=0.5", "x=0,1",
    )  # fmt: skip
    assert sweep.states() == {TrialState.COMPLETE: 2}
    failed = [each for each in sweep.attempts if each.state is TrialState.FAIL]
    assert failed
    assert {each.kind for each in failed} == {FailureKind.GPU_OUT_OF_MEMORY}


def test_the_study_is_exact_on_a_gpu_with_strict_determinism(make_project: MakeProject) -> None:
    """Trained on the GPU, four trials at a time, then all again, three at a time: the same bits."""
    project = make_project({})
    for name in ("conf", "sweeps"):
        shutil.copytree(ROOT / name, project.root / name, ignore=shutil.ignore_patterns("__pycache__"))
    share = f"sweep.resources.gpus_per_trial={1 / SHARING}"
    done = project.run(
        "+sweep=optimizer_grid",
        "epochs=3",
        "sweep.repeats.seed=0",
        "sweep.determinism.strict=true",
        share,
        env=SEES_GPUS,
    )
    assert done.returncode == 0, done.stderr
    sweep = project.sweep("optimizer_grid")
    assert sweep.states() == {TrialState.COMPLETE: 16}
    for trial in sweep.trials:
        record = json.loads((sweep.folder(trial) / "record.json").read_text())
        assert record["gpus_seen"]
        assert record["facts"]["torch"]["cuda"]
        assert record["facts"]["torch"]["deterministic"]
        assert record["environment"]["gpus"][0]["driver"]
    again = project.run(
        "reproduce", "optimizer_grid", "--all", "--format", "json", "sweep.executor.slots=3", env=SEES_GPUS
    )
    assert again.returncode == 0, again.stderr + again.stdout
    said = json.loads(again.stdout)
    assert [each["verdict"] for each in said] == ["EXACT"] * 16
    assert all(each["values"] >= 9 for each in said)
