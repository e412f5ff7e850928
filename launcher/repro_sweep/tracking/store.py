"""The one place that talks to MLflow's tracking store: few calls, and every failure mapped to what to do about it.

No call retries by itself: a request whose reply was lost may have been done, and only the caller can find that out.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import importlib
import json
import os
import re
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from repro_sweep.redaction import redacted
from repro_sweep.sweep import Data
from repro_sweep.tracking import access, encoding
from repro_sweep.tracking.credentials import known
from repro_sweep.tracking.embedded import SharedTransactions
from repro_sweep.tracking.encoding import Point, digest
from repro_sweep.tracking.uri import ARTIFACTS, sqlite_path

_SLOW_S = 5.0
_METRICS_PER_BATCH = 1000
_KEYS_PER_BATCH = 100
_DIGEST = 36
"""Characters of a data set's digest that MLflow takes."""
_PAGE = 1000
_BATCH_BYTES = 500_000  # MLflow refuses requests over 1 MB

_SPARED = ("pandas",)

_REFUSALS = frozenset(
    {
        "BAD_REQUEST",
        "INVALID_PARAMETER_VALUE",
        "INVALID_STATE",
        "MALFORMED_REQUEST",
        "RESOURCE_ALREADY_EXISTS",
        "ENDPOINT_NOT_FOUND",
    }
)
_REFUSING = frozenset({400, 405, 411, 413, 415, 422})
"""HTTP's statuses of the same meaning."""
_DENIALS = {"UNAUTHENTICATED": 401, "CUSTOMER_UNAUTHORIZED": 401, "PERMISSION_DENIED": 403}
_BUSY = re.compile(r"time.?d? ?out|too many|\b(?:429|504)\b", re.IGNORECASE)
"""What a server says, or is said of it, that is there and has too much to do."""


class StoreError(Exception):
    """A request that has failed: a condition, not a bug."""


class Unavailable(StoreError):  # noqa: N818
    """The store cannot be reached, is too slow, or broke down; the request may have been done or not."""

    @property
    def busy(self) -> bool:
        """Whether the store is there and has too much to do; else it is away, or broken."""
        text = str(self)
        return _BUSY.search(text) is not None and "connect timeout" not in text.lower()


class Denied(StoreError):  # noqa: N818
    """The store does not know the credentials (``status`` 401), or does not let their user do this (403).

    Both may change while a sweep runs: a token is renewed, a permission is granted. The message says whose they are.
    """

    def __init__(self, text: str, status: int) -> None:
        super().__init__(text)
        self.status = status


class Refused(StoreError):  # noqa: N818
    """The store has understood the request and will not do it, now or later."""


class Gone(StoreError):  # noqa: N818
    """The run does not exist, or was deleted. ``guessed``: the store does not say so, but only denies it."""

    def __init__(self, text: str, *, guessed: bool = False) -> None:
        super().__init__(text)
        self.guessed = guessed


@dataclass(frozen=True, slots=True, kw_only=True)
class FoundRun:
    """A run that exists."""

    run_id: str
    artifact_uri: str


@dataclass(frozen=True, slots=True, kw_only=True)
class FinishedRun:
    """A run that has ended: its tags, the latest value of each metric, and when it ran (milliseconds UTC)."""

    run_id: str
    tags: Mapping[str, str]
    metrics: Mapping[str, float]
    started_ms: int
    ended_ms: int


def prepare_environment(environ: dict[str, str] | os._Environ[str] = os.environ) -> None:
    """Set what MLflow reads from the environment, before it is imported: no retries of its own, no telemetry."""
    environ["MLFLOW_HTTP_REQUEST_MAX_RETRIES"] = "0"
    environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "30")
    environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")


