"""The infinite model: what a network under gradient descent becomes as D, M and L all grow.

A network of embedding dimension r = d_in + d_out, whose own W = [W_E, W_U] has WᵀW/r = S exactly, is the model of infinite D
(theory.md, section 5): an ordinary module of the same class, with the same plan. The expectation over hidden units is
sampled by those of a layer, with an error of 1/sqrt(L · units), and depth by Euler steps, with an error of 1/L.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor, nn
from torch.optim import SGD, Optimizer

from mlu_lightning.application import attach_multipliers, folded_parameters, planned_stds, scale_optimizer, stream_axis
from mlu_lightning.limit.unit_sampling import Sampling, draw_units, exact_units
from mlu_lightning.models import CausalTransformer, ResNet
from mlu_lightning.planning import Plan
from mlu_lightning.table import OptimizerFamily, Parameterization, Role
from mlu_lightning.utilities.names import name_pattern, planned_parameters

HYPERPARAMETERS = "lr", "momentum", "dampening", "weight_decay", "nesterov"  # of torch.optim.SGD
_SAMPLED = 1024  # hidden units of a branch by default


@dataclass(frozen=True)
class InfiniteModel:
    """A network that is the model of infinite D, at its initialization."""

    module: ResNet | CausalTransformer  # of embedding dimension r, with its multipliers attached
    plan: Plan
    spread: Tensor  # standard deviations S^(1/2) of the entries of W, [r]

    def optimizer(self, lr: float, momentum: float = 0.0, weight_decay: float = 0.0) -> SGD:
        """Make gradient descent for the module, scaled by its plan, with the hyperparameters of the finite model."""
        trained = [parameter for parameter in self.module.parameters() if parameter.requires_grad]
        optimizer = SGD(trained, lr, momentum, weight_decay=weight_decay)
        scale_optimizer(optimizer, self.module, self.plan)
        return optimizer

    def in_coordinates_of(self, weights: Tensor, streams: Tensor) -> Tensor:
        """Find where the stream of a finite model tends to: W a, with a = S^(-1/2) h'/sqrt(r) (theory.md, section 5).

        Args:
            weights: W of the finite model before it was trained, [D, r], from :func:`embedding_weights`.
            streams: Streams h' of this model, [..., r]; those of the finite model, [..., D], are returned.
        """
        spread = self.spread.to(streams)
        return streams / (spread * math.sqrt(len(spread))) @ weights.to(streams).T


def infinite_model(
    module: nn.Module,
    plan: Plan,
    depth: int | None = None,
    units: int | None = None,
    heads: int | None = None,
    sampling: Sampling = "orthogonal",
    seed: int = 0,
) -> InfiniteModel:
    """Build the model of infinite D of a module: its class at embedding dimension r, with W of the exact covariance.

    It is trained as the module is, on the same batches, by :meth:`InfiniteModel.optimizer` with its hyperparameters.

    Args:
        module: :class:`~mlu_lightning.models.ResNet`, or a :class:`~mlu_lightning.models.CausalTransformer` without
            gains of norms, at its initial weights. The limit is on its device, in its precision, but float32 at least.
        plan: Plan of the module, with the standard deviations of the limit's entries.
        depth: Residual additions, the Euler steps of the limit, by default the module's own.
        units: Hidden units of a perceptron branch, by default 1024; for a linear activation 2r, which are exact.
        heads: Heads of an attention branch. By default units / (4 · head_dim).
        sampling: Sampling of units: ``"orthogonal"``, with less noise, or ``"independent"``.
        seed: Seed of the units.

    Raises:
        ValueError: If it is not known how to build the module's limit, if the theory does not hold for it (gains of
            norms), or if a size is not one that the limit can have.

    >>> model = ResNet(depth=2, hidden=64, embedding=32, inputs=3, outputs=2)
    >>> limit = infinite_model(model, Plan.from_model(model), depth=8, units=100)
    >>> limit.module.embed.weight.shape, limit.module.blocks[7].read.weight.shape
    (torch.Size([5, 3]), torch.Size([100, 5]))
    >>> w = embedding_weights(limit.module, limit.plan)
    >>> torch.allclose(w.T @ w / 5, limit.spread.diag() ** 2)  # S
    True
    """
    _check_known(module, plan)
    stds = planned_stds(plan)
    weights = _matrices(module, plan)
    dimension = sum(weight.shape[1] for weight in weights.values())
    hyperparameters: Any = module.hparams
    arguments = {name: value for name, value in hyperparameters.items() if name != "_instantiator"}  # of LightningCLI
    exact = arguments.get("activation") == "positive" and units is None
    units = (2 * dimension if exact else _SAMPLED) if units is None else units
    with isolate_rng():
        built = _BUILDERS[type(module)](arguments, depth, units, heads, dimension)
    first = next(module.parameters())
    dtype = torch.promote_types(first.dtype, torch.float32)
    built.to(first.device, dtype)
    limit_plan = _planned_alike(built, plan)
    frozen = {name_pattern(name): not parameter.requires_grad for name, parameter in planned_parameters(module).items()}
    for name, parameter in planned_parameters(built).items():
        parameter.requires_grad_(not frozen[name_pattern(name)])
    sizes = {name: matrix.shape[1] for name, matrix in weights.items()}
    spread = torch.cat([torch.full((size,), stds[name] or 0.0, dtype=dtype) for name, size in sizes.items()])
    with torch.no_grad():
        columns = torch.split(math.sqrt(dimension) * spread.diag(), [*sizes.values()], 1)
        for matrix, wanted in zip(_matrices(built, limit_plan).values(), columns, strict=True):
            matrix.copy_(wanted)
        generator = torch.Generator().manual_seed(seed)
        _fill(built, limit_plan, None if exact else sampling, generator)
    attach_multipliers(built, limit_plan)
    return InfiniteModel(built, limit_plan, spread)


def embedding_weights(module: nn.Module, plan: Plan) -> Tensor:
    """Copy W = [W_E, W_U] of a module: columns that its stream starts with and is read by (theory.md, section 5).

    Args:
        module: Module with its multipliers attached or folded, or without.
        plan: Plan of the module, whose order W [D, r] has, embeddings before readouts and without folded multipliers.

    >>> model = ResNet(depth=2, hidden=8, embedding=6, inputs=3, outputs=2)
    >>> embedding_weights(model, Plan.from_model(model)).shape
    torch.Size([6, 5])
    """
    folded = _folded_multipliers(module, plan)
    return torch.cat([matrix.detach() / folded[name] for name, matrix in _matrices(module, plan).items()], 1)


def check_gradient_descent(optimizers: Sequence[Optimizer]) -> None:
    """Refuse what is not one ``torch.optim.SGD`` with the same hyperparameters for all parameters."""
    names = " and ".join(type(optimizer).__name__ for optimizer in optimizers) or "none"
    if names != "SGD":
        raise ValueError(
            f"The infinite model is that of gradient descent (torch.optim.SGD), and this run has {names}: "
            "updates of another form leave the span of embedding and readout, and theory has no limit for them. Train with "
            "SGD, or compare with a large run that ReferenceRecorder recorded."
        )
    first, *others = optimizers[0].param_groups
    if any(group[key] != first[key] for group in others for key in HYPERPARAMETERS) or first["maximize"]:
        raise ValueError(
            "The infinite model is trained with one learning rate, momentum and weight decay for all parameters, and the "
            f"optimizer of this run has {len(others) + 1} groups with different ones, or maximizes. Give all parameters the "
            "same, or compare with a large run that ReferenceRecorder recorded."
        )


def check_initialization(module: nn.Module, plan: Plan) -> None:
    """Refuse initial weights whose root mean square is further from the plan's than that of a normal draw can be."""
    folded, stds = _folded_multipliers(module, plan), planned_stds(plan)
    for name, parameter in planned_parameters(module).items():
        planned = stds[name]
        if plan.parameters[name].role not in _ROLES or not planned:
            continue  # infinite_model refuses those that start at zero
        found = parameter.detach().double().square().mean().sqrt().item()
        planned *= folded[name]
        spread = 6 / math.sqrt(2 * parameter.numel())  # of the logarithm, so that too small is seen as too large is
        if not (found > 0 and abs(math.log(found / planned)) <= spread):
            raise ValueError(
                f"{name} has entries of root mean square {found:.3g}, and the plan's initialization has {planned:.3g}, so "
                "the infinite model, which starts from the plan's, is not the limit of this run. Begin with weights that "
                'were just built, with MLUCallback(init="rescale"), "normal" or "coupled".'
            )


