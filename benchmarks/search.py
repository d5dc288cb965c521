"""What does searching on measured losses cost, and gain? On the bundled model, against EvoPress's published schedule.

    python -m benchmarks.search

EvoPress's schedule has 150 generations of 128 children; 16 and then 4 survive, on 2,048, 16,384 and 131,072 tokens.
Here the validation text has 64 batches of one sequence, and the stages are the first 1, the first 8 and all 64 of them:
the published 1 : 8 : 64, with every count of tokens scaled by length / 2,048 (1 / 32 by default). All searchers are
measured on the same batches. A plan that comes up again is looked up, for everybody, and costs nothing. Tokens of
scoring are counted as one pass for each cell that is scored (divergence), or three for all (fisher: forward and
backward). The plans that are found are then measured on 16,384 tokens in sequences of 256.

The second table searches on 16,384 tokens in sequences of 256, and tests on as many that no search saw.
"""

from __future__ import annotations

import argparse
import itertools
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import mpsearch as mp
from mpsearch import registry
from mpsearch.bundled import BUNDLED, resolve_model
from mpsearch.evaluate.first import First
from mpsearch.evaluate.kl import Kl
from mpsearch.machine import fingerprint
from mpsearch.model.model import load_model
from mpsearch.planning import Planner
from mpsearch.problem import Problem
from mpsearch.searching import drive
from mpsearch.studying import Study
from mpsearch.trials import Seen, Trial, history

FORMATS = [f"int{bits}-g64" for bits in range(2, 9)]
BATCHES = 64
TOKENS = 4096
#: (searcher, estimator of the scores that it starts from, settings)
ENTRIES: tuple[tuple[str, str, dict[str, Any]], ...] = (
    ("refine", "fisher", {"evaluations": 150, "screen": 8}),
    ("refine", "divergence", {"evaluations": 150, "screen": 8}),
    ("evolve", "fisher", {"evaluations": 600}),
    ("optuna", "fisher", {"evaluations": 60}),
    ("surrogate", "fisher", {"evaluations": 60}),
)


class Bench:
    """Measures trials on some batches, and counts the tokens."""

    def __init__(self, planner: Planner, model: Any, batches: Sequence[Any], report: str = "") -> None:
        self.planner, self.model, self.batches, self.report = planner, model, batches, report
        self.tokens: list[int] = []
        self.began = time.perf_counter()

    def plan(self, choice: Sequence[int]) -> mp.BitPlan:
        """The plan of a choice."""
        formats = {
            layer.name: self.planner.formats[column]
            for decision, column in zip(self.planner.layers.decisions, choice, strict=True)
            for layer in decision.layers
        }
        return mp.BitPlan(self.planner.layers, formats, self.planner.model)

    def measure(self, trials: Sequence[Trial]) -> list[Seen]:
        """Measure some trials."""
        found = []
        for trial in trials:
            batches = First(self.batches, trial.batches) if trial.batches else self.batches
            measured = Kl().measure(self.model, self.plan(trial.choice), batches)
            self.tokens.append(sum(batch["input_ids"].numel() for batch in batches))
            found.append(Seen(trial, measured.loss, measured.spread))
        if self.report and not trials[-1].batches:
            seconds, least = time.perf_counter() - self.began, min(item.loss for item in found)
            done = f"{len(self.tokens)} evaluations, {sum(self.tokens):,} tokens, {seconds:.0f} s"
            print(f"  {self.report}: {done}, loss {least:.5f}", flush=True)
        return found


def study_of(bits: str, estimator: str, args: argparse.Namespace) -> Study:
    return mp.study(
        f"search-{estimator}-{bits}",
        model=BUNDLED,
        calibration="stdlib:calibration",
        validation="stdlib:validation",
        formats=FORMATS,
        budgets=[f"weights <= {bits} bits"],
        estimator=estimator,
        tokens=TOKENS,
        storage=args.storage,
    )


def validation(study: Study, tokens: int, length: int) -> list[Any]:
    """Batches of one sequence each."""
    found = list(mp.batches(study.spec.model, "stdlib:validation", tokens=tokens, length=length, batch_size=1))
    assert len(found) == tokens // length
    return found


def scoring(estimator: str, problem: Problem) -> int:
    """Tokens of the scores."""
    return TOKENS * (3 if estimator == "fisher" else int(problem.offered.sum()))


def reached(curve: Sequence[tuple[int, float]], before: int, loss: float) -> str:
    """Tokens, those of scoring included, after which a curve is at or below a loss."""
    return next((f"{before + tokens:,}" for tokens, value in curve if value <= loss), "never")


