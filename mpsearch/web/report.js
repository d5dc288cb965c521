"use strict";
(() => {
  const style = () => getComputedStyle(document.documentElement);
  // Colours are written as names of style variables, so that charts follow the reader's light or dark mode.
  const coloured = (value, key, from) => {
    if (Array.isArray(value)) return value.map((item) => coloured(item, key, from));
    if (value && typeof value === "object")
      return Object.fromEntries(Object.entries(value).map(([name, item]) => [name, coloured(item, name, from)]));
    const named = typeof value === "string" && /color$/.test(key) && /^var\((--[a-z]+)\)$/.exec(value);
    return named ? from.getPropertyValue(named[1]).trim() : value;
  };
  const config = {
    responsive: true, displaylogo: false, showLink: false, showTips: false, plotlyServerURL: "",
    modeBarButtons: [["toImage", "resetScale2d"]],
  };
  const figures = [...document.querySelectorAll("script[data-chart]")].map((holder) => ({
    at: document.getElementById(holder.dataset.chart), figure: JSON.parse(holder.textContent),
  }));
  const draw = () => {
    for (const { at, figure } of figures) {
      const { data, layout } = coloured(figure, "", style());
      // A finger on the chart scrolls the page.
      layout.dragmode = matchMedia("(pointer: coarse)").matches ? false : "zoom";
      Plotly.react(at, data, layout, config);
    }
  };
  // The upper axis says the same as the lower one in another unit: keep them together when zooming.
  const follow = ({ at, figure }) => at.on("plotly_relayout", () => {
    const { xaxis, xaxis2 } = at.layout;
    const range = xaxis.range.map((end) => end * figure.twin);
    if (range.some((end, i) => Math.abs(end - xaxis2.range[i]) > 1e-9 * Math.abs(end)))
      Plotly.relayout(at, { "xaxis2.range": range, "xaxis2.autorange": false });
  });
  draw();
  figures.filter(({ figure }) => figure.twin).forEach(follow);
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);

  const tip = document.getElementById("tip");
  let cell = null;
  const place = () => {
    tip.hidden = !cell;
    if (!cell) return;
    tip.textContent = cell.dataset.tip;
    const box = cell.getBoundingClientRect();
    const left = Math.min(Math.max(8, box.left), innerWidth - tip.offsetWidth - 8);
    const below = box.bottom + 6;
    const top = below + tip.offsetHeight < innerHeight ? below : box.top - tip.offsetHeight - 6;
    tip.style.left = `${left}px`;
    tip.style.top = `${top}px`;
  };
  for (const name of ["mouseover", "focusin"])
    document.addEventListener(name, (event) => { cell = event.target.closest("[data-tip]"); place(); });
  document.addEventListener("scroll", place, true);
})();