def import_mlflow(spared: Sequence[str] = _SPARED) -> None:
    """Import what a store will need, in a process that does nothing else with MLflow.

    That is what a database needs, unless the environment names a server. MLflow's own smaller distribution,
    mlflow-skinny, lacks the ``spared`` packages, so MLflow is imported as if they were not installed: a quarter of
    the time. A version of it that can't do without them gets them.
    """
    prepare_environment()
    modules = ["mlflow"]
    if not os.environ.get("MLFLOW_TRACKING_URI", "").startswith(("http://", "https://")):
        modules.append("mlflow.store.tracking.sqlalchemy_store")
    hidden = [name for name in spared if name not in sys.modules]
    sys.modules |= dict.fromkeys(hidden)  # type: ignore[arg-type]  # None: to import it is an ImportError
    try:
        for name in modules:
            importlib.import_module(name)
    except ImportError:
        if not hidden:
            raise
    else:
        return
    finally:
        for name in hidden:
            sys.modules.pop(name, None)
    for name in [name for name in sys.modules if name.partition(".")[0] == "mlflow"]:
        del sys.modules[name]
    import_mlflow(())


class Store:
    """An MLflow tracking store. May be used by several threads.

    Every method raises :class:`Unavailable`, :class:`Denied`, :class:`Refused` or :class:`Gone`.
    """

    def __init__(self, uri: str) -> None:
        self.uri = uri
        self._lock = threading.Lock()
        self._opened: Any = None
        self._stopping = False
        self.answered = True
        """Whether the store has done anything since this was set to False."""
        self._moved = 0
        self._moving_now: list[Path] = []
        self._stored: set[str] = set()
        self._counting = threading.Lock()
        self._asked: dict[int, float] = {}
        self._latest_s = 0.0
        self._transactions: SharedTransactions | None = None
        self._within = threading.local()

    @contextlib.contextmanager
    def _asking(self) -> Iterator[None]:
        thread, began = threading.get_ident(), time.monotonic()
        self._asked[thread] = began
        try:
            with _mapped():
                yield
        finally:
            self._latest_s = time.monotonic() - began
            self._asked.pop(thread, None)
        self.answered = True

    @property
    def slow(self) -> bool:
        """Whether the store takes its time: with a request that is under way, or with the latest one."""
        now = time.monotonic()
        return max([self._latest_s, *(now - began for began in list(self._asked.values()))]) >= _SLOW_S

    @property
    def embedded(self) -> bool:
        """Whether the store is a SQLite file, for which few and large transactions are best."""
        return sqlite_path(self.uri) is not None

    @property
    def parallel(self) -> int:
        """How many uploads at a time are of use.

        To a server as many as leave each request its own of the ten connections that MLflow keeps open: one may be
        urgent, and one a search.
        """
        return 1 if self.embedded else 8

    @property
    def moved(self) -> int:
        """How much was sent: the bytes of files, as far as they were read, and the points; and runs that were read."""
        with self._counting:
            moved, moving = self._moved, list(self._moving_now)
        return moved + sum(map(_position, moving))

    @contextlib.contextmanager
    def _moving(self, target: str, file: Path, watched: Path) -> Iterator[None]:
        """Count a file that is being sent; not when it is sent again, which may happen again and again."""
        with self._counting:
            again = target in self._stored
            if not again:
                self._moving_now.append(watched)
        if again:
            yield
            return
        moved = 0
        try:
            yield
            with contextlib.suppress(OSError):
                moved = file.stat().st_size
            self._stored.add(target)
        finally:
            with self._counting:
                self._moving_now.remove(watched)
                self._moved += moved

    @contextlib.contextmanager
    def transaction(self) -> Iterator[None]:
        """What this thread writes within this context is written at its end, where the store is embedded."""
        if not self.embedded:
            yield
            return
        with self._asking():
            transactions = self._shared_transactions()
            with transactions.begin() as store:
                self._within.store = store
                try:
                    yield
                finally:
                    self._within.store = None

    def stop(self) -> None:
        """Refuse to begin another request; the caller wants to end soon."""
        self._stopping = True

    def experiment(self, name: str) -> str:
        """The id of an experiment, created if there is none of that name."""
        with self._asking():
            store = self._store()
            found = store.get_experiment_by_name(name)
            if found is None:
                try:
                    return str(store.create_experiment(name, self._artifact_location(), _training()))
                except Exception:
                    found = store.get_experiment_by_name(
                        name
                    )  # another sweep was faster, or a reply was lost
                    if found is None:
                        raise
            if found.lifecycle_stage != "active":
                raise Refused(f"experiment {name!r} was deleted in MLflow: restore it, or name another one")
            return str(found.experiment_id)

    def find_runs(self, experiment: str, tags: Mapping[str, str]) -> list[FoundRun]:
        """The runs with all these tags, always in the same order."""
        from mlflow.entities import ViewType

        with self._asking():
            condition = " and ".join(f"tags.`{key}` = '{value}'" for key, value in tags.items())
            runs = self._store().search_runs([experiment], condition, ViewType.ACTIVE_ONLY, max_results=50)
            found = sorted(runs, key=lambda run: (run.info.start_time, run.info.run_id))
            return [FoundRun(run_id=run.info.run_id, artifact_uri=run.info.artifact_uri) for run in found]

    def finished_runs(self, tags: Mapping[str, str]) -> Iterator[FinishedRun]:
        """The runs of all experiments that have ended well, with all these tags."""
        from mlflow.entities import ViewType

        conditions = ["attributes.status = 'FINISHED'"]
        conditions += [f"tags.`{key}` = '{value}'" for key, value in tags.items()]
        with self._asking():
            experiments = [
                each.experiment_id for each in _pages(self._store().search_experiments, max_results=_PAGE)
            ]
            search = functools.partial(
                self._store().search_runs, experiments, " and ".join(conditions), ViewType.ACTIVE_ONLY
            )
            for run in _pages(search, max_results=_PAGE) if experiments else ():
                self._go_on()
                yield FinishedRun(
                    run_id=run.info.run_id,
                    tags=run.data.tags,
                    metrics=run.data.metrics,
                    started_ms=run.info.start_time,
                    ended_ms=run.info.end_time or run.info.start_time,
                )

    def runs_below(self, experiment: str, parent_run: str) -> Iterator[Any]:
        """The runs of a sweep's trials, as MLflow's entities, in the order of their start."""
        from mlflow.entities import ViewType

        with self._asking():
            search = functools.partial(
                self._store().search_runs, [experiment], encoding.trials_of(parent_run), ViewType.ACTIVE_ONLY,
                order_by=[encoding.BY_START],
            )  # fmt: skip
            for run in _pages(search, max_results=_PAGE):
                self._go_on()
                with self._counting:
                    self._moved += 1
                yield run

    def create_run(self, experiment: str, tags: Mapping[str, str], *, started_ms: int) -> FoundRun:
        """Create a run; it may exist twice afterwards if this fails and is repeated."""
        from mlflow.entities import RunTag

        with self._asking():
            run = self._store().create_run(
                experiment_id=experiment,
                user_id=tags.get("mlflow.user", "unknown"),
                start_time=started_ms,
                tags=[RunTag(key, value) for key, value in tags.items()],
                run_name=tags["mlflow.runName"],
            )
            return FoundRun(run_id=run.info.run_id, artifact_uri=run.info.artifact_uri)

    def delete_run(self, run_id: str) -> None:
        """Delete a run (it can be restored in MLflow)."""
        with self._asking():
            self._store().delete_run(run_id)

    def params(self, run_id: str) -> dict[str, str]:
        """The params that a run has."""
        with self._asking():
            return dict(self._store().get_run(run_id).data.params)

    def tags(self, run_id: str) -> dict[str, str]:
        """The tags that a run has."""
        with self._asking():
            return dict(self._store().get_run(run_id).data.tags)

    def log(
        self,
        run_id: str,
        *,
        points: Sequence[Point] = (),
        params: Mapping[str, str] | None = None,
        tags: Mapping[str, str] | None = None,
    ) -> None:
        """Log points, params and tags in as few requests as MLflow's limits allow, one after another."""
        from mlflow.entities import Metric, Param, RunTag

        for some_points, some_params, some_tags in batches(points, params or {}, tags or {}):
            with self._asking():
                self._store().log_batch(
                    run_id,
                    metrics=[
                        Metric(point.key, point.value, point.at_ms, point.step) for point in some_points
                    ],
                    params=[Param(key, value) for key, value in some_params],
                    tags=[RunTag(key, value) for key, value in some_tags],
                )
            if not self.embedded:  # there they are not stored yet
                with self._counting:
                    self._moved += len(some_points)

    def log_data(self, run_id: str, data: Mapping[str, Data]) -> None:
        """Log what a run reads as its inputs; those that it has already are found again."""
        from mlflow.entities import Dataset, DatasetInput

        if not data:
            return
        inputs = [
            DatasetInput(
                Dataset(
                    name=name,
                    digest=each.digest.removeprefix("md5:")[:_DIGEST],
                    source_type="uri",
                    source=json.dumps({"uri": redacted(each.uri)}),
                    profile=json.dumps({"files": each.files, "bytes": each.size, "digest": each.digest}),
                )
            )
            for name, each in data.items()
        ]
        with self._asking():
            self._store().log_inputs(run_id, inputs)

    def missing(self, run_id: str, points: Sequence[Point]) -> list[Point]:
        """Those of the points that the run does not have."""
        there = set()
        for key in {point.key for point in points}:
            token = None
            with self._asking():
                while True:
                    page = self._store().get_metric_history(run_id, key, page_token=token)
                    there |= {Point(key, each.value, each.timestamp, each.step).identity for each in page}
                    token = page.token
                    if not token:
                        break
        return [point for point in points if point.identity not in there]

    def set_status(self, run_id: str, status: str, *, ended_ms: int | None) -> None:
        """Set the status of a run, and when it ended."""
        from mlflow.entities import RunStatus

        with self._asking():
            self._store().update_run_info(run_id, RunStatus.from_string(status), ended_ms, None)

    def read(self, artifact_uri: str, path: str) -> bytes:
        """A small artifact; FileNotFoundError where it is a local file that is not there."""
        with self._asking():
            return read_artifact(artifact_uri, path, self.uri)

    def put_text(self, artifact_uri: str, path: str, text: str | bytes) -> None:
        """Store a small text, or a few bytes, as an artifact."""
        content = text.encode("utf-8") if isinstance(text, str) else text
        folder = _local_folder(artifact_uri)
        if folder is not None:
            with self._asking():
                target = folder / path
                target.parent.mkdir(parents=True, exist_ok=True)
                partial = target.with_name(f".{target.name}.partial")
                partial.write_bytes(content)
                partial.replace(target)
            return
        with tempfile.TemporaryDirectory(prefix="repro-sweep-") as temporary:
            file = Path(temporary) / Path(path).name
            file.write_bytes(content)
            self.put_file(artifact_uri, path, file)

    def put_file(self, artifact_uri: str, path: str, file: Path) -> None:
        """Store a file as an artifact; one that has vanished is passed over."""
        self._go_on()
        parent, _, name = path.rpartition("/")
        try:
            folder = _local_folder(artifact_uri)
            watched = file if folder is None else _partial(folder / path)
            with _mapped(), self._moving(f"{artifact_uri}/{path}", file, watched):
                if folder is not None:
                    _copy(file, folder / path)
                elif name == file.name:
                    self._artifacts(artifact_uri).log_artifact(str(file), parent or None)
                else:
                    with tempfile.TemporaryDirectory(prefix="repro-sweep-") as temporary:
                        link = Path(temporary) / name
                        link.symlink_to(file.absolute())
                        self._artifacts(artifact_uri).log_artifact(str(link), parent or None)
        except FileNotFoundError as error:
            if file.exists():
                raise Unavailable(one_line(error)) from error

    def may_write(self, experiment: str) -> bool:
        """Whether the credentials are good for new runs in an experiment; asks without making one."""
        from mlflow.utils.rest_utils import http_request

        client = self._client()
        with _mapped():
            ask: Callable[..., Any] = http_request
            answer = ask(
                client._tracking_client.store.get_host_creds(),
                f"/api/2.0/mlflow/{access.CREATE_RUN}",
                "POST",
                json=access.probe(experiment),
                raise_on_status=False,
            )
            return bool(answer.status_code == access.MAY)

    def _go_on(self) -> None:
        if self._stopping:
            raise Unavailable("the tracker is stopping")

    def _client(self) -> Any:
        self._go_on()
        with self._lock:
            if self._opened is None:
                with _initialising(self.uri):
                    import mlflow

                    self._opened = mlflow.MlflowClient(self.uri)
            return self._opened

    def _shared_transactions(self) -> SharedTransactions:
        store = self._client()._tracking_client.store
        with self._lock:
            if self._transactions is None:
                self._transactions = SharedTransactions(self.uri, store)
            return self._transactions

    def _store(self) -> Any:
        # MLflow's store interface (AbstractStore) directly: the client around it makes more requests than asked for.
        return getattr(self._within, "store", None) or self._client()._tracking_client.store

    def _artifacts(self, artifact_uri: str) -> Any:
        from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository

        return get_artifact_repository(artifact_uri, tracking_uri=self.uri)

    def _artifact_location(self) -> str | None:
        path = sqlite_path(self.uri)
        return None if path is None else (path.parent / ARTIFACTS).as_uri()


