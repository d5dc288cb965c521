"use strict";
(async () => {
  const { text } = MP;
  const find = (id) => document.getElementById(id);
  if (!find("study-data")) return;

  /** What a data element holds: base64 of zlib. */
  const unpack = async (id) => {
    const raw = atob(find(id).textContent);
    const bytes = new Uint8Array(raw.length);
    for (let i = 0; i < raw.length; i += 1) bytes[i] = raw.charCodeAt(i);
    return new Response(new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate"))).arrayBuffer();
  };

  /** Put in what was left out because it follows from formats and tables: entries that are ``true``. */
  const complete = (study) => {
    const { points } = study.data;
    const fill = (column, value) => column.forEach((entry, i) => { if (entry === true) column[i] = value(study.choice(i)); });
    fill(points.predicted, study.predicted);
    fill(points.doubt, study.doubt);
    for (const [resource, column] of Object.entries(points.cost)) fill(column, (choice) => study.cost(choice, resource));
    points.bound.forEach((entry, i) => { if (entry === true) points.bound[i] = points.predicted[i]; });
  };

  const [data, choices] = await Promise.all([unpack("study-data"), unpack("study-plans")]);
  const study = MP.open(JSON.parse(new TextDecoder().decode(data)), choices);
  complete(study);
  const { points } = study.data;
  MP.report = study;

  /** What is shown; all of it stands in the address. */
  const state = { a: study.chosen, b: null, layer: null, mode: "bits", x: "weights", y: "measured", log: null };
  const numberOf = (key) => { const i = points.key.indexOf(key); return i < 0 ? null : i; };
  let gone = [];
  const read = () => {
    const found = new URLSearchParams(location.hash.slice(1));
    const one = (name, list, other) => (list.includes(found.get(name)) ? found.get(name) : other);
    const given = (pin) => (found.has(pin) ? numberOf(found.get(pin)) : null);
    gone = ["a", "b"].filter((pin) => found.has(pin) && given(pin) === null).map((pin) => pin.toUpperCase());
    state.a = given("a") ?? study.chosen;
    state.b = given("b");
    const layer = study.data.layers.findIndex((item) => item.name === found.get("layer"));
    state.layer = layer < 0 ? null : layer;
    state.mode = one("mode", MP.modes.map(([mode]) => mode), "bits");
    state.x = one("x", Object.keys(points.cost), "weights");
    state.y = one("y", ["measured", "predicted"], points.loss.some((loss) => loss !== null) ? "measured" : "predicted");
    state.log = { log: true, linear: false }[found.get("scale")] ?? null;
  };
  const write = () => {
    const made = new URLSearchParams();
    if (state.a !== null && state.a !== study.chosen) made.set("a", points.key[state.a]);
    if (state.b !== null) made.set("b", points.key[state.b]);
    if (state.layer !== null) made.set("layer", study.data.layers[state.layer].name);
    if (state.mode !== "bits") made.set("mode", state.mode);
    if (state.x !== "weights") made.set("x", state.x);
    if (state.y !== "measured") made.set("y", state.y);
    if (state.log !== null) made.set("scale", state.log ? "log" : "linear");
    history.replaceState(null, "", `#${made}`);
  };

  let hover = null;
  let layerHover = null;
  const name = (i) => `${points.label[i] || `plan ${points.key[i]}`}${points.group[i] === "chosen" ? ", the chosen plan" : ""}`;
  const pick = (i, event) => {
    gone = [];
    if (event?.shiftKey) state.b = i;
    else state.a = i;
    apply();
  };
  const front = MP.front(find("front"), study, { hover: (i) => { hover = i; follow(); }, pick });
  const map = MP.map(find("map"), study, {
    hover: (layer) => { layerHover = layer; card.show(study.choice(hover ?? state.a), layer ?? state.layer); },
    pick: (layer) => { state.layer = layer; write(); map.mark(layer); card.show(study.choice(state.a), layer); },
  });
  const card = MP.card(find("card"), study);
  const compare = MP.compare(find("compare"), study, { pick: (layer) => { state.layer = layer; apply(); } });
  const breakdown = MP.breakdown(find("breakdown"), study);
  MP.sensitivity(find("sensitivity"), study, { pick: (layer) => { state.layer = layer; apply(); find("card").scrollIntoView({ block: "nearest" }); } });
  const predicted = MP.predicted(find("predicted"), study, { hover: (i) => { hover = i; follow(); front.highlight(i); }, pick });

  const shownPlan = find("shown");
  const follow = () => {
    const i = hover ?? state.a;
    if (i === null) return;
    const size = study.size(i);
    MP.fill(shownPlan, MP.el("b", null, MP.el("bdi", null, name(i))), ` ${text.bits(study.bits(i))} bits per weight, ${text.size(size)}`);
    const choice = study.choice(i);
    map.show(choice, state.mode);
    card.show(choice, layerHover ?? state.layer);
  };
  const apply = () => {
    write();
    controls();
    front.show({ x: state.x, y: state.y, log: state.log, pins: { A: state.a, B: state.b } });
    map.mark(state.layer);
    follow();
    const [a, b] = [state.a, state.b].map((i) => (i === null ? null : study.choice(i)));
    find("compare-none").hidden = b !== null;
    compare.show(a, b, ["A", "B"], [state.a, state.b]);
    MP.fill(find("pins"), [["A", state.a], ["B", state.b]].filter(([, i]) => i !== null).map(([pin, i]) => MP.el("li", null, MP.el("b", null, `${pin}: `), MP.el("bdi", null, name(i)), ` (${MP.planLines(study, i).slice(1).join(", ")})`)),
      gone.length ? MP.el("li", null, `The link names as ${gone.join(" and ")} what is no plan of this report.`) : null);
    for (const button of ["unpin", "swap"]) find(button).disabled = state.b === null;
    breakdown.show(a);
    predicted.highlight(state.a);
  };

  const switches = find("switches");
  const choose = (label, values, get, set, then = apply) => {
    const select = MP.el("select", { onchange: () => { set(values[select.selectedIndex][0]); then(); } }, values.map(([, words]) => MP.el("option", null, words)));
    select.refresh = () => { select.selectedIndex = Math.max(0, values.findIndex(([value]) => value === get())); };
    return [MP.el("label", null, `${label} `, select), select];
  };
  const [xLabel, xSelect] = choose("Cost", Object.keys(points.cost).map((cost) => [cost, cost === "weights" ? "size" : cost]), () => state.x, (value) => { state.x = value; });
  const [yLabel, ySelect] = choose("Loss", [["measured", "measured"], ["predicted", "predicted"]], () => state.y, (value) => { state.y = value; });
  const [sLabel, sSelect] = choose("Scale", [[null, "as fits"], [true, "logarithmic"], [false, "linear"]], () => state.log, (value) => { state.log = value; });
  const [mLabel, mSelect] = choose("Colour by", MP.modes, () => state.mode, (value) => { state.mode = value; }, () => { write(); follow(); });
  const controls = () => [xSelect, ySelect, sSelect, mSelect].forEach((select) => select.refresh());
  MP.fill(switches, xLabel, yLabel, sLabel);
  MP.fill(find("modes"), mLabel);
  find("unpin").addEventListener("click", () => { state.b = null; apply(); });
  // A finger has no Shift key: what was A becomes B, and the next tap picks another A.
  find("keep").addEventListener("click", () => { state.b = state.a; apply(); });
  find("swap").addEventListener("click", () => { if (state.b !== null) { [state.a, state.b] = [state.b, state.a]; apply(); } });
  find("uniform").addEventListener("click", () => {
    const rival = study.rival(state.a);
    if (rival !== null) { state.b = rival; apply(); }
    else MP.fill(find("compare-none"), "No measured uniform plan is as small as A.");
  });
  for (const row of document.querySelectorAll("#plans tr[data-plan]")) {
    const i = Number(row.dataset.plan);
    const head = row.querySelector("th");
    const button = MP.el("button", { type: "button", class: "link", onclick: (event) => { pick(i, event); } }, [...head.childNodes]);
    head.append(button);
  }
  addEventListener("hashchange", () => { read(); apply(); });
  addEventListener("beforeprint", () => { for (const part of document.querySelectorAll("details")) part.open = true; });
  document.documentElement.classList.add("live");
  read();
  apply();
  document.documentElement.dataset.ready = String(Math.round(performance.now()));
})().catch((error) => {
  const note = document.getElementById("broken");
  note.hidden = false;
  note.textContent = `The drawings could not be made in this browser (${error.message}). The tables below hold the numbers.`;
});
