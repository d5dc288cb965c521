"use strict";
(() => {
  const PAGE = 1000;

  const all = async () => {
    const rows = [];
    for (let offset = 0; offset !== null;) {
      const part = await MP.ask(MP.query("studies", { offset, limit: PAGE }));
      rows.push(...part.items);
      offset = part.next;
    }
    return rows;
  };

  const nothing = () =>
    MP.el("div", { class: "empty" },
      MP.el("h2", null, "No study yet"),
      MP.el("p", null, "This database holds no study. A first one takes a minute, without a download:"),
      MP.el("pre", { tabindex: 0 }, `mpsearch demo${MP.storage()}`),
      MP.el("p", null, "or, for a model of your own:"),
      MP.el("pre", { tabindex: 0 }, `mpsearch run study.toml${MP.storage()}`));

  const line = (row) =>
    MP.el("tr", null,
      MP.el("th", { scope: "row" }, MP.el("a", { href: MP.state.write({ ...MP.state.read("#"), study: row.name }) },
        MP.el("bdi", null, row.name))),
      MP.el("td", null, MP.el("span", { class: `state ${row.state}` }, MP.stateWords(row.state))),
      MP.el("td", null, when(row.created)), MP.el("td", null, when(row.updated)));

  const when = (text) => MP.el("time", { datetime: text }, text.replace("T", " ").slice(0, 16));

  /**
   * The list of studies, with a filter by words of their names and states.
   * @param {HTMLElement} element
   * @param {string} filter at first
   * @param {{filter: (text: string) => void}} on
   */
  MP.studies = async (element, filter, on) => {
    const rows = await all();
    if (!rows.length) {
      MP.fill(element, MP.el("h1", null, "mpsearch"), nothing());
      return;
    }
    const body = MP.el("tbody");
    const told = MP.el("p", { class: "muted", role: "status" });
    const box = MP.el("input", { id: "filter", type: "search", autocomplete: "off", value: filter, spellcheck: "false" });
    const show = () => {
      const words = box.value.toLowerCase().split(/\s+/).filter(Boolean);
      const found = rows.filter((row) => {
        const text = `${row.name} ${row.state} ${MP.stateWords(row.state)}`.toLowerCase();
        return words.every((word) => text.includes(word));
      });
      MP.fill(body, found.slice(0, PAGE).map(line));
      const more = found.length > PAGE ? `; the first ${PAGE} are shown, type more of the name` : "";
      told.textContent = `${found.length} of ${MP.text.grouped(rows.length)} ${rows.length === 1 ? "study" : "studies"}${more}`;
    };
    box.addEventListener("input", () => {
      show();
      on.filter(box.value);
    });
    MP.fill(element, MP.el("h1", null, "Studies"),
      MP.el("p", null, MP.el("label", { for: "filter" }, "Find a study by words of its name or state "), box), told,
      MP.el("div", { class: "scroll", tabindex: 0, role: "region", "aria-label": "Studies" },
        MP.el("table", { class: "studies" },
          MP.el("thead", null, MP.el("tr", null, ["study", "state", "created (UTC)", "changed (UTC)"].map((name) =>
            MP.el("th", { scope: "col" }, name)))), body)));
    show();
  };
})();
