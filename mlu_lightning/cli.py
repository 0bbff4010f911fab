"""The command line: ``mlu-lightning quickstart | check | report | shape``."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryFile
from threading import current_thread, main_thread
from types import FrameType
from typing import TYPE_CHECKING, Literal, TypeVar

from jsonargparse import auto_cli
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

import mlu_lightning
from mlu_lightning.shapes import Architecture, ErrorConstants, Shape, optimal_shape
from mlu_lightning.shapes.search import candidate_shapes
from mlu_lightning.shapes.shape_table import assumptions, shape_table
from mlu_lightning.utilities.whole_files import write_whole

if TYPE_CHECKING:
    from mlu_lightning.quickstart.study import Run

__all__ = ["check", "main", "quickstart", "report", "shape"]

_Value = TypeVar("_Value")

_EXIT_CODES = {"pass": 0, "fail": 3, "undecided": 4}
_INTERRUPTED = 130  # as shells report a command that Ctrl-C ended
_RESULTS = 2**20  # bytes that a command writes, figures among them, at most
_SIZES = {"transformer": {"vocabulary": 50257, "head_dim": 64, "mlp_ratio": 4}, "resnet": {"inputs": 0, "outputs": 0}}
"""What the parameter count of a model depends on besides its shape, with defaults; the vocabulary is GPT-2's."""


def main(args: list[str] | None = None) -> None:
    """Run a command of ``mlu-lightning``, with the arguments of the process if none are given."""
    given = list(sys.argv[1:] if args is None else args)
    if given[:1] in (["check"], ["report"]) and len(given) > 1 and not given[1].startswith("-"):
        given.insert(1, "--path")  # what a command is about needs no option
    version = mlu_lightning.__version__
    with _interruptible():
        try:
            auto_cli(
                [quickstart, check, report, shape],
                args=given,
                prog="mlu-lightning",
                as_positional=False,
                version=version,
            )
        except ValueError as error:
            Console(stderr=True).print(f"mlu-lightning: {error}", highlight=False, markup=False, soft_wrap=True)
            sys.exit(1)


def quickstart(text: str | None = None, out: str = "mlu-quickstart", steps: int = 220, seed: int = 0) -> None:
    """Train small Transformers on text at several learning rates and shapes, with MLU and without.

    Args:
        text: path of the text to train on; by default the documentation inside Python's standard library.
        out: folder for the figure and the losses; it is made if it does not exist, and runs that are there are kept.
        steps: optimizer steps of each run.
        seed: seed of initial weights and batches.
    """
    _require("quickstart draws a figure, and matplotlib is", "matplotlib")
    from mlu_lightning.quickstart import (
        Study,
        load_text,
        loss_table,
        read_runs,
        run_study,
        save_figure,
        save_runs,
        verdicts,
    )

    content = load_text(text)
    folder, study, console = _place(out), Study(steps=steps, seed=seed), _console()
    total = len(study.exponents) * (2 * len(study.shapes) - 1)
    source = "the documentation in Python's standard library" if text is None else text
    _say(console, f"{total} runs of {steps} steps on {len(content):,} bytes of {source}")
    done = read_runs(study, content, folder / "runs.json")
    known = [*done]
    if known:
        _say(console, f"Going on in {folder}, which has {len(known)} of them already.", soft_wrap=True)

    def keep(run: Run) -> None:
        done.append(run)
        with suppress(OSError):  # which is heard of at the end, when the results have been printed
            save_runs(study, content, done, folder / "runs.json")
        progress.advance(task)

    title = "Validation loss (nats per byte) by learning rate; * marks the least of a row."
    try:
        with _progress(console) as progress:
            task = progress.add_task("training", total=total, completed=len(known))
            runs = run_study(study, content, keep, known)
    except KeyboardInterrupt:
        _say(console, f"Interrupted after {len(done)} of {total} runs; the same command goes on with the others.")
        if done:
            _say(console, title)
            console.print(loss_table(study, done))
        raise
    _say(console, title)
    console.print(loss_table(study, runs))
    for sentence in verdicts(study, runs):
        _say(console, sentence)
    with _writing(out):
        save_runs(study, content, runs, folder / "runs.json")
        save_figure(study, runs, folder / "quickstart.png")
    _say(console, f"Wrote {folder / 'quickstart.png'} and {folder / 'runs.json'}.", soft_wrap=True)


