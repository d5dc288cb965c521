"""What is known of stored values by their kind: how each is read, and the key that its content gives."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from mpsearch.keys import content_key
from mpsearch.scoring import scores_key

#: Kinds whose key is that of their whole body.
_BY_BODY = ("cost", "origin", "search", "rival", "tournament", "profile", "energy")
#: Kinds that belong to studies, and travel with them. Times of kernels and models belong to a machine, and every later
#: study of that machine would believe them.
KINDS = (
    *_BY_BODY, "plan", "scores", "score_unit", "survey", "ratios", "measurement", "unmeasured",
)  # fmt: skip
#: Of these, numbers whose keys hold more than is in them: nobody can tell whether they were measured or made up.
TRUSTED = ("survey", "scores", "score_unit", "ratios", "measurement", "unmeasured")


def key_of(kind: str, body: Mapping[str, Any]) -> str | None:
    """Return the key that a body must stand under; None where the key is made of something that is not in it.

    Raises:
        Exception: of any kind, for a body that cannot be such a value.

    >>> key_of("rival", {"limit": 1}) == content_key({"limit": 1})
    True
    """
    if kind in _BY_BODY:
        return content_key(dict(body))
    if kind == "plan":
        return content_key({name: value for name, value in body.items() if name != "digest"})
    if kind == "scores":
        return scores_key(body["source"])
    return None


def read(kind: str, body: Mapping[str, Any]) -> None:
    """Read a value as a study would, and let it go.

    Raises:
        Exception: of any kind, for a body that a study could not use.
    """
    reader = _READERS.get(kind)
    if reader is not None:
        reader(body)


def _survey(body: Mapping[str, Any]) -> None:
    from mpsearch.tasks import Survey

    Survey.from_json(body)


def _scores(body: Mapping[str, Any]) -> None:
    from mpsearch.tables import SensitivityTable

    SensitivityTable.from_json(body)


def _cost(body: Mapping[str, Any]) -> None:
    from mpsearch.tables import CostTable

    CostTable.from_json(body)


def _plan(body: Mapping[str, Any]) -> None:
    from mpsearch.plan import BitPlan

    # What it says of bytes and kinds is worked out again by every reader, so let it be worked out here once.
    assert BitPlan.from_json(body).to_json()["digest"]


def _measurement(body: Mapping[str, Any]) -> None:
    from mpsearch.front import Measurement

    Measurement.from_json({"label": "", "seconds": 0.0, **body})


def _profile(body: Mapping[str, Any]) -> None:
    from mpsearch.hardware.profile import Profile

    Profile.from_json(body)


def _energy(body: Mapping[str, Any]) -> None:
    if not all(float(mac) >= 0 and float(byte) >= 0 for mac, byte in body["energy"].values()):
        raise ValueError("picojoules below zero")


def _ratios(body: Mapping[str, Any]) -> None:
    if any(not (x is None or isinstance(x, (int, float))) for x in body["ratios"].values()):
        raise ValueError("a ratio that is no number")


def _unit(body: Mapping[str, Any]) -> None:
    if not isinstance(body["unit"], str):
        raise ValueError("a unit that is no text")


def _unmeasured(body: Mapping[str, Any]) -> None:
    if not isinstance(body["plan"], dict) or not isinstance(body["batches"], int):
        raise ValueError("neither a plan nor batches")


_READERS: Mapping[str, Callable[[Mapping[str, Any]], None]] = {
    "survey": _survey,
    "scores": _scores,
    "cost": _cost,
    "plan": _plan,
    "measurement": _measurement,
    "profile": _profile,
    "energy": _energy,
    "ratios": _ratios,
    "score_unit": _unit,
    "unmeasured": _unmeasured,
}
