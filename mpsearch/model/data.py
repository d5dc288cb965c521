"""Calibration and validation data: from text to blocks of tokens, never overlapping."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, overload

import torch
from torch import Tensor

from mpsearch.bundled import model_folder
from mpsearch.errors import InputError, Notice
from mpsearch.model.source import Source, read_texts


@dataclass(frozen=True)
class Batches(Sequence[dict[str, Tensor]]):
    """Batches of token blocks of equal length.

    Attributes:
        items: each ``{"input_ids": (sequences, length) int64}``.
        digest: SHA-256 of all token ids and their shape.
        notices: what a user should know about the data.
    """

    items: tuple[dict[str, Tensor], ...]
    digest: str = ""
    notices: tuple[Notice, ...] = field(default=(), compare=False)

    def __len__(self) -> int:
        return len(self.items)

    @overload
    def __getitem__(self, index: int) -> dict[str, Tensor]: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[dict[str, Tensor]]: ...
    def __getitem__(self, index: int | slice) -> dict[str, Tensor] | Sequence[dict[str, Tensor]]:
        return self.items[index]

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        return iter(self.items)

    @property
    def tokens(self) -> int:
        """Number of tokens."""
        return sum(batch["input_ids"].numel() for batch in self.items)

    @classmethod
    def of(cls, blocks: Tensor, batch_size: int, notices: Sequence[Notice] = ()) -> Batches:
        """Cut (sequences, length) token ids into batches; the last one may be smaller."""
        digest = hashlib.sha256(str(tuple(blocks.shape)).encode() + blocks.numpy().tobytes()).hexdigest()
        parts = tuple({"input_ids": part} for part in torch.split(blocks, batch_size))
        return cls(parts, digest, tuple(notices))


def token_stream(texts: Sequence[str], tokenizer: Any) -> Tensor:
    """Turn texts into one stream of token ids, (tokens,) int64, with the end token after each text."""
    end = tokenizer.eos_token_id
    ids: list[int] = []
    for encoded in tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"]:
        ids.extend(encoded)
        if end is not None:
            ids.append(end)
    return torch.tensor(ids, dtype=torch.long)


def load_batches(
    source: Source, tokenizer: Any, *, length: int, tokens: int, batch_size: int, vocabulary: int = 0
) -> Batches:
    """Read text and cut it into blocks.

    The text is one stream of tokens; ``tokens // length`` blocks are taken from it at even distances, so
    that all of the text is sampled. No block overlaps another.

    Args:
        source: where the text is, and which part of it.
        tokenizer: a Hugging Face tokenizer.
        length: tokens of a block.
        tokens: how many tokens to use.
        batch_size: blocks of a batch.
        vocabulary: size of the model's vocabulary; 0 skips the check.

    Raises:
        InputError: no text (E101, E501, E502), too few tokens for one block (E504), or a tokenizer of
            another model (E503).
    """
    stream = token_stream(read_texts(source), tokenizer)
    there = len(stream) // length
    if there < 1:
        raise InputError(
            "E504",
            f"{source.text} has {len(stream)} tokens; one block needs {length}",
            advice=f"give more text, or a shorter block: --length {max(len(stream) // 2, 1)}",
        )
    if vocabulary and int(stream.max()) >= vocabulary:
        raise InputError(
            "E503",
            f"{source.text}: token {int(stream.max())} >= vocabulary {vocabulary}",
            because="the tokenizer belongs to another model",
        )
    wanted = max(tokens // length, 1)
    notices = []
    if there < wanted:
        notices.append(
            Notice(
                "W504", f"{source.text}: {there * length} tokens used instead of {wanted * length}: the text is short"
            )
        )
        wanted = there
    if wanted > batch_size:
        # Batches are averaged with equal weight, so all are of one size.
        wanted -= wanted % batch_size
    starts = [i * there // wanted * length for i in range(wanted)]
    return Batches.of(torch.stack([stream[s : s + length] for s in starts]), batch_size, notices)


def load_tokenizer(folder: str | Path, *, trust_remote_code: bool = False) -> Any:
    """Load the tokenizer of a model folder.

    Raises:
        InputError: there is none, or it cannot be read (E507).
    """
    import transformers

    try:
        return transformers.AutoTokenizer.from_pretrained(
            model_folder(folder), local_files_only=True, trust_remote_code=trust_remote_code
        )
    except (OSError, ValueError, KeyError, TypeError, json.JSONDecodeError) as error:
        raise InputError(
            "E507",
            f"'{folder}' has no tokenizer that loads",
            because=str(error).splitlines()[0],
            advice="add tokenizer.json",
        ) from error
