"""All faults that are planted; ``python -m helpers.faults``, in ``tests/``, prints where each of them stops."""

from helpers.planted_runs import Fault, is_right, outcome
from helpers.planted_updates import UPDATES
from helpers.planted_weights import MULTIPLIERS, faults_of_weights

FAULTS: dict[str, Fault] = {**faults_of_weights(), **MULTIPLIERS, **UPDATES}


def markdown() -> str:
    """The table of all faults, with where each of them stops, and how many are found."""
    lines = ["| fault | loses | stops | message |", "|---|---|---|---|"]
    missed = 0
    for name, fault in FAULTS.items():
        where, message, module = outcome(fault.plant)
        if where is None and (is_right(module) or message):
            where = "goes on with a warning" if message else "is the run that is meant"
        elif where in (None, "second step"):
            where, missed = f"**missed** {'' if where is None else where}", missed + 1
        lines.append(f"| {name} | {fault.loses} | {where} | {message.splitlines()[0][:64] if message else ''} |")
    return "\n".join(
        [*lines, "", f"{len(FAULTS) - missed} of {len(FAULTS)} faults do no harm or are found in the first step."]
    )


if __name__ == "__main__":
    print(markdown())
