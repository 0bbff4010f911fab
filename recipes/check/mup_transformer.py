"""The causal Transformer in µP as microsoft/mup's README says, with one of its numbers wrong."""

from __future__ import annotations

from typing import Any

import torch
from mup import MuAdamW, MuReadout, set_base_shapes
from torch import nn

from mlu_lightning.models import CausalTransformer
from mlu_lightning.table import OptimizerFamily, Ratios, Role, scale
from mlu_lightning.utilities.names import name_pattern
from recipes.check.plan_faults import Fault

ROLES = {
    "tokens.weight": Role.EMBEDDING,
    "branches.*.norm.weight": Role.BRANCH_NORM,
    **{f"branches.*.{name}.weight": Role.BRANCH_IN for name in ("query", "key", "value", "read")},
    **{f"branches.*.{name}.weight": Role.BRANCH_OUT for name in ("out", "write")},
    "norm.weight": Role.STREAM_NORM,
    "readout.weight": Role.READOUT,
}
"""Role by pattern of parameter names."""


class MuTransformer(CausalTransformer):
    """A ``factor`` times wider :class:`CausalTransformer`, in heads and embedding, with ``MuReadout`` and ``MuAdamW``.

    Embedding, heads, lr and decay are those of the base. Heads keep their dimension, so that logits of attention need no
    other scale than the usual one. mup leaves eps as it is at every width.
    """

    def __init__(self, factor: int, fault: Fault | None, embedding: int, heads: int, **settings: Any) -> None:
        super().__init__(embedding=embedding * factor, heads=heads * factor, **settings)
        self.fault = fault
        self.wrong = 1.0 if fault is None else _wrong(fault, factor)
        self.readout = MuReadout(embedding * factor, settings["vocabulary"], bias=False)
        base, wider = (CausalTransformer(embedding=embedding * n, heads=heads * n, **settings) for n in (1, 2))
        set_base_shapes(self, base, delta=wider)
        # else it is read from the weight, and lost where the layer is called with another weight
        self.readout.width_mult = lambda: factor
        if fault is not None and fault.factor == "multiplier":
            self.readout.output_mult = self.wrong
        if fault is not None and fault.factor == "std":
            with torch.no_grad():
                for parameter in self._of(fault.role):
                    parameter.mul_(self.wrong)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """``MuAdamW``, which makes groups by width of these groups by role."""
        groups = []
        for role in dict.fromkeys(ROLES.values()):
            group = {"params": self._of(role), "lr": self.lr, "weight_decay": self.weight_decay}
            if self.fault is not None and self.fault.role is role and self.fault.factor in group:
                group[self.fault.factor] *= self.wrong
            groups.append(group)
        optimizer: torch.optim.Optimizer = MuAdamW(
            groups, lr=self.lr, betas=self.betas, eps=self.eps, weight_decay=self.weight_decay
        )
        return optimizer

    def _of(self, role: Role) -> list[nn.Parameter]:
        return [parameter for name, parameter in self.named_parameters() if ROLES[name_pattern(name)] is role]


def _wrong(fault: Fault, factor: int) -> float:
    """What a faulty number is, over the right one; µP and MLU have the same where only widths grow, and alike."""
    right = getattr(scale(fault.role, Ratios(inputs=factor, outputs=factor), OptimizerFamily.ADAMW), fault.factor)
    if fault.is_forgotten(OptimizerFamily.ADAMW):
        return float(1 / right)
    return float(factor ** (-0.5 if fault.factor == "std" else -1))
