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
    return str(model_folder(named_model(source, base)))


def named_model(source: str, base: Path) -> str:
    """Return a model's name as a question keeps it: a bundled one's as it is, so that every machine finds its own copy.

    Args:
        source: ``bundled:tiny-llama``, or a path relative to ``base``.
        base: where a relative path starts.

    Raises:
        InputError: no such bundled model, or no such user's folder (E101).

    >>> named_model("bundled:tiny-llama", Path("/data")), named_model("llama", Path("/data"))
    ('bundled:tiny-llama', '/data/llama')
    """
    if source == BUNDLED:
        return source
    if source.startswith(PREFIX):
        raise InputError("E101", f"model '{source}' is not bundled; did you mean '{BUNDLED}'?")
    return str(located(source, base))


def model_folder(source: str | Path) -> Path:
    """Return the folder that a name of `named_model` means on this machine (raises E101)."""
    text = str(source)
    return bundled_model() if text.startswith(PREFIX) and named_model(text, Path()) else Path(source)


def model_title(source: str) -> str:
    """Return what people call a model: the last part of its folder, or the name of a bundled one.

    >>> model_title("bundled:tiny-llama"), model_title("/data/llama/")
    ('tiny-llama', 'llama')
    """
    return source.removeprefix(PREFIX).rstrip("/").rpartition("/")[2]
