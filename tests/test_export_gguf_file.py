"""The GGUF export: the gguf package reads the plan's own blocks back, in llama.cpp's order, to the byte."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gguf
import numpy as np
import pytest
import torch

from mpsearch.bundled import bundled_model
from mpsearch.capabilities import capabilities
from mpsearch.errors import InputError, ResourceError
from mpsearch.exports import gguf_file
from mpsearch.exports.gguf_file import GgufFile
from mpsearch.exports.gguf_metadata import problems, rope_factors, row_order
from mpsearch.exports.gguf_place import PLAIN_TYPES
from mpsearch.exports.gguf_tokenizer import add_tokenizer, pre_tokenizer
from mpsearch.exports.llama_cpp import LlamaCpp
from mpsearch.exports.proof_run import proofs
from mpsearch.exports.verify import verify
from mpsearch.format import Format
from mpsearch.formats.gguf_types import GgufType
from mpsearch.hardware.containers import kept_bytes, stored_bytes
from mpsearch.layer import Excluded, Layer, Layers
from mpsearch.model.find import find_layers
from mpsearch.model.model import Model, as_model, load_model
from mpsearch.model.quantize import fake_quantize
from mpsearch.plan import BitPlan
from mpsearch.testing.exporters import ExporterSuite

ROOT = Path(__file__).resolve().parents[1]
FORMATS = ("q4_K", "q6_K", "q8_0", "iq4_xs", "q3_K", "q5_0", "bf16")
#: Heads of queries and of keys in the small model.
HEADS = {"q_proj": 4, "k_proj": 2}
PARTS = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
}  # fmt: skip
ENDS = {"model.embed_tokens": "token_embd", "lm_head": "output", "model.norm": "output_norm"}


def gguf_name(tensor: str) -> str:
    """What the file calls a tensor of the small model."""
    module, _, end = tensor.rpartition(".")
    if module in ENDS:
        return f"{ENDS[module]}.{end}"
    number, _, part = module.removeprefix("model.layers.").partition(".")
    return f"blk.{number}.{PARTS[part]}.{end}"


def turned(tensor: str, rows: Any) -> Any:
    """The rows of queries and keys as llama.cpp has them: channel i of a head's first half, then of its second."""
    heads = next((count for part, count in HEADS.items() if part in tensor), 0)
    if not heads:
        return rows
    width = len(rows) // heads
    return rows[[head * width + half * (width // 2) + i
                 for head in range(heads) for i in range(width // 2) for half in (0, 1)]]  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small Llama with biases and norms that are not one, in bf16."""
    import transformers

    torch.manual_seed(7)
    config = transformers.LlamaConfig(
        vocab_size=61, hidden_size=256, intermediate_size=256, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, head_dim=64, max_position_embeddings=128, initializer_range=0.1,
        attention_bias=True, tie_word_embeddings=False,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias") or "norm" in name:
                parameter.normal_(std=0.5)
    where = tmp_path_factory.mktemp("llama")
    model.to(torch.bfloat16).save_pretrained(where)
    return where


@pytest.fixture(scope="module")
def model(folder: Path) -> Model:
    return load_model(folder)


def planned(model: Model, formats: Sequence[str] = FORMATS) -> BitPlan:
    layers = find_layers(model)
    chosen = {layer.name: Format.parse(formats[n % len(formats)]) for n, layer in enumerate(layers)}
    return BitPlan(layers, chosen, {"name": "small", "digest": model.digest, "architecture": model.architecture})


def read(folder: Path) -> dict[str, Any]:
    """The file's tensors, by name."""
    return {tensor.name: tensor for tensor in gguf.GGUFReader(folder / "model.gguf").tensors}


def says(path: Path) -> dict[str, Any]:
    """The file's metadata."""
    return {name: field.contents() for name, field in gguf.GGUFReader(path).fields.items() if "GGUF." not in name}


class TestGgufFile(ExporterSuite):
    @pytest.fixture
    def exporter(self, folder: Path) -> GgufFile:
        return GgufFile(source=str(folder), tokenizer="none")

    @pytest.fixture
    def plan(self, model: Model) -> BitPlan:
        return planned(model)

    @pytest.fixture
    def refused(self, model: Model) -> tuple[BitPlan, Sequence[str]]:
        plan = planned(model)
        wrong = [layer.name for layer in plan.layers if "_proj" in layer.name]
        return BitPlan(plan.layers, {**plan.formats, **dict.fromkeys(wrong, Format.parse("int3-g64"))}, plan.model), (
            sorted(wrong, key=lambda name: list(PARTS).index(name.removeprefix("model.layers.0.")))
        )

    def read_back(self, folder: Path, plan: BitPlan) -> Mapping[str, str]:
        ours = {theirs: text for text, theirs in PLAIN_TYPES.items()} | {t.lower(): t for t in GgufType.examples}
        held = read(folder)
        return {layer.name: ours[held[gguf_name(layer.tensor)].tensor_type.name.lower()] for layer in plan.layers}


def test_the_weights_are_those_of_the_simulation_in_llama_cpps_order(
    folder: Path, model: Model, tmp_path: Path
) -> None:
    plan = planned(model)
    GgufFile(source=str(folder), tokenizer="none").write(plan, tmp_path)
    held = read(tmp_path)
    for layer in plan.layers:
        weight = model.module.get_parameter(layer.tensor).detach().float()
        wanted = turned(layer.tensor, fake_quantize(weight, plan.formats[layer.name]).numpy())
        found = held.pop(gguf_name(layer.tensor))
        assert np.array_equal(gguf.quants.dequantize(found.data, found.tensor_type), wanted), layer.name
    for kept in plan.layers.excluded:
        found = held.pop(gguf_name(kept.name))
        assert found.tensor_type.name == "F32"
        assert np.array_equal(found.data, turned(kept.name, model.module.get_parameter(kept.name).detach().numpy()))
    assert held == {}


def test_the_bytes_are_those_of_the_target(folder: Path, model: Model, tmp_path: Path) -> None:
    plan = planned(model)
    GgufFile(source=str(folder), tokenizer="none").write(plan, tmp_path)
    tensors = sum(sum(stored_bytes(plan.formats[layer.name], layer, "gguf").values()) for layer in plan.layers)
    kept = sum(kept_bytes(each, "gguf") for each in plan.layers.excluded)
    held = read(tmp_path).values()
    assert sum(tensor.n_bytes for tensor in held) == tensors + kept
    start = gguf.GGUFReader(tmp_path / "model.gguf").data_offset
    size = (tmp_path / "model.gguf").stat().st_size
    assert 0 <= size - start - tensors - kept < 32 * len(held)


def test_the_metadata_is_the_converters(folder: Path, model: Model, tmp_path: Path) -> None:
    plan = planned(model)
    GgufFile(source=str(folder), tokenizer="none").write(plan, tmp_path)
    assert says(tmp_path / "model.gguf") == {
        "general.architecture": "llama",
        "general.name": "small",
        "general.type": "model",
        "general.quantization_version": 2,
        "llama.block_count": 1,
        "llama.context_length": 128,
        "llama.embedding_length": 256,
        "llama.feed_forward_length": 256,
        "llama.attention.head_count": 4,
        "llama.attention.head_count_kv": 2,
        "llama.attention.layer_norm_rms_epsilon": pytest.approx(1e-6),
        "llama.attention.key_length": 64,
        "llama.attention.value_length": 64,
        "llama.vocab_size": 61,
        "llama.rope.dimension_count": 64,
        "llama.rope.freq_base": 10000.0,
        "tokenizer.ggml.model": "none",
        "mpsearch.plan": plan.key,
    }


def test_a_tied_head_is_left_out_and_a_given_model_will_do(tmp_path: Path) -> None:
    module = llama_like("Qwen3", tie=True)
    plan = planned(module, ["q8_0"])
    GgufFile(tokenizer="none").write(plan, tmp_path, module)
    held = read(tmp_path)
    assert held["token_embd.weight"].tensor_type.name == "Q8_0"
    assert "output.weight" not in held
    assert {"blk.0.attn_q_norm.weight", "blk.0.attn_k_norm.weight"} <= set(held)
    # Only the architecture llama has its rows in another order.
    wanted = fake_quantize(
        module.module.get_parameter("model.layers.0.self_attn.q_proj.weight").detach(), Format.parse("q8_0")
    )
    found = held["blk.0.attn_q.weight"]
    assert np.array_equal(gguf.quants.dequantize(found.data, found.tensor_type), wanted.numpy())
    assert says(tmp_path / "model.gguf")["qwen3.attention.key_length"] == 16


def llama_like(architecture: str, tie: bool = False, **settings: Any) -> Model:
    import transformers

    torch.manual_seed(3)
    config = getattr(transformers, f"{architecture}Config")(
        vocab_size=40, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, tie_word_embeddings=tie, **({"head_dim": 16} if architecture != "Starcoder2" else {}),
        **settings,
    )  # fmt: skip
    return as_model(getattr(transformers, f"{architecture}ForCausalLM")(config))


def test_llama_3s_rotary_factors_are_those_of_transformers(tmp_path: Path) -> None:
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    rope = {
        "rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 256,
    }  # fmt: skip
    model = llama_like("Llama", rope_parameters=rope)
    config: Any = model.module.config
    wanted, _ = ROPE_INIT_FUNCTIONS["llama3"](config, device=torch.device("cpu"))
    base = 10000.0 ** -(np.arange(0, 16, 2) / 16)
    found = rope_factors(config.to_dict())
    assert found is not None
    assert len(set(found.tolist())) > 2
    assert np.allclose(base / found, wanted.numpy(), rtol=1e-5)
    GgufFile(tokenizer="none").write(planned(model, ["q8_0"]), tmp_path, model)
    assert np.array_equal(read(tmp_path)["rope_freqs.weight"].data, found)


@pytest.mark.parametrize(
    ("rope", "wanted"),
    [
        ({"rope_type": "linear", "factor": 4.0}, {"scaling.type": "linear", "scaling.factor": 4.0}),
        (
            {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 32, "beta_fast": 16.0},
            {
                "scaling.type": "yarn", "scaling.factor": 2.0, "scaling.original_context_length": 32,
                "scaling.yarn_beta_fast": 16.0,
            },
        ),
    ],
)  # fmt: skip
def test_scaled_positions_are_said(rope: dict[str, Any], wanted: dict[str, Any], tmp_path: Path) -> None:
    model = llama_like("Llama", rope_parameters={"rope_theta": 500.0, **rope})
    GgufFile(tokenizer="none").write(planned(model, ["q8_0"]), tmp_path, model)
    found = {key: value for key, value in says(tmp_path / "model.gguf").items() if ".rope.scaling" in key}
    assert found == {f"llama.rope.{key}": value for key, value in wanted.items()}


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu', and llama.cpp computes silu"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope type 'dynamic' is not written here"),
        ({"partial_rotary_factor": 0.5}, "turns a part of each head alone"),
        ({"num_local_experts": 8}, "experts"),
    ],
)
def test_models_that_llama_cpp_would_compute_otherwise_are_refused(config: dict[str, Any], reason: str) -> None:
    assert len(problems(config, "LlamaForCausalLM")) == 1
    assert reason in problems(config, "LlamaForCausalLM")[0]
    assert problems({"hidden_act": "silu", "rope_theta": 1e6, "rope_scaling": None}, "LlamaForCausalLM") == []


def test_heads_of_qwen2_must_fill_the_hidden_size() -> None:
    config = {"num_attention_heads": 4, "head_dim": 32, "hidden_size": 64}
    assert problems(config, "Qwen2ForCausalLM")[0].startswith("4 heads of 32 are not the hidden size")
    assert problems(config, "Qwen3ForCausalLM") == problems({**config, "head_dim": 16}, "Qwen2ForCausalLM") == []


def test_such_a_model_stops_the_export_before_a_file_is_there(tmp_path: Path) -> None:
    model = llama_like("Llama", hidden_act="gelu")
    with pytest.raises(InputError, match="hidden_act is 'gelu'") as caught:
        GgufFile(tokenizer="none").write(planned(model, ["q8_0"]), tmp_path / "out", model)
    assert caught.value.code == "E301"
    assert "base=FILE" in caught.value.advice
    assert list(tmp_path.iterdir()) == []


def test_rows_of_other_architectures_stay() -> None:
    config = {"num_attention_heads": 4, "num_key_value_heads": 2}
    assert row_order("blk.0.attn_q.weight", 32, config, "Qwen2ForCausalLM") is None
    assert row_order("blk.0.attn_v.weight", 32, config, "LlamaForCausalLM") is None
    assert row_order("blk.0.attn_q_norm.weight", 32, config, "LlamaForCausalLM") is None
    keys = row_order("blk.0.attn_k.bias", 8, config, "MistralForCausalLM")
    assert keys is not None
    assert keys.tolist() == [0, 2, 1, 3, 4, 6, 5, 7]


CLIP = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}
CUT = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}
#: As the tokenizers of these models have them.
LLAMA3 = (
    "(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|\\p{N}{1,3}| ?[^\\s\\p{L}\\p{N}]+[\\r\\n]*"
    "|\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+"
)
TEKKEN = (
    "[^\\r\\n\\p{L}\\p{N}]?[\\p{Lu}\\p{Lt}\\p{Lm}\\p{Lo}\\p{M}]*[\\p{Ll}\\p{Lm}\\p{Lo}\\p{M}]+"
    "|[^\\r\\n\\p{L}\\p{N}]?[\\p{Lu}\\p{Lt}\\p{Lm}\\p{Lo}\\p{M}]+[\\p{Ll}\\p{Lm}\\p{Lo}\\p{M}]*|\\p{N}"
    "| ?[^\\s\\p{L}\\p{N}]+[\\r\\n/]*|\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+"
)


def split(pattern: str, behavior: str = "Isolated") -> dict[str, Any]:
    cut = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": behavior, "invert": False}
    return {"type": "Sequence", "pretokenizers": [cut, CLIP]}


def bpe(steps: Mapping[str, Any], normalizer: str = "", **model: Any) -> dict[str, Any]:
    return {
        "model": {"type": "BPE", **model}, "pre_tokenizer": steps,
        "normalizer": {"type": normalizer} if normalizer else None,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("body", "name"),
    [
        (bpe(CUT), "gpt-2"),
        (bpe(split(LLAMA3), ignore_merges=True), "llama-bpe"),
        (bpe(split(LLAMA3.replace("{1,3}", "")), "NFC"), "qwen2"),
        (bpe(split(TEKKEN), ignore_merges=True), "tekken"),
        (
            bpe({"type": "Sequence", "pretokenizers": [{"type": "Digits", "individual_digits": True}, CUT]}),
            "smollm",
        ),
    ],
)
def test_ways_of_cutting_text_have_llama_cpps_names(body: Mapping[str, Any], name: str) -> None:
    assert pre_tokenizer(body) == name


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (bpe(CUT, byte_fallback=True), "it is not byte-level BPE"),
        ({"model": {"type": "Unigram"}}, "it is not byte-level BPE (model type 'Unigram')"),
        (bpe(CUT, "Lowercase"), "it changes text by Lowercase, which gpt-2 does not"),
        (bpe(split(LLAMA3)), "ignore_merges is False, and llama-bpe has it the other way"),
        (bpe(split("\\w+")), "its way of cutting text is not known here"),
        (bpe(split(LLAMA3, "Removed"), ignore_merges=True), "its way of cutting text is not known here"),
        (bpe({**CUT, "add_prefix_space": True}), "its way of cutting text is not known here"),
        (bpe(CUT, end_of_word_suffix="</w>"), "its tokens have a prefix or a suffix"),
    ],
)
def test_other_tokenizers_are_refused_with_what_to_do(body: Mapping[str, Any], reason: str) -> None:
    with pytest.raises(InputError) as caught:
        pre_tokenizer(body)
    assert caught.value.code == "E301"
    assert reason in caught.value.message
    assert "convert_hf_to_gguf.py" in caught.value.advice


