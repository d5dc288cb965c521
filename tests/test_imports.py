"""Plans of other tools: read by their own rules of precedence, refused by layer where nothing here corresponds."""

from __future__ import annotations

import dataclasses
import json
import struct
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mpsearch import registry
from mpsearch.api import measure
from mpsearch.errors import InputError, MpsearchError
from mpsearch.exports.compressed_tensors import CompressedTensors
from mpsearch.exports.ct_config import quantization_config
from mpsearch.exports.llama_cpp import LlamaCpp
from mpsearch.format import Format
from mpsearch.imports.foreign import Foreign, Options, gather
from mpsearch.imports.patterns import Patterns
from mpsearch.imports.plans import FORMS, assemble, import_plan, reader
from mpsearch.layer import Excluded, Layer, Layers
from mpsearch.model.find import find_layers
from mpsearch.model.model import Model, load_model
from mpsearch.plan import BitPlan
from tests.reference_libraries import quiet_import
from tests.test_export_compressed_tensors import TOKENS, make, planned

torch.set_num_threads(1)

SIZES = {
    "self_attn.q_proj": (256, 256), "self_attn.k_proj": (128, 256), "self_attn.v_proj": (128, 256),
    "self_attn.o_proj": (256, 256), "mlp.gate_proj": (512, 256), "mlp.up_proj": (512, 256), "mlp.down_proj": (256, 512),
}  # fmt: skip
#: A model of two blocks; layer 10 is there for patterns that mean layer 1.
LAYERS = Layers(
    (
        Layer("model.embed_tokens", "embedding", (64, 256), dtype="bfloat16"),
        *(
            Layer(f"model.layers.{i}.{name}", "linear", shape, dtype="bfloat16")
            for i in (0, 1, 10)
            for name, shape in SIZES.items()
        ),
        Layer("lm_head", "linear", (64, 256), dtype="bfloat16"),
    ),
    (Excluded("model.norm.weight", (256,), "bfloat16", "1-D"),),
)
TIED = Layers(
    (dataclasses.replace(LAYERS[0], shared=("lm_head",)), *LAYERS[1:-1]),
    LAYERS.excluded,
)
LLAMA = Options(architecture="LlamaForCausalLM")


def read(form: str, content: Any, folder: Path, options: Options = LLAMA, layers: Layers = LAYERS) -> Foreign:
    """Write a file of a form and read it."""
    path = folder / "file"
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return reader(form)(path, layers, options)


def short(foreign: Foreign) -> dict[str, str]:
    """Formats by the end of a name that all blocks share, with those of odd blocks under their whole name."""
    found: dict[str, str] = {}
    for name, text in foreign.formats.items():
        end = name.partition("layers.0.")[2] or name
        found[end] = text
    same = {
        f"model.layers.{i}.{end}" for i in (1, 10) for end in SIZES if found[f"model.layers.{i}.{end}"] == found[end]
    }
    return {name: text for name, text in found.items() if name not in same}


def spread(text: str, **other: str) -> dict[str, str]:
    """One format for all linear layers of the blocks, bf16 around them, and what differs."""
    return {"model.embed_tokens": "bf16", "lm_head": "bf16"} | dict.fromkeys(SIZES, text) | other


AUTOROUND = {"quant_method": "auto-round", "bits": 4, "group_size": 64, "sym": True, "data_type": "int"}
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 64, "sym": True}


class TestAutoRound:
    def test_the_common_scheme_is_for_the_blocks(self, tmp_path: Path) -> None:
        found = read("autoround", AUTOROUND, tmp_path)
        assert short(found) == spread("int4-g64")
        assert found.problems == []

    def test_exact_names_beat_patterns_and_the_first_pattern_wins(self, tmp_path: Path) -> None:
        extra = {
            ".*down_proj": {"bits": 8, "group_size": -1},
            ".*(down|up)_proj": {"bits": 2},
            "model.layers.0.mlp.down_proj": {"bits": 3},
            "lm_head": {"bits": 8, "group_size": 32},
            "model.layers.10.self_attn.q_proj": {"bits": 16},
        }
        found = read("autoround", {"quantization_config": {**AUTOROUND, "extra_config": extra}}, tmp_path)
        down = {f"model.layers.{i}.mlp.down_proj": "int8-channel" for i in (1, 10)}
        assert short(found) == spread("int4-g64") | down | {
            "mlp.down_proj": "int3-g64", "mlp.up_proj": "int2-g64", "lm_head": "int8-g32",
            "model.layers.10.self_attn.q_proj": "bf16",
        }  # fmt: skip

    def test_blocks_and_unsymmetric_codes(self, tmp_path: Path) -> None:
        config = {**AUTOROUND, "sym": False, "block_name_to_quantize": "model.layers.10"}
        found = read("autoround", config, tmp_path)
        quantised = {name for name, text in found.formats.items() if text != "bf16"}
        assert quantised == {f"model.layers.10.{name}" for name in SIZES}
        assert set(found.formats.values()) == {"bf16", "int4-g64-asym"}

    @pytest.mark.parametrize(
        ("scheme", "text"),
        [
            ({"bits": 8, "group_size": -1, "act_bits": 8, "act_group_size": -1}, "int8-channel@int8-token"),
            ({"data_type": "mx_fp", "group_size": 32, "act_bits": 4, "act_group_size": 32}, "mxfp4@mxfp4"),
            ({"data_type": "mx_fp", "bits": 8, "group_size": 32, "act_bits": 16}, "mxfp8-e4m3"),
            ({"data_type": "nv_fp", "group_size": 16}, "nvfp4"),
            ({"data_type": "fp", "bits": 8, "group_size": [128, 128]}, "fp8-e4m3-b128x128"),
            (
                {"data_type": "fp", "bits": 8, "group_size": -1, "act_bits": 8, "act_group_size": 0,
                 "act_dynamic": False},
                "fp8-e4m3-channel@fp8-e4m3-tensor-static",
            ),
        ],
    )  # fmt: skip
    def test_schemes(self, scheme: Mapping[str, Any], text: str, tmp_path: Path) -> None:
        assert short(read("autoround", {**AUTOROUND, **scheme}, tmp_path)) == spread(text)

    def test_what_has_no_counterpart_names_every_layer(self, tmp_path: Path) -> None:
        extra = {"model.layers.0.mlp.up_proj": {"bits": 9}, "lm_head": {"group_size": 96}}
        found = read("autoround", {**AUTOROUND, "extra_config": extra}, tmp_path)
        assert [line.partition(":")[0] for line in found.problems] == list(extra)
        static = {**AUTOROUND, "act_bits": 4, "act_data_type": "nv_fp4_with_static_gs", "act_group_size": 16}
        assert len(read("autoround", static, tmp_path).problems) == 21
        without = Options(without=frozenset({"inputs"}))
        assert short(read("autoround", static, tmp_path, without)) == spread("int4-g64")

    def test_a_layer_config_names_layers_exactly(self, tmp_path: Path) -> None:
        config = {f"model.layers.{i}.{name}": {"bits": 4, "group_size": 64} for i in (0, 1) for name in SIZES}
        config["lm_head"] = {"bits": 16, "data_type": "float"}
        found = read("autoround", config, tmp_path)
        assert [line.partition(":")[0] for line in found.problems] == [f"model.layers.10.{name}" for name in SIZES]
        rest = dataclasses.replace(LLAMA, rest="int8-g64")
        block10 = {f"model.layers.10.{name}": "int8-g64" for name in SIZES}
        assert short(read("autoround", config, tmp_path, rest)) == spread("int4-g64") | block10
        with pytest.raises(InputError, match="'q_proj' is no layer of the model, and a pattern to AutoRound"):
            read("autoround", {**config, "q_proj": {"bits": 2}}, tmp_path)


