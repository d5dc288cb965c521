"""Traces of matrices known only by their products: Hutch++ and XTrace, which find the large eigenvalues first."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

#: Product of a symmetric (n, n) matrix with a vector of n.
MatrixProduct = Callable[[Tensor], Tensor]


def hutch_plus_plus(product: MatrixProduct, sketch: Tensor, probes: Tensor) -> Tensor:
    """Hutch++: the trace on the range of A S exactly, and that of the rest by Hutchinson's estimate.

    estimate_k = tr(Q^T A Q) + g_k^T (I - QQ^T) A (I - QQ^T) g_k with Q an orthonormal basis of A S. The mean over k is
    the estimate of the trace, without bias; the spread over k is that of its second term.

    Cost: one product per column of S, of Q and of G. Memory: S, Q and G. Source: Meyer, Musco, Musco and Woodruff 2021.

    Args:
        product: product with the matrix.
        sketch: (n, s) random signs S.
        probes: (n, g) random signs G, independent of S.

    Returns:
        (g,) estimates, float64; infinite where the matrix is not finite.

    >>> a = torch.diag(torch.tensor([3.0, 1.0, 0.0], dtype=torch.float64))
    >>> signs = torch.tensor([[1.0, 1], [1, -1], [1, 1]], dtype=torch.float64)
    >>> [round(x, 9) for x in hutch_plus_plus(lambda v: a @ v, signs, -signs).tolist()]
    [4.0, 4.0]
    """
    images = _columns(product, sketch)
    if not bool(images.isfinite().all()):
        return torch.full((probes.shape[1],), torch.inf, dtype=torch.float64)
    q, r = torch.linalg.qr(images)
    basis = q @ _range(r)
    trace = _inner(basis, _columns(product, basis)).sum()
    rest = probes - basis @ (basis.T @ probes)
    return trace + _inner(rest, _columns(product, rest))


def xtrace(product: MatrixProduct, probes: Tensor) -> Tensor:
    """XTrace: each probe in turn estimates what the others' range leaves out.

    estimate_i = tr(Q_i^T A Q_i) + u^T A u with Q_i an orthonormal basis of A W without column i and
    u = (I - Q_i Q_i^T) w_i. All bases are made from one QR decomposition by small singular value decompositions, so
    probes whose products depend on one another do no harm. The mean is the estimate, without bias; the standard error
    is the spread over the root of their number.

    Cost: two products per probe. Memory: three times W. Source: Epperly, Tropp and Webber 2024.

    Args:
        product: product with the matrix.
        probes: (n, k) random signs W, k from 2.

    Returns:
        (k,) estimates, float64; infinite where the matrix is not finite.

    >>> a = torch.diag(torch.tensor([3.0, 0.0, 0.0], dtype=torch.float64))
    >>> signs = torch.tensor([[1.0, 1], [1, -1], [1, 1]], dtype=torch.float64)
    >>> [round(x, 9) for x in xtrace(lambda v: a @ v, signs).tolist()]
    [3.0, 3.0]
    """
    images = _columns(product, probes)
    if not bool(images.isfinite().all()):
        return torch.full((probes.shape[1],), torch.inf, dtype=torch.float64)
    q, r = torch.linalg.qr(images)
    inner = (q.T @ _columns(product, q)).double()
    parts = (q.T @ probes).double()
    straight = _inner(probes, images)
    estimates = []
    for i in range(probes.shape[1]):
        others = _range(torch.cat([r[:, :i], r[:, i + 1 :]], dim=1)).double()
        within = others @ (others.T @ parts[:, i])
        rest = straight[i] - 2 * within @ r[:, i].double() + within @ inner @ within
        estimates.append((others.T @ inner @ others).trace() + rest)
    return torch.stack(estimates)


def exact_trace(product: MatrixProduct, like: Tensor) -> float:
    """Trace by one product with each unit vector; ``like`` is any vector of n."""
    total = 0.0
    for i in range(like.numel()):
        unit = torch.zeros_like(like)
        unit[i] = 1.0
        total += float(product(unit)[i])
    return total


def _columns(product: MatrixProduct, vectors: Tensor) -> Tensor:
    if not vectors.shape[1]:
        return torch.zeros_like(vectors)
    return torch.stack([product(column) for column in vectors.T], dim=1)


def _inner(a: Tensor, b: Tensor) -> Tensor:
    """Scalar product of each column of ``a`` with that of ``b``, summed in float64."""
    return torch.stack([(x.double() * y.double()).sum() for x, y in zip(a.T, b.T, strict=True)] or [_none()])


def _none() -> Tensor:
    return torch.zeros((), dtype=torch.float64)


def _range(matrix: Tensor) -> Tensor:
    """Orthonormal basis of what a small matrix's columns span, without what is only rounding."""
    u, sizes, _ = torch.linalg.svd(matrix, full_matrices=False)
    kept: Tensor = u[:, sizes > 100 * torch.finfo(matrix.dtype).eps * sizes.max()]
    return kept
