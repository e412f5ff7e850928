"""Frozen source: what belongs to it, where it is kept, and how it comes to other machines."""

from __future__ import annotations

import gzip
import os
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from helpers import a_spec, write

from repro_sweep import exchange
from repro_sweep.errors import SweepError
from repro_sweep.provenance import archive, bundle, snapshot, source
from repro_sweep.provenance.snapshot import Snapshot
from repro_sweep.sweep import Composition, Data, SourceRules, SweepSpec, TaskSpec, Tracking


def below(folder: Path) -> dict[str, str]:
    """The files below a folder and what they hold; links are shown as such."""
    found = {}
    for path in folder.rglob("*"):
        if path.is_symlink():
            found[str(path.relative_to(folder))] = f"-> {path.readlink()}"
        elif path.is_file():
            found[str(path.relative_to(folder))] = path.read_text()
    return found


def spec_of(
    project: Path,
    *,
    rules: SourceRules | None = None,
    search: tuple[str, ...] = (),
    sys_path: tuple[str, ...] = (),
) -> SweepSpec:
    """The record of a sweep of a project, with its results in it."""
    directory = project / "multirun/grid"
    directory.mkdir(parents=True, exist_ok=True)
    composition = Composition(
        config_name="config", search_path=tuple(("main", path) for path in search), hydra_overrides=(),
        job_name="app", version_base=None,
    )  # fmt: skip
    return a_spec(
        directory, composition=composition, source_rules=rules or SourceRules(),
        task=TaskSpec(module="tasks", qualname="train", cwd=str(project), sys_path=sys_path),
        tracking=Tracking(uri=f"sqlite:///{project}/mlflow.db", experiment="grid"),
    )  # fmt: skip


def freeze(project: Path, rules: SourceRules | None = None) -> Snapshot:
    """The snapshot of a project."""
    return snapshot.freeze(spec_of(project, rules=rules))[1]


GIT = ("git", "-c", "protocol.file.allow=always", "-c", "user.name=n", "-c", "user.email=e")


def repository(project: Path) -> Path:
    """Make a project a git repository with ``tasks.py`` in it."""
    for command in (["init", "-q"], ["add", "tasks.py"]):
        subprocess.run(["git", "-C", project, *command], check=True)
    return project


def with_a_submodule(folder: Path) -> Path:
    """A repository with another one in ``lib``, which holds a ``tasks.py`` too."""
    library = repository(write(folder / "library", {"tasks.py": "of the library"}))
    subprocess.run([*GIT, "-C", library, "commit", "-qm", "first"], check=True)
    project = repository(write(folder / "project", {"tasks.py": "a"}))
    subprocess.run([*GIT, "-C", project, "submodule", "--quiet", "add", library, "lib"], check=True)
    return project


# --- what belongs to it ------------------------------------------------------------------------------------------


def test_the_projects_own_files_are_frozen_and_what_is_made_from_them_is_not(tmp_path: Path) -> None:
    project = write(tmp_path / "project", {
        "tasks.py": "a", "conf/config.yaml": "b", "data/words.txt": "c", ".venv/pyvenv.cfg": "", ".venv/x.py": "",
        "env/pyvenv.cfg": "", "env/y.py": "", "multirun/old/trials/0/trial.log": "", "__pycache__/t.pyc": "",
        "mlflow.db": "d", "elsewhere/sweep/ledger.db": "e", "elsewhere/sweep/trials/0/trial.log": "f",
    })  # fmt: skip
    taken = freeze(project)
    assert below(taken.folder / "0") == {"tasks.py": "a", "conf/config.yaml": "b", "data/words.txt": "c"}
    assert taken.left_out == {}
    assert Snapshot.read(taken.folder) == taken


