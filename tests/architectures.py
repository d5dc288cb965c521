"""One very small random model of each architecture family, made on the spot, and what every estimator does with it."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from mpsearch import registry
from mpsearch.format import parse_formats
from mpsearch.layer import Layers, decisions
from mpsearch.model.find import find_layers
from mpsearch.model.model import Model, as_model
from mpsearch.tables import SensitivityTable

FORMATS = parse_formats(["int4-channel", "int8-channel", "int4-g16"])
WORDS = 53
CLASSES = 5
SEQUENCES, LENGTH = 2, 12


@dataclass(frozen=True)
class Family:
    """How to build a small model of a family.

    Attributes:
        make: makes the module.
        batch: makes a batch from a source of random numbers.
        loss: (module, batch) -> loss; None for a causal language model, which needs none.
        logits: (module, batch) -> logits; None where there are none.
    """

    make: Callable[[], nn.Module]
    batch: Callable[[torch.Generator], Any]
    loss: Callable[[nn.Module, Any], Tensor] | None = None
    logits: Callable[[nn.Module, Any], Tensor] | None = None


@dataclass(frozen=True)
class Built:
    """A model of a family with two batches and its layers."""

    model: Model
    batches: Sequence[Any]
    layers: Layers


def _transformer(kind: str, head: str, **settings: Any) -> Callable[[], nn.Module]:
    """Make a module of the class ``kind + head`` of transformers with these settings of its configuration."""

    def make() -> nn.Module:
        import transformers

        config = getattr(transformers, f"{kind}Config")(**settings)
        module: nn.Module = getattr(transformers, f"{kind}{head}")(config)
        return module

    return make


def _decoder(kind: str, **settings: Any) -> Family:
    values = {
        "vocab_size": WORDS,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 32,
        "initializer_range": 0.2,
        **settings,
    }
    return Family(_transformer(kind, "ForCausalLM", **values), _words)


def _ids(noise: torch.Generator, length: int = LENGTH) -> Tensor:
    return torch.randint(3, WORDS, (SEQUENCES, length), generator=noise)


def _words(noise: torch.Generator) -> dict[str, Tensor]:
    return {"input_ids": _ids(noise)}


def _masked(noise: torch.Generator) -> dict[str, Tensor]:
    """Every third word is masked and to be found; the second sequence is shorter than the first."""
    words = _ids(noise)
    hidden = torch.arange(LENGTH) % 3 == 1
    there = torch.ones_like(words)
    there[1, -2:] = 0
    return {
        "input_ids": words.masked_fill(hidden, 1),
        "attention_mask": there,
        "labels": words.masked_fill(~hidden | (there == 0), -100),
    }


def _translated(noise: torch.Generator) -> dict[str, Tensor]:
    return {"input_ids": _ids(noise), "labels": _ids(noise, 7)}


def _pictures(noise: torch.Generator) -> tuple[Tensor, Tensor]:
    return torch.randn(SEQUENCES, 3, 16, 16, generator=noise), torch.randint(0, CLASSES, (SEQUENCES,), generator=noise)


def _own_loss(module: nn.Module, batch: Any) -> Tensor:
    loss: Tensor = module(**batch).loss
    return loss


def _word_logits(module: Any, batch: Any) -> Tensor:
    logits: Tensor = module(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    return logits


def _next_word_logits(module: Any, batch: Any) -> Tensor:
    before = functional.pad(batch["labels"][:, :-1], (1, 0))
    logits: Tensor = module(input_ids=batch["input_ids"], decoder_input_ids=before).logits
    return logits


def _class_logits(module: nn.Module, batch: Any) -> Tensor:
    logits: Tensor = module(batch[0]).logits
    return logits


def _class_loss(module: nn.Module, batch: Any) -> Tensor:
    return functional.cross_entropy(_class_logits(module, batch), batch[1])


def _vision(kind: str, **settings: Any) -> Family:
    values = {"num_channels": 3, "num_labels": CLASSES, "initializer_range": 0.2, **settings}
    return Family(_transformer(kind, "ForImageClassification", **values), _pictures, _class_loss, _class_logits)


_ENCODER = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 16,
    "patch_size": 8,
}


class Regression(nn.Module):
    """A user's own module: two inputs in a batch of its own kind, and nothing that could be called logits."""

    def __init__(self) -> None:
        super().__init__()
        self.near = nn.Linear(16, 32)
        self.far = nn.Linear(8, 32)
        self.out = nn.Linear(32, 1)

    def forward(self, near: Tensor, far: Tensor) -> Tensor:
        found: Tensor = self.out(torch.tanh(self.near(near) + self.far(far)))
        return found[:, 0]


