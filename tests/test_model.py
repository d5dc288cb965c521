"""Loading, finding layers, swapping weights, replaying."""

from __future__ import annotations

import json
import shutil
import struct
from pathlib import Path

import pytest
import torch
from torch import nn

import mpsearch as mp
from mpsearch.format import Format
from mpsearch.model.apply import applied
from mpsearch.model.checkpoint import folder_digest
from mpsearch.model.corpus import library_files
from mpsearch.model.data import Batches, load_batches, load_tokenizer
from mpsearch.model.find import find_layers
from mpsearch.model.model import Model, load_model
from mpsearch.model.reference import Reference
from mpsearch.model.replay import Replay
from mpsearch.model.source import Source, read_texts
from mpsearch.sensitivity.divergence import Divergence
from tests.conftest import make_llama


def state_of(model: Model) -> dict[str, tuple[int, torch.Tensor]]:
    return {name: (value.data_ptr(), value.clone()) for name, value in model.module.state_dict().items()}


def assert_untouched(model: Model, before: dict[str, tuple[int, torch.Tensor]]) -> None:
    for name, value in model.module.state_dict().items():
        assert value.data_ptr() == before[name][0], name
        assert torch.equal(value, before[name][1]), name


def batches_of(model: Model, count: int = 3) -> Batches:
    generator = torch.Generator().manual_seed(1)
    return Batches.of(torch.randint(0, model.vocabulary, (2 * count, 16), generator=generator), 2)


