"use strict";
(() => {
  const { text } = MP;

  /** Draw measured over predicted loss, with the line where both are equal, and list the worst predictions. */
  MP.predicted = (element, study, on = {}) => {
    const { points, unit } = study.data;
    const pairs = points.label.map((_, i) => i).filter((i) => points.loss[i] !== null && points.predicted[i] !== null);
    if (!pairs.length) {
      MP.fill(element, MP.el("p", { class: "note" }, "No plan has both a predicted and a measured loss yet."));
      return { show() {}, highlight() {} };
    }
    const value = MP.spearman(pairs.map((i) => points.predicted[i]), pairs.map((i) => points.loss[i]));
    const interval = MP.spearmanInterval(value, pairs.length);
    const log = MP.isWide(pairs.flatMap((i) => [points.predicted[i], points.loss[i]]));
    const shown = pairs.filter((i) => !log || (points.predicted[i] > 0 && points.loss[i] > 0));
    const words = [`${text.count(pairs.length, "plan")} with a predicted and a measured loss.`];
    if (value !== null) words.push(`Rank correlation (Spearman) ${text.fixed(value, 3).replace("-", text.MINUS)}${interval ? `, 95\u00a0% interval ${interval.map((end) => text.fixed(end, 3).replace("-", text.MINUS)).join(" to ")}` : ""}.`);
    if (shown.length < pairs.length) words.push(`${text.count(pairs.length - shown.length, "plan")} of a loss of 0 or less not drawn.`);
    const box = MP.el("div", { class: "plot square" });
    const away = (i) => Math.abs(points.loss[i] - points.predicted[i]);
    const worst = pairs.toSorted((a, b) => away(b) - away(a)).slice(0, 10);
    const head = ["plan", "predicted loss", "measured loss", "measured less predicted"];
    const rows = worst.map((i) => MP.el("tr", { "data-plan": i },
      MP.el("th", { scope: "row" }, on.pick
        ? MP.el("button", { type: "button", class: "link", onclick: (event) => on.pick(i, event) }, MP.el("bdi", null, points.label[i] || `plan ${i}`))
        : MP.el("bdi", null, points.label[i] || `plan ${i}`)),
      [text.atMost(points.predicted[i], points.doubt[i]), text.withSpread(points.loss[i], points.spread[i]), text.signed(points.loss[i] - points.predicted[i])].map((cell, k) => MP.el("td", { class: "n", "data-label": head[k + 1] }, cell))));
    MP.fill(element, box, MP.el("p", { class: "note" }, words.join(" ")),
      MP.el("details", null, MP.el("summary", null, `The ${worst.length} worst predicted`), MP.el("div", { class: "scroll" }, MP.el("table", { class: "list" },
        MP.el("caption", null, `Loss in ${unit}; the largest differences first`),
        MP.el("thead", null, MP.el("tr", null, head.map((name, k) => MP.el("th", { scope: "col", class: k ? "n" : null }, name)))), MP.el("tbody", null, rows)))));
    const both = MP.range(shown.flatMap((i) => [points.predicted[i], points.loss[i]]), log) ?? [0, 1];
    let marked = null;
    let axes = null;
    const view = MP.canvas(box, { role: "img", "aria-label": `Measured over predicted loss. ${words.join(" ")}` }, () => draw());
    const place = (i) => [axes.x.at(points.predicted[i]), axes.y.at(points.loss[i])];
    const draw = () => {
      if (!view.width) return;
      const { context } = view;
      axes = {
        x: MP.scale({ low: both[0], high: both[1], log, from: 72, to: view.width - 14 }),
        y: MP.scale({ low: both[0], high: both[1], log, from: view.height - 46, to: 12 }),
      };
      view.clear();
      MP.axes(context, { ...axes, xName: `predicted loss (${text.safe(unit)})`, yName: `measured loss (${text.safe(unit)})` });
      context.strokeStyle = MP.tone("--muted");
      context.setLineDash([6, 4]);
      context.beginPath();
      context.moveTo(axes.x.at(both[0]), axes.y.at(both[0]));
      context.lineTo(axes.x.at(both[1]), axes.y.at(both[1]));
      context.stroke();
      context.setLineDash([]);
      if (shown.length <= 400) {
        context.strokeStyle = MP.tone("--faint");
        context.beginPath();
        for (const i of shown) {
          if (!points.spread[i]) continue;
          const [x] = place(i);
          const low = points.loss[i] - points.spread[i];
          context.moveTo(x, axes.y.at(points.loss[i] + points.spread[i]));
          context.lineTo(x, low <= 0 && log ? axes.y.from : axes.y.at(low));
        }
        context.stroke();
      }
      for (const [group, , shape] of MP.groups)
        MP.marks(context, shape, shown.filter((i) => points.group[i] === group).map(place), shown.length > 400 ? 2.2 : 4, MP.tone(`--g-${group}`));
      if (marked !== null && shown.includes(marked)) MP.marks(context, "ring", [place(marked)], 9, MP.tone("--accent"));
    };
    const nearest = (event) => {
      const edge = view.canvas.getBoundingClientRect();
      const [x, y] = [event.clientX - edge.left, event.clientY - edge.top];
      let [best, least] = [null, 20 ** 2];
      for (const i of shown) {
        const [px, py] = place(i);
        const far = (px - x) ** 2 + (py - y) ** 2;
        if (far < least) [best, least] = [i, far];
      }
      return best;
    };
    view.canvas.addEventListener("pointermove", (event) => on.hover?.(nearest(event)));
    view.canvas.addEventListener("pointerleave", () => on.hover?.(null));
    view.canvas.addEventListener("click", (event) => { const i = nearest(event); if (i !== null) on.pick?.(i, event); });
    MP.onTone(draw);
    draw();
    return { show: draw, highlight: (i) => { marked = i; draw(); }, value, interval, worst };
  };
})();
