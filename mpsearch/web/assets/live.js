"use strict";
(() => {
  const OVER = ["complete", "gaps", "failed", "cancelled"];
  const WORDS = {
    new: "not started", submitted: "waiting for a worker", running: "running", complete: "complete",
    gaps: "complete, with gaps", failed: "failed", paused: "paused", cancelled: "cancelled",
    interrupted: "interrupted: nobody drives it",
  };
  const PHASES = { survey: "looking at the model", score: "scored", measure: "measured", search: "searched" };
  const EVERY = 2000;
  /** Milliseconds between two looks at what came within a phase. */
  const MORE = 5000;

  /** A state in words. @param {string} state */
  MP.stateWords = (state) => WORDS[state] ?? state;

  /** Where a study stands, in one sentence. @param {Object} status of the interface */
  MP.statusWords = (status) => {
    const parts = [MP.stateWords(status.state)];
    if (status.total > 0 && !OVER.includes(status.state)) {
      const share = Math.floor((100 * status.done) / status.total);
      parts.push(`${share} % ${PHASES[status.phase] ?? status.phase} (${status.done} of ${status.total})`);
    } else if (status.phase && status.state === "running") parts.push(PHASES[status.phase] ?? status.phase);
    if (status.reason) parts.push(status.reason);
    return parts.join(" · ");
  };

  /** Share of the phase that is done, as a bar. */
  const drawn = (element, status, how) => {
    const bar = status.total > 0 && !OVER.includes(status.state)
      ? MP.el("progress", { max: status.total, value: status.done, "aria-label": "progress of the study" })
      : null;
    MP.fill(element,
      MP.el("span", { class: `state ${WORDS[status.state] ? status.state : ""}` }, MP.statusWords(status)), bar,
      how === "polling" ? MP.el("span", { class: "muted" }, " asked every 2 s") : null);
  };

  /**
   * Follow a study: by server-sent events, or by asking again where these do not come through.
   * @param {HTMLElement} element shows where it stands
   * @param {string} name of the study
   * @param {(state: string) => void} changed called when its state or phase changes, and now and then as more is done
   * @returns {{end: () => void}}
   */
  MP.live = (element, name, changed) => {
    let source = null;
    let timer = 0;
    let ended = false;
    let [before, done, late] = ["", null, 0];
    const take = (status, how) => {
      if (ended) return;
      drawn(element, status, how);
      const now = `${status.state} ${status.phase}`;
      if (before && now !== before) changed(status.state);
      else if (before && status.done !== done) late ||= setTimeout(() => { late = 0; changed(status.state); }, MORE);
      [before, done] = [now, status.done];
    };
    const poll = async () => {
      if (ended) return;
      try {
        const { status } = await MP.ask(MP.query("study", { study: name }));
        take(status, "polling");
        if (OVER.includes(status.state)) return;
      } catch (error) {
        MP.fill(element, MP.el("span", { class: "state failed" }, MP.words(error)));
        if (error.status === 401) return;
      }
      timer = setTimeout(poll, EVERY);
    };
    const stop = () => {
      source?.close();
      source = null;
    };
    try {
      source = new EventSource(MP.query("/api/v1/events", { study: name }));
      source.addEventListener("status", (event) => take(JSON.parse(event.data), "stream"));
      source.addEventListener("end", stop);
      source.onerror = () => {
        // A refused stream tells no reason; the answer to a plain question does.
        stop();
        if (!ended) timer = setTimeout(poll, 100);
      };
    } catch {
      poll();
    }
    return {
      end: () => {
        ended = true;
        clearTimeout(timer);
        clearTimeout(late);
        stop();
      },
    };
  };
})();
