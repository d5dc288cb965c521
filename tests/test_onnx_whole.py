"""Whole models in ONNX Runtime: the same numbers as the model's own, and as the plan's simulation; time and memory."""

from __future__ import annotations

import mmap
import os
import sys
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from onnx import helper, numpy_helper

from mpsearch.errors import InputError
from mpsearch.format import Format
from mpsearch.hardware.clock import Clock
from mpsearch.hardware.onnx_export import export
from mpsearch.hardware.onnx_graph import Graph
from mpsearch.hardware.onnx_plan import build, weights_bytes
from mpsearch.hardware.whole import run_whole
from mpsearch.hardware.whole_child import memory
from mpsearch.layer import Layer, Layers
from mpsearch.model.apply import applied
from mpsearch.model.find import find_layers
from mpsearch.model.model import Model
from mpsearch.plan import BitPlan
from mpsearch.workload import Step
from tests.tiny_models import tiny, tiny_experts, tokens

#: Differences are told as a share of the largest logit.
SAME = 1e-4
PROMPT = Step(20, 0, 2)


def gpt2(**settings: Any) -> Model:
    import transformers

    torch.manual_seed(7)
    config = transformers.GPT2Config(
        vocab_size=61, n_embd=64, n_layer=2, n_head=4, n_positions=64, initializer_range=0.25, bos_token_id=1,
        eos_token_id=1, **settings,
    )  # fmt: skip
    return Model(transformers.GPT2LMHeadModel(config), tokens=True)


def opt() -> Model:
    import transformers

    torch.manual_seed(7)
    config = transformers.OPTConfig(
        vocab_size=61, hidden_size=64, ffn_dim=48, num_hidden_layers=2, num_attention_heads=4, init_std=0.25,
        max_position_embeddings=64, word_embed_proj_dim=64,
    )  # fmt: skip
    return Model(transformers.OPTForCausalLM(config), tokens=True)


MODELS: Mapping[str, Callable[[], Model]] = {
    "Llama": tiny,
    "Qwen 2, tied": lambda: tiny("Qwen2", tie_word_embeddings=True),
    "Qwen 3": lambda: tiny("Qwen3"),
    "Gemma 2, with windows": lambda: tiny("Gemma2", sliding_window=6, query_pre_attn_scalar=8),
    "GPT-2": gpt2,
    "OPT": opt,
    "GPT-NeoX": lambda: tiny("GPTNeoX"),
}


@cache
def made(name: str) -> Model:
    model = MODELS[name]()
    # Biases and norms that are not 0 and 1 alone: these would be right in any order.
    noise = torch.Generator().manual_seed(9)
    with torch.no_grad():
        for parameter in model.module.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn(parameter.shape, generator=noise), alpha=0.1)
    model.refresh()
    return model


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Name of a model -> its export for `PROMPT`."""
    folder = tmp_path_factory.mktemp("exported")

    @cache
    def exported(name: str) -> Path:
        path = folder / name / "prompt.onnx"
        export(made(name), PROMPT, path)
        return path

    return exported


def run(proto: Any, feed: Mapping[str, Any]) -> dict[str, Any]:
    """Run a file or a ModelProto on one thread."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    source = str(proto) if isinstance(proto, Path) else proto.SerializeToString()
    session = ort.InferenceSession(source, options, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(None, dict(feed)), strict=True))


def last_logits(model: Model, ids: Any) -> Any:
    with torch.no_grad():
        return model.module(input_ids=ids, use_cache=False, logits_to_keep=1).logits.numpy()


def difference(found: Any, expected: Any) -> float:
    assert found.shape == expected.shape
    return float(np.abs(found - expected).max() / np.abs(expected).max())


@pytest.mark.parametrize("name", MODELS)
def test_an_export_gives_the_models_own_logits_for_a_prompt_and_for_the_token_after_it(
    name: str, prompts: Callable[[str], Path], tmp_path: Path
) -> None:
    model, ids = made(name), tokens(2, 21)["input_ids"]
    before = model.module.config._attn_implementation
    prefill = run(prompts(name), {"input_ids": ids[:, :20].numpy()})
    assert difference(prefill["logits"], last_logits(model, ids[:, :20])) < SAME

    export(model, Step(1, 20, 2), tmp_path / "decode.onnx")
    past = {name.replace("new", "past"): value for name, value in prefill.items() if name != "logits"}
    decode = run(tmp_path / "decode.onnx", {"input_ids": ids[:, 20:].numpy(), **past})
    assert difference(decode["logits"], last_logits(model, ids)) < SAME
    assert decode["new.1.value"].shape == (*past["past.1.value"].shape[:2], 1, past["past.1.value"].shape[3])
    assert model.module.config._attn_implementation == before


