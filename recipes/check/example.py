"""What the check says of a small Transformer on text: with the plugin, and without it.

python -m recipes.check.example
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from time import perf_counter

from rich.console import Console

from mlu_lightning import MLUCallback, Shape, check
from mlu_lightning.checking import save_check
from mlu_lightning.models import CausalTransformer
from recipes.check.planted_faults import MODELS, text_batches
from recipes.common.gradient_descent import check_command, command

__all__ = ["main", "run"]


def main(args: Sequence[str] | None = None) -> None:
    """Run both checks as the command line says.

    Args:
        args: of the command line; by default those of the process.
    """
    command(run, "python -m recipes.check.example", args)


def run(output: str = "check-example", quick: bool = False) -> None:
    """Check the module with and without :class:`MLUCallback`.

    Args:
        output: folder of what the checks write.
        quick: whether to try the machinery only, with fewer sizes (``--quick``).
    """
    check_command(1, 1)
    console = Console(width=None if sys.stdout.isatty() else 125)

    def build(depth: int, hidden: int, embedding: int) -> CausalTransformer:
        return CausalTransformer(128, 32, depth, embedding, hidden, mlp_hidden=64 * hidden, lr=2**-6, weight_decay=0.1)

    base = MODELS["Transformer"].base
    settings = {"factors": (1, 2), "seeds": 1} if quick else {}
    for name, callbacks in (("with", lambda module: [MLUCallback(module)]), ("without", lambda module: [])):
        begin = perf_counter()
        report = check(
            build, Shape(base.depth, base.hidden, base.embedding), text_batches(), callbacks=callbacks, **settings
        )
        console.print(f"{name} MLUCallback ({perf_counter() - begin:.0f} s):", highlight=False)
        console.print(report.tables())
        save_check(report, Path(output, name))


if __name__ == "__main__":
    main()
