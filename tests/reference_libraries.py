"""Reference libraries, imported without their noise: warnings are errors in these tests."""

from __future__ import annotations

import importlib
import logging
import warnings
from typing import Any


def quiet_import(name: str) -> Any:
    """Import a module; drop the warnings it gives and what it logs while loading.

    torchao logs which of its compiled kernels do not load, and bitsandbytes that there is no GPU; what is compared here
    needs neither.
    """
    before = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return importlib.import_module(name)
    finally:
        logging.disable(before)
