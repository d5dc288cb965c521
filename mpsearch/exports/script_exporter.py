"""What exporters share whose target is a Python library: a file of settings, and a script that runs the library."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from mpsearch.exports.config_export import RULES, ConfigExporter
from mpsearch.format import Format
from mpsearch.plan import BitPlan

#: Name of the script.
RUN = "run.py"

_HEAD = '''\
"""Quantise a model with {title} {version}, as the plan beside this file says.

    python run.py --model FOLDER --out FOLDER
"""

import argparse
import json
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
MODEL = {model}


def arguments():
    """Read the command line: the original model, and a folder that does not exist yet."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default=MODEL, required=not MODEL)
    parser.add_argument("--out", default="quantised"){more}
    return parser.parse_args()


def read(name):
    """Read a JSON file beside this one."""
    return json.loads((HERE / name).read_text(encoding="utf-8"))


'''


@dataclass(frozen=True)
class ScriptExporter(ConfigExporter):
    """Writes settings as JSON, and ``run.py``, which hands them to the target's own library.

    A subclass gives `data`, the settings, and ``script``, the code after the command line: functions, and a ``main``
    that is called last, and ``options``, names of further files that its command line takes.
    """

    script: ClassVar[str]
    options: ClassVar[tuple[str, ...]] = ()

    @abstractmethod
    def data(self, plan: BitPlan) -> Mapping[str, str]:
        """Return the files of settings, name -> content, for a plan that is not refused."""

    def texts(self, plan: BitPlan) -> Mapping[str, str]:
        """Return the settings and the script."""
        more = "".join(f'\n    parser.add_argument("--{name}")' for name in self.options)
        head = _HEAD.format(title=self.able.title, version=self.able.tested, model=ascii(self.source), more=more)
        return {**self.data(plan), RUN: f'{head}{self.script}\n\nif __name__ == "__main__":\n    main()\n'}


def without_rule(fmt: Format) -> str:
    """Name of a format without the rule that finds its scales or codes.

    >>> without_rule(Format.parse("int8-channel-mse@int8-token"))
    'int8-channel@int8-token'
    """
    weight = str(fmt.weight)
    for ending in RULES:
        weight = weight.removesuffix(ending)
    return f"{weight}@{fmt.activation}" if fmt.activation else weight


def shell_pattern(name: str) -> str:
    """A pattern, as in a shell, that matches one name and no other.

    >>> shell_pattern("layers.0[a]*?")
    'layers.0[[]a][*][?]'
    """
    return "".join(f"[{letter}]" if letter in "*?[" else letter for letter in name)
