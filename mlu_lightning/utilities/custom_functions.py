"""Let autograd see into custom functions with a backward pass of their own, such as attentions with recomputation.

Functions whose gradients ``torch.func`` takes are in its graph once, without what their gradients do with weights.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import torch.nn.attention.flex_attention as flex
from torch import Tensor
from torch._functorch import eager_transforms
from torch._higher_order_ops.flex_attention import math_attention
from torch.autograd.function import Function, _SingleLevelFunction
from torch.nn import Parameter
from torch.overrides import _pop_mode_temporarily
from torch.utils._pytree import tree_leaves, tree_map

from mlu_lightning.utilities.autograd_nodes import nodes_below


class _Notes(SimpleNamespace):
    """What ``forward`` of a custom function is given to keep things for its backward pass, which is not run."""

    def save_for_backward(self, *tensors: Any) -> None:
        self.saved_tensors = tensors

    save_for_forward = save_for_backward

    def mark_non_differentiable(self, *tensors: Any) -> None: ...

    mark_dirty = mark_shared_storage = mark_non_differentiable

    def set_materialize_grads(self, value: bool) -> None: ...


@contextmanager
def seen_through() -> Iterator[None]:
    """Run custom functions as the operations that their ``forward`` calls, where every input with a gradient goes on.

    Others stay one node of the graph. FlexAttention is its formula, also on CPUs, where it has no backward pass.
    """

    # since torch 2.14 that of Function is no Python; what keeps an ``apply`` beside its class stays one node there
    owner: Any = _SingleLevelFunction if isinstance(vars(Function)["apply"], classmethod) else Function

    def apply(cls: Any, *args: Any, **kwargs: Any) -> Any:
        closed = cls.__module__.startswith("torch.") or torch._C._are_functorch_transforms_active()
        opened = None if closed else _opened(cls, args, kwargs)
        return super(owner, cls).apply(*args, **kwargs) if opened is None else opened

    with (
        mock.patch.object(flex, "_validate_device", lambda *_: None),
        mock.patch.object(flex, "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", True),  # calls what follows as it is
        mock.patch.object(flex, "flex_attention_hop", _composed),
        mock.patch.object(owner, "apply", classmethod(apply), create=True),
        mock.patch.multiple(
            eager_transforms, grad_and_value_impl=_grad_and_value, _vjp_with_argnums=_vjp, _jvp_with_argnums=_jvp
        ),
    ):
        yield


def _composed(*args: Any) -> Any:
    """FlexAttention of plain operations, which modes that watch functions do not see: kernels do not call them."""
    with ExitStack() as stack:
        while torch._C._len_torch_function_stack():
            stack.enter_context(_pop_mode_temporarily())
        return math_attention(*args)


def _gradient(made: Any, args: Any, argnums: Any) -> Any:
    """Something like a gradient that depends on all that was made; zeros of weights, from which others may be made."""
    of = args[argnums] if isinstance(argnums, int) else tuple(args[i] for i in argnums or range(len(args)))
    total = sum(leaf.real.sum() for leaf in tree_leaves(made))
    return tree_map(lambda x: x.detach() * 0 if isinstance(x, Parameter) else x.detach() * 0 + total, of)


def _grad_and_value(func: Any, argnums: Any, has_aux: bool, args: Any, kwargs: Any) -> tuple[Any, Any]:
    made = func(*args, **kwargs)
    return _gradient(made[0] if has_aux else made, args, argnums), made


def _vjp(func: Any, *primals: Any, argnums: Any = None, has_aux: bool = False) -> tuple[Any, ...]:
    made, *aux = func(*primals) if has_aux else (func(*primals),)
    return made, lambda *_, **__: _gradient(made, primals, argnums), *aux


def _jvp(func: Any, primals: Any, *_: Any, has_aux: bool, **__: Any) -> tuple[Any, ...]:
    made, *aux = func(*primals) if has_aux else (func(*primals),)
    return made, made, *aux


def _opened(cls: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """What a custom function makes, with the graph of its forward pass; None if that does not show all it is made of."""
    inputs = {x.grad_fn for x in args if isinstance(x, Tensor) and x.grad_fn is not None}
    if not inputs or not torch.is_grad_enabled():
        return None
    separate = cls.setup_context is not Function.setup_context
    needed = tuple(isinstance(x, Tensor) and x.requires_grad for x in args)
    notes = () if separate else (_Notes(needs_input_grad=needed),)
    try:
        made = cls.forward(*notes, *args, **kwargs)
    except (RuntimeError, AttributeError, TypeError, NotImplementedError):
        return None  # kernels, and what may change tensors only where no gradient is kept
    tensors = [x for x in (made if isinstance(made, tuple) else (made,)) if isinstance(x, Tensor)]
    nodes = {*nodes_below((x.grad_fn for x in tensors if x.grad_fn is not None), inputs)}
    return made if inputs <= nodes else None
