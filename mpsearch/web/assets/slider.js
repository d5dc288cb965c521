"use strict";
(() => {
  const STEPS = 200;
  const SIZES = ["weights", "kv", "memory", "traffic"];

  /** Units that people write: of bytes MiB, of seconds ms. */
  const unitOf = (table) => (table.unit === "bytes" ? ["MiB", 2 ** 20] : table.unit === "s" ? ["ms", 1e-3] : [table.unit, 1]);

  /** Least and most budget of a resource that plans of the study's formats can take; times with their margin. */
  const range = (study, resource) => {
    const table = study.data.costs[resource];
    let [low, high] = [table.fixed, table.fixed];
    for (const row of table.cost) {
      const known = row.filter((value) => value !== null);
      if (!known.length) continue;
      low += Math.min(...known);
      high += Math.max(...known);
    }
    const margin = table.margin ?? 1;
    return [low * margin, high * margin];
  };

  /** Split "tpot at context 512" into resource and condition. */
  const named = (resource) => {
    const [name, ...rest] = resource.split(" ");
    return [name, rest.join(" ")];
  };

  /** Text of a budget of so much, as `mpsearch solve --budget` takes it; bytes are whole, times rounded up. */
  const write = (resource, value, table) => {
    const [name, condition] = named(resource);
    // A nanosecond is the last digit; what is a whole number of them but for rounding stays it.
    const amount = table.unit === "bytes" ? `${Math.floor(value)} B`
      : table.unit === "s" ? `${(Math.ceil(value * 1e9 * (1 - 1e-12)) / 1e6).toFixed(6)} ms` : `${value} ${table.unit}`;
    return `${name} <= ${amount} ${condition}`.trim();
  };

  const SCALES = {
    B: 1, bytes: 1, kB: 1e3, KB: 1e3, MB: 1e6, GB: 1e9, TB: 1e12, KiB: 2 ** 10, MiB: 2 ** 20, GiB: 2 ** 30, TiB: 2 ** 40,
    us: 1e-6, ms: 1e-3, s: 1,
  };

  /** Parts of a budget's text: resource, amount in the table's unit (null where only the server can tell), or null. */
  const read = (study, budget) => {
    const found = /^\s*(\S+)\s*<=\s*([\d.eE+-]+)\s*(?!at\b)([^\s\d]\S*)?\s*(.*)$/.exec(budget);
    if (!found) return null;
    const [, name, number, unit, condition] = found;
    const given = Number(number);
    const value = unit === "bits" && name === "weights" ? (given * study.data.weights) / 8
      : unit in SCALES ? given * SCALES[unit] : null;
    return { resource: `${name} ${condition}`.trim(), value: Number.isFinite(value) ? value : null };
  };

  const resources = (study) => {
    const known = Object.keys(study.data.costs).filter((name) => {
      const [low, high] = range(study, name);
      return high > low && (SIZES.includes(named(name)[0]) || study.data.costs[name].unit === "s");
    });
    return known.slice(0, 4);
  };

  /** One budget: a slider, a box, and the nearest limit that can be kept. */
  const one = (study, resource, changed) => {
    const table = study.data.costs[resource];
    const [low, high] = range(study, resource);
    const [unit, size] = unitOf(table);
    const id = `budget-${Object.keys(study.data.costs).indexOf(resource)}`;
    const slider = MP.el("input", { type: "range", min: 0, max: STEPS, step: 1, id, "aria-describedby": `${id}-told` });
    const box = MP.el("input", {
      type: "text", inputmode: "decimal", size: 12, autocomplete: "off", "aria-label": `most ${resource}, ${unit}`,
    });
    const told = MP.el("span", { class: "muted", id: `${id}-told` });
    let [value, given] = [null, null];
    // Below the least there is room, so that it can be seen what does not fit.
    const from = Math.max(0, low - 0.1 * (high - low));
    const at = (step) => from + ((high - from) * step) / STEPS;
    const show = () => {
      slider.value = value === null ? STEPS : Math.round((STEPS * (value - from)) / (high - from));
      if (document.activeElement !== box) box.value = value === null ? "" : MP.text.general(value / size, 6);
      const words = value === null ? (given ?? "no limit") : `at most ${MP.text.cost(value, table.unit)}`;
      slider.setAttribute("aria-valuetext", `${resource} ${words}`);
      const bits = resource === "weights" && value !== null && study.data.weights
        ? `, ${MP.text.bits((8 * value) / study.data.weights)} bits per weight` : "";
      told.textContent = MP.text.safe(`${words}${bits}`);
    };
    const set = (next, words = null) => {
      [value, given] = [next, words];
      box.removeAttribute("aria-invalid");
      show();
    };
    slider.addEventListener("input", () => {
      set(Number(slider.value) >= STEPS ? null : at(Number(slider.value)));
      changed();
    });
    box.addEventListener("change", () => {
      const amount = Number(box.value.trim().replace(",", ".")) * size;
      if (box.value.trim() && !(amount >= (table.unit === "bytes" ? 1 : Number.MIN_VALUE))) {
        box.setAttribute("aria-invalid", "true");
        told.textContent = `not a number of ${unit}${table.unit === "bytes" ? " of at least a byte" : " above 0"}`;
        return;
      }
      set(box.value.trim() ? amount : null);
      changed();
    });
    const [name, condition] = named(resource);
    const row = MP.el("div", { class: "budget" },
      MP.el("label", { for: id }, `${name} ${condition}`.trim()), slider, box, MP.el("span", null, unit), told);
    show();
    return { resource, row, set, text: () => given ?? (value === null ? null : write(resource, value, table)), widest: () => write(resource, Math.ceil(high), table) };
  };

  /** The study's own budgets, as amounts of the limit that their texts name. */
  const ownOf = (study) => study.data.budgets.map(({ text, resource, limit }) =>
    ({ text, resource, value: limit === null ? null : limit * (study.data.costs[resource]?.margin ?? 1) }));

  /**
   * Sliders of budgets. Without any the study is solved for its own ones, so these are what they begin at.
   * @param {HTMLElement} element
   * @param {Object} study as of MP.open
   * @param {{change: (budgets: string[]) => void}} on
   * @returns {{set: (texts: string[]) => void, say: (problem: Object|null) => void}} ``say``: an error, or an answer
   *   that found nothing
   */
  MP.slider = (element, study, on) => {
    const names = study.data.scores ? resources(study) : [];
    const told = MP.el("div", { class: "problem", role: "alert", hidden: true });
    const further = MP.el("p", { class: "muted", hidden: true });
    if (!names.length) {
      MP.fill(element, MP.el("p", { class: "muted" }, "Budgets can be moved once the study has scores."), told);
    }
    let rest = [];
    // Nothing asked for means the study's own budgets: no limit at all is the widest one.
    const texts = () => {
      const found = [...rows.map((row) => row.text()).filter(Boolean), ...rest];
      return found.length || !rows.length ? found : [rows[0].widest()];
    };
    const rows = names.map((name) => one(study, name, () => on.change(texts())));
    const set = (given) => {
      const wanted = given.length ? given.map((text) => ({ text, ...read(study, text) })) : ownOf(study);
      for (const row of rows) {
        const mine = wanted.find((each) => each.resource === row.resource);
        row.set(mine?.value ?? null, mine?.text ?? null);
      }
      rest = wanted.filter((each) => !names.includes(each.resource)).map((each) => each.text);
      further.textContent = MP.text.safe(rest.length ? `also kept: ${rest.join(", ")}` : "");
      further.hidden = !rest.length;
    };
    const reset = MP.el("button", { type: "button", onclick: () => {
      set([]);
      on.change([]);
    } }, "The study's own budgets");
    if (rows.length) MP.fill(element, rows.map((row) => row.row), further, reset, told);
    set([]);
    const least = ({ text, amount }, { unit }) => MP.el("button", { type: "button", onclick: () => {
      const { resource } = read(study, text);
      rows.find((row) => row.resource === resource)?.set(amount, text);
      on.change(texts());
    } }, `Use the least that fits: ${MP.text.cost(amount, unit)}`);
    return {
      set,
      say: (problem) => {
        MP.fill(told);
        told.hidden = !problem;
        if (!problem) return;
        if (!problem.error) {
          MP.fill(told, MP.words(problem));
          return;
        }
        const { error, budgets } = problem;
        MP.fill(told, `${error.code}: ${error.message}. `, error.because ? `${error.because}. ` : "");
        (problem.least ?? []).forEach((each, i) => {
          if (each?.short && names.includes(budgets[i].resource)) told.append(least(each, study.data.costs[budgets[i].resource]));
        });
      },
    };
  };
})();
