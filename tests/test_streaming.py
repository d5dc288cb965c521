"""Scores of models that are loaded block by block, against the same scores in memory."""

from __future__ import annotations

import json
import types
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
from mpsearch.errors import InputError
from mpsearch.format import parse_formats
from mpsearch.layer import Layers
from mpsearch.model.activation_store import ActivationStore
from mpsearch.model.find import find_layers
from mpsearch.model.model import Model, load_model
from mpsearch.model.pieces import Inject, Runner, Tap
from mpsearch.model.streaming import Stream, refusal
from mpsearch.model.tensor_files import TensorFiles
from mpsearch.tables import SensitivityTable
from tests.tiny_models import tiny

FORMATS = ["int2-channel", "int4-g32"]
STREAMED = [x for x in registry.names("estimators") if getattr(registry.make("estimators", x), "streams", "")]


def data(count: int = 2, sequences: int = 2, length: int = 20) -> list[dict[str, Tensor]]:
    noise = torch.Generator().manual_seed(3)
    return [{"input_ids": torch.randint(0, 61, (sequences, length), generator=noise)} for _ in range(count)]


def save(model: Any, folder: Path, dtype: torch.dtype = torch.bfloat16, **how: Any) -> Path:
    model.to(dtype).save_pretrained(folder, **how)
    return folder


