"""Draw the fronts of the table "Budgets of tpot" in RESULTS.md: plans solved for time, and for bytes alone.

    python -m benchmarks.latency_picture [--out docs/latency-fronts.png]

Needs chromium, which draws the picture.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import tempfile
from pathlib import Path

import plotly.graph_objects as go
from plotly.offline import get_plotlyjs

_NUMBER = r"([\d.e+-]+)"
#: Budget, time (low to high), kept, MiB, loss, and of the plan for bytes alone: MiB, loss, time.
ROW = re.compile(
    rf"\| [\d.]+ \| {_NUMBER} \({_NUMBER} to {_NUMBER}\) \| (?:yes|no) \| [\d.]+ \| {_NUMBER} "
    rf"\| [\d.]+ \| {_NUMBER} \| {_NUMBER} \|"
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("docs/latency-fronts.png"))
    out = parser.parse_args().out
    rows = [tuple(map(float, row)) for row in ROW.findall(Path("benchmarks/RESULTS.md").read_text(encoding="utf-8"))]
    if not rows:
        raise SystemExit("RESULTS.md holds no table of budgets of tpot")
    timed, low, high, loss, other_loss, other = zip(*rows, strict=True)
    figure = go.Figure()
    figure.add_scatter(
        x=timed, y=loss, name="solved for time (tpot)", mode="lines+markers",
        marker={"symbol": "circle", "size": 9}, line={"color": "#0072B2"},
        error_x={"type": "data", "symmetric": False, "array": [h - t for h, t in zip(high, timed, strict=True)],
                 "arrayminus": [t - x for t, x in zip(timed, low, strict=True)]},
    )  # fmt: skip
    figure.add_scatter(
        x=other, y=other_loss, name="solved for bytes alone, of equal predicted loss", mode="markers",
        marker={"symbol": "diamond-open", "size": 10, "line": {"width": 2}, "color": "#D55E00"},
    )  # fmt: skip
    figure.update_layout(
        template="simple_white", width=900, height=520, margin={"l": 80, "r": 20, "t": 50, "b": 60},
        title="Measured time of a decode step and predicted loss: ONNX Runtime, one core, 99 M weights",
        xaxis={"title": "measured time per token at context 512, ms"},
        yaxis={"title": "predicted loss (squared weight error)", "type": "log"},
        legend={"x": 0.98, "y": 0.98, "xanchor": "right"}, font={"size": 13},
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        page = Path(folder) / "page.html"
        body = figure.to_html(include_plotlyjs=False, full_html=False, config={"staticPlot": True})
        page.write_text(f"<meta charset=utf-8><body style=margin:0><script>{get_plotlyjs()}</script>{body}", "utf-8")
        subprocess.run(
            ["chromium", "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--window-size=900,520",
             "--virtual-time-budget=10000", f"--screenshot={out.resolve()}", page.as_uri()],
            check=True, capture_output=True,
        )  # fmt: skip


if __name__ == "__main__":
    main()
