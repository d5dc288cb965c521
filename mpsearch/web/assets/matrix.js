"use strict";
(() => {
  const ROWS = 200;
  const WORDS = {
    ok: "", non_finite: "not finite", not_offered: "not offered", not_observed: "not reached by the data",
    failed: "failed", refused: "refused", "": "not scored",
  };

  /** Largest standard error of a row, as a share of the largest score; null where one is not known. */
  const doubt = (losses, errors) => {
    if (losses.some((value, i) => value !== null && (errors[i] ?? null) === null)) return null;
    const largest = Math.max(...losses.map((value) => Math.abs(value ?? 0)));
    const error = Math.max(...errors.map((value) => value ?? 0));
    return largest > 0 ? error / largest : error > 0 ? Infinity : 0;
  };

  /** Order of two doubts; one that is not known is the largest. */
  const worse = (a, b) => ((a ?? Infinity) === (b ?? Infinity) ? (a === null) - (b === null) : (a ?? Infinity) - (b ?? Infinity));

  /**
   * The scores as a table: each decision in each format, with gaps and with values that were refused as different.
   * @param {HTMLElement} element
   * @param {Object} study
   * @param {{pick: (layer: number) => void}} on
   */
  MP.matrix = (element, study, on) => {
    const { scores, decisions } = study.data;
    if (!scores) {
      MP.fill(element, MP.el("p", { class: "muted" }, "Nothing is scored yet. The matrix fills as the study goes on."));
      return;
    }
    const { text } = MP;
    const first = new Map();
    study.data.layers.forEach((layer, i) => first.has(layer.row) || first.set(layer.row, i));
    const rows = decisions.map((name, i) => ({
      name, i, gaps: scores.formats.filter((_, j) => scores.loss[i][j] === null && scores.status[i]?.[j] !== "not_offered").length,
      doubt: doubt(scores.loss[i], scores.error[i]), most: Math.max(...scores.loss[i].map((value) => value ?? -Infinity)),
    }));
    const gaps = rows.reduce((sum, row) => sum + row.gaps, 0);
    const body = MP.el("tbody");
    const told = MP.el("p", { class: "muted", role: "status" });
    const conflicts = MP.el("p", { class: "muted" });
    const orders = {
      model: ["in the model's order", (a, b) => a.i - b.i], most: ["largest loss first", (a, b) => b.most - a.most],
      doubt: ["worst known first (error as a share of the score)", (a, b) => worse(b.doubt, a.doubt)],
      gaps: ["gaps first", (a, b) => b.gaps - a.gaps || a.i - b.i],
    };
    const order = MP.el("select", { id: "matrix-order", onchange: () => show() },
      Object.entries(orders).map(([name, [words]]) => MP.el("option", { value: name }, words)));
    const box = MP.el("input", { id: "matrix-filter", type: "search", autocomplete: "off", oninput: () => show() });
    const cell = (row, j) => {
      const [value, error, status] = [scores.loss[row.i][j], scores.error[row.i][j], scores.status[row.i]?.[j] ?? ""];
      return value === null
        ? MP.el("td", { class: "gap" }, WORDS[status] ?? status)
        : MP.el("td", { class: "number" }, text.withSpread(value, error), value < 0 ? MP.el("abbr", { title: "below zero: counts as its standard error" }, "*") : null);
    };
    const show = () => {
      const words = box.value.toLowerCase();
      const found = rows.filter((row) => row.name.toLowerCase().includes(words)).sort(orders[order.value][1]);
      MP.fill(body, found.slice(0, ROWS).map((row) => MP.el("tr", null,
        MP.el("th", { scope: "row" }, MP.el("button", { type: "button", class: "link", onclick: () => on.pick(first.get(row.i)) }, MP.el("bdi", null, row.name))),
        scores.formats.map((_, j) => cell(row, j)),
        MP.el("td", { class: "number" }, row.doubt === null ? "unknown" : Number.isFinite(row.doubt) ? `${text.general(100 * row.doubt, 2)} %` : "all of it"))));
      const more = found.length > ROWS ? `; the first ${ROWS} are shown` : "";
      told.textContent = `${found.length} of ${text.count(rows.length, "decision")}${more}. ${gaps ? `${text.count(gaps, "gap")}.` : "No gaps."}`;
    };
    MP.fill(element,
      MP.el("p", null, MP.el("label", { for: "matrix-filter" }, "Layers that hold "), box, MP.el("label", { for: "matrix-order" }, " order "), order),
      told, conflicts,
      MP.el("div", { class: "scroll tall", tabindex: 0, role: "region", "aria-label": "Scores" },
        MP.el("table", { class: "matrix" },
          MP.el("caption", null, `Predicted loss of each decision in each format, ${study.data.unit} ± standard error, by ${scores.estimator || "an estimator"}`),
          MP.el("thead", null, MP.el("tr", null, MP.el("th", { scope: "col" }, "decision"),
            scores.formats.map((name) => MP.el("th", { scope: "col" }, MP.el("bdi", null, name))), MP.el("th", { scope: "col" }, "error"))), body)));
    show();
    MP.ask(MP.query("conflicts", { limit: 1000 })).then((found) => {
      conflicts.textContent = found.total
        ? `${text.count(found.total, "value")} of this database came a second time with another result: the first is kept. mpsearch db check lists them.`
        : "No value came twice with different results.";
    }, () => {
      conflicts.textContent = "";
    });
  };
})();
