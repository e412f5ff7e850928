"""Which MLflow store a sweep uses: its URI, checked and made absolute before anything starts. Never imports mlflow."""

from __future__ import annotations

import os
import re
import sqlite3
from collections.abc import Mapping
from pathlib import Path
from urllib.parse import urlsplit

from repro_sweep.errors import TrackingError
from repro_sweep.redaction import redacted

ENVIRONMENT = "MLFLOW_TRACKING_URI"
EMBEDDED = "mlflow.db"
ARTIFACTS = "mlartifacts"

_DATABASES = ("postgresql", "mysql", "mssql")
_ALLOWED = "allowed are http://…, https://…, sqlite:///PATH, postgresql://…, mysql://… and mssql://…"
_IN_ENVIRONMENT = "set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD instead"
_PASSWORD = {
    "http": _IN_ENVIRONMENT,
    "https": _IN_ENVIRONMENT,
    "postgresql": "set PGPASSWORD or write ~/.pgpass instead",
    "mysql": "put it into the driver's own configuration instead",
    "mssql": "put it into the driver's own configuration instead",
}
_SQLITE = re.compile(r"sqlite:(?P<slashes>/*)(?P<path>[^?]*)(?P<query>\?.*)?", re.DOTALL)


def resolve_uri(configured: str | None, cwd: Path, environ: Mapping[str, str]) -> str:
    """The tracking URI of a sweep: what is configured, else the environment's, else ``mlflow.db`` in ``cwd``.

    A relative path of a SQLite store is taken from ``cwd``.

    Raises:
        TrackingError: the URI is malformed, or of a kind that is not supported.
    """
    if configured:
        return checked_uri(configured, where="sweep.tracking.uri", cwd=cwd)
    if environ.get(ENVIRONMENT):
        return checked_uri(environ[ENVIRONMENT], where=ENVIRONMENT, cwd=cwd)
    return checked_uri(f"sqlite:///{cwd.absolute() / EMBEDDED}", where="working directory", cwd=cwd)


def checked_uri(uri: str, *, where: str, cwd: Path) -> str:
    """``uri`` in its absolute form; ``where`` names the place it comes from in messages."""
    if uri.startswith("sqlite:"):
        return _checked_sqlite(uri, where=where, cwd=cwd)
    try:
        parts = urlsplit(uri)
        _ = parts.port
    except ValueError as error:
        raise TrackingError(f"{where}: {redacted(uri)!r} is no URI ({error}); {_ALLOWED}") from error
    base = parts.scheme.split("+", maxsplit=1)[0]
    if base not in {"http", "https", *_DATABASES}:
        hint = ""
        if base in {"", "file"}:
            hint = " (MLflow's stores of plain files are being retired: use sqlite:///PATH/mlflow.db)"
        raise TrackingError(f"{where}: {redacted(uri)!r} is no supported MLflow URI{hint}; {_ALLOWED}")
    if parts.password:
        raise TrackingError(
            f"{where}: {redacted(uri)!r} holds a password, which would be kept in records; {_PASSWORD[base]}"
        )
    if not parts.hostname or any(character.isspace() for character in uri):
        raise TrackingError(f"{where}: {redacted(uri)!r} names no host; {_ALLOWED}")
    return uri.rstrip("/") if base in {"http", "https"} else uri


def is_http(uri: str) -> bool:
    """Whether the store is an MLflow server."""
    return uri.startswith(("http://", "https://"))


def sqlite_path(uri: str) -> Path | None:
    """The file of a SQLite store; None for all others."""
    match = _SQLITE.fullmatch(uri)
    return None if match is None else Path("/" + match["path"].lstrip("/"))


def check_writable(uri: str) -> None:
    """Make sure that a local store can be written; asks nothing of a server or a database elsewhere.

    Raises:
        TrackingError: the file or its folder cannot be written, or the file is no MLflow database.
    """
    path = sqlite_path(uri)
    if path is None:
        return
    if path.exists():
        if not path.is_file():
            raise TrackingError(f"{path}: the MLflow store must be a file")
        if not os.access(path, os.R_OK | os.W_OK):
            raise TrackingError(f"{path}: no permission to write the MLflow store")
        if path.stat().st_size > 0:
            check_is_mlflow(path)
    folder = next(parent for parent in path.parents if parent.exists())
    if not folder.is_dir() or not os.access(folder, os.W_OK | os.X_OK):
        raise TrackingError(f"{folder}: no permission to write the folder of the MLflow store {path.name}")


def check_is_mlflow(path: Path) -> None:
    """Make sure that a SQLite file is an MLflow store, without changing it.

    Raises:
        TrackingError: it is none, or it cannot be read.
    """
    try:
        connection = sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True, timeout=20.0)
        try:
            found = connection.execute("SELECT 1 FROM sqlite_master WHERE name = 'experiments'").fetchone()
        finally:
            connection.close()
    except sqlite3.Error as error:
        raise TrackingError(f"{path}: cannot be read as an MLflow store ({error})") from error
    if found is None:
        raise TrackingError(f"{path}: is a database, but no MLflow store")


def _checked_sqlite(uri: str, *, where: str, cwd: Path) -> str:
    match = _SQLITE.fullmatch(uri)
    if match is None or len(match["slashes"]) < 3 or not match["path"] or match["path"] == ":memory:":
        raise TrackingError(f"{where}: {uri!r} names no file; write sqlite:///PATH")
    if "%" in match["path"] or "\n" in match["path"]:
        raise TrackingError(
            f"{where}: {uri!r}: MLflow cannot open a SQLite store whose path contains '%' or a newline"
        )
    absolute = len(match["slashes"]) > 3  # sqlite:/// and an absolute path
    path = Path("/" + match["path"]) if absolute else Path(os.path.normpath(cwd.absolute() / match["path"]))
    if {"'", '"'} <= set(str(path)):  # it writes the path into its SQL as Python shows it
        raise TrackingError(
            f"{where}: {uri!r}: MLflow cannot make a SQLite store whose path contains both kinds of quotes"
        )
    return f"sqlite:///{path}{match['query'] or ''}"
