"""The paper's network and its gradient step in NumPy, theory.md, section 2, and its weights in the package's ResNet."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from mlu_lightning.models import ResNet

Array = NDArray[np.float64]
# an activation, and its derivative from its values
TANH: tuple[Callable[[Array], Array], ...] = np.tanh, lambda units: 1 - units**2
POSITIVE: tuple[Callable[[Array], Array], ...] = np.copy, np.ones_like


def numpy_step(u: Array, v: Array, w_e: Array, w_u: Array, x: Array, y: Array, activation: Any = TANH) -> list[Array]:
    """Output and new u, v [L, D, M], w_e and w_u [D, ...] at the learning rate 1, the loss half the squared error."""
    depth, embedding, hidden = u.shape
    sigma, slope = activation
    stream, units = [w_e @ x], []
    for u_l, v_l in zip(u, v, strict=True):
        units.append(sigma(u_l.T @ stream[-1] / embedding))
        stream.append(stream[-1] + v_l @ units[-1] / (depth * hidden))
    output = w_u.T @ stream[-1] / embedding
    b = w_u @ (output - y)  # D times the gradient with respect to the stream
    new_u, new_v = np.empty_like(u), np.empty_like(v)
    for layer in reversed(range(depth)):
        q = slope(units[layer]) * (v[layer].T @ b / embedding)
        new_u[layer], new_v[layer] = u[layer] - stream[layer] @ q.T, v[layer] - b @ units[layer].T
        b = b + u[layer] @ q / (depth * hidden)
    return [output, new_u, new_v, w_e - b @ x.T, w_u - stream[-1] @ (output - y).T]


@torch.no_grad()
def load(module: ResNet, u: Array, v: Array, w_e: Array, w_u: Array) -> None:
    """Put weights into ordinary layers, whose sums are not divided by their number of terms."""
    _, embedding, hidden = u.shape
    module.embed.weight.copy_(torch.from_numpy(w_e))
    module.readout.weight.copy_(torch.from_numpy(w_u.T))
    for block, u_l, v_l in zip(module.blocks, u, v, strict=True):
        block.read.weight.copy_(torch.from_numpy(u_l.T / embedding))
        block.write.weight.copy_(torch.from_numpy(v_l / hidden))


def stream_of(weights: dict[str, torch.Tensor], x: torch.Tensor, branch: float = 1.0) -> list[torch.Tensor]:
    """The stream of a ResNet from its weights, which are those of ordinary layers."""
    h = [x @ weights["embed.weight"].T]
    for block in range(sum(name.endswith("read.weight") for name in weights)):
        units = torch.tanh(h[-1] @ weights[f"blocks.{block}.read.weight"].T)
        h.append(h[-1] + branch * units @ weights[f"blocks.{block}.write.weight"].T)
    return h
