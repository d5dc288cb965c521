"""What every store must do with studies and their links; see `mpsearch.testing.stores`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from mpsearch.errors import InputError, StorageError
from mpsearch.testing.values import HOSTILE, ODD

if TYPE_CHECKING:
    from mpsearch.storage.store import SqlStore


class StudySuite:
    """Studies and links; part of `mpsearch.testing.stores.StoreSuite`."""

    def test_a_study_comes_back(self, store: SqlStore) -> None:
        store.create_study("a", {"budget": "weights <= 4 bits", "seed": 0})
        row = store.study("a")
        assert (row.name, row.spec, row.state) == ("a", {"budget": "weights <= 4 bits", "seed": 0}, "new")
        assert len(row.key) == 64
        assert row.created == row.updated
        assert row.created.endswith("+00:00")

    def test_the_same_study_again_does_nothing(self, store: SqlStore) -> None:
        store.create_study("a", {"seed": 0})
        store.set_state("a", "running")
        before = store.study("a")
        store.create_study("a", {"seed": 0})
        assert store.study("a") == before

    def test_a_study_with_other_settings_is_refused(self, store: SqlStore) -> None:
        store.create_study("a b", {"budget": 4.0, "seed": 0, "gone": [1], "same": 1})
        with pytest.raises(StorageError) as caught:
            store.create_study("a b", {"budget": 3.0, "seed": 0, "new": "x", "same": 1})
        error = caught.value
        assert error.code == "E140"
        assert "study 'a b' exists with" in error.message
        assert "budget 4.0 (you ask 3.0)" in error.message
        assert "gone [1] (you ask not set)" in error.message
        assert "new not set" in error.message
        assert "seed" not in error.message
        assert "mpsearch resume 'a b'" in error.advice
        assert "--name" in error.advice
        assert store.study("a b").spec["budget"] == 4.0

    def test_no_password_in_the_difference(self, store: SqlStore) -> None:
        store.create_study("a", {"storage": "postgresql://ann:canary@db.lan/x"})
        with pytest.raises(StorageError) as caught:
            store.create_study("a", {"storage": "postgresql://ann:canary@db.lan/y"})
        assert "canary" not in str(caught.value)
        assert "postgresql://ann:***@db.lan/y" in str(caught.value)

    def test_an_unknown_study_names_the_known_ones(self, store: SqlStore) -> None:
        with pytest.raises(StorageError, match="no studies"):
            store.study("lama")
        for name in ("b", "llama"):
            store.create_study(name, {})
        calls = (
            lambda: store.study("lama"),
            lambda: store.set_state("lama", "running"),
            lambda: store.link("lama", "plan", "k"),
            lambda: store.links("lama", "plan"),
        )
        for call in calls:
            with pytest.raises(StorageError, match=r"no study 'lama'.*did you mean 'llama'.*b, llama") as caught:
                call()
            assert caught.value.code == "E141"

    def test_studies_come_newest_first(self, store: SqlStore) -> None:
        for name in ("b", "a", "c"):
            store.create_study(name, {"name": name})
        store.set_state("b", "complete")
        assert [(row.name, row.state) for row in store.studies()] == [("c", "new"), ("a", "new"), ("b", "complete")]

    @pytest.mark.parametrize(
        "state", ["new", "submitted", "running", "complete", "gaps", "failed", "paused", "cancelled"]
    )
    def test_a_state_is_kept(self, store: SqlStore, state: str) -> None:
        store.create_study("a", {})
        store.set_state("a", state)
        row = store.study("a")
        assert row.state == state
        assert row.updated > row.created

    def test_an_unknown_state_is_refused(self, store: SqlStore) -> None:
        store.create_study("a", {})
        with pytest.raises(ValueError, match="running"):
            store.set_state("a", "done")

    def test_links_are_ordered_and_made_once(self, store: SqlStore) -> None:
        store.create_study("a", {})
        store.create_study("b", {})
        for key, position in (("z", 1), ("y", 2), ("x", 2), ("z", 1)):
            store.link("a", "plan", key, label=f"plan {key}", position=position)
        store.link("a", "cost", "q")
        store.link("b", "plan", "q")
        found = [(row.key, row.label, row.position) for row in store.links("a", "plan")]
        assert found == [("z", "plan z", 1), ("x", "plan x", 2), ("y", "plan y", 2)]
        assert [row.key for row in store.links("a", "cost")] == ["q"]
        assert store.links("b", "cost") == []

    def test_a_value_may_have_two_labels(self, store: SqlStore) -> None:
        store.create_study("a", {})
        store.link("a", "plan", "k", "4 bits", 1)
        store.link("a", "plan", "k", "5 bits", 2)
        store.link("a", "plan", "k", "4 bits", 3)
        assert [(row.label, row.position) for row in store.links("a", "plan")] == [("5 bits", 2), ("4 bits", 3)]

    @pytest.mark.parametrize("name", HOSTILE)
    def test_hostile_study_names_are_refused(self, store: SqlStore, name: str) -> None:
        with pytest.raises(InputError, match="1 to 200 printable characters") as caught:
            store.create_study(name, {})
        assert caught.value.code == "E114"

    def test_the_message_names_the_character(self, store: SqlStore) -> None:
        with pytest.raises(InputError, match=r"study name: character 3 is U\+0000"):
            store.create_study("ab\0", {})

    @pytest.mark.parametrize("name", ODD)
    def test_odd_study_names_are_only_names(self, store: SqlStore, name: str) -> None:
        store.create_study(name, {"name": name})
        store.link(name, "plan", "k", label=name)
        assert store.study(name).spec == {"name": name}
        assert store.links(name, "plan")[0].label == name

    def test_settings_outside_64_bits_are_refused(self, store: SqlStore) -> None:
        with pytest.raises(InputError, match=r"estimator\.seeds\[1\]: 9223372036854775808 does not fit in 64 bits"):
            store.create_study("a", {"estimator": {"seeds": [1, 2**63]}})
        store.create_study("a", {"seed": 2**63 - 1})
        with pytest.raises(InputError, match="position"):
            store.link("a", "plan", "k", position=2**63)
