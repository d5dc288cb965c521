"""Every estimator with every architecture family, and with models and data that are not as they should be."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from mpsearch import registry
from mpsearch.format import Format, parse_formats
from mpsearch.layer import decisions
from mpsearch.model.find import find_layers
from mpsearch.model.model import Model
from mpsearch.model.reads import input_of
from mpsearch.sensitivity.divergence import Divergence
from mpsearch.sensitivity.layer_hessian import LayerHessian
from mpsearch.sensitivity.output_mse import OutputMse
from tests.architectures import FAMILIES, FORMATS, Built, build, estimator, outcome, rows
from tests.digits import accuracy, digits_resnet, digits_vit

NAMES = registry.names("estimators")
#: Who refuses which family, and a word of the reason; models without logits are refused by more.
REFUSED = {("lrp", "Mamba"): "softplus"}
#: Decisions that an estimator cannot see, beside stacked experts.
UNSEEN = {
    # Two pictures make two inputs: fewer than the directions that are set apart.
    ("activation_pca", "ViT"): ["classifier"],
    ("activation_pca", "DeiT"): ["classifier"],
    ("activation_pca", "Swin"): ["classifier"],
    ("activation_pca", "ResNet"): ["classifier.1"],
    # Its sigmoid opens a gate, and relevance goes through what passes the gate.
    ("lrp", "Qwen2-MoE"): ["model.layers.0.mlp.shared_expert_gate"],
}


@cache
def built(family: str) -> Built:
    return build(family)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_estimator_takes_every_family_or_says_why_not(family: str, name: str) -> None:
    model = built(family)
    found = outcome(estimator(name), model)
    if found.table is None:
        expected = "logits" if family == "own loss" else REFUSED.get((name, family))
        assert expected, f"{name} refuses {family}: {found.refusal}"
        assert expected in found.refusal
        return
    assert (name, family) not in REFUSED
    table = found.table
    assert table.layers == rows(estimator(name), model)
    assert table.formats == tuple(map(str, FORMATS))
    assert found.problems == ()
    assert found.counts["ok"] > 0
    ok = np.array([[status == "ok" for status in row] for row in table.status])
    assert np.isfinite(table.value[ok]).all()
    assert not np.isinf(table.spread).any()
    assert table.unit
    kinds = {row.name: row.layers[0].kind for row in decisions(model.layers)}
    assert [n for n in found.not_observed if kinds.get(n) != "expert"] == UNSEEN.get((name, family), [])
    assert not any("non_finite" in row for row in table.status)


class TestLayersOfFamilies:
    def test_every_stored_tensor_is_a_layer_or_left_out_with_a_reason(self) -> None:
        for family in FAMILIES:
            model, layers = built(family).model, built(family).layers
            named = {layer.tensor for layer in layers} | {kept.name for kept in layers.excluded}
            assert {name for name, _ in model.module.named_parameters()} <= named, family
            assert layers.weights == sum(x.numel() for x in model.module.parameters()) + sum(
                kept.weights for kept in layers.excluded if kept.reason == "buffer"
            )
            assert all(kept.reason for kept in layers.excluded)
            assert all(kept.reason != "never called by the data" for kept in layers.excluded), family

    @pytest.mark.parametrize(
        ("family", "tie"),
        [
            ("Llama", "model.layers.0.self_attn.{q,k,v}_proj"),
            ("Llama", "model.layers.1.mlp.{gate,up}_proj"),
            ("OPT", "model.decoder.layers.0.self_attn.{k,v,q}_proj"),
            ("BERT", "bert.encoder.layer.0.attention.self.{query,key,value}"),
            ("T5", "encoder.block.0.layer.0.SelfAttention.{q,k,v}"),
            ("T5", "decoder.block.0.layer.1.EncDecAttention.{k,v}"),
            ("Mixtral", "model.layers.0.self_attn.{q,k,v}_proj"),
            ("ViT", "vit.layers.0.attention.{q,k,v}_proj"),
            ("DeiT", "deit.layers.1.attention.{q,k,v}_proj"),
            ("Swin", "swin.encoder.layers.1.blocks.0.attention.{q,k,v}_proj"),
        ],
    )
    def test_what_reads_one_tensor_is_tied(self, family: str, tie: str) -> None:
        assert tie in {layer.tie for layer in built(family).layers}

    def test_queries_of_cross_attention_read_something_else(self) -> None:
        name = "decoder.block.0.layer.1.EncDecAttention.q"
        assert next(layer.tie for layer in built("T5").layers if layer.name == name) == ""

    @pytest.mark.parametrize(
        ("family", "table", "others"),
        [
            ("Qwen2", "model.embed_tokens", ["lm_head"]),
            ("Gemma 2", "model.embed_tokens", ["lm_head"]),
            ("GPT-2", "transformer.wte", ["lm_head"]),
            ("OPT", "model.decoder.embed_tokens", ["lm_head"]),
            ("BERT", "bert.embeddings.word_embeddings", ["cls.predictions.decoder"]),
            ("T5", "shared", ["encoder.embed_tokens", "decoder.embed_tokens", "lm_head"]),
            ("Mamba", "backbone.embeddings", ["lm_head"]),
        ],
    )
    def test_one_stored_tensor_is_one_layer(self, family: str, table: str, others: list[str]) -> None:
        layer = next(layer for layer in built(family).layers if layer.name == table)
        assert list(layer.shared) == others
        assert layer.macs > 0

    @pytest.mark.parametrize("family", ["Mixtral", "Qwen2-MoE"])
    def test_stacked_experts_are_layers_and_routers_are_not(self, family: str) -> None:
        layers = built(family).layers
        experts = {layer.name.rpartition(".")[2]: layer.shape for layer in layers if layer.kind == "expert"}
        assert experts == {"gate_up_proj": (4, 96, 32), "down_proj": (4, 32, 48)}
        assert [kept.name for kept in layers.excluded if "Router" in kept.reason] == ["model.layers.0.mlp.gate.weight"]

    def test_weights_that_mamba_reads_itself_are_said_to_be_read(self) -> None:
        layers = built("Mamba").layers
        assert {layer.name.rpartition(".")[2] for layer in layers if ".mixer." in layer.name} == {
            "in_proj", "x_proj", "out_proj",
        }  # fmt: skip
        reasons = {kept.name.removeprefix("backbone.layers.0."): kept.reason for kept in layers.excluded}
        assert reasons["mixer.conv1d.weight"] == reasons["mixer.dt_proj.weight"] == "read outside of its module"
        assert reasons["mixer.A_log"] == "no quantiser for MambaMixer.A_log"

    def test_position_tables_of_vision_models_are_left_out(self) -> None:
        kept = [x for x in built("Swin").layers.excluded if x.name.endswith("relative_position_bias_table")]
        assert len(kept) == 4
        assert {x.reason for x in kept} == {"no quantiser for SwinRelativePositionBias.relative_position_bias_table"}
        assert any(x.name == "vit.embeddings.position_embeddings" for x in built("ViT").layers.excluded)

    def test_transposed_linears_have_their_outputs_on_the_second_axis(self) -> None:
        layer = next(x for x in built("GPT-2").layers if x.name == "transformer.h.0.attn.c_attn")
        assert (layer.shape, layer.out_axis, layer.rows, layer.columns) == ((32, 96), 1, 96, 32)


class TestInputsOfLayers:
    """OPT's embedding of positions is called with a mask, and counts the positions itself."""

    def test_positions_are_what_is_looked_up_and_not_the_mask(self) -> None:
        model = built("OPT").model
        name = "model.decoder.embed_positions"
        seen: list[Tensor] = []
        holder = model.holder(name)
        handle = holder.register_forward_hook(
            lambda module, args, kwargs, output: seen.append(input_of(module, args, kwargs)), with_kwargs=True
        )
        try:
            with torch.no_grad():
                model.logits(built("OPT").batches[0])
        finally:
            handle.remove()
        assert seen[0].flatten()[-12:].tolist() == list(range(2, 14))

    def test_its_output_error_is_that_of_those_rows(self) -> None:
        case = built("OPT")
        layer = next(x for x in case.layers if x.name == "model.decoder.embed_positions")
        fmt = Format.parse("int4-channel")
        weight = case.model.weight(layer.name).detach()[2:14]
        from mpsearch.model.quantize import fake_quantize

        whole = fake_quantize(case.model.weight(layer.name).detach(), fmt)[2:14]
        expected = float((whole - weight).square().sum() / weight.square().sum())
        for how in (OutputMse(), LayerHessian()):
            table = how.score(case.model, case.batches, [layer], [fmt])
            assert table.value[0, 0] == pytest.approx(expected, rel=1e-5)

    def test_a_convolution_that_pads_by_itself_is_scored_as_it_runs(self) -> None:
        class Same(nn.Conv1d):
            def forward(self, x: Tensor) -> Tensor:
                return functional.conv1d(functional.pad(x, (2, 0)), self.weight, self.bias)

        torch.manual_seed(0)
        model = Model(nn.Sequential(Same(3, 4, 3)), logits=lambda m, x: m(x).mean(-1))
        x = torch.randn(2, 3, 5)
        layers, fmt = find_layers(model, [x]), Format.parse("int3-channel")
        from mpsearch.model.quantize import fake_quantize

        conv = model.module[0]
        rounded = fake_quantize(conv.weight.detach(), fmt)
        padded = functional.pad(x, (2, 0))
        error = functional.conv1d(padded, rounded - conv.weight).square().sum()
        whole = functional.conv1d(padded, conv.weight).square().sum()
        found = OutputMse().score(model, [x], layers, [fmt]).value[0, 0]
        assert found == pytest.approx(float((error / whole).detach()), rel=1e-5)


def test_replayed_passes_of_t5_are_those_in_full() -> None:
    case = built("T5")
    fast, full = (
        Divergence(reuse=reuse).score(case.model, case.batches, case.layers, FORMATS) for reuse in (True, False)
    )
    assert fast.value.tobytes() == full.value.tobytes()


class TestTrainedOnDigits:
    @pytest.mark.parametrize("make", [digits_vit, digits_resnet])
    def test_it_knows_the_digits(self, make: Any) -> None:
        found = make()
        assert accuracy(found) > 0.95
        assert (len(found.calibration), len(found.validation)) == (4, 20)
        assert not any(torch.equal(x[0], y[0]) for x in found.calibration for y in found.validation)
        assert len(find_layers(found.model, found.calibration).decisions) >= 10
        assert make() is found

    def test_two_bits_ruin_it_and_eight_do_not(self) -> None:
        found = digits_resnet()
        table = Divergence().score(
            found.model,
            found.calibration,
            find_layers(found.model, found.calibration),
            parse_formats(["int2-channel", "int8-channel"]),
        )
        assert (table.value[:, 1] < 0.05 * table.value[:, 0]).all()
