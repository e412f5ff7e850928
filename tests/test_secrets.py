"""Secrets stay where they are: planted in every place, and looked for in everything that a sweep leaves or shows."""

from __future__ import annotations

import gzip
import json
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from helpers import MakeProject

from repro_sweep.redaction import hidden, is_secret, redacted, without_secrets

PLANTED = "planted-4711"
"""Begins everything that must be found nowhere."""
TASK = """
    import os
    import time
    from pathlib import Path


    def train(cfg):
        assert cfg.service.api_key == os.environ["SERVICE_KEY"] == "planted" + "-4711-key"
        assert cfg.url.startswith("https://me:planted" + "-4711-url@")
        Path("started").touch()
        ends = time.monotonic() + 60
        while not Path("go").exists() and time.monotonic() < ends:
            time.sleep(0.05)
        return float(cfg.x)
"""
FILES = {
    "conf/config.yaml": """
        x: 0
        service: {api_key: "${oc.env:SERVICE_KEY}", user: me}
        url: "https://${service.user}:${oc.env:URL_KEY}@example.org"
        """,
    "tasks.py": TASK,
}
SECRETS = {
    "SERVICE_KEY": f"{PLANTED}-key", "URL_KEY": f"{PLANTED}-url", "AWS_SECRET_ACCESS_KEY": f"{PLANTED}-aws",
    "TORCH_HUB_TOKEN": f"{PLANTED}-hub",  # its beginning is one of those that are recorded
    "MLFLOW_TRACKING_PASSWORD": f"{PLANTED}-mlflow",
}  # fmt: skip


@pytest.fixture(scope="module")
def swept(make_shared_project: MakeProject) -> SimpleNamespace:
    """A sweep whose secrets come from the environment, with all command lines that ran meanwhile."""
    project = make_shared_project(FILES)
    commands: list[str] = []
    with project.start("+sweep=default", "sweep.task=tasks.train", "x=1,2", env=SECRETS) as running:
        running.until((project.root / "started").exists, "a trial runs")
        commands = list(project.processes().values())
        (project.root / "go").touch()
        assert running.wait() == 0
    return SimpleNamespace(project=project, commands=commands)


def everything(root: Path) -> Iterator[tuple[str, str]]:
    """The content of all files, those in archives and databases included."""
    for path in root.rglob("*"):
        if not path.is_file():
            continue
        data = path.read_bytes()
        if path.suffix == ".gz":
            data = gzip.decompress(data)
        elif data.startswith(b"SQLite format 3"):
            with sqlite3.connect(path) as db:
                data += "\n".join(db.iterdump()).encode()
        yield str(path.relative_to(root)), data.decode("utf-8", "replace")


def test_a_secret_of_the_environment_is_in_no_file(swept: SimpleNamespace) -> None:
    """Neither in ledger, logs, records, frozen source, nor in MLflow's database and artifacts."""
    texts = dict(everything(swept.project.root))
    for name in (
        "ledger.db",
        "record.json",
        "sweep.json",
        "source.tar.gz",
        "mlflow.db",
        "worker.log",
        "trial.log",
    ):
        assert any(path.endswith(name) for path in texts), (name, sorted(texts))
    assert {path for path, text in texts.items() if PLANTED in text} == set()


def test_a_secret_of_the_environment_is_on_no_command_line(swept: SimpleNamespace) -> None:
    """Of any process of the sweep, the trial's included."""
    assert len(swept.commands) >= 3
    assert not [command for command in swept.commands if PLANTED in command]


