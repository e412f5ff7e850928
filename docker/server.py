#!/opt/venv/bin/python
"""The MLflow server of a team, in a container: accounts, a database and artifacts, with secrets from files only.

``mlflow-server serve`` is what the container runs; ``user NAME`` makes an account, or gives it another password, which
it reads from its input; ``upgrade`` brings the database to the schema of this MLflow; ``health`` says how a server here
is.

No password is on a command line, in the environment or in a URI: the database's stands in a file that libpq reads, the
accounts' in a file that MLflow reads, both on a tmpfs and for the server's user only.
"""

from __future__ import annotations

import argparse
import configparser
import os
import sys
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

SECRETS = Path("/run/secrets")
PRIVATE = Path("/run/mlflow")
DATA = Path("/var/lib/mlflow")
PORT = 5000
ADMIN = "admin"
WORKER = "sweep"
# what anybody with an account may do with what is not theirs; more would let one spoil another's results
PERMISSIONS = ("READ", "NO_PERMISSIONS")
_MOST_WORKERS = 64
_STANDARD_INPUT = "standard input"


class ServerError(Exception):
    """The server can't start; the message says what is wrong and what is allowed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What the environment says, checked."""

    database: str
    """The database's URI, without a password."""
    hosts: tuple[str, ...]
    """Values of the Host header that are answered, with their ports."""
    workers: int
    permission: str

    @classmethod
    def read(cls, environ: Mapping[str, str]) -> Settings:
        """Read the settings.

        Raises:
            ServerError: One is missing or not allowed.
        """
        return cls(
            database=_database(environ.get("DATABASE_URI", "")),
            hosts=_hosts(environ),
            workers=_number(environ, "MLFLOW_WORKERS", 4, _MOST_WORKERS),
            permission=_permission(environ.get("MLFLOW_DEFAULT_PERMISSION") or PERMISSIONS[0]),
        )

    @property
    def origins(self) -> tuple[str, ...]:
        """The origins that a browser sends for pages from these hosts."""
        return tuple(f"{scheme}://{host}" for host in self.hosts for scheme in ("http", "https"))

    def options(self) -> list[str]:
        """The options of ``mlflow server``."""
        return [
            "--app-name=basic-auth", "--host=0.0.0.0", f"--port={PORT}", f"--workers={self.workers}",
            f"--backend-store-uri={self.database}", f"--allowed-hosts={','.join(self.hosts)}",
            f"--cors-allowed-origins={','.join(self.origins)}",
            "--serve-artifacts", f"--artifacts-destination={DATA / 'artifacts'}",
        ]  # fmt: skip


def main(arguments: list[str] | None = None) -> int:
    """Do what the arguments say; returns the exit status. A user's mistake is one line."""
    parser = argparse.ArgumentParser(prog="mlflow-server", description="The MLflow server of a team.")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("serve", help="run the server")
    commands.add_parser("upgrade", help="bring the database to the schema of this MLflow")
    commands.add_parser("health", help="say whether the server in this container answers")
    commands.add_parser(
        "user", help="make an account, or give it another password (read from the input)"
    ).add_argument("name")
    words = parser.parse_args(arguments)
    if words.command == "health":
        return health()
    try:
        settings = Settings.read(os.environ)
        prepare(settings)
        if words.command == "upgrade":
            return upgrade(settings)
        if words.command == "user":
            return user(words.name)
        return serve(settings)
    except ServerError as error:
        sys.stderr.write(f"mlflow-server: {error}\n")
        return 1


def prepare(settings: Settings) -> None:
    """Put the secrets where libpq and MLflow find them.

    Raises:
        ServerError: A secret is missing.
    """
    password = secret("postgres_password")
    escaped = password.replace("\\", "\\\\").replace(":", "\\:")
    _write(PRIVATE / "pgpass", f"*:*:*:*:{escaped}\n")
    accounts = configparser.ConfigParser(interpolation=None)
    accounts["mlflow"] = {
        "default_permission": settings.permission,
        "database_uri": settings.database,
        "admin_username": ADMIN,
        # MLflow reads it with interpolation
        "admin_password": secret("mlflow_admin_password").replace("%", "%%"),
        "authorization_function": "mlflow.server.auth:authenticate_request_basic_auth",
    }
    path = PRIVATE / "basic_auth.ini"
    _write(path, "")
    with path.open("w", encoding="utf-8") as file:
        accounts.write(file)
    for folder in (DATA / "artifacts", DATA / "tmp"):
        folder.mkdir(mode=0o700, exist_ok=True)
    os.environ.update({
        "PGPASSFILE": str(PRIVATE / "pgpass"),
        "MLFLOW_AUTH_CONFIG_PATH": str(path),
        "MLFLOW_FLASK_SERVER_SECRET_KEY": secret("mlflow_secret_key"),
        # it needs a queue and processes of its own, for things that no sweep does
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
        "MLFLOW_DISABLE_TELEMETRY": "true",
        # an artifact on its way must not fill the memory, and is moved within one file system
        "TMPDIR": str(DATA / "tmp"),
    })  # fmt: skip


