"""Fake tensors that remember are those of torch's own mode, also when an operation is run again."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._pytree import tree_leaves

from mlu_lightning.utilities.fake_mode import RememberingFakeMode

OPERATIONS: dict[str, Callable[[Tensor], Any]] = {
    "views": lambda x: (x.view(6, 4), x.t(), x[1:, ::2], x[0], x.expand(2, 4, 6), x.detach(), x.unsqueeze(1)),
    "views of a view": lambda x: x[1:].view(-1).unflatten(0, (2, -1)).t().as_strided((3,), (2,), 7),
    "parts": lambda x: (x[:2].t(), x[2:].t(), *x.chunk(2, 1), *x.split([1, 3]), *x.unbind(), *x.max(0), *x.topk(2)),
    "numbers of several types": lambda x: (x * 2, x * 2.0, x * True, x.long() * 2, x.long() * 2.0, x.long() / 2),
    "types": lambda x: (x.double(), x.double() + x, x.half() @ x.half().t(), x > 0, x.to(torch.complex64)),
    "conjugates": lambda x: (x.cfloat() + 1, x.cfloat().conj() + 1, x.cfloat().conj().imag, x.cfloat().imag),
    "layouts": lambda x: (x.t() + 1, x.t().contiguous(), x.t().clone(), x.t().reshape(-1), x.new_zeros(3, 2).t()),
    "parameters": lambda x: (F.linear(x, x), F.rms_norm(x, (6,), x[0]), F.layer_norm(x, (6,)), F.embedding(x.long(), x)),
    "convolutions": lambda x: (F.conv1d(x[None], x[:, :4, None]), F.max_pool1d(x, 2), F.avg_pool1d(x, 3)),
    "joined": lambda x: (torch.cat([x, x]), torch.cat([x, x.t().reshape(4, 6)], 1), torch.stack([x]), x[[0, 2]]),
    "attention": lambda x: F.scaled_dot_product_attention(*[x.view(1, 2, 6, 2)] * 3, is_causal=True),
    "in place": lambda x: (x.clone().add_(1), x.clone().clamp_(0, 1), F.relu_(x * 1), x.clone().t()[1].mul_(x[:, 0])),
    "losses": lambda x: (F.cross_entropy(x, x[:, 0].long()), F.mse_loss(x, x + 1), x.sum()),
    "changes in place": lambda x: (x + 1).mul_(2).t_().add_(1).transpose_(0, 1)[1:].zero_(),
    "known values": lambda x: (x * torch.tensor(2.0), x.new_ones(()) * 3, torch.tensor(2.0) * 3, torch.tensor(3.0)),
    "made inside": lambda x: (torch.arange(4), torch.zeros(2, dtype=torch.half), torch.rand_like(x), x.new_ones(())),
    "dropped out": lambda x: (F.dropout(x), torch.bernoulli(x.sigmoid())),
}  # fmt: skip


def described(mode: FakeTensorMode, run: Callable[[Tensor], Any]) -> list[Any]:
    """Layout, value, node and storage of everything that an operation returns, the second time that it is run."""
    with mode:
        x = torch.empty(4, 6, requires_grad=True)
        for _ in range(2):
            found: list[Any] = tree_leaves(run(x * 1))
    storages = [each.untyped_storage()._cdata for each in found]
    assert all(type(each) is FakeTensor and each.fake_mode is mode for each in found)
    return [
        (
            *(each.shape, each.stride(), each.storage_offset(), each.dtype, each.device, each.is_conj(), each.is_neg()),
            *(each.constant, each.grad_fn and each.grad_fn.name(), each._version, storages.index(storage)),
        )
        for each, storage in zip(found, storages, strict=True)
    ]


@pytest.mark.parametrize("name", OPERATIONS)
@pytest.mark.parametrize("default", [torch.float32, torch.float64])
def test_operations_are_those_of_the_mode_of_torch(name: str, default: torch.dtype) -> None:
    before = torch.get_default_dtype()
    torch.set_default_dtype(default)
    try:
        own = described(FakeTensorMode(allow_non_fake_inputs=True), OPERATIONS[name])
        assert described(RememberingFakeMode(), OPERATIONS[name]) == own
    finally:
        torch.set_default_dtype(before)


def test_a_view_shares_memory_with_what_it_is_of_each_time() -> None:
    with RememberingFakeMode():
        x, y = torch.empty(3, 4), torch.empty(3, 4)
        views = [(each, each.t()[1:], each.chunk(2)[1]) for each in (x, y, x)]
    for of, *parts in views:
        assert {part.untyped_storage()._cdata for part in parts} == {of.untyped_storage()._cdata}
        assert all(part._base is of for part in parts)
    assert x.untyped_storage()._cdata != y.untyped_storage()._cdata


@pytest.mark.parametrize("read", [Tensor.item, Tensor.nonzero, Tensor.numpy, lambda x: bool(x > 0)])
def test_values_cannot_be_read_the_second_time_either(read: Callable[[Tensor], Any]) -> None:
    for _ in range(2):
        with RememberingFakeMode(), pytest.raises((RuntimeError, NotImplementedError, TypeError, ValueError)):
            read(torch.ones(1) * 2)


def test_real_tensors_are_left_to_torch() -> None:
    real = torch.ones(3)
    with RememberingFakeMode():
        assert [(real * torch.empty(3)).shape for _ in range(2)] == [(3,), (3,)]
