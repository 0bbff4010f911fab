"""A key in the state dict of a module with multipliers in hooks, which makes a plain module refuse to load it.

A plain module of the same class, which would be another function with these weights, refuses the key in a strict load, also
where this package is not installed. A module that has its multipliers in hooks takes it out.

Loads that take no notice of a key too much, ``strict=False`` and those of ``torch.distributed.checkpoint``, see nothing,
where the module is plain; where it has multipliers, they warn (:func:`_take_out`).
What would stop them changes a key that they ask for: a weight of another shape, an error in both, or under another name, an
error in the second. But then state dicts would not be what averages, ``functional_call`` and other readers take them for,
nor could ``load_from_checkpoint(path, strict=False)`` go before ``restore_multipliers``. Only weights that no multiplier is
beside are safe there: of folded runs without such hooks, and of baked modules.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from mlu_lightning.application.applied import residual_state

# without dots, because torch takes what is before one for the name of a submodule
MARK = (
    "multipliers_of_mlu_lightning_are_missing_here__load_with_MLUCallback_or_restore_multipliers__or_bake_before_saving"
)


_PRETRAINED = "save_pretrained"  # what it writes is loaded by from_pretrained, which takes no notice of a key too much


def _refuse_to_save(*_: Any, **__: Any) -> None:
    """In the place of a part's ``save_pretrained``; a function that pickles and copies find, and not a method."""
    raise ValueError(
        "The model has multipliers in hooks, which are not among what save_pretrained writes, so from_pretrained would make "
        "another function of its weights. Put them into the weights first, bake(module, plan), with callback.plan as the "
        "plan, or into those of a copy, bake(copy.deepcopy(module), plan), and save that. Checkpoints of the Trainer need "
        "no such thing."
    )


def mark_states(module: nn.Module, targets: Iterable[nn.Module]) -> list[RemovableHandle]:
    """Let state dicts of a module, and of its parts with targets inside, say that these multiply; and let it load them."""
    named, wanted = dict(module.named_modules(remove_duplicate=False)), {*targets}
    marked: dict[nn.Module, None] = {}
    for name, part in named.items():
        if part in wanted:
            steps = name.split(".") if name else []
            marked.update({named[".".join(steps[:end])]: None for end in range(len(steps) + 1)})
    hooks = []  # torch has no types for what registers them
    for part in dict.fromkeys((module, *marked)):
        hooks.append(part.register_load_state_dict_pre_hook(_take_out))  # type: ignore[no-untyped-call]
    for part in marked:
        hooks.append(part.register_state_dict_post_hook(_put_in))  # type: ignore[no-untyped-call]
        # torch.distributed.checkpoint and functional_call look for an attribute by the name of every key
        vars(part)[MARK] = _value("cpu")
        if callable(getattr(type(part), _PRETRAINED, None)):
            vars(part).setdefault(_PRETRAINED, _refuse_to_save)
    return hooks


def unmark_states(module: nn.Module) -> None:
    """Forget what :func:`mark_states` did, besides its hooks."""
    for part in module.modules():
        vars(part).pop(MARK, None)
        if vars(part).get(_PRETRAINED) is _refuse_to_save:
            del vars(part)[_PRETRAINED]


def state_hooks(module: nn.Module) -> tuple[dict[int, Any], ...]:
    """Where a module has hooks of its state dict and of loading one."""
    return module._state_dict_hooks, module._load_state_dict_pre_hooks


def is_state_hook(hook: Any) -> bool:
    """Tell whether a hook is one that :func:`mark_states` has registered."""
    function = getattr(hook, "hook", hook)  # torch wraps those before loading
    return function is _put_in or function is _take_out


def without_mark(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return a state dict as that of a plain module."""
    return {name: value for name, value in state.items() if not _is_mark(name)}


def is_marked(state: dict[str, Any]) -> bool:
    """Tell whether a state dict is of a module whose multipliers act outside of its weights."""
    return any(map(_is_mark, state))


def add_mark(state: dict[str, Any]) -> None:
    """Mark a state dict, also where its mark was lost because a module chooses or renames what it saves."""
    if not is_marked(state):
        state[MARK] = _value("cpu")


def adapt_mark(module: nn.Module, state: dict[str, Any]) -> None:
    """Give a state dict, whose multipliers the module is known to have, the mark that the module will load."""
    for name in [name for name in state if _is_mark(name)]:
        del state[name]
    if MARK in vars(module):
        state.update({name: value for name, value in module.state_dict().items() if _is_mark(name)})


def _is_mark(name: str) -> bool:
    return name.rpartition(".")[2] == MARK


def _value(device: torch.device | str) -> Tensor:
    """A number that stays 1 in averages, and of which there are products, means and maxima, as some do of all values."""
    return torch.ones((), dtype=torch.float32, device=device)


def _put_in(module: nn.Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:
    """State-dict hook: the outermost part has the key, and no part inside of it."""
    for name in [name for name in state if name.startswith(prefix) and _is_mark(name)]:
        del state[name]
    parameter = next(module.parameters(), None)
    state[prefix + MARK] = _value("cpu" if parameter is None else parameter.device)


def _take_out(module: nn.Module, state: dict[str, Any], prefix: str, metadata: Any, *_: Any) -> None:
    """Hook before loading: the key is known to a module that multiplies, and said to be missing, or too much, otherwise."""
    multiplies, marked = MARK in vars(module), prefix + MARK in state
    if multiplies:
        state.pop(prefix + MARK, None)
    if residual_state(module) is None and prefix:
        return  # a part, about which the whole that is loaded says it
    if multiplies and not marked:
        rank_zero_warn(
            "The weights that are loaded are not marked as those of a module with multipliers in hooks, as this one is, so "
            "they are multiplied twice if they hold theirs, and another function than in a plain module. Load them into a "
            "module that was built anew, unless you mean this, or they are of an older version."
        )
    if marked and not multiplies:  # whether it is an error that follows, as in a strict load, is not told here
        rank_zero_warn(
            "The weights that are loaded are those of a module with multipliers in hooks, and this one has its multipliers "
            "in its weights, so it is another function than they were trained as. Load them into a module that was built "
            "anew, with restore_multipliers(module, checkpoint)."
        )