def run(bits: str, args: argparse.Namespace, batches: list[Any], test: list[Any], published: bool) -> None:
    """Let all searchers search on some batches, and test their plans on others."""
    rows: list[tuple[str, list[str]]] = []
    curves: dict[str, tuple[int, list[tuple[int, float]]]] = {}
    rule = {"schedule": "published", "evaluations": 10**9, "generations": args.generations}
    entries = [*([("evolve", "", rule)] if published else []), *(x for x in ENTRIES if x[0] in args.only)]
    starts = set()
    model = load_model(resolve_model(BUNDLED, Path.cwd()))
    for name, estimator, settings in entries:
        study = study_of(bits, estimator or "fisher", args)
        with study.session() as session:
            scores, _ = session.score(study.spec.estimator)
            problem = session.planner.problem(scores, study.budgets)
        label = f"{name}, {estimator}" if estimator else "published schedule"
        bench = Bench(session.planner, model, batches, label if args.verbose else "")
        searcher = registry.make("searchers", name, seed=args.seed, **settings)
        trials = drive(problem, searcher, bench.measure, 10**9)
        seconds = time.perf_counter() - bench.began
        whole = [item for item in trials if not item.trial.batches]
        best = searcher.best(problem, trials) if hasattr(searcher, "best") else min(whole, key=lambda x: x.loss)
        before = scoring(estimator, problem) if estimator else 0
        curves[label] = (before, history(trials, bench.tokens))
        found = [(label, best, len(trials), sum(bench.tokens), f"{seconds:.0f}")]
        if estimator and estimator not in starts:
            starts.add(estimator)
            found.insert(0, (f"solved, {estimator}", whole[0], 1, bench.tokens[trials.index(whole[0])], ""))
        for what, item, count, tokens, took in found:
            final = Kl().measure(model, bench.plan(item.trial.choice), test)
            losses = [f"{item.loss:.5f}", f"{final.loss:.5f} ± {final.spread:.5f}"]
            rows.append((what, [f"{count:,}", f"{before:,}", f"{tokens:,}", *losses, took]))
            print(f"  {rows[-1]}", flush=True)
        study.store.close()
    show(rows, curves, published)


def show(rows: Sequence[tuple[str, list[str]]], curves: Any, published: bool) -> None:
    """Print what was reached, and the curves."""
    names = [
        "",
        "evaluations",
        "tokens of scoring",
        "tokens of search",
        "loss searched on",
        "loss tested on",
        "seconds",
    ]
    if published:
        names.append("all tokens to the published schedule's loss")
    print("\n| " + " | ".join(names) + " |\n|---|" + "---:|" * (len(names) - 1))
    target = curves["published schedule"][1][-1][1] if published else math.nan
    for label, cells in rows:
        alone = [(int(cells[2].replace(",", "")), float(cells[3]))]
        before, curve = curves.get(label, (int(cells[1].replace(",", "")), alone))
        last = [reached(curve, before, target)] if published else []
        print(f"| {label} | " + " | ".join([*cells, *last]) + " |")
    most = max(before + curve[-1][0] for before, curve in curves.values())
    print("\n| all tokens | " + " | ".join(curves) + " |\n|---:|" + "---:|" * len(curves))
    for mark in (most // 2**k for k in range(10, -1, -1)):
        cells = [[loss for used, loss in curve if before + used <= mark] for before, curve in curves.values()]
        print(f"| {mark:,} | " + " | ".join(f"{min(found):.5f}" if found else "" for found in cells) + " |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--length", type=int, default=64, help="tokens of a batch; the published shape has 2,048")
    parser.add_argument("--generations", type=int, default=150)
    parser.add_argument("--bits", nargs="*", default=["4.25", "3"])
    parser.add_argument("--only", nargs="*", default=sorted({name for name, _, _ in ENTRIES}))
    parser.add_argument("--parts", nargs="*", default=["published", "held-out"])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--storage", default="search.db", help="keeps the scores")
    parser.add_argument("--verbose", action="store_true")
    args = parser.parse_args()
    print(f"{fingerprint()}\n")
    for bits, part in itertools.product(args.bits, args.parts):
        study = study_of(bits, "fisher", args)
        blocks = validation(study, 2 * 16384, 256)
        study.store.close()
        if part == "published":
            batches = validation(study, args.length * BATCHES, args.length)
            print(f"\n### {bits} bits, {BATCHES} batches of {args.length} tokens\n")
            run(bits, args, batches, validation(study, 16384, 256), published=True)
        else:
            print(f"\n### {bits} bits, searched on 16,384 tokens and tested on 16,384 others\n")
            run(bits, args, blocks[::2], blocks[1::2], published=False)


if __name__ == "__main__":
    main()
