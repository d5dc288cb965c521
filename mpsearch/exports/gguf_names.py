"""What GGUF calls the tensors of a Hugging Face checkpoint."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping

import gguf

#: Hugging Face class -> architecture in the gguf package, where every weight has one name on either side.
ARCHITECTURES: Mapping[str, str] = {
    "CohereForCausalLM": "COMMAND_R",
    "Cohere2ForCausalLM": "COHERE2",
    "FalconForCausalLM": "FALCON",
    "GPT2LMHeadModel": "GPT2",
    "GPTNeoXForCausalLM": "GPTNEOX",
    "GemmaForCausalLM": "GEMMA",
    "Gemma2ForCausalLM": "GEMMA2",
    "Gemma3ForCausalLM": "GEMMA3",
    "GraniteForCausalLM": "GRANITE",
    "LlamaForCausalLM": "LLAMA",
    "MistralForCausalLM": "LLAMA",
    "OlmoForCausalLM": "OLMO",
    "Olmo2ForCausalLM": "OLMO2",
    "PhiForCausalLM": "PHI2",
    "Phi3ForCausalLM": "PHI3",
    "Qwen2ForCausalLM": "QWEN2",
    "Qwen3ForCausalLM": "QWEN3",
    "SmolLM3ForCausalLM": "SMOLLM3",
    "StableLmForCausalLM": "STABLELM",
    "Starcoder2ForCausalLM": "STARCODER2",
}

_SUFFIXES = (".weight", ".bias")


class GgufNames:
    """Names of one model's tensors.

    Args:
        architecture: a key of `ARCHITECTURES`.
        names: all tensor names of the checkpoint.

    Source: ``gguf.TensorNameMap``, the table that llama.cpp's converter uses.

    >>> names = GgufNames("LlamaForCausalLM", ["model.layers.0.self_attn.q_proj.weight"])
    >>> names.find("model.layers.0.self_attn.q_proj.weight"), names.find("model.layers.7.self_attn.q_proj.weight")
    ('blk.0.attn_q.weight', '')
    """

    def __init__(self, architecture: str, names: Collection[str]) -> None:
        self._architecture = gguf.MODEL_ARCH[ARCHITECTURES[architecture]]
        numbers = [int(n) for name in names for n in re.findall(r"(?<=\.)\d{1,6}(?=\.)", name)]
        # The table grows with the blocks; a model has no more blocks than tensors, whatever a name claims.
        self._table = gguf.get_tensor_name_map(self._architecture, min(max(numbers, default=0) + 1, len(names)))

    def find(self, name: str) -> str:
        """Return the GGUF name of a tensor; empty when there is none."""
        return self._table.get_name(name, try_suffixes=_SUFFIXES) or ""

    def order(self, gguf_name: str) -> tuple[int, int]:
        """Return a sort key: what stands outside the blocks, then block by block, as the architecture lists it."""
        block = re.match(r"blk\.(\d+)\.", gguf_name)
        found = self._table.get_type(gguf_name, try_suffixes=_SUFFIXES)
        kinds = gguf.MODEL_TENSORS[self._architecture]
        return (int(block[1]) if block else -1), (kinds.index(found) if found in kinds else len(kinds))
