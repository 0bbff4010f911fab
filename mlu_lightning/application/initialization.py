"""Initialize a freshly built module with the standard deviations of its plan."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Literal, TypeVar, get_args

import torch
from torch import Tensor, nn

from mlu_lightning.application.applied import folded_parameters, residual_state
from mlu_lightning.application.transaction import Step, change, multiplication, settle
from mlu_lightning.planning import ParameterPlan, Plan, std_groups
from mlu_lightning.table import Role
from mlu_lightning.utilities.names import listed, original_module, planned_parameters

ModuleT = TypeVar("ModuleT", bound=nn.Module)

InitMode = Literal["rescale", "normal", "coupled"]


def initialize(module: ModuleT, plan: Plan, mode: InitMode = "rescale", seed: int = 0) -> ModuleT:
    """Set the scale of a freshly built module's parameters: the base's initial std times the table's factor.

    ``branch_in`` d^(-1/2), ``branch_out`` d^(1/2)/m, and so on (theory.md, section 3). Weights that are zero stay zero,
    buffers are left alone, and a parameter without ``base_std``, or in what is left alone (``frozen``), stays as built.

    Args:
        module: module with its initial weights, before multipliers are folded into them; changed in place and returned.
        plan: its plan.
        mode: ``"rescale"`` multiplies every parameter by one number, so that the form of its distribution stays
            (uniform, orthogonal, ...), leaves those that require no gradient, which may hold constants or loaded weights,
            and leaves a module of the base's shape alone, bit for bit. ``"normal"`` draws
            every matrix anew from a normal distribution. ``"coupled"`` so draws embeddings and readouts, one stream
            coordinate after the other: those of dimension D are the first D of a bigger model's (theory.md, section 4).
        seed: seed of the draws, which depend on the parameter's name too and are the same on every device.

    Raises:
        ValueError: if the plan does not fit the module, if parameters have no or infinite values, if multipliers are
            folded into them already, or if ``"coupled"`` has no std or no stream axis for one. Nothing was changed then.

    >>> weight = ParameterPlan(Role.BRANCH_IN, (8, 400), (400, 8), base_fans=(100, 8), base_std=0.1)
    >>> module = initialize(nn.Linear(400, 8, bias=False), Plan({"weight": weight}, (), (), ()))
    >>> round(module.weight.square().mean().sqrt().item(), 6)  # 0.1 * 4^(-1/2)
    0.05
    """
    settle(module)
    plain = original_module(module)
    change(plain, residual_state(plain), initial_steps(plain, plan, mode, seed))
    return module


def initial_steps(module: nn.Module, plan: Plan, mode: InitMode, seed: int) -> list[Step]:
    """Find what :func:`initialize` does to each parameter."""
    if mode not in get_args(InitMode):
        raise ValueError(f"Unknown initialization {mode!r}. Use one of: {', '.join(get_args(InitMode))}.")
    plan.check(module)
    parameters = planned_parameters(module)
    _check_values(module, parameters)
    steps: list[Step] = []
    # of the whole module: what a bias is built with may depend on the fan-in of the matrix beside it
    at_base = plan.is_at_base
    for names, target in std_groups(plan):
        planned = plan.parameters[names[0]]
        group = {name: parameters[name] for name in names if name in parameters}
        if mode == "coupled" and planned.role in (Role.EMBEDDING, Role.READOUT):
            steps += _coupled(group, planned, target, seed)
        elif target is not None and mode == "normal" and planned.role.is_matrix:
            steps += _draws(group, target, seed, axis=None)
        elif target is not None and not (at_base and plan.matched.of(names[0]).std == 1):
            group = {name: parameter for name, parameter in group.items() if parameter.requires_grad}
            built = _rms(group)
            target = built * plan.matched.of(names[0]).std if at_base else target
            if built > 0 and not math.isclose(target, built, rel_tol=1e-12):
                steps += [multiplication(parameter, target / built) for parameter in group.values()]
    copies = {name: planned.copy_of for name, planned in plan.parameters.items() if planned.copy_of is not None}
    return steps + [partial(_copy, p, parameters[copies[name]]) for name, p in parameters.items() if name in copies]


def planned_stds(plan: Plan) -> dict[str, float | None]:
    """Find the root mean square of every parameter after :func:`initialize`; None for those that it leaves as built.

    >>> weight = ParameterPlan(Role.BRANCH_IN, (8, 400), (400, 8), base_fans=(100, 8), base_std=0.1)
    >>> planned_stds(Plan({"weight": weight}, (), (), ()))  # 0.1 * 4^(-1/2)
    {'weight': 0.05}
    """
    return {name: target for names, target in std_groups(plan) for name in names}


def stream_axis(name: str, planned: ParameterPlan) -> int:
    """Find the axis of an embedding or readout along which the stream's coordinates are.

    Raises:
        ValueError: if its shape does not tell; the message has its name.

    >>> stream_axis("tokens.weight", ParameterPlan(Role.EMBEDDING, (100, 8), (1, 8), (1, 1), transposed=True))
    1
    """
    shape, reads = planned.shape, planned.role is Role.READOUT
    width = planned.fans[0] if reads else planned.fans[1]
    # [outputs, inputs, ...] unless transposed, where tables may have more axes in front: [1, positions, D]
    usual = (0 if planned.transposed else 1) if reads else (len(shape) - 1 if planned.transposed else 0)
    if usual < len(shape) and shape[usual] == width:
        return usual
    axes = [axis for axis, size in enumerate(shape) if size == width]
    if len(axes) != 1:
        raise ValueError(
            f"It cannot be told which axis of {name}, of shape {list(shape)}, holds the {width} coordinates of the stream, "
            'as init="coupled" and the infinite model need. Use "rescale", "normal", or an nn.Linear or nn.Embedding there.'
        )
    return axes[0]


def _draws(group: Mapping[str, nn.Parameter], target: float, seed: int, axis: int | None) -> list[Step]:
    """Draw a group anew, except what is zero: whole parameters, or rows and columns such as that of a padding token."""
    # entries that are zero count in the root mean square, because they do at the base
    alive = {name: _alive(parameter, axis) for name, parameter in group.items() if bool(_full(parameter).any())}
    shares = [math.prod(float(slices.double().mean()) for slices in axes.values()) for axes in alive.values()]
    std = target / math.sqrt(sum(shares) / len(group)) if shares else 0.0
    return [partial(_draw, group[name], std, f"{seed}:{name}", axis, axes) for name, axes in alive.items()]


def _coupled(group: Mapping[str, nn.Parameter], planned: ParameterPlan, target: float | None, seed: int) -> list[Step]:
    if not any(bool(_full(parameter).any()) for parameter in group.values()):
        return []
    first = next(iter(group))
    if target is None:
        raise ValueError(
            f'Initialization "coupled" draws {first} anew, but the plan does not know the std of the base\'s (base_std '
            "is not given). Plan relative to a base module, write base_std into the saved plan, or use "
            '"rescale", which leaves the parameter as it was built.'
        )
    return _draws(group, target, seed, stream_axis(first, planned))


def _alive(parameter: nn.Parameter, coordinates: int | None) -> dict[int, Tensor]:
    """By axis, which slices are not all zero; axes that have no zero slice, and the stream's own, are left out."""
    nonzero = _full(parameter) != 0
    found = {}
    for axis in range(parameter.ndim):
        slices = nonzero.movedim(axis, 0).reshape(nonzero.shape[axis], -1).any(1)
        if axis != coordinates and not bool(slices.all()):
            found[axis] = slices.cpu()
    return found


