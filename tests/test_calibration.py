"""What rounding asks of calibration data: input Hessians and gradients, against brute force, in use and in exports."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import mpsearch as mp
from mpsearch.errors import InputError
from mpsearch.exports.native import Native, payload_bytes
from mpsearch.format import Format
from mpsearch.layer import Layer, Layers
from mpsearch.model.apply import Change, applied, quantized_parts, quantized_weight
from mpsearch.model.evidence import Calibration, _patches
from mpsearch.model.find import find_layers
from mpsearch.model.model import Model
from mpsearch.model.quantize import dequantize, fake_quantize
from mpsearch.plan import BitPlan
from tests.tiny_models import tiny, tokens

GPTQ = Format.parse("int3-channel-gptq")
FISHER = "codebook3-channel-fisher"


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def calibrated(module: nn.Module, batches: list[Tensor]) -> tuple[Model, dict[str, Layer]]:
    model = Model(module, logits=lambda m, x: m(x))
    model.calibrate(batches)
    return model, {layer.name: layer for layer in find_layers(model, batches)}


def hessian(model: Model, layer: Layer) -> Tensor:
    found = Calibration.of(model).evidence(layer, GPTQ).hessian
    assert found is not None
    return found


def outer(rows: list[Tensor]) -> Tensor:
    """2 X X^T / N in float64, one row at a time."""
    total = torch.zeros(len(rows[0]), len(rows[0]), dtype=torch.float64)
    for row in rows:
        total += 2 * torch.outer(row.double(), row.double())
    return total / len(rows)


def test_the_hessian_of_a_linear_is_that_of_all_its_inputs() -> None:
    batches = [noise(2, 3, 8), noise(4, 3, 8, seed=1) * 2]
    model, layers = calibrated(nn.Sequential(nn.Linear(8, 5)), batches)
    rows = [row for batch in batches for row in batch.reshape(-1, 8)]
    torch.testing.assert_close(hessian(model, layers["0"]).double(), outer(rows), rtol=1e-5, atol=1e-6)


def test_the_hessian_of_a_transposed_linear() -> None:
    from transformers.pytorch_utils import Conv1D

    batches = [noise(2, 3, 8)]
    model, layers = calibrated(nn.Sequential(Conv1D(5, 8)), batches)
    assert layers["0"].row_axes == (1,)
    found = hessian(model, layers["0"]).double()
    torch.testing.assert_close(found, outer(list(batches[0].reshape(-1, 8))), rtol=1e-5, atol=1e-6)


def test_the_hessian_of_a_weight_that_two_modules_share() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False)
            self.b.weight = self.a.weight

        def forward(self, x: Tensor) -> Tensor:
            found: Tensor = self.b(input=self.a(x).tanh())
            return found

    batches = [noise(5, 8)]
    model, layers = calibrated(Twice(), batches)
    with torch.no_grad():
        second = model.module.get_submodule("a")(batches[0]).tanh()
    found = hessian(model, layers["a"]).double()
    torch.testing.assert_close(found, outer([*batches[0], *second]), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "settings",
    [
        {"kernel_size": 3},
        {"kernel_size": (2, 3), "stride": 2, "padding": 1},
        {"kernel_size": 2, "dilation": 2, "padding": (1, 0), "stride": (1, 3)},
    ],
)
def test_the_hessian_of_a_convolution_is_that_of_its_patches(settings: dict[str, Any]) -> None:
    torch.manual_seed(0)
    convolution = nn.Conv2d(3, 4, **settings)
    batches = [noise(2, 3, 7, 6), noise(1, 3, 7, 6, seed=1)]
    model, layers = calibrated(nn.Sequential(convolution), batches)
    rows: list[Tensor] = []
    (up, down), (high, wide) = convolution.padding, convolution.kernel_size
    for batch in batches:
        padded = nn.functional.pad(batch, (down, down, up, up))
        shape = convolution(batch).shape
        for sample in padded:
            for i in range(shape[2]):
                for j in range(shape[3]):
                    top, left = i * convolution.stride[0], j * convolution.stride[1]
                    patch = sample[
                        :,
                        top : top + high * convolution.dilation[0] : convolution.dilation[0],
                        left : left + wide * convolution.dilation[1] : convolution.dilation[1],
                    ]
                    rows.append(patch.reshape(-1))
    torch.testing.assert_close(hessian(model, layers["0"]).double(), outer(rows), rtol=1e-5, atol=1e-6)
    # The same patches times the rows of the weight are what the layer gives.
    weight = convolution.weight.detach().reshape(4, -1)
    expected = (convolution(batches[0]) - convolution.bias.view(1, 4, 1, 1)).movedim(1, -1).reshape(-1, 4)
    torch.testing.assert_close(torch.stack(rows[: len(expected)]) @ weight.T, expected.detach(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("module", "shape"),
    [
        (nn.Conv2d(4, 5, 3, padding=1, padding_mode="reflect", bias=False), (2, 4, 6, 7)),
        (nn.Conv2d(4, 5, (3, 2), stride=(2, 1), dilation=(1, 2), padding="valid", bias=False), (2, 4, 9, 8)),
        (nn.Conv2d(4, 5, 3, padding="same", padding_mode="circular", bias=False), (2, 4, 6, 7)),
        (nn.Conv1d(4, 5, 3, stride=2, padding=2, dilation=2, bias=False), (3, 4, 11)),
        (nn.Conv1d(4, 5, 5, padding="same", bias=False), (4, 11)),
        (nn.Conv3d(2, 3, (2, 3, 2), padding=(1, 0, 1), bias=False), (2, 2, 5, 6, 4)),
    ],
)
def test_patches_of_any_convolution_times_its_weight_are_its_output(module: nn.Conv2d, shape: tuple[int, ...]) -> None:
    x, weight = noise(*shape), module.weight.detach()
    layer = Layer("0", "conv", tuple(weight.shape))
    outputs = module(x).detach()
    rows = outputs if outputs.dim() == weight.dim() else outputs.unsqueeze(0)
    expected = rows.movedim(1, -1).reshape(-1, len(weight))
    torch.testing.assert_close(_patches(module, x, layer) @ weight.flatten(1).T, expected)


def test_grouped_convolutions_are_refused_beforehand() -> None:
    model, layers = calibrated(nn.Sequential(nn.Conv2d(4, 4, 3, groups=2)), [noise(1, 4, 5, 5)])
    assert layers["0"].groups == 2
    assert "each of 2 groups of channels has inputs of its own" in GPTQ.refuses(layers["0"])
    with pytest.raises(InputError, match="use int") as found:
        Change.of(model, {layers["0"]: GPTQ})
    assert found.value.code == "E130"
    found_layer = Layer.from_json(layers["0"].to_json())
    assert found_layer == layers["0"]
    plan = BitPlan(Layers((found_layer,)), {"0": Format.parse("int8-channel")})
    assert BitPlan.from_json(plan.to_json()) == plan


def test_no_data_and_unseen_layers_say_so() -> None:
    model = Model(nn.Sequential(nn.Linear(8, 5)), logits=lambda m, x: m(x))
    with pytest.raises(InputError, match="there is none") as found:
        quantized_weight(model, Layer("0", "linear", (5, 8)), GPTQ)
    assert found.value.code == "E422"
    module = nn.ModuleList([nn.Linear(8, 5), nn.Linear(8, 5)])
    model = Model(module, logits=lambda m, x: m[0](x))
    model.calibrate([noise(2, 8)])
    with pytest.raises(InputError, match="never calls it") as found:
        quantized_weight(model, Layer("1", "linear", (5, 8)), GPTQ)
    assert found.value.code == "E422"


def test_evidence_is_taken_once_and_again_for_other_data() -> None:
    calls = 0

    def logits(module: nn.Module, x: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        found: Tensor = module(x)
        return found

    model = Model(nn.Sequential(nn.Linear(8, 5)), logits=logits)
    batches = [noise(4, 8), noise(4, 8, seed=1)]
    model.calibrate(batches)
    layer = Layer("0", "linear", (5, 8))
    first = hessian(model, layer)
    assert calls == 2
    assert hessian(model, layer) is first
    quantized_weight(model, layer, Format.parse("int2-g4-gptq"))
    assert calls == 2
    model.calibrate([batches[0] * 3])
    assert not torch.equal(hessian(model, layer), first)
    assert calls == 3


def test_the_hessian_is_that_of_the_unchanged_model() -> None:
    # What is rounded for one layer must not hang on what another layer was given.
    batches = [noise(6, 8)]
    torch.manual_seed(1)
    module = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 5))
    model, layers = calibrated(module, batches)
    alone = quantized_weight(model, layers["2"], GPTQ)
    other, _ = calibrated(module, batches)
    with applied(other, {layers["0"]: Format.parse("int2-tensor"), layers["2"]: GPTQ}):
        assert torch.equal(other.weight("2").detach(), alone)


@pytest.fixture(scope="module")
def llama() -> Model:
    model = tiny()
    model.calibrate([{"input_ids": part} for part in tokens(8, 12)["input_ids"].split(4)])
    return model


def test_compensated_weights_err_less_at_the_output(llama: Model) -> None:
    better = 0
    layers = [x for x in find_layers(llama, llama.calibration) if x.kind == "linear"]
    for layer in layers:
        seen = hessian(llama, layer).double()

        def loss(fmt: Format, layer: Layer = layer, seen: Tensor = seen) -> float:
            error = (quantized_weight(llama, layer, fmt) - llama.weight(layer.name).detach()).double()
            return float((error @ seen * error).sum())

        better += loss(GPTQ) < loss(Format.parse("int3-channel"))
    assert better >= len(layers) - 1


def test_importance_is_the_mean_square_of_gradients_per_prediction(llama: Model) -> None:
    layer = next(x for x in find_layers(llama, llama.calibration) if x.name.endswith("v_proj"))
    fmt = Format.parse(FISHER)
    found = Calibration.of(llama).evidence(layer, fmt).importance
    weight = llama.weight(layer.name)
    expected = torch.zeros_like(weight)
    for batch in llama.calibration:
        for tokens_of_one in batch["input_ids"]:
            logits = llama.module(input_ids=tokens_of_one[None]).logits[0, :-1]
            total = nn.functional.cross_entropy(logits, tokens_of_one[1:], reduction="sum")
            (gradient,) = torch.autograd.grad(total, [weight])
            expected += gradient**2 / (len(tokens_of_one) - 1)
    assert found is not None
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-6 * float(expected.max()))


def test_importance_of_a_transposed_weight_comes_by_rows() -> None:
    from transformers.pytorch_utils import Conv1D

    torch.manual_seed(2)
    module, x = Conv1D(3, 8), noise(4, 8)
    target = torch.tensor([0, 1, 2, 0])
    model = Model(
        nn.Sequential(module),
        loss=lambda m, batch: nn.functional.cross_entropy(m(batch[0]), batch[1]),
        logits=lambda m, batch: m(batch[0]),
    )
    model.calibrate([(x, target)])
    found = Calibration.of(model).evidence(Layer("0", "linear", (8, 3), 1), Format.parse(FISHER)).importance
    probabilities = torch.softmax(module(x).detach(), -1) - nn.functional.one_hot(target, 3)
    expected = torch.stack([torch.outer(p, row) ** 2 for p, row in zip(probabilities, x, strict=True)]).sum(0)
    assert found is not None
    torch.testing.assert_close(found, expected)


FORMATS = ["int3-channel-gptq", "int4-g16-asym-gptq", "int2-g16-gptq@int8-tensor-static", "int4-g16-gptq@int8-token"]


@pytest.mark.parametrize("text", FORMATS)
def test_the_weight_that_is_measured_is_the_weight_that_is_exported(text: str, llama: Model, tmp_path: Path) -> None:
    fmt = Format.parse(text)
    layers = find_layers(llama, llama.calibration)
    formats = {x.name: fmt if x.kind == "linear" else Format.parse("int8-channel") for x in layers}
    plan = BitPlan(layers, formats, {"name": "tiny", "digest": llama.digest})
    Native().write(plan, tmp_path / "out", llama)
    assert payload_bytes(tmp_path / "out" / "weights.safetensors") == plan.bytes
    _, tensors = Native().read(tmp_path / "out")
    with applied(llama, {x: formats[x.name] for x in layers}):
        for layer in layers:
            assert torch.equal(tensors[layer.tensor], llama.weight(layer.name).detach()), layer.name
    for layer in layers:
        plain = fake_quantize(llama.weight(layer.name).detach(), Format.parse("int3-channel"), layer.row_axes)
        parts = quantized_parts(llama, layer, formats[layer.name].weight)
        assert torch.equal(dequantize(parts), tensors[layer.tensor])
        assert not torch.equal(plain, tensors[layer.tensor])


def test_an_export_that_needs_data_says_so(tmp_path: Path) -> None:
    model = tiny()
    layers = find_layers(model)
    formats = {x.name: GPTQ if x.kind == "linear" else Format.parse("bf16") for x in layers}
    with pytest.raises(InputError) as found:
        Native().write(BitPlan(layers, formats, {"name": "tiny", "digest": "0"}), tmp_path / "out", model)
    assert found.value.code == "E422"
    assert not (tmp_path / "out" / "weights.safetensors").exists()


def test_a_search_over_compensated_formats_measures_what_it_scored() -> None:
    batches = [{"input_ids": part} for part in tokens(16, 12)["input_ids"].split(4)]
    found = mp.search(
        tiny().module, batches, "weights <= 6 bits", points=0,
        formats=["int3-g16-gptq", "int3-g16", "int8-channel"], activations=["16", "int8-tensor-static"],
    )  # fmt: skip
    again = mp.measure(tiny().module, found.plan, batches[3:], calibration=batches[:3])
    assert again.loss == found.study.measurements[0].loss
    with pytest.raises(InputError, match="there is none"):
        mp.measure(tiny().module, dict.fromkeys([x.name for x in find_layers(tiny())], "int8-channel") | {
            "lm_head": "int3-g16-gptq"}, batches[3:])  # fmt: skip


@pytest.mark.parametrize("estimator", ["divergence", "fisher", "hessian_trace", "output_mse", "weight_mse"])
@pytest.mark.parametrize("text", ["int3-g16-gptq", FISHER])
def test_every_estimator_scores_what_is_rounded_by_data(estimator: str, text: str, llama: Model) -> None:
    settings = {"product": "double_backward", "probes": 8} if estimator == "hessian_trace" else {}
    # Scored one by one, so that nothing is known beforehand, and with the format that needs no data first.
    table = mp.score(tiny().module, llama.calibration, ["int3-g16", text], estimator, **settings)
    alone = mp.score(tiny().module, llama.calibration, ["int3-g16"], estimator, **settings)
    for name, status, row, before in zip(table.layers, table.status, table.value, alone.value, strict=True):
        assert status == ("ok", "not_offered" if "gptq" in text and "embed" in name else "ok")
        assert row[0] == before[0]
        assert row[0] != row[1]


def test_output_mse_is_what_compensation_makes_small(llama: Model) -> None:
    table = mp.score(llama, llama.calibration, ["int3-g16", "int3-g16-gptq"], "output_mse")
    linear = [i for i, name in enumerate(table.layers) if "embed" not in name]
    assert (table.value[linear, 1] < table.value[linear, 0]).sum() >= len(linear) - 1


def test_weights_that_the_caller_froze_have_gradients_here() -> None:
    module = tiny().module.requires_grad_(False)
    batches = [{"input_ids": part} for part in tokens(4, 12)["input_ids"].split(2)]
    with torch.no_grad():
        frozen = Model(module, tokens=True)
        frozen.calibrate(batches)
        layer = next(x for x in find_layers(frozen, batches) if x.name.endswith("v_proj"))
        importance = Calibration.of(frozen).evidence(layer, Format.parse(FISHER)).importance
    assert importance is not None
    assert importance.any()
    table = mp.score(module, batches, ["int3-g16"], "fisher")
    assert (table.value == mp.score(tiny().module, batches, ["int3-g16"], "fisher").value).all()
    assert not any(parameter.requires_grad for parameter in module.parameters())
