"""Studies by reference: models and texts that the server was started with, by name."""

from __future__ import annotations

import socket
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mpsearch import registry
from mpsearch.bundled import model_folder, named_model
from mpsearch.errors import InputError, UsageError, did_you_mean
from mpsearch.files import located
from mpsearch.spec import StudySpec
from mpsearch.submitting import take_name

#: Texts that come with Python, and need no file.
LIBRARY = ("stdlib:calibration", "stdlib:validation")


@dataclass(frozen=True)
class Registered:
    """What clients may name.

    Attributes:
        models: name -> folder.
        data: name -> file.
    """

    models: Mapping[str, str] = field(default_factory=dict)
    data: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, models: list[str], data: list[str]) -> Registered:
        """Read ``NAME=PLACE`` of a command line; places must exist.

        Raises:
            UsageError: a text that is not of this form, or a name twice (E115).
            InputError: a place that is not there (E101).
        """
        here = Path.cwd()
        folders = {name: named_model(place, here) for name, place in _pairs("--model", models).items()}
        files = {
            name: place if place in LIBRARY else str(located(place, here))
            for name, place in _pairs("--data", data).items()
        }
        for name, place in folders.items():
            if not model_folder(place).is_dir():
                raise InputError("E101", f"--model {name}: '{place}' is not a folder")
        for name, place in files.items():
            if place not in LIBRARY and not Path(place).is_file():
                advice = f"a file, or {' or '.join(LIBRARY)}"
                raise InputError("E101", f"--data {name}: '{place}' is not a file", advice=advice)
        return cls(folders, files)

    def model(self, name: str) -> str:
        """Folder of a model (raises E913)."""
        return _of(self.models, name, "model")

    def text(self, name: str) -> str:
        """File of a text, or the name of one that comes with Python (raises E913)."""
        return name if name in LIBRARY else _of(self.data, name, "data")


def _pairs(option: str, texts: list[str]) -> dict[str, str]:
    found: dict[str, str] = {}
    for text in texts:
        name, equals, place = text.partition("=")
        if not (name and equals and place) or name in found or not name.isprintable():
            raise UsageError("E115", f"{option} '{text}' is not NAME=PLACE, or names one twice")
        found[name] = place
    return found


def _of(known: Mapping[str, str], name: str, what: str) -> str:
    if name not in known:
        raise InputError(
            "E913",
            f"no {what} '{name}' is registered here{did_you_mean(name, known)}",
            because="the server takes no paths, only names that it was started with",
            advice=f"mpsearch serve --{what} NAME=PLACE",
        )
    return known[name]


def spec_of(ask: Mapping[str, Any], known: Registered) -> StudySpec:
    """The question of a study that a client asks for; nothing in it names a file.

    Raises:
        InputError: a name that is not registered (E913), no such estimator or solver (E107), or as
            `StudySpec.of_values`.
    """
    values = {name: value for name, value in ask.items() if value is not None}
    values["model"] = known.model(ask["model"])
    values["calibration"] = known.text(ask["calibration"])
    values["validation"] = known.text(ask["validation"]) if ask["validation"] else ""
    for name in ("estimator_settings", "solver_settings"):
        for setting, value in values[name].items():
            if isinstance(value, str) and ("/" in value or "\\" in value):
                raise InputError("E913", f"{name}: '{setting}' names a place", because="the server takes no paths")
    spec = StudySpec.of_values(**values)
    # By name only: the estimators themselves load torch.
    if spec.estimator not in (names := registry.names("estimators")):
        raise InputError("E107", f"estimators: no '{spec.estimator}'{did_you_mean(spec.estimator, names)}")
    if spec.solver != "auto":
        registry.make("solvers", spec.solver, **spec.solver_settings)
    return spec


def submit(store: Any, spec: StudySpec) -> None:
    """Note a study, for some worker to take on.

    Raises:
        StorageError: a study of this name asks something else (E140).
    """
    take_name(spec, store)
    store.control.submit(spec.name, socket.gethostname())


def resume(store: Any, name: str) -> None:
    """Leave a study that has not reached its end to whoever drives it first; one that is driven goes on.

    Raises:
        StorageError: no such study (E141).
    """
    if store.control.status(name).state != "complete":
        store.control.submit(name, socket.gethostname())
