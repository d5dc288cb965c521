"use strict";
(() => {
  const { text } = MP;
  const LISTED = 12;

  /** Names of plans; those that share a label have their bits behind it. */
  MP.titles = (study) => {
    const { label } = study.data.points;
    const many = new Map();
    for (const name of label) many.set(name, (many.get(name) ?? 0) + 1);
    return label.map((name, i) => (many.get(name) > 1 && study.bits(i) !== null ? `${name} ${text.bits(study.bits(i))} bits` : name || `plan ${i}`));
  };

  /** What is known of a stored plan. @param {string} title @param {boolean} pinned whether it is A */
  MP.storedWords = (study, i, title, pinned) => {
    const { points, unit } = study.data;
    const loss = points.loss[i] === null ? "not measured" : `measured ${text.withSpread(points.loss[i], points.spread[i])} ${unit}`;
    return [MP.el("p", null, MP.el("b", null, MP.el("bdi", null, title)), pinned ? " (A)" : ""),
      MP.el("p", { class: "figures" }, `${text.size(study.size(i))}, ${text.bits(study.bits(i))} bits per weight; ${loss}; `,
        points.predicted[i] === null ? "not predicted" : `predicted ${text.atMost(points.predicted[i], points.doubt[i])} ${unit}`)];
  };

  /** What is known of a plan that was solved now. @param {boolean} stale whether something else is asked for by now */
  MP.solvedWords = (study, solved, stale) => {
    const { unit, weights } = study.data;
    const above = solved.gap === null ? "" : solved.gap <= 1e-9 ? ", proven to be the least"
      : `, at most ${text.general((100 * solved.gap) / (1 - solved.gap), 2)} % above the least`;
    const prices = solved.prices.filter((price) => price.price !== null)
      .map((price) => MP.el("li", null, `${price.budget}: its price here is ${text.plain(price.price)} ${price.unit} (for small changes)`));
    const budgets = solved.budgets.map((budget) => budget.text).join(" and ");
    return [MP.el("p", null, MP.el("b", null, stale ? "solved before" : "solved now"), ` for ${budgets}`,
      stale ? ", not for what is asked for now" : ""),
      MP.el("p", { class: "figures" }, `${text.size(solved.cost.weights)}, ${text.bits((8 * solved.cost.weights) / weights)} bits per weight; `,
        `predicted ${text.atMost(solved.loss, solved.spread)} ${unit}${above}; not measured`),
      prices.length ? MP.el("ul", { class: "muted" }, prices) : null];
  };

  /** Layers whose format changed. @param {number[]} changed @param {ArrayLike<number>} before @param {ArrayLike<number>} after */
  MP.changedWords = (study, changed, before, after) => [
    MP.el("p", null, changed.length ? `${text.count(changed.length, "layer")} changed:` : "No layer changed."),
    MP.el("ul", null, changed.slice(0, LISTED).map((layer) => MP.el("li", null, MP.el("bdi", null, study.data.layers[layer].name),
      `: ${study.format(before[layer])} → ${study.format(after[layer])}`))),
    changed.length > LISTED ? MP.el("p", { class: "muted" }, `and ${changed.length - LISTED} more`) : null];

  const PART = 1000;
  const DIGITS = 12;

  /** Keys of the plans of a view, by which links name them; asked for when they are first needed. */
  MP.planKeys = (name, mark, count) => {
    let all = null;
    const part = async (first, most) => (await MP.ask(MP.query("view/keys", { study: name, first, count: most, mark }))).key;
    const load = async () => {
      const keys = [];
      while (keys.length < count) keys.push(...await part(keys.length, PART));
      return keys;
    };
    return {
      /** Digits that name a plan. @param {number} i */
      digits: async (i) => (await part(i, 1))[0].slice(0, DIGITS),
      /** Number of the plan that digits name; null where there is none. @param {string} digits */
      number: async (digits) => {
        all ??= load();
        const keys = await all;
        const found = /^[0-9a-f]{8,64}$/.test(digits) ? keys.findIndex((key) => key.startsWith(digits)) : -1;
        return found < 0 ? null : found;
      },
    };
  };
})();