def _measured(noise: torch.Generator) -> dict[str, Any]:
    return {
        "inputs": (torch.randn(6, 16, generator=noise), torch.randn(6, 8, generator=noise)),
        "target": torch.randn(6, generator=noise),
    }


def _squared(module: nn.Module, batch: Any) -> Tensor:
    return (module(*batch["inputs"]) - batch["target"]).square().mean()


_EXPERTS = {"num_experts_per_tok": 2, "num_hidden_layers": 1}

FAMILIES: Mapping[str, Family] = {
    "Llama": _decoder("Llama"),
    "Qwen2": _decoder("Qwen2", tie_word_embeddings=True),
    "Qwen3": _decoder("Qwen3"),
    "Mistral": _decoder("Mistral", sliding_window=8),
    "Gemma 2": _decoder("Gemma2", sliding_window=8, query_pre_attn_scalar=8),
    "GPT-2": Family(
        _transformer(
            "GPT2", "LMHeadModel", vocab_size=WORDS, n_embd=32, n_layer=2, n_head=4, n_positions=32,
            initializer_range=0.2, bos_token_id=1, eos_token_id=2,
        ),
        _words,
    ),
    "OPT": Family(
        _transformer(
            "OPT", "ForCausalLM", vocab_size=WORDS, hidden_size=32, ffn_dim=48, num_hidden_layers=2,
            num_attention_heads=4, max_position_embeddings=32, init_std=0.2, word_embed_proj_dim=32,
        ),
        _words,
    ),
    "BERT": Family(
        _transformer(
            "Bert", "ForMaskedLM", vocab_size=WORDS, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
            num_attention_heads=4, max_position_embeddings=32, initializer_range=0.2,
        ),
        _masked, _own_loss, _word_logits,
    ),
    "T5": Family(
        _transformer(
            "T5", "ForConditionalGeneration", vocab_size=WORDS, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4,
            decoder_start_token_id=0,
        ),
        _translated, _own_loss, _next_word_logits,
    ),
    "Mixtral": _decoder("Mixtral", num_local_experts=4, **_EXPERTS),
    "Qwen2-MoE": _decoder(
        "Qwen2Moe", num_experts=4, moe_intermediate_size=48, shared_expert_intermediate_size=16, **_EXPERTS
    ),
    "Mamba": Family(
        _transformer(
            "Mamba", "ForCausalLM", vocab_size=WORDS, hidden_size=32, state_size=8, num_hidden_layers=2,
            time_step_rank=4, initializer_range=0.2,
        ),
        _words,
    ),
    "ViT": _vision("ViT", **_ENCODER),
    "DeiT": _vision("DeiT", **_ENCODER),
    "Swin": _vision("Swin", image_size=16, patch_size=2, embed_dim=16, depths=[2, 2], num_heads=[2, 2], window_size=2),
    "ResNet": _vision(
        "ResNet", embedding_size=16, hidden_sizes=[16, 32], depths=[1, 2], layer_type="basic",
        downsample_in_first_stage=False,
    ),
    "own loss": Family(Regression, _measured, _squared),
}  # fmt: skip


