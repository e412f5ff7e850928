"""The testbed is a real Slurm cluster: it starts, runs, preempts, loses nodes, and leaves nothing behind."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from slurm.testbed import Cluster, Options, TestbedError
from slurm.testbed.cli import main

pytest_plugins = ["slurm_cluster"]

ROOT = Path(__file__).parents[1]
START_BOUND_S = 20
FOREVER = "while true; do sleep 0.1; done"
SMALL = Options(nodes=1, gpus=0, accounting=False, kill_wait_s=2)


@pytest.fixture
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A short path for a testbed; whatever runs there at the end is stopped."""
    path = tmp_path_factory.mktemp("bed") / "cluster"
    yield path
    if (path / "testbed.json").exists():
        Cluster.attach(path).stop()


def command(*words: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "slurm.testbed", *words], cwd=ROOT, capture_output=True, text=True, timeout=100
    )


def wait_state(cluster: Cluster, job: str, *states: str) -> None:
    cluster.until(lambda: cluster.job_state(job) in states, f"job {job} is {' or '.join(states)}", 60)


def run_job(cluster: Cluster, out: Path, *options: str, script: str) -> list[str]:
    """Run a job to its end; returns the lines that it printed."""
    job = cluster.submit(f"--output={out}", *options, script=script)
    wait_state(cluster, job, "COMPLETED")
    return out.read_text().splitlines()


def processes_of(directory: Path) -> list[str]:
    """The command lines of all processes that name a testbed's directory, or have it in their environment."""
    found = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit() or int(entry.name) == os.getpid():
            continue
        try:
            command_line = (entry / "cmdline").read_bytes()
            if str(directory).encode() in command_line + b"\0" + (entry / "environ").read_bytes():
                found.append(command_line.replace(b"\0", b" ").decode(errors="replace"))
        except OSError:
            continue
    return found


def test_it_starts_within_its_bound(running_cluster: Cluster) -> None:
    assert 0 < running_cluster.start_s < START_BOUND_S


def test_squeue_and_sinfo_answer(cluster: Cluster) -> None:
    assert cluster.run("squeue", "--noheader") == ""
    partitions = cluster.run("sinfo", "--noheader", "--format=%R %D %G").splitlines()
    assert partitions == [
        f"{name} 2 gpu:fake:2" for name in ("debug", "requeued", "cancelled", "suspended", "high")
    ]


def test_a_job_on_two_gpus_sees_them_and_its_node(cluster: Cluster, tmp_path: Path) -> None:
    script = "echo $CUDA_VISIBLE_DEVICES $SLURMD_NODENAME"
    assert run_job(cluster, tmp_path / "out", "--gpus=2", "--nodelist=node2", script=script) == ["0,1 node2"]


def test_two_jobs_on_a_node_get_different_gpus(cluster: Cluster, tmp_path: Path) -> None:
    files = [tmp_path / "0", tmp_path / "1"]
    options = ("--gpus=1", "--nodelist=node1", "--open-mode=append")
    for file in files:
        cluster.submit(f"--output={file}", *options, script=f"echo $CUDA_VISIBLE_DEVICES; {FOREVER}")
    cluster.until(lambda: all(file.exists() and file.read_text() for file in files), "both jobs run")
    assert {file.read_text() for file in files} == {"0\n", "1\n"}


def test_all_tasks_of_an_array_run(cluster: Cluster, tmp_path: Path) -> None:
    job = cluster.submit("--array=1-3", f"--output={tmp_path}/%a", script="echo $SLURM_ARRAY_JOB_ID")
    cluster.until(lambda: not cluster.run("squeue", "--noheader"), "the array ends")
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == dict.fromkeys("123", f"{job}\n")


def test_one_step_runs_on_two_nodes(cluster: Cluster) -> None:
    printed = cluster.run("srun", "--nodes=2", "bash", "-c", "echo $SLURMD_NODENAME")
    assert sorted(printed.split()) == ["node1", "node2"]


