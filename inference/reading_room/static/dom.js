// Elements without markup: text is always set as text, since numbers, notes and file names come from outside.

const SVG = "http://www.w3.org/2000/svg";

/** The element with this id. */
export const at = (id) => document.getElementById(id);

/** A new element. Options: `text`, `on*` handlers, booleans as bare attributes, everything else as attributes; null leaves out. */
export function h(tag, options = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(options)) setOption(element, name, value);
  element.append(...children.filter((child) => child !== null && child !== undefined));
  return element;
}

function setOption(element, name, value) {
  if (value === null || value === undefined) return;
  if (name === "text") element.textContent = value;
  else if (typeof value === "function") element.addEventListener(name.slice(2), value);
  else if (typeof value === "boolean") element.toggleAttribute(name, value);
  else element.setAttribute(name, value);
}

/** A drawing out of the page's own set; it says nothing to a screen reader. */
export function icon(name) {
  const svg = document.createElementNS(SVG, "svg");
  const use = document.createElementNS(SVG, "use");
  use.setAttribute("href", `#i-${name}`);
  svg.setAttribute("class", "icon");
  svg.setAttribute("aria-hidden", "true");
  svg.append(use);
  return svg;
}

/** Text for a screen reader alone. */
export const unseen = (text) => h("span", { class: "unseen", text });

/** Tells a screen reader what happened elsewhere on the page. */
export function announce(text) {
  at("live").textContent = "";
  requestAnimationFrame(() => {
    at("live").textContent = text;
  });
}

let toastTimer = 0;

/** A short word at the foot of the page, also for a screen reader. */
export function toast(text) {
  announce(text);
  const box = at("toast");
  box.textContent = text;
  box.hidden = false;
  clearTimeout(toastTimer);
  toastTimer = setTimeout(() => {
    box.hidden = true;
  }, 4000);
}

/** Whether what has the focus takes typed characters. */
export function isTyping(target) {
  const kinds = ["checkbox", "radio", "range", "button", "file", "submit"];
  return target instanceof HTMLTextAreaElement || target instanceof HTMLSelectElement
    || (target instanceof HTMLInputElement && !kinds.includes(target.type));
}
