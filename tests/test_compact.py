"""Plans in the database: what they share is kept once, and each comes back as it was put, to the byte."""

from __future__ import annotations

import json
import random
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks import plans_stored
from mpsearch.bundles.kinds import key_of
from mpsearch.bundles.sharing import bundle, merge, unbundle
from mpsearch.errors import StorageError
from mpsearch.format import Format
from mpsearch.keys import canonical_json, content_key
from mpsearch.layer import Excluded, Layer, Layers
from mpsearch.plan import BitPlan, Predicted
from mpsearch.spec import StudySpec
from mpsearch.storage import compact
from mpsearch.storage.gc import collect
from mpsearch.storage.inspecting import check
from mpsearch.storage.portable import insert_new
from mpsearch.storage.rescue import rescue
from mpsearch.storage.schema import value_table
from mpsearch.storage.store import SqlStore
from mpsearch.stored_study import StoredStudy
from mpsearch.testing.values import plan
from mpsearch.views.points import PlanRow, Points

#: As written once: the bytes of this row must be read by every later version.
WRITTEN = (
    '["plan/1",["{layers}","{column}"],"{digest}","{assignment}",["int4-g64"],"00",'
    '{"bound":null,"bytes":1600,"cost":{"weights":1.5},"gap":null,"loss":0.25,"spread":0.125,"unit":"nats/token"},'
    '{"solver":"x"}]'
)
FORMATS = ("int2-g64", "int4-g64", "int8-channel", "bf16", "nf4-b64", "int4-g64@int8-token")
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


@st.composite
def plans(draw: st.DrawFn) -> BitPlan:
    """Plans of layers of every kind, whole and in parts, tied and shared, with caches beside them."""
    names = draw(st.lists(st.text(min_size=1, max_size=8), min_size=1, max_size=6, unique=True))
    kinds = st.sampled_from(["linear", "embedding", "conv", "expert", "kv_cache"])
    dtype, tie = st.sampled_from(["float32", "bfloat16"]), st.sampled_from(["", "a", "é"])
    items: list[Layer] = []
    for name in names:
        kind = draw(kinds)
        shape = (2, 8, 64) if kind == "expert" else (8, 64)
        axis = 1 if kind == "expert" else 0
        layer = Layer(name, kind, shape, axis, draw(dtype), draw(st.integers(0, 2**62)), shared=(f"{name}'",))
        if kind == "linear" and draw(st.booleans()):
            items += [layer.part((0, 4)), layer.part((4, 8))]
        else:
            groups, window = (2 if kind == "conv" else 1), (7 if kind == "kv_cache" else 0)
            items.append(replace(layer, tie=draw(tie), groups=groups, window=window))
    excluded = (Excluded("norm", (64,), draw(dtype), draw(st.text(max_size=9))),)
    caches, weights = ["kv-int8-token", "kv-bf16"], list(FORMATS)
    usable = {x.name: map(Format.parse, caches if x.kind == "kv_cache" else weights) for x in items}
    chosen = {x.name: draw(st.sampled_from([f for f in usable[x.name] if not f.refuses(x)])) for x in items}
    loss = draw(st.none() | st.floats(allow_nan=False, allow_infinity=False))
    model = draw(st.sampled_from([{}, {"name": "m"}, {"name": "é", "digest": "0" * 64, "architecture": "X"}]))
    predicted = Predicted(loss, loss, "nats/token", cost=draw(st.dictionaries(st.text(max_size=5), st.floats(0, 9))))
    return BitPlan(Layers(tuple(items), excluded), chosen, model, predicted, draw(st.dictionaries(st.text(), JSON)))


@settings(max_examples=150, deadline=None)
@given(made=plans())
def test_every_plan_is_made_compact_and_comes_back_to_the_byte(made: BitPlan) -> None:
    body = made.to_json()
    whole = canonical_json(body)
    packed = compact.pack(body, whole)
    assert packed is not None
    assert packed.parts.keys() == set(compact.parts_of(packed.text))
    assert all(content_key(json.loads(text)) == key for key, text in packed.parts.items())
    found = compact.checked(packed.text, packed.parts)
    # What is read has its fields in the order in which all stored values have them.
    assert json.dumps(found) == json.dumps(json.loads(whole))
    row, same = compact.outline(packed.text), compact.outline(whole)
    assert (row.key, row.assignment, row.formats) == (made.key, made.assignment, same.formats)
    assert row.choice.tolist() == same.choice.tolist()
    assert [row.formats[j] for j in row.choice] == [str(fmt) for fmt in made.formats.values()]


