"""Workloads: which passes a model runs for a request, and how often. Prefill and decode want different plans."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction

from mpsearch.decimals import decimal_text
from mpsearch.errors import InputError

#: Resource -> what its condition may say, in this order, with what stands when it is left out (None: it must be said).
CONDITIONS: Mapping[str, Mapping[str, int | None]] = {
    "kv": {"context": None, "batch": 1},
    "memory": {"context": None, "batch": 1},
    "ttft": {"prompt": 512, "batch": 1},
    "tpot": {"context": 512, "batch": 1},
    "latency": {"prompt": None, "output": None, "batch": 1},
    "traffic": {"context": 512, "batch": 1},
    "energy": {"context": 512, "batch": 1},
}
_EXAMPLES = {
    "latency": "at prompt 512, output 128",
    "ttft": "at prompt 512",
}
_SHARE = re.compile(r"\s*(?P<share>\d+(?:\.\d+)?)\s*x\s+(?P<rest>.*)")


@dataclass(frozen=True, slots=True, order=True)
class Step:
    """One forward pass.

    Attributes:
        tokens: new tokens of each sequence: the prompt's at prefill, 1 at decode.
        context: tokens that the KV caches hold before it.
        batch: sequences.

    >>> Step(512).rows, Step(1, 4096, 8).rows
    (512, 8)
    """

    tokens: int
    context: int = 0
    batch: int = 1

    @property
    def rows(self) -> int:
        """Rows of the matrix that every linear layer multiplies: all new tokens of the batch."""
        return self.tokens * self.batch

    def __str__(self) -> str:
        past = f" at context {self.context}" if self.context else ""
        return f"{self.tokens} tokens{past}" + (f", batch {self.batch}" if self.batch > 1 else "")


@dataclass(frozen=True, slots=True)
class Workload:
    """What is timed: steps, and how many of each.

    Attributes:
        steps: (count, step) of each; a mix of requests has fractions of counts.

    >>> Workload.parse("latency", "at prompt 512, output 128").steps
    ((1.0, Step(tokens=512, context=0, batch=1)), (127.0, Step(tokens=1, context=576, batch=1)))
    """

    steps: tuple[tuple[float, Step], ...]

    @classmethod
    def parse(cls, resource: str, condition: str) -> Workload:
        """Read the condition of a budget of time.

        ``ttft``: one prefill of the prompt. ``tpot``: one decode step with so many tokens in the caches. ``latency``: a
        whole request: the prefill, which gives the first token, and a decode step for each further one, all taken at
        the middle of their contexts. A mix has shares: ``at 0.7 x prompt 512, output 128 + 0.3 x prompt 64, output 8``.

        Raises:
            InputError: not a condition of that resource (E111).
        """
        found: dict[Step, Fraction] = {}
        for share, values in parse_mix(resource, condition):
            for count, step in _steps(resource, values):
                found[step] = found.get(step, Fraction(0)) + share * count
        return cls(tuple((float(count), step) for step, count in found.items()))


def canonical(resource: str, at: str | None) -> str:
    """Write what stands after ``at`` of a budget in one way, with what was left out; empty for other resources.

    Raises:
        InputError: not a condition of that resource (E111).

    >>> canonical("tpot", None), canonical("memory", "context 8192,batch 4"), canonical("weights", None)
    ('at context 512', 'at context 8192, batch 4', '')
    """
    if resource not in CONDITIONS:
        if at is not None:
            raise InputError("E111", f"budget: '{resource}' has no condition, got 'at {at}'", advice="leave it out")
        return ""
    parts = []
    for share, values in parse_mix(resource, at or ""):
        texts = [f"{name} {value}" for name, value in values.items() if name != "batch" or value > 1]
        parts.append(("" if share == 1 else f"{decimal_text(share)} x ") + ", ".join(texts))
    return f"at {' + '.join(parts)}"


def parse_mix(resource: str, condition: str) -> list[tuple[Fraction, dict[str, int]]]:
    """Read a condition into (share, values) of each kind of request; one of share 1 unless it is a mix.

    Raises:
        InputError: E111.

    >>> parse_mix("kv", "at context 8192")
    [(Fraction(1, 1), {'context': 8192, 'batch': 1})]
    """
    text = condition.strip().removeprefix("at ").strip()
    parts = [part.strip() for part in text.split("+")]
    if resource != "latency" and (len(parts) > 1 or _SHARE.fullmatch(text)):
        raise InputError("E111", f"budget of {resource}: only latency has mixes: '{text}'", advice=_advice(resource))
    found = []
    for part in parts:
        match = _SHARE.fullmatch(part)
        share = Fraction(match["share"]) if match else Fraction(1)
        if not share:
            raise InputError("E111", f"budget of {resource}: a share of 0 in '{text}'", advice="leave that part out")
        found.append((share, _values(resource, match["rest"] if match else part, text)))
    if sum(share for share, _ in found) != 1:
        total = float(sum(share for share, _ in found))
        raise InputError("E111", f"budget of {resource}: the shares of '{text}' add up to {total:g}, not to 1")
    return found


def _values(resource: str, part: str, text: str) -> dict[str, int]:
    known = CONDITIONS[resource]
    given: dict[str, int] = {}
    for item in filter(None, (item.strip() for item in part.split(","))):
        name, _, number = item.partition(" ")
        if name not in known or name in given or not number.strip().isdigit() or not int(number):
            raise InputError(
                "E111", f"budget of {resource}: 'at {text}' is not a condition: '{item}'", advice=_advice(resource)
            )
        given[name] = int(number)
    missing = [name for name, value in known.items() if value is None and name not in given]
    if missing:
        raise InputError(
            "E111", f"budget of {resource}: it does not say at what {' and '.join(missing)}", advice=_advice(resource)
        )
    return {name: given.get(name, value or 0) for name, value in known.items()}


def _advice(resource: str) -> str:
    example = _EXAMPLES.get(resource, "at context 8192")
    return f"end it with: {example}, or {example}, batch 4"


def _steps(resource: str, values: Mapping[str, int]) -> list[tuple[int, Step]]:
    batch = values["batch"]
    if resource == "ttft":
        return [(1, Step(values["prompt"], 0, batch))]
    if resource == "latency":
        prefill = (1, Step(values["prompt"], 0, batch))
        later = values["output"] - 1
        middle = values["prompt"] + values["output"] // 2
        return [prefill, (later, Step(1, middle, batch))] if later else [prefill]
    return [(1, Step(1, values["context"], batch))]
