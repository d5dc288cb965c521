"""Predicted and measured latency and memory of whole plans in ONNX Runtime, and what budgets of time are worth.

    python -m benchmarks.latency [--parts profile predict budgets phases clock]

The model is a Llama of random weights: 8 layers, 1,024 wide, 2,816 in the middle, about 100 million parameters; with
``--wide`` also one of two layers, 2,048 wide. Losses are squared weight errors: nothing is said of quality here, only
of time and memory.

- ``profile``: seconds to time 72 kernels (12 shapes x 6 formats), and how far two profiles in a row are apart.
- ``predict``: ten random plans that no correction has seen, run whole; the sum of their kernels and the corrected sum
  beside what they took, and predicted memory beside what was held.
- ``budgets``: for twenty budgets of tpot, the plan that is solved for is run: is it at or under? Beside it the plan
  solved for bytes alone that loses as much.
- ``phases``: the plans for prefill and for decode at the same share of the range, layer by layer.
- ``clock``: what reading the clock takes of a sample.
"""

from __future__ import annotations

import argparse
import math
import statistics
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path

import mpsearch as mp
from mpsearch.budget import parse_budgets
from mpsearch.format import Format
from mpsearch.hardware.clock import Clock, machine_load, reading_seconds
from mpsearch.hardware.latency import kernel_seconds, predicted
from mpsearch.hardware.memory import Memory
from mpsearch.hardware.profile import Profile, Whole
from mpsearch.hardware.profiling import Timekeeper
from mpsearch.layer import Layer, Layers
from mpsearch.machine import fingerprint
from mpsearch.plan import BitPlan
from mpsearch.planning import Planner
from mpsearch.spec import StudySpec
from mpsearch.tables import SensitivityTable
from mpsearch.wholes import Runner, corrected, spread_plans
from mpsearch.workload import Step

FORMATS = ("int2-g64", "int4-g128", "int4-g32", "int8-g128", "int8-channel@int8-tensor-asym", "bf16")
DECODE, PREFILL = Step(1, 512), Step(128)
BUDGETS = ("tpot <= 1 s at context 512", "ttft <= 100 s at prompt 128", "memory <= 1 TiB at context 512")


def make_model(folder: Path, hidden: int, middle: int, layers: int) -> Path:
    """Write a Llama of random weights."""
    import shutil

    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from mpsearch.bundled import bundled_model

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=4096, hidden_size=hidden, intermediate_size=middle, num_hidden_layers=layers,
        num_attention_heads=hidden // 64, num_key_value_heads=hidden // 256, max_position_embeddings=1024,
        tie_word_embeddings=False,
    )  # fmt: skip
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(bundled_model() / name, folder / name)
    return folder


@dataclass
class Bench:
    """One model, its planner and its profile."""

    folder: Path
    layers: Layers
    planner: Planner
    profile: Profile
    runner: Runner
    scores: SensitivityTable

    @classmethod
    def of(cls, folder: Path, wholes: int) -> Bench:
        found = mp.layers(str(folder))
        formats = [Format.parse(text) for text in FORMATS]
        start = time.perf_counter()
        profile, notices = Timekeeper().profile("onnxruntime", {}, found, formats, [DECODE, PREFILL])
        timed = time.perf_counter()
        runner = Runner(str(folder), folder.name)
        profile, more = corrected(runner, profile, found, formats, [DECODE, PREFILL], wholes)
        print(
            f"{folder.name}: {len(found)} layers, {found.weights / 1e6:.0f} M weights; {len(profile.times)} kernels in "
            f"{timed - start:.0f} s, {wholes} plans x 2 passes whole in {time.perf_counter() - timed:.0f} s"
        )
        for notice in (*notices, *more):
            print(notice)
        for step in (DECODE, PREFILL):
            print(f"{step}: {profile.correction(step)}", flush=True)
        # Rounding inputs costs no squared weight error: the format counts as its weights do.
        scores = mp.score(str(folder), [], [text.partition("@")[0] for text in FORMATS], "weight_mse", layers=found)
        scores = replace(scores, formats=FORMATS)
        spec = StudySpec(model="given", calibration="given", formats=FORMATS, budgets=BUDGETS)
        return cls(folder, found, Planner(spec, found, {}, profile=profile), profile, runner, scores)

    def predict(self, plan: BitPlan, resource: str) -> tuple[float, float]:
        table = next(table for table in self.planner.costs if table.resource.startswith(resource))
        return predicted(table, plan.choice(table.formats))

    def run(self, plans: dict[str, BitPlan], step: Step) -> dict[str, Whole]:
        return {run.label: run for run in self.runner.runs(self.profile, {step: plans})}