@pytest.mark.parametrize(
    ("conf", "arguments", "key", "variable"),
    [
        ("x: 0\ndb: {password: planted}\n", (), "db.password", "PASSWORD"),
        ("x: 0\nhf_token: planted\n", (), "hf_token", "HF_TOKEN"),
        ("x: 0\n", ("+aws.secret_access_key=planted",), "aws.secret_access_key", "SECRET_ACCESS_KEY"),
        ("x: 0\n", ("+hydra.job.env_set.API_KEY=planted",), "hydra.job.env_set.API_KEY", "API_KEY"),
    ],
)
def test_a_secret_in_the_configuration_is_refused(
    make_bare_project: MakeProject, conf: str, arguments: tuple[str, ...], key: str, variable: str
) -> None:
    """It would be in the frozen source; nothing has started, and the message does not have it either."""
    project = make_bare_project({"conf/config.yaml": conf, "tasks.py": "def train(cfg):\n    return 1.0\n"})
    done = project.run("+sweep=default", "sweep.task=tasks.train", *arguments)
    assert done.returncode == 2
    [line] = done.stderr.splitlines()
    assert line.startswith(f"repro-sweep: {key}: looks like a secret")
    assert f"${{oc.env:{variable}}}" in line
    assert "planted" not in line
    assert not (project.root / "multirun").exists()


def test_what_only_looks_like_a_secret_can_be_named(make_project: MakeProject) -> None:
    """Then it is a value like any other."""
    project = make_project({
        "conf/config.yaml": "x: 0\npassword: none of that\n",
        "tasks.py": "def train(cfg):\n    assert cfg.password == 'none of that'\n    return 1.0\n",
    })  # fmt: skip
    done = project.run("+sweep=default", "sweep.task=tasks.train", "sweep.not_secret=[password]")
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("uri", "instead"),
    [
        (
            "http://me:planted@localhost:5000",
            "set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD instead",
        ),
        ("postgresql://me:planted@localhost/mlflow", "set PGPASSWORD or write ~/.pgpass instead"),
    ],
)
@pytest.mark.parametrize("variable", [False, True])
def test_a_tracking_uri_with_a_password_is_refused(
    make_bare_project: MakeProject, uri: str, instead: str, *, variable: bool
) -> None:
    """It would be in the ledger; there is another way to give it."""
    project = make_bare_project({"conf/config.yaml": "x: 0", "tasks.py": "def train(cfg):\n    return 1.0\n"})
    place = {"MLFLOW_TRACKING_URI": uri} if variable else {}
    option = () if variable else (f"sweep.tracking.uri={uri}",)
    done = project.run("+sweep=default", "sweep.task=tasks.train", *option, env=place)
    assert done.returncode == 2
    [line] = done.stderr.splitlines()
    assert instead in line
    assert "planted" not in line


@pytest.mark.parametrize(
    "key",
    ["password", "db.password", "DB_PASSWORD", "token", "hf_token", "WANDB_API_KEY", "aws.secret_access_key",
     "client_secret", "auth-token", "credentials", "private_key"],
)  # fmt: skip
def test_keys_of_secrets(key: str) -> None:
    """By the last part of their names."""
    assert is_secret(key)


@pytest.mark.parametrize(
    "key",
    ["pad_token", "max_tokens", "tokenizer", "token.dim", "key", "keys", "primary_key", "secretary", "author", "passes",
     "sort_key", "mask_token", "n_tokens", "optimizer.lr"],
)  # fmt: skip
def test_keys_of_other_things(key: str) -> None:
    """Language models have tokens, tables have keys."""
    assert not is_secret(key)


def test_texts_lose_passwords_and_secrets() -> None:
    """URLs in messages, command lines in records, and whole records."""
    assert redacted("see http://me:pw@host/x and s3://b/k") == "see http://me:***@host/x and s3://b/k"
    command = "repro-sweep +sweep=a db.password=pw +api_key='p w' x=1,2 uri=http://me:pw@host token_dim=3"
    expected = "repro-sweep +sweep=a db.password=*** +api_key=*** x=1,2 uri=http://me:***@host token_dim=3"
    assert without_secrets(command) == expected
    record = {"a": {"token": "t", "n": 1, "password": "${oc.env:P}"}, "uris": ["http://u:p@h"], "secret": ""}
    assert json.loads(json.dumps(hidden(record))) == {
        "a": {"token": "***", "n": 1, "password": "${oc.env:P}"}, "uris": ["http://u:***@h"], "secret": "",
    }  # fmt: skip
