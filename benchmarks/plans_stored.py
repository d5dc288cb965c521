"""Plans of one study in a database: their bytes, and how long it takes to store them and to read what is drawn of them.

python -m benchmarks.plans_stored --plans 1000
python -m benchmarks.plans_stored --plans 10000 --whole
python -m benchmarks.plans_stored --storage postgresql://user@host/database
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from collections.abc import Iterator
from typing import Any

from sqlalchemy import func, select

from benchmarks.storage_load import places
from mpsearch.format import Format
from mpsearch.keys import canonical_json
from mpsearch.layer import Layer, Layers
from mpsearch.plan import BitPlan, Predicted
from mpsearch.spec import StudySpec
from mpsearch.storage.portable import chunks, insert_new, now
from mpsearch.storage.schema import link_table, study_table, value_table
from mpsearch.storage.store import SqlStore
from mpsearch.storage.values import put_many, row
from mpsearch.stored_study import StoredStudy

FORMATS = tuple(map(Format.parse, ("int2-g64", "int3-g64", "int4-g64", "int5-g64", "int6-g64", "int8-g64", "bf16")))
NAME = "many"


def plans(count: int, layers: int) -> Iterator[dict[str, Any]]:
    """Random plans of one model."""
    source = random.Random(0)
    names = [f"model.layers.{i // 7}.mlp.{i % 7}.down_proj" for i in range(layers)]
    model = Layers(tuple(Layer(name, "linear", (1024, 4096), dtype="bfloat16", macs=1024 * 4096) for name in names))
    told = {"name": "large", "digest": "0" * 64}
    for i in range(count):
        formats = {name: source.choice(FORMATS) for name in names}
        predicted = Predicted(source.random(), source.random(), "nats/token", cost={"weights": float(i), "bops": 1.0})
        yield BitPlan(model, formats, told, predicted, {"study": NAME, "random": i}).to_json()


def fill(store: SqlStore, count: int, layers: int, *, whole: bool) -> float:
    """Make a study with so many plans; return the seconds that storing them took, without making them.

    Args:
        store: an empty database.
        count: plans.
        layers: of the model.
        whole: store every plan as its file, as it was done before.
    """
    store.create_study(NAME, StudySpec(name=NAME, model="large", budgets=("weights <= 4 bits",)).question())
    with store.reading() as connection:
        number = connection.execute(select(study_table.c.id).where(study_table.c.name == NAME)).scalar_one()
    seconds, shape = 0.0, {"kind": "plan", "volatile": None, "created": now()}
    for chunk in chunks(enumerate(plans(count, layers)), 100):
        start = time.perf_counter()
        with store.writing() as connection:
            if whole:
                rows = [shape | {"key": body["digest"], "body": canonical_json(body)} for _, body in chunk]
                insert_new(connection, value_table, rows)
            else:
                put_many(connection, [row("plan", body["digest"], body, None) for _, body in chunk])
            known = {"study": number, "kind": "plan"}
            links = [known | {"key": body["digest"], "label": f"random {i}", "position": i} for i, body in chunk]
            insert_new(connection, link_table, links)
        seconds += time.perf_counter() - start
    return seconds


def sizes(store: SqlStore) -> dict[str, int]:
    """Bytes of the values of each kind, without their keys."""
    with store.reading() as connection:
        size = func.sum(func.length(value_table.c.body))
        found = connection.execute(select(value_table.c.kind, size).group_by(value_table.c.kind))
        return {str(kind): int(count) for kind, count in found}


def looks(store: SqlStore, times: int = 3) -> tuple[float, float]:
    """Least seconds that the view of the study takes, and one of its plans."""
    study = StoredStudy(StudySpec.from_question(store.study(NAME).spec, StudySpec.storage), store)
    view, one = [], []
    for _ in range(times):
        start = time.perf_counter()
        points = study.view.points
        view.append(time.perf_counter() - start)
        start = time.perf_counter()
        found = store.get("plan", points.plans[-1])
        one.append(time.perf_counter() - start)
        if found is None or BitPlan.from_json(found).key != points.plans[-1]:
            raise SystemExit("a plan came back as another one")
    return min(view), min(one)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--storage", default="", help="a folder, or a server's address that may make databases")
    parser.add_argument("--plans", type=int, default=1000)
    parser.add_argument("--layers", type=int, default=1000)
    parser.add_argument("--whole", action="store_true", help="store each plan as its file")
    asked = parser.parse_args()
    with places(asked.storage) as fresh, SqlStore(fresh()) as store:
        seconds = fill(store, asked.plans, asked.layers, whole=asked.whole)
        told = ", ".join(f"{kind} {size / 1e6:.2f} MB" for kind, size in sorted(sizes(store).items()))
        view, one = looks(store)
        rate = 1e3 * seconds / asked.plans
        sys.stdout.write(
            f"{asked.plans} plans x {asked.layers} layers: {told}; stored in {rate:.1f} ms each, "
            f"view in {view:.2f} s, one plan in {1e3 * one:.1f} ms\n"
        )


if __name__ == "__main__":
    main()
