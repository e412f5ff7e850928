"""One transaction for many calls of MLflow's store on a SQLite file, which otherwise commits up to six times a trial.

Each call becomes a savepoint, as SQLAlchemy documents it ("joining a session into an external transaction"), so that
MLflow's own commits and rollbacks keep their meaning. If this MLflow has no such store, its calls stay as they are.
"""

from __future__ import annotations

import contextlib
import copy
import threading
from collections.abc import Iterator
from typing import Any

_BUSY_MS = 20_000


class SharedTransactions:
    """Makes copies of an MLflow store whose calls belong to one transaction. One at a time; others wait."""

    def __init__(self, uri: str, store: Any) -> None:
        from sqlalchemy import create_engine, event
        from sqlalchemy.pool import NullPool

        self._store = store
        self._lock = threading.Lock()
        self._engine = create_engine(uri, poolclass=NullPool)
        event.listen(self._engine, "connect", _set_up)
        event.listen(self._engine, "begin", _begin)

    @contextlib.contextmanager
    def begin(self) -> Iterator[Any]:
        """A store to be used within this context, by this thread; all of its changes are made at the end."""
        from mlflow.store.db import utils
        from sqlalchemy.orm import sessionmaker

        if not hasattr(self._store, "ManagedSessionMaker"):
            yield self._store
            return
        with self._lock, self._engine.connect() as connection, connection.begin():
            sessions = sessionmaker(bind=connection, join_transaction_mode="create_savepoint")
            store = copy.copy(self._store)
            make_managed: Any = utils._get_managed_session_maker
            store.ManagedSessionMaker = make_managed(sessions, "sqlite")
            yield store


def _set_up(connection: Any, _record: object) -> None:
    connection.isolation_level = None  # the driver begins no transactions of its own, which break savepoints
    for pragma in ("foreign_keys = ON", f"busy_timeout = {_BUSY_MS}", "case_sensitive_like = true"):
        connection.execute(f"PRAGMA {pragma}")


def _begin(connection: Any) -> None:
    connection.exec_driver_sql("BEGIN IMMEDIATE")
