"""``mlu-lightning check``: whether features move alike at every shape of what a configuration trains."""

from __future__ import annotations

import sys

from mlu_lightning.cli.console import list_of, make_console, place, read_axes, require, say, show_progress, writing

_EXIT_CODES = {"pass": 0, "fail": 3, "undecided": 4}


def check_configuration(
    config: str,
    depth: str | None = "auto",
    hidden: str | None = "auto",
    embedding: str | None = "auto",
    out: str = "mlu-check",
    factors: str = "1,2,4,8",
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
        config: YAML file that LightningCLI takes.
        depth: arguments of the model that make up its depth, with commas between them, and dots before arguments of an
            argument, such as "config.n_layer"; null leaves it as it is. By default each is doubled, to see what grows.
        hidden: the same for the hidden width, such as "heads,mlp_hidden".
        embedding: the same for the embedding dimension.
        out: folder for check.json, check.txt and check.png; it is made if it does not exist.
        factors: factors by which each of the three grows, ascending from 1, with commas between them.
        seeds: number of runs at every shape.
        steps: optimizer steps of every run.
        seed: seed of the first of the runs at every shape.
        model: class of the model, for a configuration that does not name it.
        data: class of the data, for a configuration that does not name it.
        log: whether the loggers of the configuration get the figure and the verdict.
        verbose: whether everything is listed, also what passes.
    """
    require("check needs matplotlib and scipy, which are", "matplotlib", "scipy")
    from mlu_lightning.checking import check, log_check
    from mlu_lightning.checking.options import with_found_options
    from mlu_lightning.checking.sizes import default_axes

    grown, console = _numbers(factors), make_console(125)
    configured, keys = read_axes(config, {"depth": depth, "hidden": hidden, "embedding": embedding}, model, data)
    folder = place(out)
    with show_progress(console, "looking at the model"):
        configured = with_found_options(configured, keys)
    for note in configured.notes:
        say(console, note)
    with show_progress(console, "training") as progress:
        found = check(
            configured.build,
            configured.base,
            configured.data(),
            callbacks=configured.callbacks,
            axes=default_axes(grown, [axis for axis, names in configured.keys.items() if names]),
            factors=grown,
            seeds=seeds,
            steps=steps,
            seed=seed,
            trainer=configured.trainer,
            progress=progress,
        )
    console.print(found.tables(verbose))
    with writing(out):
        found.save(folder)
    if log:
        log_check(configured.loggers(), found)
    say(console, f"Wrote check.json, check.txt and check.png into {folder}.")
    sys.exit(_EXIT_CODES[found.verdict])


def _numbers(text: str) -> list[int]:
    try:
        return [int(item) for item in list_of(text)]
    except ValueError:
        raise ValueError(f"--factors {text} should be whole numbers with commas between them: 1,2,4,8.") from None
