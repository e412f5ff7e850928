"""A real Slurm cluster on one machine: to try a sweep on, and to test against."""

from __future__ import annotations

from slurm.testbed.cluster import Cluster
from slurm.testbed.daemons import Daemon, Node
from slurm.testbed.errors import TestbedError
from slurm.testbed.settings import Options

__all__ = ["Cluster", "Daemon", "Node", "Options", "TestbedError"]