def read_artifact(artifact_uri: str, path: str, uri: str) -> bytes:
    """An artifact by the place of its run's artifacts: in one request, where MLflow's own functions make four."""
    folder = _local_folder(artifact_uri)
    if folder is not None:
        return (folder / path).read_bytes()
    from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository

    with tempfile.TemporaryDirectory(prefix="repro-sweep-") as temporary:
        file = Path(temporary) / "artifact"
        repository: Any = get_artifact_repository(artifact_uri, tracking_uri=uri)
        repository._download_file(path, str(file))
        return file.read_bytes()


def batches(
    points: Sequence[Point], params: Mapping[str, str], tags: Mapping[str, str]
) -> Iterator[tuple[Sequence[Point], list[tuple[str, str]], list[tuple[str, str]]]]:
    """Split what is to be logged into requests within MLflow's limits."""
    waiting_tags = list(_pieces(tags))
    waiting_params = list(_pieces(params))
    rest = list(points)
    weight = 100 + max((len(json.dumps(key)) for key in {point.key for point in points}), default=0)
    while waiting_tags or waiting_params or rest:
        if waiting_tags:
            some_tags, size = waiting_tags.pop(0)
        else:
            some_tags, size = [], 0
        some_params: list[tuple[str, str]] = []
        if waiting_params and size + waiting_params[0][1] <= _BATCH_BYTES:
            some_params, more = waiting_params.pop(0)
            size += more
        room = min(
            _METRICS_PER_BATCH - len(some_tags) - len(some_params), max(0, _BATCH_BYTES - size) // weight
        )
        some_points, rest = rest[:room], rest[room:]
        yield some_points, some_params, some_tags


