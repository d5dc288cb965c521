"""Rules that keep layers at 16 bits, such as those whose inputs hold tokens that spike."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass

from mpsearch.errors import InputError, Notice, did_you_mean
from mpsearch.format import Format
from mpsearch.layer import Layers

#: Least ratio that Llama-2-7B's published list of layers to keep has; other models' lists begin at 4 to 78.
THRESHOLD = 6.68
#: The estimators that can say which layers to keep.
RULES = ("activation_spikes",)


@dataclass(frozen=True)
class Rule:
    """A rule that pins layers, printed ``activation_spikes > 6.68``.

    Attributes:
        estimator: who reports on the layers.
        threshold: layers over it are pinned.

    >>> str(Rule.parse("activation_spikes")), Rule.parse("activation_spikes > 4").threshold
    ('activation_spikes > 6.68', 4.0)
    """

    estimator: str
    threshold: float = THRESHOLD

    def __post_init__(self) -> None:
        check_threshold(self.threshold)

    @classmethod
    def parse(cls, text: str) -> Rule:
        """Read a rule.

        Raises:
            InputError: not a rule (E113).
        """
        match = re.fullmatch(r"\s*(\w+)\s*(?:>\s*(\S+)\s*)?", text)
        name = match[1] if match else text
        if match is None or name not in RULES:
            raise InputError(
                "E113",
                f"'protect': '{text}' is no rule{did_you_mean(name, RULES)}",
                advice=f"write {RULES[0]}, or {RULES[0]} > {THRESHOLD}",
            )
        if match[2] is None:
            return cls(name)
        try:
            return cls(name, float(match[2]))
        except ValueError as error:
            raise InputError("E113", f"'protect': '{match[2]}' in '{text}' is not a number") from error

    def __str__(self) -> str:
        return f"{self.estimator} > {self.threshold:g}"

    def pins(self, layers: Layers, ratios: Mapping[str, float | None], fmt: str = "") -> dict[str, str]:
        """Name the decisions that hold a layer over the threshold, and the format that they keep.

        A ratio that is not a number counts as over it: the inputs hold what is not finite.

        Args:
            layers: all layers.
            ratios: layer name -> ratio.
            fmt: the format; of 16 bits, as the layer is stored, when empty.

        Raises:
            InputError: a layer cannot take the format (E130).
        """
        found: dict[str, str] = {}
        for row in layers.decisions:
            if not any(_size(ratios.get(layer.name, 0.0)) > self.threshold for layer in row.layers):
                continue
            kept = Format.parse(fmt or ("fp16" if row.layers[0].dtype == "float16" else "bf16"))
            for layer in row.layers:
                if why := kept.refuses(layer):
                    raise InputError("E130", f"protected layer '{layer.name}': {why}")
            found[row.name] = str(kept)
        return found

    def notice(self, layers: Layers, ratios: Mapping[str, float | None], pins: Mapping[str, str]) -> Notice:
        """Say what is pinned, and why."""
        worst = {
            row.name: max(_size(ratios.get(layer.name, 0.0)) for layer in row.layers)
            for row in layers.decisions
            if any(layer.name in ratios for layer in row.layers)
        }
        if not pins:
            name = max(worst, key=lambda row: worst[row], default="")
            most = f"; the most is {worst[name]:.3g} at '{name}'" if name else ""
            return Notice("N132", f"{self}: no layer is protected{most}")
        ordered = sorted(pins, key=lambda row: -worst[row])
        texts = {row: f"{size:.3g}" if math.isfinite(size) else "not finite" for row, size in worst.items()}
        named = ", ".join(f"'{row}' ({texts[row]}) to {pins[row]}" for row in ordered[:8])
        more = f" and {len(ordered) - 8} more" if len(ordered) > 8 else ""
        return Notice("N132", f"{self}: pins {named}{more}")


def _size(ratio: float | None) -> float:
    """A ratio that can be compared; None and NaN stand for one that is not finite."""
    return math.inf if ratio is None or math.isnan(ratio) else ratio


def check_threshold(threshold: object) -> None:
    """Refuse a threshold that no ratio could be compared with.

    Raises:
        InputError: E113.
    """
    if isinstance(threshold, bool) or not isinstance(threshold, (int, float)) or not 0 < threshold < math.inf:
        raise InputError("E113", f"threshold is {threshold!r}; give a number over 0 (a ratio is 1 without spikes)")
