"use strict";
(() => {
  const { text } = MP;

  /** Ways to colour the map: [mode, name of the switch]. */
  MP.modes = [
    ["bits", "bits"], ["loss", "share of predicted loss"], ["bytes", "share of bytes"],
    ["sensitivity", "loss at the fewest bits"], ["gain", "gain of the next step up"],
  ];

  /**
   * A table of the model: rows are blocks, columns kinds of layers; each cell holds one layer or several.
   * @param {HTMLElement} element
   * @param {Object} study
   * @param {{label: string, hover?: (layer: number|null) => void, pick?: (layer: number, event?: Event) => void}} on
   * @returns {{paint: (look: (layers: number[]) => {text: string, shade: string, title: string}) => void,
   *   cells: Array<{layers: number[], cell: HTMLElement}>, flash: (layers: number[]) => void}}
   */
  MP.grid = (element, study, on) => {
    const { grid, layers } = study.data;
    const width = Math.max(1, grid.columns.length);
    const table = MP.el("table", { class: "map", role: "grid", "aria-label": on.label });
    if (grid.columns.length)
      table.append(MP.el("thead", { role: "rowgroup" }, MP.el("tr", { role: "row" }, MP.el("th", { scope: "col", role: "columnheader" }, "block"),
        grid.columns.map((name) => MP.el("th", { scope: "col", role: "columnheader", title: name }, MP.el("bdi", null, name))))));
    const body = MP.el("tbody", { role: "rowgroup" });
    const at = new Map(grid.cells.map(([row, column, numbers]) => [`${row} ${column}`, numbers]));
    const cells = [];
    const lines = [];
    grid.rows.forEach((name, row) => {
      const line = MP.el("tr", { role: "row" }, MP.el("th", { scope: "row", role: "rowheader", title: name }, MP.el("bdi", null, name)));
      const made = (numbers, span) => {
        const cell = MP.el("td", { role: "gridcell", tabindex: -1, colspan: span > 1 ? span : null });
        cells.push({ layers: numbers, cell, row: lines.length });
        cell.dataset.cell = String(cells.length - 1);
        line.append(cell);
      };
      const alone = at.get(`${row} -1`);
      if (alone) made(alone, width);
      else for (let column = 0; column < width; column += 1) {
        const numbers = at.get(`${row} ${column}`);
        if (numbers) made(numbers, 1);
        else line.append(MP.el("td", { role: "gridcell", class: "none" }));
      }
      lines.push(line);
      body.append(line);
    });
    table.append(body);
    MP.fill(element, MP.el("div", { class: "scroll" }, table));
    if (cells.length) cells[0].cell.tabIndex = 0;

    let stop = 0;
    const focus = (i) => {
      cells[stop].cell.tabIndex = -1;
      stop = i;
      cells[i].cell.tabIndex = 0;
      cells[i].cell.focus();
    };
    const numberOf = (event) => {
      const cell = event.target.closest?.("td[data-cell]");
      return cell ? Number(cell.dataset.cell) : null;
    };
    const beside = (i, way) => {
      const edge = cells[i].cell;
      const middle = edge.offsetLeft + edge.offsetWidth / 2;
      for (let row = cells[i].row + way; row >= 0 && row < lines.length; row += way) {
        const found = cells.map((cell, k) => [cell, k]).filter(([cell]) => cell.row === row);
        if (!found.length) continue;
        const away = ([{ cell }]) => Math.max(0, Math.abs(cell.offsetLeft + cell.offsetWidth / 2 - middle) - cell.offsetWidth / 2);
        return found.reduce((a, b) => (away(b) < away(a) ? b : a))[1];
      }
      return i;
    };
    let turn = 0;
    table.addEventListener("mouseover", (event) => { const i = numberOf(event); if (i !== null) on.hover?.(cells[i].layers[0]); });
    table.addEventListener("mouseleave", () => on.hover?.(null));
    table.addEventListener("focusin", (event) => { const i = numberOf(event); if (i !== null) on.hover?.(cells[i].layers[0]); });
    const pick = (i, event) => {
      // Of layers that share a cell the next one, each time.
      turn = i === pick.last ? turn + 1 : 0;
      pick.last = i;
      on.pick?.(cells[i].layers[turn % cells[i].layers.length], event);
    };
    table.addEventListener("click", (event) => { const i = numberOf(event); if (i !== null) { focus(i); pick(i, event); } });
    table.addEventListener("keydown", (event) => {
      const i = numberOf(event);
      if (i === null || event.ctrlKey || event.metaKey || event.altKey) return;
      const last = cells.length - 1;
      const acts = {
        ArrowRight: () => focus(Math.min(i + 1, last)), ArrowLeft: () => focus(Math.max(i - 1, 0)),
        ArrowDown: () => focus(beside(i, 1)), ArrowUp: () => focus(beside(i, -1)),
        Home: () => focus(0), End: () => focus(last), Enter: () => pick(i, event), " ": () => pick(i, event),
      };
      if (!acts[event.key]) return;
      event.preventDefault();
      acts[event.key]();
    });

    const before = new Array(cells.length).fill("");
    return {
      cells,
      paint: (look) => cells.forEach(({ layers: numbers, cell }, i) => {
        const made = look(numbers);
        const state = `${made.shade}\n${made.text}\n${made.title}`;
        if (before[i] === state) return;
        before[i] = state;
        cell.className = made.shade;
        cell.textContent = text.safe(made.text);
        cell.title = text.safe(`${numbers.length === 1 ? layers[numbers[0]].name : `${numbers.length} layers, first ${layers[numbers[0]].name}`}: ${made.title}`);
      }),
      flash: (which) => {
        const wanted = new Set(which);
        for (const { layers: numbers, cell } of cells) {
          cell.classList.remove("flash");
          if (!numbers.some((i) => wanted.has(i))) continue;
          void cell.offsetWidth;
          cell.classList.add("flash");
        }
      },
      /** Mark the cell of a layer. */
      mark: (layer) => {
        for (const { layers: numbers, cell } of cells) {
          if (numbers.includes(layer)) cell.setAttribute("aria-selected", "true");
          else cell.removeAttribute("aria-selected");
        }
      },
    };
  };

  /** The middle of values; of two in the middle the larger one. */
  const median = (values) => values.toSorted((a, b) => a - b)[Math.floor(values.length / 2)];
  MP.median = median;
  const RAMP = ["b2", "b3", "b4", "b5", "b6", "b7", "b8"];

  /** What a cell says in a mode other than bits: a value for each layer, in words of ``write``. */
  const valuesOf = (study, choice, mode) => {
    const { decisions, data } = study;
    const row = (layer) => data.layers[layer].row;
    const now = (layer) => choice[study.lead[row(layer)]];
    const percent = (share) => `${text.fixed(100 * share, share < 0.0995 ? 1 : 0)}\u00a0%`;
    if (mode === "loss") {
      const total = study.predicted(choice);
      const parts = (layer) => decisions[row(layer)].loss[now(layer)];
      return { of: (layer) => (total && parts(layer) !== null ? parts(layer) / total / decisions[row(layer)].layers.length : null), write: percent, name: "of the predicted loss" };
    }
    if (mode === "bytes") {
      const total = study.bytes(choice);
      const one = (layer) => data.bytes[layer][choice[layer]] ?? decisions[row(layer)].bytes[now(layer)];
      return { of: (layer) => (total && one(layer) !== null ? one(layer) / total : null), write: percent, name: "of the bytes of weights" };
    }
    if (mode === "sensitivity")
      return { of: (layer) => decisions[row(layer)].options[0]?.loss ?? null, write: (value) => text.general(value, 2), name: `${data.unit} predicted at the fewest bits` };
    const steps = decisions.map((_, i) => study.stepUp(choice, i));
    return { of: (layer) => steps[row(layer)]?.rate ?? null, write: (value) => text.general(value, 2).replace("-", text.MINUS), name: `${data.unit} gained for each MiB of the next step up` };
  };

  const lookAt = (study, choice, mode) => {
    const { data } = study;
    if (mode === "bits")
      return (layers) => {
        const bits = layers.map((layer) => data.formats[choice[layer]].bits);
        const [low, high] = [Math.min(...bits), Math.max(...bits)];
        const names = [...new Set(layers.map((layer) => data.formats[choice[layer]].name))];
        const folded = layers.length > 1 && low !== high ? `, ${low} at least, ${median(bits)} in the median, ${high} at most` : "";
        return { text: low === high ? String(low) : `${low}-${high}`, shade: MP.shade(median(bits)), title: `${names.slice(0, 4).join(", ")}, ${text.count(median(bits), "bit")}${folded}` };
      };
    const { of, write, name } = valuesOf(study, choice, mode);
    const all = data.layers.map((_, layer) => of(layer));
    const above = all.filter((value) => value !== null && value > 0);
    const [low, high] = above.length ? [above.reduce((a, b) => Math.min(a, b)), above.reduce((a, b) => Math.max(a, b))] : [1, 1];
    const span = Math.log(high / low) || 1;
    const shade = (value) => (value <= 0 ? "below" : RAMP[Math.min(6, Math.floor((Math.log(value / low) / span) * 7))]);
    return (layers) => {
      const known = layers.map((layer) => all[layer]).filter((value) => value !== null);
      if (!known.length) return { text: "?", shade: "unknown", title: "not known" };
      const [least, middle, most] = [Math.min(...known), median(known), Math.max(...known)];
      const folded = known.length > 1 && least !== most ? `${write(least)} at least, ${write(middle)} in the median, ${write(most)} at most` : write(middle);
      return { text: write(middle), shade: shade(middle), title: `${folded} ${name}` };
    };
  };

  /**
   * Draw a plan as the map of its model.
   * @param {HTMLElement} element @param {Object} study
   * @param {{hover?: (layer: number|null) => void, pick?: (layer: number, event?: Event) => void}} on
   */
  MP.map = (element, study, on = {}) => {
    const room = MP.el("div");
    const key = MP.el("p", { class: "key" });
    MP.fill(element, room, key);
    const grid = MP.grid(room, study, { label: "Map of the plan: blocks by kinds of layers", ...on });
    let shown = "";
    const keyOf = (mode) => {
      if (shown === mode) return;
      shown = mode;
      const bits = [...new Set(study.data.formats.map((format) => format.bits))].sort((a, b) => a - b);
      if (mode === "bits") MP.fill(key, "Bits of a weight: ", bits.map((b) => MP.el("span", { class: MP.shade(b) }, b)));
      else MP.fill(key, "less ", RAMP.map((shade) => MP.el("span", { class: shade }, "\u00a0")), " more (by ratio)");
    };
    return {
      /** @param {Uint8Array|Uint16Array|null} choice @param {string} mode one of `MP.modes` */
      show: (choice, mode = "bits") => {
        keyOf(mode);
        if (!choice) return grid.paint(() => ({ text: "", shade: "unknown", title: "the formats are on their way" }));
        return grid.paint(lookAt(study, choice, mode));
      },
      flash: grid.flash,
      mark: grid.mark,
      cells: grid.cells,
    };
  };
})();
