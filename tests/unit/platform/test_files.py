"""Results replace what was there only when they are whole, and never their own input."""

import os
from pathlib import Path

import pytest

from megatron_qlrl.errors import ConfigError
from megatron_qlrl.platform.files import check_output, make_folder, replaced


def test_a_result_takes_the_place_of_the_old_file(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.write_text("old")
    out.chmod(0o640)
    with replaced(out) as fresh:
        fresh.write_text("new")
        assert out.read_text() == "old"
    assert out.read_text() == "new"
    assert out.stat().st_mode & 0o777 == 0o640
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_new_file_follows_the_umask(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        with replaced(tmp_path / "out") as fresh:
            fresh.write_text("x")
    finally:
        os.umask(before)
    assert (tmp_path / "out").stat().st_mode & 0o777 == 0o640


def test_a_failure_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.write_text("old")
    with pytest.raises(KeyError), replaced(out) as fresh:
        fresh.write_text("half")
        raise KeyError
    with pytest.raises(ConfigError, match="out cannot be written: No space left"), replaced(out):
        raise OSError(28, "No space left on device")
    assert out.read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_link_stays_and_the_file_behind_it_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("file")
    with replaced(tmp_path / "link") as fresh:
        fresh.write_text("new")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "file").read_text() == "new"


def test_a_pipe_is_written_directly(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    with replaced(pipe) as fresh:
        fresh.write_text("x")
    assert os.read(reader, 10) == b"x"
    os.close(reader)
    assert pipe.is_fifo()


def test_what_the_shell_gives_a_name_is_written_directly() -> None:
    """/dev/stdout in front of a pipe, and what >(command) stands for."""
    reader, writer = os.pipe()
    with replaced(Path(f"/proc/self/fd/{writer}")) as fresh:
        fresh.write_text("x")
    assert os.read(reader, 10) == b"x"
    os.close(reader)
    os.close(writer)


@pytest.mark.parametrize("way", ["itself", "relative", "symbolic", "hard", "dangling"])
def test_an_input_is_no_output(tmp_path: Path, way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tmp_path / "in.jsonl"
    source.write_text("rows")
    out = source if way == "itself" else tmp_path / "out.jsonl"
    if way == "relative":
        monkeypatch.chdir(tmp_path)
        out = Path("sub/../in.jsonl")
        (tmp_path / "sub").mkdir()
    elif way == "symbolic":
        out.symlink_to(source)
    elif way == "hard":
        out.hardlink_to(source)
    elif way == "dangling":  # the input is missing, and must not be made by its output
        source.unlink()
        out.symlink_to(source)
    with pytest.raises(ConfigError, match=r"is the same file as the input .*in\.jsonl"):
        check_output(out, [tmp_path / "other", source])
    assert way == "dangling" or source.read_text() == "rows"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("folder", "it is a folder; name a file"),
        ("none/out", "none is no folder; make it first"),
        ("file/out", "file is no folder"),
        ("loop", "cannot be written"),
        ("nul\0", "cannot be written"),
    ],
)
def test_places_that_take_no_file(tmp_path: Path, name: str, message: str) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").touch()
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(ConfigError, match=message):
        check_output(tmp_path / name)


def test_a_folder_without_write_permission(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # root may write everywhere, so the answer is given by hand
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != tmp_path)
    with pytest.raises(ConfigError, match="takes no new files; name another place"):
        check_output(tmp_path / "out")


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="file/sub' cannot be made: .*Not a directory"):
        make_folder(tmp_path / "file" / "sub")