class TestGptqModel:
    def test_leaving_rules_come_first_then_the_first_that_fits(self, tmp_path: Path) -> None:
        dynamic = {
            r"+:.*\.down_proj$": {"bits": 8, "group_size": -1},
            r".*\.(down|up)_proj": {"bits": 2},
            r"-:model\.layers\.1\.": {},
            r"layers": {"bits": 3},
            r"+:gone": {"bits": 3},
        }
        found = read("gptqmodel", {**GPTQ, "dynamic": dynamic}, tmp_path)
        left = {f"model.layers.1.{name}": "bf16" for name in SIZES}
        expected = spread("int4-g64") | left | {"mlp.down_proj": "int8-channel", "mlp.up_proj": "int2-g64"}
        assert short(found) == expected
        # It is matched at the beginning of a name: 'layers' fits none.
        assert found.notes[-1] == "no layer is left for 2 rules: 'layers', 'gone'"

    def test_rules_for_fused_names_are_no_strangers(self, tmp_path: Path) -> None:
        dynamic = {r"+:^model\.layers\.0\.self_attn\.qkv_proj$": {"bits": 8}, "+:.*mlp.gate_up_proj": {"bits": 8}}
        found = read("gptqmodel", {**GPTQ, "dynamic": dynamic}, tmp_path)
        assert len(found.notes) == 1
        assert short(found) == spread("int4-g64")

    def test_the_head(self, tmp_path: Path) -> None:
        assert short(read("gptqmodel", {**GPTQ, "lm_head": True}, tmp_path))["lm_head"] == "int8-g32"
        dynamic = {"+:lm_head$": {"bits": 4, "group_size": 128}}
        config = {"quantization_config": {**GPTQ, "lm_head": True, "dynamic": dynamic}}
        assert short(read("gptqmodel", config, tmp_path))["lm_head"] == "int4-g128"
        assert short(read("gptqmodel", {**GPTQ, "dynamic": dynamic}, tmp_path))["lm_head"] == "bf16"

    def test_a_tied_head_cannot_be_told_apart_from_the_embedding(self, tmp_path: Path) -> None:
        found = read("gptqmodel", {**GPTQ, "lm_head": True}, tmp_path, layers=TIED)
        assert [line.partition(":")[0] for line in found.problems] == ["model.embed_tokens"]

    @pytest.mark.parametrize(
        ("rounding", "text"), [("full", "int4-g64-full"), ("mse", "int4-g64-mse"), ("gptq", "int4-g64-gptq")]
    )
    def test_rounding(self, rounding: str, text: str, tmp_path: Path) -> None:
        assert short(read("gptqmodel", GPTQ, tmp_path, Options(rounding=rounding))) == spread(text)


def scheme(**weights: Any) -> dict[str, Any]:
    return {
        "weights": {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 64} | weights
    }


