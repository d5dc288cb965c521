"use strict";
(() => {
  const CHUNK = 50;
  const { text } = MP;
  /** Everything of one study that is open: its data, the state of the link, and the parts that draw. */
  class View {
    constructor(element, data, state) {
      Object.assign(this, { element, state, name: data.study, mark: data.mark, solved: null, stale: false, hovered: null, loading: new Map() });
      this.study = MP.open(data);
      this.wide = data.formats.length > 256;
      this.titles = MP.titles(this.study);
      this.keys = MP.planKeys(this.name, this.mark, this.study.count);
      this.pinned = { a: null, b: null };
      this.solver = MP.solver({ answered: (answer) => this.answered(answer), refused: (error) => this.unsolved(error) });
    }

    get a() { return this.pinned.a ?? this.study.chosen; }
    get b() { return this.pinned.b; }

    /** Formats of plan A: solved for a moment, or stored. */
    get first() { return this.solved ? this.solved.choice : this.study.choice(this.a); }

    /** Load the formats of a plan, with its neighbours'. */
    load(i) {
      if (i === null || !this.study.missing(i)) return Promise.resolve();
      const first = Math.floor(i / CHUNK) * CHUNK;
      if (!this.loading.has(first)) {
        const asked = MP.ask(MP.query("view/choices", { study: this.name, first, count: CHUNK, mark: this.mark }));
        this.loading.set(first, asked.then((bytes) => this.study.put(first, bytes)).catch((error) => this.refused(error))
          .finally(() => this.loading.delete(first)));
      }
      return this.loading.get(first);
    }

    refused(error) {
      if (error.code === "E914") MP.reload();
      else MP.say(MP.words(error));
    }

    keep(step = false) { MP.state.keep(this.state, step); }

    build() { MP.frame(this); }

    /** Show what a link says. */
    async take(state) {
      this.state = state;
      const { data } = this.study;
      if (!state.y && !data.points.loss.some((value) => value !== null)) state.y = "predicted";
      for (const [name, select] of [["x", this.x], ["y", this.y], ["log", this.log], ["mode", this.mode]]) {
        select.value = state[name];
        if (select.selectedIndex < 0) select.selectedIndex = 0;
      }
      this.slider.set(state.budget);
      this.pins.set(state.pin, state.bar);
      await this.named(state);
      this.open(state.view || "plans", false);
      this.drawFront();
      await Promise.all([this.load(this.a), this.load(this.b)]);
      this.drawPlan();
      this.drawCompare();
      this.drawLayer();
      await this.resolve();
    }

    /** Find the plans that a link names; tell of those that are not here. */
    async named(state) {
      const gone = [];
      for (const pin of ["a", "b"]) {
        this.pinned[pin] = state[pin] ? await this.keys.number(state[pin]) : null;
        if (state[pin] && this.pinned[pin] === null) gone.push(pin.toUpperCase());
      }
      this.gone.textContent = gone.length
        ? `The link names as ${gone.join(" and ")} what is no plan of this study now.${gone.includes("A") ? " The plan below is another one." : ""}` : "";
    }

    /** Put the pinned plans into the address. */
    async keepPlans() {
      const { a, b } = this.pinned;
      const digits = await Promise.all([a, b].map((i) => (i === null ? "" : this.keys.digits(i))));
      if (this.pinned.a !== a || this.pinned.b !== b) return;
      [this.state.a, this.state.b] = digits;
      this.keep(true);
    }

    drawFront() {
      const { state, solved } = this;
      const resource = this.x.value || "weights";
      const extra = solved && solved.cost[resource] !== undefined ? [{ size: solved.cost[resource], loss: solved.loss, label: "solved, predicted" }] : [];
      const limit = solved?.budgets.find((budget) => budget.resource === resource)?.limit ?? null;
      const pins = { A: solved ? null : this.a, B: this.b };
      this.front.show({ x: resource, y: this.y.value, log: state.log === "" ? null : state.log === "1", extra, pins, limit });
    }

    hover(i) {
      this.hovered = i;
      if (i !== null && this.study.missing(i)) this.load(i).then(() => this.hovered === i && this.drawPlan());
      else this.drawPlan();
    }

    drawPlan() {
      const i = this.hovered ?? this.a;
      const stored = this.hovered !== null || !this.solved;
      const choice = stored ? this.study.choice(i) : this.solved.choice;
      if (i === null && stored) MP.fill(this.plan, MP.el("p", { class: "muted" }, "No plan yet."));
      else MP.fill(this.plan, stored ? MP.storedWords(this.study, i, this.titles[i], this.hovered === null)
        : MP.solvedWords(this.study, this.solved, this.stale));
      this.map.show(choice, this.mode.value || "bits");
    }

    /** Pin a plan as A, or as B to compare it. */
    async pick(i, second = false) {
      this.pinned[second ? "b" : "a"] = i;
      this.gone.textContent = "";
      if (!second) {
        Object.assign(this.state, { budget: [], pin: [], bar: [] });
        this.solver.stop();
        Object.assign(this, { solved: null, stale: false });
        this.slider.set([]);
        this.pins.set([], []);
        this.pins.say(null);
        this.slider.say(null);
        MP.fill(this.changes);
      }
      await Promise.all([this.load(i), this.keepPlans().catch((error) => this.refused(error))]);
      this.hovered = null;
      this.drawFront();
      this.drawPlan();
      this.drawFirst();
      if (i !== null) MP.say(`${this.titles[i]} is ${second ? "B" : "A"}`);
    }

    /** Draw what depends on the formats of plan A. */
    drawFirst() {
      this.drawCompare();
      this.drawLayer();
      this.breakdown?.show(this.first);
    }

    drawCompare() {
      const { b, first } = this;
      this.rooms.compare.hidden = b === null;
      this.told.textContent = b === null ? "Shift-click a plan of the front, press b on one, or take the best uniform plan of the same size." : "";
      if (b === null || !first) return;
      const names = [this.solved ? "A: solved now" : `A: ${this.titles[this.a]}`, `B: ${this.titles[b]}`];
      this.compare.show(first, this.study.choice(b), names, [this.solved ? null : this.a, b]);
    }

    withUniform() {
      const { study, solved } = this;
      const rival = solved ? study.rivalOf(solved.cost.weights) : study.rival(this.a);
      if (rival !== null) this.pick(rival, true);
      else this.told.textContent = "No measured uniform plan is as small as this one.";
    }

    layer(number) {
      if (number < 0) return;
      this.state.layer = this.study.data.layers[number].name;
      this.keep();
      this.drawLayer();
    }

    drawLayer() {
      const { layers } = this.study.data;
      const found = layers.findIndex((layer) => layer.name === this.state.layer);
      this.layerBox.value = found < 0 ? "" : layers[found].name;
      this.card.show(this.first, found < 0 ? null : found);
      if (found >= 0) this.map.mark?.(found);
    }

    wish(change) {
      Object.assign(this.state, change);
      this.keep();
      this.resolve();
    }

    /** Solve for what the link says; the study's own plan where it says nothing. */
    async resolve() {
      const { budget, pin, bar } = this.state;
      if (!this.study.data.scores) return;
      if (budget.length || pin.length || bar.length) {
        await this.solver.ask(() => this.asked());
        return;
      }
      this.solver.stop();
      this.slider.say(null);
      this.pins.say(null);
      if (this.solved) this.settle(null);
    }

    asked() {
      const { budget, pin, bar } = this.state;
      const bars = {};
      for (const [pattern, format] of bar) (bars[pattern] ??= []).push(format);
      const against = this.first ? Array.from(this.first) : null;
      return { study: this.name, budgets: budget, pins: Object.fromEntries(pin), bars, mark: this.mark, against };
    }

    answered(answer) {
      this.slider.say(answer.found ? null : answer);
      this.pins.say(answer);
      this.stale = !answer.found;
      if (answer.found) this.settle(answer);
      else this.drawPlan();
    }

    /** Say why nothing was solved: what is wrong with wishes beside them, the rest beside the budgets. */
    unsolved(error) {
      if (error.code === "E914") return this.refused(error);
      const wishes = ["E120", "E213"].includes(error.code) && (this.state.pin.length || this.state.bar.length);
      this.slider.say(wishes ? null : error);
      this.pins.say(wishes ? error : null);
      this.stale = true;
      return this.drawPlan();
    }

    settle(answer) {
      const before = this.first;
      this.hovered = null;
      this.stale = false;
      this.solved = answer && { ...answer, choice: this.wide ? Uint16Array.from(answer.choice) : Uint8Array.from(answer.choice) };
      this.drawPlan();
      const changed = answer?.changed ?? [];
      // What is looked at comes first; the rest follows with the next picture.
      requestAnimationFrame(() => {
        this.map.flash(changed);
        this.drawFront();
        this.drawFirst();
      });
      if (answer?.changed !== this.listed) MP.fill(this.changes, answer && before ? MP.changedWords(this.study, changed, before, answer.choice) : null);
      this.listed = answer?.changed;
    }

    open(id, kept = true) {
      const { study, rooms } = this;
      if (kept) {
        this.state.view = id;
        this.keep();
      }
      for (const button of this.tabs.children) button.setAttribute("aria-pressed", String(button.dataset.view === id));
      if (this.opened === id) return;
      this.opened = id;
      this.breakdown = null;
      const room = MP.el("div");
      MP.fill(rooms.lower, room);
      const pick = (i, event) => this.pick(i, Boolean(event?.shiftKey));
      const layer = (number) => this.layer(number);
      if (id === "predicted") MP.predicted(room, study, { hover: (i) => this.hover(i), pick });
      else if (id === "scores") MP.matrix(room, study, { pick: layer });
      else if (id === "sensitivity") MP.sensitivity(room, study, { pick: layer });
      else if (id === "budget") {
        this.breakdown = MP.breakdown(room, study);
        this.load(this.a).then(() => this.breakdown?.show(this.first));
      }
      else MP.plans(room, study, { pick: (i, second) => this.pick(i, second), hover: (i) => this.hover(i) });
    }

    async exporting() {
      const { solved, a } = this;
      if (!solved && a === null) return MP.say("There is no plan to export yet.");
      try {
        const keys = solved ? { plan: [""] } : await MP.ask(MP.query("view/keys", { study: this.name, first: a, count: 1, mark: this.mark }));
        const key = keys.plan[0];
        const chosen = !solved && this.study.data.points.group[a] === "chosen";
        const body = solved ? () => MP.solvedPlan(solved) : () => MP.ask(`plans/${key}`);
        return await MP.exporting(this.name, { label: solved ? "the plan solved now" : this.titles[a], chosen, key, body });
      } catch (error) {
        return this.refused(error);
      }
    }

    async link() {
      this.keep();
      try {
        await navigator.clipboard.writeText(location.href);
        MP.say("The link is copied. Who opens it needs a token of this server.");
      } catch {
        MP.say("The address bar holds the link.");
      }
    }
  }

  MP.View = View;
})();
