"use strict";
(() => {
  /**
   * What a link to a view holds; it stands in the fragment, which is never sent anywhere.
   * @typedef {Object} State
   * @property {string} study name; empty for the list of studies
   * @property {string} a label of the plan A; ``solved`` for the one of the sliders
   * @property {string} b label of the plan B
   * @property {string} layer name of the layer whose card is open
   * @property {string} mode of the map
   * @property {string} x resource of the front
   * @property {string} y ``measured`` or ``predicted``
   * @property {string} log ``0`` for a linear axis of losses
   * @property {string} filter of the list of studies
   * @property {string} view which of the lower figures is open
   * @property {string[]} budget texts of the budgets of the sliders
   * @property {[string, string][]} pin pattern and format
   * @property {[string, string][]} bar pattern and format
   */
  const TEXTS = ["study", "a", "b", "layer", "mode", "x", "y", "log", "filter", "view"];
  const PAIRS = ["pin", "bar"];
  const MOST = 2000;

  const pair = (text) => {
    const at = text.lastIndexOf("=");
    return [text.slice(0, at), text.slice(at + 1)];
  };

  /** Read a state off a fragment; what it does not know is left out. @returns {State} */
  const read = (hash = location.hash) => {
    const given = new URLSearchParams(hash.replace(/^#/, ""));
    const state = { budget: given.getAll("budget").slice(0, 20) };
    for (const name of TEXTS) state[name] = given.get(name) ?? "";
    for (const name of PAIRS) {
      state[name] = given.getAll(name).slice(0, MOST).map(pair).filter(([pattern, format]) => pattern && format);
    }
    return state;
  };

  /** Write a state as a fragment: the same state gives the same text. @param {State} state */
  const write = (state) => {
    const made = new URLSearchParams();
    for (const name of TEXTS) if (state[name]) made.set(name, state[name]);
    for (const text of state.budget) made.append("budget", text);
    for (const name of PAIRS) for (const [pattern, format] of state[name]) made.append(name, `${pattern}=${format}`);
    return `#${made}`;
  };

  MP.state = {
    read, write,
    /** Put a state into the address; ``step`` makes a new place in the history. */
    keep: (state, step = false) => {
      const fragment = write(state);
      if (fragment === location.hash) return;
      history[step ? "pushState" : "replaceState"](null, "", fragment === "#" ? location.pathname : fragment);
    },
  };

  /** An error that the server has told. */
  class Refused extends Error {
    constructor(block, status) {
      super(block.message);
      Object.assign(this, block, { status });
    }
  }
  MP.Refused = Refused;

  /** Words of an error, with what to do. */
  MP.words = (error) => {
    if (!(error instanceof Refused || error?.code)) return "The server does not answer. Is it still running?";
    return [error.code ? `${error.code}: ${error.message}` : error.message, error.because, error.advice && `Try: ${error.advice}`]
      .filter(Boolean).join(". ");
  };

  /**
   * Ask the server.
   * @param {string} path behind ``/api/v1/``
   * @param {Object} [body] makes it a POST
   * @returns {Promise<any>} values, or an ArrayBuffer
   */
  MP.ask = async (path, body, signal) => {
    const sent = body === undefined
      ? { signal }
      : { signal, method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(body) };
    const answer = await fetch(`/api/v1/${path}`, sent);
    const values = answer.headers.get("content-type")?.startsWith("application/json");
    if (answer.ok) return values ? answer.json() : answer.arrayBuffer();
    throw new Refused(values ? (await answer.json()).error : { message: `status ${answer.status}` }, answer.status);
  };

  /** A query of names and values. */
  MP.query = (path, values) => `${path}?${new URLSearchParams(values)}`;

  /** Write a word for a shell. */
  MP.quoted = (text) => (/^[A-Za-z0-9_@%+=:,./-]+$/.test(text) ? text : `'${text.replaceAll("'", `'"'"'`)}'`);

  /** The option that names the database, for a command to copy. */
  MP.storage = () => {
    const place = document.documentElement.dataset.place || "";
    return !place || place === "sqlite:///mpsearch.db" ? "" : ` --storage ${MP.quoted(place)}`;
  };
  MP.mayWrite = () => document.documentElement.dataset.rights === "full";

  /** Say something to those who listen rather than look, and show it for a while. */
  MP.say = (text) => {
    const box = document.getElementById("said");
    if (!box) return;
    box.textContent = MP.text.safe(text);
    clearTimeout(box.dataset.timer);
    box.dataset.timer = setTimeout(() => { box.textContent = ""; }, 8000);
  };
})();
