"""A Docker engine for tests, in namespaces of its own, and what its images are made from; no registry is asked.

The engine has its own processes, network, mounts and files: when its first process ends, by whatever cause, all that it
has started ends with it, and no mount, bridge or rule of a firewall is left. The machine's own engine, if it has one,
sees nothing of it.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Self

from helpers import eventually

ROOT = Path(__file__).resolve().parent.parent
START_S = 60.0
_CGROUPS = Path("/sys/fs/cgroup")
_DRIVERS = ("overlay2", "vfs")
_PROGRAMS = {
    "dockerd": "docker.io", "docker-compose": "docker-compose", "debootstrap": "debootstrap", "ip": "iproute2",
}  # fmt: skip
# Debian's client fits Debian's engine; another one may stand before it on the path
_PATH = "/usr/bin:/bin:/usr/sbin:/sbin:/usr/local/bin"

# pid 1 of the engine's namespace: it reaps what is left over, and lasts as long as dockerd
_INIT = """
set -eu
mount -t proc proc /proc
mount -t tmpfs -o mode=755 tmpfs /run
ip link set lo up
"$@" &
wait $!
"""

# --- the base image ----------------------------------------------------------------------------------------------

_PACKAGES = (
    "ca-certificates", "git", "munge", "postgresql", "python3", "python3-venv", "slurm-client", "slurmctld", "slurmd",
)  # fmt: skip
# what is installed is used for some minutes: no waiting for disks, no manuals, and no compiler within PostgreSQL
_DPKG = """
force-unsafe-io
path-exclude=/usr/share/doc/*
path-exclude=/usr/share/info/*
path-exclude=/usr/share/locale/*
path-exclude=/usr/share/man/*
path-exclude=/usr/lib/*/libLLVM-*
"""
_DEBOOTSTRAP = """
set -eu
root=$1 suite=$2 mirror=$3 packages=$4
debootstrap --foreign --variant=minbase --include="$packages" "$suite" "$root" "$mirror"
mkdir -p "$root/etc/dpkg/dpkg.cfg.d"
printf '%s' "$DPKG" >"$root/etc/dpkg/dpkg.cfg.d/small"
printf '#!/bin/sh\\nexit 101\\n' >"$root/usr/sbin/policy-rc.d"
chmod +x "$root/usr/sbin/policy-rc.d"
LC_ALL=C DEBIAN_FRONTEND=noninteractive chroot "$root" /debootstrap/debootstrap --second-stage
tar -C "$root" --exclude='./dev/*' --exclude='./proc/*' --exclude='./sys/*' --exclude=./debootstrap \\
    --exclude='./var/cache/apt/*' --exclude='./var/lib/apt/lists/*' -cf "$root.tar" .
"""


class EngineError(Exception):
    """The engine or an image can't be had; the message says why."""


def cache_folder() -> Path:
    """Where what takes long to make is kept between runs of the tests."""
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "repro-sweep-tests"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def base_archive() -> Path:
    """The root of a small Debian, of the machine's own release and mirror, as an archive; made once a machine."""
    mirror, suite = _mirror()
    made_from = json.dumps([mirror, suite, _PACKAGES, _DPKG, _DEBOOTSTRAP])
    kept = cache_folder() / f"base-{hashlib.sha256(made_from.encode()).hexdigest()[:16]}.tar"
    if kept.exists():
        return kept
    with tempfile.TemporaryDirectory(prefix="base-", dir=cache_folder()) as folder:
        root = Path(folder, "root")
        # a mount that debootstrap may leave is gone with the namespace
        command = ["unshare", "--mount", "bash", "-c", _DEBOOTSTRAP, "debootstrap"]
        run([*command, str(root), suite, mirror, ",".join(_PACKAGES)], env={**os.environ, "DPKG": _DPKG})
        for old in cache_folder().glob("base-*.tar"):
            old.unlink()
        Path(folder, "root.tar").replace(kept)
    return kept


