"""Plans solved for a moment: rules of the study stay, threads share tables, margins are kept, ranges are proven."""

from __future__ import annotations

import math
import threading
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mpsearch import registry
from mpsearch.budget import Budget
from mpsearch.errors import InputError
from mpsearch.rules import Rules
from mpsearch.stored_study import StoredStudy
from mpsearch.testing.views import pretended
from mpsearch.views.study_view import StudyView
from mpsearch.web.server import resolving
from mpsearch.web.server.resolving import Warm, resolve
from mpsearch.web.server.wishes import Wish
from tests.http_server import add_study

VIEW = pretended(20, 24, 4, seed=2)
FORMATS = VIEW.scores.formats if VIEW.scores else ()


def warm(base: Rules | None = None, **own: str) -> Warm:
    assert VIEW.scores is not None
    return replace(Warm.of_view(VIEW), base=base or Rules(), own=own)


def tight(share: float = 0.15) -> list[str]:
    table = VIEW.costs[0]
    low, high = (float(f(table.value, axis=1).sum()) + table.fixed for f in (np.nanmin, np.nanmax))
    return [f"weights <= {int(low + share * (high - low))} B"]


#: The smallest of the layers that take the smallest format when nothing is wished.
LAYER = min(
    (math.prod(layer.shape), layer.name)
    for layer, fmt in zip(VIEW.layers, resolve(warm(), tight(), Wish(), patient=True)["formats"], strict=True)
    if fmt == FORMATS[0] and not layer.tie
)[1]
ROW = LAYER


def timed(margin: float) -> tuple[Warm, str]:
    """Tables of which that of time asks for a margin, and its name."""
    found = warm()
    name = next(table.resource for table in found.costs if table.unit == "s")
    costs = [replace(t, source={**t.source, "margin": margin}) if t.resource == name else t for t in found.costs]
    return replace(found, costs=tuple(costs)), name


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Iterator[StoredStudy]:
    path = tmp_path_factory.mktemp("resolving") / "results.db"
    with registry.make("stores", "sql", url=str(path), busy_timeout=20.0) as store:
        yield add_study(store, "page")


@pytest.mark.parametrize(
    ("base", "wish", "allowed"),
    [
        (Rules(bars={ROW: FORMATS[:2]}), Wish(bars={LAYER: [FORMATS[3]]}), FORMATS[2:3]),
        (Rules(floors={ROW: FORMATS[2]}), Wish(floors={LAYER: FORMATS[0]}), FORMATS[2:]),
        (Rules(floors={ROW: FORMATS[1]}), Wish(floors={LAYER: FORMATS[2]}), FORMATS[2:]),
        (Rules(bars={ROW: FORMATS[:1]}), Wish(floors={LAYER: FORMATS[1]}, bars={LAYER: [FORMATS[1]]}), FORMATS[2:]),
        (Rules(pins={ROW: FORMATS[3]}), Wish(bars={LAYER: [FORMATS[0]]}), FORMATS[3:]),
    ],
    ids=["bars", "lower floor", "higher floor", "both", "pin"],
)
def test_a_wish_never_lifts_a_rule_of_the_study(base: Rules, wish: Wish, allowed: tuple[str, ...]) -> None:
    tables = warm(base)
    at = [layer.name for layer in VIEW.layers].index(LAYER)
    alone = resolve(tables, tight(), Wish(), patient=True)
    found = resolve(tables, tight(), wish, patient=True)
    assert found["formats"][at] in allowed
    assert found["loss"] >= max(found["without"]["bound"], alone["bound"])
    assert found["wish"] >= 0


@pytest.mark.parametrize("how", ["rule", "pin"])
def test_a_wish_against_a_pin_of_the_study_is_refused_in_words(how: str) -> None:
    tables = warm(Rules(pins={ROW: FORMATS[3]})) if how == "rule" else warm(None, **{ROW: FORMATS[3]})
    with pytest.raises(InputError, match=rf"pinned to {FORMATS[3]} by the study") as caught:
        resolve(tables, tight(), Wish(pins={LAYER: FORMATS[1]}))
    assert caught.value.code == "E213"
    assert resolve(tables, tight(), Wish(pins={LAYER: FORMATS[3]}))["found"]


def test_plans_without_wishes_are_kept_by_several_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    tables = warm()
    budgets = [Budget.parse(text) for text in tight()]
    problem = tables.problem(budgets)
    solved = resolving._quick(problem, Rules(), 2.0)
    monkeypatch.setattr(resolving, "_FREE", 1)
    monkeypatch.setattr(resolving, "_quick", lambda *given: solved)
    others: list[threading.Thread] = []

    class Watched(OrderedDict[Any, Any]):
        """As soon as something is kept, another thread comes and keeps its own, for which there is no further room."""

        def __setitem__(self, key: Any, value: Any) -> None:
            super().__setitem__(key, value)
            if not others:
                other = [Budget.parse("weights <= 5 bits")]
                others.append(threading.Thread(target=tables.free, args=(problem, other, 0.03), daemon=True))
                others[0].start()
                others[0].join(0.2)

    class Door:
        """A lock whose first holder goes on only when the other thread is through."""

        lock = threading.RLock()

        def __enter__(self) -> None:
            self.lock.acquire()

        def __exit__(self, *error: object) -> None:
            self.lock.release()
            if others and threading.current_thread() is not others[0]:
                others[0].join(20)

    tables._free, tables._lock = Watched(), Door()  # type: ignore[assignment]
    assert tables.free(problem, budgets, 0.03) is solved
    assert list(tables._free) == [("weights <= 5 bits",)]


