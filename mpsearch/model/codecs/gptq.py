"""GPTQ: rounding column by column, each column's error made good by the columns that follow.

With ``H = 2 X X^T / N`` of the layer's inputs, the error of the layer's output is ``sum_rows d H d^T / 2`` for errors
``d`` of the weights. ``U`` is the upper Cholesky factor of ``H^-1`` (``H^-1 = U^T U``). For columns ``i`` from
left to right, each row on its own:

- ``q_i = round(w_i)`` on the lattice of the column's group, ``e = (w_i - q_i) / U_ii``;
- ``w_j -= e U_ij`` for all ``j > i``. Up to `BLOCK` columns share one update of the columns behind them.

The loss of a column is ``e^2 / 2``; their sum is the output error exactly when ``H`` is not damped.

The lattice of a group is fitted when its first column is reached, to its weights as they then are; the lattice of a row
or a tensor is fitted to the weights as given. Columns keep their order.

``H`` is divided by the mean of its diagonal over inputs that were ever other than 0, and 0.01 is added to its
diagonal. Inputs that were always 0 get a diagonal of 1: nothing is known about their weights, which are rounded to
nearest and pass no error on. (The authors' code takes the mean after those ones are set, so that it hangs on the unit
of the inputs, and turns those weights to 0.)

Sources: Frantar et al. 2023 (arXiv:2210.17323); Hassibi and Stork 1993 for the update.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from mpsearch.model.codec import RangeError
from mpsearch.model.codecs.lattice import Lattice

#: Columns that share one update of the columns behind them.
BLOCK = 128
#: What is added to the diagonal of ``H``, as a share of its mean; the next one when the last did not suffice.
DAMPING = (0.01, 0.1, 1.0, 10.0)


def inverse_factor(hessian: Tensor, damping: tuple[float, ...] = DAMPING) -> Tensor:
    """Return the upper Cholesky factor of the inverse of the damped matrix, float32, up to a common factor.

    Raises:
        RangeError: the matrix is not positive definite at any damping.

    >>> inverse_factor(torch.tensor([[4.0, 2.0], [2.0, 2.0]]), (0.0,))  # of the inverse of that matrix over 3
    tensor([[ 1.2247, -1.2247],
            [ 0.0000,  1.2247]])
    """
    diagonal = hessian.diagonal()
    live = diagonal > 0
    mean = diagonal[live].mean() if bool(live.any()) else diagonal.new_ones(())
    for share in damping:
        # Float64 is 2 to 30 times slower and holds condition numbers that float32 does not.
        for dtype in (torch.float32, torch.float64):
            # Divided first: the mean of large inputs' squares may pass float32 once it is damped.
            damped = (hessian.to(torch.float32) / mean).to(dtype)
            damped.diagonal().masked_fill_(~live, 1.0).add_(share)
            factor = _factor(damped)
            if factor is not None:
                return factor.to(torch.float32)
    raise RangeError(
        f"the matrix of the layer's inputs is not positive definite, not even damped by {damping[-1]:g} of its mean"
    )


def _factor(damped: Tensor) -> Tensor | None:
    lower, failed = torch.linalg.cholesky_ex(damped)
    if bool(failed):
        return None
    factor, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
    return None if bool(failed) or not bool(torch.isfinite(factor).all()) else factor


def compensate(
    values: Tensor, factor: Tensor, lattice: Lattice | None, group: int, fit: Callable[[Tensor], Lattice]
) -> tuple[Tensor, list[Lattice]]:
    """Round weights column by column.

    Args:
        values: (rows, columns) float32 weights; left as they are.
        factor: what `inverse_factor` returned.
        lattice: the lattice of all columns; None for one per group.
        group: columns of a group.
        fit: makes the lattice of (rows, group) weights.

    Returns:
        (rows, columns) codes as float32, and the lattices from left to right.
    """
    # Columns become contiguous; where the transposed view already is, a copy must still be made.
    work = values.t().clone(memory_format=torch.contiguous_format)
    lattices = [] if lattice is None else [lattice]
    for start, stop in _blocks(len(work), group if lattice is None else 0):
        errors = torch.empty_like(work[start:stop])
        for column in range(start, stop):
            if lattice is None and column % group == 0:
                lattices.append(fit(work[column : column + group].t()))
            weights = work[column].clone().unsqueeze(-1)
            codes = lattices[-1].codes(weights)
            work[column] = codes.squeeze(-1)
            error = weights.sub_(lattices[-1].values(codes)).squeeze(-1).div_(factor[column, column])
            errors[column - start] = error
            work[column + 1 : stop].addr_(factor[column, column + 1 : stop], error, alpha=-1)
        work[stop:].addmm_(factor[start:stop, stop:].t(), errors, alpha=-1)
    return work.t(), lattices


def _blocks(columns: int, group: int) -> list[tuple[int, int]]:
    """Cut columns into blocks; a block holds whole groups, or a group whole blocks. 0: no groups."""
    outer = columns if not group else group if group > BLOCK else BLOCK // group * group
    cuts = [n for start in range(0, columns, outer) for n in range(start, min(start + outer, columns), BLOCK)]
    return list(zip(cuts, [*cuts[1:], columns], strict=True))
