"""What a user should know of a model and its scores, beside the numbers."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from mpsearch.errors import Notice
from mpsearch.layer import Layers
from mpsearch.tables import Array, SensitivityTable
from mpsearch.tasks import Failed


def layer_notices(layers: Layers) -> list[Notice]:
    """Say what is left out and what is shared."""
    notices = []
    if layers.excluded:
        count = sum(kept.weights for kept in layers.excluded)
        notices.append(
            Notice(
                "N415",
                f"{len(layers.excluded)} tensors ({100 * count / layers.weights:.2f} % of weights) keep their "
                f"number type and are counted: {', '.join(sorted({kept.reason for kept in layers.excluded}))}",
            )
        )
    for layer in layers:
        if layer.shared:
            names = " and ".join([layer.name, *layer.shared])
            notices.append(Notice("N414", f"{names} are one tensor: scored once, counted once, one format"))
    return notices


def _where(scores: SensitivityTable, status: str) -> str:
    """Name the first layer with values that are not finite and its batches, where they are known."""
    known = scores.source.get("not_finite") if status == "non_finite" else None
    if not known:
        return ""
    name, batches = next(iter(known.items()))
    more = f" and {len(batches) - 3} more" if len(batches) > 3 else ""
    return f" ('{name}' in batch {', '.join(map(str, batches[:3]))}{more})"


def _blind(scores: SensitivityTable) -> list[Notice]:
    """Say so where every format of a decision scores 0, the worst ones too: nothing was seen there."""
    scored = [row[~np.isnan(row)] for row in scores.value]
    zero = [name for name, row in zip(scores.layers, scored, strict=True) if len(row) and not row.any()]
    if not zero:
        return []
    name = scores.source.get("estimator", "")
    who = f"estimator '{name}'" if name else "the estimator"
    if len(zero) == sum(1 for row in scored if len(row)):
        return [Notice("W513", f"{who} scores 0 everywhere: it tells nothing apart here, and bytes alone will decide")]
    text = f"{len(zero)} decisions score 0 in every format ('{zero[0]}', …): {who} sees no harm there at all"
    return [Notice("W513", text)]


def _pooled(scores: SensitivityTable) -> list[Notice]:
    """Name the decisions that only some batches reached."""
    known = scores.source.get("pooled")
    if not known:
        return []
    names = [f"{name} ({there} of {batches})" for name, (there, batches) in known.items()]
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return [Notice("W519", f"estimated from the batches that reached them: {', '.join(names[:3])}{more}")]


def score_notices(scores: SensitivityTable) -> list[Notice]:
    """Name the cells without a value, those below zero, and decisions that nothing seems to harm."""
    notices = []
    for status, code, text in (
        ("non_finite", "W511", "gives values that are not finite: that format is barred for it"),
        ("not_observed", "W512", "has no score: the data did not reach it, or the estimator cannot see it"),
    ):
        cells = [
            f"{name} at {fmt}"
            for name, row in zip(scores.layers, scores.status, strict=True)
            for fmt, found in zip(scores.formats, row, strict=True)
            if found == status
        ]
        if cells:
            more = f" and {len(cells) - 3} more" if len(cells) > 3 else ""
            notices.append(Notice(code, f"{', '.join(cells[:3])}{more} {text}{_where(scores, status)}"))
    notices += [*_pooled(scores), *_blind(scores)]
    negative = [name for name, row in zip(scores.layers, scores.value, strict=True) if (row < 0).any()]
    if negative:
        notices.append(
            Notice(
                "W516",
                f"{len(negative)} decisions have scores below zero ({negative[0]}, …); their error is taken instead",
            )
        )
    return notices


def order_notices(scores: SensitivityTable, sizes: Array, clamp: bool = False) -> list[Notice]:
    """Say so where a format of more bytes scores worse than one of fewer, beyond chance.

    Args:
        scores: the scores as they were estimated.
        sizes: (L, F) bytes of each decision in each format.
        clamp: whether the plans are made from clamped scores.
    """
    found = scores.non_monotone(sizes)
    if not found:
        return []
    count = len({(row, dearer) for row, _, dearer, _, _ in found})
    row, cheaper, dearer, excess, _ = max(found, key=lambda pair: pair[3])
    done = "the cheaper format's are taken" if clamp else "kept as they are; clamp = true takes the cheaper format's"
    text = f"scores get worse with more bytes ('{row}': {dearer} by {excess:.2g} {scores.unit} against {cheaper}, …)"
    return [Notice("W517", f"{count} {text}: {done}")]


def failure_notices(failed: Sequence[Failed]) -> list[Notice]:
    """Say which plans could not be measured, and why."""
    return [Notice("W522" if item.code == "E522" else "W511", item.message) for item in failed]
