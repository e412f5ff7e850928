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
from omegaconf import OmegaConf

from repro_sweep.config.identity import check
from repro_sweep.errors import SweepError
from repro_sweep.redaction import has_password, hidden, is_secret, redacted, without_secrets
from repro_sweep.specification import check_overrides, executor_of

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
     "client_secret", "auth-token", "credentials", "private_key", "passwords", "api_keys", "api_keys.mine", "db_pwd",
     "dbPassword", "apiKey", "APIKey", "hub_token", "huggingface_token", "telegram_bot_token", "NVIDIA_NGC_KEY",
     "db_pass"],
)  # fmt: skip
def test_keys_of_secrets(key: str) -> None:
    """By the last part of their names, or what they are below."""
    assert is_secret(key)


@pytest.mark.parametrize(
    "key",
    ["pad_token", "max_tokens", "tokenizer", "token.dim", "key", "keys", "primary_key", "secretary", "author", "passes",
     "sort_key", "mask_token", "n_tokens", "optimizer.lr", "num_tokens", "token_dim", "eos_token", "bos_token",
     "cls_token", "pad_token_id", "max_new_tokens", "tokens_per_batch", "max_session_tokens", "keypoints",
     "secret_santa", "first_pass", "sweep.not_secret"],
)  # fmt: skip
def test_keys_of_other_things(key: str) -> None:
    """Language models have tokens, tables have keys."""
    assert not is_secret(key)


@pytest.mark.parametrize(
    ("config", "keys"),
    [
        ("password: 12345678", ["password"]),
        ("db: {password: 1.5}", ["db.password"]),
        ("api_key: [x]", ["api_key[0]"]),
        ("passwords: [x, {of: y}]", ["passwords[0]", "passwords[1].of"]),
        ("api_keys: {mine: x, theirs: {other: 7}}", ["api_keys.mine", "api_keys.theirs.other"]),
        ("db_pwd: x", ["db_pwd"]),
        ("dbPassword: x", ["dbPassword"]),
        ("hub_token: x", ["hub_token"]),
        ("huggingface_token: x", ["huggingface_token"]),
        ("url: postgres://u:pw@h/db", ["url"]),
        ("urls: ['see http://u:pw@h']", ["urls[0]"]),
        ("host: h\nurl: 'postgres://u:pw@${host}/db'", ["url"]),
        ("who: 'u:pw'\nurl: 'postgres://${who}@h/db'", ["url"]),
    ],
)
def test_secrets_in_a_config_are_found(config: str, keys: list[str]) -> None:
    """Each is named, and can be named as none."""
    made = OmegaConf.create(config)
    found = check(made)
    assert [problem.key for problem in found.problems] == keys
    assert not check(made, not_secret=keys).problems
    assert not check(made, not_secret=[key.partition("[")[0].partition(".")[0] for key in keys]).problems


@pytest.mark.parametrize(
    "config",
    [
        "max_new_tokens: 128\npad_token: <pad>\npad_token_id: 0\ntokens_per_batch: 4096\nkey: 5\nkeypoints: [1, 2]",
        "password: null\napi_key: ''\nuse_auth_token: true\nsecrets: []\npasswords: [null, '', false]",
        "password: ${oc.env:HOME}\napi_keys: {mine: '${oc.env:HOME}'}\nurl: 'http://${oc.env:HOME}:${oc.env:HOME}@h'",
        "url: 'http://u:${oc.env:PW,${none}}@h'\nnone: ''",
        "token: {dim: 5, kind: learned}",
        "url: http://localhost:8080/a@b\nother: 's3://b/k'\nuser: 'git://me@h/x'",
    ],
)
def test_ordinary_configs_are_not_refused(config: str) -> None:
    """Nor what comes from elsewhere, or says nothing."""
    assert not check(OmegaConf.create(config)).problems


@pytest.mark.parametrize(
    ("override", "key"),
    [
        ("+hydra.job.env_set.API_KEY=4711", "hydra.job.env_set.API_KEY"),
        ("+hydra.job.env_set={API_KEYS: [a]}", "hydra.job.env_set.API_KEYS"),
        ("+hydra.job.env_set.DB=postgres://u:planted@h", "hydra.job.env_set.DB"),
    ],
)
def test_secrets_in_overrides_of_hydras_node_are_found(override: str, key: str) -> None:
    """Which are kept in the sweep's record."""
    with pytest.raises(SweepError) as raised:
        check_overrides([override], ())
    assert str(raised.value).startswith(f"{key}: ")
    assert "planted" not in str(raised.value)
    check_overrides([override], [key])


def executor(monkeypatch: pytest.MonkeyPatch, *overrides: str) -> dict[str, object]:
    """What an executor's options become, where there are some variables."""
    monkeypatch.setenv("PLANTED", PLANTED)
    monkeypatch.setenv("SLOTS", "3")
    _, options = executor_of(overrides)
    return options


def test_what_executors_resolve_themselves_is_kept_as_it_was_written(monkeypatch: pytest.MonkeyPatch) -> None:
    """Under any key, in lists, by references, and not the options that decide what is started."""
    variables = "{DB_URL: '${oc.env:PLANTED}', VIA: '${.DB_URL}/db', NO: '${oc.env:NO_SUCH_ONE,7}', N: 1}"
    options = executor(
        monkeypatch, "sweep/executor=ray", "sweep.executor.slots=${oc.env:SLOTS}", "sweep.executor.host=h",
        f"+sweep.executor.runtime_env={{env_vars: {variables}, pip: ['${{oc.env:PLANTED}}'], at: '${{host}}'}}",
    )  # fmt: skip
    assert options["slots"] == 3
    assert options["runtime_env"] == {
        "env_vars": {
            "DB_URL": "${oc.env:PLANTED}",
            "VIA": "${oc.env:PLANTED}/db",
            "NO": "${oc.env:NO_SUCH_ONE,7}",
            "N": 1,
        },
        "pip": ["${oc.env:PLANTED}"],
        "at": "h",
    }
    assert PLANTED not in str(options)


