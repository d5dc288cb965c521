"""What every store must do with values and scores; see `mpsearch.testing.stores`."""

from __future__ import annotations

import math
import struct
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from mpsearch.errors import InputError, StorageError
from mpsearch.format import Format
from mpsearch.keys import canonical_json
from mpsearch.layer import Excluded, Layer, Layers
from mpsearch.plan import BitPlan, Predicted
from mpsearch.records import CellRow

if TYPE_CHECKING:
    from mpsearch.storage.store import SqlStore

#: Names that some database, terminal or page would take for something else.
HOSTILE = ["", "a\0b", "a\nb", "\x1b[31m", "a\u202eb", "\ud800", "x" * 1001]
#: Names that look odd and are fine.
ODD = ["a b", "'; DROP TABLE value; --", '"', "%", "é", "名前", "🙂", "../../x", "<b>", "NULL", "1e5", "[0]"]
#: Floats that a careless way through text or single precision would change.
FLOATS = [0.1, 1 / 3, math.pi, 5e-324, 2.2250738585072014e-308, 1.7976931348623157e308, 2.0**53 + 2, -1e-17, 3.0, 0.0]


def cell(layer: str = "fc", format: str = "int4-g64", **changes: Any) -> CellRow:
    """Make a cell that is ``ok``, with changes."""
    return CellRow(layer, format, -1, "ok", 0.5, 0.01, 8, "", 1.5)._replace(**changes)


def bits(*values: float | None) -> list[bytes | None]:
    """Return floats as their bytes, which tell apart what ``==`` does not."""
    return [None if value is None else struct.pack("<d", value) for value in values]


def plan(*formats: str) -> BitPlan:
    """Make a plan of layers that take any of these formats."""
    layers = [Layer(f"layers.{i}", "linear", (8, 128), macs=1024) for i in range(len(formats))]
    kept = (Excluded("norm.weight", (128,), "float32", "a vector"),)
    chosen = {layer.name: Format.parse(name) for layer, name in zip(layers, formats, strict=True)}
    predicted = Predicted(0.25, 0.125, "nats/token", cost={"weights": 1.5})
    return BitPlan(Layers(tuple(layers), kept), chosen, {"name": "m", "digest": "0" * 64}, predicted, {"solver": "x"})


