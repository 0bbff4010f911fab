"""What the check says of a small Transformer on text: with the plugin, and without it."""

from __future__ import annotations

from pathlib import Path
from time import perf_counter

from mlu_lightning import MLUCallback, Shape, check
from mlu_lightning.models import CausalTransformer
from recipes.common.studies import check_command, console, study_command
from recipes.common.text import text_batches


def run(output: str = "check-example", quick: bool = False) -> None:
    """Check the module with and without :class:`MLUCallback`.

    Args:
        output: folder of what the checks write.
    """
    check_command(1, 1)
    terminal = console(125)
    factors, seeds = ((1, 2), 1) if quick else ((1, 2, 4, 8), 4)

    def build(depth: int, hidden: int, embedding: int) -> CausalTransformer:
        return CausalTransformer(128, 32, depth, embedding, hidden, mlp_hidden=64 * hidden, lr=2**-6, weight_decay=0.1)

    for name, callbacks in (("with", lambda module: [MLUCallback(module)]), ("without", lambda module: [])):
        begin = perf_counter()
        report = check(build, Shape(2, 2, 32), text_batches(), callbacks=callbacks, factors=factors, seeds=seeds)
        terminal.print(f"{name} MLUCallback ({perf_counter() - begin:.0f} s):", highlight=False)
        terminal.print(report.tables())
        report.save(Path(output, name))


main = study_command(run, "python -m recipes.check.example")

if __name__ == "__main__":
    main()
