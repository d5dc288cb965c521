"use strict";
(() => {
  const { text } = MP;
  const SIZE = { width: 340, height: 190, left: 62, right: 12, top: 12, bottom: 36 };

  /** Draw loss over bytes of a decision, with error bars and the present format. */
  const curve = (study, row, now) => {
    const { options, name } = study.decisions[row];
    if (!options.length) return MP.el("p", { class: "note" }, "Nothing was scored for this layer.");
    const sizes = options.map((option) => option.bytes / text.MIB);
    const ends = options.flatMap((o) => [o.loss, o.loss + (o.error ?? 0)]);
    const log = MP.isWide(options.map((o) => o.loss)) && options.every((o) => o.loss > 0);
    const [low, high] = MP.range(sizes);
    const [least, most] = MP.range(ends, log);
    const x = MP.scale({ low, high, from: SIZE.left, to: SIZE.width - SIZE.right });
    const y = MP.scale({ low: log ? least : Math.min(0, least), high: most, log, from: SIZE.height - SIZE.bottom, to: SIZE.top });
    const parts = [];
    for (const value of x.ticks(3))
      parts.push(MP.svg("line", { class: "grid-line", x1: x.at(value), x2: x.at(value), y1: y.from, y2: y.to }),
        MP.svg("text", { x: x.at(value), y: y.from + 15, "text-anchor": "middle" }, text.plain(Number(value.toPrecision(6)))));
    for (const value of y.ticks(4))
      parts.push(MP.svg("line", { class: "grid-line", x1: x.from, x2: x.to, y1: y.at(value), y2: y.at(value) }),
        MP.svg("text", { x: SIZE.left - 5, y: y.at(value) + 4, "text-anchor": "end" }, text.plain(Number(value.toPrecision(6)))));
    const places = options.map((o, i) => [x.at(sizes[i]), y.at(o.loss)]);
    parts.push(MP.svg("polyline", { class: "line", points: places.map((at) => at.map((v) => v.toFixed(1)).join(",")).join(" ") }));
    options.forEach((o, i) => {
      const [px, py] = places[i];
      if (o.error) {
        const [up, down] = [y.at(o.loss + o.error), log && o.loss - o.error <= 0 ? y.from : Math.min(y.from, y.at(o.loss - o.error))];
        parts.push(MP.svg("path", { class: "bar", d: `M${px - 3} ${up}h6M${px} ${up}V${down}M${px - 3} ${down}h6` }));
      }
      const title = MP.svg("title", null, `${study.format(o.format)}: ${text.withSpread(o.loss, o.error)} ${study.data.unit}, ${text.bytes(o.bytes)}`);
      parts.push(MP.svg("circle", { class: "dot", cx: px, cy: py, r: 4 }, title));
      if (o.format === now) parts.push(MP.svg("circle", { class: "now", cx: px, cy: py, r: 8 }));
    });
    parts.push(MP.svg("text", { x: (x.from + x.to) / 2, y: SIZE.height - 4, "text-anchor": "middle" }, "MiB"));
    const label = `Predicted loss of ${name} in ${text.count(options.length, "format")}, over MiB; the ring is the present one`;
    return MP.svg("svg", { class: "curve", viewBox: `0 0 ${SIZE.width} ${SIZE.height}`, role: "img", "aria-label": label }, parts);
  };

  const noise = (step) => (step.error === null ? ", of unknown error" : step.noise ? ", which is within noise" : "");

  /** The next steps of a decision in words. */
  MP.steps = (study, choice, row) => {
    const { unit } = study.data;
    const [up, down] = [study.stepUp(choice, row), study.stepDown(choice, row)];
    const change = (step) => text.withSpread(Math.abs(step.gain), step.error);
    const found = [];
    if (up) {
      const does = up.gain >= 0 ? `gains ${change(up)}` : `loses ${change(up)}`;
      found.push(`Next step up, ${study.format(up.format)}: costs ${text.size(up.cost)} and ${does} ${unit} (predicted)${noise(up)}; rank ${study.rank(choice, row)} of ${study.steps(choice)} by gain for each MiB.`);
    } else found.push("No scored format is larger.");
    if (down) {
      const does = down.gain <= 0 ? `loses ${change(down)}` : `gains ${change(down)}`;
      found.push(`Next step down, ${study.format(down.format)}: saves ${text.size(-down.cost)} and ${does} ${unit} (predicted)${noise(down)}.`);
    } else found.push("No scored format is smaller.");
    return found;
  };

  const STATUS = { not_observed: "the data did not reach it", non_finite: "its values were not finite", not_offered: "it is not offered there" };

  /** What to know of a decision beside its numbers. */
  const flags = (study, layer, row, now) => {
    const { scores, formats } = study.data;
    const { options, layers, bytes, loss } = study.decisions[row];
    const found = [];
    if (layers.length > 1) found.push(`tied: ${layers.length} layers take one format, and the losses are of all of them together`);
    if (loss[now] === null) found.push(`the present format, ${formats[now].name}, has no score`);
    scores?.formats.forEach((name, at) => {
      const status = scores.status[row][at];
      if (status !== "ok") found.push(`${name} has no score: ${STATUS[status] ?? status}`);
      else if (scores.loss[row][at] < 0) found.push(`${name}: estimated below zero, so its standard error stands for it`);
    });
    const barred = formats.filter((_, i) => bytes[i] === null).map((format) => format.name);
    if (barred.length) found.push(`its shape cannot take ${barred.slice(0, 5).join(", ")}${barred.length > 5 ? ` and ${barred.length - 5} more` : ""}`);
    if (options.length && options.every((option) => option.loss === 0)) found.push("no format loses anything here");
    return found;
  };

  /** Say all that is known of a layer in a plan. @param {HTMLElement} element @param {Object} study */
  MP.card = (element, study) => {
    element.classList.add("card");
    return {
      /** @param {Uint8Array|Uint16Array|null} choice @param {number|null} layer */
      show: (choice, layer) => {
        const item = layer === null || layer === undefined ? null : study.data.layers[layer];
        if (!item || !choice) {
          MP.fill(element, MP.el("p", { class: "note" }, "Point at a layer of the map to see what its bits cost and gain."));
          return;
        }
        const now = choice[layer];
        const decision = study.decisions[item.row];
        const facts = [
          ["format", `${study.format(now)}, ${text.count(study.data.formats[now].bits, "bit")}`],
          ["shape", `${item.shape.join(" \u00d7 ")}, ${item.kind}`],
          ["size", text.known(study.data.bytes[layer][now]) ? `${text.size(study.data.bytes[layer][now])} (${text.bytes(study.data.bytes[layer][now])}, exact)` : null],
          ["predicted loss", decision.loss[now] === null ? "not scored" : `${text.withSpread(decision.loss[now], decision.error[now])} ${study.data.unit}`],
          ["tied as", item.tie || null],
          ["shared with", item.shared.length ? item.shared.join(", ") : null],
        ];
        const notes = flags(study, layer, item.row, now);
        const words = MP.el("div", null,
          MP.el("dl", { class: "facts" }, facts.filter(([, value]) => value !== null).map(([name, value]) => [MP.el("dt", null, name), MP.el("dd", null, MP.el("bdi", null, value))])),
          MP.steps(study, choice, item.row).map((sentence) => MP.el("p", null, sentence)),
          notes.length ? MP.el("ul", { class: "flags" }, notes.map((note) => MP.el("li", null, note))) : null);
        MP.fill(element, MP.el("h3", null, MP.el("bdi", null, item.name || "the model")),
          MP.el("div", { class: "card-body" }, words, curve(study, item.row, now)));
      },
    };
  };
})();
