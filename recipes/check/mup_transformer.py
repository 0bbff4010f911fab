"""The causal Transformer in µP as microsoft/mup's README says, with one of its numbers wrong."""

from __future__ import annotations

import torch
from mup import MuAdamW, MuReadout, set_base_shapes
from torch import nn

from mlu_lightning.models import CausalTransformer
from mlu_lightning.table import OptimizerFamily, Ratios, Role, scale
from mlu_lightning.utilities.names import name_pattern
from recipes.check.plan_faults import Fault

__all__ = ["ROLES", "MuTransformer"]

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
    """A :class:`CausalTransformer` whose heads and embedding grow together, with ``MuReadout`` and ``MuAdamW``.

    Heads keep their dimension, so that logits of attention need no other scale than the usual one.

    Args:
        factor: by what it is wider than the base.
        fault: what is wrong with it, None if nothing is.
        vocabulary: as of :class:`CausalTransformer`.
        context: of it.
        depth: of it.
        embedding: of the base.
        heads: of the base.
        lr: of the base.
        eps: as of :class:`CausalTransformer`; mup leaves it as it is at every width.
        weight_decay: of the base.
    """

    def __init__(
        self,
        factor: int,
        fault: Fault | None,
        vocabulary: int,
        context: int,
        depth: int,
        embedding: int,
        heads: int,
        lr: float,
        eps: float,
        weight_decay: float,
    ) -> None:
        super().__init__(
            vocabulary, context, depth, embedding * factor, heads * factor, lr=lr, eps=eps, weight_decay=weight_decay
        )
        self.fault = fault
        self.wrong = 1.0 if fault is None else _wrong(fault, factor)
        self.readout = MuReadout(embedding * factor, vocabulary, bias=False)
        base, wider = (CausalTransformer(vocabulary, context, depth, embedding * n, heads * n) for n in (1, 2))
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
