"""``mlu-lightning report``: one page about a run."""

from __future__ import annotations

from pathlib import Path

from mlu_lightning.cli.console import make_console, place_file, refused, require, say, show_progress
from mlu_lightning.utilities.whole_files import write_whole


def report(path: str, out: str = "report.html") -> None:
    """Collect the plan, the checks, and what was logged of a run into one HTML page.

    Args:
        path: folder of the run, such as lightning_logs/version_0: what CSVLogger or TensorBoardLogger has written,
            checkpoints, saved plans, check.json and references in it.
        out: HTML file to be written.
    """
    require("report draws figures, and matplotlib is", "matplotlib")
    from mlu_lightning.reporting import read_run, run_page

    console = make_console()
    with show_progress(console, "reading"):
        record = read_run(Path(path))
        page = run_page(record)
    target = place_file(out, "an HTML file")
    with refused(f"The page cannot be written to {out}", "an HTML file"):
        write_whole({target: page.encode()})
    found = len(record.plans), len(record.checks), len(record.values), len(record.references)
    names = "plan", "check", "logged value", "reference"
    counts = (f"{count} {name}{'' if count == 1 else 's'}" for count, name in zip(found, names, strict=True))
    say(console, f"Wrote {target}: {', '.join(counts)}.", soft_wrap=True)
    for name, reason in record.problems.items():
        say(console, f"{name}: {reason}", soft_wrap=True)
