"""Second-order saliences of single weights and columns, from the Hessian of a layer's inputs.

All take ``H = 2 X X^T`` (or its mean over tokens, ``2 X X^T / N``: losses are then means) and answer in float64, the
shape of the weight or one number per column. A weight is (rows, columns), one row per output channel; an
error ``D = Q(W) - W`` has its shape. ``H^-1 = U^T U`` with ``U`` upper triangular.

`damped` makes a Hessian invertible. Its damping is a share of the mean diagonal, so that nothing depends on the unit
of the inputs. (SliM-LLM's search adds 0.01 as it is, its rounding 0.01 of the mean; the GPTQ code takes the mean
after it has set inputs that are always 0 to 1.)
"""

from __future__ import annotations

import torch
from torch import Tensor

from mpsearch.errors import InputError


def damped(hessian: Tensor, share: float = 0.01) -> Tensor:
    """Return a Hessian with a share of its mean diagonal added, and 1 for inputs that were always 0.

    >>> damped(torch.tensor([[4.0, 0.0], [0.0, 0.0]]), 0.5).tolist()
    [[6.0, 0.0], [0.0, 3.0]]
    """
    found = hessian.to(torch.float64).clone()
    diagonal = found.diagonal()
    live = diagonal > 0
    mean = diagonal[live].mean() if bool(live.any()) else diagonal.new_ones(())
    diagonal.masked_fill_(~live, 1.0).add_(share * mean)
    return found


def inverse(hessian: Tensor) -> Tensor:
    """Return ``H^-1`` of a positive definite matrix.

    Raises:
        InputError: it is not positive definite (E422).
    """
    lower, failed = torch.linalg.cholesky_ex(hessian.to(torch.float64))
    if bool(failed):
        raise InputError(
            "E422", "the matrix of a layer's inputs is not positive definite", advice="damp it: damped(hessian)"
        )
    return torch.cholesky_inverse(lower)


def upper_factor(hessian: Tensor) -> Tensor:
    """Return ``U``, the upper Cholesky factor of ``H^-1``.

    Raises:
        InputError: as `inverse`.

    >>> upper_factor(torch.tensor([[1.0, 0.0], [0.0, 0.25]])).diagonal().tolist()
    [1.0, 2.0]
    """
    factor: Tensor = torch.linalg.cholesky(inverse(hessian), upper=True)
    return factor


def half_trace(error: Tensor, hessian: Tensor) -> float:
    """Return ``1/2 tr(D H D^T)``: the squared error of the layer's output, summed (or meaned) as ``H`` is.

    >>> half_trace(torch.tensor([[1.0, 2.0]]), 2 * torch.eye(2))
    5.0
    """
    apart = error.to(torch.float64)
    return float(((apart @ hessian.to(torch.float64)) * apart).sum()) / 2


def slim_salience(weight: Tensor, hessian: Tensor) -> Tensor:
    """SliM-LLM's salience as in its paper: ``w^2 / [H^-1]_ii^2``.

    Source: Huang et al. 2024 (arXiv:2405.14917).
    """
    return weight.to(torch.float64).square() / inverse(hessian).diagonal().square()


def slim_salience_of_code(weight: Tensor, hessian: Tensor) -> Tensor:
    """SliM-LLM's salience as its code has it: ``w^2 / U_ii^2``.

    ``U_ii^2`` is the inverse's diagonal given that all columns before ``i`` are rounded and can no longer make good:
    another quantity than the paper's, for the first column too (it is not squared again).
    """
    return weight.to(torch.float64).square() / upper_factor(hessian).diagonal().square()


def pruning_salience(weight: Tensor, hessian: Tensor) -> Tensor:
    """Optimal Brain Surgeon: ``1/2 w^2 / [H^-1]_ii``, the loss when one weight becomes 0 and the others make good."""
    return rounding_salience(weight, hessian)


def rounding_salience(error: Tensor, hessian: Tensor) -> Tensor:
    """Optimal Brain Quantisation: ``1/2 d^2 / [H^-1]_ii``, the loss when one weight is rounded.

    The others of its row make good what they can.
    Source: Frantar and Alistarh 2022 (arXiv:2208.11580). At most ``1/2 H_ii d^2``, the loss when they do not.
    """
    return error.to(torch.float64).square() / inverse(hessian).diagonal() / 2


def column_salience(error: Tensor, hessian: Tensor) -> Tensor:
    """OWQ's score of columns, by which QEFT picks its own as well: ``H_jj ||D_j||^2``, one number per column.

    Twice the loss of a column rounded alone. The columns of the largest scores are kept in 16 bits.
    Sources: Lee et al. 2024 (arXiv:2306.02272, OWQ); Lee et al. 2024 (QEFT).

    >>> column_salience(torch.tensor([[1.0, 2.0], [1.0, 0.0]]), torch.tensor([[3.0, 1.0], [1.0, 5.0]])).tolist()
    [6.0, 20.0]
    """
    return hessian.to(torch.float64).diagonal() * error.to(torch.float64).square().sum(dim=0)


def feedback_losses(error: Tensor, hessian: Tensor) -> Tensor:
    """Losses of GPTQ, weight by weight, from the final error alone: ``1/2 (D U^-1)^2``.

    GPTQ ends at ``W - Q = E U`` with ``E`` the errors that it passes on, whose halved squares are its losses, so
    they can be read off any rounded weight. They add up to `half_trace` for every ``D``: a split of the layer's error
    over its columns in which each is charged with what those after it could not make good.
    """
    passed: Tensor = torch.linalg.solve_triangular(
        upper_factor(hessian), error.to(torch.float64), upper=True, left=False
    )
    return passed.square() / 2


def baq_column_losses(error: Tensor, hessian: Tensor) -> Tensor:
    """BAQ's loss of each column in a first pass at equal bits: `feedback_losses`, summed over the rows.

    Source: BAQ (arXiv:2506.05664).
    """
    return feedback_losses(error, hessian).sum(dim=0)
