"""Is it the bits or the rounding? A joint menu against bits alone, at equal stored bytes, on the bundled model.

    python -m benchmarks.joint_menu

For each budget, plans are chosen from three menus: bits alone (rounded to nearest in groups of 64), bits alone rounded
by GPTQ, and a joint menu of bits, group sizes, symmetric and asymmetric codes, and rounding to nearest or by GPTQ.
Scores are taken under the rounding that ships, by `block_mse`, which sees that GPTQ's errors cancel. The joint plan is
then refined on measured losses. Each row says the measured KL on all validation tokens, that of the best uniform GPTQ
plan within the bytes, and the seconds of each step of the search; measuring the uniform rivals is not part of them.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import mpsearch as mp
from mpsearch import rivals
from mpsearch.bundled import BUNDLED
from mpsearch.front import Measurement
from mpsearch.machine import fingerprint
from mpsearch.planning import Labelled
from mpsearch.studying import Study

BUDGETS = (2.5, 3.0, 3.5, 4.25, 6.0)


def menus(budget: float) -> dict[str, list[str]]:
    """The three menus, with the bits that a plan of this budget could use."""
    bits = [b for b in (2, 3, 4, 5, 6, 8) if budget - 2.3 <= b <= budget + 2.5]
    joint = [f"int{b}-g{g}{rule}" for b in bits for g in (32, 128) for rule in ("", "-gptq")]
    # A zero point pays where codes are few.
    joint += [f"int{b}-g32-asym{rule}" for b in bits if b <= 3 for rule in ("-mse", "-gptq")]
    return {
        "bits, nearest": [f"int{b}-g64" for b in bits],
        "bits, gptq": [text for b in bits for text in (f"int{b}-g64", f"int{b}-g64-gptq")],
        "joint": joint,
    }


def study_of(name: str, formats: list[str], budget: float, folder: Path, args: argparse.Namespace) -> Study:
    return mp.study(
        name,
        model=BUNDLED,
        calibration="stdlib:calibration",
        validation="stdlib:validation",
        budgets=[f"weights <= {budget} bits"],
        formats=formats,
        estimator=args.estimator,
        tokens=args.tokens,
        points=0,
        workers=args.workers,
        storage=f"sqlite:///{folder}/{name.replace(' ', '-').replace(',', '')}-{budget}.db",
    )


def uniform_gptq(study: Study, budget: float) -> tuple[str, Measurement] | None:
    """The best measured uniform GPTQ plan of at most the budget's bytes."""
    with study.session() as session:
        limit = study.budgets[0].limit(session.planner.costs[0])
        plans = [x for x in rivals.uniform(session.planner) if x.label.endswith("gptq") and x.plan.bytes <= limit]
        measured = session.measure(plans)
    found = [(item.label, measured[item.plan.key]) for item in plans if item.plan.key in measured]
    return min(found, key=lambda pair: pair[1].loss, default=None)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--estimator", default="block_mse")
    parser.add_argument("--tokens", type=int, default=8192, help="calibration tokens of the scores")
    parser.add_argument("--evaluations", type=int, default=16)
    parser.add_argument("--budgets", type=float, nargs="*", default=BUDGETS)
    args = parser.parse_args()
    print(f"{fingerprint()}\n")
    print("| budget | menu | formats | KL | bits | score s | solve s | measure s | search s, evaluations | KL after |")
    print("|---|---|---:|---:|---:|---:|---:|---:|---:|---:|", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        for budget in args.budgets:
            rivals = []
            for name, formats in menus(budget).items():
                study = study_of(name, formats, budget, Path(folder), args)
                start = time.perf_counter()
                with study.session() as session:
                    scores, _ = session.score(args.estimator)
                    scored = time.perf_counter()
                    plan = session.planner.mixed(scores, study.budgets)
                    solved = time.perf_counter()
                    measured = session.measure([Labelled("mixed", plan)])[plan.key]
                    done = time.perf_counter()
                line = [
                    f"{budget}",
                    name,
                    str(len(formats)),
                    f"{measured.loss:.4f} ± {measured.spread:.4f}",
                    f"{plan.bits:.3f}",
                ]
                line += [f"{scored - start:.1f}", f"{solved - scored:.2f}", f"{done - solved:.1f}"]
                if name == "joint":
                    found = study.search("refine", evaluations=args.evaluations)
                    seconds = time.perf_counter() - done
                    after = found.held_out[1] if found.held_out is not None else measured
                    line += [f"{seconds:.1f}, {len(found.trials)}", f"{after.loss:.4f} ± {after.spread:.4f}"]
                else:
                    line += ["", ""]
                print(f"| {' | '.join(line)} |", flush=True)
                if name != "bits, nearest" and (rival := uniform_gptq(study, budget)) is not None:
                    rivals.append(rival)
            if rivals:
                weights = study.survey.layers.weights
                label, best = min(rivals, key=lambda pair: pair[1].loss)
                bits = f"{best.cost['weights'] * 8 / weights:.3f}"
                print(
                    f"| {budget} | best {label} | | {best.loss:.4f} ± {best.spread:.4f} | {bits} | | | | | |",
                    flush=True,
                )


if __name__ == "__main__":
    main()