def tokenizer_file(folder: Path, **changes: Any) -> Path:
    body = {
        "model": {"type": "BPE", "vocab": {"a": 0, "b": 1, "ab": 2}, "merges": [["a", "b"]]}, "pre_tokenizer": CUT,
        "added_tokens": [
            {"id": 3, "content": "<s>", "special": True},
            {"id": 5, "content": "<|tool|>", "special": False},
            {"id": 6, "content": "word", "special": False},
        ],
        **changes,
    }  # fmt: skip
    (folder / "tokenizer.json").write_text(json.dumps(body))
    (folder / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<s>", "chat_template": "{{ 'x' }}"}))
    return folder


def test_tokens_are_named_and_sorted_by_kind(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(None, "llama")
    add_tokenizer(writer, tokenizer_file(tmp_path), 8)
    found = {key: value.value for key, value in writer.kv_data[0].items() if key.startswith("tokenizer.")}
    assert found == {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": ["a", "b", "ab", "<s>", "[PAD4]", "<|tool|>", "word", "[PAD7]"],
        "tokenizer.ggml.token_type": [1, 1, 1, 3, 5, 3, 4, 5],
        "tokenizer.ggml.merges": ["a b"],
        "tokenizer.ggml.bos_token_id": 3,
        "tokenizer.chat_template": "{{ 'x' }}",
    }


def test_tokens_without_a_row_and_a_missing_tokenizer_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="it has 7 tokens, and the embedding has 6 rows"):
        add_tokenizer(gguf.GGUFWriter(None, "llama"), tokenizer_file(tmp_path), 6)
    with pytest.raises(InputError, match=r"the folder has no tokenizer\.json") as caught:
        add_tokenizer(gguf.GGUFWriter(None, "llama"), tmp_path / "none", 6)
    assert "base=FILE" in caught.value.advice


def test_a_model_of_no_folder_has_no_tokenizer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Not that of the folder in which the program happens to run.
    monkeypatch.chdir(tokenizer_file(tmp_path))
    model = llama_like("Llama")
    with pytest.raises(InputError, match="the model is of no folder"):
        GgufFile().write(planned(model, ["q8_0"]), tmp_path / "out", model)


def test_a_wrong_setting_is_refused(folder: Path, model: Model, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="tokenizer: 'mine' is not known"):
        GgufFile(source=str(folder), tokenizer="mine").write(planned(model), tmp_path / "out")


# A file of llama.cpp's converter as the base.


@pytest.fixture(scope="module")
def base(folder: Path, model: Model, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small model in 32 bits, as the converter writes it, with a key that is known to nobody here."""
    out = tmp_path_factory.mktemp("base")
    GgufFile(source=str(folder), tokenizer="none").write(planned(model, ["fp32"]), out)
    reader = gguf.GGUFReader(out / "model.gguf")
    writer = gguf.GGUFWriter(out / "base.gguf", "llama")
    for key, value in {"a.list": [1, 2, 3], "a.text": "caf\u00e9", "tokenizer.ggml.tokens": ["x", "\u00ff"]}.items():
        (writer.add_array if isinstance(value, list) else writer.add_string)(key, value)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, np.array(tensor.data))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return out / "base.gguf"


def test_a_base_gives_the_same_tensors_and_says_the_rest(
    folder: Path, model: Model, base: Path, tmp_path: Path
) -> None:
    plan = planned(model)
    GgufFile(source=str(folder), tokenizer="none").write(plan, tmp_path / "own")
    GgufFile(source=str(folder), base=str(base)).write(plan, tmp_path / "based")
    own, based = read(tmp_path / "own"), read(tmp_path / "based")
    assert set(own) == set(based)
    for name, tensor in own.items():
        assert tensor.tensor_type == based[name].tensor_type
        assert tensor.data.tobytes() == based[name].data.tobytes(), name
    assert says(tmp_path / "based" / "model.gguf") == {
        "general.architecture": "llama",
        "a.list": [1, 2, 3],
        "a.text": "caf\u00e9",
        "tokenizer.ggml.tokens": ["x", "\u00ff"],
        "mpsearch.plan": plan.key,
    }


def test_a_base_serves_architectures_that_are_not_written_here(tmp_path: Path) -> None:
    model = llama_like("Starcoder2", tie=True)
    plan = planned(model, ["q8_0", "q4_0", "fp16"])
    assert GgufFile().refuses(plan)[0].startswith("model: what GGUF says of Starcoder2ForCausalLM is not known here")
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.STARCODER2, 1)
    writer = gguf.GGUFWriter(tmp_path / "base.gguf", "starcoder2")
    # The converter of this architecture keeps the order; here rows are reversed, as a converter might.
    for name, parameter in model.module.named_parameters():
        writer.add_tensor(names.get_name(name, (".weight", ".bias")) or "", parameter.detach().flip(0).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    GgufFile(base=str(tmp_path / "base.gguf")).write(plan, tmp_path / "out", model)
    held = read(tmp_path / "out")
    assert len(held) == len(plan.layers) + len(plan.layers.excluded)
    for layer in plan.layers:
        wanted = fake_quantize(model.module.get_parameter(layer.tensor).detach(), plan.formats[layer.name]).flip(0)
        found = held[names.get_name(layer.tensor, (".weight",)) or ""]
        assert np.array_equal(gguf.quants.dequantize(found.data, found.tensor_type), wanted.numpy()), layer.name


@pytest.mark.parametrize(
    ("change", "code", "reason"),
    [
        (lambda tensors: tensors["blk.0.attn_q.weight"].__setitem__((5, 7), 9.0), "E302", "row 5 of 'blk.0.attn_q.w"),
        (lambda tensors: tensors.pop("blk.0.ffn_up.weight"), "E302", "no tensor 'blk.0.ffn_up.weight'"),
        (lambda tensors: tensors.update({"output.weight": np.zeros((61, 32), np.float32)}), "E302", "has shape (61,"),
    ],
)  # fmt: skip
def test_a_base_of_another_model_is_refused(
    change: Callable[[dict[str, Any]], Any], code: str, reason: str, folder: Path, model: Model, base: Path,
    tmp_path: Path,
) -> None:  # fmt: skip
    tensors = {tensor.name: np.array(tensor.data) for tensor in gguf.GGUFReader(base).tensors}
    change(tensors)
    writer = gguf.GGUFWriter(tmp_path / "b.gguf", "llama")
    for name, data in tensors.items():
        writer.add_tensor(name, data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(InputError) as caught:
        GgufFile(source=str(folder), base=str(tmp_path / "b.gguf")).write(planned(model), tmp_path / "out")
    assert caught.value.code == code
    assert reason in caught.value.message
    assert not (tmp_path / "out" / "model.gguf").exists()


def test_a_base_that_cannot_serve_is_refused(folder: Path, model: Model, base: Path, tmp_path: Path) -> None:
    def refusal(path: Path, plan: BitPlan) -> str:
        with pytest.raises(InputError) as caught:
            GgufFile(source=str(folder), base=str(path)).write(plan, tmp_path / "out")
        return f"{caught.value.code} {caught.value.message}"

    plan = planned(model)
    assert refusal(tmp_path / "none.gguf", plan).startswith("E101 base: there is no file")
    (tmp_path / "text.gguf").write_text("no GGUF file at all")
    assert "is no GGUF file" in refusal(tmp_path / "text.gguf", plan)
    GgufFile(source=str(folder), tokenizer="none").write(plan, tmp_path / "rounded")
    assert "rounding starts from plain numbers" in refusal(tmp_path / "rounded" / "model.gguf", plan)
    writer = gguf.GGUFWriter(tmp_path / "qwen.gguf", "qwen2")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    assert "is of qwen2, the plan of llama" in refusal(tmp_path / "qwen.gguf", plan)


# Names and models that are not what they seem.


@pytest.mark.parametrize("name", ["../../etc/passwd", ".*", "a\nb", "model.layers.(0|1).mlp.up_proj", "é" * 300, ""])
def test_hostile_names_are_refused_by_name(name: str, tmp_path: Path) -> None:
    layers = Layers((Layer("lm_head", "linear", (64, 96)), Layer(name, "linear", (64, 96))))
    plan = BitPlan(layers, dict.fromkeys(("lm_head", name), Format.parse("bf16")), {"architecture": "LlamaForCausalLM"})
    found = GgufFile().refuses(plan)
    assert [line.startswith(f"{name}: ") for line in found] == [True]
    with pytest.raises(InputError):
        GgufFile().write(plan, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_hostile_model_name_is_only_text(folder: Path, model: Model, tmp_path: Path) -> None:
    plan = planned(model)
    named = BitPlan(plan.layers, plan.formats, {**plan.model, "name": "x\n$(touch owned)`id`"})
    GgufFile(source=str(folder), tokenizer="none").write(named, tmp_path / "a")
    GgufFile(source=str(folder), tokenizer="none").write(plan, tmp_path / "b")
    assert says(tmp_path / "a" / "model.gguf")["general.name"] == "x\n$(touch owned)`id`"
    assert (tmp_path / "a" / "run.sh").read_bytes() == (tmp_path / "b" / "run.sh").read_bytes()


def test_kept_tensors_without_a_place_are_refused_and_computed_ones_left_out(model: Model) -> None:
    plan = planned(model)
    more = (
        Excluded("model.strange", (4,), "float32", "1-D"),
        Excluded("model.layers.0.self_attn.rotary_emb.inv_freq", (4,), "float32", "1-D"),
    )
    layers = Layers(tuple(plan.layers), (*plan.layers.excluded, *more))
    found = GgufFile().refuses(BitPlan(layers, plan.formats, plan.model))
    assert found == ["model.strange: cannot be kept as it is: LlamaForCausalLM has no tensor of this name in GGUF"]


def test_the_script_runs_the_file_beside_it(folder: Path, model: Model, tmp_path: Path) -> None:
    out = tmp_path / "a $(folder)"
    GgufFile(source=str(folder), tokenizer="none").write(planned(model), out)
    tool = tmp_path / "fake completion"
    tool.write_text('#!/bin/sh\nfor word in "$@"; do echo "<$word>"; done\n')
    tool.chmod(0o755)
    done = subprocess.run(
        ["sh", str(out / "run.sh"), "--prompt", "a b"], capture_output=True, text=True, check=True,
        env={"PATH": "/usr/bin:/bin", "LLAMA_COMPLETION": str(tool)},
    )  # fmt: skip
    assert done.stdout.splitlines() == ["<--model>", f"<{out / 'model.gguf'}>", "<--prompt>", "<a b>"]


def test_the_table_says_what_the_exporter_holds() -> None:
    able, layer = capabilities("gguf"), Layer("model.layers.0.mlp.up_proj", "linear", (64, 256))
    for text in (*GgufType.examples, "bf16", "int4-g32", "nf4-b64"):
        fmt = Format.parse(text)
        plan = BitPlan(Layers((layer,)), {layer.name: fmt}, {"architecture": "LlamaForCausalLM"})
        assert bool(GgufFile().refuses(plan)) == bool(able.refuses(layer, fmt)), text


# Proofs.


def test_the_gguf_package_reads_the_bundled_model_back(tmp_path: Path) -> None:
    source = bundled_model()
    plan = planned(load_model(source), ["q4_K", "q6_K", "q8_0", "iq4_xs"])
    GgufFile(source=str(source)).write(plan, tmp_path)
    found = verify("gguf", plan, tmp_path, str(source))
    assert found.passed
    assert found.tensors == len(plan.layers) + len(plan.layers.excluded)
    assert found.bytes == plan.bytes + sum(2 * each.weights for each in plan.layers.excluded)
    # The converter's own reading of these files.
    said = says(tmp_path / "model.gguf")
    body = json.loads((source / "tokenizer.json").read_text(encoding="utf-8"))
    assert said["tokenizer.ggml.tokens"] == [
        word for word, _ in sorted(body["model"]["vocab"].items(), key=lambda x: x[1])
    ]
    assert said["tokenizer.ggml.merges"] == [" ".join(pair) for pair in body["model"]["merges"]]
    assert said["tokenizer.ggml.token_type"] == [3, *[1] * 4095]
    assert (said["tokenizer.ggml.pre"], said["tokenizer.ggml.eos_token_id"]) == ("gpt-2", 0)


def test_unturned_heads_are_caught(folder: Path, model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = planned(model, ["q8_0"])
    monkeypatch.setattr(gguf_file, "row_order", lambda *_: None)
    GgufFile(source=str(folder), tokenizer="none").write(plan, tmp_path)
    with pytest.raises(InputError, match=r"blk\.0\.attn_q\.weight \(Q8_0\): block \d+ is moved by 1\.") as caught:
        verify("gguf", plan, tmp_path, str(folder))
    assert caught.value.code == "E306"
    assert "blk.0.attn_k.weight" in caught.value.message
    assert "attn_v" not in caught.value.message


def test_one_changed_scale_is_caught(folder: Path, model: Model, tmp_path: Path) -> None:
    plan = planned(model, ["q4_0"])
    GgufFile(source=str(folder), tokenizer="none").write(plan, tmp_path)
    place = int(read(tmp_path)["blk.0.ffn_up.weight"].data_offset) + 100 * 18
    octets = bytearray((tmp_path / "model.gguf").read_bytes())
    # The exponent of an fp16 scale: twice as large.
    octets[place + 1] += 4
    (tmp_path / "model.gguf").write_bytes(bytes(octets))
    with pytest.raises(InputError, match=r"blk\.0\.ffn_up\.weight \(Q4_0\): block 100 is moved by"):
        verify("gguf", plan, tmp_path, str(folder))


def quantize_program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, result: Path) -> None:
    """A llama-quantize that answers with a file that was made before."""
    tool = tmp_path / "llama-quantize"
    tool.write_text(f'#!/bin/sh\necho "build = 7 (abc)"\ncp "{result}" "$4"\n')
    tool.chmod(0o755)
    monkeypatch.setenv("LLAMA_QUANTIZE", str(tool))
    monkeypatch.setenv("LLAMA_BASE_GGUF", str(result))


def test_the_list_of_types_is_proved_by_what_llama_quantize_makes(
    folder: Path, model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert {"gguf", "llama.cpp"} <= set(proofs())
    plan, other = planned(model), planned(model, ["q8_0"])
    LlamaCpp().write(plan, tmp_path / "list")
    for name, each in {"good": plan, "bad": other}.items():
        GgufFile(source=str(folder), tokenizer="none").write(each, tmp_path / name)
    quantize_program(tmp_path, monkeypatch, tmp_path / "good" / "model.gguf")
    found = verify("llama.cpp", plan, tmp_path / "list", str(folder))
    assert found.passed
    assert (found.library, found.version) == ("llama-quantize", "7 (abc)")
    assert found.tensors == len(plan.layers) + len(plan.layers.excluded)
    quantize_program(tmp_path, monkeypatch, tmp_path / "bad" / "model.gguf")
    with pytest.raises(InputError, match=r"token_embd\.weight is not q4_k"):
        verify("llama.cpp", plan, tmp_path / "list", str(folder))
    monkeypatch.setenv("LLAMA_QUANTIZE", str(tmp_path / "none"))
    with pytest.raises(ResourceError, match="there is no llama-quantize"):
        verify("llama.cpp", plan, tmp_path / "list", str(folder))


def test_the_page_lists_what_is_held() -> None:
    page = (ROOT / "docs/exports/gguf.md").read_text(encoding="utf-8")
    assert all(f"`{text}`" in page for text in (*GgufType.examples, *PLAIN_TYPES))


def test_a_model_of_another_folder_is_refused(model: Model, tmp_path: Path) -> None:
    bare = SimpleNamespace(module=llama_like("Llama").module)
    with pytest.raises(InputError) as caught:
        GgufFile(tokenizer="none").write(planned(model), tmp_path / "out", bare)
    assert caught.value.code == "E302"
