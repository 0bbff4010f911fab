"""Plans with one number that is wrong, as of a parameterization that somebody wrote by hand and got almost right."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any, Literal

from lightning.pytorch import LightningModule, Trainer

from mlu_lightning import MLUCallback, Plan
from mlu_lightning.planning import Multiplier
from mlu_lightning.table import OptimizerFamily, Ratios, Role, Scale, Variant, row_name, scale

Factor = Literal["std", "multiplier", "lr", "eps", "weight_decay"]
FACTORS: tuple[Factor, ...] = ("std", "multiplier", "lr", "eps", "weight_decay")


@dataclass(frozen=True)
class Fault:
    """A factor of all parameters of one role that is not what the table says.

    Where the table has a power of the shape, the factor is forgotten: it is 1 at every shape. Where it has 1, it is that
    of a matrix instead, 1/d of the stream's ratio d, and d^(-1/2) for a std.
    """

    role: Role
    factor: Factor
    variant: Variant | None = None

    def __str__(self) -> str:
        return f"{self.factor.replace('_', ' ')} of {self.row}"

    @property
    def row(self) -> str:
        """Name of the row of the table."""
        return row_name(self.role, self.variant)

    def is_possible(self, family: OptimizerFamily) -> bool:
        """Whether there is such a number for an optimizer: multipliers are of branches and readouts, SGD has no eps."""
        if self.factor == "multiplier":
            return self.role in (Role.BRANCH_OUT, Role.READOUT)
        return self.factor != "eps" or family in (OptimizerFamily.ADAM, OptimizerFamily.ADAMW)

    def is_forgotten(self, family: OptimizerFamily) -> bool:
        """Whether the table has a power of the shape there."""
        if self.factor == "multiplier":
            return True
        inputs = 1.0 if self.role is Role.EMBEDDING else 3.0  # data does not grow
        ratios = Ratios(depth=2.0, inputs=inputs, outputs=1.0 if self.variant is Variant.IN_HEAD else 5.0)
        return bool(getattr(scale(self.role, ratios, family, variant=self.variant), self.factor) != 1)


def faulty(plan: Plan, fault: Fault) -> Plan:
    """Plant a fault into a plan that is right."""
    stream = plan.streams[0]
    foreign = stream.base_embedding / stream.embedding
    reads = fault.role is Role.READOUT

    class Faulty(Plan):
        def scales(self, family: OptimizerFamily | str) -> dict[str, Scale]:
            family = OptimizerFamily(family)
            found = super().scales(family)
            if fault.factor == "multiplier":
                return found
            wrong = 1.0 if fault.is_forgotten(family) else foreign ** (0.5 if fault.factor == "std" else 1)
            row = fault.role, fault.variant
            of_role = (name for name, entry in self.parameters.items() if (entry.role, entry.variant) == row)
            return found | {name: replace(found[name], **{fault.factor: wrong}) for name in of_role}

        def forward_multiplier(self, multiplier: Multiplier) -> float:
            wrong = fault.factor == "multiplier" and multiplier.kind == ("readout" if reads else "branch")
            return 1.0 if wrong else super().forward_multiplier(multiplier)

    return Faulty(**{field.name: getattr(plan, field.name) for field in fields(Plan)})


class FaultyCallback(MLUCallback):
    """An :class:`MLUCallback` whose plan may have a fault."""

    def __init__(self, fault: Fault | None, base: Any) -> None:
        super().__init__(base)
        self._fault = fault

    def _plan_of(self, trainer: Trainer, module: LightningModule) -> Plan:
        plan = super()._plan_of(trainer, module)
        return plan if self._fault is None else faulty(plan, self._fault)
