"""The model that comes with mpsearch."""

from __future__ import annotations

from pathlib import Path

from mpsearch.errors import InputError
from mpsearch.files import located

#: How the model is named where a folder is asked for.
BUNDLED = "bundled:tiny-llama"
PREFIX = "bundled:"


def bundled_model() -> Path:
    """Return the folder of the bundled model: inside the installed package, or in a clone's ``studies``.

    Raises:
        InputError: the installation lacks it (E101).
    """
    here = Path(__file__).resolve().parent
    for folder in (here / "bundled" / "tiny-llama", here.parent / "studies" / "tiny-llama"):
        if (folder / "model.safetensors").is_file():
            return folder
    raise InputError("E101", "the bundled model is not installed", advice="reinstall mpsearch, or run from a clone")


def resolve_model(source: str, base: Path) -> str:
    """Turn a model's name into an absolute folder: ``bundled:tiny-llama``, or a path relative to ``base``."""
    if source == BUNDLED:
        return str(bundled_model())
    if source.startswith(PREFIX):
        raise InputError("E101", f"model '{source}' is not bundled; did you mean '{BUNDLED}'?")
    return str(located(source, base))