class TestCompressedTensors:
    def test_exact_beats_patterns_by_their_text_and_patterns_beat_classes(self, tmp_path: Path) -> None:
        groups = {
            "a": {"targets": ["Linear"], **scheme()},
            "b": {"targets": ["re:.*mlp.*"], **scheme(num_bits=8)},
            "c": {"targets": ["re:.*down.*"], **scheme(num_bits=3)},
            "d": {"targets": ["model.layers.0.mlp.up_proj"], **scheme(num_bits=2)},
            "e": {"targets": ["Embedding"], **scheme(num_bits=8, strategy="channel", group_size=None)},
        }
        config = {"config_groups": groups, "ignore": ["lm_head", r"re:model\.layers\.10\..*", "model.norm"]}
        found = read("compressed-tensors", {"quantization_config": config}, tmp_path)
        left = {f"model.layers.10.{name}": "bf16" for name in SIZES}
        up = {"model.layers.1.mlp.up_proj": "int8-g64", "mlp.up_proj": "int2-g64"}
        assert short(found) == spread("int4-g64") | left | up | {
            "mlp.gate_proj": "int8-g64", "mlp.down_proj": "int3-g64", "model.embed_tokens": "int8-channel",
        }  # fmt: skip
        assert len(found.notes) == 1

    def test_strangers_are_noted(self, tmp_path: Path) -> None:
        groups = {"a": {"targets": ["model.gone", "re:nothing", "model.layers.0.mlp.gate_up_proj"], **scheme()}}
        found = read("compressed-tensors", {"config_groups": groups, "ignore": ["model.visual"]}, tmp_path)
        assert "the model has no 'model.gone', 'model.visual', which the file names" in found.notes
        assert "no layer is left for 1 target: 're:nothing'" in found.notes

    @pytest.mark.parametrize(
        "text",
        [
            "int2-g32", "int3-channel", "int8-tensor", "int4-g64-asym", "int8-channel@int8-token",
            "int8-channel@int8-tensor-asym-static", "fp8-e4m3", "fp8-e4m3-channel@fp8-e4m3-token", "fp8-e4m3-b128x128",
            "fp8-e4m3-g64", "mxfp4", "mxfp6-e2m3@mxfp6-e2m3", "mxfp8-e4m3", "nvfp4",
        ],
    )  # fmt: skip
    def test_what_is_written_reads_back(self, text: str, tmp_path: Path) -> None:
        chosen = {x.name: Format.parse(text if "layers" in x.name else "bf16") for x in LAYERS}
        left = [x.name for x in LAYERS if "layers" not in x.name]
        config = quantization_config(BitPlan(LAYERS, chosen), left)
        found = read("compressed-tensors", {"quantization_config": config}, tmp_path)
        assert short(found) == spread(text)
        assert found.problems == []

    def test_caches_and_inputs_without_counterpart(self, tmp_path: Path) -> None:
        inputs = {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16, "dynamic": "local"}
        weights = scheme(type="float", strategy="tensor_group", group_size=16)
        group = {"targets": ["Linear"], **weights, "input_activations": inputs}
        config = {"config_groups": {"a": group}, "ignore": ["lm_head"], "kv_cache_scheme": {"num_bits": 8}}
        found = read("compressed-tensors", config, tmp_path)
        assert len(found.problems) == 22
        assert found.problems[-1].startswith("kv caches: ")
        without = Options(without=frozenset({"inputs", "caches"}))
        assert short(read("compressed-tensors", config, tmp_path, without)) == spread("nvfp4")


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_targets_go_as_the_library_has_them(data: st.DataObject, tmp_path: Path) -> None:
    """compressed-tensors' own matching, of random targets and names that are left alone."""
    match = quiet_import("compressed_tensors.utils.match")
    pool = [
        "Linear", "Embedding", "lm_head", "re:.*", "re:.*layers.1.*", r"re:model\.layers\.1\.", "re:.*proj$", "re:.*up",
        "re:layers", "model.layers.0.mlp.up_proj", "model.layers.10.mlp.up_proj", "re:.*(q|k)_proj",
        "model.embed_tokens",
    ]  # fmt: skip
    targets = data.draw(st.lists(st.sampled_from(pool), unique=True, max_size=6))
    ignore = data.draw(st.lists(st.sampled_from(pool), unique=True, max_size=2))
    groups = {f"g{i}": {"targets": [target], **scheme(group_size=2**i)} for i, target in enumerate(targets)}
    found = read("compressed-tensors", {"config_groups": groups, "ignore": ignore}, tmp_path)
    for layer in LAYERS:
        module = torch.nn.Linear(1, 1) if layer.kind == "linear" else torch.nn.Embedding(1, 1)
        fits = [] if match.is_match(layer.name, module, ignore) else match.match_targets(layer.name, module, targets)
        assert found.formats[layer.name] == (f"int4-g{2 ** targets.index(fits[0])}" if fits else "bf16")


class TestModelOpt:
    LAYERS: Mapping[str, Any] = {
        "model.layers.0.self_attn.q_proj": {"quant_algo": "W4A16_AWQ", "group_size": 64, "has_zero_point": False},
        "model.layers.0.self_attn.o_proj": {"quant_algo": "W8A16"},
        "model.layers.0.mlp.up_proj": {"quant_algo": "FP8"},
        "model.layers.0.mlp.gate_proj": {"quant_algo": "FP8_PER_CHANNEL_PER_TOKEN"},
        "model.layers.0.mlp.down_proj": {"quant_algo": "W4A16_NVFP4", "group_size": 16},
        "model.layers.1.mlp.down_proj": {"quant_algo": "MXFP8", "group_size": 32},
        "model.gone": {"quant_algo": "FP8"},
    }

    def test_mixed(self, tmp_path: Path) -> None:
        body = {"quant_algo": "MIXED_PRECISION", "kv_cache_quant_algo": None, "quantized_layers": self.LAYERS}
        found = read("modelopt", {"producer": {"name": "modelopt"}, "quantization": body}, tmp_path)
        given_there = {name: text for name, text in found.formats.items() if text != "bf16"}
        assert given_there == dict(
            zip(
                list(self.LAYERS)[:-1],
                [
                    "int4-g64", "int8-channel", "fp8-e4m3@fp8-e4m3-tensor-static", "fp8-e4m3-channel@fp8-e4m3-token",
                    "nvfp4", "mxfp8-e4m3@mxfp8-e4m3",
                ],
                strict=True,
            )
        )  # fmt: skip
        assert found.notes[0] == "the model has no 'model.gone', which the file names"
        assert found.notes[1].startswith("ModelOpt moves scale")

    def test_one_algorithm_for_all_but_some(self, tmp_path: Path) -> None:
        body = {"quant_algo": "FP8_PB_WO", "exclude_modules": ["lm_head", "model.layers.1.*"]}
        found = read("modelopt", {"quantization": body}, tmp_path)
        left = {f"model.layers.1.{name}": "bf16" for name in SIZES}
        assert short(found) == spread("fp8-e4m3-b128x128") | left

    def test_what_has_no_counterpart(self, tmp_path: Path) -> None:
        body = {"quant_algo": "NVFP4", "group_size": 16, "kv_cache_quant_algo": "FP8", "exclude_modules": ["lm_head"]}
        found = read("modelopt", {"quantization": body}, tmp_path)
        assert len(found.problems) == 22
        without = Options(without=frozenset({"inputs", "caches"}))
        assert short(read("modelopt", {"quantization": body}, tmp_path, without)) == spread("nvfp4")
        found = read("modelopt", {"quantization": {"quant_algo": "NVFP4_SVD"}}, tmp_path)
        assert len(found.problems) == 22


