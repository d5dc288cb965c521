"""Relevance against the rules of other implementations, its conservation, and the estimator made of it."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import mpsearch as mp
from mpsearch.errors import InputError
from mpsearch.format import Format
from mpsearch.layer import Layer
from mpsearch.model.find import find_layers
from mpsearch.model.model import Model
from mpsearch.sensitivity.lrp import Lrp
from mpsearch.sensitivity.lrp_rules import Rules, layer
from mpsearch.sensitivity.lrp_trace import Tracer
from mpsearch.sensitivity.relevance import Relevance, relevance
from mpsearch.testing.estimators import EstimatorSuite
from tests.conftest import DATA
from tests.tiny_models import tiny, tiny_experts, tokens

CASES = json.loads((DATA / "lrp_rules.json").read_text())["cases"]
LAYER_RULES = {"ZPlus": "zplus", "AlphaBeta": "alpha_beta", "Gamma": "gamma"}


class TestByOutputs(EstimatorSuite):
    @pytest.fixture
    def estimator(self) -> Any:
        return Lrp(of="output", rule="gamma", target="label")


class TestByWeights(EstimatorSuite):
    @pytest.fixture
    def estimator(self) -> Any:
        return Lrp(of="weight", rule="alpha_beta", attention="cp")


class Step(nn.Module):
    """One operation of the table, on tensors that depend on the data."""

    def __init__(self, rule: str, given: dict[str, Any]) -> None:
        super().__init__()
        self.rule = rule
        for name in ("weight", "bias"):
            if name in given:
                self.register_parameter(name, nn.Parameter(number(given[name])))
        self.eps = given.get("eps", 0.0)

    def forward(self, a: Tensor, b: Tensor | None = None) -> Tensor:
        if "softmax" in self.rule:
            return torch.softmax(a, -1)
        if "matmul" in self.rule:
            return a @ b
        if "mul2" in self.rule:
            return a * b
        if "add2" in self.rule:
            return a + b
        if "rmsnorm" in self.rule:
            return functional.rms_norm(a, a.shape[-1:], self.weight, self.eps)
        return functional.layer_norm(a, a.shape[-1:], self.weight, self.bias, self.eps)


def number(values: Any) -> Tensor:
    flat = [[float(x) for x in row] for row in values] if isinstance(values[0], list) else [float(x) for x in values]
    return torch.tensor(flat, dtype=torch.float64)


def relevances(z: Tensor, arriving: Tensor, inputs: list[Tensor]) -> list[Tensor]:
    """x * g of every input when ``arriving`` is the relevance of z; masked numbers hold none."""
    seed = torch.where(z == 0, 0.0, arriving / z).detach()
    found = torch.autograd.grad(z, inputs, seed)
    return [torch.where(x.isinf(), 0.0, x.detach() * g) for x, g in zip(inputs, found, strict=True)]


@pytest.mark.parametrize("case", CASES, ids=[case["rule"].split(" (")[0] + f" {i}" for i, case in enumerate(CASES)])
def test_rules_of_the_reference_table(case: dict[str, Any]) -> None:
    given, arriving = case["inputs"], number(case["R_out"])
    if "softmax" in case["rule"]:
        # Masked for all purposes, but finite: relevance cannot be sent back from an output that is exactly zero.
        given = {"x": [[-700.0 if x == "-inf" else x for x in given["x"][0]]]}
    epsilon = given.get("lrp_epsilon", given.get("epsilon", 1e-6))
    inputs = [number(given[k]).requires_grad_(True) for k in ("x", "A", "B", "a", "b") if k in given]
    if "W" in given:
        inputs = inputs[:1]
        rule: Any = next((mine for name, mine in LAYER_RULES.items() if name in case["rule"]), "epsilon")
        bias = number(given["b"]) if "b" in given else None
        z = layer(inputs[0], number(given["W"]), bias, functional.linear, rule, Rules(epsilon=epsilon))
    else:
        step = Step(case["rule"], given)
        with Tracer(Rules(epsilon=epsilon), {}, {}).running(step):
            z = step(*inputs)
    torch.testing.assert_close(z.detach(), number(case["out"]), rtol=1e-6, atol=1e-9)
    found = relevances(z, arriving, inputs)
    parts = case["R_in"] if len(case["R_in"]) == len(found) else [case["R_in"]]
    # LXT adds epsilon without the sign of the denominator, which moves a result by up to 2 epsilon / |z|.
    loose = 5 * epsilon if "attnlrp_l" in case["rule"] or "matmul" in case["rule"] or "add2" in case["rule"] else 1e-9
    for mine, theirs in zip(found, parts, strict=True):
        expected = torch.tensor(theirs, dtype=torch.float64).view(-1)
        mine = mine.view(-1)
        if "softmax" in case["rule"]:
            mine, expected = mine[:3], expected[:3]
        torch.testing.assert_close(mine, expected, rtol=1e-9, atol=loose)


def test_masked_scores_hold_no_relevance() -> None:
    x = torch.tensor([[2.0, 1.0, -1.0, -torch.inf]], dtype=torch.float64, requires_grad=True)
    with Tracer(Rules(), {}, {}).running(nn.Identity()):
        z = torch.softmax(x, -1)
    arriving = torch.tensor([[0.5, -0.2, 0.1, 0.0]], dtype=torch.float64)
    (found,) = relevances(z, arriving, [x])
    expected = x.detach()[0, :3] * (arriving[0, :3] - z.detach()[0, :3] * arriving.sum())
    torch.testing.assert_close(found[0, :3], expected)
    assert found[0, 3] == 0


def test_the_table_is_whole() -> None:
    assert len(CASES) == 12


def ratio(found: Relevance) -> float:
    return found.arrived / found.explained


@pytest.mark.parametrize("architecture", ["Llama", "Qwen3", "Gemma2", "Mixtral"])
def test_relevance_is_conserved_in_a_language_model(architecture: str) -> None:
    model = tiny_experts(architecture) if architecture == "Mixtral" else tiny(architecture)
    batch = tokens(2, 12)
    found = relevance(model, batch, find_layers(model, [batch]), Rules(attention="cp"))
    assert ratio(found) == pytest.approx(1, abs=1e-3)
    torch.testing.assert_close(found.logits, model.logits(batch).detach(), rtol=1e-4, atol=1e-4)
    for part in found.layers.values():
        assert part.output.signed == pytest.approx(part.input.signed, rel=1e-3, abs=1e-3)
        assert part.output.signed == pytest.approx(part.weight.signed, rel=1e-3, abs=1e-3)
    # Half of an MLP's relevance comes over the gate, half over the values.
    if architecture == "Llama":
        gate, up, down = (found.layers[f"model.layers.1.mlp.{x}_proj"].output.signed for x in ("gate", "up", "down"))
        assert gate == pytest.approx(up, rel=1e-3)
        assert gate + up == pytest.approx(found.layers["model.layers.1.mlp.down_proj"].input.signed, rel=1e-3)
        assert down == pytest.approx(gate + up, rel=1e-3)


def test_the_rule_of_the_softmax_does_not_conserve_and_sees_queries_and_keys() -> None:
    model, batch = tiny(), tokens(1, 12)
    layers = find_layers(model, [batch])
    through, constant = (relevance(model, batch, layers, Rules(attention=how)) for how in ("attnlrp", "cp"))
    assert abs(ratio(through) - 1) > 0.01
    q, k = (f"model.layers.0.self_attn.{x}_proj" for x in "qk")
    assert q not in constant.layers
    assert through.layers[q].output.absolute > 0
    # Scores are products of both, each turned by its position: what reaches them is the same.
    assert through.layers[q].output.signed == pytest.approx(through.layers[k].output.signed, rel=1e-3)
    assert len(through.layers) == len(layers)


def test_fused_attention_is_attention_step_by_step() -> None:
    batch = tokens(1, 12)
    fused, eager = (tiny(attn_implementation=how) for how in ("sdpa", "eager"))
    for how in ("attnlrp", "cp"):
        a, b = (relevance(m, batch, find_layers(m, [batch]), Rules(attention=how)) for m in (fused, eager))
        assert a.layers.keys() == b.layers.keys()
        for name, part in a.layers.items():
            torch.testing.assert_close(part.output.channels, b.layers[name].output.channels, rtol=1e-3, atol=1e-3)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.inner = nn.LayerNorm(16, elementwise_affine=False), nn.LayerNorm(16, elementwise_affine=False)
        self.qkv, self.out = nn.Linear(16, 48, bias=False), nn.Linear(16, 16, bias=False)
        self.up, self.down = nn.Linear(16, 32, bias=False), nn.Linear(32, 16, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (y.unflatten(-1, (4, 4)).transpose(1, 2) for y in self.qkv(self.norm(x)).chunk(3, -1))
        x = x + self.out(functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(-2))
        return x + self.down(functional.gelu(self.up(self.inner(x))))


class Vit(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 16, 4, stride=4, bias=False)
        self.blocks = nn.Sequential(Block(), Block())
        self.head = nn.Linear(16, 5, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(self.patches(x).flatten(2).transpose(1, 2)).mean(1))


def vision(seed: int = 0) -> tuple[Model, Tensor]:
    torch.manual_seed(seed)
    return Model(Vit(), logits=lambda m, x: m(x)), torch.randn(3, 3, 8, 8)


def test_relevance_is_conserved_in_a_vision_transformer() -> None:
    model, x = vision()
    found = relevance(model, x, find_layers(model, [x]), Rules(attention="cp"))
    assert ratio(found) == pytest.approx(1, abs=2e-3)
    assert len(found.layers) == 10
    heads = found.layers["blocks.0.out"].input.heads(4)
    assert len(heads.channels) == 4
    assert heads.signed == pytest.approx(found.layers["blocks.0.out"].input.signed)
    with pytest.raises(InputError, match="not 3 heads"):
        found.layers["blocks.0.out"].input.heads(3)


def network() -> tuple[Model, Tensor]:
    torch.manual_seed(2)
    module = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8, affine=False), nn.ReLU(inplace=True),
        nn.MaxPool2d(2), nn.Conv2d(8, 8, 3, stride=2, groups=2, bias=False), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4, bias=False),
    )  # fmt: skip
    return Model(module, logits=lambda m, x: m(x)), torch.rand(2, 3, 12, 12)


@pytest.mark.parametrize("rule", ["epsilon", "gamma", "zplus", "alpha_beta"])
def test_relevance_is_conserved_in_a_convolutional_network(rule: Any) -> None:
    model, x = network()
    found = relevance(model, x, find_layers(model, [x]), Rules(linear="epsilon", conv=rule))
    assert ratio(found) == pytest.approx(1, abs=1e-3)
    assert {len(part.input.channels) for part in found.layers.values()} == {3, 8}
    first = found.layers["0"]
    assert first.input.signed == pytest.approx(first.weight.signed, rel=1e-4)
    if rule in ("zplus", "gamma"):
        # Less of it cancels than under epsilon.
        plain = relevance(model, x, find_layers(model, [x]), Rules(conv="epsilon")).layers["0"]
        assert first.input.absolute < plain.input.absolute


@pytest.mark.parametrize("rule", ["epsilon", "gamma", "zplus", "alpha_beta"])
def test_a_convolution_is_a_dense_layer_on_patches(rule: Any) -> None:
    torch.manual_seed(3)
    x, weight, bias = torch.randn(2, 4, 7, 7).double(), torch.randn(6, 4, 3, 3).double(), torch.randn(6).double()
    arriving = torch.randn(2, 6, 3, 3).double()
    inputs = x.clone().requires_grad_(True)

    def convolve(x: Tensor, w: Tensor, b: Tensor | None) -> Tensor:
        return functional.conv2d(x, w, b, stride=2)

    z = layer(inputs, weight, bias, convolve, rule, Rules())
    (found,) = relevances(z, arriving, [inputs])
    patches = functional.unfold(x, 3, stride=2).transpose(1, 2)
    c = patches[:, :, None] * weight.flatten(1)  # contributions: sample, place, output, input
    positive, negative = c.clamp(min=0).sum(-1) + bias.clamp(min=0), c.clamp(max=0).sum(-1) + bias.clamp(max=0)
    total, r = positive + negative, arriving.flatten(2).transpose(1, 2)
    share = {
        "epsilon": c / total[..., None],
        "zplus": c.clamp(min=0) / positive[..., None],
        "alpha_beta": 2 * c.clamp(min=0) / positive[..., None] - c.clamp(max=0) / negative[..., None],
        "gamma": torch.where(
            total[..., None] > 0,
            (c + 0.25 * c.clamp(min=0)) / (total + 0.25 * positive)[..., None],
            (c + 0.25 * c.clamp(max=0)) / (total + 0.25 * negative)[..., None],
        ),
    }[rule]
    expected = functional.fold((share * r[..., None]).sum(2).transpose(1, 2), (7, 7), 3, stride=2)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)


def test_the_score_is_the_share_times_the_relative_error() -> None:
    module = nn.Sequential(nn.Linear(2, 2, bias=False), nn.ReLU(), nn.Linear(2, 2, bias=False))
    module[0].weight.data = torch.tensor([[1.0, 0.6], [-1.0, 0.5]])
    module[2].weight.data = torch.tensor([[1.0, 0.3], [0.2, 0.4]])
    model = Model(module, logits=lambda m, x: m(x))
    batch = torch.tensor([[1.0, -0.5]])
    # Only the first hidden unit is on (0.7), the first logit is the larger one: 0.7 = 1 - 0.3 of the inputs.
    for of, first, second in (("output", 0.7, 0.7), ("input", 1.3, 0.7), ("weight", 1.3, 0.7)):
        found = Lrp(of=of).score(model, [batch], find_layers(model, [batch]), [Format.parse("int2-channel")])
        assert found.value[0, 0] == pytest.approx(first / (first + second) * _error(model, "0"), rel=1e-4)
        assert found.value[1, 0] == pytest.approx(second / (first + second) * _error(model, "2"), rel=1e-4)


def _error(model: Model, name: str) -> float:
    from mpsearch.model.quantize import fake_quantize

    weight = model.weight(name).detach()
    rounded = fake_quantize(weight, Format.parse("int2-channel"))
    return float((rounded - weight).square().sum() / weight.square().sum())


def test_the_label_is_explained_when_it_is_asked_for() -> None:
    module = nn.Linear(2, 3, bias=False)
    module.weight.data = torch.tensor([[1.0, 2.0], [3.0, -1.0], [0.5, 0.5]])
    model = Model(module, logits=lambda m, b: m(b["x"]))
    batch = {"x": torch.tensor([[1.0, 1.0]]), "labels": torch.tensor([2])}
    layers = [Layer("", "linear", (3, 2))]
    assert relevance(model, batch, layers).explained == pytest.approx(3)
    label = relevance(model, batch, layers, target="label")
    assert label.layers[""].input.channels.tolist() == pytest.approx([0.5, 0.5], rel=1e-4)
    assert label.layers[""].output.channels.tolist() == pytest.approx([0, 0, 1], rel=1e-4)
    with pytest.raises(InputError, match="labels"):
        relevance(model, {"x": batch["x"]}, layers, target="label")
    words, text = tiny(layers=1), tokens(1, 6)
    logits = words.logits(text).detach()
    expected = logits[0, :-1].gather(-1, text["input_ids"][0, 1:, None]).sum()
    assert relevance(words, text, find_layers(words), target="label").explained == pytest.approx(
        float(expected), rel=1e-5
    )


def test_an_embedding_used_as_the_head_counts_both_uses() -> None:
    batch = tokens(1, 8)
    model = tiny(tie_word_embeddings=True, layers=1)
    layers = find_layers(model, [batch])
    shared = next(x for x in layers if x.shared)
    found = relevance(model, batch, layers, Rules(attention="cp"))
    part = found.layers[shared.name]
    assert len(part.output.channels) == 61
    assert len(part.input.channels) == 64
    assert part.output.signed == pytest.approx(2 * found.explained, rel=1e-3)
    assert part.weight.signed == pytest.approx(2 * found.explained, rel=1e-3)


def test_what_relevance_does_not_reach_is_not_observed() -> None:
    formats = [Format.parse("int4-channel")]
    batch = tokens(2, 8)
    model = tiny()
    layers = find_layers(model, [batch], ties="none")
    table = Lrp(attention="cp").score(model, [batch], layers, formats)
    unseen = {name for name, row in zip(table.layers, table.status, strict=True) if row == ("not_observed",)}
    assert unseen == {f"model.layers.{i}.self_attn.{x}_proj" for i in range(2) for x in "qk"}
    experts = tiny_experts("Mixtral")
    layers = find_layers(experts, [batch])
    table = Lrp().score(experts, [batch], layers, formats)
    kinds = {x.tie or x.name: x.kind for x in layers}
    status = {name: row[0] for name, row in zip(table.layers, table.status, strict=True)}
    assert {kinds[name] for name, found in status.items() if found == "not_observed"} == {"expert"}
    assert all(found == "ok" for name, found in status.items() if kinds[name] != "expert")


class Routed(nn.Module):
    """Two experts; each sample goes to the one of its sign."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(2, 2), nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([(self.a if row.sum() > 0 else self.b)(row[None]) for row in x])


