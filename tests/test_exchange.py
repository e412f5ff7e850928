"""What goes to machines that do not see the sweep's directory, and what comes back: source, files, checkpoints."""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any

import pytest
from helpers import a_spec, write
from pydantic import ValidationError

from repro_sweep import exchange
from repro_sweep.errors import UnwritableError
from repro_sweep.protocol import Assignment, Message, Piece
from repro_sweep.worker.checkpoints import CheckpointError, Checkpoints, signature
from repro_sweep.worker.link import Link
from repro_sweep.worker.scratch import Scratch


def below(folder: Path) -> dict[str, str]:
    """The files below a folder and what they hold."""
    return {str(path.relative_to(folder)): path.read_text() for path in folder.rglob("*") if path.is_file()}


# --- source ------------------------------------------------------------------------------------------------------


def test_the_archive_is_read_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exchange, "PIECE_BYTES", 4)
    (tmp_path / exchange.BUNDLE).mkdir()
    (tmp_path / exchange.BUNDLE / exchange.ARCHIVE_NAME).write_bytes(b"0123456789")
    pieces = [exchange.source_at(tmp_path, offset) for offset in (0, 4, 8)]
    assert [base64.b64decode(piece.data) for piece in pieces] == [b"0123", b"4567", b"89"]
    assert {piece.size for piece in pieces} == {10}


# --- files of trials ---------------------------------------------------------------------------------------------


def piece(path: str, offset: int, data: str, *, grows: bool = False, last: bool = False) -> Piece:
    """A piece of a file."""
    text = base64.b64encode(data.encode()).decode()
    return Piece(attempt="a", path=path, offset=offset, data=text, grows=grows, last=last)


def test_a_file_appears_when_it_is_whole_and_pieces_may_come_twice(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub/x").write_text("of an earlier attempt, and longer")
    for each in (piece("sub/x", 0, "ab"), piece("sub/x", 0, "ab"), piece("sub/x", 2, "cd")):
        exchange.put(tmp_path, each)
        assert (tmp_path / "sub/x").read_text().startswith("of an earlier")
    for _ in range(2):
        exchange.put(tmp_path, piece("sub/x", 4, "e", last=True))
        assert (tmp_path / "sub/x").read_text()[-1] == "e"
    assert not list(tmp_path.rglob(".x.partial"))


def test_a_log_grows_behind_what_earlier_attempts_have_left(tmp_path: Path) -> None:
    assert exchange.log_size(tmp_path) == 0
    (tmp_path / "trial.log").write_text("old\n")
    base = exchange.log_size(tmp_path)
    for offset, text in ((0, "one\n"), (0, "one\n"), (4, "two\n")):
        exchange.put(tmp_path, piece("trial.log", base + offset, text, grows=True))
    assert (tmp_path / "trial.log").read_text() == "old\none\ntwo\n"


@pytest.mark.parametrize("path", ["", "/etc/passwd", "../x", "a/../../x", "..", "a\0b"])
def test_no_piece_goes_outside_of_its_trials_directory(path: str) -> None:
    with pytest.raises(ValidationError, match="below the trial's directory"):
        piece(path, 0, "x")


def test_a_piece_that_cannot_be_written_is_for_later(tmp_path: Path) -> None:
    (tmp_path / "x").write_text("a file where a folder must be")
    with pytest.raises(UnwritableError, match="x/y cannot be written"):
        exchange.put(tmp_path, piece("x/y", 0, "z"))


class Accepting(Link):
    """A link whose coordinator takes all pieces."""

    def __init__(self) -> None:
        self.pieces: list[Piece] = []

    def post(self, path: str, message: Message, reply: type[Any]) -> Any:
        """Note the piece; it has been made into JSON, as on its way."""
        assert path == "/piece"
        self.pieces.append(Piece.model_validate_json(message.model_dump_json()))
        return reply()


def test_a_file_that_cannot_be_sent_costs_a_trial_that_file_and_not_its_result(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    link, scratch = Accepting(), Scratch(tmp_path / "scratch")
    given = Assignment(attempt="a", trial=3, ordinal=0, directory="/x", overrides=(), config="")
    placed = scratch.placed(given)
    with scratch.visit(placed, link, a_spec(tmp_path)):
        write(Path(placed.directory), {"artifacts/x": "1", "artifacts/caf\udce9": "2", "trial.log": "3"})
    assert {each.path: base64.b64decode(each.data) for each in link.pieces} == {
        "artifacts/x": b"1",
        "trial.log": b"3",
    }
    assert "is left behind" in caplog.text
    assert not Path(placed.directory).exists()


# --- checkpoints -------------------------------------------------------------------------------------------------


def copies(tmp_path: Path, attempt: str = "a") -> Checkpoints:
    """The copies of a trial's checkpoints."""
    return Checkpoints(f"file://{tmp_path}/kept", "sweep", 3, attempt)


def test_the_newest_whole_copy_comes_back_elsewhere_and_older_ones_go(tmp_path: Path) -> None:
    there = write(tmp_path / "there", {"model": "1", "opt/state": "1"})
    first = copies(tmp_path)
    assert first.save(there)
    write(there, {"model": "2"})
    (there / "opt/state").unlink()
    assert first.save(there)
    copies(tmp_path, "b").restore(tmp_path / "back")
    assert below(tmp_path / "back") == {"model": "2"}
    assert len([path for path in (tmp_path / "kept/sweep/3").iterdir() if path.is_dir()]) == 1


def test_without_a_copy_a_trial_starts_anew(tmp_path: Path) -> None:
    copies(tmp_path).restore(tmp_path / "back")
    assert not (tmp_path / "back").exists()


def test_a_copy_of_files_that_change_meanwhile_does_not_count(tmp_path: Path) -> None:
    there = write(tmp_path / "there", {"model": "1"})
    saver = copies(tmp_path)
    assert saver.save(there)
    real = saver._fs.put_file

    def put_file(local: str, remote: str) -> None:
        real(local, remote)
        write(there, {"model": "longer"})

    saver._fs.put_file = put_file
    try:
        assert not saver.save(there)
    finally:
        saver._fs.put_file = real
    copies(tmp_path, "b").restore(tmp_path / "back")
    assert below(tmp_path / "back") == {"model": "1"}


def test_a_copy_that_cannot_be_had_is_an_error_and_not_a_fresh_start(tmp_path: Path) -> None:
    there = write(tmp_path / "there", {"model": "1"})
    assert copies(tmp_path).save(there)
    (found,) = (tmp_path / "kept").rglob("model")
    found.unlink()
    with pytest.raises(CheckpointError, match=r"its checkpoint at .* cannot be had"):
        copies(tmp_path, "b").restore(tmp_path / "back")


def test_a_place_that_cannot_be_written_costs_no_trial(tmp_path: Path) -> None:
    (tmp_path / "kept").write_text("no folder")
    assert not copies(tmp_path).save(write(tmp_path / "there", {"model": "1"}))


def test_a_signature_tells_any_change(tmp_path: Path) -> None:
    assert signature(tmp_path / "none") == frozenset()
    empty = signature(write(tmp_path / "there", {"a": ""}))
    assert signature(write(tmp_path / "there", {"a": "x"})) != empty