def _mirror() -> tuple[str, str]:
    """Where apt gets this machine's release from, and the release."""
    text = run(
        ["apt-get", "indextargets", "--format", "$(REPO_URI) $(RELEASE) $(COMPONENT)", "Created-By: Packages"]
    )
    for uri, suite, component in (line.split() for line in text.splitlines()):
        if component == "main" and "-" not in suite:
            return uri, suite
    raise EngineError("apt knows no mirror of this machine's Debian: its sources lack 'main' of a release")


def make_wheels(folder: Path, requirements: Sequence[str]) -> None:
    """Fill a folder with the wheels of requirements, as pip is configured on this machine."""
    system = run(["/usr/bin/python3", "-c", "import sys; print(*sys.version_info[:2])"]).split()
    if [int(word) for word in system] != list(sys.version_info[:2]):
        raise EngineError(f"the images have Debian's Python {'.'.join(system)}: run the tests with the same")
    constraints = str(ROOT / "constraints.txt")
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--wheel-dir", str(folder)]
    run([*pip, "--constraint", constraints, *requirements], env={**os.environ, "PIP_CONSTRAINT": constraints})


# --- the engine --------------------------------------------------------------------------------------------------


class Engine:
    """A dockerd with a folder of its own; as a context manager it is started and stopped."""

    def __init__(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="docker-"))  # a socket's path must be short
        self._cgroup = f"/{self.folder.name}"
        self._process: subprocess.Popen[bytes] | None = None
        self.env = {
            "PATH": _PATH,
            "HOME": str(self.folder),
            "LANG": "C.UTF-8",
            "DOCKER_HOST": f"unix://{self.folder}/docker.sock",
            "DOCKER_CONFIG": str(self.folder / "client"),
            "DOCKER_BUILDKIT": "1",
            "COMPOSE_DOCKER_CLI_BUILD": "1",
            "BUILDKIT_PROGRESS": "plain",
        }

    def __enter__(self) -> Self:
        if os.geteuid() != 0:
            raise EngineError("a Docker engine must be started by root")
        missing = {name for program, name in _PROGRAMS.items() if not shutil.which(program, path=_PATH)}
        if missing:
            raise EngineError(f"not installed: {', '.join(sorted(missing))}")
        try:
            for driver in _DRIVERS:
                if self._start(driver):
                    return self
            raise EngineError(f"dockerd does not start: {self._log()}")
        except BaseException:
            self.__exit__()
            raise

    def __exit__(self, *_: object) -> None:
        self._kill()
        shutil.rmtree(self.folder)
        for folder in (_CGROUPS, *_CGROUPS.glob("*/")):
            _remove_cgroups(folder / self._cgroup[1:])

    def docker(self, *words: str, text: str | None = None, check: bool = True, timeout_s: float = 300) -> str:
        """Run Debian's client; returns what it prints."""
        return run(["docker", *words], env=self.env, text=text, check=check, timeout_s=timeout_s)

    def run_here(self, program: Path) -> str:
        """Run a program of this machine with the engine's environment; returns what it prints."""
        return run([str(program)], env=self.env)

    def inside(self, *words: str | Path, env: Mapping[str, str]) -> subprocess.CompletedProcess[str]:
        """Run a program of this machine beside the containers: it reaches the ports that they publish."""
        command = ["nsenter", "--net", "--target", str(self.init), "--", *map(str, words)]
        return subprocess.run(command, env=dict(env), capture_output=True, text=True, timeout=120)

    @property
    def init(self) -> int:
        """The first process of the engine's namespaces."""
        assert self._process is not None
        pid = self._process.pid
        return int(Path(f"/proc/{pid}/task/{pid}/children").read_text().split()[0])

    def _start(self, driver: str) -> bool:
        folder = self.folder
        (folder / "daemon.json").write_text("{}")
        dockerd = [
            "dockerd", f"--config-file={folder}/daemon.json", f"--data-root={folder}/data",
            f"--exec-root={folder}/exec", f"--pidfile={folder}/docker.pid", f"--host=unix://{folder}/docker.sock",
            f"--storage-driver={driver}", f"--cgroup-parent={self._cgroup}",
        ]  # fmt: skip
        # ends with this process, even if that is killed
        wrapped = [
            "setpriv",
            "--pdeathsig",
            "KILL",
            "unshare",
            "--mount",
            "--net",
            "--pid",
            "--fork",
            "--kill-child",
        ]
        with (folder / "dockerd.log").open("wb") as log:
            self._process = subprocess.Popen(
                [*wrapped, "bash", "-c", _INIT, "init", *dockerd], env={**os.environ, "PATH": _PATH},
                stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True,
            )  # fmt: skip
        process = self._process

        def ready() -> bool:
            return process.poll() is not None or bool(
                (folder / "docker.sock").exists()
                and self.docker("version", "--format={{.Server.Os}}", check=False)
            )

        eventually(ready, "dockerd answers", START_S)
        return process.poll() is None

    def _kill(self) -> None:
        if self._process is None:
            return
        with contextlib.suppress(ProcessLookupError):
            os.kill(self._process.pid, signal.SIGKILL)
        self._process.wait(30)
        mark = str(self.folder).encode()
        # the kernel ends the rest; files and cgroups are free only then
        eventually(
            lambda: not any(mark in line for line in _command_lines()), "all processes of the engine end"
        )

    def _log(self) -> str:
        return (self.folder / "dockerd.log").read_text(errors="replace")[-2000:]