class TestMlx:
    CONFIG: Mapping[str, Any] = {
        "group_size": 64, "bits": 4, "mode": "affine", "lm_head": False,
        "model.layers.0.mlp.up_proj": {"group_size": 32, "bits": 8},
        "model.layers.0.mlp.down_proj": {"group_size": 32, "bits": 4, "mode": "mxfp4"},
        "model.layers.1.mlp.down_proj": True,
    }  # fmt: skip

    def test_entries_by_name(self, tmp_path: Path) -> None:
        found = read("mlx", {"quantization": self.CONFIG, "quantization_config": self.CONFIG}, tmp_path)
        other = {f"model.layers.{i}.mlp.{x}_proj": "int4-g64-asym" for i in (1, 10) for x in ("up", "down")}
        assert short(found) == spread("int4-g64-asym") | other | {
            "model.embed_tokens": "int4-g64-asym", "mlp.up_proj": "int8-g32-asym", "mlp.down_proj": "mxfp4",
        }  # fmt: skip

    def test_a_layer_without_scales_was_left_alone(self, tmp_path: Path) -> None:
        from safetensors.torch import save_file

        names = [x.name for x in LAYERS if "layers.10" not in x.name]
        save_file({f"{name}.scales": torch.zeros(1) for name in names}, tmp_path / "model.safetensors")
        found = read("mlx", {"quantization": self.CONFIG}, tmp_path)
        assert {found.formats[f"model.layers.10.{name}"] for name in SIZES} == {"bf16"}
        assert found.formats["model.layers.1.mlp.up_proj"] == "int4-g64-asym"

    def test_one_module_serves_a_tied_head(self, tmp_path: Path) -> None:
        config = {"group_size": 64, "bits": 4, "model.embed_tokens": {"bits": 8, "group_size": 64}}
        assert read("mlx", config, tmp_path, layers=TIED).formats["model.embed_tokens"] == "int8-g64-asym"


class TestLlamaCpp:
    def test_the_first_pattern_that_is_found_wins_and_all_is_lower_case(self, tmp_path: Path) -> None:
        text = (
            "attn_v=Q6_K\nATTN_[qkv]=q4_k\n  blk\\.10\\.=q5_0 ffn_down=q3_K .*ffn=Q5_K attn=iq4_xs\noutput=f16 .*=bf16"
        )
        found = read("llama.cpp", text, tmp_path)
        block10 = {
            f"model.layers.10.{name}": "q5_0" for name in SIZES if not name.endswith(("q_proj", "k_proj", "v_proj"))
        }
        attention = {"self_attn.q_proj": "q4_K", "self_attn.k_proj": "q4_K", "self_attn.v_proj": "q6_K"}
        around = {"self_attn.o_proj": "iq4_xs", "lm_head": "fp16", "mlp.down_proj": "q3_K"}
        assert short(found) == spread("q5_K") | block10 | attention | around
        assert any("the first pattern is taken where several fit" in note for note in found.notes)

    def test_what_the_file_leaves_open(self, tmp_path: Path) -> None:
        found = read("llama.cpp", "attn=q8_0 nothing=q8_0", tmp_path)
        assert len(found.problems) == 11
        assert "no layer is left for 1 pattern: 'nothing'" in found.notes
        found = read("llama.cpp", "attn=q8_0", tmp_path, dataclasses.replace(LLAMA, rest="q4_0"))
        assert short(found) == spread("q4_0") | {"model.embed_tokens": "q4_0", "lm_head": "q4_0"} | {
            name: "q8_0" for name in SIZES if "attn" in name
        }

    def test_types_that_are_not_here(self, tmp_path: Path) -> None:
        found = read("llama.cpp", "blk.0=iq2_xxs .*=q2_0", tmp_path)
        assert len(found.problems) == len(LAYERS)
        assert "its lattice" in found.problems[1]
        assert "q2_0 has no counterpart here" in found.problems[-1]

    def test_an_unknown_architecture(self, tmp_path: Path) -> None:
        with pytest.raises(InputError, match="GGUF names of 'LlamaForCausalL' are not known; did you mean") as caught:
            read("llama.cpp", ".*=q8_0", tmp_path, Options(architecture="LlamaForCausalL"))
        assert caught.value.code == "E307"