def plan_of(model: Model, fmt: str, embedding: str = "fp32") -> BitPlan:
    """A plan of one format, fp32 where a layer cannot take it."""
    layers = find_layers(model)
    formats = {}
    for layer in layers:
        wanted = Format.parse(embedding if layer.kind == "embedding" else fmt)
        formats[layer.name] = Format.parse("fp32") if wanted.refuses(layer) else wanted
    return BitPlan(layers, formats)


def unpacked(fmt: Any) -> bool:
    """Whether ONNX Runtime has no int8 product at level 4: it unpacks these weights and multiplies in fp32."""
    return fmt.bits == 2 and fmt.group in (16, 256)


def simulated(model: Model, plan: BitPlan, ids: Any, accuracy: int) -> Any:
    """Last logits under a plan in torch; at accuracy level 4 inputs are rounded as MatMulNBits does it."""
    formats = {}
    for layer in plan.layers:
        fmt: Any = plan.formats[layer.name]
        rounds = accuracy == 4 and layer.kind == "linear" and fmt.family == "int" and not unpacked(fmt)
        formats[layer] = Format.parse(f"{fmt}@int8-g{fmt.group}") if rounds else fmt
    with applied(model, formats):
        return last_logits(model, ids)


FORMATS = (
    "bf16", "int8-g64", "int8-g16-asym", "int4-g32", "int4-g16-asym", "int2-g16", "int2-g64", "int2-g32-asym",
    "int4-g16-mse", "int4-g16-gptq", "int8-channel@int8-tensor-asym", "int8-tensor@int8-tensor-asym",
    "int8-channel@int8-tensor-asym-static",
)  # fmt: skip


@pytest.mark.parametrize("accuracy", [1, 4])
@pytest.mark.parametrize("fmt", FORMATS)
def test_a_planned_model_gives_what_the_plan_was_measured_to_give(
    fmt: str, accuracy: int, prompts: Callable[[str], Path]
) -> None:
    model, ids = made("Llama"), tokens(2, 20)["input_ids"]
    model.calibrate([tokens(2, 30)])
    plan = plan_of(model, fmt)
    proto = build(prompts("Llama"), plan, model, accuracy=accuracy)
    found = run(proto, {"input_ids": ids.numpy()})["logits"]
    # Above what the kernels' own arithmetic differs by, 1e-6, and far below what the rounding of any layer does.
    assert difference(found, simulated(model, plan, ids, accuracy)) < SAME
    assert difference(found, last_logits(model, ids)) > 20 * SAME


@pytest.mark.parametrize(
    ("name", "fmt", "embedding"),
    [
        ("Qwen 2, tied", "int4-g16-asym", "int4-g32-asym"),
        ("Qwen 2, tied", "int2-g16", "bf16"),
        ("GPT-2", "int4-g16-asym", "int8-g64"),
        ("OPT", "int8-g16", "int4-g16"),
        ("GPT-NeoX", "int2-g16-asym", "int8-g32-asym"),
        ("Gemma 2, with windows", "int8-g16", "int8-g16"),
    ],
)  # fmt: skip
def test_tied_transposed_and_looked_up_weights_are_those_of_the_plan(
    name: str, fmt: str, embedding: str, prompts: Callable[[str], Path]
) -> None:
    model, ids = made(name), tokens(2, 20)["input_ids"]
    plan = plan_of(model, fmt, embedding)
    # Rounded embeddings put inputs on ties of the int8 grid, so level 1 is what is equal.
    proto = build(prompts(name), plan, model, accuracy=1)
    kinds = {node.op_type for node in proto.graph.node}
    assert ("GatherBlockQuantized" in kinds) == (embedding != "bf16")
    assert "MatMulNBits" in kinds
    assert "Gemm" not in kinds
    assert difference(run(proto, {"input_ids": ids.numpy()})["logits"], simulated(model, plan, ids, 1)) < SAME


@pytest.mark.parametrize(("part", "accuracy"), [("zeros", 1), ("zeros", 4), ("codes", 4), ("scales", 1)])
def test_one_wrong_number_of_a_kernel_is_noticed(part: str, accuracy: int, prompts: Callable[[str], Path]) -> None:
    model, ids = made("Llama"), tokens(2, 20)["input_ids"]
    plan = plan_of(model, "int4-g16-asym")
    proto = build(prompts("Llama"), plan, model, accuracy=accuracy)
    tensor = next(x for x in proto.graph.initializer if x.name.endswith(f"layers.0.mlp.up_proj.weight.{part}"))
    values = numpy_helper.to_array(tensor).copy()
    first = values.reshape(-1)[:1]
    first[...] = first * 1.25 if part == "scales" else (first & 0xF0) | ((first & 0xF) ^ 4)
    tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))
    found = run(proto, {"input_ids": ids.numpy()})["logits"]
    assert difference(found, simulated(model, plan, ids, accuracy)) > SAME