@pytest.mark.parametrize("signs", [(1, 1), (1, -1)])
def test_an_expert_that_a_sample_skips_has_no_share_in_it(signs: tuple[int, int]) -> None:
    model = Model(Routed(), logits=lambda m, x: m(x))
    x = torch.ones(2, 2) * torch.tensor(signs)[:, None]
    layers = find_layers(Model(Routed()))
    one = Lrp().score(model, [x], layers, [Format.parse("int4-channel")])
    two = Lrp().score(model, [x[:1], x[1:]], layers, [Format.parse("int4-channel")])
    assert one.status == two.status == (("ok",), ("not_observed" if signs[1] == 1 else "ok",))
    # All of a sample's relevance goes through its one expert; batches that miss one are left out of its mean.
    alone = [Lrp().score(model, [x[i : i + 1]], layers, [Format.parse("int4-channel")]).value for i in range(2)]
    if signs[1] == -1:
        for i in range(2):
            assert one.value[i, 0] == pytest.approx(alone[i][i, 0] / 2)
            assert two.value[i, 0] == pytest.approx(alone[i][i, 0])


def test_dead_layers_and_inputs_give_finite_numbers() -> None:
    for which in ("0", "2", "all", "input"):
        torch.manual_seed(0)
        module = nn.Sequential(nn.Linear(4, 6), nn.GELU(), nn.Linear(6, 3))
        for name, parameter in module.named_parameters():
            if which == "all" or name.startswith(which):
                parameter.data.zero_()
        model = Model(module, logits=lambda m, x: m(x))
        x = torch.zeros(3, 4) if which == "input" else torch.randn(3, 4)
        for rule in ("epsilon", "gamma", "zplus", "alpha_beta"):
            for of in ("output", "input", "weight"):
                table = Lrp(rule=rule, of=of).score(model, [x], find_layers(model, [x]), [Format.parse("int2-channel")])
                assert table.status == (("ok",), ("ok",))
                assert (table.value >= 0).all()


