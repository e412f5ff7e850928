"""A team's server as the tests and benchmarks start it: a real PostgreSQL, and a real MLflow with accounts before it.

Both listen on the loopback interface alone, keep their files in a temporary folder, and are stopped by their ids.
"""

from __future__ import annotations

import contextlib
import os
import pwd
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from helpers import await_health, environment, free_port

ADMIN = "admin"
READY_S = 120.0
_PROGRAMS = "/usr/lib/postgresql"
_SETTINGS = {
    "fsync": "off",  # the data need not outlive a test
    "synchronous_commit": "off",
    "full_page_writes": "off",
    "max_connections": "200",
    "shared_buffers": "256MB",
    "max_wal_size": "2GB",
    "log_min_duration_statement": "-1",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Postgres:
    """A PostgreSQL cluster that runs; its superuser is ``owner``."""

    folder: Path
    port: int
    password: str
    process: subprocess.Popen[bytes]

    def uri(self, database: str) -> str:
        """The SQLAlchemy URI of one of its databases."""
        return f"postgresql+psycopg://owner:{self.password}@127.0.0.1:{self.port}/{database}"

    def execute(self, statement: str, database: str = "postgres") -> str:
        """What ``psql`` prints for a statement: a line for each row, columns parted by ``|``."""
        command = [_program("psql"), "--no-psqlrc", "--quiet", "--tuples-only", "--no-align"]
        command += ["--set", "ON_ERROR_STOP=1", "--host", "127.0.0.1", "--port", str(self.port)]
        command += ["--username", "owner", "--dbname", database, "--file", "-"]
        done = subprocess.run(
            command,
            input=statement,
            env=os.environ | {"PGPASSWORD": self.password},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()


@dataclass(frozen=True, slots=True, kw_only=True)
class TeamServer:
    """An MLflow server with accounts; ``password`` is its administrator's, ``database`` where it has its runs."""

    uri: str
    password: str
    postgres: Postgres
    database: str
    log: Path

    def environment(self, user: str = ADMIN, password: str | None = None) -> dict[str, str]:
        """The variables with which a command speaks to it as a user."""
        return {
            "MLFLOW_TRACKING_URI": self.uri,
            "MLFLOW_TRACKING_USERNAME": user,
            "MLFLOW_TRACKING_PASSWORD": self.password if password is None else password,
        }

    def call(self, method: str, path: str, body: Mapping[str, object] | None = None) -> dict[str, object]:
        """One request of MLflow's REST interface, as the administrator; its path is that below ``/api/``."""
        import requests

        done = requests.request(
            method, f"{self.uri}/api/{path}", json=body, auth=(ADMIN, self.password), timeout=60
        )
        assert done.status_code == 200, done.text
        found: dict[str, object] = done.json() if done.content else {}
        return found

    def create_user(self, name: str) -> str:
        """A new account; returns its password."""
        password = secrets.token_urlsafe(16)
        self.call("POST", "2.0/mlflow/users/create", {"username": name, "password": password})
        return password


@contextlib.contextmanager
def postgres() -> Iterator[Postgres]:
    """A new PostgreSQL cluster that asks for a password."""
    root = Path(tempfile.mkdtemp(prefix="repro-sweep-pg-"))  # its sockets' paths must be short
    password, port = secrets.token_hex(16), free_port()
    owner = _owner()
    process: subprocess.Popen[bytes] | None = None
    try:
        secret = root / "password"
        secret.write_text(password)
        for path in (root, secret):
            os.chown(path, *owner)
        _as(owner, "initdb", "--pgdata", root / "data", "--username", "owner", "--pwfile", secret, "--no-sync",
            "--auth", "scram-sha-256", "--encoding", "UTF8", "--locale", "C.UTF-8")  # fmt: skip
        options = [word for key, value in _SETTINGS.items() for word in ("-c", f"{key}={value}")]
        options += ["-c", f"port={port}", "-c", "listen_addresses=127.0.0.1"]
        options += ["-c", f"unix_socket_directories={root}"]
        with (root / "log").open("wb") as log:
            process = subprocess.Popen(
                [_program("postgres"), "-D", root / "data", *options],
                stdout=log, stderr=log, user=owner[0], group=owner[1], extra_groups=[], cwd=root,
            )  # fmt: skip
        found = Postgres(folder=root, port=port, password=password, process=process)
        _await_database(found)
        yield found
    finally:
        if process is not None:
            process.send_signal(signal.SIGINT)  # "fast shutdown"
            process.wait(60)
        shutil.rmtree(root, ignore_errors=True)


@contextlib.contextmanager
def team_server(
    folder: Path, database: Postgres, *, default_permission: str = "READ", workers: int = 2, cached_s: int = 0
) -> Iterator[TeamServer]:
    """``mlflow server --app-name basic-auth`` on a database of its own, with proxied artifacts.

    Args:
        folder: where its files are.
        database: the cluster that it makes its databases in.
        default_permission: what users may do with others' experiments.
        workers: how many processes answer.
        cached_s: for how long a password is not looked at again; 0: never.
    """
    folder.mkdir(parents=True, exist_ok=True)
    name = f"t{secrets.token_hex(4)}"
    database.execute(f"CREATE DATABASE {name}; CREATE DATABASE {name}_auth;")
    password, port = secrets.token_urlsafe(16), free_port()
    settings = folder / "basic_auth.ini"
    settings.write_text(
        "[mlflow]\n"
        f"default_permission = {default_permission}\n"
        f"database_uri = {database.uri(name + '_auth')}\n"
        f"admin_username = {ADMIN}\n"
        f"admin_password = {password}\n"
        "authorization_function = mlflow.server.auth:authenticate_request_basic_auth\n"
        f"auth_cache_ttl_seconds = {cached_s}\n"
    )
    settings.chmod(0o600)
    variables = {
        "MLFLOW_AUTH_CONFIG_PATH": str(settings),
        "MLFLOW_FLASK_SERVER_SECRET_KEY": secrets.token_hex(16),
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
        "MLFLOW_DISABLE_TELEMETRY": "true",
    }
    command = [sys.executable, "-m", "mlflow", "server", "--app-name", "basic-auth"]
    command += ["--host", "127.0.0.1", "--port", str(port), "--workers", str(workers)]
    command += [
        "--backend-store-uri",
        database.uri(name),
        "--artifacts-destination",
        str(folder / "artifacts"),
    ]
    log = folder / "server.log"
    with log.open("wb") as out:
        process = subprocess.Popen(
            command, cwd=folder, env=environment(variables), stdout=out, stderr=out, start_new_session=True
        )
    found = TeamServer(
        uri=f"http://127.0.0.1:{port}", password=password, postgres=database, database=name, log=log
    )
    try:
        await_health(process, found.uri, log)
        yield found
    finally:
        os.killpg(process.pid, signal.SIGKILL)  # its own session: the server and its workers
        process.wait()


def _await_database(database: Postgres) -> None:
    deadline = time.monotonic() + READY_S
    log = database.folder / "log"
    while time.monotonic() < deadline:
        assert database.process.poll() is None, log.read_text()
        with contextlib.suppress(AssertionError):
            database.execute("SELECT 1")
            return
        time.sleep(0.1)
    raise AssertionError(log.read_text())


def _owner() -> tuple[int, int]:
    """Whom PostgreSQL runs as: it refuses to run as root."""
    if os.geteuid() != 0:
        return os.geteuid(), os.getegid()
    entry = pwd.getpwnam("postgres")  # Debian's package makes it
    return entry.pw_uid, entry.pw_gid


def _as(owner: tuple[int, int], program: str, *arguments: str | Path) -> None:
    done = subprocess.run(
        [_program(program), *arguments],
        user=owner[0], group=owner[1], extra_groups=[], cwd="/", capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


def _program(name: str) -> str:
    """A program of PostgreSQL: Debian keeps those of the server out of ``PATH``."""
    there = sorted(Path(_PROGRAMS).glob(f"*/bin/{name}")) if Path(_PROGRAMS).is_dir() else []
    found = str(there[-1]) if there else shutil.which(name)
    assert found is not None, f"{name}: not installed (Debian's package postgresql)"
    return found
