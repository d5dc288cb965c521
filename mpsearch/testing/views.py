"""Made-up studies of any size, for what draws them."""

from __future__ import annotations

import hashlib
import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mpsearch.format import Format
from mpsearch.front import Measurement
from mpsearch.layer import Layer, Layers
from mpsearch.tables import CostTable, SensitivityTable
from mpsearch.views.points import Group, Numbers, Points
from mpsearch.views.study_view import Limit, StudyView

FORMATS = ("int2-g64", "int3-g64", "int4-g64", "int6-g64", "int8-channel", "int5-g64", "int7-g64", "bf16")
_BLOCK = {
    "self_attn.q_proj": (256, 256), "self_attn.k_proj": (128, 256), "self_attn.v_proj": (128, 256),
    "self_attn.o_proj": (256, 256), "mlp.gate_proj": (704, 256), "mlp.up_proj": (704, 256),
    "mlp.down_proj": (256, 704),
}  # fmt: skip
Choice = NDArray[np.uint16]


def pretended(plans: int, layers: int, formats: int, seed: int = 0, *, hostile: str = "") -> StudyView:
    """Make the view of a study that never ran: a decoder, its scores, costs, plans and measurements.

    Scores fall by a factor of about four a bit and differ between layers as those of real models do. Of the plans some
    lie along the best front, most are changes of those, as searches make them, some are random, and one is uniform for
    each format. Nine in ten are measured.

    Args:
        plans: number of plans, at least one more than formats; where there are not so many different ones, as many.
        layers: number of layers, each a decision of its own.
        formats: number of formats, at most 8.
        seed: the same one makes the same view.
        hostile: text that is put behind every name.

    >>> view = pretended(20, 16, 4)
    >>> len(view.points), view.points.choice.shape, view.scores.value.shape
    (20, (20, 16), (16, 4))
    """
    generator = np.random.default_rng(seed)
    model = _layers(layers, hostile)
    names = tuple(sorted(FORMATS[:formats], key=lambda name: Format.parse(name).bits))
    rows = tuple(layer.name for layer in model)
    parsed = [Format.parse(name) for name in names]
    bits = np.array([fmt.bits for fmt in parsed], dtype=np.float64)
    weak = np.exp(generator.normal(0.0, 1.3, layers)) * 0.4 / layers
    value = weak[:, None] * 4.0 ** (2 - bits) * np.exp(generator.normal(0.0, 0.15, (layers, formats)))
    # Estimates of nearly nothing fall below zero now and then.
    value[3::7, -1] *= -0.5
    scores = SensitivityTable(
        rows, names, value, np.abs(value) * 0.08, "nats/token", samples=128, source={"estimator": "fisher"}
    )
    sizes = np.array([[float(fmt.bytes(layer)) for fmt in parsed] for layer in model])
    costs = _costs(model, names, rows, sizes)
    settled = np.where(value < 0, scores.spread, value)
    choice, groups, labels = _plans(plans, settled, sizes, names, generator)
    points, measured = _points(choice, groups, [f"{label}{hostile}" for label in labels], scores, costs, generator)
    half = (sizes[:, 0].sum() + sizes[:, -1].sum()) / 2
    return StudyView(
        f"pretended{hostile}",
        "complete",
        model,
        points,
        measured,
        scores,
        costs,
        (Limit(f"weights <= {half / 2**20:.4g} MiB{hostile}", "weights", float(half)),),
        {"name": f"pretended{hostile}", "digest": "d" * 64},
        (f"Mixing pays, as far as made-up numbers can say.{hostile}", "The next larger uniform plan is int8-channel."),
        (f"note[N415] nothing here was ever measured{hostile}",),
        {"study": {f"model{hostile}": f"pretended{hostile}", "seeds": [seed, {"data": hostile}]}},
    )


def _layers(count: int, hostile: str) -> Layers:
    items = [Layer(f"model.embed_tokens{hostile}", "embedding", (4096, 256), dtype="bfloat16")]
    block = 0
    while len(items) < count - 1:
        items += [
            Layer(f"model.layers.{block}.{name}{hostile}", "linear", shape, dtype="bfloat16", macs=math.prod(shape))
            for name, shape in _BLOCK.items()
        ]
        block += 1
    head = Layer(f"lm_head{hostile}", "linear", (4096, 256), dtype="bfloat16", macs=4096 * 256)
    return Layers((*items[: count - 1], head)) if count > 1 else Layers((head,))


def _costs(model: Layers, names: tuple[str, ...], rows: tuple[str, ...], sizes: Numbers) -> tuple[CostTable, ...]:
    none = np.zeros_like(sizes)
    weights = CostTable(
        rows, names, sizes, none, "bytes", "weights", "exact", 0.0, 2.0 * model.weights, model.weights
    )  # fmt: skip
    seconds = sizes / 900e9 + 2e-6
    latency = CostTable(rows, names, seconds, seconds * 0.02, "s", "tpot at context 512", "measured", 1e-4)
    return weights, latency


