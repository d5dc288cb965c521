"""The tokenizer of a GGUF file: byte-level BPE of ``tokenizer.json``, in the words of llama.cpp."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import gguf

from mpsearch.errors import InputError

_LETTERS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_WORD = r"[^\r\n\p{L}\p{N}]?"
_TEKKEN = (
    rf"{_WORD}{_UPPER}*{_LOWER}+|{_WORD}{_UPPER}+{_LOWER}*|\p{{N}}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


class _Kind(NamedTuple):
    """A way of cutting text that llama.cpp knows: its name there, and what it takes for granted."""

    name: str
    ignores_merges: bool = False
    normalizers: tuple[str, ...] = ("",)


#: Pattern by which text is cut, as it stands in ``tokenizer.json``.
_PATTERNS: Mapping[str, _Kind] = {
    rf"{_LETTERS}|\p{{N}}{{1,3}}{_REST}": _Kind("llama-bpe", ignores_merges=True),
    # llama.cpp does not compose characters, and its own converter passes over NFC too.
    rf"{_LETTERS}|\p{{N}}{_REST}": _Kind("qwen2", normalizers=("", "NFC")),
    _TEKKEN: _Kind("tekken", ignores_merges=True),
}
_GPT2, _SMOLLM = _Kind("gpt-2"), _Kind("smollm")
# Tokens that steer a model, even where its authors have not marked them so.
_STEERING = ("<pad>", "<mask>", "<2mass>", "[@BOS@]")


def add_tokenizer(writer: gguf.GGUFWriter, folder: Path | None, size: int) -> None:
    """Add the tokens, their merges, the special ones and the chat template of a model's folder.

    Args:
        writer: of the file.
        folder: of the model, with ``tokenizer.json``; None for a model that was made in Python.
        size: rows of the embedding; tokens that the tokenizer lacks are named ``[PAD…]`` and are not used.

    Raises:
        InputError: no tokenizer, or one that is not byte-level BPE of a known kind (E301).

    Source: llama.cpp 0c1e57098, ``conversion/base.py`` and ``src/llama-vocab.cpp``.
    """
    if folder is None:
        raise _unknown("the model is of no folder")
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise _unknown("the folder has no tokenizer.json")
    body = json.loads(path.read_text(encoding="utf-8"))
    kind = _kind(body)
    tokens, types = _tokens(body, size)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(kind.name)
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    gguf.SpecialVocab(folder, load_merges=True, n_vocab=size).add_to_gguf(writer, quiet=True)


def pre_tokenizer(body: Mapping[str, Any]) -> str:
    """Return llama.cpp's name for the way in which a tokenizer cuts text into words.

    Args:
        body: what ``tokenizer.json`` says.

    Raises:
        InputError: not byte-level BPE of a known kind (E301).

    >>> pre_tokenizer({"model": {"type": "BPE"}, "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False}})
    'gpt-2'
    """
    return _kind(body).name


def _kind(body: Mapping[str, Any]) -> _Kind:
    model, steps = body.get("model") or {}, body.get("pre_tokenizer") or {}
    if model.get("type") != "BPE" or model.get("byte_fallback") or model.get("dropout"):
        raise _unknown(f"it is not byte-level BPE (model type {model.get('type')!r})")
    if model.get("continuing_subword_prefix") or model.get("end_of_word_suffix"):
        raise _unknown("its tokens have a prefix or a suffix")
    parts = steps.get("pretokenizers", []) if steps.get("type") == "Sequence" else [steps]
    kind = _by_steps(parts)
    if kind is None:
        raise _unknown(f"its way of cutting text is not known here: {json.dumps(steps)[:200]}")
    normalizer = str((body.get("normalizer") or {}).get("type", ""))
    if normalizer not in kind.normalizers:
        raise _unknown(f"it changes text by {normalizer}, which {kind.name} does not")
    if bool(model.get("ignore_merges")) != kind.ignores_merges:
        raise _unknown(f"ignore_merges is {bool(model.get('ignore_merges'))}, and {kind.name} has it the other way")
    return kind


def _by_steps(parts: list[Mapping[str, Any]]) -> _Kind | None:
    if not parts or parts[-1].get("type") != "ByteLevel" or parts[-1].get("add_prefix_space", True):
        return None
    cuts = parts[-1].get("use_regex", True)
    if len(parts) == 1:
        return _GPT2 if cuts else None
    first = parts[0]
    if len(parts) > 2:
        return None
    if first.get("type") == "Digits":
        return _SMOLLM if cuts and first.get("individual_digits") else None
    isolated = first.get("behavior") == "Isolated" and not first.get("invert")
    if first.get("type") != "Split" or cuts or not isolated:
        return None
    return _PATTERNS.get((first.get("pattern") or {}).get("Regex", ""))


def _tokens(body: Mapping[str, Any], size: int) -> tuple[list[str], list[gguf.TokenType]]:
    """Tokens by number, and what each is."""
    named = {int(number): text for text, number in body["model"]["vocab"].items()}
    added = {int(each["id"]): each for each in body.get("added_tokens", ())}
    named.update({number: each["content"] for number, each in added.items()})
    if max(named, default=0) >= size:
        raise _unknown(f"it has {max(named) + 1} tokens, and the embedding has {size} rows")
    tokens, types = [], []
    for number in range(size):
        text = named.get(number)
        tokens.append(f"[PAD{number}]" if text is None else text)
        if text is None:
            types.append(gguf.TokenType.UNUSED)
        elif number not in added:
            types.append(gguf.TokenType.NORMAL)
        elif added[number].get("special") or _steers(text):
            types.append(gguf.TokenType.CONTROL)
        else:
            types.append(gguf.TokenType.USER_DEFINED)
    return tokens, types


def _steers(text: str) -> bool:
    framed = (("<|", "|>"), ("<\uff5c", "\uff5c>"), ("<unused", ">"))
    return text in _STEERING or any(text.startswith(start) and text.endswith(end) for start, end in framed)


def _unknown(why: str) -> InputError:
    return InputError(
        "E301",
        f"gguf cannot write the tokenizer: {why}",
        advice="make a GGUF file with llama.cpp's convert_hf_to_gguf.py --outtype f32 and name it: base=FILE "
        "(--set base=FILE); or tokenizer=none for a file that takes token numbers alone",
    )
