"""Whether a sweep may write to an MLflow server, found out before it starts, with two requests that change nothing.

The first one reads the experiment. The second one is a request to write that lacks what it needs: who has no permission
is told so (403), and who has it is told what is missing (400). That needs nothing but what every MLflow server has,
with or without accounts, and whatever stands before it. Only what will not change by itself is an error: a server that
is away, busy or odd is no reason not to start, because the results wait for it.

Never imports mlflow, whose client takes seconds to import.
"""

from __future__ import annotations

import http.client
import json
import os
import ssl
import threading
import time
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote, urlencode, urlsplit

from repro_sweep.errors import TrackingError
from repro_sweep.redaction import redacted
from repro_sweep.tracking.credentials import FILE, PASSWORD, PLACES, USER, Credentials, find
from repro_sweep.tracking.uri import is_http

CONNECT_S = 4.0
ANSWER_S = 15.0
"""A server that takes connections and is this slow is busy; one that takes none is away."""
_MOST_BYTES = 1_000_000
_SAID = 120
CREATE_RUN = "runs/create"
MAY = 400
"""The status by which a server says that a request may be made, and that it lacks what it needs."""
ELSEWHERE = "sweep.tracking.experiment=… names another experiment"


@dataclass(frozen=True, slots=True, kw_only=True)
class _Answer:
    status: int
    text: str
    location: str | None
    asks_for: str

    @property
    def document(self) -> Mapping[str, Any] | None:
        """The JSON object that it is, as all answers of MLflow are but those to who may not ask."""
        try:
            found = json.loads(self.text)
        except ValueError:
            return None
        return found if isinstance(found, dict) else None


def probe(experiment: str) -> dict[str, object]:
    """What to send to :data:`CREATE_RUN` to learn whether runs may be made in an experiment, without one being made."""
    return {
        "experiment_id": experiment,
        "start_time": "none: only asks for permission",
    }  # no number, so no run


class _Odd(Exception):  # noqa: N818
    """The server cannot be asked; the message says why."""


def check(
    uri: str, experiment: str, environ: Mapping[str, str] = os.environ, *, remedy: str = ELSEWHERE
) -> str | None:
    """See that a sweep may write into an experiment; takes at most :data:`ANSWER_S`.

    Args:
        uri: the tracking URI; of anything but a server nothing is asked.
        experiment: its name; there need not be one yet.
        environ: has the credentials, and how to reach the server.
        remedy: what to do where this experiment may not be written.

    Returns:
        One line where it cannot be told now; None where all is well.

    Raises:
        TrackingError: the server refuses the credentials, or does not let this user write; or the experiment was
            deleted.
    """
    if not is_http(uri):
        return None
    credentials = find(uri, environ)
    if credentials.foreign:
        return None
    found: list[str | Exception | None] = []

    def ask() -> None:
        try:
            _Check(uri, experiment, credentials, environ, remedy).run()
            found.append(None)
        except _Odd as odd:
            found.append(str(odd))
        except Exception as error:  # noqa: BLE001  (raised below)
            found.append(error)

    thread = threading.Thread(target=ask, name="access", daemon=True)  # looking up a name has no time limit
    thread.start()
    thread.join(ANSWER_S)
    outcome = found[0] if found else f"no answer within {ANSWER_S:g} s"
    if isinstance(outcome, Exception):
        raise outcome
    if outcome is None:
        return None
    return f"MLflow at {redacted(uri)} cannot be asked ({outcome}): the sweep starts without, its results wait for it"