def _plans(
    count: int, settled: Numbers, sizes: Numbers, names: tuple[str, ...], generator: np.random.Generator
) -> tuple[Choice, list[Group], list[str]]:
    layers, formats = settled.shape
    best = max(1, min(200, (count - formats) // 4))
    scale = np.ptp(settled) / np.ptp(sizes) if formats > 1 else 1.0
    prices = scale * 10.0 ** np.linspace(0.0, -5.0, best)
    front = np.array([(settled + price * sizes).argmin(axis=1) for price in prices], dtype=np.uint16)
    rest = max(0, count - best - formats)
    drawn = rest // 5
    parents = front[generator.integers(0, best, rest - drawn)]
    changed = generator.random(parents.shape) < generator.uniform(0.02, 0.4, (len(parents), 1))
    searched = np.where(changed, generator.integers(0, formats, parents.shape), parents).astype(np.uint16)
    random = generator.integers(0, formats, (drawn, layers)).astype(np.uint16)
    uniform = np.repeat(np.arange(formats, dtype=np.uint16)[:, None], layers, axis=1)
    made: list[tuple[Group, int]] = [
        ("mixed", best), ("uniform", formats), ("searched", len(searched)), ("random", drawn),
    ]  # fmt: skip
    groups: list[Group] = [group for group, many in made for _ in range(many)]
    groups[best // 2] = "chosen"
    labels = ["mixed"] * best + [f"uniform {name}" for name in names]
    labels += [f"evolution {i}" for i in range(len(searched))] + [f"random {i}" for i in range(drawn)]
    order = [best // 2, *(i for i in range(len(groups)) if i != best // 2)]
    choice = np.concatenate([front, uniform, searched, random])
    kept = _different(choice, groups, formats, generator)
    order = [i for i in order if i in kept][:count]
    return choice[order], [groups[i] for i in order], [labels[i] for i in order]


def _different(choice: Choice, groups: list[Group], formats: int, generator: np.random.Generator) -> set[int]:
    """Change plans that are there twice, where that helps; return those that are then there once."""
    first = np.array(sorted(range(len(choice)), key=lambda i: groups[i] not in ("uniform", "chosen")))
    for turn in range(40):
        once = first[np.unique(choice[first], axis=0, return_index=True)[1]]
        again = np.setdiff1d(first, once)
        if not len(again):
            break
        for _ in range(turn + 1):
            at = generator.integers(0, choice.shape[1], len(again))
            choice[again, at] = generator.integers(0, formats, len(again))
    return set(first[np.unique(choice[first], axis=0, return_index=True)[1]].tolist())


def _points(
    choice: Choice,
    groups: list[Group],
    labels: list[str],
    scores: SensitivityTable,
    costs: tuple[CostTable, ...],
    generator: np.random.Generator,
) -> tuple[Points, tuple[Measurement, ...]]:
    settled = np.where(scores.value < 0, scores.spread, scores.value)
    at = np.arange(choice.shape[1])
    predicted = np.array([math.fsum(settled[at, row].tolist()) for row in choice])
    doubt = np.array([math.fsum(scores.spread[at, row].tolist()) for row in choice])
    cost = {t.resource: np.array([t.fixed + math.fsum(t.value[at, row].tolist()) for row in choice]) for t in costs}
    loss = predicted * np.exp(generator.normal(0.05, 0.12, len(choice)))
    loss[generator.random(len(choice)) < 0.1] = np.nan
    loss[0] = predicted[0] * 1.03
    spread = np.abs(loss) * generator.uniform(0.01, 0.04, len(choice))
    keys = tuple(hashlib.sha256(row.tobytes()).hexdigest() for row in choice)
    plans = tuple(hashlib.sha256(key.encode()).hexdigest() for key in keys)
    solved = np.array([group in ("mixed", "chosen") for group in groups])
    by_size = np.argsort(cost["weights"], kind="stable")
    least = np.empty_like(predicted)
    least[by_size] = np.minimum.accumulate(predicted[by_size])
    bound = np.where(solved, least, np.nan)
    limits = (f"weights <= {int(size)} B" for size in cost["weights"])
    sources = tuple({"budgets": [text]} if own else {} for text, own in zip(limits, solved.tolist(), strict=True))
    points = Points(
        keys, plans, tuple(labels), tuple(groups), loss, spread, predicted, doubt, bound, cost, choice,
        scores.formats, "nats/token", sources,
    )  # fmt: skip
    return points, tuple(_measurements(points))


def _measurements(points: Points) -> list[Measurement]:
    found: list[Any] = []
    for i in np.flatnonzero(points.measured).tolist():
        cost = {name: float(values[i]) for name, values in points.cost.items()}
        loss, spread = float(points.loss[i]), float(points.spread[i])
        found.append(Measurement(points.keys[i], points.labels[i], loss, spread, "nats/token", cost, machine="nowhere"))
    return found
