"""Batches: what reaches only some of them, and which cannot be averaged."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import mpsearch as mp
from mpsearch.errors import InputError
from mpsearch.model.batches import check_batches
from mpsearch.notices import score_notices
from mpsearch.spread import mean_and_error
from mpsearch.tables import SensitivityTable, Status
from tests.tiny_models import tiny, tokens

MENU = ["int4-channel"]


def one(value: float, status: Status = "ok", unit: str = "nats/token", spread: float = 0.5) -> SensitivityTable:
    error = spread if status == "ok" else math.nan
    return SensitivityTable(("expert",), ("int4",), np.array([[value]]), np.array([[error]]), unit, ((status,),))


NOT = one(math.nan, "not_observed")
NOT_RANKED = one(math.nan, "not_observed", "error")


class TestMean:
    def test_batches_that_miss_a_decision_count_as_0_in_nats(self) -> None:
        mean = SensitivityTable.mean([one(3.0), NOT, one(6.0)])
        assert (mean.value[0, 0], mean.spread[0, 0]) == mean_and_error([3.0, 6.0, 0.0])
        assert mean.value[0, 0] == 3.0
        assert mean.status == (("ok",),)
        assert mean.source["pooled"] == {"expert": [2, 3]}

    def test_in_other_units_the_batches_that_reached_it_are_averaged(self) -> None:
        mean = SensitivityTable.mean([one(3.0, unit="error"), NOT_RANKED, one(6.0, unit="error")])
        assert (mean.value[0, 0], mean.spread[0, 0]) == mean_and_error([3.0, 6.0])
        alone = SensitivityTable.mean([NOT_RANKED, one(3.0, unit="error", spread=0.25)])
        assert (alone.value[0, 0], alone.spread[0, 0]) == (3.0, 0.25)
        assert alone.source["pooled"] == {"expert": [1, 2]}

    def test_what_no_batch_reached_has_no_score(self) -> None:
        mean = SensitivityTable.mean([NOT, NOT])
        assert mean.status == (("not_observed",),)
        assert np.isnan(mean.value).all()
        assert np.isnan(mean.spread).all()
        assert "pooled" not in mean.source

    def test_one_batch_that_is_not_finite_spoils_the_cell(self) -> None:
        bad = one(math.nan, "non_finite")
        for parts in ([one(1.0), NOT, bad], [NOT, bad], [bad, one(1.0)]):
            mean = SensitivityTable.mean(parts)
            assert mean.status == (("non_finite",),)
            assert np.isnan(mean.value).all()

    def test_all_batches_are_averaged_as_ever(self) -> None:
        mean = SensitivityTable.mean([one(1.0), one(2.0)])
        assert (mean.value[0, 0], mean.spread[0, 0]) == mean_and_error([1.0, 2.0])
        assert "pooled" not in mean.source

    def test_a_notice_names_them(self) -> None:
        found = [x for x in score_notices(SensitivityTable.mean([one(3.0), NOT])) if x.code == "W519"]
        assert [x.message for x in found] == ["estimated from the batches that reached them: expert (1 of 2)"]
        assert not [x for x in score_notices(one(3.0)) if x.code == "W519"]


class Experts(nn.Module):
    """Each sample goes to the expert that its first number names."""

    def __init__(self, count: int = 3) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.experts = nn.ModuleList(nn.Linear(4, 5) for _ in range(count))

    def forward(self, x: Tensor) -> Tensor:
        out = x.new_zeros(len(x), 5)
        for i, expert in enumerate(self.experts):
            there = (x[:, 0].long() == i).nonzero()[:, 0]
            if len(there):
                out = out.index_add(0, there, expert(x[there]))
        return out


def to(*experts: int) -> Tensor:
    x = torch.randn(len(experts), 4, generator=torch.Generator().manual_seed(sum(experts)))
    x[:, 0] = torch.tensor(experts)
    return x


def model() -> Any:
    return mp.wrap(Experts(), logits=lambda module, x: module(x))


def test_an_expert_that_some_samples_miss_keeps_its_score() -> None:
    layers = mp.layers(model(), to(0, 1, 2, 0))
    for name in ("fisher", "lrp"):
        table = mp.score(model(), [to(0, 1, 1, 0)], MENU, name, layers=layers)
        assert [row[0] for row in table.status] == ["ok", "ok", "not_observed"], name
        assert (table.value[:2] > 0).all()
        assert np.isfinite(table.spread[:2]).all()
        assert table.samples == 4


def test_an_expert_of_one_batch_only_keeps_its_score() -> None:
    layers = mp.layers(model(), to(0, 1, 2, 0))
    batches = [to(0, 1), to(0, 0), to(0, 0)]
    for name in ("fisher", "divergence", "lrp", "output_mse"):
        table = mp.score(model(), batches, MENU, name, layers=layers)
        alone = mp.score(model(), batches[:1], MENU, name, layers=layers)
        assert [row[0] for row in table.status] == ["ok", "ok", "not_observed"], name
        # Divergence is of all samples at once, those that miss it among them.
        assert table.source.get("pooled") == (None if name == "divergence" else {"experts.1": [1, 3]}), name
        share = 3 if table.unit == "nats/token" else 1
        assert table.value[1, 0] == pytest.approx(alone.value[1, 0] / share, rel=1e-6), name


def test_fisher_of_a_sample_that_misses_a_layer_by_hand() -> None:
    module = Experts(2)
    layers = mp.layers(mp.wrap(module, logits=lambda m, x: m(x)), to(0, 1))
    wrapped = mp.wrap(
        module,
        loss=lambda m, x: nn.functional.cross_entropy(m(x), torch.zeros(len(x), dtype=torch.long)),
    )
    x = to(0, 1)
    table = mp.score(wrapped, [x], MENU, "fisher", layers=layers, labels="data")
    apart = [mp.score(wrapped, [x[i : i + 1]], MENU, "fisher", layers=layers, labels="data") for i in range(2)]
    for i in range(2):
        assert table.value[i, 0] == pytest.approx(apart[i].value[i, 0] / 2, rel=1e-6)


class TestBatches:
    def words(self, **more: Any) -> list[dict[str, Tensor]]:
        return [{**tokens(2, 8), **more}]

    def code(self, *args: Any, **settings: Any) -> InputError:
        with pytest.raises(InputError) as found:
            mp.score(*args, **settings)
        assert found.value.code == "E515"
        return found.value

    def test_padding_and_labels_of_language_models_are_refused(self) -> None:
        llama = tiny(layers=1)
        ids = tokens(2, 8)["input_ids"]
        padded = torch.ones_like(ids)
        padded[0, :3] = 0
        hidden = ids.masked_fill(padded == 0, -100)
        for more, text in (
            ({"attention_mask": padded}, "holds zeros"),
            ({"labels": hidden}, "hold -100"),
            ({"labels": ids.flip(1)}, "not its input_ids"),
        ):
            batches = self.words(**more)
            error = self.code(llama, batches, MENU, "weight_mse")
            assert text in error.message
            assert "mp.batches" in error.advice
            with pytest.raises(InputError, match="E515"):
                mp.interactions(llama, batches, MENU)
            with pytest.raises(InputError, match="E515"):
                mp.measure(llama, {}, batches)
            with pytest.raises(InputError, match="E515"):
                mp.search(llama, batches * 4, "weights <= 4 bits")
        check_batches(self.words(attention_mask=torch.ones_like(ids), labels=ids), "batch", tokens=True)
        # A module with functions of its own does with masks and labels what it likes.
        check_batches(self.words(attention_mask=padded, labels=hidden), "batch")

    def test_unequal_batches_are_refused_where_they_are_averaged(self) -> None:
        classifier = mp.wrap(nn.Linear(4, 5), logits=lambda module, x: module(x))
        batches = [torch.randn(4, 4), torch.randn(4, 4), torch.randn(1, 4)]
        error = self.code(classifier, batches, MENU, "fisher")
        assert "4 and 1 samples" in error.message
        assert "drop it" in error.advice
        with pytest.raises(InputError, match="E515"):
            mp.interactions(classifier, batches, MENU)
        # What looks at no data, or counts samples, takes them.
        assert np.isfinite(mp.score(classifier, batches, MENU, "weight_mse").value).all()
        assert mp.measure(classifier, {"": "int4-channel"}, batches).loss > 0

    @pytest.mark.parametrize("batch", ["text", 3, None, [], {"a": ["b"]}, [1.0, 2.0], np.ones((2, 4))])
    def test_batches_without_tensors_are_refused(self, batch: Any) -> None:
        classifier = mp.wrap(nn.Linear(4, 5), logits=lambda module, x: module(x))
        assert "holds no tensor" in self.code(classifier, [batch], MENU, "fisher").message

    @pytest.mark.parametrize("batches", [torch.ones(2, 4), {"input_ids": torch.ones(2, 4)}, "text"])
    def test_one_batch_is_not_a_list(self, batches: Any) -> None:
        classifier = mp.wrap(nn.Linear(4, 5), logits=lambda module, x: module(x))
        assert "not a list" in self.code(classifier, batches, MENU, "divergence").message

    def test_language_models_read_input_ids(self) -> None:
        assert "input_ids" in self.code(tiny(layers=1), [torch.ones(2, 4)], MENU, "divergence").message

    def test_sizes_that_cannot_be_told_are_let_through(self) -> None:
        class Graph:
            pass

        check_batches([Graph(), torch.ones(2, 3)], "batch")
        check_batches([{"x": Graph(), "y": torch.ones(2, 3)}], "batch")


class TestRepeatable:
    def noisy(self) -> Any:
        module = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5))
        return mp.wrap(module, logits=lambda module, x: module.train()(x))

    def test_a_model_that_draws_at_random_is_refused_with_layers_too(self) -> None:
        layers = mp.layers(nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5)))
        data = [torch.randn(8, 4)]
        with pytest.raises(InputError, match="E513"):
            mp.score(self.noisy(), data, MENU, "divergence", layers=layers)
        with pytest.raises(InputError, match="E513"):
            mp.interactions(self.noisy(), data, MENU, layers)
        with pytest.raises(InputError, match="E513"):
            mp.measure(self.noisy(), {"0": "int4-channel"}, data, layers=layers)

    def test_a_model_is_looked_at_once_per_batch(self, monkeypatch: pytest.MonkeyPatch) -> None:
        seen: list[Any] = []
        monkeypatch.setattr("mpsearch.model.repeatable.check_repeatable", lambda model, batch: seen.append(batch))
        classifier = mp.wrap(nn.Linear(4, 5), logits=lambda module, x: module(x))
        layers, data = mp.layers(classifier), [torch.randn(4, 4)]
        for _ in range(3):
            mp.score(classifier, data, MENU, "divergence", layers=layers)
        assert len(seen) == 1
        mp.score(classifier, [torch.randn(4, 4)], MENU, "divergence", layers=layers)
        assert len(seen) == 2