def test_sacct_shows_a_job_that_ended(cluster: Cluster) -> None:
    job = cluster.submit("--account=other", script="exit 3")
    wait_state(cluster, job, "FAILED")
    query = (
        "sacct",
        "--noheader",
        "--parsable2",
        "--allocations",
        f"--jobs={job}",
        "--format=State,ExitCode,Account",
    )
    cluster.until(lambda: cluster.run(*query).strip() == "FAILED|3:0|other", "sacct shows the end")


def test_a_preempted_job_of_requeued_runs_again(cluster: Cluster, tmp_path: Path) -> None:
    out = tmp_path / "out"
    low = cluster.submit(
        "--partition=requeued", "--exclusive", "--nodelist=node1", f"--output={out}", "--open-mode=append",
        script=f"echo start $SLURM_RESTART_COUNT; {FOREVER}",
    )  # fmt: skip
    cluster.until(lambda: out.exists() and out.read_text() == "start\n", "the job runs")
    high = cluster.submit("--partition=high", "--exclusive", "--nodelist=node1", script="true")
    wait_state(cluster, high, "COMPLETED")
    assert cluster.job_state(low) in {"PENDING", "RUNNING"}
    cluster.until(lambda: "start 1\n" in out.read_text(), "the job runs again", 60)
    assert "DUE TO PREEMPTION" in out.read_text()


def test_a_preempted_job_of_cancelled_ends(cluster: Cluster) -> None:
    low = cluster.submit("--partition=cancelled", "--exclusive", "--nodelist=node1", script=FOREVER)
    wait_state(cluster, low, "RUNNING")
    high = cluster.submit("--partition=high", "--exclusive", "--nodelist=node1", script="true")
    wait_state(cluster, high, "COMPLETED")
    assert cluster.job_state(low) == "PREEMPTED"


def test_a_preempted_job_of_suspended_goes_on_later(cluster: Cluster) -> None:
    low = cluster.submit("--partition=suspended", "--cpus-per-task=4", "--nodelist=node1", script=FOREVER)
    wait_state(cluster, low, "RUNNING")
    high = cluster.submit("--partition=high", "--cpus-per-task=4", "--nodelist=node1", script=FOREVER)
    wait_state(cluster, low, "SUSPENDED")
    wait_state(cluster, high, "RUNNING")
    cluster.run("scancel", high)
    wait_state(cluster, low, "RUNNING")


def test_a_job_outlives_the_controller(cluster: Cluster, tmp_path: Path) -> None:
    go = tmp_path / "go"
    job = cluster.submit(script=f"until [ -e {go} ]; do sleep 0.1; done")
    wait_state(cluster, job, "RUNNING")
    # a controller that is killed forgets what it has not saved yet, up to five seconds
    cluster.controller.stop()
    with pytest.raises(TestbedError, match="DOWN"):
        cluster.run("scontrol", "ping")
    go.touch()
    cluster.controller.start()
    wait_state(cluster, job, "COMPLETED")


def test_jobs_run_without_the_accounting_daemon_and_are_in_sacct_afterwards(cluster: Cluster) -> None:
    cluster.accounting.kill()
    job = cluster.submit(script="true")
    wait_state(cluster, job, "COMPLETED")
    cluster.accounting.start()
    query = ("sacct", "--noheader", "--parsable2", "--allocations", f"--jobs={job}", "--format=State")
    cluster.until(lambda: cluster.run(*query).strip() == "COMPLETED", "sacct shows the job", 60)


@pytest.mark.slow
def test_a_lost_node_takes_its_job_along(cluster: Cluster) -> None:
    job = cluster.submit("--nodelist=node2", "--no-requeue", script=FOREVER)
    wait_state(cluster, job, "RUNNING")
    node = cluster.node("node2")
    cluster.until(node.jobs, "the job's processes are there")
    node.lose()
    assert not node.jobs()
    wait_state(cluster, job, "NODE_FAIL")
    assert cluster.node_state("node2").startswith("down")
    assert cluster.node_state("node1") == "idle"
    node.start()
    cluster.until(lambda: cluster.node_state("node2") == "idle", "the node is back")


