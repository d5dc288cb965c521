"""What a GGUF file says of a model beside its tensors, from ``config.json``, as llama.cpp's own converter says it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import gguf
import numpy as np
import torch
from numpy.typing import NDArray

from mpsearch.exports.gguf_names import ARCHITECTURES

#: Classes whose metadata is written here; all others need a GGUF file of llama.cpp's converter to start from.
KNOWN = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")
#: Version of the block layouts, ``GGML_QNT_VERSION``.
_BLOCKS_VERSION = 2
_ROPE_KINDS = ("default", "linear", "yarn", "llama3")
_LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


def problems(config: Mapping[str, Any], architecture: str) -> list[str]:
    """Say what of a configuration llama.cpp would compute otherwise, or what has no key here; none for a plain model.

    Args:
        config: what ``config.json`` says.
        architecture: Hugging Face class, one of `KNOWN`.

    >>> problems({"hidden_act": "gelu", "rope_scaling": {"rope_type": "longrope"}}, "LlamaForCausalLM")
    ["hidden_act is 'gelu', and llama.cpp computes silu", "rope type 'longrope' is not written here"]
    """
    rope = _rope(config)
    found = []
    if config.get("hidden_act", "silu") not in ("silu", "swish"):
        found.append(f"hidden_act is {config['hidden_act']!r}, and llama.cpp computes silu")
    if rope["rope_type"] not in _ROPE_KINDS:
        found.append(f"rope type {rope['rope_type']!r} is not written here")
    if rope.get("partial_rotary_factor", config.get("partial_rotary_factor", 1.0)) not in (None, 1, 1.0):
        found.append(f"{architecture} turns a part of each head alone, and llama.cpp turns all of it")
    heads, width = config.get("num_attention_heads"), config.get("head_dim")
    if architecture == "Qwen2ForCausalLM" and heads and width and heads * width != config.get("hidden_size"):
        found.append(f"{heads} heads of {width} are not the hidden size, which llama.cpp takes for granted in Qwen2")
    if config.get("num_local_experts") or config.get("num_experts"):
        found.append("the model has experts, which GGUF joins in one tensor")
    return found


def add_metadata(writer: gguf.GGUFWriter, config: Mapping[str, Any], architecture: str, vocabulary: int) -> None:
    """Add what llama.cpp needs to compute a model.

    Args:
        writer: of a file of the class's GGUF architecture.
        config: what ``config.json`` says.
        architecture: Hugging Face class, one of `KNOWN`.
        vocabulary: rows of the embedding.

    Source: llama.cpp 0c1e57098, ``conversion/base.py`` and ``conversion/llama.py``. ``general.file_type`` is left out:
    llama.cpp then names the file by its tensors.
    """
    heads = int(config["num_attention_heads"])
    head_width = int(config.get("head_dim") or config["hidden_size"] // heads)
    writer.add_type("model")
    writer.add_quantization_version(_BLOCKS_VERSION)
    writer.add_block_count(int(config["num_hidden_layers"]))
    writer.add_context_length(int(config["max_position_embeddings"]))
    writer.add_embedding_length(int(config["hidden_size"]))
    writer.add_feed_forward_length(int(config["intermediate_size"]))
    writer.add_head_count(heads)
    writer.add_head_count_kv(int(config.get("num_key_value_heads") or heads))
    writer.add_layer_norm_rms_eps(float(config["rms_norm_eps"]))
    writer.add_key_length(head_width)
    writer.add_value_length(head_width)
    writer.add_vocab_size(vocabulary)
    if is_llama(architecture):
        writer.add_rope_dimension_count(head_width)
    _add_rope(writer, _rope(config))


def rope_factors(config: Mapping[str, Any]) -> NDArray[np.float32] | None:
    """Return the divisors of the rotary frequencies of a Llama 3 model, a tensor of the file; None for other models.

    >>> rope_factors({"rope_theta": 10000.0}) is None
    True
    """
    rope = _rope(config)
    if rope["rope_type"] != "llama3":
        return None
    width = int(config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"])
    factor, low, high, length = (float(rope.get(key, value)) for key, value in _LLAMA3.items())
    # In float32 and in this order, as the converter computes it.
    places = torch.arange(0, width, 2, dtype=torch.float32) / width
    waves = 2 * math.pi / (1.0 / (float(rope.get("rope_theta", 10000.0)) ** places))
    smooth = (length / waves - low) / (high - low)
    found = 1 / ((1 - smooth) / factor + smooth)
    found = torch.where(waves > length / low, factor, found)
    factors: NDArray[np.float32] = torch.where(waves < length / high, 1.0, found).numpy()
    return factors


def row_order(name: str, rows: int, config: Mapping[str, Any], architecture: str) -> NDArray[np.int64] | None:
    """Which row of the checkpoint stands in each row of the file; None for the same ones.

    llama.cpp turns neighbouring channels of a head of Llama and Mistral together, Hugging Face channels half a head
    apart. Blocks never reach over rows, so that rounded rows can be moved as they are.

    Args:
        name: GGUF name of the tensor.
        rows: how many there are.
        config: what ``config.json`` says.
        architecture: Hugging Face class.

    >>> row_order("blk.0.attn_q.weight", 8, {"num_attention_heads": 2}, "LlamaForCausalLM").tolist()
    [0, 2, 1, 3, 4, 6, 5, 7]
    """
    part = name.split(".")[-2] if "." in name else ""
    if not is_llama(architecture) or part not in ("attn_q", "attn_k"):
        return None
    heads = int(config["num_attention_heads"])
    if part == "attn_k":
        heads = int(config.get("num_key_value_heads") or heads)
    return np.arange(rows).reshape(heads, 2, rows // heads // 2).swapaxes(1, 2).reshape(-1)


def is_llama(architecture: str) -> bool:
    """Whether a class is of the GGUF architecture ``llama``."""
    return ARCHITECTURES.get(architecture) == "LLAMA"


def _rope(config: Mapping[str, Any]) -> dict[str, Any]:
    """Rotary settings, where transformers 4 and 5 have them."""
    found = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    found["rope_type"] = found.get("rope_type") or found.get("type") or "default"
    if "rope_theta" not in found and config.get("rope_theta") is not None:
        found["rope_theta"] = config["rope_theta"]
    return found


def _add_rope(writer: gguf.GGUFWriter, rope: Mapping[str, Any]) -> None:
    if rope.get("rope_theta") is not None:
        writer.add_rope_freq_base(float(rope["rope_theta"]))
    if rope["rope_type"] not in ("linear", "yarn"):
        return
    writer.add_rope_scaling_type(gguf.RopeScalingType(rope["rope_type"]))
    writer.add_rope_scaling_factor(float(rope["factor"]))
    if rope["rope_type"] == "yarn":
        writer.add_rope_scaling_orig_ctx_len(int(rope["original_max_position_embeddings"]))
        factors = (
            (writer.add_rope_scaling_yarn_ext_factor, ("extrapolation_factor",)),
            (writer.add_rope_scaling_yarn_attn_factor, ("attention_factor", "attn_factor")),
            (writer.add_rope_scaling_yarn_beta_fast, ("beta_fast",)),
            (writer.add_rope_scaling_yarn_beta_slow, ("beta_slow",)),
        )
        for add, keys in factors:
            if (value := _first(rope, keys)) is not None:
                add(float(value))


def _first(values: Mapping[str, Any], keys: Sequence[str]) -> Any:
    return next((values[key] for key in keys if values.get(key) is not None), None)
