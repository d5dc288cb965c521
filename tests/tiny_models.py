"""Very small random language models, made on the spot."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mpsearch.model.model import Model


def tiny(architecture: str = "Llama", *, layers: int = 2, **settings: Any) -> Model:
    """A small random language model with grouped queries: 4 heads of 16 channels, 2 of keys and values."""
    import transformers

    values = {
        "vocab_size": 61,
        "hidden_size": 64,
        "intermediate_size": 48,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 128,
        "initializer_range": 0.25,
        **settings,
    }
    torch.manual_seed(7)
    config = getattr(transformers, f"{architecture}Config")(**values)
    return Model(getattr(transformers, f"{architecture}ForCausalLM")(config), tokens=True)


def tokens(sequences: int = 2, length: int = 40) -> dict[str, Tensor]:
    noise = torch.Generator().manual_seed(8)
    return {"input_ids": torch.randint(0, 61, (sequences, length), generator=noise)}


EXPERTS = ("Mixtral", "Qwen2Moe", "GptOss")


def tiny_experts(architecture: str) -> Model:
    """A small random language model with one layer of 4 stacked experts, of which each token goes to 2."""
    # GPT-OSS scales its positions for a context of 4096 unless told otherwise.
    positions = {"rope_type": "default", "rope_theta": 1e4}
    settings: dict[str, dict[str, Any]] = {
        "Mixtral": {"num_local_experts": 4},
        "Qwen2Moe": {"num_experts": 4, "moe_intermediate_size": 48, "shared_expert_intermediate_size": 16},
        "GptOss": {"num_local_experts": 4, "sliding_window": 8, "rope_parameters": positions},
    }
    return tiny(architecture, layers=1, num_experts_per_tok=2, **settings[architecture])
