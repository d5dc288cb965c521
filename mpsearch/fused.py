"""Layers of one parent that engines load as one matrix, by the name under which they look that matrix up.

Which of them a target loads so stands in its table (`fused` of `mpsearch.capabilities`); these are the names that files
for engines hold beside those of the layers.

Source: ``packed_modules_mapping`` of vLLM 0.33's and SGLang's models.
"""

from __future__ import annotations

from collections.abc import Mapping

#: Name of the matrix -> names of the layers, in the order of its rows.
FUSED: Mapping[str, tuple[str, ...]] = {
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "gate_up_proj": ("gate_proj", "up_proj"),
}
