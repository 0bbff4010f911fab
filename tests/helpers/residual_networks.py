"""Small residual networks whose forward pass is a function that a test writes."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

X = torch.ones(4, 3)


class Block(nn.Module):  # a residual block, with or without the sum in it
    def __init__(self, width: int = 8, adds: bool = False, hidden: int = 16) -> None:
        super().__init__()
        self.adds = adds
        self.read, self.write = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, stream: Tensor) -> Tensor:
        branch: Tensor = self.write(torch.tanh(self.read(stream)))
        return stream + branch if self.adds else branch


class Net(nn.Module):
    """Parts of a network of embedding dimension 8, put together by ``forward``, a function of the network and its input."""

    def __init__(self, forward: Callable[..., Any] | None = None, adds: bool = False, **parts: Any) -> None:
        super().__init__()
        self.run, self.adds = forward or in_a_row, adds
        self.embed = parts.pop("embed", None) or nn.Linear(3, 8)
        self.blocks = parts.pop("blocks", None) or nn.ModuleList(Block(adds=adds) for _ in range(2))
        self.out = parts.pop("out", None) or nn.Linear(8, 2)
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, *args: Any) -> Any:
        return self.run(self, *args)


def added(net: Any, h: Tensor, block: Any) -> Any:
    """A block's output added to what it reads, by itself or here."""
    return block(h) if net.adds else h + block(h)


def in_a_row(net: Net, x: Tensor) -> Any:
    return net.out(stream(net, x, added))


def stream(net: Net, x: Tensor, step: Callable[[Any, Tensor, Any], Tensor] = added) -> Any:
    """The stream after ``step``, of the network, the stream and a block, has been made with every block."""
    h = net.embed(x)
    for block in net.blocks:
        h = step(net, h, block)
    return h


def stepwise(step: Callable[[Any, Tensor, Any], Tensor], **parts: Any) -> Net:
    return Net(lambda net, x: net.out(stream(net, x, step)), **parts)
