"use strict";
/**
 * Names everything that the drawing scripts share: text of numbers, elements, colours, exact sums.
 * Text of a study reaches the page through text nodes and attributes only.
 */
var MP = globalThis.MP || {};
globalThis.MP = MP;
(() => {
  const MIB = 2 ** 20;
  const MINUS = "\u2212";
  // Control, direction and invisible characters could forge what is read; so could lone surrogates and line ends.
  const UNSAFE = /(?![\t\n])[\p{Cc}\p{Cf}\p{Cs}\p{Co}\p{Cn}\p{Zl}\p{Zp}]/gu;

  /** A text without the characters that could forge what is read. @param {unknown} text */
  const safe = (text) => String(text).replace(UNSAFE, "\ufffd");

  /** Take the even neighbour of a number that lies exactly between two, as Python does. */
  const evened = (short, long, up) => {
    const tail = long.slice(short.length).replace(/e.*$/, "");
    if (!/^50*$/.test(tail)) return up;
    return Number(short[short.length - 1]) % 2 === 0 ? short : up;
  };

  /** Write a number with so many decimals, halves to even. @param {number} value @param {number} decimals */
  const fixed = (value, decimals) => {
    const sign = value < 0 ? "-" : "";
    const size = Math.abs(value);
    const long = size.toFixed(Math.min(100, decimals + 40));
    const cut = decimals ? long.slice(0, long.indexOf(".") + 1 + decimals) : long.slice(0, long.indexOf("."));
    const rest = decimals ? long : long.replace(".", "");
    return sign + evened(cut, rest, size.toFixed(decimals));
  };

  /** Write a number with so many significant digits, as Python's ``g``. @param {number} value @param {number} digits */
  const general = (value, digits = 4) => {
    if (!Number.isFinite(value)) return Number.isNaN(value) ? "nan" : value < 0 ? "-inf" : "inf";
    if (value === 0) return "0";
    const size = Math.abs(value);
    const [long, power] = size.toExponential(digits + 39).split("e");
    let [head, shift] = size.toExponential(digits - 1).split("e");
    const cut = digits > 1 ? long.slice(0, digits + 1) : long.slice(0, 1);
    if (power === shift) head = evened(cut, digits > 1 ? long : long.replace(".", ""), head);
    const at = Number(shift);
    const sign = value < 0 ? "-" : "";
    const bare = (text) => (text.includes(".") ? text.replace(/\.?0+$/, "") : text);
    if (at >= -4 && at < digits) return sign + bare(Number(`${head}e${at}`).toFixed(digits - 1 - at));
    return `${sign}${bare(head)}e${at < 0 ? "-" : "+"}${String(Math.abs(at)).padStart(2, "0")}`;
  };

  const minus = (text) => text.replaceAll("-", MINUS);
  const grouped = (text) => text.replace(/\B(?=(\d{3})+(?!\d))/g, ",");
  const known = (value) => value !== null && value !== undefined && Number.isFinite(value);

  /** Numbers as text: the same digits as the tables that Python writes. */
  MP.text = {
    MIB, MINUS, safe, fixed, general, known,
    /** A whole number with commas. */
    grouped: (count) => grouped(String(count)),
    /** A sum and the most that its standard error can be. @param {number|null} value @param {number|null} spread */
    atMost: (value, spread) => `${MP.text.plain(value)}${known(value) && known(spread) ? `, at most ± ${general(spread, 2)}` : ""}`,
    /** A number of no doubt. @param {number|null} value */
    plain: (value) => (known(value) ? minus(general(value)) : "unknown"),
    /** A number and its standard error: two digits of the error, the number just as far. */
    withSpread: (value, spread) => {
      if (!known(value)) return "unknown";
      if (!known(spread) || spread <= 0) return minus(general(value));
      let decimals = 1 - Math.floor(Math.log10(spread));
      if (decimals > 7) {
        const [head, power] = spread.toExponential(1).split("e");
        return minus(`${general(value)} ± ${head}e-${String(Math.abs(power)).padStart(2, "0")}`);
      }
      decimals = Math.max(decimals, 0);
      return minus(`${fixed(value, decimals)} ± ${fixed(spread, decimals)}`);
    },
    /** Bytes in MiB. @param {number|null} count */
    size: (count) => {
      if (!known(count)) return "unknown";
      if (Math.abs(count) < MIB) return minus(`${general(count / MIB)} MiB`);
      const [whole, rest] = fixed(count / MIB, 3).split(".");
      return minus(`${grouped(whole)}.${rest} MiB`);
    },
    /** Exact bytes. @param {number|null} count */
    bytes: (count) => (known(count) ? minus(`${grouped(String(Math.trunc(count)))} bytes`) : "unknown"),
    /** A difference, with its sign. */
    signed: (value) => (known(value) ? `${value > 0 ? "+" : ""}${minus(general(value))}` : "unknown"),
    /** Bits per weight. */
    bits: (value) => (known(value) ? fixed(value, 3) : "unknown"),
    /** A cost in the unit that people read. @param {number|null} value @param {string} unit of the table */
    cost: (value, unit) => {
      if (!known(value)) return "unknown";
      if (unit === "bytes") return MP.text.size(value);
      if (unit === "s") return `${minus(general(value * 1e3))} ms`;
      return `${minus(general(value))} ${safe(unit)}`;
    },
    /** "1 layer", "2 layers". */
    count: (many, noun) => `${grouped(String(many))} ${noun}${many === 1 ? "" : "s"}`,
  };

  const fill = (made, attributes, children) => {
    for (const [name, value] of Object.entries(attributes || {})) {
      if (value === null || value === undefined || value === false) continue;
      if (typeof value === "function") made.addEventListener(name.replace(/^on/, ""), value);
      else made.setAttribute(name, value === true ? "" : safe(value));
    }
    for (const child of children.flat(Infinity)) {
      if (child === null || child === undefined || child === false) continue;
      made.append(child instanceof Node ? child : document.createTextNode(safe(child)));
    }
    return made;
  };

  /**
   * Make an element. Children are nodes, texts or lists of them; a function is a listener (``onclick``).
   * @param {string} tag @param {Object|null} attributes @param {...unknown} children
   */
  MP.el = (tag, attributes, ...children) => fill(document.createElement(tag), attributes, children);

  /** Make an element of a drawing. */
  MP.svg = (tag, attributes, ...children) =>
    fill(document.createElementNS("http://www.w3.org/2000/svg", tag), attributes, children);

  /** Replace what an element holds. */
  MP.fill = (element, ...children) => {
    element.replaceChildren();
    return fill(element, null, children);
  };

  /** Sum with one correction term; null unless it is certain that the exact sum is rounded to the same number. */
  const quick = (values) => {
    let [sum, lost, all] = [0, 0, 0];
    for (let i = 0; i < values.length; i += 1) {
      const x = values[i];
      const next = sum + x;
      lost += Math.abs(sum) >= Math.abs(x) ? sum - next + x : x - next + sum;
      sum = next;
      all += Math.abs(x);
    }
    const doubt = values.length ** 2 * 2 ** -102 * all;
    const [low, high] = [sum + (lost - doubt), sum + (lost + doubt)];
    return low === high ? low : null;
  };

  /** Exact sum of numbers, rounded once, as Python's ``math.fsum``; null where one is unknown. */
  MP.sum = (values) => {
    for (let i = 0; i < values.length; i += 1) if (!known(values[i])) return null;
    return quick(values) ?? exact(values);
  };

  const exact = (values) => {
    const parts = [];
    for (let x of values) {
      let kept = 0;
      for (let y of parts) {
        if (Math.abs(x) < Math.abs(y)) [x, y] = [y, x];
        const high = x + y;
        const low = y - (high - x);
        if (low) parts[kept++] = low;
        x = high;
      }
      parts.length = kept;
      parts.push(x);
    }
    let n = parts.length;
    if (!n) return 0;
    let high = parts[--n];
    let low = 0;
    while (n > 0) {
      const x = high;
      const y = parts[--n];
      high = x + y;
      low = y - (high - x);
      if (low) break;
    }
    if (n > 0 && ((low < 0 && parts[n - 1] < 0) || (low > 0 && parts[n - 1] > 0))) {
      const twice = low * 2;
      const x = high + twice;
      if (twice === x - high) high = x;
    }
    return high;
  };

  /** Bits that have a colour of their own in the style sheet. */
  const STEPS = [2, 3, 4, 5, 6, 7, 8, 16, 32];
  /** Class of the colour of so many bits. @param {number} bits */
  MP.shade = (bits) => `b${STEPS.filter((step) => step <= bits).at(-1) ?? 2}`;

  /** What plans are to their study: [group, words, class and mark]; drawn in this order. */
  MP.groups = [
    ["random", "random", "circle"],
    ["searched", "found by a search", "ring"],
    ["imported", "imported", "square"],
    ["uniform", "uniform", "diamond"],
    ["mixed", "mixed, solved for", "circle"],
    ["chosen", "chosen plan", "star"],
  ];

  /** Value of a style variable. @param {string} name such as ``--text`` */
  MP.tone = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

  /** Call when colours change with light and dark mode. @param {() => void} redraw */
  MP.onTone = (redraw) => matchMedia("(prefers-color-scheme: dark)").addEventListener("change", redraw);
})();
