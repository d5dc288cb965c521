"""A figure: its data, and the same drawn by Plotly and by matplotlib."""

from __future__ import annotations

import base64
import io
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mpsearch.errors import InputError, did_you_mean
from mpsearch.files import write_file
from mpsearch.plot.chart import Chart
from mpsearch.plot.text import plain
from mpsearch.plot.theme import theme_of
from mpsearch.web.markup import Html, data_script, join, tag

if TYPE_CHECKING:
    import plotly.graph_objects as go
    from matplotlib.figure import Figure as Picture

SUFFIXES = (".png", ".svg", ".pdf", ".html", ".json")
_IN_NOTEBOOKS = 110


@dataclass(frozen=True, eq=False)
class Figure:
    """Something drawn.

    Attributes:
        data: what is drawn, as plain values with their units; what is not known is None.
        chart: how it is drawn.

    >>> from mpsearch.plot import front
    >>> from mpsearch.testing.views import pretended
    >>> figure = front(pretended(20, 16, 4))
    >>> figure.data["unit"], figure.data["loss_unit"]
    ('bytes', 'nats/token')
    """

    data: dict[str, Any]
    chart: Chart = field(repr=False)

    def plotly(self, theme: str = "light") -> go.Figure:
        """Draw with Plotly, to look into.

        Args:
            theme: ``light`` or ``dark``.

        Raises:
            InputError: no such theme (E113).
        """
        from mpsearch.plot.by_plotly import draw

        return draw(self.chart, theme_of(theme))

    def matplotlib(self, theme: str = "light", width: float = 7.0) -> Picture:
        """Draw with matplotlib, for paper; pyplot knows nothing of the figure, and no setting is changed.

        Args:
            theme: ``light`` or ``dark``.
            width: in inches: 3.5 fits one column of a paper and 7 two.

        Raises:
            InputError: no such theme or width (E113), or matplotlib is not installed (E118).
        """
        from mpsearch.plot.by_matplotlib import draw

        return draw(self.chart, theme_of(theme), width)

    def save(self, path: str | Path, theme: str = "light", width: float = 7.0, dpi: int = 300) -> Path:
        """Write the figure, whole or not at all.

        ``.png``, ``.svg`` and ``.pdf`` are for paper; ``.html`` is one page to look into, in the colours that its
        reader prefers, and needs no network; ``.json`` holds `data`.

        Args:
            path: the file; its suffix says what is written.
            theme: ``light`` or ``dark``; not of ``.html``.
            width: in inches; not of ``.html``.
            dpi: pixels per inch, of ``.png`` and of the many marks that other pictures hold as pixels.

        Returns:
            The path.

        Raises:
            InputError: another suffix (E113), or as `matplotlib`.
            ResourceError: the folder cannot be written (E701).
        """
        target = Path(path)
        suffix = target.suffix.lower()
        if suffix not in SUFFIXES:
            advice = f"end it in one of {', '.join(SUFFIXES)}{did_you_mean(suffix, SUFFIXES)}"
            raise InputError(
                "E113", f"figure '{plain(target.name)}': no picture is written as '{suffix}'", advice=advice
            )
        if isinstance(dpi, bool) or not isinstance(dpi, int) or not 20 <= dpi <= 1200:
            raise InputError("E113", f"dpi: got {str(dpi)[:40]!r}", advice="give a whole number from 20 to 1200")
        if suffix == ".json":
            write_file(target, json.dumps(self.data, indent=1, ensure_ascii=False, allow_nan=False) + "\n")
        elif suffix == ".html":
            write_file(target, self.page())
        else:
            write_file(target, self._picture(suffix[1:], theme, width, dpi))
        return target

    def page(self) -> str:
        """Return one HTML page with the figure, which goes with the light or dark colours of its reader."""
        from plotly.offline import get_plotlyjs

        from mpsearch.plot.by_plotly import draw

        light, dark = theme_of("light"), theme_of("dark")
        drawn = {theme.name: json.loads(draw(self.chart, theme, words=False).to_json()) for theme in (light, dark)}
        style = (
            f"body{{margin:1rem;background:{light.ground};color:{light.text};font:14px/1.5 system-ui,sans-serif}}"
            "h1{font-size:1.1rem;font-weight:600;margin:0 0 .5rem}p{margin:.3rem 0;max-width:46rem}#figure{width:100%}"
            "h1,p{overflow-wrap:anywhere}"
            f"@media(prefers-color-scheme:dark){{body{{background:{dark.ground};color:{dark.text}}}}}"
        )
        head = tag(
            "head",
            tag("meta", charset="utf-8"),
            tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
            tag("title", plain(self.chart.title, 120)),
            tag("style", Html(style)),
            tag("script", Html(get_plotlyjs())),
        )
        body = tag(
            "body",
            tag("h1", plain(self.chart.title, 120)),
            tag("div", id="figure"),
            *(tag("p", plain(note, 1000)) for note in self.chart.notes),
            data_script(drawn, id="data"),
            tag("script", Html(_SCRIPT)),
        )
        return f"<!doctype html>{tag('html', head, body, lang='en')}\n"

    def show(self) -> None:
        """Show the figure to look into, in the notebook or in a browser."""
        self.plotly().show()

    def _picture(self, kind: str, theme: str, width: float, dots: int) -> bytes:
        drawn = self.matplotlib(theme, width)
        from matplotlib import rc_context

        from mpsearch.plot.by_matplotlib import SAVING

        # A date would make every file another one.
        dated = {"svg": {"Date": None}, "pdf": {"CreationDate": None}}.get(kind)
        stream = io.BytesIO()
        with rc_context(SAVING):
            drawn.savefig(stream, format=kind, dpi=dots, metadata=dated)
        return stream.getvalue()

    def _repr_png_(self) -> bytes | None:
        try:
            return self._picture("png", "light", 7.0, _IN_NOTEBOOKS)
        except InputError as error:
            if error.code != "E118":
                raise
            return None

    def _repr_html_(self) -> str:
        return self.picture_html()

    def picture_html(self) -> Html:
        """Return the picture as static HTML: no script, nothing that is loaded; words where matplotlib is missing."""
        png = self._repr_png_()
        words = " ".join([self.chart.title + ".", *self.chart.notes])
        if png is None:
            hint = "Pictures in notebooks need matplotlib: pip install 'mpsearch[plot]'. Without it: show()."
            return join([tag("p", plain(words, 1000)), tag("p", hint)])
        source = f"data:image/png;base64,{base64.b64encode(png).decode()}"
        return tag("img", src=source, alt=plain(words, 1000), width=770)


_SCRIPT = """
const figures = JSON.parse(document.getElementById("data").textContent);
const dark = matchMedia("(prefers-color-scheme: dark)");
const draw = () => {
  const figure = figures[dark.matches ? "dark" : "light"];
  Plotly.react("figure", figure.data, figure.layout, {responsive: true, displaylogo: false});
};
dark.addEventListener("change", draw);
draw();
"""