class TestLayers:
    def test_tied_and_fused_layers_are_one_decision(self, small_llama: Path) -> None:
        found = mp.layers(small_llama)
        names = [decision.name for decision in found.decisions]
        assert names[:5] == [
            "model.embed_tokens",
            "model.layers.0.self_attn.{q,k,v}_proj",
            "model.layers.0.self_attn.o_proj",
            "model.layers.0.mlp.{gate,up}_proj",
            "model.layers.0.mlp.down_proj",
        ]
        assert found[0].shared == ("lm_head",)
        assert found[0].macs == 4096 * 64
        assert {layer.dtype for layer in found} == {"bfloat16"}

    def test_everything_stored_is_counted_once(self, small_llama: Path) -> None:
        found = mp.layers(small_llama)
        module = load_model(small_llama).module
        assert found.weights == sum(p.numel() for p in module.parameters())
        assert {kept.reason for kept in found.excluded} == {"1-D norm or bias vector"}

    def test_an_untied_head_is_a_layer_of_its_own(self, tmp_path: Path) -> None:
        found = mp.layers(make_llama(tmp_path / "untied", tie=False))
        assert [x.name for x in found][-1] == "lm_head"
        assert found[0].macs == 0

    def test_ties_can_be_given_or_left_out(self, small_llama: Path) -> None:
        model = load_model(small_llama)
        assert len(find_layers(model, ties="none").decisions) == len(find_layers(model))
        given = find_layers(model, ties=[["*.o_proj"], ["*.0.mlp.up_proj", "*.0.mlp.down_proj"]])
        assert len(given.decisions) == len(given) - 2
        with pytest.raises(mp.InputError, match="E121"):
            find_layers(model, ties=[["*.o_proj"], ["*.0.self_attn.*"]])
        with pytest.raises(mp.InputError, match="E120"):
            find_layers(model, ties=[["*.mpl.*"]])

    def test_multiply_adds_are_those_of_the_forward_pass(self) -> None:
        module = nn.Sequential(nn.Conv2d(4, 8, 3, padding=1, groups=2), nn.Flatten(), nn.Linear(8 * 25, 6))
        found = mp.layers(mp.wrap(module, logits=lambda m, x: m(x)), torch.zeros(3, 4, 5, 5))
        assert found.unit == "sample"
        assert [layer.macs for layer in found] == [8 * 25 * 2 * 9, 8 * 25 * 6]

    def test_a_shared_module_counts_every_call(self) -> None:
        class Twice(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.inner = nn.Linear(4, 4)

            def forward(self, x: torch.Tensor) -> torch.Tensor:
                return self.inner(self.inner(x))

        found = mp.layers(mp.wrap(Twice(), logits=lambda m, x: m(x)), torch.zeros(1, 4))
        assert [(layer.name, layer.macs) for layer in found] == [("inner", 32)]

    def test_what_is_never_called_is_left_out_with_the_reason(self) -> None:
        module = nn.ModuleDict({"used": nn.Linear(4, 3), "unused": nn.Linear(4, 3)})
        found = mp.layers(mp.wrap(module, logits=lambda m, x: m["used"](x)), torch.zeros(1, 4))
        assert [layer.name for layer in found] == ["used"]
        assert "never called by the data" in {kept.reason for kept in found.excluded}

    def test_a_model_without_layers_says_what_it_has(self) -> None:
        with pytest.raises(mp.InputError) as found:
            mp.layers(nn.LayerNorm(4))
        assert found.value.code == "E418"
        assert "LayerNorm" in found.value.because


class TestSwapping:
    def test_weights_come_back_bit_for_bit_even_after_an_error(self, small_llama: Path) -> None:
        model = load_model(small_llama)
        before = state_of(model)
        formats = {layer: Format.parse("int2-g64") for layer in find_layers(model)}

        def fail() -> None:
            with applied(model, formats):
                assert not torch.equal(model.weight("model.embed_tokens"), before["model.embed_tokens.weight"][1])
                assert model.weight("lm_head") is model.weight("model.embed_tokens")
                raise RuntimeError("stop")

        with pytest.raises(RuntimeError, match="stop"):
            fail()
        assert_untouched(model, before)

    def test_measuring_leaves_the_model_alone(self, small_llama: Path) -> None:
        model = load_model(small_llama)
        before = state_of(model)
        batches = batches_of(model)
        plan = {layer.name: "int3-g64" for layer in find_layers(model)}
        first = mp.measure(model, plan, batches)
        assert_untouched(model, before)
        again = mp.measure(model, plan, batches)
        assert (first.loss, first.spread) == (again.loss, again.spread)
        assert first.loss > 0
        assert first.metrics["cross_entropy"].value > 0

    def test_the_original_has_no_divergence_from_itself(self, small_llama: Path) -> None:
        model = load_model(small_llama)
        plan = {layer.name: "bf16" for layer in find_layers(model)}
        assert mp.measure(model, plan, batches_of(model)).loss == pytest.approx(0.0, abs=1e-7)


class TestReplay:
    @pytest.mark.parametrize("tie", [True, False])
    def test_replayed_scores_are_the_same_bits(self, tmp_path: Path, tie: bool) -> None:
        model = load_model(make_llama(tmp_path / "model", tie=tie, layers=3))
        batches = batches_of(model)
        layers, formats = find_layers(model), [Format.parse("int3-g64"), Format.parse("int8-channel")]
        full = Divergence(reuse=False).score(model, batches, layers, formats)
        replayed = Divergence().score(model, batches, layers, formats)
        assert replayed.value.tobytes() == full.value.tobytes()
        assert replayed.spread.tobytes() == full.spread.tobytes()
        assert (full.value > 0).all()
        replay = Replay.of(model, batches)
        for layer in layers:
            replay.prepare([layer])
            assert replay.exact

    def test_fewer_modules_run(self, small_llama: Path) -> None:
        model = load_model(small_llama)
        batches = batches_of(model, 1)
        layers = {layer.name: layer for layer in find_layers(model)}
        calls: list[str] = []
        for name, module in model.module.named_modules():
            if isinstance(module, nn.Linear):
                module.register_forward_hook(lambda m, a, o, n=name: calls.append(n))
        replay = Replay.of(model, batches)
        replay.prepare([layers["model.layers.1.mlp.down_proj"]])
        calls.clear()
        original = module_forward = type(model.module.get_submodule("model.layers.0.mlp.up_proj")).forward
        replay.logits(0)
        assert module_forward is original
        assert not any("layers.0" in name for name in calls)
        assert "model.layers.1.mlp.down_proj" in calls
        assert "lm_head" in calls

    def test_a_model_with_state_between_blocks_runs_in_full(self) -> None:
        class Leaky(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.blocks = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))

            def forward(self, x: torch.Tensor) -> torch.Tensor:
                first = x
                for block in self.blocks:
                    x, first = block(x), x
                return x + self.blocks[0].weight.sum() + first

        torch.manual_seed(0)
        model = mp.wrap(Leaky(), logits=lambda m, x: m(x))
        batches = [torch.randn(2, 4)]
        full = mp.score(model, batches, ["int2-channel"], "divergence", reuse=False)
        assert mp.score(model, batches, ["int2-channel"], "divergence").value.tobytes() == full.value.tobytes()

    def test_what_does_not_fit_in_memory_is_computed_again(self, small_llama: Path) -> None:
        model = load_model(small_llama)
        batches = batches_of(model)
        small, large = Reference(model, batches, keep_bytes=1), Reference(model, batches)
        assert large.complete
        assert not small.complete
        for i in range(len(batches)):
            assert torch.equal(small.log_probabilities(i), large.log_probabilities(i))


