"""Where things are in MLflow's pages, as its own links say it: what comes after the address of its server."""

from __future__ import annotations

from urllib.parse import quote, urlencode

from repro_sweep.states import Direction
from repro_sweep.tracking.encoding import safe_key

_TRAINING = {"workflowType": "machine_learning"}
"""Of MLflow's two kinds of pages, those for training; for the others, runs are evaluations."""


def run_page(experiment: str, run_id: str) -> str:
    """The page of a run."""
    return f"#/experiments/{experiment}/runs/{run_id}?{_query({})}"


def artifact_page(experiment: str, run_id: str, path: str) -> str:
    """The page that shows an artifact of a run."""
    return f"#/experiments/{experiment}/runs/{run_id}/artifacts/{quote(path)}?{_query({})}"


def children_page(experiment: str, run_id: str, metric: str | None, direction: Direction) -> str:
    """The table of the runs below a run, best first; in the order of their names where there is no metric.

    Of runs in the order of their start, MLflow would show the run above them with these folded away.
    """
    wanted = {
        "searchFilter": f"tags.`mlflow.parentRunId` = '{run_id}'",
        "orderByKey": f"metrics.`{safe_key(metric)}`" if metric else "tags.`mlflow.runName`",
        "orderByAsc": "true" if not metric or direction is Direction.MINIMIZE else "false",
    }
    return f"#/experiments/{experiment}/runs?{_query(wanted)}"


def _query(wanted: dict[str, str]) -> str:
    return urlencode(wanted | _TRAINING, quote_via=quote)
