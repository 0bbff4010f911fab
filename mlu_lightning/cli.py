"""The command line: ``mlu-lightning quickstart | shape``."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Literal, TypeVar

from jsonargparse import auto_cli
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from mlu_lightning.quickstart import Study, load_text, run_study, save_runs
from mlu_lightning.shape_search import Architecture, candidate_shapes, optimal_shape
from mlu_lightning.shape_table import assumptions, shape_table
from mlu_lightning.shapes import ErrorConstants, Shape

__all__ = ["main", "quickstart", "shape"]

_Value = TypeVar("_Value")

_SIZES = {"transformer": {"vocabulary": 50257, "head_dim": 64, "mlp_ratio": 4}, "resnet": {"inputs": 0, "outputs": 0}}
"""What the parameter count of a model depends on besides its shape, with defaults; the vocabulary is GPT-2's."""


def main(args: list[str] | None = None) -> None:
    """Run a command of ``mlu-lightning``.

    Args:
        args: of the command line; by default those of the process.
    """
    try:
        auto_cli({"quickstart": quickstart, "shape": shape}, args=args, prog="mlu-lightning", as_positional=False)
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
    console = _console()
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


def shape(
    parameters: float,
    model: Literal["transformer", "resnet"] = "transformer",
    present: dict[str, int] | None = None,
    vocabulary: int | None = None,
    head_dim: int | None = None,
    mlp_ratio: int | None = None,
    inputs: int | None = None,
    outputs: int | None = None,
    multiple: int = 64,
    constants: dict[str, float] | None = None,
    gain: float = 0.05,
) -> None:
    """Print the shapes of least predicted error to the infinite model that a number of parameters allows.

    Args:
        parameters: the most that the network may have, embedding and readout included, such as 100e6.
        model: transformer (attention and MLP branches in turn) or resnet (perceptron blocks).
        present: shape to compare with, such as '{depth: 24, hidden: 12, embedding: 768}'; depth counts residual
            additions, two for each block of a Transformer, and hidden its heads, or the units of a ResNet's block.
        vocabulary: number of a Transformer's tokens, by default 50257.
        head_dim: dimension of a Transformer's heads, by default 64.
        mlp_ratio: units of a Transformer's MLP over heads * head_dim, by default 4.
        inputs: dimension of a ResNet's data, by default 0: its embedding is not counted.
        outputs: dimension of a ResNet's targets, by default 0: its readout is not counted.
        multiple: that the embedding dimension and the units of a ResNet are multiples of.
        constants: of the error bound, such as '{depth: 1, hidden: 0.8, embedding: 2.5}'; by default those of
            experiments, which are named below the table.
        gain: part by which twice the depth must lower the error to be taken, from 0.01 to below 0.5.
    """
    given = {
        "vocabulary": vocabulary,
        "head_dim": head_dim,
        "mlp_ratio": mlp_ratio,
        "inputs": inputs,
        "outputs": outputs,
    }
    sizes = _sizes(model, {name: value for name, value in given.items() if value is not None})
    heads = None
    if model == "transformer":
        heads = sizes["head_dim"], sizes["mlp_ratio"] * sizes["head_dim"]
        architecture = Architecture.transformer(sizes["vocabulary"], sizes["head_dim"], sizes["mlp_ratio"], multiple)
    else:
        architecture = Architecture.resnet(sizes["inputs"], sizes["outputs"], multiple)
    if constants is not None:
        architecture = replace(architecture, constants=_read(ErrorConstants, "constants", constants))
    compared = None if present is None else architecture.candidate(_read(Shape, "present", present))
    if compared is not None and compared.shape.depth % architecture.multiples.depth:
        raise ValueError(
            f"A Transformer has no depth of {compared.shape.depth}: depth counts residual additions, two for each block. "
            "Give twice the number of blocks."
        )
    best = optimal_shape(parameters, architecture, gain)
    candidates = candidate_shapes(parameters, architecture, gain)
    console = _console()
    console.print(
        f"Shapes of a {model} with up to {parameters:,.0f} parameters, of which {architecture.per_coordinate} D are "
        "outside branches",
        highlight=False,
    )
    console.print(shape_table(candidates, best, compared, heads))
    for sentence in assumptions(architecture.constants, gain, compared, heads):
        console.print(sentence, highlight=False, markup=False)


def _sizes(model: str, given: dict[str, int]) -> dict[str, int]:
    """Complete the sizes of a model that are not its shape."""
    wrong = [name for name in given if name not in _SIZES[model]]
    if wrong:
        raise ValueError(
            f"--{' and --'.join(wrong)} cannot be used with --model {model}, which has --{', --'.join(_SIZES[model])}. "
            "Leave them out, or choose the other model."
        )
    return _SIZES[model] | given


def _read(kind: Callable[..., _Value], option: str, values: Mapping[str, float]) -> _Value:
    """Make a value of what an option gives for depth, hidden and embedding."""
    if values.keys() != {"depth", "hidden", "embedding"}:
        raise ValueError(
            f"--{option} has {', '.join(values) or 'nothing'}, and should have depth, hidden and embedding: "
            f"--{option} '{{depth: 1, hidden: 2, embedding: 3}}' with your numbers."
        )
    return kind(**values)


def _console() -> Console:
    return Console(width=None if sys.stdout.isatty() else 110)


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
