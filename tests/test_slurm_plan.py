"""``plan`` and the start of a run on SLURM: the job script is shown, and the cluster judges it before it gets it."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers import MakeProject, Project

from repro_sweep import cluster as checks
from slurm.testbed import Cluster, Options

pytest_plugins = ["slurm_cluster"]

FILES = {
    "conf/config.yaml": "x: 0\n",
    "tasks.py": """
        def train(cfg):
            return {"score": float(cfg.x)}
    """,
}
SWEEP = (
    "+sweep=default", "sweep/executor=slurm", "sweep.task=tasks.train", "sweep.metric=score", "x=range(12)",
    "sweep.executor.workers=2", "sweep.executor.gpus_per_node=2", "sweep.resources.gpus_per_trial=1",
    "sweep.executor.host=127.0.0.1", "sweep.executor.poll_s=1",
)  # fmt: skip


@pytest.fixture
def project(make_project: MakeProject) -> Project:
    return make_project(FILES)


@pytest.fixture(scope="module")
def strict_cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """A cluster that enforces its associations and limits."""
    made = Cluster(tmp_path_factory.mktemp("strict") / "cluster", Options(nodes=1, enforce=True))
    with made as running:
        yield running


def plan(
    project: Project, cluster: Cluster, *overrides: str, path: str | None = None
) -> subprocess.CompletedProcess[str]:
    env = {**cluster.exports(), "PATH": path or cluster.environment()["PATH"]}
    return project.run("plan", *SWEEP, *overrides, env=env)


def said(result: subprocess.CompletedProcess[str]) -> list[str]:
    """The lines of an error."""
    assert result.returncode == 2, result.stdout + result.stderr
    assert result.stdout == ""
    return [line.removeprefix("repro-sweep: ") for line in result.stderr.splitlines()]


def test_the_plan_shows_the_job_script_and_submits_nothing(project: Project, cluster: Cluster) -> None:
    before = project.files()
    result = plan(project, cluster, "sweep.executor.partition=high", "sweep.executor.mem_gb=1.5")
    assert result.returncode == 0, result.stderr
    script = [line[4:] for line in result.stdout.splitlines() if line.startswith("  | ")]
    assert script[0] == "#!/bin/bash"
    for option in ("array=0-1%2", "gpus-per-node=2", "partition=high", "mem=1536M", "time=60"):
        assert f"#SBATCH --{option}" in script
    assert script[-1].startswith("srun ")
    assert "repro_sweep.worker.slurm" in script[-1]
    assert "by SLURM's estimate" in result.stdout
    assert cluster.run("squeue", "--noheader") == ""
    assert project.files().keys() == before.keys()


def test_a_script_has_no_more_workers_than_there_is_work_for(project: Project, cluster: Cluster) -> None:
    result = plan(project, cluster, "x=range(2)", "sweep.executor.workers=20")
    assert result.returncode == 0, result.stderr
    assert "--array" not in result.stdout


@pytest.mark.parametrize(
    ("override", "problem"),
    [
        (
            "partition=gpuu",
            (
                "sweep.executor.partition: 'gpuu' is not a partition of this cluster"
                " (debug, requeued, cancelled, suspended, high)"
            ),
        ),
        (
            "gpus_per_node=4",
            "sweep.executor.gpus_per_node: 4 is more than the nodes of partition 'debug' have (at most 2)",
        ),
        (
            "gpus_per_node='a100:1'",
            "sweep.executor.gpus_per_node: 'a100' is not a type of GPU in partition 'debug' (fake)",
        ),
        (
            "cpus_per_task=64",
            "sweep.executor.cpus_per_task: 64 is more than the nodes of partition 'debug' have (at most 4)",
        ),
        (
            "mem_gb=64",
            "sweep.executor.mem_gb: 64 is more than the nodes of partition 'debug' have (at most 3.9)",
        ),
        (
            "constraint=fast",
            "sweep.executor.constraint: 'fast' is not a feature of the nodes of partition 'debug', which have none",
        ),
        (
            "gpus_per_node=many",
            "sweep.executor.gpus_per_node: must be a number, or a type and a number like a100:2, got 'many'",
        ),
    ],
)
def test_what_the_cluster_does_not_have_is_said_in_one_line(
    override: str, problem: str, project: Project, cluster: Cluster
) -> None:
    assert said(plan(project, cluster, f"sweep.executor.{override}")) == [problem]


def test_all_that_is_wrong_is_said_at_once(project: Project, cluster: Cluster) -> None:
    lines = said(plan(project, cluster, "sweep.executor.cpus_per_task=64", "sweep.executor.mem_gb=64"))
    assert [line.partition(":")[0] for line in lines] == [
        "sweep.executor.cpus_per_task",
        "sweep.executor.mem_gb",
    ]


def test_a_type_of_gpu_that_is_there_is_asked_for(project: Project, cluster: Cluster) -> None:
    result = plan(project, cluster, "sweep.executor.gpus_per_node='fake:2'")
    assert result.returncode == 0, result.stderr
    assert "#SBATCH --gpus-per-node=fake:2" in result.stdout
    assert "2 SLURM jobs with 2 slots" in result.stdout


def test_sbatch_itself_judges_what_has_no_check_of_its_own(project: Project, cluster: Cluster) -> None:
    lines = said(plan(project, cluster, "+sweep.executor.additional_parameters.nodelist=node99"))
    assert len(lines) == 1
    assert lines[0].startswith("sweep/executor=slurm: sbatch refuses such a job: ")
    assert "node name" in lines[0]


def test_a_run_is_refused_for_the_same_reasons_before_it_starts(project: Project, cluster: Cluster) -> None:
    env = {**cluster.exports(), "PATH": cluster.environment()["PATH"]}
    result = project.run(*SWEEP, "sweep.executor.partition=gpuu", env=env)
    assert said(result)[0].startswith("sweep.executor.partition: 'gpuu'")
    assert not (project.root / "multirun").exists()


def test_limits_of_a_partition_are_checked(project: Project, cluster: Cluster) -> None:
    try:
        cluster.run("scontrol", "update", "PartitionName=high", "MaxTime=30", "DenyAccounts=other")
        cluster.run("scontrol", "update", "PartitionName=cancelled", "State=DOWN")
        high = ("sweep.executor.partition=high", "sweep.executor.account=other")
        assert said(plan(project, cluster, *high)) == [
            "sweep.executor.timeout_min: 60 is more than partition 'high' allows (30)",
            "sweep.executor.account: 'other' is not allowed in partition 'high'",
        ]
        assert said(plan(project, cluster, "sweep.executor.partition=cancelled")) == [
            "sweep.executor.partition: 'cancelled' is DOWN: no job starts there"
        ]
    finally:
        cluster.run("scontrol", "update", "PartitionName=high", "MaxTime=INFINITE", "DenyAccounts=")
        cluster.run("scontrol", "update", "PartitionName=cancelled", "State=UP")


def test_an_account_that_nobody_enforces_is_only_noted(project: Project, cluster: Cluster) -> None:
    result = plan(project, cluster, "sweep.executor.account=nope")
    assert result.returncode == 0, result.stderr
    note = "sweep.executor.account: 'nope' is not an account of yours (lab, other, root); this cluster does not enforce"
    assert note in result.stdout


def test_accounts_qos_and_their_limits_are_checked_where_they_are_enforced(
    project: Project, strict_cluster: Cluster
) -> None:
    assert said(plan(project, strict_cluster, "sweep.executor.account=nope", "sweep.executor.qos=nope")) == [
        "sweep.executor.account: 'nope' is not an account of yours (lab, other, root)",
        "sweep.executor.qos: 'nope' is not a qos of this cluster (normal)",
    ]
    strict_cluster.run("sacctmgr", "-i", "add", "qos", "short", "MaxWall=00:20:00")
    assert said(plan(project, strict_cluster, "sweep.executor.account=lab", "sweep.executor.qos=short")) == [
        "sweep.executor.qos: 'short' is not one that your account may use (normal)",
        "sweep.executor.timeout_min: 60 is more than qos 'short' allows (20)",
    ]
    strict_cluster.run("sacctmgr", "-i", "modify", "user", "root", "set", "qos+=short", "MaxSubmitJobs=1")
    lines = said(plan(project, strict_cluster, "sweep.executor.account=lab", "sweep.executor.qos=short"))
    assert lines == ["sweep.executor.timeout_min: 60 is more than qos 'short' allows (20)"]
    fits = plan(project, strict_cluster, "sweep.executor.account=lab", "sweep.executor.timeout_min=10")
    assert "account 'lab' allows 1 jobs at a time: not all 2 workers will run" in fits.stdout


def test_a_cluster_that_does_not_answer_is_no_reason_not_to_plan(
    project: Project, cluster: Cluster, tmp_path: Path
) -> None:
    """Where nothing listens: commands try for a minute."""
    text = cluster.layout.slurm_conf.read_text()
    (tmp_path / "slurm.conf").write_text(
        "\n".join("SlurmctldPort=1" if "SlurmctldPort" in line else line for line in text.splitlines())
    )
    began = time.monotonic()
    env = {"SLURM_CONF": str(tmp_path / "slurm.conf"), "PATH": cluster.environment()["PATH"]}
    result = project.run("plan", *SWEEP, env=env)
    assert result.returncode == 0, result.stderr
    assert "the cluster does not answer, nothing is checked: sbatch says nothing for 15 s" in result.stdout
    assert "#SBATCH --gpus-per-node=2" in result.stdout
    assert time.monotonic() - began < 40


def test_a_machine_without_slurm_says_what_is_missing(
    project: Project, cluster: Cluster, tmp_path: Path
) -> None:
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/python").symlink_to(os.path.realpath("/bin/true"))
    assert said(plan(project, cluster, path=str(tmp_path / "bin"))) == [
        (
            "sweep/executor=slurm: there is no SLURM on this machine"
            " (sbatch, squeue, scancel, scontrol, sinfo not on PATH)"
        )
    ]


def test_a_sweep_that_is_done_asks_no_cluster(project: Project, cluster: Cluster) -> None:
    done = project.run(
        "+sweep=default", "sweep.task=tasks.train", "sweep.metric=score", "x=range(2)", "sweep.name=done"
    )
    assert done.returncode == 0, done.stderr
    result = plan(project, cluster, "x=range(2)", "sweep.name=done", "sweep.executor.partition=gpuu")
    assert result.returncode == 0, result.stderr
    assert "job script" not in result.stdout


# --- what other clusters say -----------------------------------------------------------------------------------

GPUS = "sweep.executor.gpus_per_node"
SINFO = """\
cpu*|120|128|256000|(null)|amd,ib|mixed
gpu|8|64|512000|gpu:a100:4(S:0-1),nvme:1|intel,ib|idle
gpu|2|96|1024000|gpu:h100:8(IDX:0-7)|intel|down*
old|3|16+|64000+|gpu:2|(null)|drained
"""


@pytest.mark.parametrize(
    ("gres", "gpus"),
    [
        ("gpu:a100:4(S:0-1),nvme:1", {"a100": 4}),
        ("gpu:a100:2,gpu:v100:1", {"a100": 2, "v100": 1}),
        ("gpu:2", {"": 2}),
        ("gpu", {"": 1}),
        ("(null)", {}),
        ("gpu:1g.5gb:7", {"1g.5gb": 7}),
    ],
)
def test_gpus_are_read_from_what_slurm_calls_gres(gres: str, gpus: dict[str, int]) -> None:
    assert checks.gpus_in(gres) == gpus


@pytest.mark.parametrize(
    ("text", "minutes"),
    [
        ("2-00:00:00", 2880),
        ("01:30:00", 90),
        ("30:00", 30),
        ("45", 45),
        ("1-12", 2160),
        ("UNLIMITED", float("inf")),
    ],
)
def test_time_limits_are_read_as_slurm_writes_them(text: str, minutes: float) -> None:
    assert checks.minutes_of(text) == minutes


@pytest.mark.parametrize(
    ("wish", "problems"),
    [
        ({"partition": "gpu", "gpus": 4, "gpu_type": "a100"}, []),
        ({"partition": "cpu,gpu", "gpus": 4}, []),
        (
            {"partition": "gpu", "gpus": 5, "gpu_type": "a100"},
            [f"{GPUS}: 5 of type 'a100' is more than the nodes of partition 'gpu' have (at most 4)"],
        ),
        (
            {"partition": "gpu", "gpus": 4, "gpu_type": "a100", "cpus": 96},
            ["sweep.executor: no node of partition 'gpu' has 4 a100 GPUs, 96 CPUs together"],
        ),
        (
            {"partition": "gpu", "gpus": 8, "nodes": 3},
            ["sweep.executor: 3 nodes with 8 GPUs, 1 CPUs are more than partition 'gpu' has (2)"],
        ),
        (
            {"gpus": 1},
            ["sweep.executor.gpus_per_node: 1 is more than the nodes of partition 'cpu' have (at most 0)"],
        ),
        ({"constraint": "amd&ib"}, []),
        ({"partition": "old", "gpus": 2, "cpus": 16}, []),
    ],
)
def test_wishes_are_compared_with_all_kinds_of_nodes(wish: dict[str, object], problems: list[str]) -> None:
    facts = checks.Facts(nodes=checks.nodes_of(SINFO))
    found = checks.compare(checks.Wish(**wish), facts)  # type: ignore[arg-type]
    assert list(found.problems) == problems


@pytest.mark.parametrize("state", ["drained", "down*", "idle*"])
def test_nodes_that_are_all_away_are_noted(state: str) -> None:
    facts = checks.Facts(nodes=checks.nodes_of(SINFO.replace("drained", state)))
    found = checks.compare(checks.Wish(partition="old"), facts)
    assert found.notes == (f"all nodes that have what a job needs are {state}: jobs would wait",)
    assert found.away


def test_a_cluster_without_a_default_partition_wants_one_named() -> None:
    text = SINFO.replace("cpu*", "cpu")
    found = checks.compare(checks.Wish(), checks.Facts(nodes=checks.nodes_of(text)))
    assert found.problems == (
        "sweep.executor.partition: this cluster has no default partition; choose one of cpu, gpu, old",
    )


def test_nothing_known_is_nothing_wrong() -> None:
    assert (
        checks.compare(checks.Wish(partition="x", account="y", qos="z"), checks.Facts()) == checks.Findings()
    )