def profile_part() -> None:
    """12 shapes, 200 layers, 6 formats, twice."""
    sizes = [(512, 512), (512, 1024), (1024, 512), (1024, 1024), (1024, 2048), (2048, 1024), (2048, 2048), (2816, 1024),
             (1024, 2816), (2048, 5632), (5632, 2048), (4096, 2048)]  # fmt: skip
    layers = Layers(tuple(
        Layer(f"layers.{i}", "linear", sizes[i % 12], macs=sizes[i % 12][0] * sizes[i % 12][1]) for i in range(200)
    ))  # fmt: skip
    formats = [Format.parse(text) for text in FORMATS]
    profiles, seconds = [], []
    for _ in range(2):
        start = time.perf_counter()
        profile, notices = Timekeeper().profile("onnxruntime", {}, layers, formats, [Step(1)])
        seconds.append(time.perf_counter() - start)
        profiles.append(profile)
        print(f"{len(profile.times)} kernels in {seconds[-1]:.0f} s, load {machine_load().get('load', math.nan):.1f}")
        for notice in notices:
            print(notice)
    changes = [
        abs(a.seconds - b.seconds) / (a.seconds + b.seconds) * math.sqrt(2)
        for a, b in zip(profiles[0].times, profiles[1].times, strict=True)
    ]
    print(
        f"coefficient of variation of the two: median {100 * statistics.median(changes):.1f} %, "
        f"90th percentile {100 * statistics.quantiles(changes, n=10)[-1]:.1f} %, most {100 * max(changes):.1f} %\n"
    )


def predict_part(bench: Bench, count: int) -> None:
    """Plans that the correction has not seen."""
    print("| pass | plan | measured ms | sum of kernels | off | corrected ± | off | held MiB | predicted MiB | off |")
    print("|---|---|---:|---:|---:|---:|---:|---:|---:|---:|")
    plans = spread_plans(bench.layers, bench.planner.formats, bench.profile, DECODE, count + 2, seed=7)
    plans = {label: plan for label, plan in plans.items() if label.startswith("random")}
    for step, resource in ((DECODE, "tpot"), (PREFILL, "ttft")):
        off: list[tuple[float, float]] = []
        runs = bench.run(plans, step)
        for label, plan in plans.items():
            run = runs[label]
            table = kernel_seconds(bench.profile, plan, step)
            seconds, error = bench.predict(plan, resource)
            memory = Memory(f"at context {step.context or step.tokens}", replace(bench.profile, wholes=()))
            cost = memory.cost(bench.layers, bench.planner.formats)
            cells = cost.value[range(len(cost.layers)), plan.choice(cost.formats)]
            bytes_ = math.fsum(cells) + cost.fixed
            off.append((table / run.seconds - 1, seconds / run.seconds - 1))
            print(
                f"| {step} | {label} | {run.seconds * 1e3:.2f} ({run.low * 1e3:.2f} to {run.high * 1e3:.2f}) | "
                f"{table * 1e3:.2f} | {100 * off[-1][0]:+.1f} % | {seconds * 1e3:.2f} ± {error * 1e3:.2f} | "
                f"{100 * off[-1][1]:+.1f} % | {run.held / 2**20:.0f} | {bytes_ / 2**20:.0f} | "
                f"{100 * (bytes_ / run.held - 1):+.1f} % |{' ' + run.noise if run.noise else ''}",
                flush=True,
            )
        within = [sum(abs(pair[k]) <= 0.1 for pair in off) for k in (0, 1)]
        print(f"\n{step}: within 10 %: {within[0]} of {len(off)} before the correction, {within[1]} after\n")