def test_shares_add_up_and_do_not_hang_on_other_samples() -> None:
    model, x = network()
    layers = find_layers(model, [x])
    both = Lrp().shares(model, x, layers)
    assert [sum(sample.values()) for sample in both] == pytest.approx([1, 1])
    assert Lrp().shares(model, x[1:], layers) == both[1:]
    # A larger answer explains no more: shares are free of the scale of the logits.
    model.module[-1].weight.data *= 7
    again = Lrp(epsilon=1e-9).shares(model, x, layers)
    assert again[0] == pytest.approx(both[0], rel=1e-2)


def test_a_norm_of_groups_and_gates_are_followed() -> None:
    class Gated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm = nn.Conv2d(2, 4, 3), nn.GroupNorm(2, 4)
            self.gate, self.head = nn.Linear(4, 4), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            y = self.norm(self.conv(x)).mean((2, 3))
            y = y * torch.sigmoid(self.gate(y))
            y += 1.0
            return self.head(y / y.sum(-1, keepdim=True))

    torch.manual_seed(0)
    model, x = Model(Gated(), logits=lambda m, x: m(x)), torch.randn(2, 2, 6, 6)
    found = relevance(model, x, find_layers(model, [x]))
    torch.testing.assert_close(found.logits, model.logits(x).detach())
    assert found.layers.keys() == {"conv", "head"}


