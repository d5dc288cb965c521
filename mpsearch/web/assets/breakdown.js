"use strict";
(() => {
  const { text } = MP;
  const MOST = 24;

  /** Amounts of a plan by place: [[name, amount]], largest first, small ones together; what is not decided comes last. */
  const sums = (entries, total) => {
    const groups = new Map();
    for (const [name, amount] of entries) groups.set(name, [...(groups.get(name) ?? []), amount]);
    const parts = [...groups].map(([name, amounts]) => [name, MP.sum(amounts)]);
    const rest = total - MP.sum(parts.map(([, amount]) => amount));
    parts.sort((a, b) => b[1] - a[1]);
    if (parts.length > MOST) {
      const small = parts.splice(MOST - 1);
      parts.push([`${small.length} others together`, MP.sum(small.map(([, amount]) => amount))]);
    }
    if (Math.abs(rest) > 1e-9 * Math.abs(total)) parts.push(["not decided", rest]);
    return parts;
  };

  const bars = (parts, total, unit, title) => {
    const most = parts.reduce((found, [, amount]) => Math.max(found, amount), 0) || 1;
    return MP.el("table", { class: "bars" }, MP.el("caption", null, title),
      MP.el("thead", { class: "aside" }, MP.el("tr", null, ["part", "amount", "share"].map((name) => MP.el("th", { scope: "col" }, name)))),
      MP.el("tbody", null, parts.map(([name, amount]) => MP.el("tr", null,
        MP.el("th", { scope: "row", title: name }, MP.el("bdi", null, name)),
        MP.el("td", null, MP.svg("svg", { viewBox: "0 0 100 10", preserveAspectRatio: "none", "aria-hidden": "true" },
          MP.svg("rect", { width: Math.max(0.3, (100 * Math.max(0, amount)) / most), height: 10 }))),
        MP.el("td", { class: "n" }, `${text.cost(amount, unit)}, ${text.fixed((100 * amount) / total, 1)}\u00a0%`)))));
  };

  /** Say where a plan spends each resource. @param {HTMLElement} element @param {Object} study */
  MP.breakdown = (element, study) => {
    const { data } = study;
    const kinds = new Array(study.length).fill("");
    const blocks = new Array(study.length).fill("");
    for (const [row, column, numbers] of data.grid.cells)
      for (const layer of numbers) {
        blocks[layer] = data.grid.rows[row];
        kinds[layer] = column < 0 ? data.grid.rows[row] : data.grid.columns[column];
      }
    // Layers that have one price together are a place of their own.
    const kindOf = (layers) => [...new Set(layers.map((layer) => kinds[layer]))].join("+");
    const blockOf = (layers) => (new Set(layers.map((layer) => blocks[layer])).size === 1 ? blocks[layers[0]] : "several blocks");
    const entries = (choice, resource) => {
      if (resource === "weights") return data.layers.map((_, layer) => [[layer], data.bytes[layer][choice[layer]]]);
      const table = data.costs[resource];
      return study.decisions.map(({ layers }, row) =>
        [layers, table.cost[row][table.formats.indexOf(study.format(choice[layers[0]]))] ?? null]);
    };
    const resources = [...new Set(["weights", ...Object.keys(data.costs)])];
    const select = MP.el("select", { onchange: () => draw() }, resources.map((name) => MP.el("option", { value: name }, name)));
    const room = MP.el("div", { class: "two" });
    MP.fill(element, MP.el("p", { class: "controls" }, MP.el("label", null, "Resource ", select)), room);
    let shown = null;
    const draw = () => {
      if (!shown) return;
      const resource = resources[select.selectedIndex];
      const total = study.cost(shown, resource);
      const parts = entries(shown, resource);
      if (total === null || parts.some(([, amount]) => amount === null)) {
        MP.fill(room, MP.el("p", { class: "note" }, `Not every format of this plan has a price in ${resource}.`));
        return;
      }
      const unit = resource === "weights" ? "bytes" : data.costs[resource].unit;
      const kind = resource === "weights" ? "exact" : data.costs[resource].kind;
      const by = (name, title) => bars(sums(parts.map(([layers, amount]) => [name(layers), amount]), total), total, unit, `${title}: ${text.cost(total, unit)} in all, ${kind}`);
      MP.fill(room, MP.el("div", null, by(kindOf, "By kind of layer")), MP.el("div", null, by(blockOf, "By block")));
    };
    return {
      /** @param {Uint8Array|Uint16Array|null} choice */
      show: (choice) => { shown = choice; draw(); },
    };
  };
})();