def check(
    path: str,
    depth: str | None = "auto",
    hidden: str | None = "auto",
    embedding: str | None = "auto",
    out: str = "mlu-check",
    factors: list[int] = [1, 2, 4, 8],  # noqa: B006  # jsonargparse shows the default, and nothing changes it
    seeds: int = 4,
    steps: int = 4,
    seed: int = 0,
    model: str | None = None,
    data: str | None = None,
    log: bool = False,
    verbose: bool = False,
) -> None:
    """Train what a configuration trains for a few steps at several shapes, and say whether its features move alike.

    Exits with 0 if everything passes, 1 if there is an error, 3 if something fails, and 4 if it is undecided.

    Args:
        path: YAML file that LightningCLI takes, given as "mlu-lightning check config.yaml ...".
        depth: arguments of the model that make up its depth, with commas between them, and dots before arguments of an
            argument, such as "config.n_layer"; null leaves it as it is. By default each is doubled, to see what grows.
        hidden: the same for the hidden width, such as "heads,mlp_hidden".
        embedding: the same for the embedding dimension.
        out: folder for check.json, check.txt and check.png; it is made if it does not exist.
        factors: factors by which each of the three grows, ascending from 1.
        seeds: number of runs at every shape.
        steps: optimizer steps of every run.
        seed: seed of the first of the runs at every shape.
        model: class of the model, for a configuration that does not name it.
        data: class of the data, for a configuration that does not name it.
        log: whether the loggers of the configuration get the figure and the verdict.
        verbose: whether everything is listed, also what passes.
    """
    _require("check needs matplotlib and scipy, which are", "matplotlib", "scipy")
    from mlu_lightning.checking import check as run_check
    from mlu_lightning.checking import log_check
    from mlu_lightning.checking.configuration import read_config
    from mlu_lightning.checking.options import with_found_options
    from mlu_lightning.checking.sizes import default_axes

    sys.path.insert(0, str(Path.cwd()))  # where a script with the model may be, as for the script itself
    named = {"depth": depth, "hidden": hidden, "embedding": embedding}
    keys = {axis: names.split(",") if names else [] for axis, names in named.items() if names != "auto"}
    none: dict[str, list[str]] = {"depth": [], "hidden": [], "embedding": []}
    configured = with_found_options(read_config(path, none | keys, model, data), keys)
    folder, console = _place(out), _console(125)
    for note in configured.notes:
        _say(console, note)
    with _progress(console) as progress:
        task = progress.add_task("training", total=None)
        found = run_check(
            configured.build,
            configured.base,
            configured.data(),
            callbacks=configured.callbacks,
            axes=default_axes(factors, [axis for axis, names in configured.keys.items() if names]),
            factors=factors,
            seeds=seeds,
            steps=steps,
            seed=seed,
            trainer=configured.trainer,
            progress=lambda done, total: progress.update(task, completed=done, total=total),
        )
    console.print(found.tables(verbose))
    with _writing(out):
        found.save(folder)
    if log:
        log_check(configured.loggers(), found)
    _say(console, f"Wrote check.json, check.txt and check.png into {folder}.")
    sys.exit(_EXIT_CODES[found.verdict])