def test_what_no_rule_covers_is_refused_with_its_name() -> None:
    class Odd(nn.Module):
        def __init__(self, step: Any) -> None:
            super().__init__()
            self.layer, self.step = nn.Linear(3, 3), step

        def forward(self, x: Tensor) -> Tensor:
            return self.step(self.layer(x))

    x = torch.randn(2, 3)
    for step, name in (
        (torch.exp, "exp"),
        (lambda y: torch.log_softmax(y, -1), "log_softmax"),
        (lambda y: y**2, "pow"),
    ):
        model = Model(Odd(step), logits=lambda m, b: m(b))
        model.calibrate([x])
        assert Lrp().refuses(model) == f"no rule of relevance covers the operations {name}"
        with pytest.raises(InputError, match=f"operations {name}"):
            Lrp().score(model, [x], find_layers(model, [x]), [Format.parse("int4-channel")])
    attention = Model(nn.TransformerEncoderLayer(8, 2, 8, batch_first=True), logits=lambda m, b: m(b))
    assert Lrp().refuses(attention) == "no rule of relevance covers the modules MultiheadAttention"
    assert "needs logits" in Lrp().refuses(Model(nn.Linear(2, 2)))
    unlabelled = Model(nn.Linear(3, 3), logits=lambda m, b: m(b))
    unlabelled.calibrate([x])
    assert "labels" in Lrp(target="label").refuses(unlabelled)
    assert Lrp().refuses(tiny()) == ""


