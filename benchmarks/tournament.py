"""Which estimator predicts best, and what it costs: a Llama, a ViT and a ResNet. One tournament each.

    python -m benchmarks.tournament --workers 2

For each model: 100 random plans of five sizes are measured; every estimator predicts their losses, and chooses a plan
of each size, which is measured too. The ViT and the ResNet are trained on scikit-learn's digits on the spot.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator

import mpsearch as mp
from mpsearch.bundled import BUNDLED
from mpsearch.machine import fingerprint
from mpsearch.standings import Tournament
from mpsearch.studying import Study

SMALL = ["int2-channel", "int3-channel", "int4-channel", "int5-channel", "int6-channel", "int8-channel"]


def studies(args: argparse.Namespace) -> Iterator[tuple[str, Study]]:
    """The three models, each with the menu that fits it."""
    common = {"storage": args.storage, "seed": 0}
    yield (
        "bundled Llama",
        mp.study(
            "llama",
            model=BUNDLED,
            calibration="stdlib:calibration",
            validation="stdlib:validation",
            budgets=["weights <= 3.5 bits"],
            tokens=4096,
            validation_tokens=8192,
            workers=args.workers,
            **common,
        ),
    )
    from tests.digits import digits_resnet, digits_vit

    for name, make in (("ViT on digits", digits_vit), ("ResNet on digits", digits_resnet)):
        model, calibration, validation = make()
        budgets = ["weights <= 28 %"]
        yield (
            name,
            mp.study(
                name,
                model=model,
                calibration=calibration,
                validation=validation,
                formats=SMALL,
                budgets=budgets,
                **common,
            ),
        )


def table(outcome: Tournament) -> Iterator[str]:
    """The outcome as Markdown."""
    yield "| estimator | its plans lose | rank correlation | 95 % | same size | seconds | |"
    yield "|---|---:|---:|---|---:|---:|---|"
    for entry in outcome.entries:
        c = entry.correlation
        yield " | ".join(
            (
                f"| {entry.estimator}",
                "" if entry.excess is None else f"+{100 * entry.excess:.1f} %",
                "" if c is None else f"{c.value:.3f}",
                "" if c is None else f"{c.low:.3f} to {c.high:.3f}",
                "" if c is None else f"{c.within:.2f}",
                f"{entry.seconds:.2f}" if entry.seconds else "",
                f"{entry.why_not} |",
            )
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--plans", type=int, default=100)
    parser.add_argument("--storage", default="tournament.db")
    args = parser.parse_args()
    print(f"{fingerprint()}\n")
    for name, study in studies(args):
        start = time.perf_counter()
        outcome = study.tournament(plans=args.plans)
        used = time.perf_counter() - start
        print(f"### {name}: {outcome.plans} plans, {len(study.survey.layers.decisions)} decisions, {used:.0f} s\n")
        print("\n".join(table(outcome)))
        print("\n" + "\n".join(outcome.sentences) + "\n")


if __name__ == "__main__":
    main()