def test_tables_of_further_contexts_are_few_and_are_not_answered(study: StoredStudy) -> None:
    tables = Warm.of_study(study, StudyView.of(study))
    own = [table.resource for table in tables.costs]
    for context in range(1, 30):
        found = resolve(tables, [f"memory <= 8 GiB at context {context}"], Wish())
        assert set(found["cost"]) == {*own, f"memory at context {context}"}
    assert [table.resource for table in tables.costs] == own
    assert len(tables._further) == resolving._FURTHER
    assert set(resolve(tables, ["weights <= 4 bits"], Wish())["cost"]) == set(own)
    short = resolve(tables, ["memory <= 1 B at context 77"], Wish())
    assert (short["found"], short["error"]["code"]) == (False, "E201")
    assert resolve(tables, [short["least"][0]["text"]], Wish())["found"]


def check_least(tables: Warm, asked: str) -> None:
    short = resolve(tables, [asked], Wish())
    least = short["least"][0]
    assert least["short"]
    found = resolve(tables, [least["text"]], Wish())
    assert found["found"], least
    limit = found["budgets"][0]
    assert least["amount"] == pytest.approx(limit["limit"] * limit["margin"], rel=1e-9)
    # Within the rounding: a nanosecond, or one.
    left = limit["margin"] * (limit["limit"] - found["cost"][limit["resource"]])
    assert 0 <= left <= (1e-9 if limit["resource"].startswith("tpot") else 1)


@pytest.mark.parametrize("margin", [1.0, 1.07])
def test_the_least_that_fits_fits(margin: float, study: StoredStudy) -> None:
    tables, name = timed(margin)
    resource, _, condition = name.partition(" ")
    check_least(tables, "weights <= 1 B")
    check_least(tables, f"{resource} <= 0.001 us {condition}")
    check_least(Warm.of_study(study, StudyView.of(study)), "bops <= 1 BOPs")


def test_prices_are_of_what_the_budget_says(monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for margin in (1.0, 1.25):
        tables, name = timed(margin)
        resource, _, condition = name.partition(" ")
        table = next(table for table in tables.costs if table.resource == name)
        low, high = (float(f(table.value, axis=1).sum()) + table.fixed for f in (np.nanmin, np.nanmax))
        # The same limit of the cost: the budget says more by the margin.
        text = f"{resource} <= {margin * (low + 0.3 * (high - low)) * 1e3:.9f} ms {condition}"
        found.append(resolve(tables, [text], Wish(), patient=True)["prices"][0])
    assert found[0]["unit"] == found[1]["unit"] == f"{VIEW.points.unit} per ms"
    assert found[0]["price"] > 0
    assert found[1]["price"] == pytest.approx(found[0]["price"] / 1.25, rel=1e-3)


def test_prices_are_in_units_that_people_read(study: StoredStudy) -> None:
    tables = Warm.of_study(study, StudyView.of(study))
    prices = resolve(tables, ["weights <= 3 bits", "bops <= 60 %"], Wish())["prices"]
    assert [price["unit"] for price in prices] == ["nats/token per MiB", "nats/token per GBOP"]


def test_what_a_wish_costs_is_a_range_from_both_bounds(monkeypatch: pytest.MonkeyPatch) -> None:
    tables, wish = warm(), Wish(pins={LAYER: FORMATS[3]})
    proven = resolve(tables, tight(), wish, patient=True)
    without = proven["without"]
    assert 0 <= without["low"] <= proven["wish"] <= without["high"]
    assert without["high"] - without["low"] <= 1e-6
    quick = resolving._quick
    free = [quick(tables.problem([Budget.parse(tight()[0])]), Rules(), 2.0)]
    # A plan without the wish that is worse than the one with it says nothing below zero.
    worse = replace(free[0], loss=proven["loss"] + 1.0, status="feasible")
    monkeypatch.setattr(Warm, "free", lambda *given: worse)
    found = resolve(tables, tight(), wish, patient=True)
    assert found["wish"] == 0
    assert found["without"]["loss"] == found["loss"]
    assert found["without"]["low"] == pytest.approx(0, abs=1e-9)
    assert found["without"]["high"] == pytest.approx(found["loss"] - worse.bound)
    assert math.isfinite(found["without"]["high"])


def test_an_unknown_format_of_a_floor_is_told(tmp_path: Path) -> None:
    for wish in (Wish(floors={LAYER: "int9-g64"}), Wish(pins={LAYER: "int9-g64"}), Wish(bars={LAYER: ["int9-g64"]})):
        with pytest.raises(InputError, match="int9-g64") as caught:
            resolve(warm(), tight(), wish)
        assert caught.value.code == "E213"
