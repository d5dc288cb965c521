() => {
  // What is wrong with names, headings and contrast; by the rules that axe has for them.
  const found = [];
  const channel = (value) => (value <= 0.03928 ? value / 12.92 : ((value + 0.055) / 1.055) ** 2.4);
  const parse = (colour) => colour.match(/[\d.]+/g).map(Number);
  const light = ([r, g, b]) => 0.2126 * channel(r / 255) + 0.7152 * channel(g / 255) + 0.0722 * channel(b / 255);
  const ground = (element) => {
    for (let at = element; at; at = at.parentElement) {
      const colour = parse(getComputedStyle(at).backgroundColor);
      if (colour.length < 4 || colour[3] > 0) return colour;
    }
    return [255, 255, 255];
  };
  const seen = (element) => element.checkVisibility() && element.getClientRects().length > 0;
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const element = walker.currentNode.parentElement;
    if (!walker.currentNode.textContent.trim() || !seen(element) || element.closest("script, style, noscript, svg, :disabled")) continue;
    const [a, b] = [light(parse(getComputedStyle(element).color)), light(ground(element))];
    const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
    if (ratio < 4.5) found.push(`contrast ${ratio.toFixed(2)}: ${element.tagName} ${element.className} ${element.textContent.slice(0, 30)}`);
  }
  for (const text of document.querySelectorAll("svg text")) {
    if (!seen(text)) continue;
    const [a, b] = [light(parse(getComputedStyle(text).fill)), light(ground(text.closest("svg").parentElement))];
    const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
    if (ratio < 4.5) found.push(`contrast ${ratio.toFixed(2)}: drawn ${text.textContent}`);
  }
  const named = (element) => element.getAttribute("aria-label") || element.getAttribute("title") || element.closest("label")?.textContent.trim() || element.textContent.trim();
  for (const element of document.querySelectorAll("button, select, input, a[href], summary, [tabindex], [role=img], [role=grid]"))
    if (seen(element) && element.tagName !== "TD" && !named(element)) found.push(`no name: ${element.outerHTML.slice(0, 80)}`);
  for (const select of document.querySelectorAll("select, input"))
    if (!select.closest("label") && !select.getAttribute("aria-label")) found.push(`no label: ${select.outerHTML.slice(0, 80)}`);
  let above = 0;
  for (const heading of document.querySelectorAll("h1, h2, h3, h4")) {
    if (!seen(heading)) continue;
    const level = Number(heading.tagName[1]);
    if (level > above + 1) found.push(`heading ${heading.tagName} after h${above}: ${heading.textContent}`);
    above = level;
  }
  if (document.querySelectorAll("h1").length !== 1) found.push("not one h1");
  if (document.querySelectorAll("main").length !== 1) found.push("not one main");
  if (!document.documentElement.lang) found.push("no lang");
  if (!document.title) found.push("no title");
  const ids = [...document.querySelectorAll("[id]")].map((element) => element.id);
  if (new Set(ids).size !== ids.length) found.push("an id twice");
  for (const table of document.querySelectorAll("table")) {
    if (!seen(table)) continue;
    for (const head of table.querySelectorAll("th")) if (!head.scope) found.push(`th without scope: ${head.textContent}`);
  }
  for (const element of document.querySelectorAll("[aria-hidden=true]"))
    if (element.matches("[tabindex], button, select, a") || element.querySelector("[tabindex], button, select, a")) found.push("hidden, yet reached by keys");
  return found;
}
