"""What is recorded of the environment that a trial runs in."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from repro_sweep.provenance import environment
from repro_sweep.provenance.environment import Environment, Gpu, Package


def test_the_environment_is_described_as_it_is() -> None:
    found = environment.inspect({"OMP_NUM_THREADS": "3"})
    assert found.python == ".".join(map(str, sys.version_info[:3]))
    assert found.packages["hydra-core"].version == "1.3.8"
    assert found.packages["repro-sweep"].editable is not None
    assert found.variables == {"OMP_NUM_THREADS": "3"}
    assert found.cpu
    assert Environment.model_validate_json(found.model_dump_json()) == found


def test_variables_that_hold_secrets_or_say_nothing_are_left_out() -> None:
    environ = {
        "CUDA_VISIBLE_DEVICES": "0", "PYTHONHASHSEED": "1", "HOME": "/h", "AWS_SECRET_ACCESS_KEY": "s", "LC_ALL": "C",
        "NVIDIA_API_KEY": "s", "TORCH_AUTH": "s", "CUDA_TOKEN": "s", "MLFLOW_TRACKING_PASSWORD": "s",
    }  # fmt: skip
    assert set(environment.variables(environ)) == {"CUDA_VISIBLE_DEVICES", "LC_ALL", "PYTHONHASHSEED"}


@pytest.mark.parametrize(
    "name", ["TF_VAR_db_pwd", "TF_VAR_region", "NVIDIA_NGC_KEY", "PYTHON_keyring", "TORCH_PASSPHRASE"]
)
def test_variables_of_others_and_those_that_may_be_secrets_are_left_out(name: str) -> None:
    """Those of Terraform begin as those of TensorFlow do."""
    assert environment.variables({name: "v"}) == {}


def test_variables_of_tensorflow_that_change_results_are_recorded() -> None:
    environ = {"TF_DETERMINISTIC_OPS": "1", "TF_ENABLE_ONEDNN_OPTS": "0"}
    assert environment.variables(environ) == environ


def test_variables_lose_the_passwords_of_urls() -> None:
    assert environment.variables({"TORCH_URL": "http://u:p@w@h"}) == {"TORCH_URL": "http://u:***@h"}


def site(folder: Path, name: str, files: dict[str, str], record: str, direct_url: str | None = None) -> None:
    """Install a distribution in a folder."""
    info = folder / f"{name}-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    (info / "RECORD").write_text(record)
    for each, text in files.items():
        (folder / each).write_text(text)
    if direct_url is not None:
        (info / "direct_url.json").write_text(direct_url)


def installed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Package]:
    """The distributions in a folder."""
    monkeypatch.setattr(sys, "path", [str(folder)])
    return environment.packages()


def test_a_package_with_other_files_has_another_hash_and_one_that_was_compiled_has_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    records = {
        "one": "a.py,sha256=x,1\nThe_Name-1.0.dist-info/INSTALLER,sha256=pip,3\n",
        "compiled": "a.py,sha256=x,1\n__pycache__/a.pyc,,\n../../bin/a,sha256=b,1\n"
        "The_Name-1.0.dist-info/INSTALLER,sha256=uv,2\n",
        "other": "a.py,sha256=y,1\n",
    }  # fmt: skip
    found = {}
    for folder, record in records.items():
        site(tmp_path / folder, "The_Name", {}, record)
        found[folder] = installed(tmp_path / folder, monkeypatch)["the-name"]
    assert found["one"] == found["compiled"]
    assert found["other"].digest != found["one"].digest


def test_a_package_that_is_used_in_its_place_is_told_and_is_not_in_the_lock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    site(tmp_path, "mine", {}, "", '{"url": "file:///home/me/mine", "dir_info": {"editable": true}}')
    site(tmp_path, "theirs", {}, "", '{"url": "file:///home/me/theirs", "dir_info": {}}')
    found = environment.inspect({}).model_copy(update={"packages": installed(tmp_path, monkeypatch)})
    assert found.packages["mine"].editable == "file:///home/me/mine"
    assert found.packages["theirs"].editable is None
    assert found.lock() == "theirs==1.0\n"


def test_the_hash_tells_python_and_packages_and_not_the_machine() -> None:
    one = environment.inspect({})
    assert one.model_copy(update={"cpu": "another", "variables": {"TZ": "UTC"}}).digest == one.digest
    assert one.model_copy(update={"python": "3.0.0"}).digest != one.digest
    more = {**one.packages, "new": Package(version="1")}
    assert one.model_copy(update={"packages": more}).digest != one.digest


def test_gpus_are_those_that_nvidia_smi_lists(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    command = tmp_path / "nvidia-smi"
    command.write_text(
        "#!/bin/sh\necho 'NVIDIA A, B 80GB, 81559, 550.54.15'\necho 'NVIDIA C, [N/A], 550.54.15'\n"
    )
    command.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    assert environment.inspect({}).gpus == (
        Gpu(model="NVIDIA A, B 80GB", memory_mb=81559, driver="550.54.15"),
    )


def test_without_gpus_there_are_none(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_such_program(*_: object, **__: object) -> None:
        raise FileNotFoundError

    monkeypatch.setattr(subprocess, "run", no_such_program)
    assert environment.inspect({}).gpus == ()