def report(path: str, out: str = "report.html") -> None:
    """Collect the plan, the checks, and what was logged of a run into one HTML page.

    Args:
        path: folder of the run, given as "mlu-lightning report lightning_logs/version_0": what CSVLogger or
            TensorBoardLogger has written, checkpoints, saved plans, check.json and references in it.
        out: HTML file to be written.
    """
    _require("report draws figures, and matplotlib is", "matplotlib")
    from mlu_lightning.reporting import read_run, run_page

    record = read_run(Path(path))
    page = run_page(record)
    target = _folder(str(Path(out).parent)) / Path(out).name
    try:
        write_whole({target: page.encode()})
    except OSError as error:
        wrong = f"The page cannot be written to {out}: {error.strerror}"
        raise ValueError(f"{wrong}. Give --out the path of an HTML file.") from error
    console = _console()
    found = len(record.plans), len(record.checks), len(record.values), len(record.references)
    names = "plan", "check", "logged value", "reference"
    counts = (f"{count} {name}{'' if count == 1 else 's'}" for count, name in zip(found, names, strict=True))
    _say(console, f"Wrote {target}: {', '.join(counts)}.", soft_wrap=True)
    for name, reason in record.problems.items():
        _say(console, f"{name}: {reason}", soft_wrap=True)


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
        parameters: most parameters that the network may have, embedding and readout included, such as 100e6.
        model: transformer (attention and MLP branches in turn) or resnet (perceptron blocks).
        present: shape to compare with, such as '{depth: 24, hidden: 12, embedding: 768}'; depth counts residual
            additions, two for each block of a Transformer, and hidden its heads, or the units of a ResNet's block.
        vocabulary: number of a Transformer's tokens, by default 50257.
        head_dim: dimension of a Transformer's heads, by default 64.
        mlp_ratio: units of a Transformer's MLP over heads * head_dim, by default 4.
        inputs: dimension of a ResNet's data, by default 0: its embedding is not counted.
        outputs: dimension of a ResNet's targets, by default 0: its readout is not counted.
        multiple: number of which the embedding dimension and the units of a ResNet are multiples.
        constants: constants of the error bound, such as '{depth: 1, hidden: 0.8, embedding: 2.5}'; by default those of
            experiments, which are named below the table.
        gain: part by which twice the depth must lower the error to be taken, from 0.01 to below 0.5.
    """
    sizes = _sizes(model, vocabulary=vocabulary, head_dim=head_dim, mlp_ratio=mlp_ratio, inputs=inputs, outputs=outputs)
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
    console, outside = _console(), f"{architecture.per_coordinate} D are outside branches"
    _say(console, f"Shapes of a {model} with up to {parameters:,.0f} parameters, of which {outside}")
    console.print(shape_table(candidate_shapes(parameters, architecture, gain), best, compared, heads))
    for sentence in assumptions(architecture.constants, gain, compared, heads):
        _say(console, sentence)


@contextmanager
def _interruptible() -> Iterator[None]:
    """Exit with 130 after Ctrl-C, whatever became of it: a Trainer makes an exit with 1 of it, a pool a broken one."""
    interrupts: list[int] = []

    def interrupt(number: int, frame: FrameType | None) -> None:
        interrupts.append(number)
        raise KeyboardInterrupt

    # ignored interrupts, as under nohup, stay ignored, and only the main thread has any
    own = signal.getsignal(signal.SIGINT) is signal.default_int_handler and current_thread() is main_thread()
    if own:
        signal.signal(signal.SIGINT, interrupt)
    try:
        yield
    except BaseException as error:
        if interrupts or isinstance(error, KeyboardInterrupt):
            sys.exit(_INTERRUPTED)
        raise
    finally:
        if own:
            signal.signal(signal.SIGINT, signal.default_int_handler)


def _require(needed: str, *packages: str) -> None:
    if any(find_spec(package) is None for package in packages):
        raise ValueError(f"{needed} not installed: pip install 'mlu-lightning[plots]'.")


def _sizes(model: str, **options: int | None) -> dict[str, int]:
    """Sizes of a model besides its shape, those that are not given by default."""
    given = {name: value for name, value in options.items() if value is not None}
    if wrong := [name for name in given if name not in _SIZES[model]]:
        raise ValueError(
            f"--{' and --'.join(wrong)} cannot be used with --model {model}, which has --{', --'.join(_SIZES[model])}. "
            "Leave them out, or choose the other model."
        )
    return _SIZES[model] | given


def _read(kind: Callable[..., _Value], option: str, values: Mapping[str, float]) -> _Value:
    """Build a value from the depth, hidden and embedding that an option gives."""
    if values.keys() != {"depth", "hidden", "embedding"}:
        raise ValueError(
            f"--{option} has {', '.join(values) or 'nothing'}, and should have depth, hidden and embedding: "
            f"--{option} '{{depth: 1, hidden: 2, embedding: 3}}' with your numbers."
        )
    return kind(**values)


def _console(width: int = 110) -> Console:
    return Console(width=None if sys.stdout.isatty() else width)


def _say(console: Console, text: str, soft_wrap: bool = False) -> None:
    """Print text as it is, whatever names from files are in it."""
    console.print(text, highlight=False, markup=False, soft_wrap=soft_wrap)


def _progress(console: Console) -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    return Progress(*columns, console=console)


def _folder(path: str) -> Path:
    """Make the folder for results before anything is trained."""
    folder = Path(path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        wrong = f"The folder {path} cannot be made: {error.strerror}"
        raise ValueError(f"{wrong}. Give --out the path of a folder that can be written to.") from error
    return folder


def _place(path: str) -> Path:
    """Make the folder for results, and see before anything is trained that there is room for them."""
    folder = _folder(path)
    with _writing(path), TemporaryFile(dir=folder) as file:
        file.write(bytes(_RESULTS))
    return folder


@contextmanager
def _writing(out: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        wrong = f"Results cannot be written into {out}, and files there are as they were: {error.strerror}"
        raise ValueError(f"{wrong}. Give --out the path of a folder that can be written to.") from error


if __name__ == "__main__":
    main()