class TestBadModels:
    def test_a_missing_folder_offers_the_closest(self, small_llama: Path) -> None:
        with pytest.raises(mp.InputError) as found:
            load_model(small_llama.parent / "smal-llama")
        assert found.value.code == "E101"
        assert "small-llama" in found.value.message

    @pytest.mark.parametrize(
        ("content", "code"),
        [
            (b"version https://git-lfs.github.com/spec/v1\noid sha256:ab\nsize 9\n", "E402"),
            (b"<!DOCTYPE html><html></html>", "E403"),
            (b"\x00" * 3, "E404"),
            (struct.pack("<Q", 2**60) + b"{}", "E405"),
            (struct.pack("<Q", 500) + b"{}", "E404"),
            (struct.pack("<Q", 2) + b"[]", "E405"),
        ],
        ids=["lfs", "html", "empty", "absurd", "cut header", "no object"],
    )
    def test_files_that_are_no_weights(self, small_llama: Path, tmp_path: Path, content: bytes, code: str) -> None:
        folder = shutil.copytree(small_llama, tmp_path / "m")
        (folder / "model.safetensors").write_bytes(content)
        with pytest.raises(mp.InputError) as found:
            load_model(folder)
        assert found.value.code == code

    def test_cut_weights(self, small_llama: Path, tmp_path: Path) -> None:
        folder = shutil.copytree(small_llama, tmp_path / "m")
        file = folder / "model.safetensors"
        file.write_bytes(file.read_bytes()[:-100])
        with pytest.raises(mp.InputError, match="E404"):
            load_model(folder)

    def test_a_checkpoint_without_a_head_is_refused(self, tmp_path: Path) -> None:
        from safetensors.torch import load_file, save_file

        folder = tmp_path / "headless"
        shutil.copytree(make_llama(tmp_path / "untied", tie=False), folder)
        tensors = load_file(folder / "model.safetensors")
        del tensors["lm_head.weight"]
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(mp.InputError, match=r"lacks 1 tensors .*lm_head\.weight"):
            load_model(folder)

    def test_overlapping_tensors(self, small_llama: Path, tmp_path: Path) -> None:
        folder = shutil.copytree(small_llama, tmp_path / "m")
        header = json.dumps(
            {n: {"dtype": "F32", "shape": [2], "data_offsets": [o, o + 8]} for n, o in (("a", 0), ("b", 4))}
        )
        (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header.encode() + bytes(12))
        with pytest.raises(mp.InputError, match="overlap"):
            load_model(folder)

    def test_pickles_are_not_opened(self, small_llama: Path, tmp_path: Path) -> None:
        folder = shutil.copytree(small_llama, tmp_path / "m")
        (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
        with pytest.raises(mp.UnsafeError) as found:
            load_model(folder)
        assert found.value.code == "E801"
        assert found.value.exit_code == 8

    @pytest.mark.parametrize("where", [(), ("text_config",)])
    def test_foreign_code_is_not_run(self, small_llama: Path, tmp_path: Path, where: tuple[str, ...]) -> None:
        folder = shutil.copytree(small_llama, tmp_path / "m")
        config = json.loads((folder / "config.json").read_text())
        inner = config
        for name in where:
            inner = inner.setdefault(name, {})
        inner["auto_map"] = {"AutoModel": "modeling.Evil"}
        (folder / "config.json").write_text(json.dumps(config))
        with pytest.raises(mp.UnsafeError, match="E802"):
            load_model(folder)

    def test_weights_that_are_not_finite_are_named_with_their_place(self, small_llama: Path) -> None:
        module = load_model(small_llama).module
        module.model.layers[1].mlp.up_proj.weight.data[3, 5] = float("nan")
        with pytest.raises(mp.InputError) as found:
            Model(module)
        assert found.value.code == "E412"
        assert "model.layers.1.mlp.up_proj.weight" in found.value.message
        assert "[3, 5]" in found.value.message

    def test_meta_weights(self) -> None:
        with pytest.raises(mp.InputError, match="E410"):
            mp.wrap(nn.Linear(4, 4, device="meta"))

    def test_integer_weights(self) -> None:
        module = nn.Linear(4, 4)
        module.weight = nn.Parameter(torch.zeros(4, 4, dtype=torch.int8), requires_grad=False)
        with pytest.raises(mp.InputError, match="E411"):
            mp.wrap(module)

    def test_activations_that_are_not_finite_name_the_first_module(self, small_llama: Path) -> None:
        model = load_model(small_llama)
        model.weight("model.layers.1.mlp.gate_proj").data.mul_(1e30)
        model.weight("model.layers.1.mlp.up_proj").data.mul_(1e30)
        with pytest.raises(mp.InputError) as found:
            Reference(model, batches_of(model))
        assert found.value.code == "E510"
        assert "model.layers.1.mlp" in found.value.message

    def test_a_changed_file_is_another_model(self, small_llama: Path, tmp_path: Path) -> None:
        folder = shutil.copytree(small_llama, tmp_path / "m")
        before = folder_digest(folder)
        assert before == folder_digest(small_llama)
        file = folder / "model.safetensors"
        content = bytearray(file.read_bytes())
        content[-1] ^= 1
        file.write_bytes(content)
        assert folder_digest(folder) != before


class TestText:
    def test_splits_never_share_a_file(self) -> None:
        calibration = {path for path, _ in library_files("calibration")}
        validation = {path for path, _ in library_files("validation")}
        train = {path for path, _ in library_files("train")}
        assert len(calibration) > 20
        assert len(validation) > 20
        assert not calibration & validation
        assert not (calibration | validation) & train

    def test_parts_of_one_text_never_overlap(self, tmp_path: Path) -> None:
        file = tmp_path / "text.txt"
        file.write_text("\n".join(f"line {i}" for i in range(100)))
        first, last = (read_texts(Source(str(file), part=part)) for part in ("first", "last"))
        assert "line 10\n" in first[0]
        assert "line 90" in last[0]
        assert not set(first[0].splitlines()) & set(last[0].split("\n")[1:])

    def test_blocks_do_not_overlap_and_sample_all_of_the_text(self, small_llama: Path, tmp_path: Path) -> None:
        tokenizer = load_tokenizer(small_llama)
        file = tmp_path / "text.txt"
        file.write_text(" ".join(str(i) for i in range(5000)))
        found = load_batches(Source(str(file)), tokenizer, length=16, tokens=160, batch_size=4)
        assert [tuple(b["input_ids"].shape) for b in found] == [(4, 16), (4, 16)]
        assert found.tokens == 128
        text = [tokenizer.decode(row) for b in found for row in b["input_ids"]]
        assert len(set(text)) == 8
        assert text[0].startswith("0 1 2")
        assert "44" in text[-1]

    @pytest.mark.parametrize(
        ("name", "content", "code", "words"),
        [
            ("a.txt", "", "E501", "no text"),
            ("a.jsonl", "\n\n", "E501", "0 usable rows"),
            ("a.jsonl", '{"text": " "}\n', "E501", "0 usable rows"),
            ("a.jsonl", '{"prompt": "x"}\n', "E502", "prompt"),
            ("a.jsonl", "{nonsense\n", "E502", ":1 is not JSON"),
            ("a.txt", "two words", "E504", "one block needs 64"),
        ],
    )
    def test_bad_text(self, small_llama: Path, tmp_path: Path, name: str, content: str, code: str, words: str) -> None:
        (tmp_path / name).write_text(content)
        with pytest.raises(mp.InputError) as found:
            load_batches(Source(str(tmp_path / name)), load_tokenizer(small_llama), length=64, tokens=640, batch_size=2)
        assert found.value.code == code
        assert words in str(found.value)

    def test_a_short_text_is_used_and_said_to_be_short(self, small_llama: Path, tmp_path: Path) -> None:
        (tmp_path / "a.txt").write_text("some words of text " * 40)
        found = load_batches(
            Source(str(tmp_path / "a.txt")), load_tokenizer(small_llama), length=16, tokens=10**6, batch_size=2
        )
        assert [notice.code for notice in found.notices] == ["W504"]

    def test_a_tokenizer_of_another_model(self, small_llama: Path, tmp_path: Path) -> None:
        (tmp_path / "a.txt").write_text("some words of text " * 40)
        with pytest.raises(mp.InputError, match="E503"):
            load_batches(
                Source(str(tmp_path / "a.txt")),
                load_tokenizer(small_llama),
                length=16,
                tokens=64,
                batch_size=2,
                vocabulary=50,
            )


def test_what_is_stored_but_not_trained_is_counted(tmp_path: Path) -> None:
    from mpsearch import registry
    from mpsearch.exports.native import payload_bytes
    from mpsearch.plan import BitPlan

    module = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8))
    model = mp.wrap(module, logits=lambda m, x: m(x).flatten(1))
    layers = mp.layers(model, torch.zeros(1, 3, 5, 5))
    buffers = {kept.name: kept.stored_bytes for kept in layers.excluded if kept.reason == "buffer"}
    assert buffers == {"1.running_mean": 32, "1.running_var": 32, "1.num_batches_tracked": 8}
    plan = BitPlan(layers, {"0": Format.parse("int4-channel")}, {"digest": model.digest})
    registry.make("exporters", "native").write(plan, tmp_path / "out", model)
    assert payload_bytes(tmp_path / "out" / "weights.safetensors") == plan.bytes