def _pieces(pairs: Mapping[str, str]) -> Iterator[tuple[list[tuple[str, str]], int]]:
    piece: list[tuple[str, str]] = []
    size = 0
    for key, value in pairs.items():
        weight = 6 * (len(key) + len(value)) if not value.isascii() else len(key) + 2 * len(value)
        if piece and (len(piece) == _KEYS_PER_BATCH or size + weight > _BATCH_BYTES):
            yield piece, size
            piece, size = [], 0
        piece.append((key, value))
        size += weight
    if piece:
        yield piece, size


def artifact_name(path: str) -> str:
    """The path under which a file is stored: itself, unless HTTP or MLflow could not tell it from another one."""
    parts = [_safe_part(part) for part in path.split("/")]
    return "/".join(parts)


def _safe_part(part: str) -> str:
    if not re.search(r"[#?%\\:*\"<>|\x00-\x1f\x7f\ud800-\udfff]", part) and part == part.strip():
        return part
    stem, dot, suffix = part.rpartition(".")
    safe = re.sub(r"[^\w\- .]", "_", stem or suffix).strip()
    ending = re.sub(r"[^\w\-]", "_", suffix) if stem and dot else ""
    return f"{safe}-{digest(part)}" + (f".{ending}" if ending else "")


def _training() -> list[Any]:
    """The tag by which MLflow's pages open an experiment as one of model training."""
    from mlflow.entities import ExperimentTag

    return [ExperimentTag("mlflow.experimentKind", "custom_model_development")]


