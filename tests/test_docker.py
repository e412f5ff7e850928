"""What the images and the compose file promise, as far as no engine is needed to see it."""

from __future__ import annotations

import configparser
import importlib.util
import os
import re
import stat
import subprocess
import sys
import tomllib
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parent.parent
DOCKER = ROOT / "docker"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
COMPOSE: dict[str, Any] = yaml.safe_load((DOCKER / "compose.yaml").read_text())
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]
OURS = {"mlflow", "worker", "slurm"}
HERE = {"PATH": os.environ["PATH"], "HOME": "/nonexistent"}


def load(name: str) -> ModuleType:
    """One of the programs of the images; their folder is no package."""
    spec = importlib.util.spec_from_file_location(f"docker_{name}", DOCKER / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def server() -> ModuleType:
    return load("server")


@pytest.fixture(scope="module")
def installer() -> ModuleType:
    return load("install")


def settings(server: ModuleType, **changes: str) -> Any:
    return server.Settings.read(
        {"DATABASE_URI": "postgresql+psycopg://mlflow@database:5432/mlflow", **changes}
    )


# --- the compose file --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("files", [("compose.yaml",), ("compose.yaml", "compose.gpu.yaml")])
def test_the_compose_file_is_valid(files: tuple[str, ...]) -> None:
    command = [
        "docker-compose",
        *(word for name in files for word in ("--file", str(DOCKER / name))),
        "config",
    ]
    env = {**HERE, "TORCH_INDEX_URL": "file:///torch"}
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert not done.returncode, done.stderr
    made = yaml.safe_load(done.stdout)["services"]
    assert set(made) == set(SERVICES)
    assert all(
        made[name]["build"]["args"]["TORCH_INDEX_URL"] == "file:///torch" for name in ("worker", "ray-head")
    )
    assert ("deploy" in made["ray-worker"]) == (len(files) == 2)


def test_gpus_need_the_index_of_a_build_of_torch() -> None:
    command = [
        "docker-compose",
        "--file",
        str(DOCKER / "compose.yaml"),
        "--file",
        str(DOCKER / "compose.gpu.yaml"),
    ]
    done = subprocess.run([*command, "config"], env=HERE, capture_output=True, text=True)
    assert done.returncode
    assert "version of CUDA" in done.stderr


def test_a_server_and_its_database_need_no_profile_and_all_else_has_one() -> None:
    profiles = {name: service.get("profiles") for name, service in SERVICES.items()}
    assert profiles == {
        "database": None, "mlflow": None, "worker": ["worker"], "ray-head": ["ray"], "ray-worker": ["ray"],
        "slurm-controller": ["slurm"], "slurm-node1": ["slurm"], "slurm-node2": ["slurm"],
    }  # fmt: skip


def test_all_services_are_confined_and_what_lasts_has_a_health_check() -> None:
    for name, service in SERVICES.items():
        assert service["cap_drop"] == ["ALL"], name
        assert service["security_opt"] == ["no-new-privileges:true"], name
        # Ray ends a node's container with the node
        assert "healthcheck" in service or name in {"worker", "ray-worker"}
        assert not service.get("privileged"), name
    assert SERVICES["database"]["read_only"]
    assert SERVICES["mlflow"]["read_only"]


def test_only_the_server_reaches_the_database_and_only_this_machine_reaches_the_server() -> None:
    assert {name for name, service in SERVICES.items() if "back" in service["networks"]} == {
        "database",
        "mlflow",
    }
    assert SERVICES["database"]["networks"] == ["back"]
    assert COMPOSE["networks"]["back"] == {"internal": True}
    published = {name: service["ports"] for name, service in SERVICES.items() if "ports" in service}
    assert published == {"mlflow": ["${MLFLOW_BIND:-127.0.0.1}:${MLFLOW_PORT:-5000}:5000"]}


def test_what_must_last_is_on_volumes() -> None:
    assert SERVICES["database"]["volumes"] == ["database:/var/lib/postgresql/data"]
    assert SERVICES["mlflow"]["volumes"] == ["artifacts:/var/lib/mlflow"]
    for name in ("worker", "ray-head", "slurm-controller", "slurm-node1", "slurm-node2"):
        assert {"type": "volume", "source": "sweeps", "target": "/work/multirun"} in SERVICES[name]["volumes"]


# --- secrets -----------------------------------------------------------------------------------------------------


def test_secrets_come_from_files_only_and_none_has_a_default() -> None:
    for name, secret in COMPOSE["secrets"].items():
        assert secret == {"file": f"${{SECRETS:-./secrets}}/{name}"}
    for name, service in SERVICES.items():
        assert service["secrets"], name
        for key, value in service.get("environment", {}).items():
            if re.search("PASSWORD|TOKEN|SECRET|KEY", key):
                assert str(value).startswith("/run/secrets/"), key
    used = {secret for service in SERVICES.values() for secret in service["secrets"]}
    assert used == set(COMPOSE["secrets"])


def test_no_service_sees_secrets_that_it_does_not_need() -> None:
    assert SERVICES["database"]["secrets"] == ["postgres_password"]
    workers = set(SERVICES) - {"database", "mlflow"}
    seen = {secret for name in workers for secret in SERVICES[name]["secrets"]}
    assert seen == {"mlflow_sweep_password", "ray_token", "munge_key"}


def test_secrets_are_made_at_random_and_those_that_are_there_are_kept(tmp_path: Path) -> None:
    command = [DOCKER / "make-secrets.sh", tmp_path / "one"]
    subprocess.run(command, check=True, capture_output=True)
    first = {path.name: path.read_bytes() for path in (tmp_path / "one").iterdir()}
    assert set(first) == set(COMPOSE["secrets"])
    assert len(set(first.values())) == len(first)
    assert all(len(text) >= 32 for text in first.values())
    # shown to the users of containers, whoever they are, and to nobody else of this machine
    assert stat.S_IMODE((tmp_path / "one").stat().st_mode) == 0o700
    assert {stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "one").iterdir()} == {0o444}
    (tmp_path / "one" / "ray_token").unlink()
    said = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    again = {path.name: path.read_bytes() for path in (tmp_path / "one").iterdir()}
    assert again.pop("ray_token") != first.pop("ray_token")
    assert again == first
    assert said.count("kept") == len(first)


