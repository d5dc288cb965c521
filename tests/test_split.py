"""Parts of layers: cut, rounded, scored, priced, planned, run and stored, against the whole layers and brute force."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import mpsearch as mp
from mpsearch import registry
from mpsearch.budget import Budget
from mpsearch.errors import InputError
from mpsearch.exports.llama_cpp import LlamaCpp
from mpsearch.exports.native import Native, payload_bytes
from mpsearch.format import Format, parse_formats
from mpsearch.layer import Layer, Layers, whole_name
from mpsearch.model.apply import Change, applied, changed, quantized_weight
from mpsearch.model.codec import Evidence
from mpsearch.model.cut import part_of, put
from mpsearch.model.evidence import Calibration
from mpsearch.model.model import Model
from mpsearch.model.quantize import fake_quantize
from mpsearch.parts import check_apart, split, wholes
from mpsearch.plan import BitPlan
from mpsearch.problem import Problem
from mpsearch.scoring import mark_unreached
from mpsearch.sensitivity.assemble import Deltas
from mpsearch.sensitivity.hessian_trace import HessianTrace
from mpsearch.tables import SensitivityTable
from mpsearch.testing.estimators import small_classifier
from tests.conftest import DATA
from tests.tiny_models import tiny, tiny_experts, tokens

FORMAT = Format.parse("int3-channel")
ROWWISE = ["int4-channel", "int3-g16-asym", "int2-g16-mse", "mxfp4", "nf4-b16", "fp8-e4m3-channel", "q8_0", "bf16"]
#: Scores that are sums over output channels, each on its own, with the settings that make them so.
ADDITIVE: dict[str, dict[str, Any]] = {
    "weight_mse": {},
    "output_mse": {},
    "layer_hessian": {},
    "fisher": {},
    "grad_loss_change": {},
    "grad_x_weight": {},
}
PARTS = [name for name in registry.names("estimators") if getattr(registry.load("estimators", name), "parts", False)]


@pytest.fixture(scope="module")
def llama() -> Model:
    return tiny(layers=1)


@pytest.fixture(scope="module")
def batches() -> list[dict[str, Tensor]]:
    return [tokens(2, 16)]


def random(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def sums(table: Any) -> dict[str, np.ndarray]:
    """Scores of parts, added up by their whole layer."""
    found: dict[str, np.ndarray] = {}
    for name, value in zip(table.layers, table.value, strict=True):
        found[whole_name(name)] = found.get(whole_name(name), 0.0) + value
    return found


# Layers and names.


def test_a_part_says_what_it_is_and_reads_back() -> None:
    whole = Layer("m.q_proj", "linear", (8, 6), 1, "bfloat16", 48, "m.{q,k}", ("other",))
    part = whole.part((2, 5), (1, 3))
    assert (part.name, part.tensor) == ("m.q_proj[2:5,1:3]", "m.q_proj.weight[2:5,1:3]")
    assert (part.rows, part.columns, part.weights, part.stored_bytes, part.row_axes) == (3, 2, 6, 12, (0,))
    assert (part.macs, part.tie, part.owner) == (6, "", "m.q_proj")
    assert whole.part(None, (0, 2)).name == "m.q_proj[:,0:2]"
    assert whole.part((0, 2)).name == "m.q_proj[0:2]"
    assert Layer.from_json(json.loads(json.dumps(part.to_json()))) == part
    assert "of" not in whole.to_json()
    back = part.whole
    assert (back.name, back.shape, back.out_axis, back.shared) == ("m.q_proj", (8, 6), 1, ("other",))
    assert whole.whole is whole
    # The name of a bare module is empty.
    bare = Layer("", "linear", (4, 2)).part((0, 2))
    assert (bare.is_part, bare.owner, bare.tensor, whole_name(bare.name)) == (True, "", "weight[0:2]", "")


@pytest.mark.parametrize("span", [(0, 0), (-1, 2), (2, 9), (3, 2)])
def test_a_range_that_is_not_there_is_refused(span: tuple[int, int]) -> None:
    for channels, inputs in ((span, None), (None, span)):
        with pytest.raises(InputError, match="E113"):
            Layer("x", "linear", (8, 8)).part(channels, inputs)


@pytest.mark.parametrize("size", [1, 3, 5, 7])
def test_multiply_adds_of_parts_add_up(size: int) -> None:
    layer = Layer("x", "linear", (7, 5), macs=101)
    for by in ("output_channel", "input_channel"):
        assert sum(part.macs for part in split([layer], by, size)) == 101


def test_parts_are_matched_by_their_exact_name() -> None:
    found = split([Layer("x", "linear", (8, 4))], "output_channel", 4)
    assert [layer.name for layer in found.match("x[4:8]")] == ["x[4:8]"]
    assert len(found.match("x*")) == 2


# Cutting.


def test_cutting_by_channels_and_groups() -> None:
    layers = Layers((Layer("a", "linear", (10, 6)), Layer("b", "conv", (4, 3, 2, 2)), Layer("c", "kv_cache", (2, 8))))
    rows = split(layers, "output_channel", 4)
    assert [x.name for x in rows] == ["a[0:4]", "a[4:8]", "a[8:10]", "b", "c"]
    columns = split(layers, "input_channel", 4, only="a")
    assert [(x.name, x.shape) for x in columns] == [("a[:,0:4]", (10, 4)), ("a[:,4:6]", (10, 2)), *_whole(layers)[1:]]
    groups = split(layers, "group", 3, only=["b"])
    assert [x.name for x in groups if x.is_part] == ["b[:,0:3]", "b[:,3:6]", "b[:,6:9]", "b[:,9:12]"]
    assert rows.weights == columns.weights == groups.weights == layers.weights


def _whole(layers: Layers) -> list[tuple[str, tuple[int, ...]]]:
    return [(x.name, x.shape) for x in layers]


def test_heads_of_grouped_queries_are_tied_by_their_head_of_keys(llama: Model) -> None:
    found = mp.split(mp.layers(llama), "head", model=llama)
    tied = {row.name: [x.name.rpartition(".")[2] for x in row.layers] for row in found.decisions}
    attention = "model.layers.0.self_attn"
    assert tied[f"{attention}.{{q,k,v}}_proj[0]"] == ["q_proj[0:16]", "q_proj[16:32]", "k_proj[0:16]", "v_proj[0:16]"]
    assert tied[f"{attention}.{{q,k,v}}_proj[1]"] == [
        "q_proj[32:48]",
        "q_proj[48:64]",
        "k_proj[16:32]",
        "v_proj[16:32]",
    ]
    assert tied[f"{attention}.o_proj[:,16:32]"] == ["o_proj[:,16:32]"]
    # Other ties stay.
    assert len(tied["model.layers.0.mlp.{gate,up}_proj"]) == 2
    free = mp.split(mp.layers(llama, ties="none"), "head", 16)
    assert not any(x.tie for x in free)
    assert sum(x.is_part for x in free) == 4 + 2 + 2 + 4
    caches = mp.split(mp.layers(llama, caches=True), "head")
    assert [x.name for x in caches if x.is_part] == [x.name for x in found if x.is_part]
    # Cut alone, the heads of queries are free, and the others stay tied.
    alone = mp.split(mp.layers(llama), "head", 16, only="*.q_proj")
    assert {x.tie for x in alone if x.is_part} == {""}
    assert [len(row.layers) for row in alone.decisions if row.name.endswith("{q,k,v}_proj")] == [2]
    rest = mp.split(mp.layers(llama), "output_channel", 8, only=["*.q_proj", "*.k_proj"])
    assert {x.tie for x in rest if ".self_attn." in x.name} == {""}


def test_one_head_of_keys_stays_whole_and_ties_all() -> None:
    model = tiny(layers=1, num_key_value_heads=1)
    found = mp.split(mp.layers(model), "head", model=model)
    row = next(row for row in found.decisions if "{q,k,v}" in row.name)
    assert [x.name.rpartition(".")[2] for x in row.layers] == [
        *(f"q_proj[{i}:{i + 16}]" for i in range(0, 64, 16)),
        "k_proj",
        "v_proj",
    ]


@pytest.mark.parametrize("architecture", ["Mixtral", "GptOss"])
def test_experts_are_cut_apart(architecture: str) -> None:
    model = tiny_experts(architecture)
    name = "model.layers.0.mlp.experts.gate_up_proj"
    found = [x for x in mp.split(mp.layers(model), "expert") if x.of == name]
    weight = model.weight(name).detach()
    turned = weight.transpose(1, 2) if architecture == "GptOss" else weight
    assert [x.channels for x in found] == [(0, 96), (96, 192), (192, 288), (288, 384)]
    for i, part in enumerate(found):
        assert torch.equal(part_of(model.weight(part.name).detach(), part), turned[i])


LINEAR, CACHE = Layer("m.fc", "linear", (8, 6)), Layer("m.attn key cache", "kv_cache", (2, 8))
WRONG: list[tuple[Sequence[Layer], tuple[Any, ...], dict[str, Any], str, str]] = [
    ([LINEAR], ("row", 1), {}, "E113", "by is 'row'"),
    ([LINEAR], ("output_channel",), {}, "E113", "parts by output_channel need a size"),
    ([LINEAR], ("group", 0), {}, "E113", "size is 0"),
    ([LINEAR], ("input_channel", True), {}, "E113", "size is True"),
    ([LINEAR], ("input_channel", 2.0), {}, "E113", "size is 2.0"),
    ([LINEAR], ("group", 4), {}, "E122", "its 6 columns are no whole number of parts of 4"),
    ([LINEAR], ("head", 4), {}, "E122", "no layer can be cut by head"),
    ([LINEAR], ("head", 4), {"only": "m.*"}, "E122", "where its heads lie is not known"),
    ([LINEAR], ("expert",), {"only": "m.fc"}, "E122", "is a linear layer, not experts"),
    ([LINEAR], ("expert", 2), {}, "E122", "no layer can be cut by expert"),
    ([LINEAR], ("output_channel", 2), {"only": "m.fd"}, "E120", "did you mean 'm.fc'"),
    ([CACHE], ("head", 8), {}, "E122", "no layer can be cut"),
    ([LINEAR, CACHE], ("head", 8), {"only": "*cache"}, "E122", "is a KV cache: its format holds for all heads"),
    ([LINEAR.part((0, 2))], ("output_channel", 1), {}, "E122", "is a part already"),
    ([Layer("q_proj", "linear", (10, 6))], ("head",), {}, "E113", "parts by head need a size"),
    ([Layer("q_proj", "linear", (10, 6))], ("head", 4), {}, "E122", "its 10 output channels are no whole number"),
    ([Layer("o_proj", "linear", (8, 6))], ("head", 4), {}, "E122", "its 6 columns"),
    (
        [Layer("q_proj", "linear", (6, 6), tie="t"), Layer("k_proj", "linear", (4, 6), tie="t")],
        ("head", 2),
        {},
        "E122",
        "3 heads, those that it is tied to 2",
    ),
]


@pytest.mark.parametrize(("layers", "given", "named", "code", "words"), WRONG)
def test_what_cannot_be_cut_is_refused(
    layers: Sequence[Layer], given: tuple[Any, ...], named: dict[str, Any], code: str, words: str
) -> None:
    with pytest.raises(InputError) as caught:
        split(layers, *given, **named)
    assert caught.value.code == code
    assert words in f"{caught.value}"


def test_parts_with_weights_in_common_are_found() -> None:
    layer = Layer("x", "linear", (6, 6))
    grid = [layer.part((r, r + 2), (c, c + 3)) for r in (0, 2, 4) for c in (0, 3)]
    check_apart(grid)
    check_apart([layer, Layer("y", "linear", (6, 6)).part((0, 2))])
    check_apart(split([Layer("z", "linear", (2, 3000))], "input_channel", 1))
    for extra in (layer.part((1, 3), (2, 3)), layer.part(None, (5, 6)), layer.part((5, 6)), layer):
        with pytest.raises(InputError, match="weights in common"):
            check_apart([*grid, extra])
    generator = np.random.default_rng(0)
    for _ in range(300):
        boxes = []
        for _ in range(3):
            r, c = (sorted(generator.choice(7, 2, replace=False).tolist()) for _ in range(2))
            boxes.append(layer.part((r[0], r[1]), (c[0], c[1])))
        count = np.zeros((6, 6))
        for box in boxes:
            count[slice(*box.channels), slice(*box.inputs)] += 1
        try:
            check_apart(boxes)
        except InputError:
            assert count.max() > 1
        else:
            assert count.max() == 1


# Tensors and rounding.

SHAPES = [
    Layer("x", "linear", (6, 8)),
    Layer("x", "linear", (6, 8), out_axis=1),
    Layer("x", "conv", (6, 2, 2, 2)),
    Layer("x", "expert", (3, 4, 5), out_axis=1),
    Layer("x", "expert", (3, 4, 5), out_axis=2),
    Layer("x", "embedding", (6, 4)),
]


@pytest.mark.parametrize("layer", SHAPES, ids=lambda x: f"{x.kind}{x.out_axis}")
def test_taking_and_putting_back_any_rectangle(layer: Layer) -> None:
    weight = random(*layer.shape)
    turned = weight.movedim(layer.row_axes, tuple(range(len(layer.row_axes)))).reshape(layer.rows, layer.columns)
    generator = np.random.default_rng(1)
    for _ in range(30):
        r = sorted(generator.choice(layer.rows + 1, 2, replace=False).tolist())
        c = sorted(generator.choice(layer.columns + 1, 2, replace=False).tolist())
        part = layer.part((r[0], r[1]), (c[0], c[1]))
        expected = turned[r[0] : r[1], c[0] : c[1]]
        assert torch.equal(part_of(weight, part), expected)
        into = weight.clone()
        put({part: expected + 1}, into)
        assert torch.equal(part_of(into, part), expected + 1)
        assert float((into - weight).abs().sum()) == pytest.approx(part.weights, rel=1e-5)
    assert part_of(weight, layer) is weight
    with pytest.raises(ValueError, match="is part of a weight of shape"):
        part_of(weight[:1], layer.part((0, 1)))


class Net(nn.Module):
    """A convolution in two groups and a linear."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(8, 6, 2, groups=2, bias=False)
        self.fc = nn.Linear(36, 12, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.fc(torch.tanh(self.conv(x)).flatten(1))
        return out


def net() -> tuple[Model, list[Tensor]]:
    torch.manual_seed(0)
    return Model(Net(), logits=lambda m, x: m(x), loss=lambda m, x: m(x).square().mean()), [random(5, 8, 3, 4)]


@pytest.mark.parametrize("text", ROWWISE)
def test_rows_are_rounded_as_in_the_whole_layer(text: str, llama: Model) -> None:
    fmt, deltas = Format.parse(text), Deltas(llama)
    name = "model.layers.0.mlp.up_proj"
    layer = next(x for x in mp.layers(llama) if x.name == name)
    whole = deltas(layer, fmt)
    for span in ((0, 7), (7, 48)):
        part = layer.part(span)
        found = deltas(part, fmt)
        assert found.shape == whole.shape
        assert torch.equal(found[slice(*span)], whole[slice(*span)])
        rest = torch.ones(48, dtype=torch.bool)
        rest[slice(*span)] = False
        assert not found[rest].any()
    # Only parts are kept.
    assert sum(x.numel() for (key, _), x in deltas._kept.items() if "[" in key) == layer.weights


def test_columns_of_whole_groups_are_rounded_as_in_the_whole_layer(llama: Model) -> None:
    layer = next(x for x in mp.layers(llama) if x.name.endswith("o_proj"))
    fmt, deltas = Format.parse("int3-g16"), Deltas(llama)
    parts = [x for x in split([layer], "group", 16) if x.is_part]
    assert torch.equal(sum((deltas(x, fmt) for x in parts), torch.zeros(layer.shape)), deltas(layer, fmt))
    channel = Format.parse("int3-channel")
    assert not torch.equal(deltas(parts[0], channel)[:, :16], deltas(layer, channel)[:, :16])


def test_a_part_that_a_format_cannot_hold_is_nan_there_alone() -> None:
    module = nn.Linear(4, 3, bias=False)
    module.weight.data = torch.ones(3, 4)
    module.weight.data[1] = 1e30
    model = Model(module, logits=lambda m, x: m(x))
    layers = split(mp.layers(model), "output_channel", 1)
    table = mp.score(model, [], ["int4-channel"], "weight_mse", layers=layers)
    assert [row[0] for row in table.status] == ["ok", "non_finite", "ok"]
    found = Deltas.of(model)(layers[1], Format.parse("int4-channel"))
    assert found.isnan().sum() == 4
    assert not found[[0, 2]].isnan().any()


def test_gptq_of_parts_goes_by_the_inputs_of_the_part(llama: Model, batches: list[Any]) -> None:
    layer = next(x for x in mp.layers(llama) if x.name.endswith("up_proj"))
    fmt = Format.parse("int3-channel-gptq")
    llama.calibrate(batches, Layers((layer,)))
    weight = llama.weight(layer.name).detach()
    hessian = Calibration.of(llama).evidence(layer, fmt).hessian
    assert hessian is not None
    rows = quantized_weight(llama, layer.part((5, 20)), fmt)
    assert torch.allclose(rows, quantized_weight(llama, layer, fmt)[5:20], atol=1e-6)
    columns = quantized_weight(llama, layer.part(None, (16, 40)), fmt)
    expected = fake_quantize(weight[:, 16:40], fmt, evidence=Evidence(hessian=hessian[16:40, 16:40]))
    assert torch.equal(columns, expected)
    assert not torch.allclose(columns, quantized_weight(llama, layer, fmt)[:, 16:40], atol=1e-3)
    book = Format.parse("codebook4-channel-fisher")
    whole = quantized_weight(llama, layer, book)
    assert torch.equal(quantized_weight(llama, layer.part((5, 20)), book), whole[5:20])


@torch.no_grad()
def test_parts_change_the_model_as_the_whole_layer_does(llama: Model, batches: list[Any]) -> None:
    layers = mp.layers(llama)
    before = {name: (value.data_ptr(), value.clone()) for name, value in llama.module.state_dict().items()}
    with applied(llama, dict.fromkeys(layers, FORMAT)):
        expected = llama.logits(batches[0])
    parts = split(layers, "output_channel", 13)
    with applied(llama, dict.fromkeys(parts, FORMAT)):
        assert torch.equal(llama.logits(batches[0]), expected)
    part = next(x for x in parts if x.name.endswith("up_proj[13:26]"))
    with applied(llama, {part: FORMAT}):
        found = llama.weight(part.of).clone()
    whole = llama.weight(part.of)
    assert torch.equal(found[13:26], fake_quantize(whole[13:26], FORMAT))
    assert torch.equal(found[:13], whole[:13])
    assert torch.equal(found[26:], whole[26:])
    for name, value in llama.module.state_dict().items():
        assert value.data_ptr() == before[name][0]
        assert torch.equal(value, before[name][1])


def test_overlapping_parts_are_not_applied(llama: Model) -> None:
    layer = next(x for x in mp.layers(llama) if x.name.endswith("up_proj"))
    for others in ([layer], [layer.part(None, (0, 8))]):
        with pytest.raises(InputError, match="E122"):
            Change.of(llama, dict.fromkeys([layer.part((0, 4)), *others], FORMAT))
        names = [layer.part((0, 4)), *others]
        with pytest.raises(InputError, match="E122"):
            BitPlan(Layers(tuple(names)), {x.name: FORMAT for x in names})


def test_a_part_of_a_shared_weight_changes_in_all_its_modules() -> None:
    model = tiny(layers=1, tie_word_embeddings=True)
    layer = next(x for x in mp.layers(model) if x.kind == "embedding")
    assert layer.shared == ("lm_head",)
    with changed(model, Change.of(model, {layer.part((3, 9)): FORMAT})):
        assert model.module.lm_head.weight is model.module.model.embed_tokens.weight
        assert not torch.equal(model.module.lm_head.weight[3:9], tiny(layers=1).module.model.embed_tokens.weight[3:9])


def test_inputs_of_parts_are_not_rounded(llama: Model, batches: list[Any]) -> None:
    layer = next(x for x in mp.layers(llama) if x.name.endswith("up_proj"))
    pair = Format.parse("int4-channel@int8-token")
    with pytest.raises(InputError, match=r"E130.*the input of a part is that of its whole layer"):
        Change.of(llama, {layer.part((0, 4)): pair})
    table = mp.score(
        llama, batches, [str(pair), "int4-channel"], "output_mse", layers=split([layer], "output_channel", 24)
    )
    assert table.status == (("not_offered", "ok"),) * 2


# Estimators.


@pytest.mark.parametrize("name", ADDITIVE)
def test_scores_of_output_channels_add_up(name: str, llama: Model, batches: list[Any]) -> None:
    menu = ["int3-channel", "int4-g16"]
    layers = mp.layers(llama, ties="none")
    whole = mp.score(llama, batches, menu, name, layers=layers, **ADDITIVE[name])
    parts = mp.score(llama, batches, menu, name, layers=split(layers, "output_channel", 20), **ADDITIVE[name])
    # Rows of tokens that do not occur have no score.
    found = sums(replace(parts, value=np.nan_to_num(parts.value), status=()))
    assert len(parts.layers) > 2 * len(whole.layers)
    for layer, value in zip(whole.layers, whole.value, strict=True):
        assert found[layer] == pytest.approx(value, rel=1e-6)


@pytest.mark.parametrize(
    ("name", "settings"), [("fisher", {}), ("weight_mse", {"relative": True}), ("grad_x_weight", {})]
)
def test_scores_of_blocks_of_columns_add_up(
    name: str, settings: dict[str, Any], llama: Model, batches: list[Any]
) -> None:
    layers = mp.layers(llama, ties="none")
    whole = mp.score(llama, batches, ["int3-g16"], name, layers=layers, **settings)
    found = sums(mp.score(llama, batches, ["int3-g16"], name, layers=split(layers, "group", 16), **settings))
    for layer, value in zip(whole.layers, whole.value, strict=True):
        assert found[layer] == pytest.approx(value, rel=1e-6)


@pytest.mark.parametrize("settings", [{}, {"product": "double_backward"}, {"probing": "layer"}], ids=str)
def test_traces_of_parts_add_up_and_are_those_of_the_block(settings: dict[str, Any]) -> None:
    model, batches, layers = small_classifier()
    estimator = HessianTrace(probes=8, least_probes=8, **settings)
    whole = np.array(estimator.traces(model, batches[0], layers))
    parts = split(layers, "output_channel", 3)
    found = np.array(estimator.traces(model, batches[0], parts))
    for i, layer in enumerate(layers):
        mine = [k for k, part in enumerate(parts) if part.owner == layer.name]
        assert found[:, mine].sum(axis=1) == pytest.approx(whole[:, i], rel=1e-6, abs=1e-7)
    part = layers[1].part((1, 3), (4, 20))
    exact = float(np.trace(block_of_hessian(model, batches[0], [part])))
    many = np.array(HessianTrace(probes=400, tolerance=1e-9, **settings).traces(model, batches[0], [part]))[:, 0]
    assert abs(many.mean() - exact) < 4 * many.std(ddof=1) / math.sqrt(400)
    low = HessianTrace(method="xtrace", probing="layer", probes=32, least_probes=2)
    assert np.mean(low.traces(model, batches[0], [part])) == pytest.approx(exact, rel=0.02)


def block_of_hessian(model: Model, batch: Any, parts: Sequence[Layer]) -> np.ndarray:
    """The Hessian of the mean loss in the weights of some parts, by brute force."""
    name = f"{parts[0].owner}.weight"
    weight = model.module.get_parameter(name).detach()

    def loss_of(values: Tensor) -> Tensor:
        start, into = 0, weight.clone()
        for part in parts:
            stop = start + part.weights
            into = torch.where(mask(part), put({part: values[start:stop].reshape(part.shape)}, weight.clone()), into)
            start = stop
        out = torch.func.functional_call(model.module, {name: into}, (batch[0],))
        return nn.functional.cross_entropy(out, batch[1])

    def mask(part: Layer) -> Tensor:
        return put({part: torch.ones(part.shape)}, torch.zeros_like(weight)).bool()

    given = torch.cat([part_of(weight, part).flatten() for part in parts])
    matrix: np.ndarray = torch.autograd.functional.hessian(loss_of, given).double().numpy()
    return matrix


@pytest.mark.parametrize("product", ["double_backward", "finite_difference"])
def test_curvature_along_parts_is_that_of_the_block(product: str) -> None:
    model, batches, layers = small_classifier()
    first, second = layers[1].part((0, 2), (8, 32)), layers[1].part((3, 5))
    tied = [Layer(**{**_fields(x), "tie": "t"}) for x in (first, second)]
    for parts in ([first], [second], tied):
        table = mp.score(
            model, batches[:1], ["int3-channel"], "hessian_vector", layers=Layers(tuple(parts)), product=product
        )
        matrix = block_of_hessian(model, batches[0], parts)
        error = np.concatenate([Deltas(model).own(x, FORMAT).flatten().double().numpy() for x in parts])
        assert table.value[0, 0] == pytest.approx(0.5 * error @ matrix @ error, rel=2e-3)
    top = mp.score(model, batches[:1], ["int3-channel"], "hessian_eigenvalue", layers=Layers((first,)), bound=True)
    matrix = block_of_hessian(model, batches[0], [first])
    size = float(Deltas(model).own(first, FORMAT).double().square().sum())
    assert top.value[0, 0] == pytest.approx(0.5 * np.abs(np.linalg.eigvalsh(matrix)).max() * size, rel=5e-3)


def _fields(layer: Layer) -> dict[str, Any]:
    return {name: getattr(layer, name) for name in Layer.__dataclass_fields__}


@pytest.mark.parametrize("product", ["double_backward", "finite_difference"])
def test_gauss_newton_of_tied_heads_is_that_of_the_change_of_all(
    product: str, llama: Model, batches: list[Any]
) -> None:
    layers = split(mp.layers(llama), "head", model=llama)
    row = next(x for x in layers.decisions if "{q,k,v}" in x.name)
    found = mp.score(llama, batches, ["int6-channel"], "gauss_newton", layers=Layers(row.layers), product=product)
    # Small errors: what the divergence becomes to second order.
    exact = mp.score(llama, batches, ["int6-channel"], "divergence", layers=Layers(row.layers))
    assert found.value[0, 0] == pytest.approx(exact.value[0, 0], rel=0.1)
    alone = mp.score(llama, batches, ["int6-channel"], "gauss_newton", layers=Layers(row.layers[:1]), product=product)
    assert alone.value[0, 0] < 0.9 * found.value[0, 0]


def test_harm_of_a_part_is_that_of_the_model_with_it(llama: Model, batches: list[Any]) -> None:
    layers = mp.layers(llama, ties="none")
    part = next(x for x in layers if x.name.endswith("down_proj")).part((0, 24), (8, 40))
    weight = llama.weight(part.of).detach()
    with torch.no_grad():
        before = llama.loss(batches[0])
        kept = weight.clone()
        try:
            weight[:24, 8:40] = fake_quantize(weight[:24, 8:40], FORMAT)
            after = llama.loss(batches[0])
        finally:
            weight.copy_(kept)
    only = Layers((part,))
    found = mp.score(llama, batches, ["int3-channel"], "isolated_loss", layers=only)
    assert found.value[0, 0] == pytest.approx(float(after - before), rel=1e-4)
    exact = mp.score(llama, batches, ["int3-channel"], "divergence", layers=only)
    measured = mp.measure(llama, {part.name: "int3-channel"}, batches, layers=only)
    assert exact.value[0, 0] == pytest.approx(measured.loss, rel=1e-6)
    full = mp.score(llama, batches, ["int3-channel"], "divergence", layers=only, reuse=False)
    assert np.array_equal(full.value, exact.value)


def test_raising_a_part_leaves_the_other_parts_low(llama: Model, batches: list[Any]) -> None:
    menu = ["int2-channel", "fp32"]
    layers = split(mp.layers(llama, ties="none"), "output_channel", 24, only="*up_proj")
    table = mp.score(llama, batches, menu, "isolated_loss", layers=layers, direction="up")
    low, high = parse_formats(menu)
    chosen = next(x for x in layers if x.is_part)
    with torch.no_grad(), applied(llama, dict.fromkeys(layers, low)):
        poor = llama.loss(batches[0])
    with torch.no_grad(), applied(llama, {**dict.fromkeys(layers, low), chosen: high}):
        raised = llama.loss(batches[0])
    row = table.layers.index(chosen.name)
    assert table.value[row, 0] == pytest.approx(float(poor - raised), abs=1e-5)
    assert table.value[row, 1] == 0


def test_rows_of_mixllm() -> None:
    known = json.loads((DATA / "misc_formula_checks.json").read_text())["mixllm"]
    gradients, delta = torch.tensor(known["gradients_per_sample"]), torch.tensor(known["delta"])
    module = nn.Linear(3, 2, bias=False)
    # A loss whose gradient is the sample itself.
    model = Model(module, loss=lambda m, x: (m.weight * x).sum(dim=(1, 2)).mean(), logits=lambda m, x: m(x[:, 0]))
    layers = split(mp.layers(model), "output_channel", 1)
    deltas = Deltas.of(model)
    for layer, row in zip(layers, delta, strict=True):
        deltas._kept[layer.name, FORMAT] = row[None]
    estimator = registry.make("estimators", "grad_loss_change")
    table = estimator.score(model, [gradients], layers, [FORMAT])
    # The table adds samples up, the estimator takes their mean.
    assert len(gradients) * table.value[:, 0] == pytest.approx(known["score"], rel=1e-6)


@pytest.mark.parametrize("name", PARTS)
def test_every_estimator_of_parts_scores_them_and_leaves_the_model(name: str) -> None:
    model, batches, layers = small_classifier()
    before = {key: value.clone() for key, value in model.module.state_dict().items()}
    parts = Layers((*split(layers, "output_channel", 20), *split([layers[1]], "input_channel", 16)))
    menu = ["int3-channel", "int4-g8"]
    table = mp.score(model, batches, menu, name, layers=parts)
    assert table.layers == ("0[0:20]", "0[20:32]", "2", "2[:,0:16]", "2[:,16:32]")
    assert np.isfinite(table.value).all()
    whole = mp.score(model, batches, menu, name, layers=layers)
    assert np.array_equal(whole.value[1], table.value[2])
    assert np.array_equal(mp.score(small_classifier()[0], batches, menu, name, layers=parts).value, table.value)
    assert all(torch.equal(value, before[key]) for key, value in model.module.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.module.modules())


@pytest.mark.parametrize("name", [name for name in registry.names("estimators") if name not in PARTS])
def test_other_estimators_say_that_they_score_whole_layers(name: str) -> None:
    model, batches, layers = small_classifier()
    with pytest.raises(InputError, match=r"E506.*scores whole layers, and '0\[0:16\]' is part of one"):
        mp.score(model, batches, ["int4-channel"], name, layers=split(layers, "output_channel", 16))


def test_which_estimators_score_parts() -> None:
    assert set(PARTS) >= {
        "weight_mse", "output_mse", "divergence", "isolated_loss", "fisher", "grad_loss_change", "grad_x_weight",
        "hessian_vector", "gauss_newton", "layer_hessian", "block_mse", "hessian_trace", "hessian_eigenvalue",
    }  # fmt: skip


@pytest.mark.parametrize(
    "name", ["fisher", "grad_loss_change", "grad_x_weight", "hessian_trace", "gauss_newton", "hessian_vector"]
)
def test_a_gradient_is_asked_for_once_per_weight(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, batches, layers = small_classifier()
    real, most = torch.autograd.grad, []

    def watched(outputs: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        most.append(len(inputs))
        assert len({id(x) for x in inputs}) == len(inputs)
        return real(outputs, inputs, *args, **kwargs)

    monkeypatch.setattr(torch.autograd, "grad", watched)
    mp.score(model, batches[:1], ["int4-channel"], name, layers=split(layers, "output_channel", 1))
    assert max(most) <= 2


@pytest.mark.parametrize(("by", "size"), [("output_channel", 5), ("input_channel", 6)])
def test_convolutions_in_groups_and_linears_move_their_outputs_alike_in_both_ways(by: Any, size: int) -> None:
    model, batches = net()
    parts = split(mp.layers(model, batches[0]), by, size)
    assert {x.kind for x in parts if x.is_part} == {"conv", "linear"}
    settings = {"layers": parts, "relative": False}
    a = mp.score(model, batches, ["int3-channel"], "output_mse", **settings)
    b = mp.score(model, batches, ["int3-channel"], "layer_hessian", **settings)
    assert a.value == pytest.approx(b.value, rel=1e-4)
    # By hand: the convolution with the error of one part alone.
    part = parts[1]
    errors = Deltas(model)(part, FORMAT)
    seen: list[Tensor] = []
    handle = model.module.conv.register_forward_hook(
        lambda m, args, out: seen.append(m._conv_forward(args[0], errors, None))
    )
    model.logits(batches[0])
    handle.remove()
    positions = seen[0].numel() // 6
    assert a.value[1, 0] == pytest.approx(float(seen[0].square().sum()) / positions, rel=1e-5)


def test_parts_that_no_token_reaches_are_not_called_harmless() -> None:
    model = tiny_experts("GptOss")
    data = [{"input_ids": torch.full((1, 4), word)} for word in (5, 9)]
    layers = mp.layers(model, data[0], ties="none")
    experts = split(layers, "expert", only="*.gate_up_proj")
    rows = split(layers, "output_channel", 1, only="model.embed_tokens")
    router = next(module for name, module in model.module.named_modules() if name.endswith(".router"))
    # Two of four experts, always the same ones.
    router.bias.data += torch.tensor([100.0, 0.0, 100.0, 0.0])
    menu = ["bf16", "int4-channel"]
    for name in ("fisher", "divergence", "grad_x_weight"):
        table = mp.score(model, data, menu, name, layers=experts)
        status = [table.status[i][1] for i, x in enumerate(experts) if x.is_part]
        assert status == ["ok", "not_observed", "ok", "not_observed"]
        assert {row[0] for row in table.status} == {"ok"}
        assert {row[1] for row, x in zip(table.status, experts, strict=True) if not x.is_part} == {"ok"}
        assert [np.isnan(x) for x in table.value[:, 1]] == [row[1] != "ok" for row in table.status]
        assert np.isnan(table.spread[[row[1] != "ok" for row in table.status], 1]).all()
    for name in ("fisher", "divergence", "grad_x_weight", "output_mse"):
        table = mp.score(model, data, menu, name, layers=Layers(tuple(x for x in rows if x.is_part)))
        assert [i for i, row in enumerate(table.status) if row[1] == "ok"] == [5, 9]
    # What looks at weights alone knows them all.
    assert {x for row in mp.score(model, data, menu, "weight_mse", layers=experts).status for x in row} == {"ok"}


def test_parts_that_one_batch_reaches_are_reached() -> None:
    model = tiny_experts("GptOss")
    data = [{"input_ids": torch.full((1, 4), word)} for word in (5, 9)]
    layers = mp.layers(model, data[0], ties="none")
    rows = Layers(tuple(x for x in split(layers, "output_channel", 1, only="model.embed_tokens") if x.is_part)[5:10])
    menu = parse_formats(["int4-channel"])
    together = mp.score(model, data, ["int4-channel"], "fisher", layers=rows)
    fisher = registry.make("estimators", "fisher")
    apart = [mark_unreached(fisher.score(model, [batch], rows, menu), rows, menu, fisher) for batch in data]
    assert [[row[0] == "ok" for row in table.status] for table in apart] == [
        [True, False, False, False, False],
        [False, False, False, False, True],
    ]
    merged = SensitivityTable.mean(apart)
    assert merged.status == together.status
    assert np.array_equal(merged.value, together.value, equal_nan=True)
    assert np.array_equal(merged.spread, together.spread, equal_nan=True)
    assert merged.source["pooled"] == {rows[0].name: [1, 2], rows[4].name: [1, 2]}


def test_parts_of_an_embedding_and_of_experts_are_scored(batches: list[Any]) -> None:
    model = tiny_experts("GptOss")
    layers = mp.layers(model, batches[0], ties="none")
    experts = split(layers, "expert")
    whole = mp.score(model, batches, ["int3-channel"], "fisher", layers=layers)
    found = sums(mp.score(model, batches, ["int3-channel"], "fisher", layers=experts))
    assert sum(x.is_part for x in experts) == 8
    for layer, value in zip(whole.layers, whole.value, strict=True):
        assert found[layer] == pytest.approx(value, rel=1e-5)
    words = split(layers, "output_channel", 20, only="model.embed_tokens")
    table = mp.score(model, batches, ["int3-channel"], "output_mse", layers=words)
    hessian = mp.score(model, batches, ["int3-channel"], "layer_hessian", layers=words)
    for i, layer in enumerate(words):
        if layer.is_part:
            assert table.value[i, 0] == pytest.approx(hessian.value[i, 0], rel=1e-4, nan_ok=True)


# Planning.


def test_bytes_of_parts_add_up_for_formats_of_rows(llama: Model) -> None:
    layers = mp.layers(llama, ties="none")
    menu = ["int3-channel", "int4-g16-asym", "bf16", "q8_0"]
    whole = mp.cost(layers, menu)
    parts = mp.cost(split(layers, "output_channel", 20), menu)
    found = sums(parts)
    for name, value in zip(whole.layers, whole.value, strict=True):
        assert np.array_equal(found[name], value, equal_nan=True)
    assert (parts.weights, parts.fixed, parts.reference) == (whole.weights, whole.fixed, whole.reference)
    # Every part has the scale of a whole tensor for itself.
    tensor = mp.cost(split([*layers][1:2], "output_channel", 32), ["int4-tensor"])
    assert tensor.value.sum() == mp.cost(Layers(tuple(layers[1:2])), ["int4-tensor"]).value.sum() + 2
    compute = mp.cost(split(layers, "output_channel", 20), ["int4-channel"], "bops")
    assert compute.value.sum() == mp.cost(layers, ["int4-channel"], "bops").value.sum()


@pytest.mark.parametrize("container", ["gptq", "awq", "compressed-tensors", "gguf"])
def test_checkpoints_of_others_hold_no_parts(container: str) -> None:
    layers = split([Layer("fc", "linear", (64, 64))], "output_channel", 32)
    assert np.isnan(mp.cost(layers, ["int4-g32", "q8_0", "bf16"], f"bytes@{container}").value).all()


def planned(model: Model, batches: list[Any], by: Any, size: int | None) -> BitPlan:
    layers = split(mp.layers(model), by, size, model=model)
    menu = ["int2-channel", "int4-channel", "int8-channel"]
    scores = mp.score(model, batches, menu, "fisher", layers=layers)
    cost = mp.cost(layers, menu)
    problem = Problem.of(scores, [cost], [Budget.parse("weights <= 6 bits")])
    solution = registry.make("solvers", "ilp").solve(problem)
    assert solution.status == "optimal"
    formats = {
        layer.name: Format.parse(menu[int(k)])
        for row, k in zip(layers.decisions, solution.choice, strict=True)
        for layer in row.layers
    }
    return BitPlan(layers, formats, {"name": "tiny", "digest": model.digest, "architecture": model.architecture})


@pytest.mark.parametrize(("by", "size"), [("head", None), ("output_channel", 24)])
def test_a_plan_of_parts_is_solved_measured_and_stored(
    by: Any, size: int | None, llama: Model, batches: list[Any], tmp_path: Path
) -> None:
    plan = planned(llama, batches, by, size)
    used = {(x.owner, str(plan.formats[x.name])) for x in plan.layers if x.is_part}
    assert len(used) > len({owner for owner, _ in used})  # one layer, several formats
    assert plan.bits <= 6
    assert BitPlan.from_json(json.loads(json.dumps(plan.to_json()))) == plan
    measured = mp.measure(llama, plan, batches)
    by_name = mp.measure(llama, {name: str(x) for name, x in plan.formats.items()}, batches, layers=plan.layers)
    assert measured.loss == by_name.loss > 0
    Native().write(plan, tmp_path / "out", llama)
    assert payload_bytes(tmp_path / "out" / "weights.safetensors") == plan.bytes
    back, weights = Native().read(tmp_path / "out")
    assert back == plan
    with applied(llama, {x: plan.formats[x.name] for x in plan.layers}):
        for layer in wholes(plan.layers):
            assert torch.equal(weights[layer.tensor], llama.weight(layer.name).detach())
    assert any("is part of a tensor" in reason for reason in LlamaCpp().refuses(plan))
    with pytest.raises(InputError, match="E301"):
        LlamaCpp().write(plan, tmp_path / "gguf")


def test_a_plan_that_leaves_weights_out_is_not_stored() -> None:
    part = Layer("a", "linear", (4, 8)).part((0, 2))
    plan = BitPlan(Layers((part,)), {part.name: FORMAT})
    assert list(Native().refuses(plan)) == ["a: its parts hold 16 of 32 weights, and nothing the others"]


def test_measuring_names_what_the_layers_are(llama: Model, batches: list[Any]) -> None:
    layers = split(mp.layers(llama), "output_channel", 32)
    with pytest.raises(InputError, match="E302"):
        mp.measure(llama, {layer.name: "int4-channel" for layer in layers}, batches)
    assert mp.measure(llama, {x.name: "int8-channel" for x in layers}, batches, layers=layers).loss < 0.1
