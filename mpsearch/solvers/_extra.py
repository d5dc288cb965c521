"""Packages that need not be installed, loaded when a searcher asks for them, without their warnings and messages."""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from mpsearch.errors import InputError


def load(searcher: str, module: str) -> Any:
    """Import a module of an optional package.

    Raises:
        InputError: it is not installed (E703).
    """
    try:
        with quiet():
            return importlib.import_module(module)
    except ImportError as error:
        package = {"sklearn": "scikit-learn"}.get(module.partition(".")[0], module.partition(".")[0])
        raise InputError(
            "E703",
            f"searcher '{searcher}' needs the package '{package}': {error}",
            advice="pip install 'mpsearch[search]'",
        ) from error


@contextmanager
def quiet() -> Iterator[None]:
    """Run the body without warnings: of experimental features, and of fits that did not quite converge."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