_ROLES = (Role.EMBEDDING, Role.BRANCH_IN, Role.BRANCH_OUT, Role.READOUT)
_RECORD = "compare with a large run that ReferenceRecorder recorded"


def _folded_multipliers(module: nn.Module, plan: Plan) -> dict[str, float]:
    """What every parameter holds of its multiplier: all of it, or 1."""
    folded, scales = folded_parameters(module), plan.scales(OptimizerFamily.SGD)
    return {name: scale.multiplier if name in folded else 1.0 for name, scale in scales.items()}


def _check_known(module: nn.Module, plan: Plan) -> None:
    if type(module) not in _BUILDERS:
        raise ValueError(
            f"The infinite model of {type(module).__name__} is not known: it is of this package's ResNet and "
            f"CausalTransformer alone, because it needs a module of other sizes. Use one of these, or {_RECORD}."
        )
    plan.check(module)
    for name, parameter in planned_parameters(module).items():
        role = plan.parameters[name].role
        if role not in _ROLES and (parameter.requires_grad or bool((parameter != 1).any())):
            raise ValueError(
                f"{name} is a {role}, and the stream leaves the span of embedding and readout where its coordinates have "
                f"gains of their own: theory has no infinite model with them. Build CausalTransformer(norm_gains=False), or "
                f"{_RECORD}."
            )
    patterns = {(name_pattern(name), parameter.requires_grad) for name, parameter in planned_parameters(module).items()}
    mixed = Counter(pattern for pattern, _ in patterns).most_common(1)
    if mixed and mixed[0][1] > 1:
        raise ValueError(
            f"Some of {mixed[0][0]} are frozen and some are not, which the infinite model of another depth cannot be. "
            f"Freeze all of them or none, or {_RECORD}."
        )
    stds = planned_stds(plan)
    for name, planned in plan.parameters.items():
        if planned.role in _ROLES and not stds[name]:
            raise ValueError(
                f"{name} starts at {'zero' if stds[name] == 0 else 'a size that the plan does not know'}, and the infinite "
                "model needs entries with a standard deviation. Plan relative to a base module whose weights are not zero, "
                "or write base_std into the saved plan."
            )


