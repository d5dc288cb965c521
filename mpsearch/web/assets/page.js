"use strict";
(() => {
  const app = document.getElementById("app");
  /** @type {InstanceType<typeof MP.View>|null} */
  let view = null;
  let live = null;
  let shown = null;
  let turn = 0;

  const problem = (error) => MP.fill(app,
    MP.el("header", null, MP.el("p", null, MP.el("a", { href: "#", id: "home" }, "All studies")), MP.el("h1", null, "mpsearch")),
    MP.el("main", null, MP.el("p", { class: "problem", role: "alert" }, MP.words(error))));

  const close = () => {
    live?.end();
    view = live = null;
  };

  const list = async (state) => {
    close();
    document.title = "mpsearch";
    const main = MP.el("main", null, MP.el("p", null, "Loading …"));
    MP.fill(app, main, MP.el("div", { id: "said", class: "said", role: "status" }));
    await MP.studies(main, state.filter, { filter: (filter) => {
      shown = MP.state.write({ ...MP.state.read(), filter });
      MP.state.keep({ ...MP.state.read(), filter });
    } });
  };

  const open = async (state) => {
    const mine = ++turn;
    const data = await MP.ask(MP.query("view", { study: state.study }));
    if (mine !== turn) return;
    if (view?.mark === data.mark && view.name === data.study) return;
    const kept = view?.name === data.study ? MP.carry(view) : null;
    const top = scrollY;
    close();
    document.title = MP.text.safe(`${state.study} - mpsearch`);
    view = new MP.View(app, data, state);
    view.build();
    if (kept) MP.goOn(view, kept);
    live = MP.live(view.status, data.study, () => MP.reload());
    const made = view;
    const shown = view.take(state);
    if (kept) {
      MP.refocus(made, kept);
      scrollTo(0, top);
    }
    await shown;
    performance.mark("ready");
    document.documentElement.dataset.ready = "yes";
  };

  let waiting = 0;
  /** Load the study again, for more of it is stored; the view stays. */
  MP.reload = () => {
    clearTimeout(waiting);
    waiting = setTimeout(() => view && open(MP.state.read()).catch(problem), 300);
  };

  const route = async () => {
    if (shown === location.hash) return;
    shown = location.hash;
    const state = MP.state.read();
    try {
      if (!state.study) await list(state);
      else if (view?.name === state.study) await view.take(state);
      else await open(state);
    } catch (error) {
      close();
      problem(error);
    }
  };
  // The address follows what is done here; only what comes from elsewhere is a way to go.
  const kept = MP.state.keep;
  MP.state.keep = (state, step) => {
    kept(state, step);
    shown = location.hash;
  };
  addEventListener("hashchange", route);
  addEventListener("popstate", route);

  const focus = (id) => {
    const found = document.querySelector(id);
    found?.focus();
    found?.scrollIntoView({ block: "nearest" });
  };
  const keys = {
    a: () => view.hovered !== null && view.pick(view.hovered, false),
    b: () => view.hovered !== null && view.pick(view.hovered, true),
    c: () => view.withUniform(), x: () => view.pick(null, true), u: () => view.pins.undo(), r: () => view.pins.redo(),
    e: () => view.exporting(), f: () => focus("#room-front [tabindex='0']"), m: () => focus("#room-map [tabindex='0']"),
    w: () => focus("#room-sliders input"), p: () => focus("#wish-pattern"), s: () => { location.hash = ""; },
  };
  addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey || document.querySelector("dialog[open]")) return;
    if (event.target.closest?.("input:not([type=range]), select, textarea")) return;
    if (!MP.singleKeys()) return;
    if (event.key === "?") MP.keyHelp();
    else if (view && Object.hasOwn(keys, event.key)) {
      event.preventDefault();
      keys[event.key]();
    }
  });

  route();
})();
