"""Where things are in MLflow's pages, as its own links say it: what comes after the address of its server."""

from __future__ import annotations

from urllib.parse import quote, urlencode


def run_page(experiment: str, run_id: str) -> str:
    """The page of a run."""
    return f"#/experiments/{experiment}/runs/{run_id}"


def artifact_page(experiment: str, run_id: str, path: str) -> str:
    """The page that shows an artifact of a run."""
    return f"{run_page(experiment, run_id)}/artifacts/{quote(path)}"


def children_page(experiment: str, run_id: str) -> str:
    """The table of the runs below a run."""
    wanted = urlencode({"searchFilter": f"tags.`mlflow.parentRunId` = '{run_id}'"}, quote_via=quote)
    return f"#/experiments/{experiment}/runs?{wanted}"