def test_a_model_whose_answer_changes_is_refused() -> None:
    class Aliased(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            y = self.layer(x)
            y.add_(1.0)  # the result is not taken up
            return y

    model, x = Model(Aliased(), logits=lambda m, b: m(b)), torch.randn(2, 3)
    with pytest.raises(InputError, match="answer changes"):
        Lrp().score(model, [x], find_layers(model, [x]), [Format.parse("int4-channel")])


def test_nothing_is_left_in_the_model() -> None:
    model, batch = tiny("Gemma2"), tokens(1, 6)
    before = [(len(m._forward_hooks), len(m._forward_pre_hooks), "forward" in vars(m)) for m in model.module.modules()]
    Lrp().score(model, [batch], find_layers(model, [batch]), [Format.parse("int4-channel")])
    broken = {"input_ids": torch.full((1, 3), 99)}
    with pytest.raises(InputError, match="E512"):
        relevance(model, broken, [])
    after = [(len(m._forward_hooks), len(m._forward_pre_hooks), "forward" in vars(m)) for m in model.module.modules()]
    assert after == before
    assert all(p.grad is None and p.requires_grad for p in model.module.parameters())


@pytest.mark.parametrize(
    "settings",
    [{"target": "best"}, {"of": "all"}, {"rule": "lrp"}, {"epsilon": 0.0}, {"gamma": -1.0}, {"alpha": 0.5},
     {"attention": "none"}, {"epsilon": float("nan")}],
)  # fmt: skip
def test_settings_are_checked(settings: dict[str, Any]) -> None:
    with pytest.raises(InputError, match="lrp: ") as error:
        mp.registry.make("estimators", "lrp", **settings)
    assert error.value.code == "E113"


def test_a_dense_layer_written_as_a_product_is_the_same_layer() -> None:
    class Written(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return x @ self.weight.T + self.bias

    torch.manual_seed(0)
    plain, x = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4)), torch.randn(3, 4)
    written = nn.Sequential(Written(4, 4), nn.Tanh(), Written(4, 4))
    written.load_state_dict(plain.state_dict())
    for rule in ("epsilon", "gamma"):
        # A bias that is added afterwards has no part in the preference of gamma.
        for module in (plain, written):
            module[0].bias.data.mul_(rule == "epsilon")
            module[2].bias.data.mul_(rule == "epsilon")
        a, b = (
            relevance(model, x, find_layers(model, [x]), Rules(linear=rule)).layers  # type: ignore[arg-type]
            for model in (Model(module, logits=lambda m, x: m(x)) for module in (plain, written))
        )
        assert a.keys() == b.keys() == {"0", "2"}
        for name in a:
            for part in ("input", "weight"):
                torch.testing.assert_close(
                    getattr(a[name], part).magnitudes, getattr(b[name], part).magnitudes, rtol=1e-3, atol=1e-4
                )


