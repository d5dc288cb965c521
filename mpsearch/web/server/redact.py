"""What a reader without rights does not see: paths, addresses, and names of machines."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

#: Fields that say where something ran.
_HIDDEN = frozenset({"home", "driver", "owner", "worker", "workers", "host", "pid", "storage", "out"})
#: Fields that hold names of layers, decisions, formats and studies: no text of them is a path, whatever it looks like.
#: Names of layers of ONNX begin with a slash, and a page that finds them by name must be given them whole.
_NAMES = frozenset({
    "name", "study", "layer", "layers", "decision", "decisions", "tie", "shared", "rows", "columns", "format",
    "formats",
})  # fmt: skip
#: Labels of plans: one that was imported may name its file, yet a word of it is no machine.
_LABELS = frozenset({"label", "labels"})
_ADDRESS = re.compile(r"\b[A-Za-z][A-Za-z0-9+.-]*:///?[^\s'\"`,;)]*")
_QUOTED = re.compile(r"(['\"`])((?:file:|~?/|[A-Za-z]:[\\/]|\\\\)[^'\"`]*)\1")
_PATH = re.compile(r"(?<![\w./\\~…<])(?:~?/|[A-Za-z]:[\\/]|\\\\)[^\s'\"`,;:)]+")


def redact(value: Any, machines: Iterable[str] = ()) -> Any:
    """Take paths, addresses and machines out of plain values; the last part of a path stays.

    Args:
        value: plain values.
        machines: names of machines.

    >>> redact({"model": "/home/ann/llama", "home": "pc", "unit": "nats/token", "text": "on pc: no '/a b/c'"}, ["pc"])
    {'model': '…/llama', 'unit': 'nats/token', 'text': "on …: no '…/c'"}
    >>> redact({"decisions": ["/model/layers.0/MatMul"], "label": ["model of /home/ann/plan.json"]}, ["model"])
    {'decisions': ['/model/layers.0/MatMul'], 'label': ['model of …/plan.json']}
    """
    names = sorted({name for name in machines if name}, key=len, reverse=True)
    hosts = re.compile("|".join(rf"(?<![\w.-]){re.escape(name)}(?![\w])" for name in names)) if names else None
    return _redact(value, hosts)


def _redact(value: Any, hosts: re.Pattern[str] | None) -> Any:
    if isinstance(value, dict):
        return {
            name: item if name in _NAMES and _is_text(item) else _redact(item, None if name in _LABELS else hosts)
            for name, item in value.items()
            if name not in _HIDDEN
        }
    if isinstance(value, list):
        return [_redact(item, hosts) for item in value]
    return redact_text(value, hosts) if isinstance(value, str) else value


def _is_text(item: Any) -> bool:
    return isinstance(item, str) or (isinstance(item, list) and all(isinstance(each, str) for each in item))


def redact_text(text: str, hosts: re.Pattern[str] | None = None) -> str:
    """Take paths, addresses and machines out of a text.

    >>> redact_text("no study 'a' in sqlite:////srv/x.db; see /var/log/x.log")
    "no study 'a' in …; see …/x.log"
    >>> redact_text("file:/srv/ann's models/profile.json")
    'file:…/profile.json'
    """
    if re.match(r"(?:file:)?(?:~?/|[A-Za-z]:[\\/]|\\\\)", text) and "\n" not in text:
        # A text that begins so is a path, whatever stands in it.
        return ("file:" if text.startswith("file:") else "") + _last(text)
    text = _ADDRESS.sub("…", text)
    text = _QUOTED.sub(lambda found: f"{found[1]}{_last(found[2])}{found[1]}", text)
    text = _PATH.sub(lambda found: _last(found[0]), text)
    return hosts.sub("…", text) if hosts else text


def _last(path: str) -> str:
    return "…/" + re.split(r"[/\\]", path.rstrip("/\\"))[-1]
