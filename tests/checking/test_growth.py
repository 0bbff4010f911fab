"""Checks of ordinary Transformers: which arguments grow what, axes at a fixed head_dim, and what the terminal shows."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from helpers.check_command import command, plugin
from helpers.check_reports import READ, noisy, points
from rich.console import Console

from mlu_lightning import CheckReport, Shape
from mlu_lightning.checking.configuration import read_config
from mlu_lightning.checking.options import with_found_options
from mlu_lightning.checking.verdicts import fit_row

MODELS = "helpers.ordinary_transformers"
KEYS: dict[str, list[str]] = {"depth": [], "hidden": [], "embedding": []}
QUICK = ["--factors", "[1,2]", "--seeds", "1", "--steps", "1"]


def write(folder: Path, name: str, callback: bool = True, data: str = "Text", **arguments: Any) -> str:
    model = {"class_path": f"{MODELS}.{name}", "init_args": arguments}
    trainer = {"callbacks": [plugin(model["class_path"], **arguments)]} if callback else {}
    content = {"trainer": trainer, "model": model, "data": {"class_path": f"{MODELS}.{data}"}}
    (folder / "config.yaml").write_text(yaml.safe_dump(content))
    return str(folder / "config.yaml")


@pytest.mark.parametrize(
    ("name", "data", "hidden", "embedding"),
    [
        ("NanoGPT", "Text", "n_head", "n_embd"),
        ("ViT", "Images", "num_heads", "embed_dim"),
        # with as many heads of keys as of queries, these cannot grow alone
        ("Llama", "Text", "num_attention_heads intermediate_size num_key_value_heads", "hidden_size"),
    ],
)
def test_arguments_are_found_by_what_grows(name: str, data: str, hidden: str, embedding: str, tmp_path: Path) -> None:
    found = with_found_options(read_config(write(tmp_path, name, data=data), KEYS), {})
    assert (set(found.keys["hidden"]), set(found.keys["embedding"])) == (set(hidden.split()), {embedding})
    assert len(found.keys["depth"]) == 1 and found.notes[-1].startswith("Arguments of the shape: depth: ")


def test_what_is_named_is_not_looked_for(tmp_path: Path) -> None:
    path = write(tmp_path, "NanoGPT", n_embd=24, n_head=3)
    named = {"embedding": ["n_embd"], "depth": []}
    found = with_found_options(read_config(path, KEYS | named), named)
    assert (found.keys["depth"], found.keys["hidden"], found.base) == ((), ("n_head",), Shape(1, 3, 24))


def test_head_dim_that_changes_is_said_first(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, out = write(tmp_path, "NanoGPT", callback=False), ["--out", str(tmp_path / "out")]
    command("check", path, *out, *QUICK)
    said = " ".join(capsys.readouterr().out.split())
    assert said.index("There is no MLUCallback in this training") < said.index("Slopes of log size")
    change = (
        "head_dim changes with the hidden and the embedding: it is 16 at the base and 8 at twice the hidden (h.*), and "
    )
    assert said.index(change) < said.index("Slopes of log size")
    assert 'as the axis "width", in place of each alone.' in said
    command("check", path, *out, *QUICK, "--depth", "null", "--hidden", "null")
    said = " ".join(capsys.readouterr().out.split())
    assert "grow the number of heads with the width" in said and "Warning: head_dim is " in said


def brief(report: CheckReport, verbose: bool = False) -> str:
    console = Console(width=120, record=True, file=open("/dev/null", "w"))  # noqa: SIM115  # nothing is written
    console.print(report.tables(verbose))
    return console.export_text()


def test_terminal_has_failures_first_and_counts_the_rest() -> None:
    names = {"right": 0.0, "between": 0.33, "wrong": 1.0}
    rows = [fit_row(replace(READ, name=name), "depth", points(noisy(power, 0.001))) for name, power in names.items()]
    report = CheckReport(Shape(2, 3, 4), (1, 2, 4, 8), 3, 5, tuple(rows))
    text = brief(report)
    assert "right" not in text and text.index("wrong") < text.index("between")
    assert "1 rows of 1 quantities pass, and are listed with --verbose true" in text and "right" in brief(report, True)


@pytest.mark.parametrize(
    ("power", "noise", "says", "not_said"),
    [(0.1, 1.0, "More seeds would tell, about", "steepest"), (0.33, 0.001, "The steepest is", "More seeds would tell")],
)
def test_more_seeds_are_advised_where_intervals_are_wide(power: float, noise: float, says: str, not_said: str) -> None:
    row = fit_row(READ, "depth", points(noisy(power, noise)))
    summary = CheckReport(Shape(2, 3, 4), (1, 2, 4, 8), 3, 5, (row,)).summary
    assert summary.startswith("UNDECIDED") and says in summary and not_said not in summary


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "data"), [("NanoGPT", "Text"), ("ViT", "Images"), ("GPT2", "Text"), ("Llama", "Text")]
)
@pytest.mark.parametrize(("callback", "code"), [(True, 0), (False, 3)])
def test_ordinary_transformers_at_the_defaults(name: str, data: str, callback: bool, code: int, tmp_path: Path) -> None:
    path = write(tmp_path, name, callback, data)
    assert command("check", path, "--out", str(tmp_path / "out")) == code, (tmp_path / "out" / "check.txt").read_text()