class ValueSuite:
    """Values and scores; part of `mpsearch.testing.stores.StoreSuite`."""

    def reopen(self, store: SqlStore) -> SqlStore:
        """Open the database of a store a second time; the caller closes it."""
        raise NotImplementedError

    # --- values

    def test_a_value_comes_back(self, store: SqlStore) -> None:
        body = {"a": [1, 2.5, None, True, "x"], "b": {"c": {}}, "d": []}
        store.put("plan", "k", body)
        assert store.get("plan", "k") == body

    def test_a_value_is_there_when_opened_again(self, store: SqlStore) -> None:
        store.put("plan", "k", {"a": 1})
        with self.reopen(store) as second:
            assert second.get("plan", "k") == {"a": 1}
            second.put("plan", "l", {"a": 2})
        assert store.get("plan", "l") == {"a": 2}

    def test_plans_come_back_whole_and_share_what_they_can(self, store: SqlStore) -> None:
        plans = [plan(*names) for names in (("int4-g64", "int8-g64"), ("int4-g64", "int4-g64"), ("bf16", "int3-g64"))]
        bodies = {made.key: made.to_json() for made in plans}
        for _ in range(2):
            for key, body in bodies.items():
                store.put("plan", key, body)
        found = store.get_many("plan", [*bodies, "missing"])
        assert {key: canonical_json(body) for key, body in found.items()} == {
            key: canonical_json(body) for key, body in bodies.items()
        }
        assert [BitPlan.from_json(body) for body in found.values()] == plans
        with self.reopen(store) as second:
            assert second.get("plan", plans[0].key) == bodies[plans[0].key]

    def test_what_is_drawn_of_plans_is_read_without_their_layers(self, store: SqlStore) -> None:
        plans = [plan("int4-g64", "int8-g64"), plan("bf16", "bf16"), plan("int8-g64", "int4-g64")]
        for made in plans:
            store.put("plan", made.key, made.to_json())
        # Of another writer, who says more, so that it is stored as it is.
        odd = {**plans[0].to_json(), "more": 1}
        store.put("plan", "odd", odd)
        keys = ["odd", *(made.key for made in plans[::-1]), "missing"]
        found = store.plan_rows(keys)
        assert list(found) == keys[:-1]
        for key, made in zip(keys, [plans[0], *plans[::-1]], strict=False):
            row = found[key]
            assert [row.formats[j] for j in row.choice.tolist()] == [str(fmt) for fmt in made.formats.values()]
            assert (row.key, row.assignment) == (made.key, made.assignment)
            assert (row.predicted, row.source) == (made.to_json()["predicted"], made.source)

    def test_another_plan_for_a_key_is_a_conflict_of_whole_plans(self, store: SqlStore) -> None:
        first, second = plan("int4-g64", "int8-g64"), plan("int4-g64", "bf16")
        store.put("plan", "k", first.to_json())
        with pytest.raises(StorageError, match="tensors"):
            store.put("plan", "k", second.to_json())
        (row,) = store.conflicts()
        assert (row.stored, row.offered) == (first.to_json(), second.to_json())
        assert store.get("plan", "k") == first.to_json()

    def test_what_plans_share_stands_under_the_key_of_its_content(self, store: SqlStore) -> None:
        with pytest.raises(ValueError, match="key of its content"):
            store.put("plan_part", "0" * 64, {"bytes": [1], "format": "bf16"})

    def test_an_unknown_key_gives_none(self, store: SqlStore) -> None:
        assert store.get("plan", "k") is None

    def test_kinds_are_apart(self, store: SqlStore) -> None:
        store.put("plan", "k", {"a": 1})
        store.put("cost", "k", {"a": 2})
        assert store.get("plan", "k") == {"a": 1}
        assert store.get("cost", "k") == {"a": 2}

    def test_the_same_value_again_is_fine(self, store: SqlStore) -> None:
        store.put("plan", "k", {"a": 1, "b": (1, 2)})
        store.put("plan", "k", {"b": [1, 2], "a": 1})
        assert store.conflicts() == []

    def test_another_value_is_refused_and_the_first_stays(self, store: SqlStore) -> None:
        store.put("measurement", "key7", {"loss": 0.0182, "unit": "nats"})
        with pytest.raises(StorageError) as caught:
            store.put("measurement", "key7", {"loss": 0.0185, "unit": "nats"})
        assert caught.value.code == "E521"
        for part in ("measurement", "key7", "loss", "0.0182", "0.0185"):
            assert part in caught.value.message
        assert store.get("measurement", "key7") == {"loss": 0.0182, "unit": "nats"}

    def test_a_conflict_is_written_down_once(self, store: SqlStore) -> None:
        store.put("plan", "k", {"a": 1})
        for offered in (2, 2, 3):
            with pytest.raises(StorageError):
                store.put("plan", "k", {"a": offered})
        with self.reopen(store) as second:
            found = second.conflicts()
        assert [(row.kind, row.key) for row in found] == [("plan", "k")] * 2
        assert [(row.stored, row.offered) for row in found] == [({"a": 1}, {"a": 2}), ({"a": 1}, {"a": 3})]

    def test_an_integer_is_not_a_float(self, store: SqlStore) -> None:
        store.put("plan", "k", {"a": 1})
        with pytest.raises(StorageError):
            store.put("plan", "k", {"a": 1.0})

    def test_floats_in_values_keep_every_bit(self, store: SqlStore) -> None:
        store.put("scores", "k", {"x": FLOATS})
        found = store.get("scores", "k")
        assert found is not None
        assert bits(*found["x"]) == bits(*FLOATS)

    def test_volatile_fields_are_not_compared(self, store: SqlStore) -> None:
        store.put("measurement", "k", {"loss": 1.5}, volatile={"seconds": 2.0})
        store.put("measurement", "k", {"loss": 1.5}, volatile={"seconds": 3.0})
        store.put("measurement", "k", {"loss": 1.5})
        assert store.get("measurement", "k") == {"loss": 1.5, "seconds": 2.0}
        with pytest.raises(StorageError):
            store.put("measurement", "k", {"loss": 2.5}, volatile={"seconds": 2.0})

    def test_volatile_fields_are_taken_out_of_the_body(self, store: SqlStore) -> None:
        for seconds in (2.0, 3.0):
            body = {"loss": 1.5, "seconds": seconds}
            store.put("measurement", "k", body, volatile={"seconds": seconds})
            assert body == {"loss": 1.5, "seconds": seconds}
        assert store.get("measurement", "k") == {"loss": 1.5, "seconds": 2.0}

    def test_many_values_at_once(self, store: SqlStore) -> None:
        for key in ("b", "a", "ü"):
            store.put("plan", key, {"key": key})
        asked = ["ü", *(f"missing {i}" for i in range(40_000)), "a", "b", "a"]
        assert list(store.get_many("plan", asked).items()) == [(key, {"key": key}) for key in ("ü", "a", "b")]
        assert store.get_many("plan", []) == {}

    @pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
    def test_a_value_that_is_not_finite_is_refused(self, store: SqlStore, bad: float) -> None:
        with pytest.raises(ValueError, match="JSON"):
            store.put("scores", "k", {"x": [bad]})
        assert store.get("scores", "k") is None

    @pytest.mark.parametrize("text", [*ODD, "a\0b", "\u2028", "\x1b"])
    def test_any_text_in_a_value_survives(self, store: SqlStore, text: str) -> None:
        store.put("plan", "k", {text: text}, volatile={"note": text})
        assert store.get("plan", "k") == {text: text, "note": text}

    def test_half_a_surrogate_pair_is_refused(self, store: SqlStore) -> None:
        with pytest.raises(InputError, match=r"U\+D800") as caught:
            store.put("plan", "k", {"a": "\ud800"})
        assert caught.value.code == "E114"

    @pytest.mark.parametrize("name", HOSTILE)
    def test_hostile_kinds_and_keys_are_refused(self, store: SqlStore, name: str) -> None:
        for call in (lambda: store.put(name, "k", {}), lambda: store.put("plan", name, {}), lambda: store.cells(name)):
            with pytest.raises(InputError) as caught:
                call()
            assert caught.value.code == "E114"

    def test_a_long_value_comes_back(self, store: SqlStore) -> None:
        body = {"x": list(range(300_000))}
        store.put("scores", "k", body)
        assert store.get("scores", "k") == body

    def test_threads_share_a_store(self, store: SqlStore) -> None:
        def work(thread: int) -> None:
            for i in range(10):
                store.put("plan", f"{thread} {i}", {"i": i})
                assert store.get("plan", f"{thread} {i}") == {"i": i}
                store.put_cells("s", [cell(batch=i)])

        with ThreadPoolExecutor(8) as pool:
            list(pool.map(work, range(8)))
        assert len(store.get_many("plan", [f"{thread} {i}" for thread in range(8) for i in range(10)])) == 80
        assert len(store.cells("s")) == 10

    # --- cells

    def test_cells_come_back(self, store: SqlStore) -> None:
        rows = [
            cell("a", batch=0),
            cell("b", spread=None, reason="one probe"),
            cell("c", status="non_finite", value=None, spread=None, reason="Inf in batch 3"),
            cell("d", status="not_offered", value=None, spread=None, samples=0, seconds=0.0),
            cell("e", status="not_observed", value=None, spread=None),
            cell("f", status="failed", value=None, spread=None, reason="out of memory"),
        ]
        store.put_cells("s", iter(rows))
        assert store.cells("s") == rows
        with self.reopen(store) as second:
            assert second.cells("s") == rows

    def test_cells_are_ordered_alike_everywhere(self, store: SqlStore) -> None:
        rows = [
            cell(a, b, batch=c) for a in ("B", "a", "a b", "a.b", "é", "名") for b in ("f", "g") for c in (-1, 2, 10)
        ]
        store.put_cells("s", rows[::-1])
        assert store.cells("s") == rows

    def test_scopes_are_apart(self, store: SqlStore) -> None:
        store.put_cells("s", [cell(value=1.0)])
        store.put_cells("t", [cell(value=2.0)])
        assert [row.value for row in store.cells("s")] == [1.0]
        assert store.cells("u") == []

    def test_floats_in_cells_keep_every_bit(self, store: SqlStore) -> None:
        store.put_cells("s", [cell(batch=i, value=x, spread=abs(x), seconds=x) for i, x in enumerate(FLOATS)])
        found = store.cells("s")
        assert bits(*(row.value for row in found)) == bits(*FLOATS)
        assert bits(*(row.spread for row in found)) == bits(*map(abs, FLOATS))
        assert bits(*(row.seconds for row in found)) == bits(*FLOATS)

    def test_minus_zero_is_zero(self, store: SqlStore) -> None:
        store.put_cells("s", [cell(value=-0.0)])
        store.put_cells("s", [cell(value=0.0)])
        assert bits(store.cells("s")[0].value) == bits(0.0)

    def test_the_same_cells_again_are_fine(self, store: SqlStore) -> None:
        rows = [cell(batch=i) for i in range(5)]
        store.put_cells("s", rows)
        store.put_cells("s", [row._replace(samples=9, reason="x", seconds=7.0) for row in rows])
        assert store.cells("s") == rows
        assert store.conflicts() == []

    @pytest.mark.parametrize(
        "change",
        [
            {"value": math.nextafter(0.5, 1)},
            {"spread": math.nextafter(0.01, 1)},
            {"spread": None},
            {"status": "failed", "value": None},
        ],
    )
    def test_other_numbers_are_refused_and_the_rest_is_kept(self, store: SqlStore, change: dict[str, Any]) -> None:
        store.put_cells("s", [cell("layers.4.o_proj", "int3-g64")])
        with pytest.raises(StorageError) as caught:
            store.put_cells("s", [cell("new"), cell("layers.4.o_proj", "int3-g64", **change)])
        assert caught.value.code == "E521"
        assert "layers.4.o_proj" in caught.value.message
        assert "int3-g64" in caught.value.message
        assert store.cells("s") == [cell("layers.4.o_proj", "int3-g64"), cell("new")]
        (conflict,) = store.conflicts()
        assert (conflict.kind, conflict.key) == ("cell", '["s","layers.4.o_proj","int3-g64",-1]')
        assert conflict.stored == {"status": "ok", "value": 0.5, "spread": 0.01}
        assert conflict.offered == {"status": "ok", "value": 0.5, "spread": 0.01} | change

    def test_a_cell_twice_in_one_call(self, store: SqlStore) -> None:
        store.put_cells("s", [cell(), cell()])
        with pytest.raises(StorageError):
            store.put_cells("t", [cell(value=1.0), cell(value=2.0)])
        assert len(store.cells("s")) == len(store.cells("t")) == 1

    def test_an_unknown_spread_is_none(self, store: SqlStore) -> None:
        store.put_cells("s", [cell(spread=math.nan)])
        assert store.cells("s") == [cell(spread=None)]
        store.put_cells("s", [cell(spread=None)])

    @pytest.mark.parametrize(
        "change",
        [
            {"value": math.nan},
            {"value": math.inf},
            {"value": None},
            {"status": "failed"},
            {"status": "fine"},
            {"seconds": math.nan},
            {"batch": -2},
            {"samples": -1},
        ],
    )
    def test_a_cell_that_makes_no_sense_is_refused(self, store: SqlStore, change: dict[str, Any]) -> None:
        with pytest.raises(ValueError, match="'fc'"):
            store.put_cells("s", [cell("good"), cell(**change)])
        assert store.cells("s") == []

    def test_numbers_outside_64_bits_are_refused(self, store: SqlStore) -> None:
        for row in (cell(batch=2**63), cell(samples=2**63)):
            with pytest.raises(InputError, match="does not fit in 64 bits") as caught:
                store.put_cells("s", [row])
            assert caught.value.code == "E113"
        store.put_cells("s", [cell(batch=2**63 - 1, samples=2**63 - 1)])
        assert store.cells("s")[0].samples == 2**63 - 1

    @pytest.mark.parametrize("name", HOSTILE)
    def test_hostile_layers_and_formats_are_refused(self, store: SqlStore, name: str) -> None:
        for row in (cell(layer=name), cell(format=name)):
            with pytest.raises(InputError) as caught:
                store.put_cells("s", [row])
            assert caught.value.code == "E114"

    def test_odd_names_are_only_names(self, store: SqlStore) -> None:
        rows = sorted((cell(name, name) for name in ODD), key=lambda row: row.layer)
        for _ in range(2):
            store.put_cells("'s'", rows)
        assert store.cells("'s'") == rows

    def test_a_reason_may_be_anything(self, store: SqlStore) -> None:
        reason = "a\0b\nc\ud800" + "x" * 5000
        store.put_cells("s", [cell(status="failed", value=None, spread=None, reason=reason)])
        assert store.cells("s")[0].reason.startswith("a\ufffdb\nc")
        assert len(store.cells("s")[0].reason) <= 2000

    def test_numbers_of_numpy_are_numbers(self, store: SqlStore) -> None:
        value: Any = np.float32(0.5)
        batch: Any = np.int64(3)
        store.put_cells("s", [cell(value=value, batch=batch)])
        assert store.cells("s") == [cell(batch=3)]

    def test_a_large_table_goes_in_at_once(self, store: SqlStore) -> None:
        rows = [cell(f"layer {i:04}", f"int{b}", value=i + b / 8) for i in range(1000) for b in range(8)]
        store.put_cells("s", rows)
        store.put_cells("s", rows)
        assert store.cells("s") == rows

    def test_no_cells_are_fine(self, store: SqlStore) -> None:
        store.put_cells("s", [])
        assert store.cells("s") == []
