"""How MLflow is read: its client, its pages and its artifacts, with its errors mapped to one line.

MLflow is imported when something is read.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from repro_sweep.errors import TrackingError
from repro_sweep.redaction import redacted
from repro_sweep.tracking.store import denial, one_line

_PAGE = 1000


def download(run_id: str, path: str, uri: str) -> Path:
    """A local path of an artifact of a run.

    Raises:
        FileNotFoundError: the run has none of that name; its cause says more.
    """
    import mlflow.artifacts

    try:
        found = mlflow.artifacts.download_artifacts(
            run_id=run_id, artifact_path=path, tracking_uri=uri, dst_path=copies_of(run_id)
        )
    except OSError as error:
        raise FileNotFoundError(path) from error
    except mlflow.exceptions.MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        raise FileNotFoundError(path) from error
    if not Path(found).exists():
        raise FileNotFoundError(path)
    return Path(found)


def client_of(uri: str) -> Any:
    """MLflow's client of a store."""
    import mlflow

    return mlflow.MlflowClient(uri)


def experiments_of(client: Any) -> list[str]:
    """The ids of all experiments."""
    found: list[str] = []
    token = None
    while True:
        page = client.search_experiments(max_results=_PAGE, page_token=token)
        found += [each.experiment_id for each in page]
        token = page.token
        if not token:
            return found


def runs_of(
    client: Any,
    experiments: list[str],
    condition: str,
    order_by: list[str] | None = None,
    *,
    page: int = _PAGE,
) -> Iterator[Any]:
    """The runs of experiments that satisfy a condition, as MLflow's entities; so many are asked for at a time."""
    token = None
    while experiments:
        found = client.search_runs(
            experiments, condition, max_results=page, order_by=order_by, page_token=token
        )
        yield from found
        token = found.token
        if not token:
            return


@contextlib.contextmanager
def _unless_set(**variables: str) -> Iterator[None]:
    """Set variables of the environment, except those that are set."""
    mine = {name: value for name, value in variables.items() if name not in os.environ}
    os.environ.update(mine)
    try:
        yield
    finally:
        for name in mine:
            os.environ.pop(name, None)


def no_progress_bar() -> AbstractContextManager[None]:
    """MLflow draws one for each artifact, unless the environment says otherwise."""
    return _unless_set(MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR="false")


def one_request() -> AbstractContextManager[None]:
    """MLflow asks a server how it likes artifacts to be fetched, unless the environment says so."""
    return _unless_set(MLFLOW_ENABLE_PROXY_MULTIPART_DOWNLOAD="false")


@contextlib.contextmanager
def reading(uri: str) -> Iterator[None]:
    """Map MLflow's errors, and do not let it try for minutes to reach a server that is down."""
    import mlflow.exceptions

    try:
        with _unless_set(MLFLOW_HTTP_REQUEST_MAX_RETRIES="2"):
            yield
    except mlflow.exceptions.MlflowException as error:
        raise TrackingError(f"{redacted(uri)}: {denial(error, uri, 'do this') or one_line(error)}") from error


_temporary: dict[str, str] = {}


def copies_of(run_id: str) -> str:
    """A folder for copies of a run's artifacts, one for each run; MLflow's own would outlive this process."""
    if run_id not in _temporary:
        _temporary[run_id] = tempfile.mkdtemp(prefix="repro-sweep-")
        atexit.register(shutil.rmtree, _temporary[run_id], ignore_errors=True)
    return _temporary[run_id]
