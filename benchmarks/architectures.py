"""What every estimator does with every architecture family, as a Markdown table. One thread; about two minutes.

    python -m benchmarks.architectures

Each family is a very small random model with two batches. A cell says how many of its decisions got a score, or that
the estimator refuses it; what is refused or not observed is explained below the table.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from mpsearch import registry
from mpsearch.model.threads import one_thread
from tests.architectures import FAMILIES, Outcome, survey


def table(found: Mapping[str, Mapping[str, Outcome]]) -> Iterator[str]:
    """The table, one line per estimator."""
    yield "| estimator | " + " | ".join(found) + " |"
    yield "|---" * (len(found) + 1) + "|"
    for name in registry.names("estimators"):
        yield f"| `{name}` | " + " | ".join(str(outcomes[name]) for outcomes in found.values()) + " |"


def reasons(found: Mapping[str, Mapping[str, Outcome]]) -> Iterator[str]:
    """Why estimators refuse families, and what they cannot see in those that they take."""
    for name in registry.names("estimators"):
        refused: dict[str, list[str]] = {}
        unseen: dict[str, list[str]] = {}
        for family, outcomes in found.items():
            outcome = outcomes[name]
            if outcome.table is None:
                refused.setdefault(outcome.refusal, []).append(family)
            elif missing := outcome.not_observed:
                unseen.setdefault(", ".join(f"`{x}`" for x in missing), []).append(family)
        for reason, families in refused.items():
            yield f"- `{name}` refuses {', '.join(families)}: {reason}"
        for what, families in unseen.items():
            yield f"- `{name}` does not see, in {', '.join(families)}: {what}"


def main() -> None:
    with one_thread():
        found = survey(tuple(FAMILIES))
    print("\n".join([*table(found), "", *reasons(found)]))


if __name__ == "__main__":
    main()