def _rms(group: Mapping[str, nn.Parameter]) -> float:
    squares = 0.0
    for name, parameter in group.items():
        norm = float(_full(torch.linalg.vector_norm(parameter.detach(), dtype=torch.float64)))
        if not math.isfinite(norm):
            raise ValueError(
                f"{name} holds values that are not finite. The module has to initialize itself before the plan sets "
                "the scale; memory from to_empty() is not an initialization."
            )
        squares += norm**2 / max(1, parameter.numel())
    return math.sqrt(squares / max(1, len(group)))


def _check_values(module: nn.Module, parameters: Mapping[str, nn.Parameter]) -> None:
    if folded_parameters(module):
        raise ValueError(
            "Multipliers are folded into the weights already, so their scale is no longer the one that a plan "
            "describes. Initialize before fold(module, plan)."
        )
    empty = [name for name, parameter in parameters.items() if parameter.is_meta]
    if empty:
        raise ValueError(
            f"Parameters are on the meta device and have no values to scale: {listed(empty)}. Materialize "
            "the module and let it initialize itself first, then initialize it by the plan."
        )


def _full(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def _copy(parameter: nn.Parameter, original: nn.Parameter) -> Callable[[], object]:
    return partial(parameter.copy_, original)


def _draw(
    parameter: nn.Parameter, std: float, seed: str, axis: int | None, alive: Mapping[int, Tensor]
) -> Callable[[], object]:
    """Draw a parameter anew in float32 on the CPU, each rank its shard, coordinate by coordinate of an axis if given."""
    digest = hashlib.sha256(seed.encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little", signed=True))
    drawn = torch.empty(parameter.shape, dtype=torch.float32, device="cpu")
    if axis is None:
        drawn.normal_(generator=generator)
    else:
        for coordinate in drawn.movedim(axis, 0):
            # drawn contiguously: normal_ on a column draws otherwise than on a row
            row = torch.empty(coordinate.shape, dtype=torch.float32, device="cpu")
            coordinate.copy_(row.normal_(generator=generator))
    for dimension, slices in alive.items():
        drawn.movedim(dimension, -1).mul_(slices)
    values = drawn.to(torch.promote_types(parameter.dtype, torch.float32)).mul_(std)
    values = values.to(parameter.device, parameter.dtype)
    if hasattr(parameter, "device_mesh") and hasattr(parameter, "placements"):
        from torch.distributed.tensor import distribute_tensor  # slow to import, and whoever shards has

        values = distribute_tensor(values, parameter.device_mesh, parameter.placements)
    return partial(parameter.copy_, values)
