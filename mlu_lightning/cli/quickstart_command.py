"""``mlu-lightning quickstart``: learning rates of small Transformers on a text, with MLU and without."""

from __future__ import annotations

from contextlib import suppress

from mlu_lightning.cli.console import make_console, place, require, say, show_progress, writing


def quickstart(text: str | None = None, out: str = "mlu-quickstart", steps: int = 220, seed: int = 0) -> None:
    """Train small Transformers on text at several learning rates and shapes, with MLU and without.

    Args:
        text: path of the text to train on; by default the documentation inside Python's standard library.
        out: folder for the figure and the losses; it is made if it does not exist, and runs that are there are kept.
        steps: optimizer steps of each run.
        seed: seed of initial weights and batches.
    """
    require("quickstart draws a figure, and matplotlib is", "matplotlib")
    from mlu_lightning.quickstart.results import loss_table, save_figure, verdicts
    from mlu_lightning.quickstart.study import Run, Study, load_text, read_runs, run_study, save_runs
    from mlu_lightning.utilities.fitted_tables import FittedTable

    study, content, console = Study(steps=steps, seed=seed), load_text(text), make_console()
    folder = place(out)
    total = len(study.exponents) * (2 * len(study.shapes) - 1)
    source = "the documentation in Python's standard library" if text is None else text
    say(console, f"{total} runs of {steps} steps on {len(content):,} bytes of {source}")
    done = read_runs(study, content, folder / "runs.json")
    known = [*done]
    if known:
        say(console, f"Going on in {folder}, which has {len(known)} of them already.", soft_wrap=True)

    def keep(run: Run) -> None:
        done.append(run)
        with suppress(OSError):  # which is heard of at the end, when the results have been printed
            save_runs(study, content, done, folder / "runs.json")
        progress(len(done), total)

    def show(runs: list[Run]) -> None:
        say(console, "Validation loss (nats per byte) by learning rate; * marks the least of a row.")
        console.print(FittedTable(loss_table(study, runs), keys=2))

    try:
        with show_progress(console, "training") as progress:
            progress(len(known), total)
            runs = run_study(study, content, keep, known)
    except KeyboardInterrupt:
        say(console, f"Interrupted after {len(done)} of {total} runs; the same command goes on with the others.")
        if done:
            show(done)
        raise
    show(runs)
    for sentence in verdicts(study, runs):
        say(console, sentence)
    with writing(out):
        save_runs(study, content, runs, folder / "runs.json")
        save_figure(study, runs, folder / "quickstart.png")
    say(console, f"Wrote {folder / 'quickstart.png'} and {folder / 'runs.json'}.", soft_wrap=True)
    say(console, "Next, with your own model: mlu-lightning check config.yaml, and mlu-lightning tune config.yaml.")