def serve(settings: Settings) -> int:
    """Run the server to its end; the accounts have the passwords of their secrets before it answers."""
    from mlflow.cli import server
    from mlflow.server import auth

    auth.bootstrap_admin_user()
    set_password(auth.store, ADMIN, secret("mlflow_admin_password"))
    set_password(auth.store, WORKER, secret("mlflow_sweep_password"))
    server.main(settings.options(), standalone_mode=True)
    return 0


def user(name: str) -> int:
    """Make an account, or give it another password."""
    from mlflow.exceptions import MlflowException
    from mlflow.server import auth

    password = sys.stdin.readline().rstrip("\n")
    if not password:
        raise ServerError(f"no password for '{name}' on {_STANDARD_INPUT}")
    auth.bootstrap_admin_user()
    try:
        made = set_password(auth.store, name, password)
    except MlflowException as error:
        raise ServerError(f"'{name}': {error.message}") from error
    sys.stdout.write(f"{name}: {'made' if made else 'has the new password'}\n")
    return 0


def set_password(store: object, name: str, password: str) -> bool:
    """See that an account is there and has a password; True where it was made."""
    if not store.has_user(name):  # type: ignore[attr-defined]
        store.create_user(name, password)  # type: ignore[attr-defined]
        return True
    if not store.authenticate_user(name, password):  # type: ignore[attr-defined]
        store.update_user(name, password)  # type: ignore[attr-defined]
    return False


def upgrade(settings: Settings) -> int:
    """Bring the database to the schema of this MLflow."""
    from mlflow.cli import cli

    cli.main(["db", "upgrade", settings.database], standalone_mode=True)
    return 0


def health() -> int:
    """0 where the server in this container answers, else 1."""
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{PORT}/health", timeout=4) as answer:
            return 0 if answer.status == 200 else 1
    except OSError:
        return 1


def secret(name: str) -> str:
    """The text of a secret.

    Raises:
        ServerError: There is none.
    """
    path = SECRETS / name
    try:
        text = path.read_text(encoding="utf-8").strip()
    except OSError as error:
        raise ServerError(f"{path}: {error.strerror}; docker/make-secrets.sh makes it") from None
    if not text or "\n" in text:
        raise ServerError(f"{path} must hold one line; docker/make-secrets.sh makes it")
    return text


def _database(uri: str) -> str:
    parts = urlsplit(uri)
    if not parts.scheme.startswith("postgresql") or not parts.hostname:
        raise ServerError("DATABASE_URI: allowed is postgresql+psycopg://USER@HOST:PORT/NAME")
    if parts.password:
        raise ServerError("DATABASE_URI holds a password, which belongs into the secret postgres_password")
    return uri


def _hosts(environ: Mapping[str, str]) -> tuple[str, ...]:
    port = _number(environ, "MLFLOW_PORT", PORT, 65535)
    more = [word.strip() for word in environ.get("MLFLOW_ALLOWED_HOSTS", "").split(",") if word.strip()]
    for word in more:
        if set(word) & set("*?[]/@ "):
            raise ServerError(
                f"MLFLOW_ALLOWED_HOSTS: '{word}': allowed are names with their ports, such as ml.example:{port}"
            )
    return tuple(dict.fromkeys([f"mlflow:{PORT}", f"localhost:{port}", f"127.0.0.1:{port}", *more]))


def _number(environ: Mapping[str, str], name: str, default: int, most: int) -> int:
    text = environ.get(name) or str(default)
    if not (text.isascii() and text.isdigit() and 1 <= int(text) <= most):
        raise ServerError(f"{name}: '{text}' is no number from 1 to {most}")
    return int(text)


def _permission(text: str) -> str:
    if text not in PERMISSIONS:
        raise ServerError(
            f"MLFLOW_DEFAULT_PERMISSION: '{text}' is not allowed here ({', '.join(PERMISSIONS)})"
        )
    return text


def _write(path: Path, text: str) -> None:
    path.unlink(missing_ok=True)
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "w", encoding="utf-8") as file:
        file.write(text)


if __name__ == "__main__":
    sys.exit(main())
