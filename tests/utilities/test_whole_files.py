"""Files that are written as a whole or not at all, whoever else writes into their folder."""

import os
import threading
from pathlib import Path

import pytest
from helpers.damage import small_disk

from mlu_lightning.cli import main
from mlu_lightning.utilities.whole_files import write_whole


def test_all_or_none(tmp_path: Path) -> None:
    write_whole({tmp_path / "a": b"1", tmp_path / "b": b"1"})
    with small_disk(), pytest.raises(OSError, match="File too large"):
        write_whole({tmp_path / "a": b"2", tmp_path / "b": b"2" * 2000})
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {"a": b"1", "b": b"1"}


def test_links_modes_and_pipes(tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("precious")
    for name in ("a", "a.tmp", ".a.tmp"):
        (tmp_path / name).symlink_to(tmp_path / "precious")
    write_whole({tmp_path / "a": b"1", tmp_path / ("n" * 255): b"1"})
    assert (tmp_path / "precious").read_text() == "precious"
    (tmp_path / "plain").touch()
    assert (tmp_path / "a").stat().st_mode == (tmp_path / "plain").stat().st_mode, "others can read it, as any file"
    os.mkfifo(tmp_path / "pipe")
    reader = threading.Thread(target=lambda: read.append((tmp_path / "pipe").read_bytes()))
    read: list[bytes] = []
    reader.start()
    write_whole({tmp_path / "pipe": b"1"})
    reader.join()
    assert read == [b"1"] and (tmp_path / "pipe").is_fifo()


def test_two_writers_and_a_reader(tmp_path: Path) -> None:
    path, whole = tmp_path / "a", [bytes([letter]) * 100_000 for letter in b"ab"]

    def write(content: bytes) -> None:
        for _ in range(50):
            write_whole({path: content})

    writers = [threading.Thread(target=write, args=(content,)) for content in whole]
    write_whole({path: whole[0]})
    for writer in writers:
        writer.start()
    while any(writer.is_alive() for writer in writers):
        assert path.read_bytes() in whole
    assert [*tmp_path.iterdir()] == [path]


def test_no_room_is_known_before_anything_is_trained(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with small_disk(), pytest.raises(SystemExit):
        main(["quickstart", "--out", str(tmp_path)])
    assert f"Results cannot be written into {tmp_path}" in capsys.readouterr().err
