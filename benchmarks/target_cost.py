"""What it costs in nats that vLLM loads q, k, v and gate, up as one matrix each, on the bundled model.

    python -m benchmarks.target_cost

Two studies with one menu and the same budgets: without a target and without ties, and with ``target = "vllm"``. The
embedding, which the head shares, is pinned to bf16: vLLM would store it twice once it is quantised.
"""

from __future__ import annotations

import tempfile

import mpsearch as mp
from mpsearch.capabilities import capabilities
from mpsearch.machine import fingerprint
from mpsearch.plan import BitPlan

MENU = ("int2-g64", "int3-g64", "int4-g64", "int5-g64", "int6-g64", "int8-channel")
BUDGETS = (5.6, 6.0, 6.4, 7.0)


def main() -> None:
    print(f"{fingerprint()}\n")
    able = capabilities("vllm")
    with tempfile.TemporaryDirectory() as folder:
        common = {
            "model": "bundled:tiny-llama", "calibration": "stdlib:calibration", "validation": "stdlib:validation",
            "estimator": "divergence", "tokens": 2048, "validation_tokens": 8192, "points": 0, "formats": MENU,
            "pins": {"model.embed_tokens": "bf16"}, "budgets": (f"weights <= {BUDGETS[-1]} bits",),
            "storage": f"{folder}/s.db",
        }  # fmt: skip
        free, bound = mp.study("free", **common, ties="none"), mp.study("bound", **common, target="vllm")
        free.run()
        bound.run()
        columns = (
            "bits",
            "without a target",
            "vLLM refuses",
            'target = "vllm"',
            "cost, nats/token",
            "layers that differ",
        )
        print(f"| {' | '.join(columns)} |\n|{'---:|' * len(columns)}")
        shown = []
        for bits in BUDGETS:
            plans = {"free": free.plan(f"weights <= {bits} bits"), "bound": bound.plan(f"weights <= {bits} bits")}
            loss = {name: found.loss for name, found in free.measure(plans).items()}
            error = max(found.spread for found in free.measure(plans).values())
            cost = loss["bound"] - loss["free"]
            differ = [name for name, fmt in plans["free"].formats.items() if plans["bound"].formats[name] != fmt]
            assert not able.violations(plans["bound"])
            price = f"{cost:+.5f} ({100 * cost / loss['free']:+.1f} %), ± {error:.5f}"
            refused = f"{len(able.violations(plans['free']))} groups"
            cells = (bits, f"{loss['free']:.5f}", refused, f"{loss['bound']:.5f}", price, len(differ))
            print(f"| {' | '.join(map(str, cells))} |", flush=True)
            shown = shown or _blocks(plans["free"], plans["bound"])
        print(f"\nat {BUDGETS[0]} bits:")
        print("\n".join(shown))


def _blocks(free: BitPlan, bound: BitPlan) -> list[str]:
    """The fused layers of each block, in both plans."""
    found = []
    for names in capabilities("vllm").groups(free.layers):
        apart = ", ".join(f"{name.rpartition('.')[2]} {free.formats[name]}" for name in names)
        found.append(f"  {names[0].rpartition('.')[0]}: {apart}; for vLLM {bound.formats[names[0]]}")
    return found


if __name__ == "__main__":
    main()
