"""What serving a model takes of memory: weights, KV caches, everything else, in one budget."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mpsearch.format import Format
from mpsearch.hardware.calls import offered
from mpsearch.hardware.in_memory import activation_bytes, cache_bytes, kept_bytes, weight_bytes
from mpsearch.hardware.kernel import Engine
from mpsearch.hardware.profile import Profile
from mpsearch.layer import Decision, Layer, decisions
from mpsearch.tables import CostTable
from mpsearch.workload import parse_mix

#: Engines take long prompts in chunks of so many tokens.
CHUNK = 512


@dataclass(frozen=True)
class Memory:
    """Bytes of weights and KV caches of a batch of sequences, and of what a pass needs beside them.

    Weights and caches count as the engine keeps them; without an engine as in our own files. What is left out of the
    search is fixed. So are activations: modelled for a chunk of the prompt (`CHUNK` tokens of each sequence), or what a
    whole model was measured to hold beside weights and caches in any decode step, where that is more.

    Attributes:
        condition: such as ``at context 8192, batch 4``.
        profile: names the engine, and may hold runs of whole models; none for our own files.
        caches: KV caches that nothing is decided of.

    >>> layers = [Layer("fc", "linear", (64, 64)), Layer("attn.k_cache", "kv_cache", (2, 16))]
    >>> table = Memory("at context 100").cost(layers, [Format.parse("int8-channel"), Format.parse("kv-bf16")])
    >>> table.value.tolist()
    [[4224.0, nan], [nan, 6400.0]]
    """

    condition: str
    profile: Profile | None = None
    caches: tuple[Layer, ...] = ()

    def cost(self, layers: Sequence[Layer], formats: Sequence[Format]) -> CostTable:
        ((_, values),) = parse_mix("memory", self.condition)
        context, batch = values["context"], values["batch"]
        engine = self.profile.made if self.profile else None
        rows = decisions(layers)

        def cell(row: Decision, fmt: Format) -> float:
            caches = sum(cache_bytes(layer, fmt, context, batch, engine) for layer in row.layers)
            return float(caches + sum(weight_bytes(layer, fmt, engine) for layer in row.layers))

        value = offered(rows, formats, engine, cell)
        kept = kept_bytes(layers, engine)
        plain = Format.parse("kv-bf16")
        caches = sum(cache_bytes(layer, plain, context, batch, engine) for layer in self.caches)
        activations, origin, spread = self._activations(layers, context, batch, engine)
        fixed = float(kept + caches + activations)
        return CostTable(
            tuple(row.name for row in rows),
            tuple(map(str, formats)),
            value,
            np.where(np.isnan(value), np.nan, 0.0),
            unit="bytes",
            resource=f"memory {self.condition}",
            kind="modelled" if origin == "modelled" else "measured",
            fixed=fixed,
            reference=fixed + _at_16_bits(layers, context, batch, engine),
            source={
                "target": f"memory:{engine.name if engine else 'native'}",
                "kept": kept,
                "caches": caches,
                "activations": activations,
                "activations are": origin,
                "spread": spread,
            },
        )

    def _activations(
        self, layers: Sequence[Layer], context: int, batch: int, engine: Engine | None
    ) -> tuple[int, str, int]:
        """Bytes beside weights and caches, whether they are measured or modelled, and by how much runs differ."""
        bits = 16 if engine is None else engine.cache_bits
        modelled = activation_bytes(list(layers), batch * min(CHUNK, context), batch, bits)
        if engine is None or self.profile is None:
            return modelled, "modelled", 0
        plain = Format.parse("kv-bf16")
        beside = [
            run.held - run.weights
            - sum(cache_bytes(x, plain, run.step.context, run.step.batch, engine) for x in (*layers, *self.caches))
            for run in self.profile.wholes if run.held and run.step.tokens == 1
        ]  # fmt: skip
        # A decode step holds less than the prefill of a long prompt before it.
        measured = max(beside, default=0)
        if measured < modelled:
            return modelled, "modelled", 0
        return measured, "measured", measured - min(beside)


def _at_16_bits(layers: Sequence[Layer], context: int, batch: int, engine: Engine | None) -> int:
    bits = 16 if engine is None else engine.cache_bits
    weights = sum(layer.weights for layer in layers) * bits // 8
    caches = (layer for layer in layers if layer.kind == "kv_cache")
    return weights + sum(cache_bytes(layer, Format.parse("kv-bf16"), context, batch, engine) for layer in caches)
