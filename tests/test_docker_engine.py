"""A team's server, workers and clusters in containers: built, started and used as docs/docker.md says."""

from __future__ import annotations

import json
import shutil
import sys
import tomllib
from base64 import b64encode
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest
from docker_engine import ROOT, Compose, Engine, EngineError, base_archive, make_wheels
from helpers import CONSOLE_SCRIPT, environment, write
from test_docker import load

# the base image and all others are made for the first test
pytestmark = pytest.mark.timeout(1500)

BASE, POSTGRES = "test-base:1", "test-postgres:1"
PORT = 5000
_MB = 1_000_000
PROJECT = {
    "conf/config.yaml": "{x: 0, wait_s: 0.0}",
    "conf/sweep/grid.yaml": """
defaults: [base_sweep, sampler: grid, executor: local, _self_]
name: grid
task: tasks.train
metric: score
direction: maximize
reuse: false
params: {x: "range(6)"}
""",
    "tasks.py": """
import socket
import time

import repro_sweep


def train(cfg):
    time.sleep(cfg.wait_s)
    print("runs on", socket.gethostname())
    (repro_sweep.artifact_dir() / "where.txt").write_text(socket.gethostname())
    repro_sweep.report(0, score=cfg.x)
    return {"score": cfg.x}
""",
}

_ASK = f"""
import http.client, json, sys
request = json.loads(sys.argv[1])
connection = http.client.HTTPConnection("127.0.0.1", {PORT}, timeout=60)
method = "POST" if request["data"] else "GET"
connection.request(method, request["path"], request["data"], request["headers"])
print(connection.getresponse().status)
"""


@dataclass(frozen=True, kw_only=True)
class Team:
    """What runs: the engine, the compose file in a copy of the project, and its secrets."""

    engine: Engine
    compose: Compose
    folder: Path

    def secret(self, name: str) -> str:
        return (self.folder / "docker" / "secrets" / name).read_text()

    def outside(self, *words: str, user: str = "admin", password: str | None = None) -> tuple[int, str]:
        """Run repro-sweep of this machine against the published port; its status and what it says."""
        env = environment({
            "MLFLOW_TRACKING_URI": f"http://127.0.0.1:{PORT}",
            "MLFLOW_TRACKING_USERNAME": user,
            "MLFLOW_TRACKING_PASSWORD": self.secret("mlflow_admin_password") if password is None else password,
            "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
        })  # fmt: skip
        done = self.engine.inside(CONSOLE_SCRIPT, *words, env=env)
        return done.returncode, done.stdout if not done.returncode else done.stderr

    def ranking(self, name: str) -> list[float]:
        """The scores of a sweep, best first, as this machine sees them."""
        status, said = self.outside("rank", name, "--format=json")
        assert not status, said
        return [point["means"]["score"] for point in json.loads(said)["points"]]

    def status(
        self,
        path: str,
        *,
        user: str | None = None,
        password: str = "",
        host: str = f"localhost:{PORT}",
        data: str = "",
    ) -> int:
        """The server's answer to a request, by its status."""
        request = {
            "path": path,
            "data": data or None,
            "headers": {"Host": host, "Content-Type": "application/json"},
        }
        if user:
            request["headers"]["Authorization"] = f"Basic {b64encode(f'{user}:{password}'.encode()).decode()}"
        done = self.engine.inside(sys.executable, "-c", _ASK, json.dumps(request), env=environment())
        assert not done.returncode, done.stderr
        return int(done.stdout)