def budgets_part(bench: Bench, count: int) -> None:
    """Is a plan under its budget of tpot when it runs?"""
    table = next(table for table in bench.planner.costs if table.resource.startswith("tpot"))
    mask = bench.planner.mask
    least, most = (
        math.fsum(reduce(table.value + mask)) + table.fixed
        for reduce in (lambda a: nan_reduce(a, min), lambda a: nan_reduce(a, max))
    )
    print("| tpot <= ms | measured ms | kept | MiB | loss | by bytes alone: MiB | loss | measured ms |")
    print("|---:|---:|---|---:|---:|---:|---:|---:|")
    limits, plans = {}, {}
    for k in range(count):
        limits[k] = least + (most - least) * (k + 1) / (count + 6)
        plan = bench.planner.mixed(bench.scores, parse_budgets([f"tpot <= {limits[k] * 1e3:.6f} ms at context 512"]))
        plans[f"{k}"] = plan
        loss = (plan.predicted.loss or 0.0) * (1 + 1e-9)
        plans[f"{k} bytes"] = bench.planner.answer(bench.scores, (), "weights", loss).plan
    runs = bench.run(plans, DECODE)
    kept = 0
    for k, limit in limits.items():
        plan, other, run, rival = plans[f"{k}"], plans[f"{k} bytes"], runs[f"{k}"], runs[f"{k} bytes"]
        kept += run.high <= limit
        print(
            f"| {limit * 1e3:.2f} | {run.seconds * 1e3:.2f} ({run.low * 1e3:.2f} to {run.high * 1e3:.2f}) | "
            f"{'yes' if run.high <= limit else 'no'} | {plan.bytes / 2**20:.1f} | {plan.predicted.loss:.4g} | "
            f"{other.bytes / 2**20:.1f} | {other.predicted.loss:.4g} | {rival.seconds * 1e3:.2f} |",
            flush=True,
        )
    print(f"\nat or under its budget, with its interval: {kept} of {count}\n")


def nan_reduce(table: object, reduce: object) -> list[float]:
    return [reduce(x for x in row if not math.isnan(x)) for row in table.tolist()]  # type: ignore[attr-defined,operator]


def phases_part(bench: Bench) -> None:
    """The same menu under a budget of prefill and one of decode."""
    plans = {}
    for resource, condition in (("ttft", "at prompt 128"), ("tpot", "at context 512")):
        table = next(table for table in bench.planner.costs if table.resource.startswith(resource))
        least = math.fsum(nan_reduce(table.value + bench.planner.mask, min)) + table.fixed
        limit = least * 1.25
        plans[resource] = bench.planner.mixed(
            bench.scores, parse_budgets([f"{resource} <= {limit * 1e3:.6f} ms {condition}"])
        )
        per_format = {name: float(table.value[1, j]) * 1e3 for j, name in enumerate(table.formats)}
        print(
            f"{resource}: budget {limit * 1e3:.2f} ms (1.25 x the fastest); '{table.layers[1]}' in ms: "
            + ", ".join(f"{name} {value:.3f}" for name, value in sorted(per_format.items(), key=lambda x: x[1]))
        )
    taken = {step: bench.run(plans, step) for step in (PREFILL, DECODE)}
    for resource, plan in plans.items():
        counts: dict[str, int] = {}
        for row in plan.layers.decisions:
            name = str(plan.formats[row.layers[0].name])
            counts[name] = counts.get(name, 0) + 1
        shown = ", ".join(f"{count} x {name}" for name, count in sorted(counts.items()))
        runs = {step: taken[step][resource].seconds * 1e3 for step in (PREFILL, DECODE)}
        print(
            f"plan for {resource}: {shown}; prefill {runs[PREFILL]:.1f} ms, decode {runs[DECODE]:.2f} ms, "
            f"{plan.bytes / 2**20:.1f} MiB"
        )
    differs = sum(plans["ttft"].formats[layer.name] != plans["tpot"].formats[layer.name] for layer in bench.layers)
    print(f"{differs} of {len(bench.layers)} layers differ\n")


def clock_part() -> None:
    """Reading the clock against the shortest sample."""
    timing = Clock(limit=0.5).time(lambda: None)
    share = reading_seconds() / (timing.calls * timing.seconds)
    print(f"clock: {reading_seconds() * 1e9:.0f} ns a sample of {timing.calls} calls: {100 * share:.2f} % of it\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parts = ("profile", "predict", "budgets", "phases", "clock")
    parser.add_argument("--parts", nargs="*", default=parts, choices=parts)
    parser.add_argument("--plans", type=int, default=10)
    parser.add_argument("--budgets", type=int, default=20)
    parser.add_argument("--wide", action="store_true", help="also predict for two layers 2,048 wide")
    args = parser.parse_args()
    print(f"{fingerprint()}\n")
    if "clock" in args.parts:
        clock_part()
    if "profile" in args.parts:
        profile_part()
    if not {"predict", "budgets", "phases"} & set(args.parts):
        return
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench.of(make_model(Path(folder) / "llama-107m", 1024, 2816, 8), 7)
        if "predict" in args.parts:
            predict_part(bench, args.plans)
        if "budgets" in args.parts:
            budgets_part(bench, args.budgets)
        if "phases" in args.parts:
            phases_part(bench)
        if args.wide:
            predict_part(Bench.of(make_model(Path(folder) / "llama-wide", 2048, 5632, 2), 7), args.plans)


if __name__ == "__main__":
    main()
