"""What curvature and replayed passes cost, in units of plain passes. One thread.

    python -m benchmarks.curvature

1. hessian_trace over all layers: seconds per probe and batch over those of one forward and backward pass.
2. Joint probes against layer by layer at equal standard error: seconds x variance.
3. divergence with remembered prefixes against full forward passes.
4. Scores of one pass over the data: seconds over those of plain passes and the roundings.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from mpsearch import registry
from mpsearch.bundled import bundled_model
from mpsearch.format import parse_formats
from mpsearch.machine import fingerprint
from mpsearch.model.data import load_batches, load_tokenizer
from mpsearch.model.find import find_layers
from mpsearch.model.model import load_model, samples_of
from mpsearch.model.source import Source
from mpsearch.sensitivity.assemble import Deltas
from mpsearch.sensitivity.divergence import Divergence
from mpsearch.sensitivity.hessian_trace import HessianTrace
from mpsearch.spec import DEFAULT_FORMATS


def seconds(work: Callable[[], object], repeat: int) -> float:
    """Median time of some runs."""
    times = []
    for _ in range(repeat):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def traces(model: Any, batches: Any, layers: Any, base: float, layer_probes: int) -> None:
    """Sections 1 to 3."""
    batch = batches[0]
    for settings in ({}, {"product": "double_backward"}):
        estimator = HessianTrace(probes=16, least_probes=16, **settings)
        used = seconds(lambda e=estimator: e.traces(model, batch, layers), 3)
        name = settings.get("product", "finite_difference")
        print(f"joint, {name}: {used / 16 / base:.2f} x forward and backward per probe, over 16 probes")

    start = time.perf_counter()
    joint = np.array(HessianTrace(probes=64, least_probes=64).traces(model, batch, layers))
    joint_seconds = (time.perf_counter() - start) / 64
    start = time.perf_counter()
    single = np.array(
        HessianTrace(probes=layer_probes, least_probes=layer_probes, probing="layer").traces(model, batch, layers)
    )
    single_seconds = (time.perf_counter() - start) / layer_probes
    variance = joint.var(axis=0, ddof=1) / single.var(axis=0, ddof=1)
    print(
        f"one probe of all {len(layers)} layers: joint {joint_seconds:.2f} s, layer by layer {single_seconds:.2f} s "
        f"({single_seconds / joint_seconds:.1f} x)"
    )
    print(f"variance of a joint probe over that of a layer's own: median {np.median(variance):.1f} x")
    print(f"joint at equal standard error: {single_seconds / joint_seconds / np.median(variance):.2f} x as fast")
    print(f"correlation of the traces (log, {layer_probes} layer probes against 64 joint): ", end="")
    both = (joint.mean(axis=0) > 0) & (single.mean(axis=0) > 0)
    print(f"{np.corrcoef(np.log(joint.mean(axis=0)[both]), np.log(single.mean(axis=0)[both]))[0, 1]:.3f}")

    formats = parse_formats(DEFAULT_FORMATS)
    fast, full = Divergence(), Divergence(reuse=False)
    fast.score(model, batches, layers, formats[:1])
    a = seconds(lambda: fast.score(model, batches, layers, formats), 3)
    b = seconds(lambda: full.score(model, batches, layers, formats), 3)
    print(f"divergence: remembered {a:.2f} s, full passes {b:.2f} s: {a / b:.2f} x")


def one_pass(model: Any, batches: Any, layers: Any, weights: Any) -> None:
    """Section 4."""
    formats = parse_formats(DEFAULT_FORMATS)
    samples = [sample for batch in batches for sample in samples_of(batch)]

    def plain(create: bool) -> None:
        for sample in samples:
            if create:
                torch.autograd.grad(model.loss(sample), weights)
            else:
                with torch.no_grad():
                    model.logits(sample)

    def rounding() -> None:
        model.forget()
        deltas = Deltas.of(model)
        for layer in layers:
            for fmt in formats:
                deltas(layer, fmt)

    backward, forward, rounded = (seconds(work, 3) for work in (lambda: plain(True), lambda: plain(False), rounding))
    print(f"{len(samples)} samples, {len(formats)} formats: forward {forward:.2f} s, ", end="")
    print(f"forward and backward {backward:.2f} s, rounding {rounded:.2f} s")
    for name, passes in (
        ("fisher", backward),
        ("grad_x_weight", backward),
        ("grad_loss_change", backward),
        ("layer_hessian", forward),
        ("output_mse", forward),
    ):
        estimator = registry.make("estimators", name)

        def work(estimator: Any = estimator) -> None:
            model.forget()
            estimator.score(model, batches, layers, formats)

        used = seconds(work, 3)
        print(f"{name}: {used:.2f} s, {used / (passes + rounded):.2f} x plain passes and rounding")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--layer-probes", type=int, default=6)
    parser.add_argument("--one-pass", action="store_true", help="only section 4")
    args = parser.parse_args()
    torch.set_num_threads(1)
    print(fingerprint())
    model = load_model(bundled_model())
    tokenizer = load_tokenizer(bundled_model())
    batches = load_batches(
        Source("stdlib:calibration"), tokenizer, length=args.length, tokens=8 * args.length, batch_size=2
    )
    layers = find_layers(model)
    weights = [model.weight(layer.name) for layer in layers]
    batch = batches[0]
    torch.autograd.grad(model.loss(batch), weights)
    base = seconds(lambda: torch.autograd.grad(model.loss(batch), weights), 7)
    print(f"forward and backward, 2 x {args.length} tokens: {base:.3f} s")
    if not args.one_pass:
        traces(model, batches, layers, base, args.layer_probes)
    one_pass(model, batches, layers, weights)


if __name__ == "__main__":
    main()