def test_a_weight_is_found_by_its_numbers_where_its_name_is_gone(prompts: Callable[[str], Path]) -> None:
    model, ids = made("Llama"), tokens(2, 20)["input_ids"]
    proto = onnx.load(prompts("Llama"))
    turned = [node for node in proto.graph.node if node.op_type == "Transpose" and node.input[0].endswith(".weight")]
    held = {tensor.name: tensor for tensor in proto.graph.initializer}
    for number, node in enumerate(turned[:8]):
        folded = numpy_helper.to_array(held[node.input[0]]).T.copy()
        proto.graph.initializer.append(numpy_helper.from_array(folded, f"folded_{number}"))
        proto.graph.node.remove(node)
        for reader in proto.graph.node:
            for place, name in enumerate(reader.input):
                reader.input[place] = f"folded_{number}" if name == node.output[0] else name
        proto.graph.initializer.remove(held[node.input[0]])
    plan = plan_of(model, "int4-g16-asym")
    found = build(proto, plan, model, accuracy=1)
    assert sum(node.op_type == "MatMulNBits" for node in found.graph.node) == 15
    assert difference(run(found, {"input_ids": ids.numpy()})["logits"], simulated(model, plan, ids, 1)) < SAME


def test_names_are_enough_to_find_a_tied_weight(
    prompts: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = made("Qwen 2, tied")
    monkeypatch.setattr(Graph, "_alike", lambda graph, weight: iter(()))
    proto = build(prompts("Qwen 2, tied"), plan_of(model, "int4-g16", "int4-g16"), model)
    assert sum(node.op_type == "MatMulNBits" for node in proto.graph.node) == 15


def test_a_product_with_the_wrong_axis_of_a_weight_is_refused(prompts: Callable[[str], Path]) -> None:
    model = made("Llama")
    proto = onnx.load(prompts("Llama"))
    name = "model.model.layers.0.self_attn.q_proj.weight"
    node = next(node for node in proto.graph.node if name in node.input)
    # The weight is square, so this too is a graph that runs.
    node.CopyFrom(helper.make_node("Identity", list(node.input), list(node.output)))
    with pytest.raises(InputError, match="reads it by a MatMul that is no product with it"):
        build(proto, plan_of(model, "int4-g16"), model)


def test_weights_take_the_bytes_of_their_kernels(prompts: Callable[[str], Path]) -> None:
    model = made("Llama")
    plan = plan_of(model, "int4-g16", "int4-g32")
    linear = sum(layer.weights for layer in plan.layers if layer.kind == "linear")
    look_up = next(layer.weights for layer in plan.layers if layer.kind == "embedding")
    norms = plan.layers.excluded_bytes
    expected = linear // 2 + linear // 16 * 4 + look_up // 2 + look_up // 32 * 4 + norms
    assert weights_bytes(build(prompts("Llama"), plan, model)) == expected


@pytest.mark.parametrize(
    ("fmt", "said"),
    [("int3-g32", "2, 4, 8 bits here, not 3"), ("int4-g16-full", "use int4-g16"), ("nf4-b64", "integers and fp32")],
)
def test_a_format_without_a_kernel_is_refused_by_name(fmt: str, said: str, prompts: Callable[[str], Path]) -> None:
    model = made("Llama")
    with pytest.raises(
        InputError, match=rf"layer 'model.layers.0.self_attn.q_proj' cannot run in {fmt}.*{said}"
    ) as told:
        build(prompts("Llama"), plan_of(model, fmt), model)
    assert told.value.code == "E431"


def test_parts_of_layers_and_rounded_caches_are_refused(prompts: Callable[[str], Path]) -> None:
    model = made("Llama")
    layers = find_layers(model, caches=True)
    plan = BitPlan(layers, {x.name: Format.parse("kv-int8-token" if x.kind == "kv_cache" else "fp32") for x in layers})
    with pytest.raises(InputError, match="keeps KV caches in 32 bits"):
        build(prompts("Llama"), plan, model)
    part = Layers((layers.match("lm_head")[0].part((0, 8)),), layers.excluded)
    with pytest.raises(InputError, match="runs whole layers"):
        build(prompts("Llama"), BitPlan(part, {"lm_head[0:8]": Format.parse("int4-g16")}), model)


def test_plans_and_graphs_of_other_models_are_refused(prompts: Callable[[str], Path], tmp_path: Path) -> None:
    model, other = made("Llama"), made("Qwen 3")
    with pytest.raises(InputError, match="plan is for model 12345678"):
        build(
            prompts("Llama"), BitPlan(find_layers(model), plan_of(model, "fp32").formats, {"digest": "12345678"}), model
        )
    with pytest.raises(InputError, match="graph is of another model"):
        build(prompts("Llama"), plan_of(other, "fp32"), other)
    stranger = BitPlan(Layers((Layer("lm_head", "linear", (61, 64)),)), {"lm_head": Format.parse("fp32")})
    proto = onnx.load(prompts("Llama"))
    product = next(node for node in proto.graph.node if node.output[0] == "logits")
    proto.graph.node.remove(product)
    proto.graph.node.append(helper.make_node("Identity", [product.input[0]], ["logits"]))
    with pytest.raises(InputError, match="'lm_head' is not found in the exported graph"):
        build(proto, stranger, model)
    broken = tmp_path / "broken.onnx"
    broken.write_bytes(b"\xff" * 100)
    with pytest.raises(InputError, match="not an ONNX file"):
        build(broken, stranger, model)
    with pytest.raises(InputError, match="cannot be read"):
        build(tmp_path / "none.onnx", stranger, model)


@pytest.mark.parametrize(
    ("model", "step", "said"),
    [
        (lambda: tiny_experts("Mixtral"), Step(4), "cannot be exported to ONNX: .*No ONNX function found"),
        (lambda: made("GPT-2"), Step(1, 64), "takes 64 tokens, and 1 tokens at context 64 needs 65"),
        (lambda: Model(torch.nn.Linear(4, 4)), Step(1), "no causal language model"),
    ],
)
def test_what_cannot_be_exported_is_refused_in_one_line(
    model: Callable[[], Model], step: Step, said: str, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=said) as told:
        export(model(), step, tmp_path / "model.onnx")
    assert told.value.code == "E431"
    assert "\n" not in told.value.message
    assert not list(tmp_path.iterdir())


def test_positions_that_a_model_counts_otherwise_are_noticed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    model = tiny(layers=1)
    forward = model.module.forward

    def own(**given: Any) -> Any:
        return forward(**{name: value for name, value in given.items() if name != "position_ids"} | shift(given))

    def shift(given: dict[str, Any]) -> dict[str, Any]:
        return {"position_ids": given["position_ids"] * 2} if "position_ids" in given else {}

    monkeypatch.setattr(model.module, "forward", own)
    with pytest.raises(InputError, match="gives other logits"):
        export(model, Step(2), tmp_path / "model.onnx")


def test_a_whole_model_is_timed_in_a_process_of_its_own(prompts: Callable[[str], Path]) -> None:
    model, quick = made("Llama"), Clock(limit=0.3)
    plan = plan_of(model, "int4-g16", "int4-g32")
    found = run_whole(plan, model, PROMPT, clock=quick, exported=prompts("Llama"))
    assert (found.status, found.reason, found.step) == ("ok", "", PROMPT)
    assert 0 < found.low <= found.seconds <= found.high < 0.3
    assert found.weights_bytes == weights_bytes(build(prompts("Llama"), plan, model))
    if sys.platform == "linux":
        assert found.weights_bytes < found.held_bytes <= found.peak_bytes < 2**29

    decode = run_whole(plan, model, Step(1, 20), clock=quick)
    assert decode.status == "ok"
    with pytest.raises(InputError, match="exported for another step than 1 tokens at context 20"):
        run_whole(plan, model, Step(1, 20), exported=prompts("Llama"))


def test_a_process_that_hangs_or_dies_is_a_status(
    prompts: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    model = made("Llama")
    plan = plan_of(model, "fp32")
    hanging = run_whole(plan, model, PROMPT, exported=prompts("Llama"), patience=0.01)
    assert (hanging.status, hanging.reason) == ("timeout", "no answer within 0.01 s")
    assert hanging.seconds != hanging.seconds
    program = tmp_path / "python"
    program.write_text("#!/bin/sh\nkill -SEGV $$\n", encoding="utf-8")
    os.chmod(program, 0o755)
    monkeypatch.setattr(sys, "executable", str(program))
    dead = run_whole(plan, model, PROMPT, exported=prompts("Llama"))
    assert (dead.status, dead.reason) == ("crashed", "killed by SIGSEGV")


def test_what_the_library_refuses_is_a_status(prompts: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    from mpsearch.hardware import whole

    model = made("Llama")
    monkeypatch.setattr(whole, "save", lambda proto, path: path.write_bytes(b"no model"))
    found = run_whole(plan_of(model, "fp32"), model, PROMPT, exported=prompts("Llama"))
    assert found.status == "failed"
    assert "InvalidProtobuf" in found.reason


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux says what a process holds")
def test_memory_counts_what_a_process_holds() -> None:
    size = 2**26
    before, _ = memory()
    # Not numpy's: what that gives back its allocator may keep.
    with mmap.mmap(-1, size) as held:
        held.write(b"x" * size)
        assert memory()[0] - before >= 0.99 * size
    # What is held again after that is not asked: the system takes pages back when it likes.
    assert memory()[1] - before >= 0.99 * size
