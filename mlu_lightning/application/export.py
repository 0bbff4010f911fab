"""Export a trained module as a plain one of the same function, and load the checkpoints of a run."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn

from mlu_lightning.application.applied import Applied
from mlu_lightning.application.checkpoint import apply_saved, load_weights, saved_plan
from mlu_lightning.application.multipliers import fold_steps, state_with
from mlu_lightning.application.state_mark import adapt_mark
from mlu_lightning.application.transaction import Step, change, loading, multiplication, settle
from mlu_lightning.discovery.structure import Site
from mlu_lightning.planning import Multiplier, Plan
from mlu_lightning.utilities.checkpoint_files import read_checkpoint
from mlu_lightning.utilities.lightning_namespaces import of_both
from mlu_lightning.utilities.names import listed, original_module, planned_parameters, planned_part

ModuleT = TypeVar("ModuleT", bound=nn.Module)


def bake(module: ModuleT, plan: Plan) -> ModuleT:
    """Put all multipliers of a trained module into its weights, so that it is a plain module of the same function.

    No hook is left, and checkpoints of it load without this package: ``model.save_pretrained(...)`` of a Hugging Face
    model (bake the LightningModule, save its attribute) and ``from_pretrained`` elsewhere give the same outputs, exactly
    where factors are powers of two, else but for rounding. What :func:`mlu_lightning.fold` leaves as hooks (theory.md,
    section 3) goes into the weights too: those of readouts tied to embeddings, into the norm before them, so that they
    stay tied; where that has no gain, and Hugging Face's ``tie_word_embeddings`` ties them, it becomes False; of branches
    that end in a norm whose gain is stored minus one, as Gemma's; and of attention logits whose queries are a part of a
    fused projection. Baked twice, a module stays as it is; checkpoints of its Trainer
    say that nothing is left to multiply. To train on with the same plan, go on from a checkpoint of the run instead.

    Args:
        module: module with the plan's multipliers (after loading a checkpoint: :func:`restore_multipliers`); changed in
            place and returned.
        plan: its plan, such as ``MLUCallback.plan`` after ``fit``.

    Raises:
        ValueError: if the plan's multipliers are not in the module, or one has no weight. Nothing was changed then.

    >>> from mlu_lightning import attach_multipliers
    >>> from mlu_lightning.models import ResNet
    >>> base, model = (ResNet(depth, hidden=16, embedding=8, inputs=3, outputs=2) for depth in (1, 4))
    >>> plan = Plan.from_model(model, (torch.ones(4, 3), torch.ones(4, 2)), base=base)
    >>> handle = attach_multipliers(model, plan)
    >>> x = torch.randn(5, 3)
    >>> outputs = model(x)
    >>> plain = ResNet(depth=4, hidden=16, embedding=8, inputs=3, outputs=2)
    >>> loaded = plain.load_state_dict(bake(model, plan).state_dict())
    >>> torch.equal(plain(x), outputs)
    True
    """
    plain = original_module(module)
    applied = state_with(plain, plan)
    if applied.mode == "baked":
        return module
    plan.check(plain)
    # first what is found in weights as they are
    own = [step for m, factor in applied.acting.items() if not m.folds for step in _steps(plain, plan, m, factor)]
    steps = fold_steps(plain, plan) if applied.mode == "hook" else []
    folded = replace(applied, mode="fold")
    # a module of which nothing is left to put into weights stays a folded one
    change(plain, Applied(plan, "baked") if folded.acting else folded, steps + own, attach=False)
    return module


def restore_multipliers(module: nn.Module, checkpoint: Mapping[str, Any] | str | Path) -> Plan:
    """Load a checkpoint's weights into a module, with the multipliers of its run where they were, and return the run's plan.

    A checkpoint whose weights hold all multipliers, as ``MLUCallback`` makes them where it can, needs this only to be
    trained on or baked. Where some are outside of the weights, its ``state_dict`` has a key more, which a plain module
    refuses, as it would be another function; here, and in a ``Trainer`` with ``MLUCallback``, it is taken out. Loads with
    ``strict=False``, and by ``torch.distributed.checkpoint`` into a plain module, take no notice of it: :func:`bake` first.

    Args:
        module: LightningModule to be loaded into, built anew, or by ``load_from_checkpoint(path, strict=False)``, which
            finds its hyperparameters and warns about the key.
        checkpoint: path of a Trainer's checkpoint, also with ``save_weights_only``, or what is in it. Of a path nothing is
            executed, and objects among the hyperparameters are no hindrance.

    Raises:
        OSError: if there is no file at the path, or it cannot be read.
        ValueError: if the checkpoint is damaged, or of a run without ``MLUCallback``, or of another module, or if this one
            has multipliers.

    >>> from mlu_lightning import fold
    >>> from mlu_lightning.application.checkpoint import write_plan  # as the Trainer of a run with MLUCallback does
    >>> from mlu_lightning.models import ResNet
    >>> base, model, loaded = (ResNet(depth, hidden=16, embedding=8, inputs=3, outputs=2) for depth in (1, 4, 4))
    >>> model = fold(model, Plan.from_model(model, (torch.ones(4, 3), torch.ones(4, 2)), base=base))
    >>> checkpoint = {"state_dict": model.state_dict()}
    >>> write_plan(model, checkpoint)
    >>> plan = restore_multipliers(loaded, checkpoint)
    >>> torch.equal(bake(loaded, plan)(torch.ones(1, 3)), model(torch.ones(1, 3)))
    True
    """
    found = read_checkpoint(checkpoint) if isinstance(checkpoint, (str, Path)) else checkpoint
    saved, content = saved_plan(found), dict(found or {})
    if saved is None:
        raise ValueError(
            "The checkpoint has no plan, because no Trainer wrote it of a module with multipliers of MLUCallback. Load a "
            "saved plan, with Plan.load(path), and put its multipliers in with attach_multipliers(module, plan), or with "
            "fold(module, plan, multiplied=True) if the weights hold them."
        )
    plain = original_module(module)
    settle(plain)
    with loading(plain):
        plan = apply_saved(plain, saved)
        if "state_dict" in content:
            content["state_dict"] = dict(content["state_dict"])
            if isinstance(plain, of_both(LightningModule)):
                plain.on_load_checkpoint(content)  # which may change it, as when Lightning loads
            adapt_mark(plain, content["state_dict"])
            load_weights(plain, content["state_dict"])
    return plan


_LARGEST_ERROR = 2**-10  # a quarter of what bfloat16 rounds any weight by


def _steps(module: nn.Module, plan: Plan, multiplier: Multiplier, factor: float) -> list[Step]:
    """Find what puts a multiplier into weights that fold leaves to a hook."""
    site = multiplier.site
    assert site is not None  # there is a hook
    target = planned_part(module, site.module)
    if multiplier.gains:  # the tie stays, as the code of the model makes it
        named = planned_parameters(module)
        if missing := [name for name in multiplier.gains if name not in named]:
            raise ValueError(
                f"The plan has parameters that the module does not have: {listed(missing)}. Plan it again."
            )
        return [multiplication(named[name], factor) for name in multiplier.gains]
    if multiplier.kind == "readout":
        return [_untied(module, multiplier, target, factor)]
    if site.part is not None:
        return _part(target, site, plan, multiplier, factor)
    gain = _offset_gain(target) if site.where == "output" and site.index is None else None
    if gain is None:
        raise ValueError(
            f"The multiplier of the {multiplier.kind} {multiplier.name!r}, at {site}, cannot be put into weights, because "
            f"no weight of {type(target).__name__} multiplies its output and nothing else. Let the model's own forward "
            f"multiply there by {factor:g}, and take the hooks off with .remove() of what attach_multipliers returned."
        )
    wanted = factor * (1 + gain.detach().double())
    error = float(((1 + (wanted - 1).to(gain.dtype).double()) / wanted - 1).abs().nan_to_num().max())
    if error > _LARGEST_ERROR:
        raise ValueError(
            f"The multiplier {factor:g} of the {multiplier.kind} {multiplier.name!r} would go into the gain at {site}, "
            f"which is stored minus one, and in {str(gain.dtype).removeprefix('torch.')} the result would be wrong by up "
            f"to {error:.1%}. Make the weights more precise first, with module.float()."
        )
    return [lambda: partial(gain.copy_, (wanted - 1).to(gain.dtype))]


def _part(target: nn.Module, site: Site, plan: Plan, multiplier: Multiplier, factor: float) -> list[Step]:
    """Multiply those outputs of a projection that are queries."""
    assert site.part is not None
    start, stop = site.part
    prefix = f"{site.module}." if site.module else ""
    parts, fits = [], True
    for name, parameter in target.named_parameters(recurse=False):
        planned = plan.parameters.get(prefix + name)
        axis = parameter.dim() - 1 if planned is not None and planned.transposed else 0
        size = parameter.shape[axis]
        period = site.period or size
        if size < stop or size % period:
            fits = False
        else:
            parts.append(torch.unflatten(parameter, axis, (-1, period)).narrow(axis + 1, start, stop - start))
    # nn.MultiheadAttention, whose own weights these are, has its output projection in a submodule
    if not parts or not fits or (site.where == "output" and (site.index is not None or [*target.children()])):
        raise ValueError(
            f"The multiplier of the {multiplier.kind} {multiplier.name!r}, at {site}, cannot be put into weights, because "
            f"{type(target).__name__} is not one projection. Keep head_dim at the base's value, or multiply the queries "
            f"by {factor:g} in the model's own code."
        )
    return [multiplication(part, factor) for part in parts]


def _offset_gain(module: nn.Module) -> nn.Parameter | None:
    """The gain of a norm that multiplies by 1 + gain, None if the module computes something else."""
    parameters = [*module.parameters()]
    gain = parameters[0] if len(parameters) == 1 else None
    if gain is None or gain.dim() != 1 or gain.is_meta or not gain.is_floating_point():
        return None
    copied = copy.deepcopy(module).eval()
    (own,) = copied.parameters()
    probe = torch.linspace(-1, 2, 3 * len(gain), device=gain.device).reshape(3, -1).to(gain.dtype)
    outputs = []
    for value in (-1.0, 0.0, 1.0):
        with torch.no_grad():
            own.fill_(value)
            try:
                outputs.append(copied.forward(probe))  # not copied(probe), which would call hooks
            except TypeError:
                return None  # it takes something else than a stream
    none, once, twice = outputs
    if not isinstance(once, Tensor) or not once.any():
        return None
    proportional = not none.any() and torch.allclose(twice, 2 * once, rtol=4 * torch.finfo(gain.dtype).eps, atol=0)
    return gain if proportional else None


def _untied(module: nn.Module, multiplier: Multiplier, head: nn.Module, factor: float) -> Step:
    """Give a tied readout a weight of its own, multiplied, and let its model's config say so."""
    assert multiplier.site is not None
    shared = module.get_parameter(multiplier.name)
    embedding = planned_part(module, multiplier.name.rpartition(".")[0])
    own = [name for name, parameter in head.named_parameters(recurse=False) if parameter is shared]
    model = _tying_model(module, multiplier.site.module)
    if multiplier.site.where != "input" or not own or head is embedding or model is None:
        raise ValueError(
            f"The readout {multiplier.name!r} is tied to an embedding, so its multiplier {factor:g} cannot be put into the "
            "weight, and no norm with a gain makes what it reads. A weight of its own would be lost where the model's code "
            f"ties it again. Multiply the readout's input by {factor:g} in that code, and take the hooks off with .remove() "
            "of what attach_multipliers returned."
        )
    lasting = _lasting_untied(model)
    if not lasting and "missing_keys" not in inspect.signature(model.tie_weights).parameters:
        raise ValueError(
            f"{type(model).__name__} cannot be told by its config that the readout {multiplier.name!r} is not tied, and "
            "this version of transformers ties weights that differ. Use transformers 5 or later."
        )

    def untie(weight: nn.Parameter) -> None:
        setattr(head, own[0], weight)
        if lasting:
            _untie_all(model)
            model.config.tie_word_embeddings = False

    return lambda: partial(untie, nn.Parameter(shared.detach() * factor, shared.requires_grad))