class InPlace(nn.Module):
    """Blocks whose activation works in place on what a linear gave."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(8, 8), nn.SiLU(inplace=True), nn.Linear(8, 8)) for _ in range(4)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = x + block(x)
        return x


class TwoBlockHead(nn.Module):
    """A head that reads the last two blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(8, 8) for _ in range(4))
        self.head = nn.Linear(16, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        outputs = []
        for block in self.blocks:
            x = torch.tanh(block(x))
            outputs.append(x)
        return self.head(torch.cat(outputs[-2:], dim=-1))


@pytest.mark.parametrize("kind", [InPlace, TwoBlockHead])
def test_replay_is_exact_for_models_that_are_not_plain_chains(kind: type[nn.Module]) -> None:
    torch.manual_seed(0)
    model = mp.wrap(kind(), logits=lambda m, x: m(x))
    batches = [torch.randn(4, 8), torch.randn(4, 8)]
    formats = ["int2-channel", "int4-channel"]
    full = mp.score(model, batches, formats, "divergence", reuse=False)
    assert mp.score(model, batches, formats, "divergence").value.tobytes() == full.value.tobytes()


def test_two_parameters_over_one_storage_are_one_layer() -> None:
    module = nn.Sequential(nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False)).to(torch.bfloat16)
    module[1].weight = nn.Parameter(module[0].weight.data)
    found = mp.layers(module)
    assert [(layer.name, layer.shared) for layer in found] == [("0", ("1",))]
    assert found.weights == 64