def _changed(path: str, value: Any) -> dict[str, Any]:
    body = json.loads(canonical_json(plan("int4-g64", "bf16").to_json()))
    *outer, last = path.split(".")
    place = body
    for name in outer:
        place = place[int(name)] if isinstance(place, list) else place[name]
    place[last] = value
    return dict(body)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        *(("more", 1), ("schema", "other/plan"), ("schema_version", 2), ("tensors.0.more", "x")),
        *(("tensors.0.bytes", 1), ("tensors.0.bytes", 560.0), ("tensors.1.format", "unheard-of")),
        *(("tensors.1.format", 5), ("tensors.1.layer", "layers.0"), ("tensors", {}), ("tensors", None), ("model", [])),
    ],
)
def test_a_plan_of_another_writer_is_stored_as_it_is(path: str, value: Any) -> None:
    body = _changed(path, value)
    assert compact.pack(body, canonical_json(body)) is None
    with SqlStore(":memory:") as store:
        store.put("plan", "k", body)
        assert canonical_json(store.get("plan", "k")) == canonical_json(body)


def test_a_plan_of_very_many_formats_is_stored_as_it_is() -> None:
    names = [f"int{bits}-g{size}" for bits in (2, 3, 4, 5, 6, 8) for size in (8, 16, 32, 64, 128)]
    names += [f"{name}-asym" for name in names] + ["bf16", "fp16", "fp32", "int4-channel", "int8-channel"]
    made = plan(*names)
    assert len(names) == 65
    assert compact.pack(made.to_json(), canonical_json(made.to_json())) is None
    few = plan(*names[:64])
    assert compact.pack(few.to_json(), canonical_json(few.to_json())) is not None


def test_the_rows_of_earlier_versions_are_read() -> None:
    made = plan("int4-g64", "int4-g64")
    packed = compact.pack(made.to_json(), canonical_json(made.to_json()))
    assert packed is not None
    layers, column = compact.parts_of(packed.text)
    names = {"layers": layers, "column": column, "digest": made.key, "assignment": made.assignment}
    written = WRITTEN
    for name, text in names.items():
        written = written.replace(f"{{{name}}}", text)
    assert packed.text == written
    assert packed.parts[column] == '{"bytes":[544,544],"format":"int4-g64"}'


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "x.db"


@pytest.fixture
def store(path: Path) -> Iterator[SqlStore]:
    with SqlStore(str(path)) as store:
        yield store


def fill(store: SqlStore, count: int = 20, layers: int = 40) -> dict[str, dict[str, Any]]:
    """A finished study of random plans; return their bodies."""
    draw, bodies = random.Random(7), {}
    store.create_study("a", StudySpec(name="a", model="m", budgets=("weights <= 4 bits",)).question())
    for i in range(count):
        made = plan(*(draw.choice(FORMATS[:4]) for _ in range(layers)))
        bodies[made.key] = made.to_json()
        store.put("plan", made.key, bodies[made.key])
        store.link("a", "plan", made.key, f"random {i}", i)
    store.set_state("a", "complete")
    return bodies


def rows(path: Path) -> dict[str, tuple[int, int]]:
    """Kind -> how many values, and their characters."""
    with closing(sqlite3.connect(path)) as file:
        found = file.execute("SELECT kind, count(*), sum(length(body)) FROM value GROUP BY kind").fetchall()
    return {kind: (count, size) for kind, count, size in found}


def test_layers_are_kept_once(store: SqlStore, path: Path) -> None:
    bodies = fill(store)
    found = rows(path)
    assert found["plan"][0] == 20
    assert found["plan_part"][0] == 1 + len(FORMATS[:4])
    assert sum(size for _, size in found.values()) < 0.2 * sum(len(canonical_json(body)) for body in bodies.values())