def model_of(architecture: str) -> Any:
    import transformers

    torch.manual_seed(1)
    if architecture == "GPT2":  # transposed linears, tied, two embeddings
        tokens: dict[str, Any] = {"bos_token_id": None, "eos_token_id": None}
        return transformers.GPT2LMHeadModel(
            transformers.GPT2Config(vocab_size=61, n_embd=64, n_layer=2, n_head=4, n_positions=64, **tokens)
        )
    if architecture == "OPT":  # positions from a mask; linears around the blocks
        sizes = {"vocab_size": 61, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "ffn_dim": 64}
        return transformers.OPTForCausalLM(
            transformers.OPTConfig(**sizes, max_position_embeddings=64, word_embed_proj_dim=32)
        )
    settings: dict[str, dict[str, Any]] = {
        "Gemma2": {"sliding_window": 8},  # masks that alternate, capped logits, tied
        "GptOss": {  # stacked experts
            "num_local_experts": 4, "sliding_window": 8,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
        },
    }  # fmt: skip
    return tiny(architecture, **settings.get(architecture, {})).module


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three blocks, in several files."""
    folder = save(tiny(layers=3).module, tmp_path_factory.mktemp("plain"), max_shard_size="40KB")
    assert len(list(folder.glob("*.safetensors"))) > 2
    return folder


@pytest.fixture(scope="module")
def tied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tiny(layers=3, tie_word_embeddings=True).module, tmp_path_factory.mktemp("tied"))


def assert_same(a: SensitivityTable, b: SensitivityTable) -> None:
    assert (a.layers, a.formats, a.status, a.unit, a.samples) == (b.layers, b.formats, b.status, b.unit, b.samples)
    assert a.value.tobytes() == b.value.tobytes()
    assert a.spread.tobytes() == b.spread.tobytes()
    assert np.isfinite(a.value).any()


def both(
    folder: Path, batches: Sequence[Any], formats: Sequence[str], estimator: str, **settings: Any
) -> tuple[SensitivityTable, SensitivityTable]:
    inside, outside = (
        mp.score(folder, batches, formats, estimator, streaming=streaming, **settings) for streaming in (False, True)
    )
    return inside, outside


@pytest.mark.parametrize("estimator", STREAMED)
@pytest.mark.parametrize("which", ["plain", "tied"])
def test_scores_are_those_in_memory(which: str, estimator: str, request: pytest.FixtureRequest) -> None:
    assert_same(*both(request.getfixturevalue(which), data(), FORMATS, estimator))


def test_estimators_that_stream() -> None:
    assert {"weight_mse", "output_mse", "layer_hessian", "block_mse", "fisher", "grad_x_weight"} <= set(STREAMED)
    assert not {"divergence", "hessian_trace", "isolated_loss", "lrp"} & set(STREAMED)


@pytest.mark.parametrize("architecture", ["GPT2", "OPT", "Gemma2", "GptOss"])
def test_other_architectures(architecture: str, tmp_path: Path) -> None:
    folder = save(model_of(architecture), tmp_path / "m")
    batches = data()
    assert Stream(folder).layers(batches) == find_layers(load_model(folder), batches)
    assert Stream(folder).layers() == find_layers(load_model(folder))
    for estimator in ("output_mse", "block_mse", "fisher"):
        assert_same(*both(folder, batches, FORMATS, estimator))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_number_types(dtype: torch.dtype, tmp_path: Path) -> None:
    folder = save(tiny().module, tmp_path / "m", dtype)
    found = Stream(folder).layers(data())
    assert found == find_layers(load_model(folder), data())
    assert {layer.dtype for layer in found} == {str(dtype).removeprefix("torch.")}
    assert_same(*both(folder, data(), FORMATS, "output_mse"))


def test_a_config_that_names_another_number_type_is_obeyed(tmp_path: Path) -> None:
    folder = save(tiny().module, tmp_path / "m", torch.float32)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "dtype": "bfloat16"}))
    assert Stream(folder).layers() == find_layers(load_model(folder))
    assert_same(*both(folder, (), FORMATS, "weight_mse"))


@pytest.mark.parametrize("which", ["plain", "tied"])
def test_layers_are_those_in_memory(which: str, request: pytest.FixtureRequest) -> None:
    folder = request.getfixturevalue(which)
    for batches in (data(), ()):
        assert Stream(folder).layers(batches) == find_layers(load_model(folder), batches)


@pytest.mark.parametrize(
    ("estimator", "settings"),
    [
        ("fisher", {"labels": "data"}),
        ("fisher", {"draws": 3, "seed": 5}),
        ("output_mse", {"relative": False}),
        ("block_mse", {"relative": False}),
        ("layer_hessian", {"saliency": "gptq"}),
        ("nncf", {"criterion": "hessian_input_activation"}),
        ("nncf", {"criterion": "weight_quantization_error"}),
    ],
)
def test_settings(plain: Path, estimator: str, settings: dict[str, Any]) -> None:
    assert_same(*both(plain, data(), FORMATS, estimator, **settings))


def test_draws_of_tied_embeddings(tied: Path) -> None:
    assert_same(*both(tied, data(), FORMATS, "fisher", draws=2))


def test_the_same_sequence_twice(plain: Path) -> None:
    batches = data(1)
    twice = [{"input_ids": batches[0]["input_ids"][[0, 0]]}, *batches, *batches]
    assert_same(*both(plain, twice, FORMATS, "fisher"))
    assert_same(*both(plain, twice, FORMATS, "output_mse"))


def test_masks_of_padding(plain: Path) -> None:
    batches = data()
    for batch in batches:
        batch["attention_mask"] = torch.ones_like(batch["input_ids"])
        batch["attention_mask"][0, :5] = 0
    for streaming in (False, True):
        with pytest.raises(InputError, match=r"E515.*attention_mask holds zeros"):
            mp.score(plain, batches, FORMATS, "output_mse", streaming=streaming)
    # Masks reach the blocks all the same.
    estimator, menu, model = registry.make("estimators", "output_mse"), parse_formats(FORMATS), load_model(plain)
    inside = estimator.score(model, batches, find_layers(model, batches), menu)
    assert_same(inside, Stream(plain).score(estimator, batches, menu))


def test_formats_made_from_calibration_data(plain: Path) -> None:
    assert_same(*both(plain, data(), ["int3-g16-gptq", "int4-channel@int8-tensor-static"], "output_mse"))
    assert_same(*both(plain, data(), ["int4-channel@int8-token"], "block_mse"))


@pytest.mark.parametrize("estimator", ["weight_mse", "output_mse", "fisher"])
@pytest.mark.parametrize("which", ["plain", "tied"])
def test_chosen_layers(which: str, estimator: str, request: pytest.FixtureRequest) -> None:
    folder = request.getfixturevalue(which)
    every = find_layers(load_model(folder), data())
    some = Layers(tuple(x for x in reversed(every.items) if "layers.1" in x.name or x.name.endswith("embed_tokens")))
    assert_same(*both(folder, data(), FORMATS, estimator, layers=some))


def test_weights_are_scored_without_running(plain: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    what = find_layers(load_model(plain), data())
    monkeypatch.setattr(Runner, "_run", lambda *_: pytest.fail("it ran"))
    stream = Stream(plain)
    table = stream.score(registry.make("estimators", "weight_mse"), (), parse_formats(FORMATS), what)
    assert_same(mp.score(plain, (), FORMATS, "weight_mse", layers=what), table)


@pytest.mark.parametrize("estimator", ["output_mse", "fisher"])
def test_hidden_states_in_files(estimator: str, plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stores = []
    monkeypatch.setattr(
        "mpsearch.model.streaming.ActivationStore", lambda *x: stores.append(ActivationStore(*x)) or stores[-1]
    )
    stream = Stream(plain, spill=tmp_path / "spilled", keep_bytes=0)
    table = stream.score(registry.make("estimators", estimator), data(), parse_formats(FORMATS))
    assert_same(mp.score(plain, data(), FORMATS, estimator), table)
    # 80 tokens of 64 channels, of the embedding and three blocks at least.
    assert stores[0].spilled_bytes >= 4 * 80 * 64 * 4
    assert list((tmp_path / "spilled").iterdir()) == []


class Watching:
    """Notes what is in memory while each piece is scored."""

    streams, by, covers, needs = "forward", "batch", ("weights",), ("data",)

    def __init__(self, stream: Stream) -> None:
        self.stream = stream
        self.held: list[int] = []
        self.fails_at = -1

    def refuses(self, model: Model) -> str:
        return ""

    def score(self, model: Model, batches: Any, layers: Any, formats: Any) -> SensitivityTable:
        everything = {id(x): x for x in self.stream.model.module.parameters()}.values()
        self.held.append(sum(4 * x.numel() for x in everything if not x.is_meta))
        if len(self.held) == self.fails_at:
            raise KeyboardInterrupt
        table: SensitivityTable = registry.make("estimators", "weight_mse").score(model, batches, layers, formats)
        return table


def test_one_piece_at_a_time_is_in_memory(plain: Path) -> None:
    stream = Stream(plain)
    watching = Watching(stream)
    seen: list[tuple[int, int]] = []
    stream.score(watching, data(), parse_formats(FORMATS), progress=lambda *x: seen.append(x))
    block = 4 * (64 * (64 + 32 + 32 + 64 + 3 * 48) + 2 * 64)
    assert watching.held == [4 * 61 * 64, block, block, block, 4 * (61 * 64 + 64)]
    assert stream.largest == block
    assert seen == [(i, 5) for i in range(1, 6)]


def test_an_interruption_lets_go_of_everything(plain: Path) -> None:
    stream = Stream(plain)
    watching = Watching(stream)
    watching.fails_at = 3
    with pytest.raises(KeyboardInterrupt):
        stream.score(watching, data(), parse_formats(FORMATS))
    assert all(x.is_meta for x in stream.model.module.parameters())
    assert all("forward" not in x.__dict__ and not x._forward_pre_hooks for x in stream.model.blocks)
    watching.fails_at = -1
    table = stream.score(watching, data(), parse_formats(FORMATS))
    assert_same(mp.score(plain, data(), FORMATS, "weight_mse"), table)


def test_backward_reports_both_ways(plain: Path) -> None:
    seen: list[tuple[int, int]] = []
    fisher = registry.make("estimators", "fisher")
    Stream(plain).score(fisher, data(1), parse_formats(FORMATS), progress=lambda *x: seen.append(x))
    assert seen == [(i, 10) for i in range(1, 11)]


@pytest.mark.parametrize(
    ("estimator", "settings", "formats", "reason"),
    [
        ("divergence", {}, FORMATS, "whole model"),
        ("hessian_trace", {}, FORMATS, "whole model"),
        ("grad_x_weight", {"at": "quantized"}, FORMATS, "whole model"),
        ("output_mse", {}, ["codebook4-channel-fisher"], "gradients of the whole model"),
        ("fisher", {}, ["int4-g16-gptq"], "more than gradients"),
    ],
)
def test_what_needs_the_whole_model_is_refused(
    plain: Path, estimator: str, settings: dict[str, Any], formats: list[str], reason: str
) -> None:
    with pytest.raises(InputError, match=reason) as error:
        mp.score(plain, data(), formats, estimator, streaming=True, **settings)
    assert error.value.code == "E506"


def test_caches_are_refused() -> None:
    estimator = types.SimpleNamespace(streams="forward", covers=("caches",))
    assert "cache" in refusal(estimator, parse_formats(["kv-int8-token"]))


def test_bad_calls(plain: Path, tmp_path: Path) -> None:
    def code(*args: Any, **settings: Any) -> str:
        with pytest.raises(InputError) as error:
            mp.score(*args, streaming=True, **settings)
        return error.value.code

    assert code(tiny(), data(), FORMATS, "output_mse") == "E409"
    assert code(plain, (), FORMATS, "output_mse") == "E501"
    assert code(tmp_path / "nowhere", data(), FORMATS, "output_mse") == "E101"
    every = find_layers(load_model(plain))
    other = Layers((replace(every[0], name="model.other"),))
    assert code(plain, data(), FORMATS, "output_mse", layers=other) == "E120"
    across = find_layers(load_model(plain), ties=[["*.o_proj"]])
    assert code(plain, data(), FORMATS, "output_mse", layers=across) == "E506"


def test_checkpoints_that_are_rearranged_are_refused(tmp_path: Path) -> None:
    folder = save(tiny("Mixtral", num_local_experts=4).module, tmp_path / "m")
    with pytest.raises(InputError, match="lacks the tensor") as error:
        Stream(folder)
    assert error.value.code == "E408"


def test_one_block_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no list of blocks"):
        Stream(save(tiny(layers=1).module, tmp_path / "m"))


def test_weights_that_are_not_finite_are_named(tmp_path: Path) -> None:
    model = tiny().module
    model.model.layers[1].mlp.up_proj.weight.data[2, 3] = torch.nan
    with pytest.raises(InputError, match=r"model\.layers\.1\.mlp\.up_proj\.weight") as error:
        Stream(save(model, tmp_path / "m")).layers()
    assert error.value.code == "E412"


def test_a_checkpoint_may_leave_out_the_name_of_the_inner_model(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = save(model_of("GPT2"), tmp_path / "m")
    file = folder / "model.safetensors"
    tensors = {name.removeprefix("transformer."): x for name, x in load_file(file).items()}
    save_file(tensors, file, metadata={"format": "pt"})
    assert_same(*both(folder, data(), FORMATS, "output_mse"))


def test_tied_weights_that_differ_are_refused(tied: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(tied / "model.safetensors")
    for name, shift in (("same", 0.0), ("other", 1.0)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text((tied / "config.json").read_text())
        head = {"lm_head.weight": tensors["model.embed_tokens.weight"] + shift}
        save_file({**tensors, **head}, tmp_path / name / "model.safetensors", metadata={"format": "pt"})
    assert Stream(tmp_path / "same").layers() == find_layers(load_model(tied))
    with pytest.raises(InputError, match="differ, and the config ties them"):
        Stream(tmp_path / "other")


def test_tensors_are_read_as_they_are_stored(plain: Path) -> None:
    files = TensorFiles(plain)
    reference = load_model(plain).module.state_dict()
    assert set(files.names()) == set(reference)
    for name in files.names():
        assert files.dtype(name) == torch.bfloat16
        assert torch.equal(files.read(name).float(), reference[name])


class Adding(nn.Module):
    def __init__(self, take: int | None = None) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2))
        self.take = take

    def forward(self, x: Tensor, earlier: Tensor | None = None) -> Tensor:
        return x * self.weight if earlier is None else x + earlier


class Chain(nn.Module):
    """Blocks, of which one may read what an earlier one gave, or all run twice."""

    def __init__(self, *blocks: nn.Module, times: int = 1) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.times = times

    def forward(self, x: Tensor, use_cache: bool = False) -> Any:
        outputs: list[Tensor] = []
        for block in list(self.blocks) * self.times:
            x = block(x) if block.take is None else block(x, outputs[block.take])
            outputs.append(x)
        return types.SimpleNamespace(logits=2.0 * x)


def run_all(chain: Chain) -> Tensor:
    batch = {"x": torch.tensor([[1.0, 3.0]])}
    runner = Runner(chain, list(chain.blocks), ActivationStore())
    runner.remembering = True
    with torch.no_grad():
        runner.start(batch)
        for number in range(len(chain.blocks)):
            runner.block(number, batch)
        return runner.end(batch)


def test_blocks_that_read_more_than_the_last_output_are_found_out() -> None:
    assert run_all(Chain(Adding(), Adding(), Adding())).tolist() == [[2.0, 6.0]]
    with pytest.raises(InputError, match="more than the output of the block before"):
        run_all(Chain(Adding(), Adding(), Adding(take=0)))
    with pytest.raises(InputError, match="once each, in order"):
        run_all(Chain(Adding(), Adding(), times=2))


def test_tap_and_inject_hand_gradients_on() -> None:
    seen: list[Tensor] = []
    weight = torch.tensor([2.0, 5.0], requires_grad=True)
    x = Tap.apply(torch.tensor([3.0, 4.0]), seen.append, weight)
    given = torch.tensor([10.0, 20.0])
    output = Inject.apply(x * weight, torch.tensor(7.0), lambda: given)
    assert output.item() == 7.0
    (gradient,) = torch.autograd.grad(output * 100, [weight])
    assert gradient.tolist() == [30.0, 80.0]  # the gradient that was sent, times x
    assert [g.tolist() for g in seen] == [[20.0, 100.0]]  # and times the weight


def test_store_keeps_values_and_lets_go(tmp_path: Path) -> None:
    store = ActivationStore(tmp_path, keep_bytes=16)
    value = torch.arange(4.0)
    store["a", 1] = (value, None, 3)
    store["b", 1] = [value + 1]
    value.zero_()
    assert store["a", 1][0].tolist() == [0.0, 1.0, 2.0, 3.0]
    assert store["a", 1][1:] == (None, 3)
    assert store["b", 1][0].tolist() == [1.0, 2.0, 3.0, 4.0]
    assert store.spilled_bytes == 16
    assert len(list(tmp_path.rglob("*"))) == 2
    store.drop_all("b")
    assert ("b", 1) not in store
    assert len(list(tmp_path.rglob("*"))) == 1
    store.drop_all("a")
    store["c"] = torch.zeros(4)  # there is room again
    assert store.spilled_bytes == 16
    store.close()
    assert list(tmp_path.iterdir()) == []