def test_secrets_get_into_no_image_and_no_repository() -> None:
    seen = (DOCKER / "Dockerfile.dockerignore").read_text().splitlines()
    assert seen.index("docker/secrets") > seen.index("!docker") > seen.index("*")
    ignored = subprocess.run(
        ["git", "check-ignore", "docker/secrets/x", "docker/.env", "docker/wheels/x"], cwd=ROOT
    )
    assert not ignored.returncode


# --- images ------------------------------------------------------------------------------------------------------


def stages() -> dict[str, list[str]]:
    """The instructions of each stage of the Dockerfile, with those of the stages that it starts from."""
    found: dict[str, list[str]] = {}
    lines = (DOCKER / "Dockerfile").read_text().replace("\\\n", " ").splitlines()
    current: list[str] = []
    for line in lines:
        if match := re.fullmatch(r"FROM (\S+) AS (\S+)", line):
            current = found[match[2]] = list(found.get(match[1], []))
        elif line and not line.startswith("#"):
            current.append(line)
    return found


@pytest.mark.parametrize("image", sorted(OURS))
def test_an_image_runs_as_a_user_who_is_not_root(image: str) -> None:
    users = [line.split()[1] for line in stages()[image] if line.startswith("USER ")]
    assert users[-1] == "sweep"


def test_the_database_runs_as_a_user_who_is_not_root() -> None:
    assert SERVICES["database"]["user"] == "postgres"


def test_images_and_packages_are_pinned(installer: ModuleType) -> None:
    defaults = dict(
        re.findall(
            r"\$\{(BASE_IMAGE|POSTGRES_IMAGE|REPRO_SWEEP_TAG):-([^}]+)}",
            (DOCKER / "compose.yaml").read_text(),
        )
    )
    assert re.fullmatch(r"python:3\.\d+\.\d+-slim-\w+", defaults["BASE_IMAGE"])
    assert re.fullmatch(r"postgres:\d+\.\d+-\w+", defaults["POSTGRES_IMAGE"])
    assert defaults["REPRO_SWEEP_TAG"] == PROJECT["version"]
    assert f"ARG BASE_IMAGE={defaults['BASE_IMAGE']}\n" in (DOCKER / "Dockerfile").read_text()
    pinned = {line.partition("==")[0].lower() for line in (ROOT / "constraints.txt").read_text().splitlines()}
    for line in installer.requirements(PROJECT, ["all"], core=True):
        assert re.match(r"[\w.-]+", line)[0].lower() in pinned  # type: ignore[index]