def test_in_a_repository_edits_and_new_files_belong_to_it_and_what_git_ignores_is_linked(
    tmp_path: Path,
) -> None:
    project = repository(write(tmp_path / "project", {
        "tasks.py": "a", "new.py": "b", ".gitignore": "*.bin\ndata/\nmultirun/", "x.bin": "c", "data/a/b": "d",
        "pkg/y.bin": "e", "pkg/z.py": "f", "__pycache__/z.pyc": "",
        "results/ledger.db": "", "results/trials/0/trial.log": "",
    }))  # fmt: skip
    write(project, {"tasks.py": "edited"})
    taken = freeze(project)
    assert below(taken.folder / "0") == {
        "tasks.py": "edited", "new.py": "b", ".gitignore": "*.bin\ndata/\nmultirun/", "x.bin": f"-> {project}/x.bin",
        "data": f"-> {project}/data", "pkg/y.bin": f"-> {project}/pkg/y.bin", "pkg/z.py": "f",
    }  # fmt: skip
    assert (taken.folder / "0/data/a/b").read_text() == "d"
    assert set(taken.left_out.values()) == {"git ignores it"}


def test_a_submodules_files_belong_to_it(tmp_path: Path) -> None:
    project = with_a_submodule(tmp_path)
    write(project, {"lib/new.py": "b"})
    found = below(freeze(project).folder / "0")
    assert found["lib/tasks.py"] == "of the library"
    assert found["lib/new.py"] == "b"


def test_a_submodule_that_was_not_fetched_has_no_files(tmp_path: Path) -> None:
    project = with_a_submodule(tmp_path)
    subprocess.run([*GIT, "-C", project, "commit", "-qm", "first"], check=True)
    subprocess.run([*GIT, "clone", "-q", project, tmp_path / "clone"], check=True)
    assert set(below(freeze(tmp_path / "clone").folder / "0")) == {"tasks.py", ".gitmodules"}


def test_links_to_folders_are_frozen_as_folders_but_output_is_not(tmp_path: Path) -> None:
    """In a repository and outside of one; what they lead to may be elsewhere, or the project itself."""
    write(tmp_path / "shared", {"common.yaml": "b", "deep/more.yaml": "c"})
    for project in (tmp_path / "plain", tmp_path / "repository"):
        write(project, {"tasks.py": "a", "multirun/old/trial.log": ""})
        for name, target in (("conf", tmp_path / "shared"), ("latest", "multirun"), ("me", ".")):
            (project / name).symlink_to(target)
    subprocess.run(["git", "-C", tmp_path / "repository", "init", "-q"], check=True)
    for project in (tmp_path / "plain", tmp_path / "repository"):
        taken = freeze(project)
        found = below(taken.folder / "0")
        assert found["conf/common.yaml"] == "b"
        assert found["conf/deep/more.yaml"] == "c"
        assert set(taken.left_out) == {"0/latest", "0/me"}


def test_names_may_be_any_bytes_and_a_folder_may_be_included(tmp_path: Path) -> None:
    project = repository(write(tmp_path / "project", {
        "tasks.py": "a", "data/a": "b", "data/deep/.c": "d", ".gitignore": "data\nmultirun",
    }))  # fmt: skip
    odd = os.fsdecode(b"caf\xe9.txt")
    (project / odd).write_text("e")
    spec, taken = snapshot.freeze(spec_of(project, rules=SourceRules(include=("data",))))
    assert taken.left_out == {"0/data": "git ignores it"} or "0/data/a" in taken.files
    assert below(taken.folder / "0").items() >= {odd: "e", "data/a": "b", "data/deep/.c": "d"}.items()
    assert bundle.write(spec) is None
    packed = Path(spec.directory) / exchange.BUNDLE / exchange.ARCHIVE_NAME
    assert archive.unpack_verified(packed, tmp_path / "there", taken.id).files == taken.files


def test_files_of_secrets_are_not_frozen_unless_the_user_says_so(tmp_path: Path) -> None:
    project = write(
        tmp_path / "project", {"tasks.py": "a", ".env": "TOKEN=x", "keys/id_rsa": "y", "my.pem": "z"}
    )
    taken = freeze(project)
    assert set(taken.left_out) == {"0/.env", "0/keys/id_rsa", "0/my.pem"}
    assert set(taken.files) == {"0/tasks.py"}
    assert "0/.env" in freeze(project, SourceRules(include=(".env",))).files


def test_code_that_git_does_not_have_makes_a_tree_dirty(tmp_path: Path) -> None:
    project = repository(write(tmp_path / "project", {"tasks.py": "a"}))
    subprocess.run([*GIT, "-C", project, "commit", "-qm", "first"], check=True)

    def is_dirty() -> bool:
        state = source.git_state(project)
        assert state is not None
        return state.dirty

    write(project, {"results.csv": "1", "multirun/old/code.py": ""})
    assert not is_dirty()
    write(project, {"pkg/new.py": ""})
    assert is_dirty()