def _pages(search: Callable[..., Any], **options: Any) -> Iterator[Any]:
    token = None
    while True:
        page = search(page_token=token, **options)
        yield from page
        token = page.token
        if not token:
            return


@contextlib.contextmanager
def _mapped() -> Iterator[None]:
    """Map every failure of MLflow, and of what is below it, to the four that callers know."""
    from mlflow.exceptions import MlflowException
    from sqlalchemy.exc import SQLAlchemyError

    try:
        yield
    except MlflowException as error:
        raise _meaning(error) from error
    except FileNotFoundError:
        raise
    except OSError as error:
        status = getattr(
            getattr(error, "response", None), "status_code", None
        )  # requests' HTTPError is an OSError
        if isinstance(status, int) and status in _DENIALS.values():
            raise Denied(one_line(error), status) from error
        raise (Refused if status in _REFUSING else Unavailable)(one_line(error)) from error
    except SQLAlchemyError as error:
        raise Unavailable(one_line(error)) from error
    except ImportError as error:
        raise Refused(f"the driver of this database is not installed ({one_line(error)})") from error


def _meaning(error: Exception) -> Exception:
    code = str(getattr(error, "error_code", ""))
    text = one_line(error)
    if code == "RESOURCE_DOES_NOT_EXIST" or "must be in the 'active' state" in text:
        return Gone(text)
    if code in _DENIALS:
        return Denied(text, _DENIALS[code])
    return Refused(text) if code in _REFUSALS else Unavailable(text)


