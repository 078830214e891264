// Every action has a key, listed by `?`. Single keys can be switched off (WCAG 2.1.4), for readers who dictate.

import { at, h, isTyping } from "./dom.js";
import { t } from "./i18n.js";

const KEPT = "pneumofed-keys";
const NAMES = { ArrowUp: "↑", ArrowDown: "↓", ArrowLeft: "←", ArrowRight: "→", Escape: "Esc", Enter: "↵", PageUp: "Page ↑", PageDown: "Page ↓" };
const HINT = /\s*[(（][^()（）]{1,3}[)）]$/; // the key that a tooltip tells
const shortcuts = [];

let scope = "worklist";

/** Says which page is in front: `worklist` or `viewer`. */
export function setScope(name) {
  scope = name;
}

/** Adds shortcuts: `scope` (a page, or `all`), `keys` as in KeyboardEvent.key (`Shift+` before an arrow), `words` a key of the
 *  translations, `act`, and, if they do not always hold, `when`. */
export function addKeys(...entries) {
  shortcuts.push(...entries);
}

/** Listens, from now on. */
export function prepareKeys() {
  addEventListener("keydown", onKey);
  at("keys-on").checked = areOn();
  at("keys-on").addEventListener("change", () => localStorage.setItem(KEPT, at("keys-on").checked ? "on" : "off"));
  at("help-close").addEventListener("click", () => at("help").close());
  addEventListener("language", () => at("help").open && drawHelp());
}

/** Shows all shortcuts. */
export function openHelp() {
  drawHelp();
  at("help").showModal();
}

const areOn = () => localStorage.getItem(KEPT) !== "off";

function onKey(event) {
  if (event.ctrlKey || event.metaKey || event.altKey || at("room").hidden || document.querySelector("dialog[open]")) return;
  if (event.key === "Escape" && isTyping(event.target)) {
    event.target.blur();
    return;
  }
  if (isTyping(event.target) || (event.key.startsWith("Arrow") && takesArrows(event.target))) return;
  const key = nameOf(event);
  if (/^[1-5]$/.test(key) && event.target.closest?.("#choices")) return; // whoever is choosing a label does not want a window
  const found = shortcuts.find((entry) => [scope, "all"].includes(entry.scope) && entry.keys.includes(key) && (entry.when?.() ?? true));
  if (!found || (key.length === 1 && key !== "?" && !areOn())) return;
  event.preventDefault();
  found.act(key);
}

/** Letters whatever their case, so that caps lock does no harm. */
function nameOf(event) {
  if (event.key.startsWith("Arrow")) return event.shiftKey ? `Shift+${event.key}` : event.key;
  return event.key.length === 1 ? event.key.toLowerCase() : event.key;
}

const takesArrows = (target) => target instanceof HTMLInputElement && ["radio", "range"].includes(target.type);

function drawHelp() {
  const groups = ["all", "worklist", "viewer"].map((name) => {
    const rows = shortcuts.filter((entry) => entry.scope === name).map((entry) =>
      h("div", {}, h("dt", {}, ...printed(entry.keys).map((text) => h("kbd", { text }))), h("dd", { text: t(entry.words).replace(HINT, "") })));
    return h("section", {}, h("h3", { text: t(`help.${name}`) }), h("dl", {}, ...rows));
  });
  at("help-keys").replaceChildren(...groups);
}

/** The keys of one action: two at most, or the first and last of a row. */
function printed(keys) {
  const names = keys.map(shown);
  return names.length > 4 ? [`${names[0]} – ${names.at(-1)}`] : names.slice(0, 2);
}

/** A key as it is printed on a keyboard. */
function shown(key) {
  const [name, modifier] = key.split("+").reverse();
  const plain = key.length === 1 ? key.toUpperCase() : NAMES[name] ?? name;
  return modifier ? `⇧ ${plain}` : plain;
}