def test_rules_say_what_else_belongs_to_it_and_what_does_not(tmp_path: Path) -> None:
    project = repository(write(tmp_path / "project", {
        "tasks.py": "a", "large": "x" * 2000, "wanted": "x" * 2000, "secret.txt": "b", "data/a": "c",
        ".gitignore": "data\nmultirun",
    }))  # fmt: skip
    rules = SourceRules(include=("data/*", "wanted"), exclude=("secret*",), max_mb=0.001)
    taken = freeze(project, rules)
    found = below(taken.folder / "0")
    assert found["data/a"] == "c"
    assert found["wanted"] == "x" * 2000
    assert found["large"] == f"-> {project}/large"
    assert found["secret.txt"] == f"-> {project}/secret.txt"
    assert taken.left_out["0/large"] == "0 MB (sweep.source.max_mb)"
    assert taken.left_out["0/secret.txt"] == "sweep.source.exclude"


def test_folders_on_the_path_belong_to_it_once_but_what_is_installed_does_not(tmp_path: Path) -> None:
    project = write(tmp_path / "project", {"src/tasks.py": "a"})
    shared = write(tmp_path / "shared", {"common.py": "b"})
    installed = str(Path(pytest.__file__).parent)
    ourselves = str(Path(snapshot.__file__).parents[2])
    sys_path = (str(project / "src"), str(shared), installed, ourselves, "relative")
    spec, taken = snapshot.freeze(
        spec_of(project, sys_path=sys_path, search=(f"file://{shared}/conf", "pkg://hydra.conf"))
    )
    assert taken.roots == (project, shared)
    here = source.frozen(spec)
    assert here.task.cwd == str(project)
    assert here.task.sys_path == (
        f"{taken.folder}/0/src", f"{taken.folder}/1", installed, ourselves, "relative"
    )  # fmt: skip
    assert here.composition.search_path == (
        ("main", f"file://{taken.folder}/1/conf"),
        ("main", "pkg://hydra.conf"),
    )


def test_a_folder_that_cannot_be_looked_through_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(source, "_PATIENCE_S", -1.0)
    with pytest.raises(SweepError, match="too many folders"):
        freeze(write(tmp_path / "project", {"tasks.py": "a"}))


# --- how it is kept ----------------------------------------------------------------------------------------------


def test_the_same_files_are_the_same_snapshot_wherever_they_lie(tmp_path: Path) -> None:
    one = freeze(write(tmp_path / "one", {"tasks.py": "a", "b/c.py": "d"}))
    two = freeze(write(tmp_path / "two", {"tasks.py": "a", "b/c.py": "d"}))
    assert one.id == two.id
    assert freeze(tmp_path / "one") == one
    for change in ({"tasks.py": "b"}, {"new": ""}):
        assert freeze(write(tmp_path / "two", change)).id not in (one.id, two.id)
    (tmp_path / "one/tasks.py").chmod(0o755)
    assert freeze(tmp_path / "one").id != one.id


def test_snapshots_share_what_is_the_same_in_them_and_none_sees_an_edit(tmp_path: Path) -> None:
    project = write(tmp_path / "project", {"tasks.py": "a", "helper.py": "b"})
    first = freeze(project)
    write(project, {"tasks.py": "edited"})
    second = freeze(project)
    assert below(first.folder / "0") == {"tasks.py": "a", "helper.py": "b"}
    assert below(second.folder / "0") == {"tasks.py": "edited", "helper.py": "b"}
    assert (first.folder / "0/helper.py").samefile(second.folder / "0/helper.py")
    assert first.folder.parent == second.folder.parent == project / "multirun/.source"


def test_an_edit_that_leaves_size_and_second_as_they_were_is_seen(tmp_path: Path) -> None:
    project = write(tmp_path / "project", {"tasks.py": "a"})
    first = freeze(project)
    about = (project / "tasks.py").stat()
    write(project, {"tasks.py": "b"})
    os.utime(project / "tasks.py", ns=(about.st_atime_ns, about.st_mtime_ns))
    assert freeze(project).id != first.id


