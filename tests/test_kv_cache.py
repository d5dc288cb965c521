"""KV caches: their bytes, and models that run with rounded ones, against models that round by other means."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import mpsearch as mp
from mpsearch.budget import Budget, conditions
from mpsearch.errors import InputError
from mpsearch.format import Format
from mpsearch.formats.kv_cache import KvCache
from mpsearch.hardware.kv_bytes import KvBytes
from mpsearch.layer import Layer
from mpsearch.model import kv_cache
from mpsearch.model.apply import Change, applied
from mpsearch.model.find import find_layers
from mpsearch.model.kv_cache import find_caches, round_states
from mpsearch.model.model import Model
from mpsearch.model.packing import pack, unpack
from mpsearch.model.quantize import fake_quantize, quantize
from tests.tiny_models import tiny, tokens

TOKENWISE = [
    "kv-int8-token",
    "kv-int4-token-g8-asym",
    "kv-int2-token-asym",
    "kv-fp8-e4m3-token",
    "kv-fp4-e2m1-token-g8",
]
STEPWISE = ["kv-int8-token-recent5", "kv-int4-channel-g4", "kv-int2-channel-g8-asym", "kv-int2-channel-g4-asym-recent6"]
GROUPED = [*TOKENWISE, *STEPWISE, "kv-fp8-e4m3-channel-g4", "kv-int3-token-g16-recent3", "kv-bf16", "kv-fp16"]


def read(text: str) -> KvCache:
    found = Format.parse(text)
    assert isinstance(found, KvCache)
    return found


def cache_formats(model: Model, keys: str = "", values: str = "") -> dict[Layer, Format]:
    """Formats of all caches of keys and of all caches of values."""
    found: dict[Layer, Format] = {}
    for layer in find_layers(model, caches=True):
        text = {"k_cache": keys, "v_cache": values}.get(layer.name.rpartition(".")[2], "")
        if text:
            found[layer] = Format.parse(text)
    return found


# The oracle: what the cache holds is made by patching the model, not by a cache.


def integers(row: np.ndarray, bits: int, asymmetric: bool) -> np.ndarray:
    """The documented rule for integers, for the numbers of one scale."""
    single = np.float32
    if asymmetric:
        top, bottom = 2**bits - 1, 0
        low, high = min(row.min(), single(0)), max(row.max(), single(0))
        scale = single(np.float16((high - low) / single(top)))
    else:
        top, bottom = 2 ** (bits - 1) - 1, -(2 ** (bits - 1) - 1)
        low, scale = single(0), single(np.float16(np.abs(row).max() / single(top)))
    if scale == 0:
        return np.zeros_like(row)
    zero = np.clip(np.rint(-low / scale), 0, top) if asymmetric else single(0)
    return (np.clip(np.rint(row / scale) + zero, bottom, top) - zero) * scale


def round_row(row: Tensor, fmt: KvCache) -> Tensor:
    """Round the numbers of one token and head, or of one channel and group of tokens."""
    number: Any = fmt.number
    if number.family != "integer":
        return fake_quantize(row.reshape(1, -1), number)[0]
    size = number.group or len(row)
    parts = [integers(part.numpy(), number.bits, number.asymmetric) for part in row.split(size)]
    return torch.from_numpy(np.concatenate(parts))


def by_hand(states: Tensor, fmt: KvCache, rounded: int) -> Tensor:
    """Keys or values (sequences, heads, tokens, channels) of which the first ``rounded`` tokens are rounded."""
    found = states.contiguous().clone()
    for head in found.flatten(0, 1):
        if fmt.along == "token":
            for token in range(rounded):
                head[token] = round_row(head[token].clone(), fmt)
        else:
            for first in range(0, rounded, fmt.tokens):
                for channel in range(head.shape[1]):
                    group = head[first : first + fmt.tokens, channel].clone()
                    head[first : first + fmt.tokens, channel] = round_row(group, fmt)
    return found


@contextmanager
def patched(
    model: Model, keys: KvCache | None, values: KvCache | None, rounded: tuple[int, int], modeling: str = "llama"
) -> Iterator[None]:
    """Round keys behind the rotary embedding and values behind their projection."""
    import importlib

    module = importlib.import_module(f"transformers.models.{modeling}.modeling_{modeling}")
    rotate = module.apply_rotary_pos_emb

    def rotate_and_round(q: Tensor, k: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        q, k = rotate(q, k, *args, **kwargs)
        return q, by_hand(k, keys, rounded[0]) if keys else k

    def project_and_round(part: nn.Module, args: Any, output: Tensor) -> Tensor:
        states = output.unflatten(-1, (-1, 16)).transpose(1, 2)
        assert values is not None
        return by_hand(states, values, rounded[1]).transpose(1, 2).flatten(2)

    handles = []
    if values:
        projections = [part for path, part in model.module.named_modules() if path.endswith("v_proj")]
        handles = [part.register_forward_hook(project_and_round) for part in projections]
    module.apply_rotary_pos_emb = rotate_and_round
    try:
        yield
    finally:
        module.apply_rotary_pos_emb = rotate
        for handle in handles:
            handle.remove()


def close(ours: Tensor, theirs: Tensor) -> None:
    """Equal but for the order of sums in attention."""
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4 * float(theirs.abs().max()))


@torch.no_grad()
@pytest.mark.parametrize(
    ("keys", "values"),
    [
        *((text, text) for text in TOKENWISE),
        ("kv-int2-token", ""),
        ("", "kv-int2-token"),
        ("kv-int8-token", "kv-int2-token"),
    ],
)
def test_tokens_are_rounded_as_they_are_written(keys: str, values: str) -> None:
    model, batch = tiny(), tokens()
    before = model.logits(batch)
    with applied(model, cache_formats(model, keys, values)):
        ours = model.logits(batch)
    with patched(model, read(keys) if keys else None, read(values) if values else None, (40, 40)):
        theirs = model.logits(batch)
    close(ours, theirs)
    assert (ours - before).abs().max() > 100 * (ours - theirs).abs().max()
    assert torch.equal(model.logits(batch), before)


def due(fmt: KvCache | None, seen: int) -> int:
    """How many tokens an engine has rounded when it answers the last of ``seen``."""
    if fmt is None:
        return 0
    size = fmt.tokens or 1
    return max(0, seen - fmt.recent) // size * size if fmt.stepwise else seen


@torch.no_grad()
@pytest.mark.parametrize("step", [1, 16])
@pytest.mark.parametrize(
    ("keys", "values"),
    [*((text, text) for text in STEPWISE), ("kv-int2-channel-g4", ""), ("", "kv-int2-token-recent3"),
     ("kv-int2-channel-g8-asym-recent4", "kv-int2-token-asym")],
)  # fmt: skip
def test_a_query_sees_old_tokens_rounded_and_new_ones_not(
    keys: str, values: str, step: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    # With one layer, keys and values hang on the tokens alone, so every position can be checked on its own.
    monkeypatch.setattr(kv_cache, "STEP", step)
    length = 21
    model, batch = tiny(layers=1), tokens(length=length)
    before = model.logits(batch)
    how = (read(keys) if keys else None, read(values) if values else None)
    with applied(model, cache_formats(model, keys, values)):
        ours = model.logits(batch)
    for position in range(length):
        # The newest tokens are rounded as for the first token of a step: at most STEP - 1 tokens late. Formats that
        # round as they write, and those that round whole groups, are never late.
        late = [fmt is not None and fmt.recent > 0 and not fmt.tokens for fmt in how]
        seen = [position // step * step + 1 if slow else position + 1 for slow in late]
        part = {"input_ids": batch["input_ids"][:, : position + 1]}
        with patched(model, *how, (due(how[0], seen[0]), due(how[1], seen[1]))):
            close(ours[:, position], model.logits(part)[:, -1])
    assert (ours - before).abs().max() > 0.01
    assert torch.equal(model.logits(batch), before)


def test_the_step_is_sixteen_tokens() -> None:
    assert kv_cache.STEP == 16


@torch.no_grad()
def test_the_number_type_of_the_model_stands_for_as_it_is_and_another_is_rounded_to() -> None:
    model, batch = tiny(), tokens()
    stored = {layer.dtype for layer in cache_formats(model, "kv-bf16")}
    assert stored == {"float32"}
    with applied(model, cache_formats(model, "kv-fp32", "kv-fp32")):
        assert torch.equal(model.logits(batch), tiny().logits(batch))
    with applied(model, cache_formats(model, "kv-bf16", "kv-bf16")):
        rounded = model.logits(batch)
    with patched(model, read("kv-bf16"), read("kv-bf16"), (40, 40)):
        close(rounded, model.logits(batch))
    assert not torch.equal(rounded, model.logits(batch))


@torch.no_grad()
@pytest.mark.parametrize("text", ["kv-int4-channel-g40", "kv-int4-token-recent40", "kv-int4-channel-g8-recent32"])
def test_sequences_in_which_nothing_would_be_rounded_are_refused(text: str) -> None:
    model, batch = tiny(), tokens(length=40)
    with (
        applied(model, cache_formats(model, text)),
        pytest.raises(InputError, match="nothing would be rounded") as found,
    ):
        model.logits(batch)
    assert found.value.code == "E424"


@torch.no_grad()
def test_caches_are_as_before_after_an_error() -> None:
    model, batch = tiny(), tokens()
    before = model.logits(batch)
    with pytest.raises(ZeroDivisionError), applied(model, cache_formats(model, "kv-int2-token")):
        raise ZeroDivisionError
    assert torch.equal(model.logits(batch), before)


@torch.no_grad()
def test_the_loss_sees_rounded_caches() -> None:
    model, batch = tiny(), tokens()
    before = model.loss(batch)
    with applied(model, cache_formats(model, "kv-int2-token", "kv-int2-token")):
        assert model.loss(batch) != before
    assert model.loss(batch) == before


@torch.no_grad()
def test_steps_need_tokens_alone() -> None:
    model, batch = tiny(), tokens()
    masked = {**batch, "attention_mask": torch.ones_like(batch["input_ids"])}
    with applied(model, cache_formats(model, "kv-int4-channel-g4")), pytest.raises(InputError) as found:
        model.logits(masked)
    assert found.value.code == "E423"
    assert "attention_mask" in found.value.message
    with applied(model, cache_formats(model, "kv-int4-token")):
        close(model.logits(masked), model.logits(batch))


@torch.no_grad()
def test_a_sliding_window_takes_formats_per_token_only() -> None:
    model, batch = tiny("Mistral", sliding_window=8), tokens()
    with applied(model, cache_formats(model, "kv-int4-token", "kv-int4-token")):
        ours = model.logits(batch)
    with patched(model, read("kv-int4-token"), read("kv-int4-token"), (40, 40), "mistral"):
        close(ours, model.logits(batch))
    for text in ("kv-int4-channel-g4", "kv-int4-token-recent4"):
        with pytest.raises(InputError, match="a sliding window forgets tokens") as found:
            Change.of(model, cache_formats(model, text))
        assert found.value.code == "E130"
    (window,) = {layer.window for layer in cache_formats(model, "kv-int4-token")}
    assert window == 8
    cache = next(iter(cache_formats(model, "kv-int4-token")))
    assert read("kv-int4-token").cache_bytes(cache, 100) == read("kv-int4-token").cache_bytes(cache, 8)


@torch.no_grad()
@pytest.mark.parametrize(
    ("architecture", "settings", "owner", "shape"),
    [
        ("Llama", {}, "model.layers.{}.self_attn", (2, 16)),
        ("Mistral", {"sliding_window": 8}, "model.layers.{}.self_attn", (2, 16)),
        ("Qwen2", {}, "model.layers.{}.self_attn", (2, 16)),
        ("Gemma", {"num_key_value_heads": 1}, "model.layers.{}.self_attn", (1, 16)),
    ],
)
def test_names_and_shapes(architecture: str, settings: dict[str, Any], owner: str, shape: tuple[int, int]) -> None:
    model, batch = tiny(architecture, **settings), tokens(1, 12)
    names = [f"{owner.format(i)}.{side}_cache" for i in range(2) for side in "kv"]
    caches = [layer for layer in find_layers(model, caches=True) if layer.kind == "kv_cache"]
    assert [layer.name for layer in caches] == names
    assert {layer.shape for layer in caches} == {shape}
    assert {layer.weights for layer in caches} == {0}
    assert [(place.number, place.side) for place in find_caches(model).values()] == [(0, 0), (0, 1), (1, 0), (1, 1)]
    before = model.logits(batch)
    with applied(model, cache_formats(model, "kv-int8-token", "kv-int8-token")):
        after = model.logits(batch)
    assert not torch.equal(after, before)
    assert (after - before).abs().max() < 0.2 * before.abs().max()


@torch.no_grad()
def test_names_and_shapes_of_gpt2() -> None:
    import transformers

    torch.manual_seed(7)
    config = transformers.GPT2Config(vocab_size=61, n_embd=32, n_layer=2, n_head=4, n_positions=32)
    model = Model(transformers.GPT2LMHeadModel(config), tokens=True)
    caches = [layer for layer in find_layers(model, caches=True) if layer.kind == "kv_cache"]
    assert [layer.name for layer in caches] == [
        f"transformer.h.{i}.attn.{side}_cache" for i in range(2) for side in "kv"
    ]
    assert {layer.shape for layer in caches} == {(4, 8)}


def test_caches_are_listed_only_when_asked_for() -> None:
    assert not any(layer.kind == "kv_cache" for layer in find_layers(tiny()))


def test_a_module_that_reads_no_tokens_has_none() -> None:
    model = Model(nn.Linear(4, 4), logits=lambda module, batch: module(batch))
    assert find_caches(model) == {}
    assert [layer.kind for layer in find_layers(model, [torch.ones(1, 4)], caches=True)] == ["linear"]


def test_rounding_states_keeps_strides_and_the_argument() -> None:
    states = torch.randn(2, 3, 8, 16, generator=torch.Generator().manual_seed(1))
    turned = states.transpose(1, 2).contiguous().transpose(1, 2)
    for text in GROUPED:
        fmt = read(text)
        before = turned.clone()
        rounded = round_states(turned, fmt)
        if fmt.number.family != "plain":
            assert torch.equal(rounded, by_hand(states, fmt, 8))
        assert torch.equal(turned, before)
        assert torch.equal(
            round_states(states.bfloat16(), fmt), round_states(states.bfloat16().float(), fmt).bfloat16()
        )


def test_states_that_a_scale_cannot_hold_become_nan() -> None:
    # A weight beyond the range is an error of the user's; a state is a matter of the run, and shows in the loss.
    assert round_states(torch.full((1, 1, 1, 16), 1e30), read("kv-int8-token")).isnan().all()


# Bytes.


def packed_bytes(fmt: KvCache, heads: int, channels: int, count: int) -> dict[str, int]:
    """Pack what a cache of ``count`` tokens holds, and count."""
    states = torch.randn(heads, count, channels, generator=torch.Generator().manual_seed(2))
    rounded = due(fmt, count)
    found: dict[str, int] = {}
    if rounded:
        rows = states[:, :rounded]
        if fmt.along == "channel":
            rows = rows.unflatten(1, (-1, fmt.tokens)).transpose(2, 3)
        rows = rows.reshape(-1, rows.shape[-1])
        made = quantize(rows, fmt.number)
        parts = pack(made, fmt.number)
        again = unpack(parts, fmt.number, Layer("", "linear", tuple(rows.shape)))
        assert all(torch.equal(again.parts[name], part) for name, part in made.parts.items())
        found = {part: len(held) for part, held in parts.items()}
    newest = states[:, rounded:].to(torch.bfloat16)
    return {**found, "newest": newest.numel() * newest.element_size()} if newest.numel() else found


@pytest.mark.parametrize("text", [*GROUPED, "kv-int3-token", "kv-mxfp8-e4m3", "kv-mxfp4-recent7"])
def test_bytes_are_those_of_what_is_packed(text: str) -> None:
    fmt = read(text)
    channels = 32 if "mx" in text else 16
    layer = Layer("k_cache", "kv_cache", (2, channels))
    assert not fmt.refuses(layer)
    for count in (1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 32, 33, 64):
        assert fmt.cache_bytes(layer, count) == packed_bytes(fmt, 2, channels, count), count
        whole = KvBytes(context=count, batch=3).cost([layer], [fmt])
        assert whole.value.tolist() == [[3.0 * sum(fmt.cache_bytes(layer, count).values())]]
    assert fmt.bytes(layer) == 0


def test_bytes_of_a_padded_row() -> None:
    # 5 channels of 3 bits are 15 bits: 2 bytes, and a scale of 2 bytes.
    assert read("kv-int3-token").cache_bytes(Layer("k", "kv_cache", (2, 5)), 3) == {"payload": 12, "scales": 12}


def test_totals_batch_and_reference() -> None:
    layers = [Layer("fc", "linear", (8, 64)), Layer("k", "kv_cache", (2, 64)), Layer("v", "kv_cache", (2, 64))]
    formats = [Format.parse(text) for text in ("int4-g64", "kv-int8-token", "kv-int4-channel-g32")]
    table = KvBytes(context=48, batch=4).cost(layers, formats)
    assert (table.resource, table.unit, table.kind, table.fixed) == ("kv at context 48, batch 4", "bytes", "exact", 0)
    whole_groups = 2 * 64 * (32 * 4 // 8 + 2) + 16 * 2 * 64 * 2
    assert table.value[1:, 1:].tolist() == [[4.0 * 48 * 2 * 66, 4.0 * whole_groups]] * 2
    assert table.value[0, 0] == 0
    assert np.isnan(table.value[0, 1:]).all()
    assert np.isnan(table.value[1:, 0]).all()
    # What 2 bytes per number take.
    assert table.reference == 4 * 48 * 2 * (2 * 64 * 2)
    assert Budget.parse("kv <= 50 % at context 48, batch 4").limit(table) == table.reference // 2
    assert KvBytes(context=48).cost(layers, formats).reference * 4 == table.reference


@pytest.mark.parametrize("values", [{"context": 0}, {"batch": 0}, {"context": 1.5}])
def test_counts_are_whole_and_above_zero(values: dict[str, Any]) -> None:
    with pytest.raises(InputError) as found:
        KvBytes(**values)
    assert found.value.code == "E113"


def test_the_cost_of_a_model() -> None:
    model = tiny()
    table = mp.cost(mp.layers(model, caches=True), ["kv-int8-token", "int8-channel"], "kv", context=100)
    caches = [i for i, name in enumerate(table.layers) if name.endswith("_cache")]
    assert table.value[caches, 0].tolist() == [100.0 * 2 * 18] * 4


# The grammar.


@pytest.mark.parametrize("text", [*GROUPED, *KvCache.examples, "kv-mxfp4-recent64", "kv-fp6-e2m3-token-g8-recent1"])
def test_a_name_reads_as_it_prints(text: str) -> None:
    assert str(read(text)) == text
    assert read(str(read(text))) == read(text)


@pytest.mark.parametrize(
    ("text", "code", "says"),
    [
        ("kv-int8", "E109", "write one like kv-int8-token"),
        ("kv-", "E109", "not a format of KV caches"),
        ("kv-int4-g32", "E109", "not a format of KV caches"),
        ("kv-nf4-b64", "E109", "not a format of KV caches"),
        ("kv-int4-channel", "E110", "write one like kv-int4-channel-g32"),
        ("kv-int4-token-g0", "E110", "a group of 0 is impossible"),
        ("kv-int4-channel-g-8", "E110", "a group of -8 is impossible"),
        ("kv-int9-token", "E110", "int9"),
        ("kv-int4-token-recent", "E110", "-recent takes a number of tokens"),
        ("kv-int4-token-recent-3", "E110", "-recent takes a number of tokens"),
        ("kv-bf16-recent4", "E110", "nothing is rounded"),
        ("kv-fp8-e4m3-token-asym", "E1", "asym"),
    ],
)
def test_what_is_no_format_is_refused_with_the_reason(text: str, code: str, says: str) -> None:
    with pytest.raises(InputError) as found:
        Format.parse(text)
    assert found.value.code.startswith(code)
    assert says in f"{found.value.message} {found.value.advice}"


@pytest.mark.parametrize(
    ("layer", "text", "says"),
    [
        (Layer("fc", "linear", (8, 64)), "kv-int8-token", "is for KV caches, not for a weight (linear)"),
        (Layer("k", "kv_cache", (2, 64)), "int8-channel", "begin with kv-"),
        (Layer("k", "kv_cache", (2, 64)), "bf16", "begin with kv-"),
        (Layer("k", "kv_cache", (2, 48)), "kv-int4-token-g32", "cannot be cut into groups of 32"),
        (Layer("k", "kv_cache", (2, 48)), "kv-mxfp4", "32"),
    ],
)
def test_what_fits_only_one_of_weights_and_caches(layer: Layer, text: str, says: str) -> None:
    assert says in Format.parse(text).refuses(layer)


@pytest.mark.parametrize(
    ("text", "bits"),
    [("kv-int8-token", 9), ("kv-int4-channel-g32", 4.5), ("kv-int2-channel-g32-asym-recent32", 2.75), ("kv-fp16", 16)],
)
def test_effective_bits_are_those_of_a_long_cache(text: str, bits: float) -> None:
    assert float(read(text).effective_bits(Layer("k", "kv_cache", (2, 16)))) == bits


@pytest.mark.parametrize(
    ("text", "printed", "settings"),
    [
        ("kv <= 2 MiB at context 8192, batch 4", "kv <= 2 MiB at context 8192, batch 4", {"context": 8192, "batch": 4}),
        ("kv<=2MiB at context 8192", "kv <= 2 MiB at context 8192", {"context": 8192}),
        ("kv <= 2 GiB at context 8192 , batch 1", "kv <= 2 GiB at context 8192", {"context": 8192}),
        ("kv <= 30 at context 10", "kv <= 30 % at context 10", {"context": 10}),
        ("kv <= 12.5% at context 010", "kv <= 12.5 % at context 10", {"context": 10}),
    ],
)
def test_a_budget_of_caches_reads_as_it_prints(text: str, printed: str, settings: dict[str, int]) -> None:
    budget = Budget.parse(text)
    assert str(budget) == printed
    assert Budget.parse(str(budget)) == budget
    assert conditions(budget.condition) == settings
    assert budget.priced_by == KvBytes(**settings).cost([Layer("k", "kv_cache", (1, 4))], []).resource


@pytest.mark.parametrize(
    ("text", "code", "says"),
    [
        ("kv <= 2 MiB", "E111", "does not say at what context"),
        ("kv <= 2 MiB at context 0", "E111", "'at context 0' is not a condition"),
        ("kv <= 2 MiB at context 8, batch 0", "E111", "is not a condition"),
        ("kv <= 2 MiB at batch 4", "E111", "does not say at what context"),
        ("kv <= 2 MiB at context -4", "E111", "is not a condition"),
        ("kv <= 2 MiB at context", "E111", "is not a condition"),
        ("kv <= 2 bits at context 8", "E112", "unit 'bits' does not fit 'kv'"),
        ("kv <= 0 MiB at context 8", "E111", "more than 0"),
        ("weights <= 2 MiB at context 8", "E111", "has no condition"),
        ("bops <= 60 % at context 8", "E111", "has no condition"),
    ],
)
def test_what_is_no_budget_is_refused_with_the_reason(text: str, code: str, says: str) -> None:
    with pytest.raises(InputError) as found:
        Budget.parse(text)
    assert found.value.code == code
    assert says in found.value.message
    assert "at context" in f"{found.value.message} {found.value.advice}"


def test_a_budget_is_not_read_off_another_table() -> None:
    table = KvBytes(context=8).cost([Layer("k", "kv_cache", (1, 4))], [Format.parse("kv-bf16")])
    with pytest.raises(ValueError, match="cannot be read off"):
        Budget.parse("kv <= 1 kB at context 9").limit(table)
