"""A Ray on this machine for one measurement: a head with as many CPUs as asked for, on loopback, with a token."""

from __future__ import annotations

import contextlib
import secrets
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from benchmarks import harness

_RAY = str(Path(sys.executable).with_name("ray"))
_START_S = 120.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Head:
    """Where it listens, what commands need in their environment to reach it, and its raylet's process."""

    address: str
    env: Mapping[str, str]
    raylet: int

    def object_store_mb(self) -> float:
        """The memory of the object store's file, which never gets smaller: the most that was ever in it."""
        for each in Path(f"/proc/{self.raylet}/fd").iterdir():
            with contextlib.suppress(OSError):
                if "/plasma" in str(each.readlink()):
                    return each.stat().st_blocks * 512 / 2**20
        raise harness.BenchmarkError("the raylet has no object store")


@contextlib.contextmanager
def started(cpus: int) -> Iterator[Head]:
    """Start one; it ends with the block."""
    env = {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(16),
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # elsewhere it listens on loopback only
        "RAY_USAGE_STATS_ENABLED": "0",
    }
    port = harness.free_port()
    # of its own, as its sockets' paths must be short
    with tempfile.TemporaryDirectory(prefix="ray-", ignore_cleanup_errors=True) as folder:
        command = [
            _RAY, "start", "--block", "--head", f"--port={port}", "--node-ip-address=127.0.0.1",
            f"--num-cpus={cpus}", f"--temp-dir={folder}", "--include-dashboard=false",
        ]  # fmt: skip
        with harness.started(command, Path(folder), env) as process:
            deadline = time.monotonic() + _START_S
            while "Ray runtime started" not in (Path(folder) / "output.txt").read_text(errors="replace"):
                if process.poll() is not None or time.monotonic() > deadline:
                    raise harness.failed(Path(folder), "Ray has not started")
                time.sleep(0.2)
            raylet = harness.child(process.pid, "raylet/raylet")
            assert raylet is not None
            yield Head(address=f"127.0.0.1:{port}", env=env, raylet=raylet)