def test_lines_of_a_shell_get_its_own_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    """The script that SLURM gets does not have the values either."""
    lines = r"['export A=${oc.env:PLANTED} B=${oc.env:NO_SUCH_ONE,b c} C=\${C}', 'cd ${account}']"
    options = executor(
        monkeypatch, "sweep/executor=slurm", "sweep.executor.account=me", "sweep.executor.partition=p${oc.env:SLOTS}",
        f"sweep.executor.setup={lines}",
    )  # fmt: skip
    assert options["setup"] == ["export A=${PLANTED} B=${NO_SUCH_ONE-b c} C=${C}", "cd me"]
    assert options["partition"] == "p3"


@pytest.mark.parametrize(
    ("override", "said"),
    [
        (
            "+sweep.executor.runtime_env={env_vars: {API_KEY: 5}}",
            "runtime_env.env_vars.API_KEY: looks like a secret",
        ),
        (
            "+sweep.executor.runtime_env={env_vars: {DB: 'http://u:planted@h'}}",
            "runtime_env.env_vars.DB: has a URL",
        ),
        (
            "+sweep.executor.runtime_env={env_vars: {DB: '${oc.env:PLANTED}${oc.select:host}'}}",
            "runtime_env.env_vars.DB: '${oc.env:PLANTED}${oc.select:host}' is resolved where it is used",
        ),
    ],
)
def test_secrets_in_options_of_executors_are_refused(
    monkeypatch: pytest.MonkeyPatch, override: str, said: str
) -> None:
    """With their full keys, and without their values."""
    with pytest.raises(SweepError) as raised:
        executor(monkeypatch, "sweep/executor=ray", "sweep.executor.host=h", override)
    assert str(raised.value).startswith(f"sweep.executor.{said}")
    assert "planted" not in str(raised.value)


def test_a_variable_between_single_quotes_is_refused_in_a_line_of_a_shell(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It would stay as it is."""
    line = r"sweep.executor.setup=['echo \'${oc.env:PLANTED}\'']"
    with pytest.raises(SweepError, match=r"^sweep\.executor\.setup: .* not between single quotes"):
        executor(monkeypatch, "sweep/executor=slurm", line)


@pytest.mark.parametrize(
    ("option", "variable"),
    [
        ("+sweep.data.train=ftp://me:planted@localhost/x", "FSSPEC_FTP_PASSWORD"),
        ("+sweep.data.train=simplecache::ftp://me:planted@localhost/x", "FSSPEC_FTP_PASSWORD"),
        ("sweep.checkpoint_uri=sftp://me:planted@localhost/x", "FSSPEC_SFTP_PASSWORD"),
    ],
)
def test_a_uri_of_fsspec_with_a_password_is_refused(
    make_bare_project: MakeProject, option: str, variable: str
) -> None:
    """It would be in the ledger, and fsspec has other ways."""
    project = make_bare_project({"conf/config.yaml": "x: 0", "tasks.py": "def train(cfg):\n    return 1.0\n"})
    done = project.run("+sweep=default", "sweep.task=tasks.train", option)
    assert done.returncode == 2
    [line] = done.stderr.splitlines()
    assert line.startswith(f"repro-sweep: {option.lstrip('+').partition('=')[0]}: ")
    assert variable in line
    assert "~/.config/fsspec" in line
    assert "planted" not in line
    assert not (project.root / "multirun").exists()


def test_a_message_of_an_exception_loses_the_passwords_of_urls(make_project: MakeProject) -> None:
    """It is in the ledger, and a tag in MLflow."""
    task = "def train(cfg):\n    raise ValueError('no answer from http://me:' + 'plan' + 'ted@7@h/x')\n"
    project = make_project({"conf/config.yaml": "x: 0", "tasks.py": task})
    project.run("+sweep=default", "sweep.task=tasks.train")
    [attempt] = project.sweep("default").attempts
    assert attempt.message == "ValueError: no answer from http://me:***@h/x"
    assert not [path for path, text in everything(project.root) if "planted" in text and path.endswith(".db")]


def test_texts_lose_passwords_and_secrets() -> None:
    """URLs in messages, command lines in records, and whole records."""
    assert redacted("see http://me:pw@host/x and s3://b/k") == "see http://me:***@host/x and s3://b/k"
    assert redacted("http://u:p@ss@h and http://v:q:r@h/x@y") == "http://u:***@h and http://v:***@h/x@y"
    assert not has_password("http://${oc.env:USER}@h")
    command = "repro-sweep +sweep=a db.password=pw +api_key='p w' x=1,2 uri=http://me:pw@host token_dim=3"
    expected = "repro-sweep +sweep=a db.password=*** +api_key=*** x=1,2 uri=http://me:***@host token_dim=3"
    assert without_secrets(command) == expected
    record = {"a": {"token": "t", "n": 1, "password": "${oc.env:P}"}, "uris": ["http://u:p@h"], "secret": "", "keys": 1,
              "api_keys": {"x": 1, "y": None}}  # fmt: skip
    assert json.loads(json.dumps(hidden(record))) == {
        "a": {"token": "***", "n": 1, "password": "${oc.env:P}"}, "uris": ["http://u:***@h"], "secret": "",
        "keys": 1, "api_keys": {"x": "***", "y": None},
    }  # fmt: skip
