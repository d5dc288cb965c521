"use strict";
(() => {
  const ROWS = 50;

  /**
   * Find plans by what they lose and take: the smallest below a loss, the best below a size.
   * @param {HTMLElement} element
   * @param {Object} study
   * @param {{pick: (i: number, second: boolean) => void, hover: (i: number|null) => void}} on
   */
  MP.plans = (element, study, on) => {
    const { text } = MP;
    const { points, unit } = study.data;
    const titles = MP.titles(study);
    if (!study.count) {
      MP.fill(element, MP.el("p", { class: "muted" }, "No plan yet: they are made once every layer is scored."));
      return;
    }
    const box = (id, words) => {
      const input = MP.el("input", { id, type: "text", inputmode: "decimal", size: 8, autocomplete: "off", oninput: () => show() });
      return [input, MP.el("span", null, MP.el("label", { for: id }, `${words} `), input, " ")];
    };
    const [loss, lossBox] = box("find-loss", `loss at most, ${text.safe(unit)}`);
    const [size, sizeBox] = box("find-size", "size at most, MiB");
    const select = (id, words, items) => {
      const made = MP.el("select", { id, onchange: () => show() }, items.map(([value, name]) => MP.el("option", { value }, name)));
      return [made, MP.el("span", null, MP.el("label", { for: id }, `${words} `), made, " ")];
    };
    const [which, whichBox] = select("find-which", "loss", [["measured", "measured"], ["predicted", "predicted"]]);
    const [order, orderBox] = select("find-order", "order", [["size", "smallest first"], ["loss", "least loss first"]]);
    if (!points.loss.some((value) => value !== null)) which.value = "predicted";
    const told = MP.el("p", { class: "muted", role: "status" });
    const body = MP.el("tbody");
    const limit = (input) => {
      const words = input.value.trim().replace(",", ".");
      const value = Number(words);
      const wrong = words !== "" && !Number.isFinite(value);
      if (wrong) input.setAttribute("aria-invalid", "true");
      else input.removeAttribute("aria-invalid");
      return words === "" || wrong ? Infinity : value;
    };
    const line = (i) => MP.el("tr", { onmouseenter: () => on.hover(i), onmouseleave: () => on.hover(null) },
      MP.el("th", { scope: "row" }, MP.el("bdi", null, titles[i])),
      MP.el("td", { class: "number" }, text.size(study.size(i))), MP.el("td", { class: "number" }, text.bits(study.bits(i))),
      MP.el("td", { class: "number" }, points.loss[i] === null ? "not measured" : text.withSpread(points.loss[i], points.spread[i])),
      MP.el("td", { class: "number" }, text.atMost(points.predicted[i], points.doubt[i])),
      MP.el("td", null,
        MP.el("button", { type: "button", "aria-label": `A: ${titles[i]}`, onclick: () => on.pick(i, false) }, "A"), " ",
        MP.el("button", { type: "button", "aria-label": `B: ${titles[i]}`, onclick: () => on.pick(i, true) }, "B")));
    const show = () => {
      const losses = points[which.value === "measured" ? "loss" : "predicted"];
      const [most, large] = [limit(loss), limit(size) * text.MIB];
      const found = [];
      for (let i = 0; i < study.count; i += 1) {
        const [value, bytes] = [losses[i], study.size(i)];
        if ((value === null && most < Infinity) || (value ?? -Infinity) > most || (bytes ?? -Infinity) > large) continue;
        found.push(i);
      }
      const far = (value) => value ?? Infinity;
      found.sort(order.value === "size"
        ? (a, b) => far(study.size(a)) - far(study.size(b)) || far(losses[a]) - far(losses[b])
        : (a, b) => far(losses[a]) - far(losses[b]) || far(study.size(a)) - far(study.size(b)));
      MP.fill(body, found.slice(0, ROWS).map(line));
      told.textContent = `${found.length} of ${text.count(study.count, "plan")}${found.length > ROWS ? `; the first ${ROWS} are shown` : ""}`;
    };
    MP.fill(element, MP.el("p", { class: "row" }, lossBox, sizeBox, whichBox, orderBox), told,
      MP.el("div", { class: "scroll tall", tabindex: 0, role: "region", "aria-label": "Plans" }, MP.el("table", { class: "plans" },
        MP.el("thead", null, MP.el("tr", null, ["plan", "size", "bits", `measured, ${unit}`, `predicted, ${unit}`, "pin as"].map((name) =>
          MP.el("th", { scope: "col" }, name)))), body)));
    show();
  };
})();
