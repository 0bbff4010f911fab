"""The command line: ``mlu-lightning quickstart``."""

from __future__ import annotations

import sys
from importlib.util import find_spec
from pathlib import Path

from jsonargparse import auto_cli
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from mlu_lightning.quickstart import Study, load_text, run_study, save_runs

__all__ = ["main", "quickstart"]


def main(args: list[str] | None = None) -> None:
    """Run a command of ``mlu-lightning``.

    Args:
        args: of the command line; by default those of the process.
    """
    try:
        auto_cli({"quickstart": quickstart}, args=args, prog="mlu-lightning")
    except ValueError as error:
        Console(stderr=True).print(f"mlu-lightning: {error}", highlight=False, markup=False, soft_wrap=True)
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)  # as shells report a command that Ctrl-C ended


def quickstart(text: str | None = None, out: str = "mlu-quickstart", steps: int = 220, seed: int = 0) -> None:
    """Train small Transformers on text at several learning rates and shapes, with MLU and without.

    Args:
        text: path of the text to train on; by default the documentation inside Python's standard library.
        out: folder for the figure and the losses; it is made if it does not exist.
        steps: optimizer steps of each run.
        seed: of initial weights and batches.
    """
    if find_spec("matplotlib") is None:
        raise ValueError(
            "quickstart draws a figure, and matplotlib is not installed: pip install 'mlu-lightning[plots]'."
        )
    from mlu_lightning.quickstart_report import loss_table, save_figure, verdicts

    content = load_text(text)
    folder = _folder(out)
    study = Study(steps=steps, seed=seed)
    console = Console(width=None if sys.stdout.isatty() else 110)
    total = len(study.exponents) * (2 * len(study.shapes) - 1)
    source = "the documentation in Python's standard library" if text is None else text
    console.print(f"{total} runs of {steps} steps on {len(content):,} bytes of {source}", highlight=False, markup=False)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("training", total=total)
        runs = run_study(study, content, lambda run: progress.advance(task))
    save_runs(study, runs, folder / "runs.json")
    save_figure(study, runs, folder / "quickstart.png")
    console.print(
        "Validation loss (nats per byte) by learning rate; * marks the least of a row.", highlight=False, markup=False
    )
    console.print(loss_table(study, runs))
    for sentence in verdicts(study, runs):
        console.print(sentence, highlight=False, markup=False)
    console.print(
        f"Wrote {folder / 'quickstart.png'} and {folder / 'runs.json'}.", highlight=False, markup=False, soft_wrap=True
    )


def _folder(path: str) -> Path:
    """Make the folder for results, before anything is trained."""
    folder = Path(path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(
            f"The folder {path} cannot be made: {error.strerror}. Give --out the path of a folder that can be written to."
        ) from error
    return folder


if __name__ == "__main__":
    main()