def _tying_model(module: nn.Module, name: str) -> Any:
    """The innermost model around a submodule whose config ties embeddings, None if there is none."""
    while name:
        name = name.rpartition(".")[0]
        found = module.get_submodule(name)
        if getattr(getattr(found, "config", None), "tie_word_embeddings", False) is True:
            return found
    return None


def _lasting_untied(model: Any) -> bool:
    """Whether ``tie_word_embeddings=False`` is read back from a saved config, and only says what is tied."""
    # T5 reads True from every config, and some models scale their outputs by that setting
    config = copy.deepcopy(model.config)
    config.tie_word_embeddings = False
    kept = type(config).from_dict(config.to_dict()).to_dict() == config.to_dict()
    forwards = (inspect.unwrap(type(submodule).forward) for submodule in model.modules())
    codes = (getattr(forward, "__code__", None) for forward in forwards)
    return kept and not any("tie_word_embeddings" in code.co_names for code in codes if code is not None)


def _untie_all(model: nn.Module) -> None:
    """Give everything that the model's config ties a weight of its own, because the config will not tie it again."""
    first = dict(model.named_parameters())
    for name, parameter in list(model.named_parameters(remove_duplicate=False)):
        if name not in first:
            owner, _, attribute = name.rpartition(".")
            own = nn.Parameter(parameter.detach().clone(), parameter.requires_grad)
            setattr(model.get_submodule(owner), attribute, own)
