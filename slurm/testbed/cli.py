"""The command line: ``python -m slurm.testbed start DIR``, and ``status``, ``env``, ``stop``."""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path

from slurm.testbed.cluster import Cluster
from slurm.testbed.errors import TestbedError
from slurm.testbed.settings import Options

_HELP = {
    "nodes": "how many nodes",
    "gpus": "GPUs of each node",
    "cpus": "CPUs that each node claims",
    "memory_mb": "memory that each node claims",
    "accounting": "slurmdbd and MariaDB, for sacct and accounts",
    "enforce": "refuse jobs of unknown accounts",
    "grace_s": "between the first signal to a preempted job and its end",
    "send_user_signal": "at preemption, also send what a job wants by --signal",
    "kill_wait_s": "between SIGTERM and SIGKILL for a job that is cancelled or out of time",
    "node_timeout_s": "silence after which a node is DOWN",
    "min_job_age_s": "how long the controller knows a job that has ended",
    "requeue_delay_s": "how long a requeued job waits",
    "max_array_size": "Slurm's MaxArraySize: one more than the greatest index of an array",
    "max_job_count": "Slurm's MaxJobCount: jobs that the controller keeps at a time",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit status. A user's mistake is one line."""
    words = _parser().parse_args(arguments)
    try:
        return int(_COMMANDS[words.command](words))
    except TestbedError as error:
        sys.stderr.write(f"error: {error}\n")
        return 1


def start(words: argparse.Namespace) -> int:
    """Start a cluster and say how to use it."""
    options = Options(**{entry.name: getattr(words, entry.name) for entry in fields(Options)})
    cluster = Cluster(words.directory, options)
    cluster.start()
    sys.stdout.write(
        f"{words.nodes} nodes with {words.gpus} GPUs each are idle after {cluster.start_s:.1f} s; use them:\n"
        f'    eval "$(python -m slurm.testbed env {shlex.quote(str(words.directory))})"\n'
    )
    return 0


def stop(words: argparse.Namespace) -> int:
    """Stop a cluster."""
    Cluster.attach(words.directory).stop()
    return 0


def status(words: argparse.Namespace) -> int:
    """Say which daemons run; 0 if all do, else 3 (as service managers do)."""
    alive = Cluster.attach(words.directory).status()
    for name, runs in alive.items():
        sys.stdout.write(f"{name:<10} {'running' if runs else 'stopped'}\n")
    return 0 if all(alive.values()) else 3


def env(words: argparse.Namespace) -> int:
    """Print what a shell must export to use the cluster."""
    for name, value in Cluster.attach(words.directory).exports().items():
        sys.stdout.write(f"export {name}={shlex.quote(value)}\n")
    return 0


_COMMANDS = {"start": start, "stop": stop, "status": status, "env": env}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m slurm.testbed", description="A real Slurm cluster on this machine."
    )
    commands = parser.add_subparsers(dest="command", required=True)
    for name, command in _COMMANDS.items():
        sub = commands.add_parser(
            name, help=command.__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
        )
        sub.add_argument("directory", type=Path, help="the testbed's directory")
        if command is start:
            _add_options(sub)
    return parser


def _add_options(parser: argparse.ArgumentParser) -> None:
    for entry in fields(Options):
        flag = f"--{entry.name.replace('_', '-')}"
        text = _HELP[entry.name]
        if isinstance(entry.default, bool):
            parser.add_argument(flag, action=argparse.BooleanOptionalAction, default=entry.default, help=text)
        else:
            parser.add_argument(flag, type=int, default=entry.default, help=text)