@pytest.mark.parametrize("architecture", ["Falcon", "Bloom", "GPT2"])
def test_other_ways_of_writing_a_transformer(architecture: str) -> None:
    import transformers

    torch.manual_seed(0)
    settings: dict[str, Any] = {
        "Falcon": {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2},
        "Bloom": {"hidden_size": 16, "n_layer": 1, "n_head": 2},
        "GPT2": {"n_embd": 16, "n_layer": 1, "n_head": 2},
    }[architecture]
    ends = {"vocab_size": 61, "bos_token_id": 0, "eos_token_id": 0}
    config = getattr(transformers, f"{architecture}Config")(**settings, **ends)
    kind = {"GPT2": "GPT2LMHeadModel"}.get(architecture, f"{architecture}ForCausalLM")
    model, batch = Model(getattr(transformers, kind)(config), tokens=True), tokens(1, 8)
    layers = find_layers(model, [batch])
    assert Lrp().refuses(model) == ""
    found = relevance(model, batch, layers, Rules(attention="cp"))
    torch.testing.assert_close(found.logits, model.logits(batch).detach(), rtol=1e-4, atol=1e-5)
    assert found.layers.keys() == {x.name for x in layers}
    # Biases are zero at first, so nothing is lost to them.
    assert ratio(found) == pytest.approx(1, abs=1e-3)
