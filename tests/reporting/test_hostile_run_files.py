"""Files that keep a reader busy, take its memory, or leave the folder: each costs one line of the page."""

import os
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers.run_folders import event, text_of, write_csv

from mlu_lightning.cli import main
from mlu_lightning.reporting import curves, read_run


def shared_lists(path: Path) -> None:
    value: list[object] = ["x"]
    for _ in range(40):
        value = [value, value]
    torch.save({"callbacks": {"MLUCallback": {"plan": value}}}, path)


def zipped(path: Path, size: int) -> None:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive, archive.open("a/data.pkl", "w") as file:
        for _ in range(size >> 20):
            file.write(bytes(1 << 20))


def sparse(path: Path) -> None:
    with path.open("wb") as file:
        file.truncate(40 * 2**30)


HOSTILE: dict[str, tuple[str, Callable[[Path], object], str]] = {
    "no protocol buffer": (
        "events.out.tfevents.1",
        lambda path: path.write_bytes(event(b"\xff" * 3)),
        "Its events are damaged",
    ),
    "an event of 2^40 bytes": ("events.out.tfevents.1", lambda path: path.write_bytes(event(b"x", 2**40)), ""),
    "a checkpoint without end as text": ("a.ckpt", shared_lists, "Its plan is no text"),
    "a checkpoint that grows": ("a.ckpt", lambda path: zipped(path, 128 << 20), "more than 64 MiB beside its tensors"),
    "a pickle of 2^63 bytes": (
        "a.ckpt",
        lambda path: path.write_bytes(b"\x80\x04\x8e" + b"\xff" * 8 + b"."),
        "Overflow",
    ),
    "a set of a set": ("a.ckpt", lambda path: path.write_bytes(pickle.dumps({1}) * 4), "no checkpoint"),
    "sparse YAML": ("a.yaml", sparse, "more than 16 MiB"),
    "sparse CSV": ("b/metrics.csv", sparse, "more than 256 MiB"),
    "cut in a number": ("b/metrics.csv", lambda path: path.write_text("step,loss\n0,2.5\n1,12"), "no end"),
}


@pytest.mark.parametrize(("name", "write", "says"), HOSTILE.values(), ids=HOSTILE)
def test_it_costs_one_line(name: str, write: Callable[[Path], object], says: str, tmp_path: Path) -> None:
    write_csv(tmp_path / "metrics.csv", {0: 2.5, 1: 2.25})
    (tmp_path / name).parent.mkdir(exist_ok=True)
    write(tmp_path / name)
    record = read_run(tmp_path)
    assert record.values == {"loss": ((0, 2.5), (1, 2.25))}
    assert [*record.problems] == [name] and says in record.problems[name]
    assert name in text_of(record)


def test_files_after_one_that_ends_its_reader_are_read(tmp_path: Path) -> None:
    for number, content in enumerate((event(b"\xff" * 3), event(b"\xff" * 3))):
        (tmp_path / f"events.out.tfevents.{number}").write_bytes(content)
    write_csv(tmp_path / "metrics.csv", {0: 2.5})
    record = read_run(tmp_path)
    assert len(record.problems) == 2 and record.values == {"loss": ((0, 2.5),)}


def test_more_panels_than_anybody_looks_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(curves, "_MOST_PANELS", 2)
    names = [f"mlu/update/x{number}" for number in range(1000)]
    (tmp_path / "metrics.csv").write_text("".join([",".join(["step", *names]), "\n0" + ",0.5" * len(names), "\n"]))
    assert "Curves beyond the first, which are not drawn: 998" in text_of(read_run(tmp_path))


def test_links_out_of_the_folder_and_names_for_terminals(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, secret = tmp_path / "run", tmp_path / "secret.csv"
    write_csv(run / "metrics.csv", {0: 2.5})
    write_csv(secret, {0: 9.0}, "password")
    (run / "b").mkdir()
    os.symlink(secret, run / "b" / "metrics.csv")
    (run / "\x1b]0;title\x1b\\.ckpt").write_bytes(b"x")
    main(["report", str(run), "--out", str(tmp_path / "page.html")])
    printed = capsys.readouterr().out
    assert "\x1b" not in printed and "\\x1b]0;title\\x1b" in printed and "password" not in printed
    assert "b/metrics.csv: It is a link out of the folder, and is not followed" in printed