def test_a_plan_that_is_stored_whole_is_the_same_plan(store: SqlStore) -> None:
    body = plan("int4-g64", "bf16").to_json()
    other = {**body, "source": {"solver": "y"}}
    row = {"kind": "plan", "key": body["digest"], "body": canonical_json(body), "volatile": None, "created": "2020"}
    with store.writing() as connection:
        insert_new(connection, value_table, [row])
    store.put("plan", body["digest"], body)
    assert store.conflicts() == []
    with pytest.raises(StorageError, match="source"):
        store.put("plan", body["digest"], other)
    (conflict,) = store.conflicts()
    assert (conflict.stored, conflict.offered) == (body, other)
    assert store.get("plan", body["digest"]) == body
    assert store.plan_rows([body["digest"]])[body["digest"]].choice.tolist() == [0, 1]


def test_a_bundle_holds_whole_plans_and_opens_in_an_empty_database(store: SqlStore, path: Path, tmp_path: Path) -> None:
    bodies = fill(store)
    packed = bundle("a", tmp_path / "a.mps", str(path))
    told = unbundle(packed, str(tmp_path / "new.db"))
    assert told.values == len(bodies)
    assert merge(str(path), str(tmp_path / "all.db")).values == len(bodies)
    for name in ("new.db", "all.db"):
        with SqlStore(str(tmp_path / name)) as other:
            assert other.get_many("plan", list(bodies)) == bodies
            assert check(other, key_of) == ([], 0)
        assert rows(tmp_path / name) == rows(path)
    assert bundle("a", tmp_path / "b.mps", str(tmp_path / "new.db")).read_bytes() == packed.read_bytes()


def test_collecting_takes_parts_with_their_last_plan(store: SqlStore, path: Path) -> None:
    bodies = fill(store, 3)
    young = plan("int3-g64", "int3-g64")
    store.put("plan", young.key, young.to_json())
    with closing(sqlite3.connect(path)) as file:
        file.execute("UPDATE value SET created = '2020-01-01' WHERE key != ?", [young.key])
        file.commit()
    # What nobody names goes, yet a young plan is kept, and with it the parts that are older.
    assert collect(store, dry_run=False).total == 0
    assert store.get("plan", young.key) == young.to_json()
    assert collect(store, dry_run=True, days=0).values == {"plan": 1}
    assert collect(store, dry_run=False, days=0).values == {"plan": 1}
    assert store.get_many("plan", list(bodies)) == bodies
    assert rows(path)["plan_part"][0] == 5
    store.control.drop("a")
    assert collect(store, dry_run=False, days=0).values == {"plan": 3}
    assert rows(path) == {}


def _spoil(path: Path, statement: str) -> None:
    with closing(sqlite3.connect(path)) as file:
        assert file.execute(statement).rowcount > 0
        file.commit()


@pytest.mark.parametrize(
    ("statement", "says"),
    [
        ("DELETE FROM value WHERE kind = 'plan_part' AND body LIKE '%tensors%'", "shares with others is not there"),
        ("UPDATE value SET body = '[\"plan/1\",7]' WHERE kind = 'plan'", "stored plan"),
        ("UPDATE value SET body = replace(body, '\"bytes\":[', '\"bytes\":[1') WHERE kind = 'plan_part'", "key"),
    ],
)
def test_a_spoiled_plan_is_found_and_a_rescue_leaves_it(
    store: SqlStore, path: Path, tmp_path: Path, statement: str, says: str
) -> None:
    fill(store, 3)
    _spoil(path, statement)
    faults, _ = check(store, key_of)
    assert any(says in fault.why for fault in faults), faults
    store.close()
    found = rescue(path, tmp_path / "new.db", key_of)
    assert any("3 of kind plan" in line for line in found.lost)
    with SqlStore(str(tmp_path / "new.db")) as other:
        assert other.links("a", "plan") == []
        assert check(other, key_of) == ([], 0)


def test_a_plan_without_its_layers_is_an_error_of_ours(store: SqlStore, path: Path) -> None:
    (key,) = fill(store, 1)
    _spoil(path, "DELETE FROM value WHERE kind = 'plan_part'")
    with pytest.raises(StorageError) as caught:
        store.get("plan", key)
    assert caught.value.code == "E603"
    assert store.plan_rows([key])[key].key == key