def build(name: str) -> Built:
    """Build the small model of a family, always with the same numbers."""
    family = FAMILIES[name]
    torch.manual_seed(5)
    module = family.make()
    noise = torch.Generator().manual_seed(6)
    batches = [family.batch(noise) for _ in range(2)]
    functions = {kind: f for kind, f in (("loss", family.loss), ("logits", family.logits)) if f is not None}
    model = as_model(module, **functions)
    return Built(model, batches, find_layers(model, batches))


@dataclass(frozen=True)
class Outcome:
    """What an estimator does with a model.

    Attributes:
        refusal: why it does not take the model; empty when it does.
        table: its scores; None when it refuses.
        seconds: how long it took.
        problems: what is wrong with how it left the model.
    """

    refusal: str = ""
    table: SensitivityTable | None = None
    seconds: float = 0.0
    problems: tuple[str, ...] = field(default=())

    @property
    def counts(self) -> dict[str, int]:
        """How many decisions have each status, by the best of their formats."""
        order = ("ok", "not_observed", "non_finite", "not_offered")
        found = dict.fromkeys(order, 0)
        for row in self.table.status if self.table is not None else ():
            found[next(status for status in order if status in row)] += 1
        return found

    @property
    def not_observed(self) -> list[str]:
        """Decisions that the estimator could not see."""
        if self.table is None:
            return []
        return [n for n, row in zip(self.table.layers, self.table.status, strict=True) if "not_observed" in row]

    def __str__(self) -> str:
        if self.table is None:
            return "refused"
        counts = self.counts
        scored = f"{counts['ok']}/{sum(counts.values())}"
        return scored if not counts["non_finite"] else f"{scored} ({counts['non_finite']} not finite)"


#: Settings that keep the tests short; the numbers are not looked at.
QUICK: Mapping[str, Mapping[str, Any]] = {"hessian_eigenvalue": {"max_iterations": 6}}


def estimator(name: str) -> Any:
    """An estimator, with fewer steps where it takes many."""
    return registry.make("estimators", name, **QUICK.get(name, {}))


def rows(chosen: Any, built: Built) -> tuple[str, ...]:
    """Names of the rows that an estimator's table must have."""
    return tuple(row.name for row in decisions(built.layers))


def outcome(chosen: Any, built: Built) -> Outcome:
    """Ask an estimator to score a model, as a study does."""
    model = built.model
    model.calibrate(built.batches, built.layers)
    if refusal := chosen.refuses(model):
        return Outcome(refusal)
    before = _state(model)
    start = time.perf_counter()
    table = chosen.score(model, built.batches, built.layers, FORMATS)
    seconds = time.perf_counter() - start
    return Outcome("", table, seconds, tuple(_differences(before, _state(model))))


def _state(model: Model) -> dict[str, Any]:
    """Weights, buffers, gradients, hooks and replaced methods of a model."""
    found: dict[str, Any] = {
        name: (value.data_ptr(), value.detach().clone()) for name, value in model.module.state_dict().items()
    }
    for name, parameter in model.module.named_parameters():
        found[f"gradient of {name}"] = (parameter.grad is not None, parameter.requires_grad)
    for name, module in model.module.named_modules():
        hooks = [
            len(getattr(module, kind))
            for kind in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
        ]
        found[f"hooks of {name}"] = (hooks, "forward" in vars(module), module.training)
    return found


def _differences(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
    def same(a: Any, b: Any) -> bool:
        return torch.equal(a, b) if isinstance(a, Tensor) else bool(a == b)

    if list(before) != list(after):
        return ["names changed"]
    return [name for name in before if not all(map(same, before[name], after[name]))]


def survey(families: Sequence[str] = tuple(FAMILIES)) -> dict[str, dict[str, Outcome]]:
    """What every registered estimator does with every family: family -> estimator -> outcome."""
    names = registry.names("estimators")
    found: dict[str, dict[str, Outcome]] = {}
    for family in families:
        built = build(family)
        found[family] = {name: outcome(estimator(name), built) for name in names}
    return found
