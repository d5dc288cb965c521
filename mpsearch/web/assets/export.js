"use strict";
(() => {
  /** Who loads what each exporter writes, for names that do not say it. */
  const TITLES = { gguf: "GGUF file for llama.cpp (gguf)", native: "mpsearch itself (native)", "compressed-tensors": "vLLM (compressed-tensors)" };
  /** Exporters that read weights: they run where the model is. */
  const HEAVY = ["native", "compressed-tensors", "gguf", "onnxruntime"];

  /** Let the browser save a text. */
  const save = (name, text) => {
    const address = URL.createObjectURL(new Blob([text], { type: "application/json" }));
    const link = MP.el("a", { href: address, download: name });
    document.body.append(link);
    link.click();
    link.remove();
    setTimeout(() => URL.revokeObjectURL(address), 1000);
  };

  const command = (parts, what, note) => {
    const text = `${parts.join(" ")}`;
    const told = MP.el("span", { class: "muted", role: "status" });
    const copy = MP.el("button", { type: "button", "aria-label": `Copy: ${what}`, onclick: async () => {
      try {
        await navigator.clipboard.writeText(text);
        told.textContent = " copied";
      } catch {
        told.textContent = " select the text to copy it";
      }
    } }, "Copy");
    return MP.el("div", { class: "command" }, MP.el("p", null, what, note ? MP.el("span", { class: "muted" }, ` ${note}`) : null),
      MP.el("pre", { tabindex: 0, "aria-label": what }, text), copy, told);
  };

  const files = async (element, plan, to) => {
    if (!plan.key) {
      MP.fill(element, MP.el("p", { class: "muted" }, "This plan is not stored; save it, and run the command."));
      return;
    }
    try {
      const made = await MP.ask(`plans/${plan.key}/export`, { to });
      MP.fill(element, made.notes.map((note) => MP.el("p", { class: "muted" }, note)),
        Object.entries(made.files).map(([name, text]) => MP.el("p", null,
          MP.el("button", { type: "button", onclick: () => save(name.split("/").at(-1), text) }, `Save ${name}`))));
    } catch (error) {
      MP.fill(element, MP.el("p", { class: "problem" }, MP.words(error)));
    }
  };

  /**
   * A dialog that says how to export a plan, and to measure it.
   * @param {string} study name of the study
   * @param {{label: string, chosen: boolean, key: string, body: () => Promise<Object>}} plan
   */
  MP.exporting = async (study, plan) => {
    const from = document.activeElement;
    const names = await MP.ask("names").catch(() => ({ exporters: [] }));
    const known = [...new Set([...HEAVY, ...names.exporters])].sort();
    const to = MP.el("select", { id: "export-to" }, known.map((name) =>
      MP.el("option", { value: name, selected: name === "llama.cpp" }, TITLES[name] ?? name)));
    const commands = MP.el("div");
    const written = MP.el("div");
    const dialog = MP.el("dialog", { "aria-labelledby": "export-title" });
    const show = () => {
      const place = MP.storage();
      const name = plan.chosen ? MP.quoted(study) : "plan.json";
      MP.fill(commands,
        command(["mpsearch export", name, "--to", to.value, `--out exported${plan.chosen ? place : ""}`], "Export it",
          plan.chosen ? "" : "where plan.json was saved; --model FOLDER says where the model is"),
        command(["mpsearch measure", MP.quoted(study), `--plan plan.json${place}`], "Measure this plan", "where plan.json was saved"));
      MP.fill(written);
      if (MP.mayWrite() && !HEAVY.includes(to.value)) {
        written.append(MP.el("button", { type: "button", onclick: () => files(written, plan, to.value) }, "Make its files here"));
      }
    };
    to.addEventListener("change", show);
    const keep = MP.el("button", { type: "button", onclick: async () => {
      try {
        save("plan.json", `${JSON.stringify(await plan.body(), null, 1)}\n`);
      } catch (error) {
        MP.fill(written, MP.el("p", { class: "problem" }, MP.words(error)));
      }
    } }, "Save plan.json");
    MP.fill(dialog, MP.el("h2", { id: "export-title" }, "Export ", MP.el("bdi", null, plan.label)),
      MP.el("p", null, MP.el("label", { for: "export-to" }, "for "), to, " ", keep), commands, written,
      MP.el("p", null, MP.el("button", { type: "button", onclick: () => dialog.close() }, "Close")));
    show();
    dialog.addEventListener("close", () => {
      dialog.remove();
      from?.focus?.();
    });
    document.body.append(dialog);
    dialog.showModal();
  };

  const KEYS = "mpsearch single keys";

  /** Whether single keys do something; who speaks to the page, or types by accident, can turn them off. */
  MP.singleKeys = (on = undefined) => {
    try {
      if (on !== undefined) localStorage.setItem(KEYS, on ? "on" : "off");
      return localStorage.getItem(KEYS) !== "off";
    } catch {
      // A browser that keeps nothing forgets the choice with the page.
      if (on !== undefined) document.documentElement.dataset.keys = on ? "on" : "off";
      return document.documentElement.dataset.keys !== "off";
    }
  };

  /** What the keys do. */
  MP.keyHelp = () => {
    const from = document.activeElement;
    const keys = [
      ["← →", "on the front: from plan to plan; on a map: from layer to layer"], ["Enter", "on the front: pin the plan as A; on a map: open the layer's card"],
      ["Shift + Enter or click", "on the front: pin as B and compare"], ["a, b", "pin the marked plan as A, as B"], ["c", "compare A with the best uniform plan of its size"],
      ["x", "compare no longer"], ["f", "go to the front"], ["m", "go to the map"], ["w", "go to the budgets"], ["p", "go to the pins"], ["u, r", "undo and redo a pin"],
      ["e", "export"], ["s", "list of studies"], ["+ − 0", "on the front: zoom in, out, show all"], ["?", "this list"], ["Escape", "close"],
    ];
    const dialog = MP.el("dialog", { "aria-labelledby": "keys-title" }, MP.el("h2", { id: "keys-title" }, "Keys"),
      MP.el("dl", { class: "help" }, keys.map(([key, words]) => [MP.el("dt", null, MP.el("kbd", null, key)), MP.el("dd", null, words)])),
      MP.el("p", null, MP.el("input", { type: "checkbox", id: "single-keys", checked: MP.singleKeys(), onchange: (event) => MP.singleKeys(event.target.checked) }),
        MP.el("label", { for: "single-keys" }, " Single keys work on this page")),
      MP.el("button", { type: "button", onclick: () => dialog.close() }, "Close"));
    dialog.addEventListener("close", () => {
      dialog.remove();
      from?.focus?.();
    });
    document.body.append(dialog);
    dialog.showModal();
  };
})();
