"""A real Slurm cluster for tests: name this module in ``pytest_plugins`` and ask for ``cluster``."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from slurm.testbed import Cluster, Options, TestbedError


@pytest.fixture(scope="session")
def running_cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """The cluster that the tests of a session share, started when the first one asks."""
    cluster = Cluster(
        tmp_path_factory.mktemp("slurm") / "cluster", Options(nodes=2, kill_wait_s=2, node_timeout_s=10)
    )
    try:
        cluster.start()
    except TestbedError as error:
        pytest.fail(str(error), pytrace=False)
    yield cluster
    cluster.stop()


@pytest.fixture
def cluster(running_cluster: Cluster) -> Iterator[Cluster]:
    """A cluster of two idle nodes with two GPUs each; what a test leaves running or stops is put right after it."""
    yield running_cluster
    running_cluster.clear()