def test_files_that_have_not_changed_are_not_read_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    project = write(tmp_path / "project", {"tasks.py": "a", "b": "c"})
    monkeypatch.setattr(snapshot, "_RACY_NS", 0)
    first = freeze(project)
    monkeypatch.setattr(snapshot._Taking, "_keep", None)
    assert freeze(project) == first


def test_a_snapshot_that_somebody_has_written_to_is_made_anew(tmp_path: Path) -> None:
    """As root may, whatever the modes of the files; other snapshots with the same file get it as it was, too."""
    project = write(tmp_path / "project", {"tasks.py": "a", "helper.py": "b"})
    first = freeze(project)
    (first.folder / "0/tasks.py").chmod(0o644)
    (first.folder / "0/tasks.py").write_text("evil")
    write(project, {"helper.py": "c"})
    second = freeze(project)
    assert below(second.folder / "0") == {"tasks.py": "a", "helper.py": "c"}
    write(project, {"helper.py": "b"})
    assert freeze(project) == first
    assert below(first.folder / "0") == {"tasks.py": "a", "helper.py": "b"}


def test_snapshots_that_are_taken_at_once_do_not_mix(tmp_path: Path) -> None:
    """By processes that may have the same id, in containers."""
    projects = [
        write(tmp_path / name, {f"{number}.py": name * 5000 for number in range(40)})
        for name in ("one", "two")
    ]
    for number in range(3):
        store = tmp_path / f"store{number}"
        with ThreadPoolExecutor() as pool:
            taken = list(pool.map(lambda each: snapshot.take([each], store, SourceRules()), projects))  # noqa: B023
        assert [snapshot.ident_of(each.folder) for each in taken] == [each.id for each in taken]


def test_a_store_that_cannot_be_written_is_an_error(tmp_path: Path) -> None:
    project = write(tmp_path / "project", {"tasks.py": "a", "multirun/.source": "no folder"})
    with pytest.raises(SweepError, match="the source cannot be frozen in"):
        freeze(project)


# --- to other machines -------------------------------------------------------------------------------------------


def test_what_is_frozen_travels_and_what_is_linked_does_not(tmp_path: Path) -> None:
    project = repository(write(tmp_path / "project", {
        "tasks.py": "a", "empty": "", "also empty": "", ".gitignore": "data\nmultirun", "data/x": "b",
    }))  # fmt: skip
    spec, _ = snapshot.freeze(spec_of(project, search=(f"file://{project}/conf",)))
    write(project, {"tasks.py": "edited"})
    assert bundle.write(spec) is None
    there = tmp_path / "there"
    archive.unpack(Path(spec.directory) / exchange.BUNDLE / exchange.ARCHIVE_NAME, there)
    assert spec.source is not None
    assert snapshot.ident_of(there) == spec.source.snapshot
    here = source.relocated(spec, there, there / "sweep")
    assert below(there / "0") == {
        "tasks.py": "a",
        "empty": "",
        "also empty": "",
        ".gitignore": "data\nmultirun",
    }
    assert here.task.cwd == f"{there}/0"
    assert here.directory == f"{there}/sweep"
    assert here.composition.search_path == (("main", f"file://{there}/0/conf"),)


def test_what_trials_have_written_does_not_travel(tmp_path: Path) -> None:
    spec, taken = snapshot.freeze(spec_of(write(tmp_path / "project", {"tasks.py": "a"})))
    write(taken.folder / "0", {"__pycache__/tasks.pyc": "", "results.txt": "1"})
    assert bundle.write(spec) is None
    packed = Path(spec.directory) / exchange.BUNDLE / exchange.ARCHIVE_NAME
    assert archive.unpack_verified(packed, tmp_path / "there", taken.id).id == taken.id
    with pytest.raises(SweepError, match=r"^the source is not the recorded one: its hash is [0-9a-f]{16}, "):
        archive.unpack_verified(packed, tmp_path / "other", "0" * 64)


def test_what_was_written_to_does_not_travel_as_if_it_were_frozen(tmp_path: Path) -> None:
    spec, taken = snapshot.freeze(spec_of(write(tmp_path / "project", {"tasks.py": "a"})))
    (taken.folder / "0/tasks.py").chmod(0o644)
    (taken.folder / "0/tasks.py").write_text("b")
    assert bundle.write(spec) == f"{taken.folder}/0/tasks.py was changed after it was frozen"


