"""What a column's rounding error costs when the columns beside it make good what they can."""

from __future__ import annotations

import torch
from torch import Tensor


def compensated(hessian: Tensor, lookups: Tensor | None = None, share: float = 0.01) -> Tensor:
    """Loss of each column per squared error, the others free to move: ``1 / [(H + l I)^-1]_jj - l``.

    ``l`` is a share of the mean diagonal over inputs that were not always 0; moving others by ``y`` then costs
    ``l ||y||^2`` as well, so that they cannot move without end where the inputs do not span. Without ``l`` this
    is the divisor of Optimal Brain Compression. It lies between 0 and ``H_jj``, is ``H_jj`` for a diagonal ``H`` and 0
    for inputs that were always 0. NaN where the Hessian is not finite, or singular without ``l``.

    Args:
        hessian: of the inputs: (groups, columns, columns).
        lookups: of one group, what is added to the diagonal of each row's own Hessian: (rows,).
        share: share of the mean diagonal.

    Returns:
        (groups, 1, columns), or with ``lookups`` (1, rows, columns), float64.

    Source: Frantar and Alistarh 2022 (arXiv:2208.11580).

    >>> compensated(torch.tensor([[[2.0, 1.0], [1.0, 2.0]]]), share=0.0).numpy().round(6).tolist()
    [[[1.5, 1.5]]]
    """
    wide = hessian.double()
    diagonal = wide.diagonal(dim1=-2, dim2=-1)
    if not bool(wide.isfinite().all()):
        return torch.full_like(diagonal.unsqueeze(1), torch.nan)
    live = diagonal > 0
    damp = share * (diagonal * live).sum(dim=1) / live.sum(dim=1).clamp(min=1)
    if lookups is not None:
        values, vectors = torch.linalg.eigh(wide[0])
        inverse = (1 / (values.clamp(min=0) + damp + lookups.double()[:, None])) @ vectors.square().T
        # Rows that nothing was seen of have no inverse, and no loss.
        return torch.nan_to_num(1 / inverse - damp, nan=0.0).clamp_(min=0).unsqueeze(0)
    found = torch.zeros_like(diagonal)
    for i in range(len(wide)):
        if not bool(live[i].any()):
            continue
        lower, failed = torch.linalg.cholesky_ex(
            wide[i] + damp[i] * torch.eye(wide.shape[-1], device=wide.device, dtype=wide.dtype)
        )
        inverse = torch.cholesky_inverse(lower).diagonal()
        found[i] = torch.nan if bool(failed) else (1 / inverse - damp[i]).clamp(min=0)
    return found.unsqueeze(1)
