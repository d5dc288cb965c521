"use strict";
(() => {
  const { text } = MP;
  const MOST = 40;

  /** List the decisions by the loss that a format is predicted to cost in each. */
  MP.sensitivity = (element, study, on = {}) => {
    const { data } = study;
    if (!data.scores) {
      MP.fill(element, MP.el("p", { class: "note" }, "Nothing is scored yet."));
      return { show() {} };
    }
    const formats = data.formats.map((_, i) => i).filter((i) => study.decisions.some((decision) => decision.loss[i] !== null));
    const select = MP.el("select", { onchange: () => draw() }, formats.map((i) => MP.el("option", { value: i }, study.format(i))));
    const room = MP.el("div");
    MP.fill(element, MP.el("p", { class: "controls" }, MP.el("label", null, "Loss of each layer in ", select)), room);
    const draw = () => {
      const format = formats[select.selectedIndex];
      const rows = study.decisions.map((_, row) => row).filter((row) => study.decisions[row].loss[format] !== null);
      rows.sort((a, b) => study.decisions[b].loss[format] - study.decisions[a].loss[format]);
      const end = (row) => study.decisions[row].loss[format] + (study.decisions[row].error[format] ?? 0);
      const most = rows.reduce((found, row) => Math.max(found, end(row)), 0) || 1;
      const at = (value) => 100 * Math.min(1, Math.max(0, value / most));
      const lines = rows.slice(0, MOST).map((row) => {
        const { name, loss, error, layers } = study.decisions[row];
        const label = MP.el("bdi", null, name);
        const [value, doubt] = [loss[format], error[format] ?? 0];
        return MP.el("tr", null,
          MP.el("th", { scope: "row", title: name }, on.pick ? MP.el("button", { type: "button", class: "link", onclick: (event) => on.pick(layers[0], event) }, label) : label),
          MP.el("td", null, MP.svg("svg", { viewBox: "0 0 100 10", preserveAspectRatio: "none", "aria-hidden": "true" },
            MP.svg("rect", { width: Math.max(0.3, at(value)), height: 10 }), MP.svg("rect", { class: "error", x: at(value - doubt), y: 4, width: at(value + doubt) - at(value - doubt), height: 2 }))),
          MP.el("td", { class: "n" }, text.withSpread(value, error[format])));
      });
      const unscored = study.decisions.length - rows.length;
      const left = [rows.length > MOST ? `${rows.length - MOST} layers of less loss are left out.` : "", unscored ? `${text.count(unscored, "layer")} without a score in this format.` : ""].filter(Boolean);
      MP.fill(room, MP.el("table", { class: "bars wide" },
        MP.el("caption", null, `Predicted loss (${text.safe(data.unit)}) of ${study.format(format)}${data.scores.estimator ? `, estimated by ${data.scores.estimator}` : ""}; thin bars are one standard error`),
        MP.el("thead", { class: "aside" }, MP.el("tr", null, ["layer", "bar", "predicted loss"].map((name) => MP.el("th", { scope: "col" }, name)))),
        MP.el("tbody", null, lines)), left.length ? MP.el("p", { class: "note" }, left.join(" ")) : null);
    };
    draw();
    return { show: draw };
  };
})();
