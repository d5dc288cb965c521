"""What the tests share."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from mpsearch.model import data
from tests.postgres import database, server

# Fixtures for all tests.
__all__ = ["database", "server"]

DATA = Path(__file__).parent / "data"


def many(usual: int, whole: int) -> int:
    """How many cases to try: a part of them, or the whole of them where MPSEARCH_WHOLE is set, as `make nightly` does.

    >>> many(20, 200) in (20, 200)
    True
    """
    return whole if os.environ.get("MPSEARCH_WHOLE") else usual


@pytest.fixture(autouse=True)
def one_torch_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session", autouse=True)
def texts_are_tokenized_once() -> Iterator[None]:
    """Studies of the tests read the same megabyte of text over and over."""
    known: dict[Any, torch.Tensor] = {}
    tokenize = data.token_stream

    def token_stream(texts: Sequence[str], tokenizer: Any) -> torch.Tensor:
        rules = getattr(tokenizer, "backend_tokenizer", None)
        if rules is None:
            return tokenize(texts, tokenizer)
        key = hash((tuple(texts), rules.to_str(), tokenizer.eos_token_id))
        if key not in known:
            known[key] = tokenize(texts, tokenizer)
        return known[key].clone()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data, "token_stream", token_stream)
        yield


def make_llama(folder: Path, *, tie: bool = True, seed: int = 0, layers: int = 2) -> Path:
    """Write a very small random Llama with the bundled tokenizer."""
    import shutil

    from transformers import LlamaConfig, LlamaForCausalLM

    from mpsearch.bundled import bundled_model

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=4096,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
        tie_word_embeddings=tie,
        initializer_range=0.15,
    )
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(bundled_model() / name, folder / name)
    return folder


@pytest.fixture(scope="session")
def small_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_llama(tmp_path_factory.mktemp("models") / "small-llama")


def study_settings(model: Path, folder: Path, **changes: Any) -> dict[str, Any]:
    """Settings of a study that takes a few seconds."""
    return {
        "name": "small",
        "model": str(model),
        "calibration": "stdlib:calibration",
        "validation": "stdlib:validation",
        "formats": ["int2-g64", "int3-g64", "int4-g64", "int8-channel"],
        "budgets": ["weights <= 4 bits"],
        "tokens": 512,
        "validation_tokens": 512,
        "length": 32,
        "batch_size": 4,
        "points": 2,
        "storage": str(folder / "results.db"),
        "out": str(folder / "out"),
        **changes,
    }