def test_a_lie_about_the_formats_is_found(store: SqlStore, path: Path) -> None:
    (key,) = fill(store, 1)
    _spoil(path, f"UPDATE value SET body = replace(body, '{store.plan_rows([key])[key].assignment}', '{'0' * 64}')")
    faults, _ = check(store, key_of)
    assert [fault.why for fault in faults] == ["a stored plan is not as it was written"]


def test_a_rescue_brings_plans_with_what_they_share(store: SqlStore, path: Path, tmp_path: Path) -> None:
    bodies = fill(store)
    store.close()
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size - 1)
    rescue(path, tmp_path / "new.db", key_of)
    with SqlStore(str(tmp_path / "new.db")) as other:
        found = other.get_many("plan", list(bodies))
        assert found
        assert all(bodies[key] == body for key, body in found.items())
        assert check(other, key_of) == ([], 0)


def test_points_are_the_same_by_both_ways(store: SqlStore) -> None:
    bodies = fill(store)
    plans = store.plan_rows(list(bodies))
    fast = Points.of([PlanRow.stored("x", row) for row in plans.values()], [], formats=["bf16"])
    slow = Points.of([PlanRow.of("x", body) for body in bodies.values()], [], formats=["bf16"])
    for name in ("keys", "plans", "labels", "groups", "formats", "sources", "unit"):
        assert getattr(fast, name) == getattr(slow, name)
    assert fast.choice.tolist() == slow.choice.tolist()
    assert fast.choice.dtype == slow.choice.dtype
    assert {name: row.tolist() for name, row in fast.cost.items()} == {n: row.tolist() for n, row in slow.cost.items()}
    assert fast.predicted.tolist() == slow.predicted.tolist()


def test_the_view_of_a_study_is_the_same_and_reads_one_plan_with_its_layers() -> None:
    views = []
    for whole in (False, True):
        with SqlStore(":memory:") as store:
            plans_stored.fill(store, 12, 9, whole=whole)
            assert set(plans_stored.sizes(store)) == ({"plan"} if whole else {"plan", "plan_part"})
            plans_stored.looks(store, 1)
            study = StoredStudy(StudySpec.from_question(store.study("many").spec, ":memory:"), store)
            with pytest.MonkeyPatch.context() as patch:
                counted = Mock(side_effect=compact.expand)
                patch.setattr(compact, "expand", counted)
                views.append(study.view)
            assert counted.call_count == (0 if whole else 1)
    first, second = views
    assert first.points.plans == second.points.plans
    assert len(first.points) == 12
    assert first.points.choice.tolist() == second.points.choice.tolist()
    assert (first.model, first.verdict) == (second.model, second.verdict)


@pytest.mark.parametrize(
    "change",
    [
        lambda row: row.__setitem__(5, row[5][:-1]),
        lambda row: row.__setitem__(6, []),
        lambda row: row[6].__setitem__("loss", "0.1"),
        lambda row: row[6].__setitem__("cost", {"weights": None}),
        lambda row: row.__setitem__(4, ["<b>x"] * len(row[4])),
        lambda row: row.__setitem__(3, 7),
        lambda row: row.__setitem__(7, None),
    ],
)
@pytest.mark.parametrize("which", [0, 5])
def test_a_damaged_plan_is_left_out_of_the_view_with_a_notice(tmp_path: Path, change: Any, which: int) -> None:
    place = tmp_path / "results.db"
    with SqlStore(str(place)) as store:
        plans_stored.fill(store, 12, 9, whole=False)
        plans_stored.looks(store, 1)
        key = store.links("many", "plan")[which].key
    with closing(sqlite3.connect(place)) as connection:
        (text,) = connection.execute("SELECT body FROM value WHERE kind = 'plan' AND key = ?", (key,)).fetchone()
        row = json.loads(text)
        change(row)
        body = json.dumps(row, separators=(",", ":"))
        connection.execute("UPDATE value SET body = ? WHERE kind = 'plan' AND key = ?", (body, key))
        connection.commit()
    with SqlStore(str(place)) as store:
        view = StoredStudy(StudySpec.from_question(store.study("many").spec, str(place)), store).view
    assert len(view.points) == 11
    assert [notice for notice in view.notices if "1 plan is left out" in notice]
    assert len(view.bits) == len(view.points.formats)
    # No other plan stands in for the study's own.
    assert bool(view.verdict) == (which != 0)
    assert which == 5 or "chosen" not in view.points.groups
