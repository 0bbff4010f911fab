"""The plan: for every parameter its role and ratios to a base shape, from which all factors follow."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from os import PathLike
from pathlib import Path
from typing import Any

from torch import nn

from mlu_lightning.discovery.discover import discover
from mlu_lightning.discovery.structure import Tap
from mlu_lightning.planning.arguments import ABSOLUTE, check_parameterization, require_base
from mlu_lightning.planning.base import Base, BaseBranch, BaseParameter, advice_on_names, base_of_module, refuse_base
from mlu_lightning.planning.derivation import (
    plan_branches,
    plan_multipliers,
    plan_parameters,
    plan_streams,
    with_copies,
)
from mlu_lightning.planning.distance import Distance, distances, warning_of
from mlu_lightning.planning.entries import BranchPlan, Multiplier, ParameterPlan, StreamPlan, constant_ratio
from mlu_lightning.planning.functions import plan_functions, require_functions
from mlu_lightning.planning.horizon import Horizon
from mlu_lightning.planning.overrides import override_roles, require_roles
from mlu_lightning.planning.ranges import as_number, check_factors, check_module, check_parts, in_range, range_of
from mlu_lightning.planning.rendering import draw_plan, headline
from mlu_lightning.planning.serialization import parts_from_yaml, parts_to_yaml
from mlu_lightning.planning.tuned import Matched, Tuned, match_tuned, read_tuned
from mlu_lightning.table import COUNTED, TABLES, OptimizerFamily, Parameterization, Role, Scale, scale
from mlu_lightning.utilities.locks import WriterLock
from mlu_lightning.utilities.names import listed, planned_parameters
from mlu_lightning.utilities.plain_yaml import read_text
from mlu_lightning.utilities.whole_files import write_whole


@dataclass(frozen=True)
class Plan:
    """Numbers of the MLU table for every parameter of one module relative to a base shape.

    Args:
        parameters: entries by name, in the order of ``named_parameters()``.
        branches: residual branches in order of execution.
        streams: residual streams.
        multipliers: factors in the forward pass.
        alpha: richness, 1 for MLU; large values tend to a linearized model (theory.md, section 3).
        warnings: what the theory does not cover in this module.
        taps: where streams and outputs can be read.
        features: where pre-activations of branches can be read.
        parameterization: whose table the factors are looked up in.
        horizon: batch size and duration next to the base's.
        tuned: factors by key and number, as :meth:`from_model` takes them, multiplied into the table's.
        optimizers: families of those that a fit found, whose factors the plan is printed with; by default AdamW's.

    Raises:
        ValueError: if a number is out of range, a multiplier is there twice, a tuned factor matches nothing, or
            another parameterization than MLU has no base or a richness.
    """

    parameters: dict[str, ParameterPlan]
    branches: tuple[BranchPlan, ...]
    streams: tuple[StreamPlan, ...]
    multipliers: tuple[Multiplier, ...]
    alpha: float = 1.0
    warnings: tuple[str, ...] = ()
    taps: tuple[Tap, ...] = ()
    features: tuple[Tap, ...] = ()
    parameterization: Parameterization = Parameterization.MLU
    horizon: Horizon = field(default_factory=Horizon)
    tuned: Tuned = field(default_factory=dict)
    optimizers: tuple[OptimizerFamily, ...] = field(default=(), compare=False)

    def __post_init__(self) -> None:
        """Check numbers and names, and that the parameterization has what it needs."""
        if not in_range("alpha", self.alpha):
            raise ValueError(
                f"alpha is {self.alpha!r}, and it has to be {range_of('alpha')}: 1 for MLU, more for a run that is closer "
                "to that of a linearized model."
            )
        check_parts(self.parameters, self.branches, self.streams, self.multipliers)
        check_parameterization(self.parameterization, self.richness, absolute=self._absolute)
        check_factors(self.forward_factors)  # to find them refuses tuned ones that match nothing

    @classmethod
    def from_model(
        cls,
        module: nn.Module,
        example: Any = None,
        *,
        base: nn.Module | Plan | str | PathLike[str] | None = None,
        overrides: Mapping[str, Role | str] | None = None,
        alpha: float = 1.0,
        parameterization: Parameterization | str = Parameterization.MLU,
        batch_ratio: float = 1.0,
        token_ratio: float = 1.0,
        tuned: Mapping[str, Mapping[str, float]] | str | PathLike[str] | None = None,
    ) -> Plan:
        """Discover a module's structure and put it next to a base.

        Args:
            module: to be trained; it is not changed.
            example: what ``training_step`` takes as its batch, for a LightningModule; the arguments of ``forward``
                for any other module. By default ``example_input_array`` of a LightningModule.
            base: a freshly built module at the shape at which the hyperparameters are known to be good, a saved plan
                whose base that is, or its path, or ``"absolute"``, as None is, for the paper's absolute form (theory.md,
                section 2), at which learning rates are those of the infinite model.
            overrides: role by glob pattern of parameter names, for parameters that discovery cannot place; ``"frozen"`` for
                those that are to be left alone, ``"copy_of net"`` for a submodule (``"teacher.*"``) that begins as a copy
                of another one, with its multipliers.
            alpha: richness.
            parameterization: ``"mlu"``, or, to compare with it, ``"completep"``, ``"mup"`` or ``"sp"``, with a base.
            batch_ratio: tokens in a batch over those in one of the base's: with s = sqrt(batch_ratio/token_ratio),
                AdamW's lr and decay are multiplied by s, eps by 1/s, and 1 - β by s² (Complete(d)P, arXiv 2512.22382).
            token_ratio: tokens seen in all of the training over those that the base saw.
            tuned: factors that were found at the base, of ``"std"``, ``"lr"``, ``"weight_decay"`` and (branch_out and
                readout) ``"multiplier"``: ``{"embedding": {"lr": 1.9, "std": 2.7}}``, or the path of such a YAML file. Keys
                are roles, roles in one kind of branch (``"branch_in@attention"``) or glob patterns of parameter names;
                those of all that match are multiplied into the table's numbers, at the base's shape, too.

        Raises:
            ValueError: without residual branches or example, with a parameter that has no role, an override or a factor
                that matches nothing, a base of another architecture, or a parameterization that needs a base or has no
                richness.

        >>> from mlu_lightning.models import ResNet
        >>> import torch
        >>> batch = torch.ones(4, 3), torch.ones(4, 2)
        >>> base = ResNet(depth=2, hidden=16, embedding=8, inputs=3, outputs=2)
        >>> wide = ResNet(depth=2, hidden=64, embedding=8, inputs=3, outputs=2)
        >>> plan = Plan.from_model(wide, batch, base=base)
        >>> {name: factors.lr for name, factors in plan.scales("sgd").items() if "blocks.0" in name}
        {'blocks.0.read.weight': 4.0, 'blocks.0.write.weight': 0.25}
        """
        parameterization, alpha = Parameterization(parameterization), as_number("alpha", alpha)
        horizon = Horizon(as_number("batch_ratio", batch_ratio), as_number("token_ratio", token_ratio))
        base = None if isinstance(base, str) and base == ABSOLUTE else base
        if isinstance(base, nn.Module):
            refuse_base(base, module, example)
        elif base is not None:
            require_base(base, Plan)
            base = base if isinstance(base, Plan) else cls.load(base)
        reference = base.base if isinstance(base, Plan) else None
        check_parameterization(parameterization, alpha, absolute=reference is None and not isinstance(base, nn.Module))
        overrides = overrides or {}
        elsewhere = [] if reference is None else [*reference.parameters]
        if isinstance(base, nn.Module):
            elsewhere = [*planned_parameters(base)]
        structure = override_roles(discover(module, example), overrides, elsewhere)
        require_functions(structure, module)
        require_roles(structure, module, overrides)
        check_module(structure, module)
        if isinstance(base, nn.Module):
            of_base, of_module = (getattr(each, "example_input_array", None) for each in (base, module))
            base_example = of_module if example is None and of_base is None else example
            base_structure = override_roles(discover(base, base_example), overrides, structure.parameters)
            require_functions(base_structure, base)
            require_roles(base_structure, base, overrides)
            check_module(base_structure, base)
            reference = base_of_module(base, base_structure)
        streams = plan_streams(structure, reference)
        parameters = plan_functions(structure, plan_parameters(structure, reference, streams), parameterization)
        multipliers, warnings = plan_multipliers(structure, reference, parameters, streams, parameterization)
        parts = parameters, plan_branches(structure, reference), streams, with_copies(multipliers, structure.copies)
        found = structure.warnings + warnings, structure.taps, structure.features
        return cls(*(*parts, alpha, *found, parameterization, horizon, read_tuned(tuned)))

    @property
    def roles(self) -> dict[str, Role]:
        """Role of every parameter, by name."""
        return {name: parameter.role for name, parameter in self.parameters.items()}

    @property
    def base(self) -> Base | None:
        """The base shape that the plan is relative to; None in the paper's absolute form."""
        if self._absolute:
            return None
        own = {(multiplier.kind, multiplier.name): multiplier.base_constant for multiplier in self.multipliers}
        return Base(
            parameters={
                name: BaseParameter(
                    *(p.role, p.base_shape or (), p.base_fans, p.base_std, p.base_active, p.base_uses, p.variant),
                    *(p.base_constant, p.base_depth if p.variant in COUNTED else None),
                )
                for name, p in self.parameters.items()
            },
            streams=tuple((stream.base_depth, stream.base_embedding) for stream in self.streams),
            branches={
                (b.name, b.kind): BaseBranch(
                    b.base_hidden, b.base_head_dim, b.base_logits_scale, own.get(("branch", b.name))
                )
                for b in self.branches
            },
            readouts={name: constant for (kind, name), constant in own.items() if kind == "readout"},
            additions=next((constant or 0.0 for (kind, _), constant in own.items() if kind == "addition"), 0.0),
        )

    @cached_property
    def matched(self) -> Matched:
        """What the tuned factors are of."""
        return match_tuned(self.tuned, self.parameters, self.branches, self.multipliers)

    @property
    def richness(self) -> float:
        """Alpha, with its tuned factor."""
        return self.alpha * self.matched.alpha

    @property
    def is_at_base(self) -> bool:
        """Whether every parameter's numbers are those of the base, but for tuned factors."""
        return all(parameter.is_at_base for parameter in self.parameters.values())

    @cached_property
    def distances(self) -> tuple[Distance, ...]:
        """How far each stream is from its limit by each kind of branch, for MLU (theory.md, section 3)."""
        if self.parameterization is not Parameterization.MLU:
            return ()
        return distances(self.parameters, self.branches, self.streams, self._absolute)

    @property
    def advice(self) -> tuple[str, ...]:
        """Warnings, and one of a shape that is much farther from its limit than the base's."""
        return self.warnings + warning_of(self.distances)

    def forward_multiplier(self, multiplier: Multiplier) -> float:
        """Return the factor that one of ``multipliers`` puts into the forward pass: tuned, and with alpha on branches."""
        value = Scale(multiplier=multiplier.value * self.matched.multipliers.get(multiplier, 1.0))
        enriched = multiplier.role and value.enriched(multiplier.role, OptimizerFamily.ADAMW, self.richness)
        return (enriched or value).multiplier

    @property
    def own_constants(self) -> dict[str, tuple[float, float]]:
        """What the module multiplies branches, readouts and what parameters make by, where it is not what its base does.

        Numbers are relative to these constants, of which the second is the base's.
        """
        if not TABLES[self.parameterization].scales_optimizer:
            return {}
        of_parameters = [(name, p.constant, p.base_constant) for name, p in self.parameters.items()]
        found = [(f"{m.kind} {m.name}", m.constant, m.base_constant) for m in self.multipliers] + of_parameters
        return {name: (own, base) for name, own, base in found if own and base and constant_ratio(own, base) != 1}

    @property
    def relative_parameters(self) -> frozenset[str]:
        """Names of the parameters whose numbers are relative to the module's own constants, or that write what has such."""
        relative = [multiplier for multiplier in self.multipliers if multiplier.constant_ratio != 1]
        written = {name for multiplier in relative for name in multiplier.folds or (multiplier.name,)}
        return frozenset(written.union(n for n, parameter in self.parameters.items() if parameter.constant_ratio != 1))

    @cached_property
    def forward_factors(self) -> dict[Multiplier, float]:
        """Factors in the forward pass, by multiplier, without those that are 1."""
        factors = {multiplier: self.forward_multiplier(multiplier) for multiplier in self.multipliers}
        return {multiplier: factor for multiplier, factor in factors.items() if factor != 1}

    @cached_property
    def folded_factors(self) -> dict[str, float]:
        """Product of the multipliers that can be folded into a parameter, by name, for those that have any."""
        factors: dict[str, float] = {}
        for multiplier, factor in self.forward_factors.items():
            for name in multiplier.folds:
                factors[name] = factors.get(name, 1.0) * factor
        return factors

    def scales(self, family: OptimizerFamily | str) -> dict[str, Scale]:
        """Look every parameter up in the table.

        Args:
            family: ``"sgd"``, ``"adam"`` (decay in the gradient), ``"adamw"`` (decoupled decay) or ``"muon"``.

        Returns:
            Factors relative to the base, by name. The multiplier is that of the branch or readout that a parameter writes
            to, and that can be folded into it; it is 1 where it can only be attached, as on a tied readout.

        Raises:
            ValueError: if batch size or duration differ from the base's, and there are no rules for the family.
        """
        family = OptimizerFamily(family)
        found: dict[str, Scale] = {}
        for name, parameter in self.parameters.items():
            if parameter.role is Role.FROZEN:
                found[name] = Scale(multiplier=self.folded_factors.get(name, 1.0))
                continue
            row = parameter.role, parameter.ratios, family, self.richness, self.parameterization, parameter.variant
            entry = scale(*row)
            if parameter.constant_ratio != 1 and TABLES[self.parameterization].scales_optimizer:
                entry = replace(entry, multiplier=1 / parameter.constant_ratio).folded(family)
            entry = replace(entry, multiplier=self.folded_factors.get(name, 1.0))
            found[name] = self.matched.into(name, self.horizon.scaled(entry, family))
        return found

    def check(self, module: nn.Module) -> None:
        """Refuse a module that the plan was not made for, with the parameters that are missing, extra or of other shapes."""
        shapes = {name: tuple(parameter.shape) for name, parameter in planned_parameters(module).items()}
        left_alone = {name for name, parameter in self.parameters.items() if parameter.role is Role.FROZEN}
        found = [f"{name} is in the plan only" for name in self.parameters if name not in shapes.keys() | left_alone]
        found += [f"{name} is in the module only" for name in shapes if name not in self.parameters]
        found += [
            f"{name} is {list(shapes[name])} in the module and {list(parameter.shape)} in the plan"
            for name, parameter in self.parameters.items()
            if name in shapes and shapes[name] != parameter.shape
        ]
        if found:
            raise ValueError(
                f"The plan was not made for this {type(module).__name__}: {listed(found, 8, '; ')}. Make a plan of "
                "this module with Plan.from_model(...), or use the module that the plan was made for."
                f"{advice_on_names([*shapes, *self.parameters])}"
            )

    def save(self, path: str | PathLike[str]) -> None:
        """Write the plan as YAML that a person can read and edit; an older file stays until the new one is complete.

        Raises:
            OSError: if it cannot be written.
            BlockingIOError: if another process is writing another plan there at this moment.
        """
        path, content = Path(path), self.to_yaml().encode()
        if path.exists() and not path.is_file():
            write_whole({path: content})  # to a device or a pipe
            return
        try:
            lock = WriterLock(path)
        except BlockingIOError:
            with WriterLock(path, wait=True):
                if path.exists() and path.read_bytes() == content:
                    return  # as where every process of a run saves its plan
            raise
        with lock:
            write_whole({path: content})

    @classmethod
    def load(cls, path: str | PathLike[str]) -> Plan:
        """Read a plan that ``save`` wrote.

        Raises:
            OSError: if there is no such file, or it cannot be read.
            ValueError: if the file does not hold a plan, saying where it goes wrong.
        """
        return cls.from_yaml(read_text(path), str(path))

    def to_yaml(self) -> str:
        """Return the text that ``save`` writes."""
        return parts_to_yaml({part.name: getattr(self, part.name) for part in fields(self)})

    @classmethod
    def from_yaml(cls, text: str, source: str) -> Plan:
        """Read what ``to_yaml`` wrote; errors name the source."""
        parts = parts_from_yaml(text, source)
        try:
            return cls(**parts)
        except ValueError as error:
            raise ValueError(f"{source}: {error}") from error

    def table(self, family: OptimizerFamily | str = OptimizerFamily.ADAMW, width: int = 125) -> str:
        """Draw the plan as a table for one family of optimizers, in so many columns."""
        family = OptimizerFamily(family)
        return draw_plan(
            headline(self.parameterization, self._absolute, self.richness, self.horizon, family),
            self.streams,
            self.distances,
            self.parameters,
            self.scales(family),
            self.branches,
            {multiplier: self.forward_multiplier(multiplier) for multiplier in self.multipliers},
            self.own_constants,
            self.advice,
            self.tuned,
            width,
        )

    def __str__(self) -> str:
        return "\n\n".join(map(self.table, self.optimizers or (OptimizerFamily.ADAMW,)))

    @property
    def _absolute(self) -> bool:
        return any(parameter.base_shape is None for parameter in self.parameters.values())
