"""What a trial runs on and with: Python, packages, operating system, processors, GPUs, variables of the environment."""

from __future__ import annotations

import fnmatch
import hashlib
import json
import os
import platform
import re
import subprocess
import sys
from collections.abc import Iterable, Mapping
from importlib import metadata
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import unquote

from pydantic import BaseModel, ConfigDict

from repro_sweep.redaction import is_secret_variable, redacted

_ALLOWED = (
    "PYTHON*", "OMP_*", "MKL_*", "OPENBLAS_*", "NUMEXPR_*", "BLIS_*", "VECLIB_*", "KMP_*", "GOMP_*",
    "CUDA_*", "CUBLAS_*", "CUDNN_*", "NVIDIA_*", "NCCL_*", "TORCH_*", "PYTORCH_*", "JAX_*", "XLA_*",
    "TF_DETERMINISTIC_OPS", "TF_CUDNN_DETERMINISTIC", "TF_ENABLE_ONEDNN_OPTS", "TF_XLA_FLAGS",
    "TF_NUM_INTRAOP_THREADS", "TF_NUM_INTEROP_THREADS", "TF_FORCE_GPU_ALLOW_GROWTH", "TF_GPU_ALLOCATOR",
    "SLURM_JOB_ID", "SLURM_JOB_NODELIST", "SLURM_NNODES", "SLURM_NTASKS", "SLURM_CPUS_PER_TASK",
    "LD_LIBRARY_PATH", "LD_PRELOAD", "VIRTUAL_ENV", "CONDA_DEFAULT_ENV", "CONDA_PREFIX", "TZ", "LANG", "LC_*",
)  # fmt: skip
_HEADER = re.compile(r"^(Name|Version): *(\S+)", re.MULTILINE)
_NAME = re.compile(r"[-_.]+")


class Package(BaseModel):
    """An installed distribution: its version, and a hash of the list of its files with their hashes (RECORD).

    ``editable``: where it lies, for one whose files are used in their place; its hash says nothing.
    """

    model_config = ConfigDict(frozen=True)

    version: str
    digest: str | None = None
    editable: str | None = None

    def lies_in(self, folders: Iterable[str]) -> bool:
        """Whether it was installed to be edited in one of some folders."""
        if self.editable is None:
            return False
        lies = PurePosixPath(_path_of(self.editable))
        return any(lies.is_relative_to(folder) for folder in folders)


class Gpu(BaseModel):
    """A GPU, as nvidia-smi describes it."""

    model_config = ConfigDict(frozen=True)

    model: str
    memory_mb: int
    driver: str


class Environment(BaseModel):
    """All of it. What is not known is None, or not there."""

    model_config = ConfigDict(frozen=True)

    python: str
    implementation: str
    system: str
    libc: str
    cpu: str | None
    gpus: tuple[Gpu, ...] = ()
    packages: Mapping[str, Package] = {}
    variables: Mapping[str, str] = {}

    @property
    def digest(self) -> str:
        """A hash of Python and the packages: environments with the same one can be built by the same lock."""
        what = [
            self.python,
            self.implementation,
            {name: each.model_dump() for name, each in self.packages.items()},
        ]
        return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()

    def lock(self) -> str:
        """The packages as lines of a requirements file, without those that lie elsewhere."""
        pinned = (
            f"{name}=={each.version}\n" for name, each in self.packages.items() if each.editable is None
        )
        return "".join(pinned)


def inspect(environ: Mapping[str, str] = os.environ) -> Environment:
    """The environment of this process."""
    return Environment(
        python=platform.python_version(), implementation=sys.implementation.name, system=platform.platform(),
        libc=" ".join(platform.libc_ver()).strip(), cpu=_cpu(), gpus=_gpus(), packages=packages(),
        variables=variables(environ),
    )  # fmt: skip


def packages() -> dict[str, Package]:
    """The installed distributions that this process would import from, by their normalized names."""
    found: dict[str, Package] = {}
    for each in metadata.distributions():
        # a tenth of the time that its ``metadata`` takes
        text = each.read_text("METADATA") or each.read_text("PKG-INFO") or ""
        about = dict(_HEADER.findall(text.partition("\n\n")[0]))
        if "Name" in about and "Version" in about:  # else it is what an interrupted installation has left
            # of two with the same name, the first one on the path is imported
            name = _NAME.sub("-", about["Name"]).lower()
            if name not in found:
                found[name] = _package(each, about["Version"])
    return dict(sorted(found.items()))


def variables(environ: Mapping[str, str]) -> dict[str, str]:
    """The variables that are known to change results and hold no secrets, without passwords of URLs."""
    return {
        name: redacted(value)
        for name, value in sorted(environ.items())
        if any(fnmatch.fnmatchcase(name, pattern) for pattern in _ALLOWED) and not is_secret_variable(name)
    }


def _package(found: metadata.Distribution, version: str) -> Package:
    record = found.read_text("RECORD")
    digest = None
    if record is not None:
        # what Python compiles and installers note differs between installations of the same files
        lines = (
            line for line in record.splitlines() if ".dist-info/" not in line and not line.startswith("../")
        )
        kept = sorted(line for line in lines if "__pycache__" not in line)
        digest = hashlib.sha256("\n".join(kept).encode()).hexdigest()
    return Package(version=version, digest=digest, editable=_editable(found.read_text("direct_url.json")))


def editable_folder(found: metadata.Distribution) -> str | None:
    """Where a distribution lies that was installed to be edited; None for others."""
    url = _editable(found.read_text("direct_url.json"))
    return None if url is None else _path_of(url)


def _path_of(url: str) -> str:
    return unquote(url.removeprefix("file://"))


def _editable(direct_url: str | None) -> str | None:
    try:
        about: dict[str, Any] = json.loads(direct_url or "{}")
        return str(about["url"]) if about.get("dir_info", {}).get("editable") else None
    except (ValueError, KeyError, AttributeError):
        return None


def _cpu() -> str | None:
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    found = re.search(r"^(?:model name|Model|cpu model)\s*:\s*(.+)$", text, re.MULTILINE)
    return found[1].strip() if found else platform.machine()


def _gpus() -> tuple[Gpu, ...]:
    query = ["nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader,nounits"]
    try:
        said = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return ()
    rows = (line.rsplit(", ", 2) for line in said.splitlines())
    return tuple(
        Gpu(model=name, memory_mb=int(memory), driver=driver)
        for name, memory, driver in (row for row in rows if len(row) == 3)
        if memory.isdigit()
    )