class _Check:
    def __init__(
        self, uri: str, experiment: str, credentials: Credentials, environ: Mapping[str, str], remedy: str
    ) -> None:
        self._uri = uri
        self._experiment = experiment
        self._credentials = credentials
        self._environ = environ
        self._remedy = remedy
        self._until = time.monotonic() + ANSWER_S

    def run(self) -> None:
        by_name = f"experiments/get-by-name?{urlencode({'experiment_name': self._experiment})}"
        there = self._ask(by_name)
        found = there.document
        if there.status == 500 and self._credentials.user is None and self._credentials.header is not None:
            self._see_that_tokens_are_known(by_name)
        if there.status == 200 and found is not None and isinstance(found.get("experiment"), dict):
            experiment = found["experiment"]
            if experiment.get("lifecycle_stage") == "deleted":
                raise TrackingError(
                    f"MLflow at {redacted(self._uri)}: experiment {self._experiment!r} was deleted there: restore it;"
                    f" {self._remedy}"
                )
            answer = self._ask(CREATE_RUN, probe(str(experiment.get("experiment_id"))))
        elif there.status == 404 and (found or {}).get("error_code") == "RESOURCE_DOES_NOT_EXIST":
            answer = self._ask("experiments/create", {})  # no name, so no experiment
        else:
            raise _Odd(_told(there))
        if answer.status != MAY:
            raise _Odd(_told(answer))

    def _see_that_tokens_are_known(self, path: str) -> None:
        """MLflow's own accounts have no tokens, and with its cache of passwords one is an error of the server."""
        bare = self._request(path, None, bare=True)
        if bare.status == 401 and bare.asks_for.lower().startswith("basic"):
            raise TrackingError(
                f"MLflow at {redacted(self._uri)} does not know {self._credentials.name}: it wants a user and a"
                f" password; set {USER} and {PASSWORD}, or write {FILE}"
            )

    def _ask(self, path: str, body: Mapping[str, object] | None = None) -> _Answer:
        answer = self._request(path, body)
        server = f"MLflow at {redacted(self._uri)}"
        said = _quoted(answer)
        if answer.status == 401:
            if self._credentials.header is None:
                raise TrackingError(f"{server} wants credentials (401), of {self._credentials.who}: {PLACES}")
            raise TrackingError(
                f"{server} refuses the credentials of {self._credentials.who} (401): are they right, and have they"
                f" expired? {PLACES}"
            )
        if answer.status == 403 and "host header" in answer.text.lower():
            raise TrackingError(
                f"{server} does not answer to this name (403{said}): its administrator adds it to --allowed-hosts"
            )
        if answer.status == 403 and "<" in answer.text:
            raise _Odd(f"something before it answers {answer.status} with a page of its own")
        if answer.status == 403:
            verb = "write into" if body else "create" if body is not None else "read"
            raise TrackingError(
                f"{server} does not let {self._credentials.name} {verb} experiment {self._experiment!r} (403{said}):"
                " the permission EDIT is lacking, which its owner or an administrator of the server can grant;"
                f" {self._remedy}"
            )
        return answer

    def _request(self, path: str, body: Mapping[str, object] | None, *, bare: bool = False) -> _Answer:
        parts = urlsplit(self._uri)
        where = f"{parts.path.rstrip('/')}/api/2.0/mlflow/{path}"
        headers = {"Accept": "application/json", "User-Agent": "repro-sweep"}
        if self._credentials.header is not None and not bare:
            headers["Authorization"] = self._credentials.header
        if self._environ.get("MLFLOW_WORKSPACE", "").strip():
            headers["X-MLFLOW-WORKSPACE"] = self._environ["MLFLOW_WORKSPACE"].strip()
        content = None
        if body is not None:
            content = json.dumps(body).encode()
            headers["Content-Type"] = "application/json"
        connection, prefix = _connection(self._uri, self._environ)
        try:
            connection.connect()
            connection.sock.settimeout(max(0.1, self._until - time.monotonic()))
            connection.request("GET" if body is None else "POST", prefix + where, content, headers)
            with connection.getresponse() as response:
                text = response.read(_MOST_BYTES).decode("utf-8", "replace")
                location, asks_for = (
                    response.getheader("Location"),
                    response.getheader("WWW-Authenticate", ""),
                )
                return _Answer(status=response.status, text=text, location=location, asks_for=asks_for)
        except TimeoutError as error:
            raise _Odd("no answer in time") from error
        except (OSError, http.client.HTTPException, ValueError) as error:
            raise _Odd(" ".join(str(error).split())[:_SAID] or type(error).__name__) from error
        finally:
            connection.close()


def _connection(uri: str, environ: Mapping[str, str]) -> tuple[http.client.HTTPConnection, str]:
    """A connection to a server, by way of a proxy where the environment names one, and what stands before each path."""
    parts = urlsplit(uri)
    assert parts.hostname is not None
    secure = parts.scheme == "https"
    proxy = None
    if not urllib.request.proxy_bypass(parts.netloc.rpartition("@")[2]):
        proxy = urllib.request.getproxies().get(parts.scheme)
    if proxy is None:
        if secure:
            return http.client.HTTPSConnection(
                parts.hostname, parts.port, timeout=CONNECT_S, context=_context(environ)
            ), ""
        return http.client.HTTPConnection(parts.hostname, parts.port, timeout=CONNECT_S), ""
    there = urlsplit(proxy if "://" in proxy else f"http://{proxy}")
    if there.hostname is None or there.scheme != "http" or there.username is not None:
        raise _Odd("this proxy is not understood here")
    if not secure:
        return http.client.HTTPConnection(there.hostname, there.port or 80, timeout=CONNECT_S), (
            f"http://{quote(parts.netloc.rpartition('@')[2], safe=':[]')}"
        )
    through = http.client.HTTPSConnection(
        there.hostname, there.port or 80, timeout=CONNECT_S, context=_context(environ)
    )
    through.set_tunnel(parts.hostname, parts.port or 443)
    return through, ""


def _context(environ: Mapping[str, str]) -> ssl.SSLContext:
    """How MLflow's client, and ``requests`` below it, look at the server's certificate."""
    trusted = (
        environ.get("MLFLOW_TRACKING_SERVER_CERT_PATH")
        or environ.get("REQUESTS_CA_BUNDLE")
        or environ.get("CURL_CA_BUNDLE")
    )
    try:
        if trusted and os.path.isdir(trusted):  # noqa: PTH112
            context = ssl.create_default_context(capath=trusted)
        else:
            context = ssl.create_default_context(cafile=trusted or _bundle())
        if environ.get("MLFLOW_TRACKING_INSECURE_TLS", "").lower() in {"true", "1"}:
            context.check_hostname = False
            context.verify_mode = ssl.CERT_NONE
        mine = environ.get("MLFLOW_TRACKING_CLIENT_CERT_PATH")
        if mine:
            context.load_cert_chain(mine)
    except OSError as error:
        raise _Odd(f"a certificate cannot be read: {error}") from error
    return context


def _bundle() -> str | None:
    try:
        import certifi
    except ImportError:
        return None
    return certifi.where()


def _told(answer: _Answer) -> str:
    """What is odd about an answer."""
    if answer.location is not None and 300 <= answer.status < 400:
        target = urlsplit(answer.location)
        there = f"{target.scheme}://{target.netloc}{target.path}" if target.netloc else target.path
        return f"it answers {answer.status} and sends on to {redacted(there)[:_SAID]}: is the address right?"
    if answer.status in {200, 404} and answer.document is None:
        return f"it answers {answer.status}, but not as an MLflow server does: is the address right?"
    return f"it answers {answer.status}{_quoted(answer)}"


def _quoted(answer: _Answer) -> str:
    """The words of a short answer that are worth repeating."""
    document = answer.document
    words = str(document.get("message", "")) if document is not None else answer.text
    words = " ".join(words.split())
    if not words or "<" in words or words == "Permission denied":
        return ""
    return f", {words if len(words) <= _SAID else words[: _SAID - 1] + '…'}"