@pytest.mark.parametrize(
    "data",
    [b"nothing", b"", gzip.compress(b"x" * 5000)[:-20], gzip.compress(b"x" * 5000)],
    ids=["no gzip", "empty", "cut off", "no tar"],
)
def test_a_broken_archive_is_one_error(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "a.tar.gz").write_bytes(data)
    with pytest.raises(SweepError, match="the source cannot be unpacked in"):
        archive.unpack(tmp_path / "a.tar.gz", tmp_path / "there")


def test_what_is_too_large_to_travel_is_said_and_no_archive_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(archive, "_LARGEST_MB", 0.001)
    spec, _ = snapshot.freeze(spec_of(write(tmp_path / "project", {"tasks.py": "a" * 2000})))
    assert bundle.write(spec) == "the files of the project take more than 0.001 MB"
    assert not (Path(spec.directory) / exchange.BUNDLE / exchange.ARCHIVE_NAME).exists()
    assert "the source cannot be had" in (exchange.source_at(Path(spec.directory), 0).error or "")


def test_what_trials_write_beside_the_code_makes_no_other_code(tmp_path: Path) -> None:
    """A sweep that goes on keeps its source unless code or configuration has changed."""
    project = write(tmp_path / "project", {"tasks.py": "a", "conf/config.yaml": "x: 1"})
    first = freeze(project)
    write(project, {"results.txt": "1"})
    second = freeze(project)
    write(project, {"conf/config.yaml": "x: 2"})
    third = freeze(project)
    assert first.id != second.id
    assert snapshot.has_same_code(first.folder, second.folder)
    assert not snapshot.has_same_code(first.folder, third.folder)
    assert not snapshot.has_same_code(first.folder, tmp_path / "gone")
    write(project, {"conf/config.yaml": "x: 1", "results.txt": "2", "kernel.cu": "a"})
    assert not snapshot.has_same_code(second.folder, freeze(project).folder)


def test_what_git_tracks_is_code_whatever_its_name(tmp_path: Path) -> None:
    """What it does not is output, unless its name says that it is code."""
    project = repository(write(tmp_path / "project", {"tasks.py": "a", "prompt.txt": "b", "log": ""}))
    subprocess.run(["git", "-C", project, "add", "prompt.txt"], check=True)
    first = freeze(project)
    write(project, {"log": "written meanwhile"})
    assert snapshot.has_same_code(first.folder, freeze(project).folder)
    write(project, {"prompt.txt": "c"})
    assert not snapshot.has_same_code(first.folder, freeze(project).folder)


def test_what_a_submodule_tracks_is_code_too(tmp_path: Path) -> None:
    project = write(with_a_submodule(tmp_path), {"lib/prompt.txt": "a", "lib/log": ""})
    subprocess.run(["git", "-C", project / "lib", "add", "prompt.txt"], check=True)
    first = freeze(project)
    write(project, {"lib/log": "written meanwhile"})
    assert snapshot.has_same_code(first.folder, freeze(project).folder)
    write(project, {"lib/prompt.txt": "b"})
    assert not snapshot.has_same_code(first.folder, freeze(project).folder)


def test_a_submission_is_the_same_at_another_time_and_another_one_with_other_source_or_data(
    tmp_path: Path,
) -> None:
    """Else a sweep that goes on would give its workers up."""
    spec, _ = snapshot.freeze(spec_of(write(tmp_path / "project", {"tasks.py": "a"})))

    def ident(**changes: object) -> str:
        source = bundle.identified(spec.model_copy(update=changes)).source
        assert source is not None
        return source.submission

    later = spec.composition.model_copy(update={"now": 1.0})
    assert ident() == ident(composition=later, created_at=1.0, name="other")
    assert spec.source is not None
    other = (
        ident(source=spec.source.model_copy(update={"snapshot": "0" * 64})),
        ident(data={"train": Data(uri="/data", digest="0")}),
        ident(task=spec.task.model_copy(update={"qualname": "other"})),
        ident(composition=spec.composition.model_copy(update={"config_name": "other"})),
    )
    assert len({ident(), *other}) == 5
