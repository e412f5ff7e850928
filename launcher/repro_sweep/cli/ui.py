"""``repro-sweep ui NAME``: opens MLflow at a sweep."""

from __future__ import annotations

import os
import sys
import webbrowser
from collections.abc import Sequence
from functools import partial

from repro_sweep.cli.arguments import Parser, at_least
from repro_sweep.cli.main import INTERRUPTED, say


def main(arguments: Sequence[str]) -> int:
    """Run the command; returns the exit status.

    Raises:
        SweepError: the port is taken, or MLflow does not start.
        TrackingError: there is no such sweep, or MLflow cannot be read.
    """
    parser = Parser(
        prog="repro-sweep ui",
        description="Opens MLflow at a sweep. Where the store is a server, its address is printed and opened; else"
        " MLflow's server runs on this machine, for this machine only, until Ctrl-C.",
    )
    parser.add_argument("name", metavar="NAME", help="the sweep's name")
    parser.add_argument(
        "--port", type=partial(at_least, 1), metavar="N", help="of the server here; by default a free one"
    )
    parser.add_argument("--no-browser", action="store_true", help="only print the addresses")
    parser.add_argument(
        "--uri", help="the MLflow tracking URI (default: MLFLOW_TRACKING_URI, else mlflow.db here)"
    )
    args = parser.parse_args(arguments)

    from repro_sweep.results import find_sweep, reading_uri
    from repro_sweep.tracking.pages import children_page, run_page
    from repro_sweep.tracking.uri import is_http

    uri = reading_uri(args.uri)
    sweep = find_sweep(args.name, uri)
    pages = (
        ("the sweep", run_page(sweep.experiment_id, sweep.run_id)),
        ("its trials", children_page(sweep.experiment_id, sweep.run_id, sweep.metric, sweep.direction)),
    )
    if is_http(uri):
        if args.port is not None:
            say(f"--port is not used: {uri} is a server already")
        _show(uri, pages, browser=not args.no_browser)
        return 0
    return _serve(uri, args.port, pages, browser=not args.no_browser)


def _serve(uri: str, port: int | None, pages: Sequence[tuple[str, str]], *, browser: bool) -> int:
    from repro_sweep.cli.viewer import Ended, running

    say("MLflow's server starts, which takes some seconds")
    try:
        with running(uri, port) as server:
            _show(server.address, pages, browser=browser)
            say("Ctrl-C stops the server")
            server.wait()
    except (KeyboardInterrupt, Ended):
        return INTERRUPTED
    return 0


def _show(address: str, pages: Sequence[tuple[str, str]], *, browser: bool) -> None:
    for name, page in pages:
        print(f"{name:<10}  {address}/{page}", flush=True)
    if browser and _has_browser():
        webbrowser.open(f"{address}/{pages[0][1]}")


def _has_browser() -> bool:
    """Whether there is one with windows: one in this terminal would take it over."""
    return sys.platform == "darwin" or any(
        os.environ.get(name) for name in ("BROWSER", "DISPLAY", "WAYLAND_DISPLAY")
    )
