"use strict";
(() => {
  const { text } = MP;
  const NEAR = 24;

  /**
   * Draw the plans as loss over cost.
   * @param {HTMLElement} element @param {Object} study of `MP.open`
   * @param {{hover?: (i: number|null) => void, pick?: (i: number, event?: Event) => void}} on
   */
  MP.front = (element, study, on = {}) => {
    const box = MP.el("div", { class: "plot" });
    const caption = MP.el("p", { class: "note plot-note", "aria-live": "polite" });
    const reset = MP.el("button", { type: "button", class: "reset", hidden: true, onclick: () => zoom(null) }, "Show all");
    const keys = MP.el("div", { class: "keys" });
    const tip = MP.el("div", { class: "tip", hidden: true });
    MP.fill(element, box, keys, caption);
    box.append(reset, tip);
    const below = MP.canvas(box, { "aria-hidden": "true" });
    const above = MP.canvas(box, {
      tabindex: 0, role: "application", class: "over", "aria-roledescription": "plot",
      "aria-label": "Plans by size and loss. Left and right arrows go from plan to plan, Enter picks, plus and minus zoom, 0 shows all.",
    }, () => { below.fit(); draw(); });
    const state = { x: "weights", y: "measured", log: null, extra: [], pins: {}, limit: null, at: null, zoom: null };
    let shown = null;
    let drag = null;

    const prepare = () => {
      const { points } = study.data;
      const axis = MP.axisOf(study, state.x);
      const xs = (points.cost[state.x] ?? points.label.map(() => null)).map((x) => (x === null ? null : x / axis.factor));
      const ys = state.y === "measured" ? points.loss : points.predicted;
      const errors = state.y === "measured" ? points.spread : points.doubt;
      const log = state.log ?? MP.isWide(ys.filter((y) => y !== null));
      const own = study.data.budgets.find((budget) => budget.resource === state.x)?.limit ?? null;
      const limit = state.limit === undefined || state.limit === null ? own : state.limit;
      const extra = state.extra.map((e) => ({ ...e, x: e.size / axis.factor }));
      const front = MP.frontOf(xs, ys);
      const there = xs.map((_, i) => i).filter((i) => xs[i] !== null && ys[i] !== null);
      const [order, hidden] = [there.filter((i) => !log || ys[i] > 0), there.filter((i) => log && ys[i] <= 0)];
      order.sort((a, b) => xs[a] - xs[b] || ys[a] - ys[b]);
      const bound = MP.boundOf(study, xs, state).filter(([, y]) => !log || y > 0);
      shown = {
        axis, xs, ys, errors, log, front, order, hidden, extra, limit: limit === null ? null : limit / axis.factor, bound,
        onFront: new Set(front),
        xRange: MP.range([...xs.filter((_, i) => ys[i] !== null), ...extra.map((e) => e.x), ...(limit === null ? [] : [limit / axis.factor])]) ?? [0, 1],
        yRange: MP.range([...ys, ...extra.map((e) => e.loss)], log) ?? (log ? [0.1, 1] : [0, 1]),
      };
      MP.fill(keys, MP.legend(study, { ...shown, bound: bound.length > 1 }));
    };
    const scales = () => {
      const [x, y] = state.zoom ?? [shown.xRange, shown.yRange];
      const roof = state.x === "weights" ? 48 : 12;
      return [
        MP.scale({ low: x[0], high: x[1], from: 68, to: above.width - 14 }),
        MP.scale({ low: y[0], high: y[1], log: shown.log, from: above.height - 46, to: roof }),
      ];
    };
    const place = (i) => [shown.x.at(shown.xs[i]), shown.y.at(shown.ys[i])];
    const inside = ([x, y]) => x >= shown.x.from - 1 && x <= shown.x.to + 1 && y <= shown.y.from + 1 && y >= shown.y.to - 1;

    const bars = (context, numbers, colour) => {
      context.strokeStyle = colour;
      context.lineWidth = 1;
      context.beginPath();
      for (const i of numbers) {
        const [error, y] = [shown.errors[i], shown.ys[i]];
        if (!error) continue;
        const x = Math.round(shown.x.at(shown.xs[i])) + 0.5;
        const low = shown.log && y - error <= 0 ? shown.y.from : shown.y.at(y - error);
        const high = shown.y.at(y + error);
        context.moveTo(x - 3, high); context.lineTo(x + 3, high);
        context.moveTo(x, high); context.lineTo(x, low);
        context.moveTo(x - 3, low); context.lineTo(x + 3, low);
      }
      context.stroke();
    };
    const path = (context, numbers, ys, colour, width) => {
      context.strokeStyle = colour;
      context.lineWidth = width;
      context.beginPath();
      numbers.forEach((i, k) => context[k ? "lineTo" : "moveTo"](shown.x.at(shown.xs[i]), shown.y.at(ys[i])));
      context.stroke();
    };

    const drawPoints = (context) => {
      const groups = new Map(MP.groups.map(([group]) => [group, [[], []]]));
      shown.order.forEach((i) => groups.get(study.data.points.group[i])[shown.onFront.has(i) ? 1 : 0].push(i));
      const many = shown.order.length > 400;
      for (const [group, , shape] of MP.groups) {
        const [beaten, best] = groups.get(group);
        const own = MP.tone(`--g-${group}`);
        const keeps = ["uniform", "imported", "chosen"].includes(group);
        if (!many || keeps) bars(context, beaten, keeps ? own : MP.tone("--faint"));
        const radius = keeps ? 5 : many ? 2.2 : 3.5;
        MP.marks(context, shape, beaten.map(place), radius, keeps ? own : MP.tone("--faint"));
      }
      path(context, shown.front.filter((i) => !shown.log || shown.ys[i] > 0), shown.ys, MP.tone("--g-mixed"), 2);
      for (const [group, , shape] of MP.groups) {
        const best = groups.get(group)[1];
        if (!many || best.length < 100) bars(context, best, MP.tone(`--g-${group}`));
        MP.marks(context, shape, best.map(place), group === "chosen" ? 6 : many && best.length > 60 ? 3 : 4.5, MP.tone(`--g-${group}`));
      }
    };

    const clip = (context) => {
      context.beginPath();
      context.rect(shown.x.from - 8, shown.y.to - 8, shown.x.to - shown.x.from + 16, shown.y.from - shown.y.to + 16);
      context.clip();
    };

    const drawLimit = (context) => {
      if (shown.limit === null) return;
      const x = Math.round(shown.x.at(shown.limit)) + 0.5;
      context.strokeStyle = MP.tone("--muted");
      context.lineWidth = 1.5;
      context.setLineDash([6, 4]);
      context.beginPath();
      context.moveTo(x, shown.y.from);
      context.lineTo(x, shown.y.to);
      context.stroke();
      context.setLineDash([]);
    };

    const draw = () => {
      if (!shown || !above.width) return;
      [shown.x, shown.y] = scales();
      const { context } = below;
      below.clear();
      const twin = state.x === "weights" && study.data.weights
        ? { factor: (8 * shown.axis.factor) / study.data.weights, name: "bits per weight (exact)" } : null;
      const yName = `${state.y} loss (${text.safe(study.data.unit)}), lower is better`;
      MP.axes(context, { x: shown.x, y: shown.y, xName: shown.axis.title, yName, top: twin });
      context.save();
      clip(context);
      drawLimit(context);
      if (shown.bound.length > 1) MP.stairs(context, shown, MP.tone("--g-bound"));
      drawPoints(context);
      MP.marks(context, "cross", shown.extra.map((e) => [shown.x.at(e.x), shown.y.at(e.loss)]), 5, MP.tone("--accent"));
      context.fillStyle = MP.tone("--text");
      context.textAlign = "left";
      for (const e of shown.extra) context.fillText(text.safe(e.label ?? ""), shown.x.at(e.x) + 8, shown.y.at(e.loss) + 4);
      context.restore();
      drawOver();
    };

    const drawOver = () => {
      if (!shown?.x) return;
      const { context } = above;
      above.clear();
      context.font = "600 12px system-ui, sans-serif";
      context.textAlign = "center";
      for (const [name, i] of Object.entries(state.pins)) {
        if (i === null || i === undefined || shown.xs[i] === null || shown.ys[i] === null) continue;
        const at = place(i);
        if (!inside(at)) continue;
        MP.marks(context, "ring", [at], 9, MP.tone("--text"));
        // Two pins near each other stay legible: the first stands above its plan, the others below.
        const lift = name === "A" ? -19 : 19;
        MP.marks(context, "circle", [[at[0], at[1] + lift]], 9, MP.tone("--text"));
        context.fillStyle = MP.tone("--ground");
        context.fillText(text.safe(name), at[0], at[1] + lift + 4);
      }
      if (drag?.box) {
        const [x, y] = drag.from;
        context.strokeStyle = MP.tone("--accent");
        context.strokeRect(x, y, drag.to[0] - x, drag.to[1] - y);
      }
      hint();
    };

    const hint = () => {
      const i = state.at;
      const there = i !== null && shown.xs[i] !== null && shown.ys[i] !== null && !(shown.log && shown.ys[i] <= 0);
      tip.hidden = !there || !inside(place(i));
      if (tip.hidden) return;
      const [x, y] = place(i);
      MP.marks(above.context, "ring", [[x, y]], 7, MP.tone("--accent"));
      MP.fill(tip, MP.el("b", null, study.data.points.label[i] || "a plan"), MP.planLines(study, i, state.x).map((line) => MP.el("span", null, line)));
      const left = x + 14 + tip.offsetWidth > above.width ? x - 14 - tip.offsetWidth : x + 14;
      tip.style.left = `${Math.max(4, left)}px`;
      tip.style.top = `${Math.max(4, Math.min(y + 10, above.height - tip.offsetHeight - 4))}px`;
    };

    const say = () => {
      const { count } = study;
      const all = text.count(count, "plan");
      const some = shown.order.length + shown.hidden.length < count ? `${text.grouped(shown.order.length + shown.hidden.length)} of ${all} have a ${state.y} loss` : all;
      const gone = shown.hidden.length ? ` ${text.count(shown.hidden.length, "plan")} of a loss of 0 or less ${shown.hidden.length === 1 ? "is" : "are"} not on this axis.` : "";
      caption.textContent = shown.order.length
        ? `${some}, ${text.grouped(shown.front.length)} on the front. ${state.y === "measured" ? "Bars are one standard error." : "Bars: the standard error is at most this."}${gone}`
        : `No plan has a ${state.y} loss yet.${gone}`;
    };

    const move = (i, told = true) => {
      if (state.at === i) return;
      state.at = i;
      drawOver();
      if (told) on.hover?.(i);
    };
    const zoom = (to) => {
      state.zoom = to;
      reset.hidden = !to;
      draw();
    };
    const nearest = (x, y) => {
      let [best, least] = [null, NEAR ** 2];
      for (const i of shown.order) {
        const away = (shown.x.at(shown.xs[i]) - x) ** 2 + (shown.y.at(shown.ys[i]) - y) ** 2;
        if (away < least && inside(place(i))) [best, least] = [i, away];
      }
      return best;
    };
    const about = (x, y, factor) => {
      const both = [[shown.x, x], [shown.y, y]].map(([scale, pixel]) =>
        [scale.from, scale.to].map((end) => scale.value(pixel + (end - pixel) * factor)));
      zoom(both);
    };

    const pixel = (event) => {
      const edge = above.canvas.getBoundingClientRect();
      return [event.clientX - edge.left, event.clientY - edge.top];
    };
    const listen = (name, act, options) => above.canvas.addEventListener(name, act, options);
    listen("pointerdown", (event) => { if (event.button === 0) drag = { from: pixel(event), to: pixel(event), box: false, touch: event.pointerType === "touch" }; });
    listen("pointermove", (event) => {
      if (drag && event.buttons && !drag.touch) {
        drag.to = pixel(event);
        drag.box = Math.hypot(drag.to[0] - drag.from[0], drag.to[1] - drag.from[1]) > 8;
        if (drag.box) return drawOver();
      }
      return move(nearest(...pixel(event)));
    });
    listen("pointerup", (event) => {
      const done = drag;
      drag = null;
      if (done?.box) {
        const ends = (scale, a, b) => [scale.value(scale.from < scale.to ? Math.min(a, b) : Math.max(a, b)), scale.value(scale.from < scale.to ? Math.max(a, b) : Math.min(a, b))];
        zoom([ends(shown.x, done.from[0], done.to[0]), ends(shown.y, done.from[1], done.to[1])]);
        return;
      }
      const i = nearest(...pixel(event));
      if (done && i !== null) { move(i); on.pick?.(i, event); }
    });
    listen("pointerleave", () => { if (!drag?.box) move(null); });
    listen("blur", () => move(null));
    listen("pointercancel", () => { drag = null; });
    listen("dblclick", () => zoom(null));
    // Without a key the wheel scrolls the page.
    listen("wheel", (event) => {
      if (!event.ctrlKey && !event.shiftKey && document.activeElement !== above.canvas) return;
      event.preventDefault();
      about(...pixel(event), (event.deltaY || event.deltaX) > 0 ? 1.25 : 0.8);
    }, { passive: false });
    listen("keydown", (event) => {
      const { order } = shown;
      const middle = [(shown.x.from + shown.x.to) / 2, (shown.y.from + shown.y.to) / 2];
      const jump = (way, list) => {
        if (!list.length) return;
        const at = state.at === null ? -1 : list.indexOf(state.at);
        const near = at >= 0 || state.at === null ? at + way : list.findIndex((i) => shown.xs[i] >= shown.xs[state.at]);
        move(list[Math.min(Math.max(near, 0), list.length - 1)]);
        caption.textContent = [study.data.points.label[state.at], ...MP.planLines(study, state.at, state.x)].map(text.safe).join(", ");
      };
      const acts = {
        ArrowRight: () => jump(1, order), ArrowLeft: () => jump(-1, order),
        ArrowUp: () => jump(-1, shown.front), ArrowDown: () => jump(1, shown.front),
        Home: () => jump(-order.length, order), End: () => jump(order.length, order),
        Enter: () => state.at !== null && on.pick?.(state.at, event), " ": () => state.at !== null && on.pick?.(state.at, event),
        "+": () => about(...middle, 0.8), "=": () => about(...middle, 0.8), "-": () => about(...middle, 1.25),
        0: () => zoom(null), Escape: () => { move(null); say(); },
      };
      if (!acts[event.key] || event.ctrlKey || event.metaKey || event.altKey) return;
      event.preventDefault();
      acts[event.key]();
    });
    MP.onTone(draw);

    return {
      /** Draw with these settings; those left out stay. */
      show: (settings = {}) => {
        if (("x" in settings && settings.x !== state.x) || ("y" in settings && settings.y !== state.y) || "log" in settings) state.zoom = null;
        Object.assign(state, settings);
        reset.hidden = !state.zoom;
        prepare();
        draw();
        say();
      },
      /** Mark a plan, as if pointed at; nobody is told. @param {number|null} i */
      highlight: (i) => move(i, false),
      /** Change the marked pins only. */
      pin: (pins) => { state.pins = pins; drawOver(); },
      /** Where a plan is drawn, in pixels of the canvas; null where it is not. */
      place: (i) => (shown?.x && shown.xs[i] !== null && shown.ys[i] !== null ? place(i) : null),
    };
  };
})();