def denial(error: BaseException, uri: str, what: str) -> str | None:
    """What it means that a server denies something, in one line without its name; None for any other error.

    ``what`` is what was to be done, as in ``write into experiment 'x'``.
    """
    status = getattr(error, "status", None) or _DENIALS.get(str(getattr(error, "error_code", "")))
    if status not in _DENIALS.values():
        return None
    found = known(uri)
    if status == 403:
        return f"it does not let {found.name} {what} (403)"
    return f"it {'wants credentials' if found.missing else f'refuses the credentials of {found.name}'} (401)"


def one_line(error: BaseException) -> str:
    """The message of an error in one line of bounded length, with the cause where MLflow wraps it in URLs."""
    text = " ".join(str(error).split()) or type(error).__name__
    cause = re.search(r"Caused by (\w+)\(.*?[\"'](?:<[^>]*>|HTTP\w+\([^)]*\))?:? ?(.*?)[\"']\)", text)
    if cause is not None:
        url = re.search(r"https?://[^\s/]+", text)
        text = f"{url[0] if url else 'server'}: {cause[2] or cause[1]}"
    return text if len(text) <= 300 else f"{text[:299]}…"


def _local_folder(artifact_uri: str) -> Path | None:
    parts = urlsplit(artifact_uri)
    if parts.scheme == "file" and parts.netloc in {"", "localhost"}:
        return Path(unquote(parts.path))
    return Path(artifact_uri) if artifact_uri.startswith("/") else None


def _position(file: Path) -> int:
    """How far this process has read or written a file that it has open."""
    furthest = 0
    with contextlib.suppress(OSError):
        name = str(file.resolve())
        for entry in os.scandir("/proc/self/fd"):
            with contextlib.suppress(OSError, ValueError, IndexError):
                if os.readlink(entry.path) == name:  # noqa: PTH115  (as plain text)
                    words = Path(f"/proc/self/fdinfo/{entry.name}").read_text().split()
                    furthest = max(furthest, int(words[words.index("pos:") + 1]))
    return furthest


def _partial(target: Path) -> Path:
    return target.with_name(f".{target.name[:200]}.partial")


def _copy(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = _partial(target)
    shutil.copyfile(source, partial)
    partial.replace(target)


@contextlib.contextmanager
def _initialising(uri: str) -> Iterator[None]:
    """Only one process at a time creates the tables of a SQLite store."""
    path = sqlite_path(uri)
    if path is None:
        yield
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX)
        yield
    finally:
        os.close(folder)
