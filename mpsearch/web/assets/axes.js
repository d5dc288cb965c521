"use strict";
(() => {
  /**
   * A scale from values to pixels.
   * @typedef {{low: number, high: number, log: boolean, from: number, to: number,
   *   at: (value: number) => number, value: (pixel: number) => number, ticks: (count: number) => number[]}} Scale
   */

  const even = (low, high, count) => {
    const rough = (high - low) / Math.max(1, count);
    const power = 10 ** Math.floor(Math.log10(rough));
    const step = [1, 2, 5, 10].map((factor) => factor * power).find((size) => size >= rough * 0.999);
    const found = [];
    for (let k = Math.ceil(low / step - 1e-9); k * step <= high + step * 1e-9; k += 1) found.push(k * step);
    return found;
  };

  const powers = (low, high, count) => {
    const within = (factors) => {
      const found = [];
      for (let k = Math.floor(Math.log10(low)); k <= Math.ceil(Math.log10(high)); k += 1)
        for (const factor of factors) {
          const value = Number(`${factor}e${k}`);
          if (value >= low * 0.999 && value <= high * 1.001) found.push(value);
        }
      return found;
    };
    const tries = [[1, 2, 3, 5, 7], [1, 2, 5], [1, 3], [1]].map(within);
    const fits = tries.find((ticks) => ticks.length <= count) ?? tries.at(-1);
    return fits.length > 1 ? fits : even(low, high, count);
  };

  /** @param {{low: number, high: number, log?: boolean, from: number, to: number}} given @returns {Scale} */
  MP.scale = ({ low, high, log = false, from, to }) => {
    const into = log ? Math.log10 : (value) => value;
    const [a, b] = [into(low), into(high)];
    const span = b - a || 1;
    return {
      low, high, log, from, to,
      at: (value) => from + ((into(value) - a) / span) * (to - from),
      value: (pixel) => {
        const share = a + ((pixel - from) / (to - from)) * span;
        return log ? 10 ** share : share;
      },
      ticks: (count) => (log ? powers(low, high, count) : even(low, high, count)),
    };
  };

  /** Ends of an axis that shows all values, with a margin; null without values. */
  MP.range = (values, log = false, margin = 0.06) => {
    let [low, high] = [Infinity, -Infinity];
    for (const value of values) {
      if (value === null || !Number.isFinite(value) || (log && value <= 0)) continue;
      low = Math.min(low, value);
      high = Math.max(high, value);
    }
    if (low > high) return null;
    if (log) {
      const room = Math.max((high / low) ** margin, 1.05);
      return [low / room, high * room];
    }
    const room = margin * (high - low) || 0.06 * Math.abs(high) || 1;
    return [low - room, high + room];
  };

  /** Beyond a factor of ten between the largest and the smallest loss an axis is logarithmic. */
  MP.isWide = (values) => {
    const above = values.filter((value) => value > 0);
    return above.length > 0 && above.reduce((a, b) => Math.max(a, b)) > 10 * above.reduce((a, b) => Math.min(a, b));
  };

  const shapes = {
    circle: (c, x, y, r) => c.arc(x, y, r, 0, 2 * Math.PI),
    ring: (c, x, y, r) => c.arc(x, y, r, 0, 2 * Math.PI),
    square: (c, x, y, r) => c.rect(x - r * 0.9, y - r * 0.9, r * 1.8, r * 1.8),
    diamond: (c, x, y, r) => [[0, -1.3], [1.3, 0], [0, 1.3], [-1.3, 0]].forEach(([u, v], i) =>
      c[i ? "lineTo" : "moveTo"](x + u * r, y + v * r)) ?? c.closePath(),
    cross: (c, x, y, r) => { c.moveTo(x - r, y - r); c.lineTo(x + r, y + r); c.moveTo(x - r, y + r); c.lineTo(x + r, y - r); },
    star: (c, x, y, r) => {
      for (let k = 0; k < 10; k += 1) {
        const [angle, far] = [(Math.PI * (k - 2.5)) / 5, k % 2 ? r * 0.6 : r * 1.5];
        c[k ? "lineTo" : "moveTo"](x + Math.cos(angle) * far, y + Math.sin(angle) * far);
      }
      c.closePath();
    },
  };

  /** Draw many marks of one shape and colour. @param {Array<[number, number]>} places */
  MP.marks = (context, shape, places, radius, colour) => {
    const open = shape === "ring" || shape === "cross";
    context.beginPath();
    for (const [x, y] of places) {
      if (shape === "circle" || shape === "ring") context.moveTo(x + radius, y);
      shapes[shape](context, x, y, radius);
    }
    context[open ? "strokeStyle" : "fillStyle"] = colour;
    context.lineWidth = 1.5;
    if (open) context.stroke();
    else context.fill();
  };

  /** A mark for a legend, as a picture. */
  MP.sign = (shape, tone) => {
    const drawn = {
      circle: () => MP.svg("circle", { cx: 8, cy: 8, r: 4.5 }),
      ring: () => MP.svg("circle", { cx: 8, cy: 8, r: 4, class: "open" }),
      square: () => MP.svg("rect", { x: 4, y: 4, width: 8, height: 8 }),
      diamond: () => MP.svg("path", { d: "M8 2L14 8L8 14L2 8Z" }),
      cross: () => MP.svg("path", { d: "M4 4L12 12M4 12L12 4", class: "open" }),
      star: () => MP.svg("path", { d: "M8 1L10 6L15 6L11 9.5L12.5 15L8 11.5L3.5 15L5 9.5L1 6L6 6Z" }),
      line: () => MP.svg("path", { d: "M1 8H15", class: "open" }),
      dash: () => MP.svg("path", { d: "M1 8H6M10 8H15", class: "open" }),
    };
    return MP.svg("svg", { viewBox: "0 0 16 16", class: `sign ${tone}`, "aria-hidden": "true" }, drawn[shape]());
  };

  const tickText = (value, step) => {
    const size = Math.abs(value);
    if (value === 0) return "0";
    if (size >= 1e5 || size < 1e-3) return MP.text.plain(Number(value.toPrecision(3)));
    const decimals = step ? Math.max(0, Math.min(6, -Math.floor(Math.log10(step) + 1e-9))) : null;
    return decimals === null ? MP.text.plain(value) : value.toFixed(decimals).replace("-", MP.text.MINUS);
  };

  const stepOf = (scale, ticks) => (scale.log || ticks.length < 2 ? 0 : ticks[1] - ticks[0]);

  /**
   * Draw axes with grid lines.
   * @param {CanvasRenderingContext2D} context
   * @param {{x: Scale, y: Scale, xName: string, yName: string, top?: {factor: number, name: string}}} axes
   */
  MP.axes = (context, { x, y, xName, yName, top }) => {
    const [left, right, bottom, roof] = [x.from, x.to, y.from, y.to];
    context.font = "12px system-ui, sans-serif";
    context.lineWidth = 1;
    const line = (x0, y0, x1, y1) => {
      context.beginPath();
      context.moveTo(Math.round(x0) + 0.5, Math.round(y0) + 0.5);
      context.lineTo(Math.round(x1) + 0.5, Math.round(y1) + 0.5);
      context.stroke();
    };
    context.strokeStyle = MP.tone("--line");
    context.fillStyle = MP.tone("--muted");
    const xs = x.ticks(Math.max(2, Math.floor((right - left) / 80)));
    const ys = y.ticks(Math.max(2, Math.floor((bottom - roof) / 45)));
    context.textAlign = "center";
    for (const value of xs) {
      line(x.at(value), roof, x.at(value), bottom);
      context.fillText(tickText(value, stepOf(x, xs)), x.at(value), bottom + 16);
    }
    context.textAlign = "right";
    for (const value of ys) {
      line(left, y.at(value), right, y.at(value));
      context.fillText(tickText(value, stepOf(y, ys)), left - 6, y.at(value) + 4);
    }
    context.textAlign = "center";
    context.fillText(xName, (left + right) / 2, bottom + 34);
    if (top) {
      const twin = MP.scale({ low: x.low * top.factor, high: x.high * top.factor, from: left, to: right });
      const marks = twin.ticks(Math.max(3, Math.floor((right - left) / 60)));
      for (const value of marks) {
        line(twin.at(value), roof - 4, twin.at(value), roof);
        context.fillText(tickText(value, stepOf(twin, marks)), twin.at(value), roof - 8);
      }
      context.fillText(top.name, (left + right) / 2, roof - 24);
    }
    context.save();
    context.translate(14, (bottom + roof) / 2);
    context.rotate(-Math.PI / 2);
    context.fillText(yName, 0, 0);
    context.restore();
  };

  /**
   * A canvas that fills its element and keeps the sharpness of the screen.
   * @param {HTMLElement} element @param {Object} attributes @param {() => void} redraw when its size changes
   */
  MP.canvas = (element, attributes, redraw) => {
    const canvas = MP.el("canvas", attributes);
    element.append(canvas);
    const context = canvas.getContext("2d");
    const view = { canvas, context, width: 0, height: 0 };
    view.fit = () => {
      const ratio = Math.min(globalThis.devicePixelRatio || 1, 3);
      view.width = element.clientWidth;
      view.height = element.clientHeight;
      canvas.width = Math.round(view.width * ratio);
      canvas.height = Math.round(view.height * ratio);
      context.setTransform(ratio, 0, 0, ratio, 0, 0);
    };
    view.clear = () => context.clearRect(0, 0, view.width, view.height);
    view.fit();
    if (redraw) new ResizeObserver(() => {
      if (element.clientWidth === view.width && element.clientHeight === view.height) return;
      view.fit();
      redraw();
    }).observe(element);
    return view;
  };

  const UNITS = { bytes: [2 ** 20, "MiB"], s: [1e-3, "ms"] };
  const NAMES = { weights: "model size" };

  /** What an axis shows: values of plans in the unit that people read. */
  MP.axisOf = (study, resource) => {
    const unit = resource === "weights" ? "bytes" : (study.data.costs[resource]?.unit ?? "");
    const kind = resource === "weights" ? "exact" : (study.data.costs[resource]?.kind ?? "");
    const [factor, short] = UNITS[unit] ?? [1, unit];
    const name = MP.text.safe(NAMES[resource] ?? resource);
    return { factor, title: `${name} (${[MP.text.safe(short), kind].filter(Boolean).join(", ")})`, unit };
  };

  /** Which of the points no other one beats. */
  MP.frontOf = (xs, ys) => {
    const order = xs.map((_, i) => i).filter((i) => xs[i] !== null && ys[i] !== null);
    order.sort((a, b) => xs[a] - xs[b] || ys[a] - ys[b]);
    let least = Infinity;
    return order.filter((i) => ys[i] < least && ((least = ys[i]), true));
  };

  /**
   * What no plan of up to so much is predicted to lose less than: [[cost, loss]] by cost, loss never rising. Of plans
   * that had no budget but one of weights; on an axis of measured losses plans may lie below it, so there is none.
   */
  MP.boundOf = (study, xs, { x, y }) => {
    if (x !== "weights" || y !== "predicted") return [];
    const { bound, alone } = study.data.points;
    const there = xs.map((_, i) => i).filter((i) => xs[i] !== null && bound[i] !== null && (alone?.[i] ?? true));
    there.sort((a, b) => xs[a] - xs[b] || bound[b] - bound[a]);
    let least = Infinity;
    return there.map((i) => [xs[i], (least = Math.min(least, bound[i]))]);
  };

  /** Draw a bound: a plan's holds up to its own size; beyond it the next one's does. */
  MP.stairs = (context, { x: across, y: up, bound }, colour) => {
    context.strokeStyle = colour;
    context.lineWidth = 1;
    context.beginPath();
    bound.forEach(([x, y], k) => {
      if (k) context.lineTo(across.at(bound[k - 1][0]), up.at(y));
      context[k ? "lineTo" : "moveTo"](across.at(x), up.at(y));
    });
    context.stroke();
  };

  /** What a plan costs and loses, a line for each. @param {string} [resource] shown beside the size */
  MP.planLines = (study, i, resource = "weights") => {
    const { points, unit } = study.data;
    const { text } = MP;
    const size = study.size(i);
    const found = [`${text.size(size)} (${text.bytes(size)}, exact)`, `${text.bits(study.bits(i))} bits per weight`];
    if (resource !== "weights") found.push(`${resource} ${text.cost(study.size(i, resource), study.data.costs[resource]?.unit ?? "")}`);
    found.push(
      study.loss(i) === null ? "not measured" : `measured loss ${text.withSpread(study.loss(i), points.spread[i])} ${unit}`,
    );
    if (study.forecast(i) !== null) found.push(`predicted loss ${text.atMost(study.forecast(i), points.doubt[i])} ${unit}`);
    return found;
  };

  /** What the marks of a plot of plans mean. */
  MP.legend = (study, shown) => {
    const there = new Set(study.data.points.group);
    const items = MP.groups.filter(([group]) => there.has(group)).map(([group, words, shape]) => [shape, `g-${group}`, words]);
    items.push(["line", "g-mixed", "front"]);
    if (study.data.points.group.length > shown.front.length) items.push(["circle", "g-dominated", "grey: beaten by another"]);
    if (shown.bound) items.push(["line", "g-bound", "bound of predicted loss"]);
    if (shown.limit !== null) items.push(["dash", "g-limit", "budget"]);
    return MP.el("ul", { class: "legend" }, items.map(([shape, tone, words]) => MP.el("li", null, MP.sign(shape, tone), words)));
  };
})();