def copy_of_project(folder: Path) -> None:
    """What the images are built from, with wheels, so that no build needs a network; and secrets."""
    own = shutil.ignore_patterns("secrets", ".env", "*.whl", "__pycache__", "*.egg-info")
    for name in ("docker", "launcher"):
        shutil.copytree(ROOT / name, folder / name, ignore=own)
    for name in ("pyproject.toml", "constraints.txt", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    needs = load("install").requirements(project, ["ray", "server"], core=True)
    make_wheels(folder / "docker" / "wheels", [*needs, "hatchling"])


@pytest.fixture(scope="module")
def team(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Team]:
    """A server and its database, which are up; images of everything else."""
    folder, project = tmp_path_factory.mktemp("built"), tmp_path_factory.mktemp("project")
    write(project, PROJECT)
    env = {
        "BASE_IMAGE": BASE, "POSTGRES_IMAGE": POSTGRES, "PROJECT": str(project), "MLFLOW_WORKERS": "2",
        "RAY_NODE_CPUS": "1", "SLURM_NODE_CPUS": "2",
    }  # fmt: skip
    with Engine() as engine:
        with ThreadPoolExecutor() as pool:
            copied = pool.submit(copy_of_project, folder)
            engine.docker("import", str(base_archive()), BASE)
            copied.result()
        (project / "multirun").mkdir()
        project.chmod(0o755)  # pytest's folders are their owner's alone
        postgres = ROOT / "tests" / "docker_images" / "postgres"
        engine.docker("build", "--tag", POSTGRES, "--build-arg", f"BASE_IMAGE={BASE}", str(postgres))
        compose = Compose(engine, folder / "docker", env)
        engine.run_here(folder / "docker" / "make-secrets.sh")
        compose("--profile", "worker", "--profile", "slurm", "build", timeout_s=1200)
        compose("up", "--detach")
        compose.until_healthy("database", "mlflow")
        yield Team(engine=engine, compose=compose, folder=folder)
    shutil.rmtree(folder)  # pytest would keep the wheels


@pytest.fixture(scope="module")
def swept(team: Team) -> Team:
    """The same after a sweep in a worker's container."""
    team.compose("run", "--rm", "worker", "repro-sweep", "+sweep=grid")
    return team


# --- images ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("image", "most_mb"), [("mlflow", 850), ("worker", 1250), ("slurm", 1250)])
def test_an_image_is_small_and_runs_as_a_user(team: Team, image: str, most_mb: int) -> None:
    name = f"repro-sweep-{image}:0.1.0"
    size, base = (
        int(team.engine.docker("image", "inspect", "--format={{.Size}}", which)) for which in (name, BASE)
    )
    assert size - base < most_mb * _MB
    assert team.engine.docker("run", "--rm", "--entrypoint=id", name, "-u").strip() == "1000"


def test_images_hold_no_secret_and_no_torch_and_versions_as_pinned(team: Team) -> None:
    code = (
        "from importlib import metadata; print(*(f'{d.name}=={d.version}' for d in metadata.distributions()))"
    )
    words = ("run", "--rm", "--entrypoint=python", "repro-sweep-slurm:0.1.0", "-c", code)
    installed = dict(word.lower().split("==") for word in team.engine.docker(*words).split())
    pinned = dict(
        line.lower().split("==")
        for line in (ROOT / "constraints.txt").read_text().splitlines()
        if "==" in line
    )
    unpinned = {name: version for name, version in installed.items() if pinned.get(name) != version}
    assert set(unpinned) == {"repro-sweep", "pip", "setuptools"}
    assert "torch" not in installed
    look = (
        "--user=root",
        "--entrypoint=find",
        "repro-sweep-slurm:0.1.0",
        "/",
        "-xdev",
        "-name",
        "*_password",
    )
    assert not team.engine.docker("run", "--rm", *look)


# --- the server --------------------------------------------------------------------------------------------------


def test_a_sweep_in_a_container_is_ranked_on_another_machine_with_the_right_password_only(
    swept: Team,
) -> None:
    assert swept.ranking("grid") == [5, 4, 3, 2, 1, 0]
    for password in ("wrong", swept.secret("mlflow_sweep_password")):
        status, said = swept.outside("rank", "grid", password=password)
        assert status
        assert "401" in said


def test_artifacts_go_through_the_server(swept: Team) -> None:
    code = "import repro_sweep; print(repro_sweep.best_trial('grid').artifact('where.txt').read_text())"
    env = environment({
        "MLFLOW_TRACKING_URI": f"http://127.0.0.1:{PORT}", "MLFLOW_TRACKING_USERNAME": "sweep",
        "MLFLOW_TRACKING_PASSWORD": swept.secret("mlflow_sweep_password"),
    })  # fmt: skip
    done = swept.engine.inside(CONSOLE_SCRIPT.with_name("python"), "-c", code, env=env)
    assert len(done.stdout.strip()) == 12, done.stderr  # a container's id
    kept = swept.compose("exec", "-T", "mlflow", "find", "artifacts", "-name", "where.txt")
    assert len(kept.split()) == 6


def test_the_server_answers_nobody_else_and_no_other_host(team: Team) -> None:
    path = "/api/2.0/mlflow/experiments/get-by-name?experiment_name=Default"
    admin = team.secret("mlflow_admin_password")
    assert team.status(path, user="admin", password=admin) == 200
    assert team.status(path) == 401
    for password in ("", "admin", "password", "password1234"):
        assert team.status(path, user="admin", password=password) == 401
    assert team.status(path, user="admin", password=admin, host="evil.example") == 403
    assert team.status(path, user="admin", password=admin, host=f"localhost.evil.example:{PORT}") == 403


def test_an_account_reads_what_is_anothers_and_does_not_change_it(swept: Team) -> None:
    said = swept.compose("run", "--rm", "-T", "mlflow", "user", "alice", text="alices-long-password\n")
    assert "alice: made" in said
    assert not swept.outside("rank", "grid", user="alice", password="alices-long-password")[0]
    experiment = "/api/2.0/mlflow/runs/create", json.dumps({"experiment_id": "1"})
    as_alice = {"user": "alice", "password": "alices-long-password"}
    as_sweep = {"user": "sweep", "password": swept.secret("mlflow_sweep_password")}
    assert swept.status(experiment[0], data=experiment[1], **as_alice) == 403
    assert swept.status(experiment[0], data=experiment[1], **as_sweep) == 200
    said = swept.compose("run", "--rm", "-T", "mlflow", "user", "alice", text="another-long-password\n")
    assert "alice: has the new password" in said
    assert swept.outside("rank", "grid", user="alice", password="alices-long-password")[0]


def test_no_secret_is_in_settings_or_command_lines_and_several_processes_serve(team: Team) -> None:
    shown = [team.engine.docker("inspect", team.compose.container(name)) for name in ("database", "mlflow")]
    processes = [
        team.engine.docker("top", team.compose.container(name), "-eo", "pid,args")
        for name in ("database", "mlflow")
    ]
    for name in ("postgres_password", "mlflow_admin_password", "mlflow_sweep_password", "mlflow_secret_key"):
        assert not any(team.secret(name) in text for text in (*shown, *processes)), name
    assert processes[1].count("spawn_main(") == 2, processes[1]


def test_a_worker_does_not_reach_the_database(team: Team) -> None:
    code = "import socket; socket.create_connection(('database', 5432), timeout=5)"
    with pytest.raises(EngineError, match=r"gaierror|TimeoutError|OSError"):
        team.compose("run", "--rm", "worker", "python", "-c", code)


def test_all_of_it_comes_back_from_a_backup(swept: Team) -> None:
    """Into new volumes; a password that was changed meanwhile is taken over."""
    compose = swept.compose
    dump = compose("exec", "-T", "database", "pg_dump", "-U", "mlflow", "mlflow")
    artifacts = compose("exec", "-T", "mlflow", "sh", "-c", "tar -C /var/lib/mlflow -c artifacts | base64")
    (swept.folder / "docker" / "secrets" / "mlflow_admin_password").unlink()
    swept.engine.run_here(swept.folder / "docker" / "make-secrets.sh")
    compose("down", "--volumes")
    compose("up", "--detach", "database")
    compose.until_healthy("database")
    compose(
        "exec",
        "-T",
        "database",
        "psql",
        "-U",
        "mlflow",
        "-d",
        "mlflow",
        "-q",
        "-v",
        "ON_ERROR_STOP=1",
        text=dump,
    )
    compose("run", "--rm", "mlflow", "upgrade")
    compose("up", "--detach")
    compose.until_healthy("mlflow")
    compose("exec", "-T", "mlflow", "sh", "-c", "base64 -d | tar -C /var/lib/mlflow -x", text=artifacts)
    assert swept.ranking("grid") == [5, 4, 3, 2, 1, 0]
    assert len(compose("exec", "-T", "mlflow", "find", "artifacts", "-name", "where.txt").split()) == 6


def test_nothing_is_lost_with_containers_and_the_server_outlives_its_database(swept: Team) -> None:
    swept.compose("up", "--detach", "--force-recreate")
    swept.compose.until_healthy("database", "mlflow")
    swept.compose("restart", "database")
    swept.compose.until_healthy("database")
    assert swept.ranking("grid") == [5, 4, 3, 2, 1, 0]


# --- clusters ----------------------------------------------------------------------------------------------------


def hosts(team: Team, service: str, sweep: str) -> list[str]:
    """Where the trials of a sweep ran."""
    said = team.compose("exec", "-T", service, "sh", "-c", f"cat multirun/{sweep}/trials/*/trial.log")
    return [line.split()[-1] for line in said.splitlines() if line.startswith("runs on")]


def test_a_sweep_runs_on_all_containers_of_a_ray_cluster(team: Team) -> None:
    team.compose("--profile", "ray", "up", "--detach")
    team.compose.until_healthy("ray-head")
    try:
        sweep = ("repro-sweep", "+sweep=grid", "sweep.name=ray", "sweep/executor=ray", "wait_s=1")
        team.compose("exec", "-T", "ray-head", *sweep)
        ran = hosts(team, "ray-head", "ray")
        assert len(ran) == 6
        assert set(ran) == {"ray-head", team.compose.container("ray-worker")[:12]}
        assert "tasks.py" not in team.compose("exec", "-T", "ray-worker", "ls", "/work")
        assert team.ranking("ray") == [5, 4, 3, 2, 1, 0]
    finally:
        team.compose("rm", "--stop", "--force", "ray-head", "ray-worker")


def test_a_sweep_runs_on_both_nodes_of_a_slurm_cluster(team: Team) -> None:
    nodes = ("slurm-node1", "slurm-node2")
    team.compose("--profile", "slurm", "up", "--detach")
    team.compose.until_healthy("slurm-controller", *nodes)
    try:
        # a job takes all CPUs of its node
        size = (
            "sweep.executor.workers=2",
            "sweep.executor.cpus_per_task=2",
            "sweep.executor.slots=1",
            "sweep.executor.poll_s=1",
        )
        sweep = ("repro-sweep", "+sweep=grid", "sweep.name=slurm", "sweep/executor=slurm", "wait_s=1", *size)
        team.compose("exec", "-T", "slurm-controller", *sweep)
        ran = hosts(team, "slurm-controller", "slurm")
        assert len(ran) == 6
        assert set(ran) == set(nodes)
        assert team.ranking("slurm") == [5, 4, 3, 2, 1, 0]
    finally:
        team.compose("rm", "--stop", "--force", "slurm-controller", *nodes)
