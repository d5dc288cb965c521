"""A plug-in's family of formats joins and passes the suite; broken ones are caught by it."""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest
import torch
from torch import Tensor

from mpsearch import registry
from mpsearch.errors import InputError
from mpsearch.format import Format, all_formats
from mpsearch.layer import Layer
from mpsearch.model.codec import Bytes, Evidence, Parts, as_bytes
from mpsearch.testing import formats as suite

sys.path.insert(0, str(Path(__file__).parents[1] / "examples" / "shift_format"))
from shift_format import Shifted, ShiftedCodec

torch.set_num_threads(1)


@pytest.fixture
def plugged(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if installed: a distribution with the entry point ``shift`` of the group ``mpsearch.formats``."""
    point = EntryPoint("shift", "shift_format:Shifted", "mpsearch.formats")
    monkeypatch.setattr(registry, "entry_points", lambda group: [point] if group == "mpsearch.formats" else [])


def test_a_plug_in_joins_and_keeps_the_laws(plugged: None) -> None:
    assert Format.parse("shift8") == Shifted(8)
    assert str(Format.parse("shift5@int8-token").weight) == "shift5"
    assert [str(fmt) for fmt in all_formats()["shift"]] == ["shift8", "shift5"]
    with pytest.raises(InputError, match="E110"):
        Format.parse("shift1")
    with pytest.raises(InputError, match="did you mean 'shift8'"):
        Format.parse("shfit8")
    for fmt in all_formats()["shift"]:
        suite.check_format(fmt, odd=True)
    suite.check_family(all_formats()["shift"])


def test_a_plug_in_is_unknown_where_it_is_not_installed() -> None:
    with pytest.raises(InputError, match="E109"):
        Format.parse("shift7")


def broken(law: str, codec: Mapping[str, object] = {}, **changes: object) -> object:
    """A copy of the plug-in with one thing wrong, and what the suite must say of it."""
    name = "Broken" + re.sub(r"\W", "", law.title())
    globals()[f"{name}Codec"] = type(f"{name}Codec", (ShiftedCodec,), dict(codec))
    space = {"codec": f"{__name__}:{name}Codec", "__slots__": (), **changes}
    return pytest.param(type(name, (Shifted,), space)(8), law, id=name)


def write_to_argument(self: ShiftedCodec, rows: Tensor, fmt: Shifted, evidence: Evidence) -> Tensor:
    rows.add_(1.0)
    return ShiftedCodec.fake(self, rows, fmt, evidence)


def part_of_argument(self: ShiftedCodec, rows: Tensor, fmt: Shifted, evidence: Evidence) -> Tensor:
    return rows if rows.dtype == torch.float32 else rows.float()


def one_step_off(self: ShiftedCodec, rows: Tensor, fmt: Shifted, evidence: Evidence) -> Tensor:
    return ShiftedCodec.fake(self, rows, fmt, evidence) * 1.0000001


def short(self: ShiftedCodec, parts: Parts, fmt: Shifted) -> dict[str, Bytes]:
    return {name: as_bytes(part)[:-1] for name, part in parts.items()}


def turned(self: ShiftedCodec, packed: Mapping[str, Bytes], fmt: Shifted, layer: Layer) -> dict[str, Tensor]:
    found = ShiftedCodec.unpack(self, packed, fmt, layer)
    return {**found, "payload": found["payload"].flip(0)}


def noisy(self: ShiftedCodec, rows: Tensor, fmt: Shifted, evidence: Evidence) -> dict[str, Tensor]:
    return ShiftedCodec.encode(self, rows + torch.rand(rows.shape) * rows.abs() * 0.1, fmt, evidence)


def to_nothing(self: ShiftedCodec, rows: Tensor, fmt: Shifted, evidence: Evidence) -> dict[str, Tensor]:
    made = ShiftedCodec.encode(self, rows, fmt, evidence)
    return {**made, "payload": made["payload"] * 0}


def in_half(self: ShiftedCodec, rows: Tensor, fmt: Shifted, evidence: Evidence) -> dict[str, Tensor]:
    return ShiftedCodec.encode(self, rows.half().float(), fmt, evidence)


def upwards(self: ShiftedCodec, rows: Tensor, fmt: Shifted, evidence: Evidence) -> dict[str, Tensor]:
    made = ShiftedCodec.encode(self, rows, fmt, evidence)
    return {**made, "payload": (made["payload"] + (made["payload"] != 0)).clamp(-127, 127)}


BROKEN = [
    broken("writes to the", {"fake": write_to_argument}),
    broken("returns the memory", {"fake": part_of_argument}),
    broken("codes stand for other weights", {"fake": one_step_off}),
    broken("packed bytes", {"pack": short}),
    broken("does not come back from its bytes", {"unpack": turned}),
    broken("normal numbers: codes stand for other", {"encode": noisy}),
    broken("loses 100% of the squares", {"encode": to_nothing}),
    broken("loses 100% of the squares of the weights", {"encode": in_half}),
    broken("change when rounded again", {"encode": upwards}),
    broken("does not read back as it prints", __str__=lambda self: "shift9"),
    broken("are empty", purpose=""),
    broken("payload is not the first", itemised_bytes=lambda self, x: {"shifts": x.rows, "payload": x.weights}),
    broken("parts ['payload', 'shifts'], priced", itemised_bytes=lambda self, x: {"payload": x.weights}),
    broken("takes a KV cache", refuses=lambda self, layer: ""),
    broken("takes no layer", refuses=lambda self, layer: "no"),
]


def laws_broken(fmt: Format) -> list[str]:
    found = []
    for law in (*suite.CHECKS, suite.check_odd):
        try:
            law(fmt)
        except (AssertionError, InputError, TypeError) as error:
            found.append(str(error))
    return found


@pytest.mark.parametrize(("fmt", "law"), BROKEN)
def test_the_suite_catches_what_is_broken(fmt: Format, law: str) -> None:
    assert any(law in text for text in laws_broken(fmt)), laws_broken(fmt)


def test_the_suite_catches_families_whose_bytes_shrink() -> None:
    class Shrinking(Shifted):
        __slots__ = ()

        def itemised_bytes(self, layer: Layer) -> dict[str, int]:
            return {"payload": layer.weights * 8 // self.bits}

    with pytest.raises(AssertionError, match="takes fewer bytes than"):
        suite.check_family([Shrinking(8), Shrinking(4)])
