"use strict";
(() => {
  const { text } = MP;
  const BARS = 12;

  /**
   * Decisions on which two plans differ, the largest effect on the predicted loss first.
   * @returns {Array<{row: number, before: number, after: number, loss: number|null, error: number|null, bytes: number|null}>}
   */
  MP.changes = (study, a, b) => {
    const found = [];
    study.decisions.forEach((decision, row) => {
      const [before, after] = [a[study.lead[row]], b[study.lead[row]]];
      if (before === after) return;
      const { loss, error, bytes } = decision;
      const known = loss[before] !== null && loss[after] !== null;
      found.push({
        row, before, after,
        loss: known ? loss[after] - loss[before] : null,
        error: known && error[before] !== null && error[after] !== null ? Math.hypot(error[before], error[after]) : null,
        bytes: bytes[before] === null || bytes[after] === null ? null : bytes[after] - bytes[before],
      });
    });
    const name = (change) => study.decisions[change.row].name;
    return found.sort((p, q) => (p.loss === null) - (q.loss === null) || Math.abs(q.loss ?? 0) - Math.abs(p.loss ?? 0)
      || Math.abs(q.bytes ?? 0) - Math.abs(p.bytes ?? 0) || (name(p) < name(q) ? -1 : 1));
  };

  /** Heights of the way from one loss to the other: every one an exact sum, so that the last is the second plan's. */
  const steps = (study, a, b, changes) => {
    const now = study.decisions.map((decision, row) => decision.loss[a[study.lead[row]]]);
    const after = study.decisions.map((decision, row) => decision.loss[b[study.lead[row]]]);
    let height = MP.sum(now);
    if (height === null || MP.sum(after) === null) return [];
    const listed = changes.length <= BARS ? changes : changes.slice(0, BARS - 1);
    const bars = listed.map(({ row }) => {
      now[row] = after[row];
      const bar = { label: study.decisions[row].name, start: height, end: MP.sum(now) };
      height = bar.end;
      return bar;
    });
    const rest = changes.length - listed.length;
    if (rest) bars.push({ label: `${rest} more`, start: height, end: MP.sum(after) });
    return bars;
  };

  const waterfall = (study, bars, names) => {
    if (!bars.length) return null;
    const all = [{ label: names[0], start: 0, end: bars[0].start, whole: true }, ...bars, { label: names[1], start: 0, end: bars.at(-1).end, whole: true }];
    const [width, line, left, right] = [640, 22, 220, 90];
    const values = bars.flatMap((bar) => [bar.start, bar.end]);
    const [least, most] = MP.range(values, false, 0.15);
    const x = MP.scale({ low: Math.max(0, least), high: most, from: left, to: width - right });
    const height = all.length * line + 4;
    const short = (name) => (name.length > 34 ? `\u2026${name.slice(-33)}` : name);
    const parts = all.map((bar, i) => {
      const [from, to] = [x.at(bar.whole ? x.low : bar.start), x.at(bar.end)];
      const change = bar.end - bar.start;
      const kind = bar.whole ? "whole" : change <= 0 ? "better" : "worse";
      const words = bar.whole ? text.plain(bar.end) : text.signed(change);
      return MP.svg("g", null, MP.svg("title", null, `${bar.label}: ${words} ${study.data.unit}`),
        MP.svg("text", { x: left - 8, y: i * line + 16, "text-anchor": "end" }, short(text.safe(bar.label))),
        MP.svg("rect", { class: kind, x: Math.min(from, to), y: i * line + 4, width: Math.max(1.5, Math.abs(to - from)), height: line - 7 }),
        MP.svg("text", { x: Math.max(from, to) + 6, y: i * line + 16 }, words));
    });
    return MP.el("figure", null,
      MP.svg("svg", { class: "waterfall", viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": `Predicted loss from ${names[0]} to ${names[1]}, change by change` }, parts),
      MP.el("figcaption", null, `Predicted loss (${study.data.unit}) from one plan to the other, the largest changes first. ${x.low > 0 ? "The axis does not begin at zero." : "The axis begins at zero."}`));
  };

  const totals = (study, a, b, names, numbers) => {
    const same = a.reduce((count, format, i) => count + (format === b[i] ? 1 : 0), 0);
    const row = (name, values, write, change) => {
      const known = values.every((value) => value !== null);
      return MP.el("tr", null, MP.el("th", { scope: "row" }, name), values.map((value, i) => MP.el("td", { class: "n", "data-label": names[i] }, value === null ? "unknown" : write(value, i))),
        MP.el("td", { class: "n", "data-label": "difference" }, known ? change(values[1] - values[0]) : ""));
    };
    const sizes = [study.bytes(a), study.bytes(b)];
    const signed = (value) => `${value > 0 ? "+" : ""}${text.size(value)}`;
    const { points, unit } = study.data;
    const rows = [
      row("size, exact", sizes, (value) => text.size(value), signed),
      row("bits per weight", sizes.map((size) => (size === null || !study.data.weights ? null : (8 * size) / study.data.weights)), text.bits, text.signed),
      row(`predicted loss, ${unit}`, [study.predicted(a), study.predicted(b)], text.plain, text.signed),
    ];
    if (numbers?.every((i) => text.known(i)))
      rows.push(row(`measured loss, ${unit}`, numbers.map((i) => study.loss(i)), (value, i) => text.withSpread(value, points.spread[numbers[i]]), text.signed));
    return [
      MP.el("p", null, `Same in ${same} of ${text.count(a.length, "layer")}. Differences are ${names[1]} less ${names[0]}.`),
      MP.el("div", { class: "scroll" }, MP.el("table", { class: "list totals" },
        MP.el("thead", null, MP.el("tr", null, MP.el("th", { scope: "col" }, "of the whole model"), names.map((name) => MP.el("th", { scope: "col", class: "n" }, name)), MP.el("th", { scope: "col", class: "n" }, "difference"))),
        MP.el("tbody", null, rows))),
    ];
  };

  const MOST = 200;
  const listed = (study, changes, names) => {
    const head = ["layer", names[0], names[1], `predicted loss, ${study.data.unit}`, "bytes"];
    const rows = changes.slice(0, MOST).map((change) => {
      const { name, layers } = study.decisions[change.row];
      const noise = change.error !== null && Math.abs(change.loss) < 1.96 * change.error;
      return MP.el("tr", null,
        MP.el("th", { scope: "row" }, MP.el("bdi", null, name), layers.length > 1 ? MP.el("span", { class: "tag" }, `${layers.length} layers`) : null, noise ? MP.el("span", { class: "tag" }, "within noise") : null),
        MP.el("td", { "data-label": head[1] }, study.format(change.before)), MP.el("td", { "data-label": head[2] }, study.format(change.after)),
        MP.el("td", { class: "n", "data-label": head[3] }, change.loss === null ? "not scored" : text.signed(change.loss)),
        MP.el("td", { class: "n", "data-label": head[4] }, change.bytes === null ? "unknown" : `${change.bytes > 0 ? "+" : ""}${text.bytes(change.bytes)}`));
    });
    const more = changes.length > MOST ? MP.el("p", { class: "note" }, `${changes.length - MOST} more of less effect are left out.`) : null;
    return [MP.el("div", { class: "scroll tall", tabindex: 0, role: "region", "aria-label": "Layers that differ" }, MP.el("table", { class: "list" },
      MP.el("thead", null, MP.el("tr", null, head.map((name, i) => MP.el("th", { scope: "col", class: i > 2 ? "n" : null }, name)))), MP.el("tbody", null, rows))), more];
  };

  /** Compare two plans of a study. @param {HTMLElement} element @param {Object} study */
  MP.compare = (element, study, on = {}) => {
    const room = MP.el("div");
    const rest = MP.el("div");
    const key = MP.el("p", { class: "key" });
    MP.fill(element, rest, MP.el("h3", null, "Difference in bits"), room, key);
    const tail = MP.el("div");
    element.append(tail);
    let grid = null;
    return {
      /**
       * @param {Uint8Array|Uint16Array|null} a @param {Uint8Array|Uint16Array|null} b
       * @param {[string, string]} names @param {[number|null, number|null]} [numbers] of the plans, for what was measured
       */
      show: (a, b, names = ["A", "B"], numbers = undefined) => {
        element.hidden = !a || !b;
        if (!a || !b) return;
        grid ??= MP.grid(room, study, { label: "Difference of the two plans in bits", ...on });
        const bits = (choice, layer) => study.data.formats[choice[layer]].bits;
        grid.paint((layers) => {
          const change = layers.map((layer) => bits(b, layer) - bits(a, layer));
          const [low, high] = [Math.min(...change), Math.max(...change)];
          const middle = MP.median(change);
          const sign = (value) => (value > 0 ? `+${value}` : String(value).replace("-", text.MINUS));
          const other = layers.some((layer) => a[layer] !== b[layer]);
          const step = Math.min(3, Math.ceil(Math.abs(middle) / 2));
          const first = layers[0];
          return {
            text: low === high ? (low ? sign(low) : other ? "\u2260" : "\u00b7") : `${sign(low)} to ${sign(high)}`,
            shade: middle ? `${middle > 0 ? "up" : "down"}${step}` : "same",
            title: `${study.format(a[first])} in ${names[0]}, ${study.format(b[first])} in ${names[1]}`,
          };
        });
        MP.fill(key, `Bits of ${names[1]} less those of ${names[0]}: `, ["down3", "down2", "down1", "same", "up1", "up2", "up3"].map((shade, i) => MP.el("span", { class: shade }, ["\u22125", "\u22123", "\u22121", "\u00b7", "+1", "+3", "+5"][i])));
        const changes = MP.changes(study, a, b);
        MP.fill(rest, totals(study, a, b, names, numbers));
        MP.fill(tail, changes.length
          ? [MP.el("h3", null, "Layers that differ"), listed(study, changes, names), waterfall(study, steps(study, a, b, changes), names)]
          : MP.el("p", null, "The two plans are the same."));
      },
    };
  };
})();