def test_no_registry_and_no_index_is_named() -> None:
    for path in DOCKER.rglob("*"):
        if path.is_file() and "secrets" not in path.parts and path.suffix != ".whl":
            assert not re.search(
                r"https?://(?!mlflow:5000|127\.0\.0\.1)[\w-]+\.\w|\b(ghcr|quay|docker)\.io\b",
                path.read_text(),
            ), path


# --- what is installed in them -----------------------------------------------------------------------------------


def pip_calls(installer: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[list[str]]:
    """What pip is called with; there are no wheels."""
    calls: list[list[str]] = []

    def fake(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        calls.append(command[command.index("install") + 1 :])
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(installer, "WHEELS", tmp_path)
    monkeypatch.setattr(installer.subprocess, "run", fake)
    return calls


def test_torch_needs_the_index_of_a_build(
    installer: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    calls = pip_calls(installer, monkeypatch, tmp_path)
    monkeypatch.delenv("TORCH_INDEX_URL", raising=False)
    for extra in ("torch", "gp", "all"):
        assert installer.main(["--core", f"ray,{extra}"]) == 1
        said = capsys.readouterr().err
        assert said.startswith("install.py: EXTRAS: these need torch, so set TORCH_INDEX_URL")
        assert said.count("\n") == 1
    assert not calls


def test_torch_comes_from_its_index_and_everything_else_from_the_usual_one(
    installer: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    calls = pip_calls(installer, monkeypatch, tmp_path)
    installer.install(["mlflow", "torch>=2.4"], {"TORCH_INDEX_URL": "file:///cuda"})
    torch, rest = calls
    assert torch[-4:] == ["--no-deps", "--index-url", "file:///cuda", "torch"]
    assert rest[-4:] == ["--extra-index-url", "file:///cuda", "mlflow", "torch>=2.4"]


def test_wheels_that_are_there_are_all_that_is_asked(
    installer: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    calls = pip_calls(installer, monkeypatch, tmp_path)
    (tmp_path / "torch-2.13.0-py3-none-any.whl").touch()
    installer.install(["torch"], {})
    assert [call[-4:] for call in calls] == [["--no-index", "--find-links", str(tmp_path), "torch"]]


def test_extras_that_name_others_are_resolved_and_unknown_ones_refused(installer: ModuleType) -> None:
    extras = PROJECT["optional-dependencies"]
    everything = installer.requirements(PROJECT, ["all"], core=False)
    assert set(everything) >= {*extras["ray"], *extras["server"], *extras["torch"]}
    assert not any(line.startswith("repro-sweep") for line in everything)
    with pytest.raises(
        installer.InstallError, match=r"EXTRAS: 'tourch' is no extra of this project \(all, bench"
    ):
        installer.requirements(PROJECT, ["tourch"], core=True)


def test_tests_of_packages_are_left_out_of_an_image(installer: ModuleType, tmp_path: Path) -> None:
    for name in (
        "pandas/tests/a.py",
        "pandas/core/tests/b.py",
        "pandas/core/c.py",
        "mlflow/tests/d.py",
        "ray/jars/e.jar",
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    installer.slim(tmp_path)
    assert {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*.py")} == {
        "pandas/core/c.py",
        "mlflow/tests/d.py",
    }
    assert not (tmp_path / "ray" / "jars").exists()
    assert list(tmp_path.glob("pandas/core/__pycache__/c.*.pyc"))


# --- what starts in them -----------------------------------------------------------------------------------------


def test_the_server_asks_for_accounts_knows_its_hosts_and_has_several_workers(server: ModuleType) -> None:
    options = settings(
        server, MLFLOW_PORT="5001", MLFLOW_ALLOWED_HOSTS="ml.example:5001, ml.example"
    ).options()
    assert "--app-name=basic-auth" in options
    assert "--workers=4" in options
    assert "--allowed-hosts=mlflow:5000,localhost:5001,127.0.0.1:5001,ml.example:5001,ml.example" in options
    assert {"--serve-artifacts", "--artifacts-destination=/var/lib/mlflow/artifacts"} <= set(options)
    origins = next(word for word in options if word.startswith("--cors-allowed-origins="))
    assert origins.endswith(",http://ml.example,https://ml.example")


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("MLFLOW_ALLOWED_HOSTS", "*", r"MLFLOW_ALLOWED_HOSTS: '\*': allowed are names with their ports"),
        ("MLFLOW_DEFAULT_PERMISSION", "MANAGE", r"'MANAGE' is not allowed here \(READ, NO_PERMISSIONS\)"),
        ("MLFLOW_WORKERS", "many", "MLFLOW_WORKERS: 'many' is no number from 1 to 64"),
        ("MLFLOW_PORT", "0", "MLFLOW_PORT: '0' is no number from 1 to 65535"),
        ("DATABASE_URI", "postgresql://u:p@h/d", "DATABASE_URI holds a password"),
        ("DATABASE_URI", "sqlite:///x.db", "DATABASE_URI: allowed is postgresql"),
    ],
)
def test_settings_that_are_not_allowed_are_refused_in_one_line(
    server: ModuleType, name: str, value: str, message: str
) -> None:
    with pytest.raises(server.ServerError, match=message) as error:
        settings(server, **{name: value})
    assert "\n" not in str(error.value)


def test_the_servers_passwords_are_in_files_that_only_its_user_reads(
    server: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for place in ("SECRETS", "PRIVATE", "DATA"):
        monkeypatch.setattr(server, place, tmp_path / place)
        (tmp_path / place).mkdir()
    monkeypatch.setattr(server.os, "environ", environ := {})
    chosen = {
        "postgres_password": "a:b\\c",
        "mlflow_admin_password": "100%(sure)s!",
        "mlflow_secret_key": "key",
    }
    for name, text in chosen.items():
        with pytest.raises(server.ServerError, match=f"{name}: No such file .*make-secrets.sh makes it"):
            server.prepare(settings(server))
        (tmp_path / "SECRETS" / name).write_text(f"{text}\n")
    server.prepare(settings(server))
    files = {path.name: path for path in (tmp_path / "PRIVATE").iterdir()}
    assert {stat.S_IMODE(path.stat().st_mode) for path in files.values()} == {0o600}
    assert files["pgpass"].read_text() == "*:*:*:*:a\\:b\\\\c\n"
    read = configparser.ConfigParser()  # as MLflow reads it
    read.read(files["basic_auth.ini"])
    assert read["mlflow"]["admin_password"] == chosen["mlflow_admin_password"]
    assert read["mlflow"]["default_permission"] == "READ"
    # nothing else than the key, for which MLflow knows no file, is in the environment
    assert not {chosen["postgres_password"], chosen["mlflow_admin_password"]} & set(environ.values())
    assert environ["MLFLOW_SERVER_ENABLE_JOB_EXECUTION"] == "false"


def start(script: str, *words: str, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [DOCKER / f"{script}.sh", *words], env={**HERE, **env}, capture_output=True, text=True
    )


def test_a_workers_account_is_where_mlflow_finds_it(tmp_path: Path) -> None:
    (tmp_path / ".mlflow").mkdir()
    (tmp_path / "password").write_text("50%s\n")
    env = {"HOME": str(tmp_path), "MLFLOW_PASSWORD_FILE": str(tmp_path / "password")}
    code = "from mlflow.utils.credentials import read_mlflow_creds; print(read_mlflow_creds())"
    done = start("worker", sys.executable, "-W", "ignore", "-c", code, **env)
    assert done.stdout == "MlflowCreds(username='sweep', password='50%s')\n", done.stderr
    assert stat.S_IMODE((tmp_path / ".mlflow" / "credentials").stat().st_mode) == 0o600


@pytest.mark.parametrize(
    ("script", "words", "message"),
    [
        (
            "worker",
            ("true",),
            "worker: no password in /run/secrets/mlflow_sweep_password: make it by docker/make-secrets.sh",
        ),
        ("ray", ("head",), "ray-node: no token in /run/secrets/ray_token: make it by docker/make-secrets.sh"),
        (
            "slurm",
            ("node",),
            "slurm-node: no key in /run/secrets/munge_key: make it by docker/make-secrets.sh",
        ),
        ("slurm", ("login",), "slurm-node: 'login' is no role of a container (controller, node)"),
    ],
)
def test_a_container_without_what_it_needs_says_so_in_one_line(
    script: str, words: tuple[str, ...], message: str
) -> None:
    done = start(script, *words)
    assert done.returncode
    assert done.stderr == f"{message}\n"
