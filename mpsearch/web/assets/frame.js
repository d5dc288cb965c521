"use strict";
(() => {
  const LOWER = [["plans", "Find plans"], ["predicted", "Predicted and measured"], ["scores", "Score matrix"], ["sensitivity", "Sensitivity"], ["budget", "Where the bytes go"]];

  const section = (id, title, ...children) =>
    MP.el("section", { id, "aria-labelledby": `${id}-title`, tabindex: -1 }, MP.el("h2", { id: `${id}-title` }, title), children);
  const choose = (id, words, items, act) => {
    const made = MP.el("select", { id, onchange: () => act(made.value) }, items.map(([value, name]) => MP.el("option", { value }, name)));
    return [made, MP.el("span", null, MP.el("label", { for: id }, `${words} `), made, " ")];
  };

  /** The parts that draw, each in its room. */
  const parts = (view) => {
    const { study, rooms } = view;
    const pick = (i, event) => view.pick(i, Boolean(event?.shiftKey));
    MP.verdict(rooms.verdict, study);
    view.front = MP.front(rooms.front, study, { hover: (i) => view.hover(i), pick });
    view.map = MP.map(rooms.map, study, { pick: (layer) => view.layer(layer) });
    view.card = MP.card(rooms.card, study);
    view.compare = MP.compare(rooms.compare, study, { pick: (layer) => view.layer(layer) });
    view.slider = MP.slider(rooms.sliders, study, { change: (texts) => view.wish({ budget: texts }) });
    view.breakdown = null;
    view.pins = MP.pins(rooms.wishes, study, { change: (pin, bar) => view.wish({ pin, bar }) });
    MP.fill(view.tabs, LOWER.map(([id, words]) => MP.el("button", { type: "button", "data-view": id, onclick: () => view.open(id) }, words)));
    view.layerBox.addEventListener("change", () => view.layer(study.data.layers.findIndex((layer) => layer.name === view.layerBox.value)));
  };

  /** Make the elements of a view, and the parts that draw. @param {InstanceType<typeof MP.View>} view */
  MP.frame = (view) => {
    const { data } = view.study;
    const names = Object.keys(data.points.cost).sort((a, b) => (b === "weights") - (a === "weights"));
    const resources = names.map((name) => [name, name]);
    const put = (name) => (value) => {
      view.state[name] = value;
      view.keep();
      view.drawFront();
      view.drawPlan();
    };
    [view.x, view.xBox] = choose("front-x", "over", resources.length ? resources : [["weights", "weights"]], put("x"));
    [view.y, view.yBox] = choose("front-y", "loss", [["measured", "measured"], ["predicted", "predicted"]], put("y"));
    [view.log, view.logBox] = choose("front-log", "scale", [["", "as fits"], ["1", "logarithmic"], ["0", "linear"]], put("log"));
    [view.mode, view.modeBox] = choose("map-mode", "show", MP.modes, put("mode"));
    const room = (id) => MP.el("div", { id });
    const button = (words, act, title) => MP.el("button", { type: "button", onclick: act, title }, words);
    view.status = MP.el("p", { class: "status", role: "status" });
    view.plan = MP.el("div", { id: "plan", class: "plan" });
    view.gone = MP.el("p", { class: "problem", role: "alert" });
    view.changes = MP.el("div", { id: "changes", "aria-live": "polite" });
    view.layerBox = MP.el("input", { id: "layer", list: "layers", autocomplete: "off", spellcheck: "false" });
    view.rooms = Object.fromEntries(["verdict", "front", "map", "card", "compare", "sliders", "wishes", "lower"].map((id) => [id, room(`room-${id}`)]));
    const { rooms } = view;
    MP.fill(view.element,
      MP.el("header", null,
        MP.el("p", null, MP.el("a", { href: "#", id: "home" }, "All studies")),
        MP.el("h1", null, MP.el("bdi", null, view.name)), view.status,
        MP.el("p", { class: "row" }, button("Export …", () => view.exporting(), "e"), " ", button("Copy link", () => view.link()), " ", button("Keys", MP.keyHelp, "?"))),
      MP.el("main", null,
        section("verdict", "Is mixing worth it?", rooms.verdict),
        MP.el("div", { class: "columns" },
          section("size", "Size and loss", MP.el("p", { class: "row" }, view.xBox, view.yBox, view.logBox), rooms.front),
          section("shown", "The plan", view.gone, view.plan, MP.el("p", { class: "row" }, view.modeBox), rooms.map)),
        MP.el("div", { class: "columns" },
          section("budgets", "Budgets: solve again", rooms.sliders, MP.el("h3", null, "Pin or bar formats"), rooms.wishes, view.changes),
          section("layer-card", "Layer", MP.el("p", null, MP.el("label", { for: "layer" }, "Layer "), view.layerBox,
            MP.el("datalist", { id: "layers" }, data.layers.slice(0, 2000).map((layer) => MP.el("option", { value: layer.name })))), rooms.card)),
        section("comparison", "Compare A and B", MP.el("p", { class: "row" }, button("Compare with uniform of equal bytes", () => view.withUniform(), "c"), " ",
          button("Compare no longer", () => view.pick(null, true), "x")), view.told = MP.el("p", { class: "muted" }), rooms.compare),
        section("more", "More", view.tabs = MP.el("div", { class: "row", role: "group", "aria-label": "Which figure" }), rooms.lower),
        data.notices.length ? section("notices", "Notices", MP.el("ul", null, data.notices.map((notice) => MP.el("li", null, notice)))) : null),
      MP.el("div", { id: "said", class: "said", role: "status" }));
    parts(view);
  };

  /** What another view of the same study goes on with: a solved plan, what can be undone, what is being typed. */
  MP.carry = (view) => {
    const at = document.activeElement;
    const place = at?.id ? `#${CSS.escape(at.id)}` : at?.dataset?.cell ? `#room-map td[data-cell="${at.dataset.cell}"]` : null;
    const typed = at?.matches?.("input[type=text], input[type=search], input:not([type])") ? at.value : null;
    const { solved, stale, study } = view;
    return { place: view.element.contains(at) ? place : null, typed, solved, stale, history: view.pins.history?.(), study };
  };

  MP.goOn = (view, { solved, stale, history, study }) => {
    const shape = ({ data }) => JSON.stringify([data.layers, data.formats]);
    if (solved && shape(study) === shape(view.study)) Object.assign(view, { solved, stale });
    if (history) view.pins.remember?.(history);
  };

  /** Put the focus back, with what was being typed. */
  MP.refocus = (view, { place, typed }) => {
    const found = place && view.element.querySelector(place);
    if (!found) return;
    if (typed !== null && found.value !== typed) found.value = typed;
    found.focus({ preventScroll: true });
  };
})();