def _matrices(module: nn.Module, plan: Plan) -> dict[str, Tensor]:
    parameters = planned_parameters(module)
    return {
        name: parameters[name].movedim(stream_axis(name, planned), 0).flatten(1)
        for role in (Role.EMBEDDING, Role.READOUT)
        for name, planned in plan.parameters.items()
        if planned.role is role
    }


def _resnet(own: dict[str, Any], depth: int | None, units: int, heads: int | None, dimension: int) -> nn.Module:
    return ResNet(**{**own, "depth": depth or own["depth"], "hidden": units, "embedding": dimension})


def _transformer(own: dict[str, Any], depth: int | None, units: int, heads: int | None, dimension: int) -> nn.Module:
    perceptrons = own["mlp_hidden"] != 0
    additions = 2 if perceptrons else 1
    if depth is not None and depth % additions:
        raise ValueError(
            f"depth={depth} of the infinite model is no even number, but its stream has as many additions of attention as "
            "of perceptrons. Give an even depth."
        )
    sizes = {
        "depth": own["depth"] if depth is None else depth // additions,
        "heads": 2 * math.ceil(units / (8 * own["head_dim"])) if heads is None else heads,
        "mlp_hidden": units if perceptrons else 0,
        "embedding": dimension,
    }
    return CausalTransformer(**{**own, **sizes})


_BUILDERS: Mapping[type[nn.Module], Callable[..., Any]] = {ResNet: _resnet, CausalTransformer: _transformer}


def _planned_alike(built: nn.Module, plan: Plan) -> Plan:
    """Plan of the infinite model, with the standard deviations of the finite one's, which may have been edited."""
    if plan.tuned:
        raise ValueError(
            "The plan has tuned factors, and the infinite model is that of the table's numbers: make the plan without "
            f"tuned=..., or {_RECORD}."
        )
    if plan.parameterization != Parameterization.MLU or not plan.horizon.is_identity:
        raise ValueError(
            f"The plan has parameterization={plan.parameterization.value!r}, batch_ratio="
            f"{plan.horizon.batch_ratio:g} and token_ratio={plan.horizon.token_ratio:g}. The infinite model is that of "
            "the MLU parameterization under gradient descent: make the plan with parameterization='mlu' and without "
            f"these ratios, or {_RECORD}."
        )
    own = Plan.from_model(built, base=plan if plan.base is not None else None, alpha=plan.alpha)
    squares: dict[str, list[float]] = {}
    for name, parameter in plan.parameters.items():
        if parameter.base_std is not None:
            squares.setdefault(name_pattern(name), []).append(parameter.base_std**2)
    stds = {pattern: math.sqrt(math.fsum(values) / len(values)) for pattern, values in squares.items()}
    parameters = {name: replace(p, base_std=stds.get(name_pattern(name))) for name, p in own.parameters.items()}
    return replace(own, parameters=parameters)


def _fill(module: nn.Module, plan: Plan, sampling: Sampling | None, generator: torch.Generator) -> None:
    """Give branches units that are draws from the infinite population, or the exact ones of a linear activation."""
    parameters, stds = planned_parameters(module), planned_stds(plan)
    members: dict[int, dict[str, Tensor]] = {}  # what each unit has in a matrix, by branch and name of the matrix
    for role, axis in ((Role.BRANCH_IN, 0), (Role.BRANCH_OUT, 1)):
        for name, planned in plan.parameters.items():
            if planned.branch is not None and planned.role is role:
                moved = parameters[name].movedim(axis, 0)
                units = plan.branches[planned.branch].hidden
                members.setdefault(planned.branch, {})[name] = moved.view(units, -1, moved.shape[1])
    for _, rows in sorted(members.items()):
        sizes = [row[0].numel() for row in rows.values()]
        if sampling is None:
            drawn = exact_units(sizes[0])
        else:
            units = len(next(iter(rows.values())))
            drawn = draw_units(units, sum(sizes) - sizes[-1], sizes[-1], sampling, generator)
        for (name, row), values in zip(rows.items(), torch.split(drawn, sizes, 1), strict=True):
            row.copy_(values.view(row.shape) * (stds[name] or 0.0))
