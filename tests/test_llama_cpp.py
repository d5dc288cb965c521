"""The export to llama.cpp: exact names, types of the same bytes, and nothing a name could run."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch

from mpsearch.errors import InputError, MpsearchError
from mpsearch.exports.folder import MANIFEST
from mpsearch.exports.gguf_names import ARCHITECTURES, GgufNames
from mpsearch.exports.gguf_place import PLAIN_TYPES
from mpsearch.exports.llama_cpp import LlamaCpp, read_tensor_types
from mpsearch.exports.native import PLAN, Native
from mpsearch.format import Format
from mpsearch.formats.gguf_types import GgufType
from mpsearch.layer import Excluded, Layer, Layers
from mpsearch.plan import BitPlan
from mpsearch.registry import make
from mpsearch.testing.exporters import ExporterSuite

ROOT = Path(__file__).resolve().parents[1]


def llama_plan(formats: Mapping[str, str], kept: Sequence[Excluded] = (), **settings: Any) -> BitPlan:
    """A plan of (64, 96) weights, or of the shape, kind and so on given by layer name in ``settings``."""
    layers = tuple(
        Layer(**{"name": name, "kind": "linear", "shape": (64, 96), **settings.get(name, {})}) for name in formats
    )
    model = {"architecture": settings.get("architecture", "LlamaForCausalLM")}
    return BitPlan(Layers(layers, tuple(kept)), {n: Format.parse(t) for n, t in formats.items()}, model)


BLOCK = "model.layers.{}.{}"
LLAMA = {
    "model.embed_tokens": "q8_0",
    BLOCK.format(0, "self_attn.q_proj"): "q4_0",
    BLOCK.format(0, "mlp.down_proj"): "q5_0",
    BLOCK.format(2, "self_attn.q_proj"): "fp16",
    BLOCK.format(10, "self_attn.q_proj"): "fp32",
    **{BLOCK.format(n, "self_attn.v_proj"): "q4_0" for n in range(11)},
    "lm_head": "bf16",
}


class TestLlamaCpp(ExporterSuite):
    @pytest.fixture
    def exporter(self) -> LlamaCpp:
        return make("exporters", "llama.cpp")

    @pytest.fixture
    def plan(self) -> BitPlan:
        return llama_plan(LLAMA)

    @pytest.fixture
    def refused(self) -> tuple[BitPlan, Sequence[str]]:
        wrong = {f"model.layers.{n}.mlp.down_proj": "int3-g32" for n in range(25)}
        return llama_plan({**wrong, "lm_head": "q8_0"}), list(wrong)

    def read_back(self, folder: Path, plan: BitPlan) -> Mapping[str, str]:
        ours = {theirs: text for text, theirs in PLAIN_TYPES.items()} | {t.lower(): t for t in GgufType.examples}
        table = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 11)
        types = read_tensor_types(folder / "tensor-types.txt")
        names = {layer.name: table.get_name(layer.tensor, (".weight",)) for layer in plan.layers}
        assert set(types) == set(names.values())
        return {layer: ours[types[name]] for layer, name in names.items() if name}


def write_types(plan: BitPlan, folder: Path, **settings: Any) -> list[str]:
    LlamaCpp(**settings).write(plan, folder)
    return (folder / "tensor-types.txt").read_text().splitlines()


def test_types_are_exact_names_in_the_order_of_the_file(tmp_path: Path) -> None:
    lines = write_types(llama_plan(LLAMA), tmp_path)
    assert lines[:4] == [
        r"^token_embd\.weight$=q8_0",
        r"^output\.weight$=bf16",
        r"^blk\.0\.attn_q\.weight$=q4_0",
        r"^blk\.0\.attn_v\.weight$=q4_0",
    ]
    assert [line.split("\\.")[1] for line in lines[2:]] == ["0", "0", "0", "1", "2", "2", *"3456789", "10", "10"]


def test_every_line_matches_its_own_tensor_and_no_other(tmp_path: Path) -> None:
    lines = write_types(llama_plan(LLAMA), tmp_path)
    patterns, names = [line.split("=")[0] for line in lines], list(read_tensor_types(tmp_path / "tensor-types.txt"))
    # llama.cpp lower-cases each pattern and searches with it.
    hits = [[bool(re.search(pattern.lower(), name)) for name in names] for pattern in patterns]
    assert np.array_equal(hits, np.eye(len(names), dtype=bool))
    assert all(re.fullmatch(r"\^([a-z0-9_]|\\\.)+\$=\w+", line) for line in lines)


def test_types_have_the_bytes_of_the_formats() -> None:
    layer = Layer("x", "linear", (6, 96))
    weight = np.random.default_rng(0).standard_normal(layer.shape).astype(np.float32)
    for text, kind in PLAIN_TYPES.items():
        stored = gguf.quants.quantize(weight, gguf.GGMLQuantizationType[kind.upper()])
        assert stored.nbytes == Format.parse(text).bytes(layer), text


ROUNDED = [fmt for fmt in GgufType.examples if fmt not in ("gguf-mxfp4", "gguf-nvfp4")]


def test_gguf_types_are_written_by_their_own_names(tmp_path: Path) -> None:
    shape = {"shape": (64, 256)}
    formats = {BLOCK.format(n, "mlp.up_proj"): text for n, text in enumerate(GgufType.examples)}
    plan = llama_plan(formats, **dict.fromkeys(formats, shape))
    lines = write_types(plan, tmp_path)
    kinds = [text.removeprefix("gguf-").lower() for text in GgufType.examples]
    assert lines == [rf"^blk\.{n}\.ffn_up\.weight$={kind}" for n, kind in enumerate(kinds)]
    types = read_tensor_types(tmp_path / "tensor-types.txt")
    for layer, kind in zip(plan.layers, types.values(), strict=True):
        block, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind.upper()]]
        assert plan.formats[layer.name].bytes(layer) == 64 * 256 // block * size
    assert {"q4_k", "iq4_xs", "mxfp4"} <= set(types.values())


@pytest.mark.parametrize(
    ("fmt", "columns", "reason"),
    [
        ("q4_K", 96, "q4_K does not fit: 96 weights per output channel cannot be cut into blocks of 256; use q5_0"),
        ("iq2_xs", 256, "iq2_xs does not fit: mpsearch cannot round to iq2_xs"),
    ],
)
def test_gguf_types_that_do_not_fit_are_refused(fmt: str, columns: int, reason: str) -> None:
    plan = llama_plan({"lm_head": fmt}, lm_head={"shape": (8, columns)})
    assert LlamaCpp().refuses(plan)[0].startswith(f"lm_head: {reason}")


def test_the_base_is_a_type_that_the_plan_does_not_use(tmp_path: Path) -> None:
    names = [BLOCK.format(n, "mlp.up_proj") for n in range(len(ROUNDED))]
    for count in range(1, len(ROUNDED) + 1):
        chosen = dict(zip(names, ["q8_0", "q5_0", "q4_0", "q4_1", *ROUNDED], strict=False))
        formats = dict(list(chosen.items())[:count])
        folder = tmp_path / str(count)
        lines = write_types(llama_plan(formats, **{name: {"shape": (64, 256)} for name in formats}), folder)
        base = (folder / "quantize.sh").read_text().split()[-1]
        used = {line.split("=")[1] for line in lines}
        assert base.lower().removesuffix("_s") not in used or count > 10, (base, used)


def test_kept_matrices_are_listed_with_their_stored_type(tmp_path: Path) -> None:
    kept = [
        Excluded("lm_head.weight", (64, 96), "float16", "never called"),
        Excluded("model.norm.weight", (96,), "bfloat16", "1-D"),
        Excluded("model.layers.0.self_attn.q_proj.bias", (96,), "bfloat16", "1-D"),
        Excluded("model.layers.0.mlp.up_proj.weight", (64, 96), "bfloat16", "never called"),
    ]
    lines = write_types(llama_plan({"model.embed_tokens": "q4_0"}, kept), tmp_path)
    assert lines == [r"^token_embd\.weight$=q4_0", r"^output\.weight$=f16", r"^blk\.0\.ffn_up\.weight$=bf16"]


@pytest.mark.parametrize(
    ("name", "dtype", "reason"),
    [
        ("lm_head.weight", "float64", "GGUF has no float64"),
        ("visual.patch", "float32", "LlamaForCausalLM has no tensor of this name in GGUF"),
    ],
)
def test_kept_matrices_that_cannot_stay_are_refused(name: str, dtype: str, reason: str) -> None:
    plan = llama_plan({"model.embed_tokens": "q4_0"}, [Excluded(name, (64, 96), dtype, "never called")])
    assert LlamaCpp().refuses(plan) == [f"{name}: cannot be kept as it is: {reason}"]


ALL = "q8_0, q4_0, bf16, fp16, fp32"


@pytest.mark.parametrize(
    ("name", "fmt", "settings", "reason"),
    [
        ("lm_head", "int3-g64", {"shape": (4, 64)}, f"int3-g64 is no GGUF type; allowed {ALL}"),
        ("lm_head", "int4-g32-asym", {}, f"int4-g32-asym is no GGUF type; allowed {ALL}"),
        ("lm_head", "int8-channel", {}, f"int8-channel is no GGUF type; allowed {ALL}"),
        (
            "lm_head",
            "q4_0",
            {"shape": (4, 80)},
            "q4_0 does not fit: 80 weights per output channel cannot be cut into blocks of 32; "
            "use fp16; allowed bf16, fp16, fp32",
        ),
        (
            "model.conv",
            "q4_0",
            {"kind": "conv", "shape": (4, 32, 3, 3)},
            "q4_0 has no place in GGUF: the layer is a conv of shape (4, 32, 3, 3); allowed nothing",
        ),
        (
            "lm_head",
            "q4_0",
            {"shape": (4, 32, 32)},
            "q4_0 has no place in GGUF: the layer is a linear of shape (4, 32, 32); allowed nothing",
        ),
        (
            "model.other",
            "bf16",
            {},
            "bf16 has no place in GGUF: LlamaForCausalLM has no tensor of this name there; allowed nothing",
        ),
        (
            "lm_head",
            "bf16",
            {"shared": ("model.layers.0.mlp.up_proj",)},
            "bf16 has no place in GGUF: LlamaForCausalLM has no tensor of this name there; allowed nothing",
        ),
    ],
)
def test_refusals_say_what_is_wanted_and_what_is_allowed(
    name: str, fmt: str, settings: dict[str, Any], reason: str
) -> None:
    plan = llama_plan({name: fmt, "model.embed_tokens": "bf16"}, **{name: settings})
    assert LlamaCpp().refuses(plan) == [f"{name}: {reason}"]


def test_all_violations_are_counted_and_those_of_one_reason_share_a_line(tmp_path: Path) -> None:
    plan = llama_plan({f"model.layers.{n}.mlp.up_proj": "int2-g32" for n in range(33)})
    with pytest.raises(InputError) as caught:
        LlamaCpp().write(plan, tmp_path / "out")
    lines = str(caught.value).splitlines()
    assert lines[0] == "error[E301] llama.cpp cannot hold this plan, for 33 reasons"
    (line,) = (line for line in lines if "int2-g32" in line)
    assert "model.layers.0.mlp.up_proj, model.layers.1.mlp.up_proj, " in line
    assert " and 25 more: int2-g32 is no GGUF type" in line


def test_of_many_reasons_twenty_are_shown(tmp_path: Path) -> None:
    formats = [f"int{bits}-g{group}" for bits in range(2, 9) for group in (32, 64, 16, 8)]
    plan = llama_plan({f"model.layers.{n}.mlp.up_proj": text for n, text in enumerate(formats)})
    with pytest.raises(InputError) as caught:
        LlamaCpp().write(plan, tmp_path / "out")
    lines = str(caught.value).splitlines()
    assert lines[0] == "error[E301] llama.cpp cannot hold this plan, for 28 reasons"
    assert sum("is no GGUF type" in line for line in lines) == 20
    assert lines[-2].strip() == "and 8 more reasons; mpsearch plan check --to lists all"


def test_two_layers_cannot_be_one_tensor() -> None:
    plan = llama_plan({"model.layers.0.self_attn.q_proj": "bf16", "layers.0.attention.wq": "fp16"})
    assert LlamaCpp().refuses(plan) == [
        "layers.0.attention.wq: is 'blk.0.attn_q.weight' in GGUF, and so is model.layers.0.self_attn.q_proj"
    ]


@pytest.mark.parametrize("first", ["model.embed_tokens", "lm_head"])
def test_a_tied_head_is_the_embedding(first: str, tmp_path: Path) -> None:
    other = {"model.embed_tokens": "lm_head", "lm_head": "model.embed_tokens"}[first]
    plan = llama_plan({first: "q8_0"}, **{first: {"shared": (other,)}})
    assert write_types(plan, tmp_path / "a") == [r"^token_embd\.weight$=q8_0"]
    # Cohere has no other head in GGUF.
    cohere = BitPlan(plan.layers, plan.formats, {"architecture": "CohereForCausalLM"})
    assert write_types(cohere, tmp_path / "b") == [r"^token_embd\.weight$=q8_0"]


def test_gpt2_rows_run_along_the_input_and_its_positions_stay(tmp_path: Path) -> None:
    formats = {"transformer.wte": "q8_0", "transformer.wpe": "fp32", "transformer.h.0.attn.c_attn": "q4_0"}
    turned = {"transformer.h.0.attn.c_attn": {"shape": (96, 200), "out_axis": 1}, "architecture": "GPT2LMHeadModel"}
    lines = write_types(llama_plan(formats, **turned), tmp_path / "decided")
    assert lines == [
        r"^token_embd\.weight$=q8_0",
        r"^position_embd\.weight$=f32",
        r"^blk\.0\.attn_qkv\.weight$=q4_0",
    ]
    kept = [Excluded("transformer.wpe.weight", (64, 96), "bfloat16", "never called")]
    rest = {name: fmt for name, fmt in formats.items() if not name.endswith("wpe")}
    assert write_types(llama_plan(rest, kept, **turned), tmp_path / "kept") == [lines[0], lines[2]]
    small = llama_plan({**formats, "transformer.wpe": "q8_0"}, **turned)
    assert LlamaCpp().refuses(small) == [
        "transformer.wpe: q8_0 has no place: llama.cpp keeps 'position_embd.weight' in 32 bits; allowed fp32"
    ]


def test_the_architecture_comes_from_the_plan_or_a_setting(tmp_path: Path) -> None:
    nameless = llama_plan({"lm_head": "bf16"}, architecture="")
    assert "does not name the model's architecture" in LlamaCpp().refuses(nameless)[0]
    assert write_types(nameless, tmp_path, architecture="Qwen3ForCausalLM") == [r"^output\.weight$=bf16"]
    close = LlamaCpp().refuses(llama_plan({"lm_head": "bf16"}, architecture="LLamaForCausalLM"))
    assert close[0].startswith("model: the GGUF names of 'LLamaForCausalLM' are not known; did you mean 'Llama")


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_weight_of_a_known_architecture_has_one_name(architecture: str) -> None:
    import transformers

    kind = getattr(transformers, architecture)
    size = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_hidden_layers": 2}
    tokens = {"vocab_size": 96, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    with torch.device("meta"):
        model = kind(kind.config_class(**size, **tokens))
    names = [name for name, tensor in model.named_parameters() if tensor.ndim > 1]
    found = [GgufNames(architecture, names).find(name) for name in names]
    assert len(names) > 8
    assert "" not in found
    assert len(set(found)) == len(found)
    tied = {"token_embd.weight", GgufNames(architecture, names).find("lm_head.weight")}
    assert tied <= {"token_embd.weight", "output.weight", ""}
    assert all(name == name.lower() and name.endswith(".weight") for name in found)


def run_script(folder: Path, tmp_path: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    tool = tmp_path / "fake quantize"
    tool.write_text('#!/bin/sh\nfor word in "$@"; do echo "<$word>"; done\n')
    tool.chmod(0o755)
    return subprocess.run(
        ["sh", str(folder / "quantize.sh"), *arguments],
        capture_output=True,
        text=True,
        check=False,
        env={"PATH": "/usr/bin:/bin", "LLAMA_QUANTIZE": str(tool)},
    )


def test_the_script_gives_the_list_and_a_quantised_base_that_is_not_in_it(tmp_path: Path) -> None:
    folder = tmp_path / "a $(folder)"
    LlamaCpp().write(llama_plan(LLAMA), folder)
    done = run_script(folder, tmp_path, "in put.gguf", "$(touch x).gguf")
    assert done.stdout.splitlines() == [
        "<--tensor-type-file>",
        f"<{folder / 'tensor-types.txt'}>",
        "<in put.gguf>",
        "<$(touch x).gguf>",
        "<Q4_1>",
    ]
    assert run_script(folder, tmp_path, "one").returncode == 2
    LlamaCpp().write(llama_plan({"lm_head": "bf16"}), tmp_path / "b")
    assert run_script(tmp_path / "b", tmp_path, "i", "o").stdout.splitlines()[-1] == "<Q8_0>"


HOSTILE = [
    "../../etc/passwd",
    "/etc/passwd",
    "a; touch owned",
    "$(touch owned)",
    "`touch owned`",
    "a\nlm_head=f32",
    "model.layers.0.self_attn.q_proj\n",
    ".*",
    "model.layers.0.mlp.(up|down)_proj",
    "model.layers.99999999999999999999.mlp.up_proj",
    "model.layers.999999.mlp.up_proj",
    "x\0y",
    "",
]


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_names_are_refused_or_only_data(name: str, tmp_path: Path) -> None:
    plan = llama_plan({"lm_head": "bf16", name: "bf16"}, **{name: {"kind": "linear"}})
    plan = BitPlan(plan.layers, plan.formats, {**plan.model, "name": name, "digest": name})
    assert [line.startswith(f"{name}: ") for line in LlamaCpp().refuses(plan)] == [True]
    with pytest.raises(InputError) as caught:
        LlamaCpp().write(plan, tmp_path / "llama")
    assert caught.value.code == "E301"
    # Natively any text can name a tensor: it stays in the JSON.
    Native().write(plan, tmp_path / "native")
    assert Native().read(tmp_path / "native")[0] == plan
    assert {path.name for path in tmp_path.rglob("*")} == {"native", PLAN, MANIFEST}


def test_hostile_model_names_stay_out_of_the_script(tmp_path: Path) -> None:
    plan = llama_plan({"lm_head": "bf16"})
    named = BitPlan(plan.layers, plan.formats, {**plan.model, "name": "x\n$(touch owned)", "digest": "`id`"})
    LlamaCpp().write(named, tmp_path / "a")
    LlamaCpp().write(plan, tmp_path / "b")
    for file in ("quantize.sh", "tensor-types.txt"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


@pytest.mark.parametrize(
    "text", ["output=q8_0\n", "^output\\.weight$=\n", "^a$=f32\n^a$=f16\n", "^a.b$=f32\n", "^a$=f32 ^b$=f32\n", "\n"]
)
def test_a_list_that_is_not_ours_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "t.txt").write_text(text)
    with pytest.raises(InputError, match=r"t\.txt:\d: not one exact name"):
        read_tensor_types(tmp_path / "t.txt")
    with pytest.raises(MpsearchError, match="cannot be read"):
        read_tensor_types(tmp_path / "none.txt")


def test_the_page_on_exports_lists_what_llama_cpp_holds() -> None:
    page = (ROOT / "docs/exports.md").read_text()
    assert all(f"`{text}`" in page and f"`{kind}`" in page for text, kind in PLAIN_TYPES.items())


def test_kv_caches_have_no_place_in_the_file() -> None:
    weight = Layer("model.layers.0.mlp.up_proj", "linear", (8, 256))
    cache = Layer("model.layers.0.self_attn.k_cache", "kv_cache", (2, 64))
    layers = Layers((weight, cache))

    def plan(fmt: str) -> BitPlan:
        return BitPlan(layers, {weight.name: Format.parse("q4_K"), cache.name: Format.parse(fmt)})

    exporter = LlamaCpp("LlamaForCausalLM")
    assert exporter.refuses(plan("kv-bf16")) == []
    (problem,) = exporter.refuses(plan("kv-int8-token"))
    assert problem.startswith("model.layers.0.self_attn.k_cache: kv-int8-token has no place in GGUF")