def test_two_testbeds_know_nothing_of_each_other(cluster: Cluster, folder: Path) -> None:
    with Cluster(folder, SMALL) as other:
        job = other.submit(script=FOREVER)
        wait_state(other, job, "RUNNING")
        assert cluster.run("squeue", "--noheader") == ""
    assert all(cluster.status().values())
    assert processes_of(folder) == []


def test_unknown_accounts_are_refused_where_that_is_asked_for(folder: Path) -> None:
    with Cluster(folder, Options(nodes=1, gpus=0, enforce=True)) as strict:
        wait_state(strict, strict.submit("--account=lab", script="true"), "COMPLETED")
        with pytest.raises(TestbedError, match="Invalid account"):
            strict.submit("--account=nobody", script="true")


def test_the_command_line_starts_a_cluster_and_stops_it_to_the_last_process(folder: Path) -> None:
    small = ("--nodes", "1", "--gpus", "0", "--no-accounting")
    started = command("start", folder, *small)
    assert started.returncode == 0, started.stderr
    assert command("env", folder).stdout == f"export SLURM_CONF={folder}/etc/slurm.conf\n"
    assert command("start", folder, *small).stderr == f"error: a testbed runs in {folder}: stop it first\n"
    cluster = Cluster.attach(folder)
    # a job that ignores signals, and a process that has left it
    job = cluster.submit(script=f"trap '' TERM; setsid sleep 600 & {FOREVER}")
    wait_state(cluster, job, "RUNNING")
    cluster.until(
        lambda: any("sleep 600" in line for line in processes_of(folder)), "the job's process is there"
    )
    cluster.controller.kill()
    status = command("status", folder)
    assert status.returncode == 3
    assert "slurmctld  stopped" in status.stdout
    assert command("stop", folder).returncode == 0
    assert processes_of(folder) == []
    assert command("stop", folder).returncode == 0


def test_a_stopped_testbed_starts_again(folder: Path) -> None:
    for _ in range(2):
        with Cluster(folder, SMALL) as cluster:
            assert cluster.submit(script="true") == "1"


def test_a_daemon_that_does_not_start_shows_what_it_said_and_the_others_are_stopped(folder: Path) -> None:
    with pytest.raises(TestbedError, match=r"(?s)slurmctld ended at its start.*KillWait"):
        Cluster(folder, Options(nodes=1, gpus=0, accounting=False, kill_wait_s=-1)).start()
    assert processes_of(folder) == []


def test_missing_programs_are_named_with_the_command_that_installs_them(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def which(name: str, path: str | None = None) -> str | None:
        return None if name in {"slurmctld", "munged"} else f"/usr/bin/{name}"

    monkeypatch.setattr(shutil, "which", which)
    assert main(["start", str(folder)]) == 1
    assert capsys.readouterr().err == (
        "error: not installed: munged, slurmctld; install with: "
        "apt-get install -y --no-install-recommends slurm-wlm munge slurmdbd mariadb-server\n"
    )


def test_a_folder_with_something_else_is_left_alone(folder: Path) -> None:
    folder.mkdir()
    (folder / "mine").touch()
    with pytest.raises(TestbedError, match="holds something else"):
        Cluster(folder, SMALL).start()
    assert [path.name for path in folder.iterdir()] == ["mine"]


@pytest.mark.parametrize(("name", "why"), [("a b", "letters, digits"), ("x" * 100, "at most 60 characters")])
def test_a_path_that_slurm_can_not_hold_is_an_error(name: str, why: str) -> None:
    with pytest.raises(TestbedError, match=why):
        Cluster(Path("/tmp") / name)