class Compose:
    """``docker-compose`` in a folder that has a compose.yaml, with an environment of its own."""

    def __init__(self, engine: Engine, folder: Path, env: Mapping[str, str]) -> None:
        self.engine = engine
        self.folder = folder
        self.env = {**engine.env, "COMPOSE_PROJECT_NAME": "team", **env}

    def __call__(
        self, *words: str, text: str | None = None, check: bool = True, timeout_s: float = 300
    ) -> str:
        """Run it; returns what it prints.

        Raises:
            EngineError: It fails, unless that is not to be checked.
        """
        command = ["docker-compose", "--no-ansi", *words]
        return run(command, env=self.env, cwd=self.folder, text=text, check=check, timeout_s=timeout_s)

    def container(self, service: str) -> str:
        """The id of a service's container."""
        return self("ps", "--quiet", service).strip()

    def health(self, service: str) -> str:
        """What a service's container says of itself."""
        return self.engine.docker(
            "inspect", "--format={{.State.Health.Status}}", self.container(service)
        ).strip()

    def until_healthy(self, *services: str) -> None:
        """Wait until services are healthy."""
        for service in services:
            try:
                eventually(lambda name=service: self.health(name) == "healthy", f"{service} is healthy", 180)
            except AssertionError as error:
                raise EngineError(f"{error}\n{self('logs', '--tail=40', service, check=False)}") from None


def run(
    command: Sequence[str],
    *,
    env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
    text: str | None = None,
    check: bool = True,
    timeout_s: float = 900,
) -> str:
    """Run a command to its end; returns what it prints.

    Raises:
        EngineError: It fails, unless that is not to be checked; with what it said.
    """
    done = subprocess.run(
        list(command), env=None if env is None else dict(env), cwd=cwd, input=text or "", capture_output=True,
        text=True, timeout=timeout_s,
    )  # fmt: skip
    if done.returncode and check:
        raise EngineError(
            f"{' '.join(command)[:200]} ({done.returncode}): {(done.stdout + done.stderr)[-4000:]}"
        )
    return done.stdout


def _command_lines() -> list[bytes]:
    lines = []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            lines.append((folder / "cmdline").read_bytes())
    return lines


def _remove_cgroups(top: Path) -> None:
    for folder, _, _ in os.walk(top, topdown=False):
        with contextlib.suppress(OSError):
            Path(folder).rmdir()
