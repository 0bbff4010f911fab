"""Distances between the streams, or the outputs, of two models on the same samples (theory.md, section 4).

They take the streams h [samples, embedding] of one model, or its outputs, and those of a reference on the same samples,
compute in float64 and return a float64 scalar; any NaN or infinite value, in either model, makes it NaN. What cannot be
compared is a ``ValueError``.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def rms_distance(streams: Tensor, reference: Tensor) -> Tensor:
    """Measure sqrt(mean((h - h_ref[:, :D])^2)), for coupled embeddings: the embedding-space error of [C25] and [CCM26].

    Coordinates are compared one with one, so they must mean the same in both models: initialize both with
    ``mode="coupled"`` and the same seed (theory.md, section 4).

    >>> rms_distance(torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([[1.0, 0.0, 9.0], [3.0, 4.0, 9.0]]))
    tensor(1., dtype=torch.float64)
    """
    streams, reference = comparable(streams, reference)
    width = streams.shape[1]
    if width > reference.shape[1]:
        raise ValueError(
            f"The streams have {width} coordinates and the reference has {reference.shape[1]}, but each of them needs the "
            "coordinate of the reference that it is coupled with. Take a reference of an embedding dimension of "
            f"{width} or more, or a distance that needs no coupling: gram, cka or procrustes."
        )
    if not _finite(streams, reference):
        return _nan(streams)
    return (streams - reference[:, :width]).square().mean().sqrt()


def gram_distance(streams: Tensor, reference: Tensor) -> Tensor:
    """Measure ||h h^T / D - h_ref h_ref^T / D_ref||_F / N: root mean square over pairs of samples (theory.md, section 4).

    It needs no coupling: rotations of either embedding space do not change it.

    >>> h = torch.tensor([[1.0, 1.0], [1.0, -1.0]])  # h h^T / 2 is the identity
    >>> gram_distance(h, h.flip(1)), gram_distance(h, torch.zeros(2, 3))
    (tensor(0., dtype=torch.float64), tensor(0.7071, dtype=torch.float64))
    """
    streams, reference = comparable(streams, reference)
    if not _finite(streams, reference):
        return _nan(streams)
    a, b = _fewer_rows(*_per_coordinate(streams, reference))
    distance: Tensor = torch.linalg.vector_norm(a @ a.T - b @ b.T) / len(streams)
    return distance


def cka_distance(streams: Tensor, reference: Tensor) -> Tensor:
    """Subtract from one the linear centred kernel alignment of Kornblith et al. (2019), arXiv 1905.00414.

    It needs no coupling: rotations, shifts and rescaling of either embedding space do not change it. It is
    1 - ||Y^T X||_F^2 / (||X^T X||_F ||Y^T Y||_F), with X and Y minus their mean over samples; of streams that are the same
    for all samples, where it is 0/0: 0 if both are, 1 if one is. It is quadratic in small differences.

    >>> h = torch.tensor([[0.0, 1.0], [2.0, 0.0], [1.0, 5.0]])
    >>> cka_distance(h, 3 * h.flip(1) + 1), cka_distance(h, torch.ones(3, 4))
    (tensor(0., dtype=torch.float64), tensor(1., dtype=torch.float64))
    """
    streams, reference = comparable(streams, reference)
    if not _finite(streams, reference):
        return _nan(streams)
    x, y = _centred(streams), _centred(reference)
    constant = not bool(x.any()), not bool(y.any())
    if any(constant):
        return streams.new_tensor(0.0 if all(constant) else 1.0)
    x, y = _fewer_rows(x, y)
    # 1 - <K, L> for matrices of norm 1 is this square, which does not cancel
    return (_unit(x @ x.T) - _unit(y @ y.T)).square().sum() / 2


def procrustes_distance(streams: Tensor, reference: Tensor) -> Tensor:
    """Measure what is left between the streams after the best rotation of one onto the other (Schönemann, 1966).

    It is min over Q of ||h / sqrt(D) Q - h_ref / sqrt(D_ref)||_F / sqrt(N) with Q Q^T = 1 for D <= D_ref, and the other way
    round for D > D_ref. It needs no coupling; nothing is centred or rescaled: it is in the units of :func:`rms_distance`,
    and for models of the same D never larger.

    >>> h = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]])
    >>> procrustes_distance(h, -2 * h) / procrustes_distance(h, 0 * h)  # -h is a rotation of h, and one h is left
    tensor(1.0000, dtype=torch.float64)
    """
    streams, reference = comparable(streams, reference)
    if not _finite(streams, reference):
        return _nan(streams)
    a, b = _fewer_rows(*_per_coordinate(streams, reference))
    if a.shape[1] > b.shape[1]:
        a, b = b, a
    if len(a) < a.shape[1]:
        # the distance depends on the Gram matrices only: samples x samples coordinates are enough
        a, b = _triangle(a.T).T, _triangle(b.T).T
    # by the best Q, so that equal streams are at 1e-15 of their size: the closed form with the nuclear norm stops at 1e-8
    u, _, vh = torch.linalg.svd(_unit(a).T @ _unit(b), full_matrices=False)
    distance: Tensor = torch.linalg.vector_norm(a @ (u @ vh) - b) / math.sqrt(len(streams))
    return distance


def output_distance(outputs: Tensor, reference: Tensor) -> Tensor:
    """Measure sqrt(mean((f - f_ref)^2)) over samples and targets, which mean the same at every shape.

    >>> output_distance(torch.tensor([[1.0, 2.0]]), torch.tensor([[1.0, 4.0]]))
    tensor(1.4142, dtype=torch.float64)
    """
    outputs, reference = comparable(outputs, reference)
    if outputs.shape != reference.shape:
        raise ValueError(
            f"The outputs have {outputs.shape[1]} entries and the reference has {reference.shape[1]}. Outputs can only be "
            "compared with those of a model that has the same targets."
        )
    if not _finite(outputs, reference):
        return _nan(outputs)
    return (outputs - reference).square().mean().sqrt()


def comparable(streams: Tensor, reference: Tensor) -> tuple[Tensor, Tensor]:
    """Convert values to float64, or refuse what are not floating-point matrices with the same number of rows."""
    for name, values in (("streams or outputs", streams), ("reference", reference)):
        if values.ndim != 2 or not values.numel() or not values.is_floating_point():
            raise ValueError(
                f"The {name} should be floating-point values [samples, coordinates], at least one of each, and the tensor "
                f"given is {values.dtype} of shape {list(values.shape)}. Put batch and positions into one axis, for "
                "example with tensor.flatten(0, -2)."
            )
    if len(streams) != len(reference):
        raise ValueError(
            f"There are {len(streams)} samples of one model and {len(reference)} of its reference. Pass the same samples, "
            "in the same order, through both."
        )
    return streams.double(), reference.double()


def _finite(streams: Tensor, reference: Tensor) -> bool:
    # faster than isfinite of every entry; the largest size is NaN if any is
    return all(math.isfinite(float(values.detach().abs().amax())) for values in (streams, reference))


def _nan(like: Tensor) -> Tensor:
    return like.new_full((), math.nan)


def _per_coordinate(*models: Tensor) -> tuple[Tensor, ...]:
    return tuple(streams / math.sqrt(streams.shape[1]) for streams in models)


def _centred(streams: Tensor) -> Tensor:
    """Subtract the mean over samples; what is the same for all samples becomes exactly zero."""
    shifted = streams - streams[0]  # the mean of equal numbers need not be that number, their difference is 0
    return shifted - shifted.mean(0)


def _unit(matrix: Tensor) -> Tensor:
    norm: Tensor = torch.linalg.vector_norm(matrix)
    return matrix / norm.clamp_min(torch.finfo(matrix.dtype).tiny)


def _fewer_rows(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Rotate the samples of both so that few are not zero, where that is cheaper; products of columns stay as they are."""
    if len(a) <= 2 * (a.shape[1] + b.shape[1]):
        return a, b
    joined = _triangle(torch.cat((a, b), dim=1))
    return joined[:, : a.shape[1]], joined[:, a.shape[1] :]


def _triangle(matrix: Tensor) -> Tensor:
    """R of the thin QR decomposition: a smaller matrix whose columns have the same products."""
    triangle: Tensor = torch.linalg.qr(matrix, mode="r").R
    return triangle