def write_gguf(path: Path, types: Mapping[str, gguf.GGMLQuantizationType], layers: Layers = LAYERS) -> Path:
    """Write a GGUF file with gguf's own writer, of zeros in the types that are asked for, else F32."""
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 11)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_string("general.name", "x" * 70_000)
    writer.add_array("tokenizer.ggml.tokens", ["a", "b"])
    writer.add_array("numbers", [1, 2, 3])
    writer.add_float32("some", 1.5)
    for layer in layers:
        name = names.get_name(layer.tensor, try_suffixes=(".weight",))
        assert name is not None
        kind = types.get(name, gguf.GGMLQuantizationType.F32)
        block, size = gguf.GGML_QUANT_SIZES[kind]
        data = np.zeros((layer.rows, layer.columns // block * size), np.uint8)
        writer.add_tensor(name, data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


class TestGguf:
    def test_every_type_by_name(self, tmp_path: Path) -> None:
        kinds = gguf.GGMLQuantizationType
        types = {
            "blk.0.attn_q.weight": kinds.Q4_K, "blk.0.ffn_down.weight": kinds.Q6_K, "blk.1.ffn_up.weight": kinds.MXFP4,
            "token_embd.weight": kinds.Q8_0, "output.weight": kinds.BF16, "blk.10.attn_v.weight": kinds.F16,
        }  # fmt: skip
        found = reader("gguf")(write_gguf(tmp_path / "m.gguf", types), LAYERS, LLAMA)
        assert found.problems == []
        assert {name: text for name, text in found.formats.items() if text != "fp32"} == {
            "model.embed_tokens": "q8_0", "model.layers.0.self_attn.q_proj": "q4_K",
            "model.layers.0.mlp.down_proj": "q6_K", "model.layers.1.mlp.up_proj": "gguf-mxfp4",
            "model.layers.10.self_attn.v_proj": "fp16", "lm_head": "bf16",
        }  # fmt: skip

    def test_another_model_and_a_head_apart(self, tmp_path: Path) -> None:
        kinds = gguf.GGMLQuantizationType
        path = write_gguf(tmp_path / "m.gguf", {"output.weight": kinds.Q8_0})
        wide = Layers(tuple(dataclasses.replace(x, shape=(x.shape[0], 512)) for x in LAYERS))
        assert len(reader("gguf")(path, wide, LLAMA).problems) == len(LAYERS) - 3
        found = reader("gguf")(path, TIED, LLAMA)
        assert found.problems == [
            "model.embed_tokens: is one tensor in this model; the file has F32, and Q8_0 for its head"
        ]

    def test_a_file_that_is_cut_or_lies(self, tmp_path: Path) -> None:
        whole = write_gguf(tmp_path / "m.gguf", {}, Layers(LAYERS[:2])).read_bytes()
        path = tmp_path / "cut.gguf"
        for length in (0, 3, 20, 100, 70_100, len(whole) - 40_000):
            path.write_bytes(whole[:length])
            with pytest.raises(InputError, match="no whole GGUF file"):
                reader("gguf")(path, LAYERS, LLAMA)
        head = b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + struct.pack("<Q", 1) + b"a"
        for value in (
            struct.pack("<IIQ", 9, 0, 2**62), struct.pack("<IIQ", 9, 8, 2**40), struct.pack("<IIQ", 9, 9, 5),
            struct.pack("<IQ", 8, 2**63), struct.pack("<I", 77),
        ):  # fmt: skip
            path.write_bytes(head + value)
            with pytest.raises(InputError, match="no whole GGUF file"):
                reader("gguf")(path, LAYERS, LLAMA)
        path.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 2**40, 0))
        with pytest.raises(InputError, match="promised"):
            reader("gguf")(path, LAYERS, LLAMA)


RECIPE = """\
target_bpw: 4.5
head_bits: 16
tensors:
  "*.self_attn.[qkv]_proj": 4
  "*.self_attn.o_proj": 8
  "*.mlp.*": 3
  "model.layers.1.mlp.up_proj": 2.5
"""
NOMINAL = Options(nominal="int{bits}-g128")


class TestExllama:
    def test_bits_alone_are_refused(self, tmp_path: Path) -> None:
        found = read("exllamav3", RECIPE, tmp_path)
        assert len(found.problems) == 21
        assert "code book" in found.problems[0]

    def test_the_last_pattern_wins(self, tmp_path: Path) -> None:
        found = read("exllamav3", RECIPE, tmp_path, NOMINAL)
        assert short(found) == spread("int4-g128") | {
            "self_attn.o_proj": "int8-g128", "mlp.gate_proj": "int3-g128", "mlp.up_proj": "int3-g128",
            "mlp.down_proj": "int3-g128",
        }  # fmt: skip
        assert found.says["bits"]["model.layers.1.mlp.up_proj"] == 2.5

    def test_every_layer_must_be_named_and_the_head_too(self, tmp_path: Path) -> None:
        recipe = RECIPE.replace("head_bits: 16\n", "").replace('  "*.mlp.*": 3\n', '  "*.up_proj": 3\n')
        found = read("exllamav3", recipe, tmp_path, NOMINAL)
        assert len(found.problems) == 7
        assert "--head_bits" in found.problems[-1]
        rest = dataclasses.replace(NOMINAL, rest="int8-g128")
        assert read("exllamav3", recipe, tmp_path, rest).formats["lm_head"] == "int8-g128"

    @pytest.mark.parametrize(
        "text",
        ["tensors: {a: 9}", "tensors: [1]", "a: &a [*a]", "tensors: !!python/object:os.system {}", "tensors: {1: 3}",
         "tensors: {a: true}", "- 1", "tensors: {a: .nan}", "a: [", "\x00"],
    )  # fmt: skip
    def test_recipes_that_are_none(self, text: str, tmp_path: Path) -> None:
        with pytest.raises(InputError) as caught:
            read("exllamav3", text, tmp_path, NOMINAL)
        assert caught.value.code == "E307"

    def test_a_strategy_of_exllamav2(self, tmp_path: Path) -> None:
        def width(*pairs: tuple[float, float]) -> dict[str, Any]:
            bits, shares = zip(*pairs, strict=True)
            return {"group_size": 32, "bits": bits, "bits_prop": shares, "scale_bits": 4}

        strategy = {}
        for i in (0, 1, 10):
            attention = {name.partition(".")[2]: width((4, 0.9), (8, 0.1)) for name in SIZES if "attn" in name}
            strategy[f"model.layers.{i}.self_attn"] = {"accuracy": 0.99, "total_bits": 9, **attention}
            strategy[f"model.layers.{i}.mlp"] = {
                name.partition(".")[2]: width((3, 1)) for name in SIZES if "mlp" in name
            }
        job = {"bits": 4.0, "head_bits": 8, "strategy": strategy}
        assert len(read("exllamav2", job, tmp_path).problems) == 22
        found = read("exllamav2", job, tmp_path, NOMINAL)
        mlp = {name: "int3-g128" for name in SIZES if "mlp" in name}
        assert short(found) == spread("int4-g128") | mlp | {"lm_head": "int8-g128"}
        assert found.says["bits"]["model.layers.0.self_attn.q_proj"] == pytest.approx(4.4)
        with pytest.raises(InputError, match="measurements and no choice"):
            read("exllamav2", {"measurement": {}}, tmp_path, NOMINAL)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    """A small Llama, untied, in float32."""
    return load_model(make(tmp_path_factory.mktemp("model")))


@pytest.fixture(scope="module")
def tied(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return load_model(make(tmp_path_factory.mktemp("tied"), tie=True))


class TestRoundTrip:
    """What our exporters write reads back as the plan, and is a plan for the same model."""

    @pytest.mark.parametrize("which", ["model", "tied"])
    def test_compressed_tensors(self, which: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
        small: Model = request.getfixturevalue(which)
        formats = {"attn": "int4-g32", "down": "int8-channel", "mlp": "fp8-e4m3-channel", "embed": "int8-channel"}
        plan = planned(small, formats, "bf16")
        CompressedTensors().write(plan, tmp_path / "out", small)
        found = import_plan(tmp_path / "out", "compressed-tensors", small)
        expected = {name: "fp32" if str(fmt) == "bf16" else str(fmt) for name, fmt in plan.formats.items()}
        # A layer in another plain type than the stored one is left alone there: the configuration cannot say it.
        assert {name: str(fmt) for name, fmt in found.plan.formats.items()} == expected
        assert found.plan.layers == plan.layers
        assert found.plan.model["digest"] == small.digest
        assert found.plan.source["imported"]["from"] == "compressed-tensors"

    @pytest.mark.parametrize("which", ["model", "tied"])
    def test_llama_cpp(self, which: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
        small: Model = request.getfixturevalue(which)
        plan = planned(small, {"v_proj": "q8_0", "down": "q5_0", "embed": "fp16", "lm_head": "bf16"}, "q4_0")
        LlamaCpp("LlamaForCausalLM").write(plan, tmp_path / "out")
        found = import_plan(tmp_path / "out", "llama.cpp", small)
        assert found.plan.formats == plan.formats
        # q, k and v have several types here, so they are no longer tied.
        assert [layer.tie for layer in found.plan.layers if "v_proj" in layer.name] == ["", ""]
        assert any("2 ties are undone" in note for note in found.notes)

    @pytest.mark.parametrize(
        ("name", "formats", "other"),
        [
            ("autoround", {"attn": "int4-g32", "down": "int8-channel"}, "int3-g32"),
            ("gptqmodel", {"attn": "int4-g32", "down": "int8-channel"}, "int3-g32-asym"),
            ("mlx", {"attn": "int4-g32-asym", "up": "mxfp4"}, "int3-g32-asym"),
            ("modelopt", {"attn": "int4-g32", "down": "int8-channel"}, "fp8-e4m3@fp8-e4m3-tensor-static"),
        ],
    )
    def test_configurations(self, name: str, formats: dict[str, str], other: str, model: Model, tmp_path: Path) -> None:
        embedding = "int8-g64-asym" if name == "mlx" else "fp32"
        plan = planned(model, {**formats, "embed": embedding, "lm_head": "fp32"}, other)
        exporter = registry.make("exporters", name)
        assert list(exporter.refuses(plan)) == []
        exporter.write(plan, tmp_path / "out")
        found = import_plan(tmp_path / "out", name, model)
        assert {key: str(fmt) for key, fmt in found.plan.formats.items()} == {
            key: str(fmt) for key, fmt in plan.formats.items()
        }
        assert not any("the model has no" in note for note in found.notes)

    def test_bits_of_a_recipe(self, model: Model, tmp_path: Path) -> None:
        # Heads and embeddings that are left alone are stored in 16 bits there.
        plan = planned(model, {"attn": "int4-g32", "embed": "bf16", "lm_head": "bf16"}, "int3-g32")
        registry.make("exporters", "exllamav3", nominal=True).write(plan, tmp_path / "out")
        found = import_plan(tmp_path / "out", "exllamav3", model, Options(nominal="int{bits}-g32")).plan
        expected = {key: "fp32" if str(fmt) == "bf16" else str(fmt) for key, fmt in plan.formats.items()}
        assert {key: str(fmt) for key, fmt in found.formats.items()} == expected
        assert found.source["imported"]["nominal"] == "int{bits}-g32"

    @pytest.mark.parametrize("which", ["model", "tied"])
    def test_gguf(self, which: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
        small: Model = request.getfixturevalue(which)
        plan = planned(small, {"v_proj": "q8_0", "down": "q5_0", "embed": "q8_0", "lm_head": "bf16"}, "q4_0")
        plan = dataclasses.replace(plan, model={**plan.model, "architecture": "LlamaForCausalLM"})
        files = registry.make("exporters", "gguf", tokenizer="none").write(plan, tmp_path / "out", small)
        file = next(path for path in files if path.suffix == ".gguf")
        assert import_plan(file, "gguf", small).plan.formats == plan.formats

    def test_our_own_plan_for_another_model_with_the_same_layers(self, model: Model, tmp_path: Path) -> None:
        plan = dataclasses.replace(planned(model, {}), model={"name": "before", "digest": "0" * 64})
        plan.save(tmp_path / "plan.json")
        found = import_plan(tmp_path / "plan.json", "mpsearch", model).plan
        assert found.formats == plan.formats
        assert found.model["digest"] == model.digest
        assert found.source["imported"]["plan"] == plan.key

    def test_caches_of_our_own_plan_come_along_or_not(self, model: Model, tmp_path: Path) -> None:
        layers = find_layers(model, caches=True)
        formats = {x.name: "kv-int8-token" if x.kind == "kv_cache" else "int4-g32@int8-token" for x in layers}
        formats[layers[0].name] = "bf16"
        BitPlan(layers, {name: Format.parse(text) for name, text in formats.items()}).save(tmp_path / "plan.json")
        found = import_plan(tmp_path, "mpsearch", model).plan
        assert {name: str(fmt) for name, fmt in found.formats.items()} == formats
        without = Options(without=frozenset({"caches", "inputs"}))
        found = import_plan(tmp_path, "mpsearch", model, without).plan
        assert sorted({str(fmt) for fmt in found.formats.values()}) == ["bf16", "int4-g32"]
        with pytest.raises(InputError, match="says itself how it rounds"):
            import_plan(tmp_path, "mpsearch", model, Options(rounding="mse"))

    def test_a_plan_with_parts_or_of_other_shapes_is_refused(self, model: Model, tmp_path: Path) -> None:
        plan = planned(model, {})
        first = plan.layers[1]
        items = tuple(dataclasses.replace(x, shape=(7, 7)) if x == plan.layers[2] else x for x in plan.layers)
        cut = [first.part((0, 32)), first.part((32, first.rows))]
        layers = Layers((*items[:1], *cut, *items[2:]), plan.layers.excluded)
        BitPlan(layers, {x.name: Format.parse("int8-channel") for x in layers}).save(tmp_path / "plan.json")
        with pytest.raises(InputError) as caught:
            import_plan(tmp_path / "plan.json", "mpsearch", model)
        assert f"{first.name}: has parts" in caught.value.because
        assert f"{plan.layers[2].name}: has shape (7, 7)" in caught.value.because

    def test_an_imported_plan_is_measured(self, model: Model, tmp_path: Path) -> None:
        found = [
            import_plan(_saved(tmp_path / text, {**GPTQ, "bits": bits, "group_size": 32}), "gptqmodel", model).plan
            for text, bits in (("two", 2), ("eight", 8))
        ]
        losses = [measure(model, plan, [TOKENS]).loss for plan in found]
        assert losses[0] > 10 * losses[1] > 0
        assert len(found[0].compare(found[1])) == 14


def _saved(folder: Path, content: Any) -> Path:
    folder.mkdir()
    (folder / "quantize_config.json").write_text(json.dumps(content))
    return folder


def test_problems_are_all_named_in_one_error() -> None:
    problems = [f"layer{i}: no counterpart" for i in range(50)]
    with pytest.raises(InputError) as caught:
        assemble(Foreign({}, problems), LAYERS, {}, {"from": "mlx"})
    assert caught.value.code == "E307"
    assert [line.strip() for line in caught.value.because.split("\n")] == problems


#: File -> the forms that read it; each must refuse it as what it is.
HOSTILE: Mapping[str, str] = {
    "empty": "",
    "cut": '{"quantization_config": {"bits": 4, "gro',
    "list": "[1, 2]",
    "deep": "[" * 100_000,
    "deep object": '{"a":' * 50_000,
    "huge number": '{"bits": ' + "9" * 5000 + "}",
    "null": "null",
    "nothing": "{}",
    "binary": "\udcff\udcfe",
}
JSON_FORMS = ("autoround", "gptqmodel", "compressed-tensors", "modelopt", "mlx", "exllamav2")


@pytest.mark.parametrize("form", JSON_FORMS)
@pytest.mark.parametrize("name", HOSTILE)
def test_files_that_are_none(form: str, name: str, tmp_path: Path) -> None:
    path = tmp_path / "file.json"
    path.write_bytes(HOSTILE[name].encode("utf-8", "surrogateescape"))
    with pytest.raises(InputError) as caught:
        reader(form)(path, LAYERS, NOMINAL)
    assert caught.value.code == "E307"
    assert str(path) in caught.value.message
    assert len(caught.value.message) < 500


VALUES = [None, True, -1, 0, 10**30, 1e308, float("nan"), "4", "", [], [[]], {}, {"a": 1}, "x" * 10_000]
BODIES: Mapping[str, Mapping[str, Any]] = {
    "autoround": {**AUTOROUND, "act_bits": 8, "act_data_type": "int", "act_group_size": -1, "act_sym": True,
                  "act_dynamic": True, "block_name_to_quantize": None, "extra_config": {"lm_head": {"bits": 8}}},
    "gptqmodel": {**GPTQ, "lm_head": True, "dynamic": {".*up_proj": {"bits": 8}}},
    "compressed-tensors": {"config_groups": {"a": {"targets": ["Linear"], **scheme()}}, "ignore": ["lm_head"],
                           "kv_cache_scheme": None, "quant_method": "compressed-tensors"},
    "modelopt": {"quant_algo": "MIXED_PRECISION", "quantized_layers": TestModelOpt.LAYERS, "kv_cache_quant_algo": None,
                 "exclude_modules": []},
    "mlx": TestMlx.CONFIG,
    "exllamav2": {"head_bits": 6, "strategy": {"model.layers.0.mlp": {"up_proj": {"bits": [4], "bits_prop": [1]}}}},
}  # fmt: skip


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Every place of a nested value."""
    inner = value.items() if isinstance(value, Mapping) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(place for key, each in inner for place in places(each, (*path, key)))]


def changed(value: Any, path: Sequence[Any], new: Any) -> Any:
    copy = json.loads(json.dumps(value))
    place = copy
    for key in path[:-1]:
        place = place[key]
    if not path:
        return new
    place[path[-1]] = new
    return copy


def outcome(form: str, content: Any, folder: Path) -> Foreign | MpsearchError:
    try:
        return read(form, content, folder, NOMINAL)
    except MpsearchError as error:
        return error


@pytest.mark.parametrize("form", BODIES)
def test_values_of_the_wrong_kind_are_told(form: str, tmp_path: Path) -> None:
    """Whatever stands anywhere in a file, it is read, refused by layer, or refused as a file."""
    refused = 0
    for place in places(BODIES[form]):
        for value in VALUES:
            found = outcome(form, changed(BODIES[form], place, value), tmp_path)
            if isinstance(found, MpsearchError):
                assert (found.code, len(str(found)) < 1000) == ("E307", True), (place, value)
                refused += 1
                continue
            named = {line.partition(":")[0] for line in found.problems} - {"kv caches"}
            assert named | set(found.formats) == {layer.name for layer in LAYERS}
            for name, text in found.formats.items():
                assert not Format.parse(text).refuses(next(x for x in LAYERS if x.name == name))
    assert refused > 10


class TestPatterns:
    @pytest.mark.parametrize(
        "pattern", [r"((a|aa)+)+$", r"(?:(?:a{1,9}){1,9}){1,9}b", r"(a*)*(b*)*(a*)*(?!a)c", r"(.*a){20}b"]
    )
    def test_no_pattern_hangs(self, pattern: str) -> None:
        start = time.monotonic()
        try:
            assert Patterns("f", seconds=0.3).match(pattern, "a" * 300 + "!") is False
        except InputError as error:
            told = (error.code, "takes too long" in error.message)
            assert told == ("E307", True)
        assert time.monotonic() - start < 10

    def test_the_clock_is_for_the_whole_file(self) -> None:
        patterns = Patterns("f", seconds=0.2)
        with pytest.raises(InputError, match="too long"):
            any(patterns.match(r"((a|aa)+)+$", "a" * length + "!") for length in range(10, 1000))

    @pytest.mark.parametrize(
        "pattern",
        ["a{99999999}", "(?:(?:a{999}){999}){999}", "a{3,99999}", "a" * 3000, "(" * 500 + ")" * 500, "(", "[", "*",
         "a{e<=3}", "(?P<a>", r"\p{L}", "[[a]--[b]]", "(?R)", "a**"],
    )  # fmt: skip
    def test_patterns_that_are_refused(self, pattern: str) -> None:
        with pytest.raises(InputError) as caught:
            Patterns("f").match(pattern, "aaa")
        assert caught.value.code == "E307"
        assert len(caught.value.message) < 300

    @given(
        st.sampled_from([r"model\.layers\.\d+", r".*\.(?:1[0-9]|2[0-3])\..*", "^head$", "(?!.*q_proj).*", "x{2}", ""]),
        st.sampled_from([*(layer.name for layer in LAYERS), "", "model.layers.12.a", "xx"]),
    )  # fmt: skip
    def test_they_match_as_the_standard_library_has_it(self, pattern: str, name: str) -> None:
        import re

        assert Patterns("f").match(pattern, name) == bool(re.match(pattern, name))
        assert Patterns("f").search(pattern, name) == bool(re.search(pattern, name))


NAMES = ["../../etc/passwd", "a.b[0]", "a$b", "a|b", "a(b", 'a"b', "été", "a b", "a\\b", "x" * 300, "-:a", "re:a", "a*"]


@pytest.mark.parametrize("name", NAMES)
def test_hostile_names_match_themselves_alone(name: str, tmp_path: Path) -> None:
    layers = Layers(
        tuple(Layer(x, "linear", (64, 64), dtype="bfloat16") for x in (f"m.0.{name}", "m.0.other", "m.0.a"))
    )
    entries = {f"m.0.{name}": {"bits": 8, "group_size": 32}}
    exact = {"mlx": {"bits": 4, "group_size": 64, **entries}}
    if not any(mark in name for mark in "(|[$*\\"):
        exact["autoround"] = {**AUTOROUND, "extra_config": entries}
    exact["modelopt"] = {
        "quant_algo": "MIXED_PRECISION", "quantized_layers": {f"m.0.{name}": {"quant_algo": "W8A16"}},
    }  # fmt: skip
    for form, body in exact.items():
        found = read(form, body, tmp_path, layers=layers).formats
        assert found[f"m.0.{name}"].startswith("int8-")
        assert found["m.0.other"] == found["m.0.a"] != found[f"m.0.{name}"]


class TestGather:
    def test_experts_are_refused_and_convolutions_stay(self, tmp_path: Path) -> None:
        layers = Layers((Layer("m.0.experts.up", "expert", (4, 64, 64), 1), Layer("m.0.conv", "conv", (8, 8, 3))))
        found = read("gptqmodel", GPTQ, tmp_path, layers=layers)
        assert found.problems == [
            "m.0.experts.up: stacks experts, which the file names one by one; no counterpart here"
        ]
        assert found.formats == {"m.0.conv": "fp32"}

    def test_a_number_type_without_a_format(self) -> None:
        found = gather(Layers((Layer("a", "linear", (8, 8), dtype="float64"),)), lambda name, layer: "", Options())
        assert found.problems == ["a: is left in float64, which is no format here"]

    @pytest.mark.parametrize(
        "values", [{"rounding": "nearest"}, {"without": frozenset({"weights"})}, {"nominal": "int4"}, {"rest": "int99"}]
    )
    def test_options_that_make_no_sense(self, values: dict[str, Any]) -> None:
        with pytest.raises(InputError):
            Options(**values)


def test_every_form_is_on_the_page_and_an_unknown_one_is_told() -> None:
    page = (Path(__file__).resolve().parents[1] / "docs/imports.md").read_text(encoding="utf-8")
    assert [form for form in FORMS if f"| `{form}` |" not in page] == []
    with pytest.raises(InputError, match="no form of plans 'autoroud'; did you mean 'autoround'") as caught:
        reader("autoroud")
    assert caught.value.code == "E107"
