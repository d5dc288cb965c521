"use strict";
(() => {
  const { text } = MP;

  const tile = (name, value, exact, detail) =>
    MP.el("div", null, MP.el("dt", null, name), MP.el("dd", null, MP.el("data", { value: exact }, value), MP.el("small", null, detail)));

  /** Numbers of one plan, each told apart as exact, measured or predicted. */
  MP.tiles = (study, i) => {
    const { points, unit, weights } = study.data;
    const [size, loss, predicted] = [study.size(i), study.loss(i), study.forecast(i)];
    const found = [];
    if (size !== null) {
      found.push(tile("Size, exact", text.size(size), size, `${text.bytes(size)} of the whole model`));
      if (weights) found.push(tile("Bits per weight, exact", text.bits(study.bits(i)), study.bits(i), `${text.fixed((100 * size) / (2 * weights), 1)}\u00a0% of 16-bit weights`));
    }
    if (loss !== null) found.push(tile("Loss, measured", text.withSpread(loss, points.spread[i]), loss, `${unit}, \u00b1 one standard error`));
    if (predicted !== null) {
      const bound = points.bound[i];
      const gap = bound !== null && predicted > 0 ? `, gap to the bound ${text.general((100 * (predicted - bound)) / predicted, 2)}\u00a0%` : "";
      found.push(tile("Loss, predicted", text.atMost(predicted, points.doubt[i]), predicted, `${unit}${gap}`));
    }
    return MP.el("dl", { class: "tiles" }, found);
  };

  /** Say whether mixing pays, what limits it and what to try next. */
  MP.verdict = (element, study) => {
    const { verdict, worth } = study.data;
    const lines = [...new Set([...(worth?.sentences ?? verdict), ...(worth?.limits ?? []).map((limit) => limit.sentence)])];
    const next = worth?.next ?? [];
    MP.fill(element,
      MP.el("div", { class: "verdict" }, (lines.length ? lines : ["There is no verdict yet."]).map((line) => MP.el("p", null, line))),
      study.chosen === null ? null : MP.tiles(study, study.chosen),
      next.length ? MP.el("div", null, MP.el("h2", null, "What to try next"),
        MP.el("ul", { class: "next" }, next.map((step) => MP.el("li", null, step.why, ": ", MP.el("code", null, step.line))))) : null);
    return { show() {} };
  };
})();
