"""Models of other packages, small, at a base shape (size 1) and at twice its depth, hidden width and embedding (size 2).

Each entry builds a module with the arguments of its forward pass. ``roles.txt`` has their roles:
printed from what was found, and read through, not written down beforehand. It holds what is right now.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn

from helpers.third_party import sequences, vision

Build = Callable[[int], tuple[nn.Module, Any]]
MODELS: dict[str, Build] = vision.MODELS | sequences.MODELS
# by hand from the source: no residual branches, a recurrent layer outside of every branch, or gates on the stream
RIGHTLY_REFUSED = ("timm.densenet", "rtdl.MLP", "neuralforecast.LSTM", "x_transformers.gate_residual")
_VECTORS = {
    "branch_in": "branch_in_bias",
    "branch_hidden": "branch_in_bias",
    "branch_out": "branch_out_bias",
    "branch_out (before_norm)": "branch_out_bias",
    "stream_matrix": "stream_norm",
    "stream_matrix (in_head)": "stream_norm",
    "stream_matrix (of_block)": "stream_norm (of_block)",
    "branch_bounded_matrix": "branch_bounded",
    "readout": "readout_bias",
}


def expected() -> dict[str, tuple[str, dict[str, str]]]:
    """Depth and embedding of streams, and rows by glob of parameter names, of every model whose roles are known.

    A name without its last part stands for a weight, and for a bias of the row that goes with the weight's.
    """
    models: dict[str, tuple[str, dict[str, str]]] = {}
    rows: dict[str, str] = {}
    for line in Path(__file__).with_name("roles.txt").read_text(encoding="utf-8").splitlines():
        if line.startswith("["):
            name, _, streams = line[1:].partition("] ")
            models[name] = streams, (rows := {})
            continue
        row, _, globs = line.partition(": ")
        for glob in globs.split():
            rows |= {glob: row, f"{glob}.weight": row, f"{glob}.bias": _VECTORS.get(row, row)}
    return models