def test_the_callers_module_is_left_as_it_was() -> None:
    module = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8), nn.Dropout()).to(torch.bfloat16).train()
    first = mp.layers(module)
    assert mp.layers(module).key == first.key
    assert module.training
    assert {parameter.dtype for parameter in module.parameters()} == {torch.bfloat16}


def test_changed_weights_are_scored_anew() -> None:
    model = mp.wrap(nn.Sequential(nn.Linear(8, 4)), logits=lambda m, x: m(x))
    before = mp.score(model, [], ["int4-channel"], "weight_mse").value[0, 0]
    digest = model.digest
    model.module[0].weight.data.mul_(10)
    assert mp.score(model, [], ["int4-channel"], "weight_mse").value[0, 0] == pytest.approx(100 * before, rel=1e-2)
    assert model.digest != digest


def test_digests_see_all_of_a_value() -> None:
    import numpy as np

    from mpsearch.model.digest import digest_of, function_digest

    values = [
        torch.zeros(2, 3), torch.zeros(3, 2), torch.zeros(2, 3, dtype=torch.bfloat16), np.zeros(3), np.ones(3),
        (torch.zeros(1), 1), (torch.zeros(1), 7), [torch.zeros(1), 1], {"a": 1}, {"b": 1}, None, "1", 1, 1.0, True,
    ]  # fmt: skip
    assert len({digest_of(value) for value in values}) == len(values)
    with pytest.raises(mp.InputError, match="E509"):
        digest_of([object()])
    scale = 2.0
    functions = [lambda m, x: m(x), lambda m, x: 10 * m(x), lambda m, x: m(x) * scale, lambda m, x: m.forward(x)]
    assert len({function_digest(f) for f in functions}) == 4


def test_experts_that_only_later_batches_reach_are_layers() -> None:
    class Routed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.experts = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.experts[int(x[0, 0])](x)

    model = mp.wrap(Routed(), logits=lambda m, x: m(x))
    found = find_layers(model, [torch.zeros(1, 4), torch.ones(1, 4)])
    assert [layer.name for layer in found] == ["experts.0", "experts.1"]
    assert [kept.reason for kept in found.excluded if kept.name == "experts.2.weight"] == ["never called by the data"]
