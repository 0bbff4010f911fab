"""``mlu-lightning check``: whether features move alike at every shape of what a configuration trains."""

from __future__ import annotations

import sys
from pathlib import Path

from mlu_lightning.cli.console import make_console, place, require, say, show_progress, writing

__all__ = ["check"]

_EXIT_CODES = {"pass": 0, "fail": 3, "undecided": 4}


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
    require("check needs matplotlib and scipy, which are", "matplotlib", "scipy")
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
    folder, console = place(out), make_console(125)
    for note in configured.notes:
        say(console, note)
    with show_progress(console) as progress:
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
    with writing(out):
        found.save(folder)
    if log:
        log_check(configured.loggers(), found)
    say(console, f"Wrote check.json, check.txt and check.png into {folder}.")
    sys.exit(_EXIT_CODES[found.verdict])
