"""HTML in which everything is text unless it was made here."""

from __future__ import annotations

import html
import json
from collections.abc import Iterable
from typing import Any

from mpsearch.spelling import seen_only

_VOID = {"meta", "br"}


class Html(str):
    """Text that is HTML already."""

    __slots__ = ()


def clean(text: object) -> str:
    """Return a value as text that HTML can hold and that shows all it holds: what is not seen becomes ``\ufffd``."""
    return seen_only(str(text).encode("utf-16", "surrogatepass").decode("utf-16", "replace"), keep="\t\n\r")


def escape(text: object) -> Html:
    """Escape a value; what is HTML already stays as it is.

    >>> escape("<b>"), escape(Html("<b>"))
    ('&lt;b&gt;', '<b>')
    """
    return text if isinstance(text, Html) else Html(html.escape(clean(text)))


def join(parts: Iterable[object], between: str = "") -> Html:
    """Put parts one after the other, each escaped unless it is HTML."""
    return Html(between.join(escape(part) for part in parts))


def tag(name: str, /, *children: object, **attributes: object) -> Html:
    """Make an element; children and attribute values are escaped.

    Args:
        name: name of the element.
        children: text or HTML.
        attributes: a trailing ``_`` is dropped and other ``_`` become ``-``; ``None`` leaves an attribute out.

    >>> tag("td", "a < b", class_="wide", data_tip='"')
    '<td class="wide" data-tip="&quot;">a &lt; b</td>'
    """
    named = {key.rstrip("_").replace("_", "-"): value for key, value in attributes.items() if value is not None}
    written = "".join(f' {key}="{escape(value)}"' for key, value in named.items())
    return Html(f"<{name}{written}>" if name in _VOID else f"<{name}{written}>{join(children)}</{name}>")


def data_script(value: Any, **attributes: object) -> Html:
    r"""Write plain values into a script element that holds data and cannot be left from inside.

    Raises:
        ValueError: for NaN or infinity, which JSON cannot hold.

    >>> data_script("</script>")
    '<script type="application/json">"\\u003c/script\\u003e"</script>'
    """
    text = json.dumps(value, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    for sign in "<>&":
        text = text.replace(sign, f"\\u{ord(sign):04x}")
    return tag("script", Html(text), type="application/json", **attributes)
