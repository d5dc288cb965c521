"use strict";
(() => {
  const MOST = 500;

  /** What wishes cost: a number where both plans are proven, else the range that it lies in. */
  const costOf = ({ wish, without }) => {
    const { text } = MP;
    const { low, high } = without ?? {};
    if (!text.known(low) || !text.known(high) || high - low <= 1e-6 * Math.abs(high)) return text.plain(wish);
    return low > 0 ? `between ${text.plain(low)} and ${text.plain(high)}` : `at most ${text.plain(high)}`;
  };

  /** A path as a pattern that matches nothing else. */
  const literal = (path) => path.replace(/[[*?]/g, (sign) => `[${sign}]`);

  /** What a pattern of a kind takes, which may be more than that kind: `*.gate` takes `mlp.gate` too. */
  const taken = (layers, pattern, kindOf) => {
    const parts = pattern.split(/(\*|\[.\])/).map((part) =>
      (part === "*" ? ".*" : (/^\[.\]$/.test(part) ? part[1] : part).replace(/[.*+?^${}()|[\]\\]/g, "\\$&")));
    const whole = new RegExp(`^${parts.join("")}$`, "s");
    const names = [...new Set(layers.filter((layer) => whole.test(layer.name)).map((layer) => kindOf.get(layer.name) ?? layer.name))];
    return `${names.length === 1 ? "kind" : "kinds"} ${names.join(", ")}`;
  };

  /** Patterns that wishes can be made for: all layers, kinds, blocks, single layers; only what there is. */
  const targets = (study) => {
    const { layers, grid } = study.data;
    const kinds = new Map();
    const kindOf = new Map();
    const blocks = new Map();
    for (const layer of layers) {
      const parts = layer.name.split(".");
      const at = parts.findIndex((part) => /^\d+$/.test(part));
      if (at < 0) continue;
      const tail = parts.slice(at + 1).map((part) => (/^\d+$/.test(part) ? "*" : literal(part))).join(".");
      if (tail) kinds.set(`*.${tail}`, tail);
      kindOf.set(layer.name, tail || layer.name);
      blocks.set(`${literal(parts.slice(0, at + 1).join("."))}.*`, `block ${parts.slice(0, at + 1).join(".")}`);
    }
    const found = [["*", `all ${layers.length} layers`], ...[...kinds.keys()].map((pattern) => [pattern, taken(layers, pattern, kindOf)])];
    if (grid.rows.length <= MOST) found.push(...blocks);
    return found;
  };

  /**
   * Wishes: patterns of layers that take one format, or may not take it; with undo and redo.
   * @param {HTMLElement} element
   * @param {Object} study
   * @param {{change: (pins: [string, string][], bars: [string, string][]) => void}} on
   */
  MP.pins = (element, study, on) => {
    const empty = { set: () => {}, say: () => {}, undo: () => {}, redo: () => {}, add: () => {} };
    if (!study.data.scores) {
      MP.fill(element, MP.el("p", { class: "muted" }, "Formats can be pinned once the study has scores."));
      return empty;
    }
    let now = { pin: [], bar: [] };
    let past = [];
    let future = [];
    const list = MP.el("ul", { class: "wishes", "aria-label": "Wishes" });
    const told = MP.el("p", { class: "wish-cost", role: "status" });
    const options = MP.el("datalist", { id: "wish-targets" }, targets(study).map(([pattern, words]) => MP.el("option", { value: pattern }, words)));
    for (const layer of study.data.layers.slice(0, MOST)) options.append(MP.el("option", { value: literal(layer.name) }, layer.name));
    const pattern = MP.el("input", {
      id: "wish-pattern", list: "wish-targets", autocomplete: "off", spellcheck: "false", placeholder: "lm_head, *.down_proj",
    });
    const format = MP.el("select", { id: "wish-format" }, study.data.scores.formats.map((name) => MP.el("option", { value: name }, name)));
    const button = (words, act, title) => MP.el("button", { type: "button", onclick: act, title }, words);
    const back = button("Undo", () => undo(), "u");
    const forth = button("Redo", () => redo(), "r");

    const draw = () => {
      const line = (kind, verb) => now[kind].map(([what, name], i) =>
        MP.el("li", null, MP.el("bdi", null, what), ` ${verb} `, MP.el("b", null, MP.el("bdi", null, name)), " ",
          MP.el("button", { type: "button", "aria-label": `Remove: ${what} ${verb} ${name}`, onclick: () =>
            take({ ...now, [kind]: now[kind].filter((_, k) => k !== i) }) }, "×")));
      MP.fill(list, line("pin", "takes"), line("bar", "may not take"));
      list.hidden = !now.pin.length && !now.bar.length;
      back.disabled = !past.length;
      forth.disabled = !future.length;
    };
    const tell = () => {
      draw();
      on.change(now.pin, now.bar);
    };
    const take = (next) => {
      past.push(now);
      future = [];
      now = next;
      tell();
    };
    const undo = () => {
      if (!past.length) return;
      future.push(now);
      now = past.pop();
      tell();
    };
    const redo = () => {
      if (!future.length) return;
      past.push(now);
      now = future.pop();
      tell();
    };
    const add = (kind, what, name) => {
      const rest = now[kind].filter(([other, fmt]) => other !== what || (kind === "bar" && fmt !== name));
      take({ ...now, [kind]: [...rest, [what, name]] });
    };
    const given = (kind) => {
      const what = pattern.value.trim();
      if (!what) {
        told.textContent = "Name a layer, or a pattern such as *.down_proj.";
        pattern.focus();
        return;
      }
      add(kind, what, format.value);
      pattern.value = "";
    };
    const form = MP.el("form", { class: "wish", onsubmit: (event) => {
      event.preventDefault();
      given("pin");
    } },
      MP.el("label", { for: "wish-pattern" }, "Layers "), pattern, options,
      MP.el("label", { for: "wish-format" }, " format "), format, " ",
      MP.el("button", { type: "submit" }, "Pin"), " ", button("Bar", () => given("bar")), " ", back, " ", forth);
    MP.fill(element, form, list, told);
    draw();
    return {
      undo, redo,
      add: (kind, layer, name) => add(kind, literal(layer), name),
      /** What can be undone and redone, for another view to go on with. */
      history: () => ({ past, future }),
      remember: (given) => {
        ({ past, future } = given);
        draw();
      },
      /** Take wishes from a link; nobody is told. */
      set: (pin, bar) => {
        now = { pin, bar };
        draw();
      },
      /** Say what the wishes cost. */
      say: (answer) => {
        const { text } = MP;
        told.className = "wish-cost";
        told.textContent = "";
        if (!answer || (!now.pin.length && !now.bar.length)) return;
        if (answer instanceof Error) {
          told.className = "wish-cost problem";
          told.textContent = text.safe(MP.words(answer));
        } else if (answer.found && text.known(answer.wish)) {
          const what = now.pin.length && now.bar.length ? "These wishes" : now.pin.length ? (now.pin.length === 1 ? "This pin" : "These pins")
            : now.bar.length === 1 ? "This bar" : "These bars";
          const verb = now.pin.length + now.bar.length === 1 ? "costs" : "cost";
          told.textContent = text.safe(`${what} ${verb} ${costOf(answer)} ${study.data.unit} of predicted loss within the same budgets.`);
        }
      },
    };
  };
})();
