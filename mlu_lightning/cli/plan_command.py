"""``mlu-lightning plan``: the plan of what a configuration trains, printed and saved."""

from __future__ import annotations

from mlu_lightning.cli.console import find_modules_here, make_console, place_file, refused, say, show_progress


def plan(config: str, out: str = "plan.yaml", model: str | None = None, data: str | None = None) -> None:
    """Print what a fit of a configuration would plan, and save it as YAML to be read, edited and given to MLUCallback.

    Args:
        config: YAML file that LightningCLI takes.
        out: YAML file for the plan; another plan that is there already stays, and is an error.
        model: class of the model, for a configuration that does not name it.
        data: class of the data, for a configuration that does not name it.
    """
    from mlu_lightning.checking.configuration import read_config
    from mlu_lightning.checking.planned_fit import plan_of_fit
    from mlu_lightning.table import OptimizerFamily

    find_modules_here()
    configured = read_config(config, None, model, data)
    console = make_console(125)
    with show_progress(console, "planning"):
        found, notes = plan_of_fit(configured)
    for note in notes:
        say(console, note)
    for family in found.optimizers or (OptimizerFamily.ADAMW,):
        say(console, found.table(family, console.width), soft_wrap=True)
    target = place_file(out, "a YAML file")
    with refused(f"The plan cannot be written to {out}", "a YAML file"):
        if target.is_file() and target.read_text(encoding="utf-8", errors="replace") != found.to_yaml():
            raise ValueError(
                f"{out} is there already, and is not this plan; somebody may have edited it. Give --out another path, or "
                "remove the file."
            )
        found.save(target)
    say(console, f"Wrote {target}.", soft_wrap=True)
