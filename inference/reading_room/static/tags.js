// The technical attributes of the file, as a table. Names and numbers of people are not among them.

import { at, h } from "./dom.js";

/** Wires the dialog once; `shown()` is the case in front. */
export function prepareTags(shown) {
  at("tags-close").addEventListener("click", () => at("tags").close());
  at("open-tags").addEventListener("click", () => openTags(shown()));
}

/** Shows the attributes of `case_`, a CaseDetail. */
export function openTags(case_) {
  if (!case_) return;
  const rows = case_.image.facts.attributes;
  at("tags-rows").replaceChildren(...rows.map(({ tag, name, value }) =>
    h("tr", {}, h("td", { class: "tag-number", text: tag }), h("th", { scope: "row", text: name }), h("td", { text: value }))));
  at("tags-table").hidden = !rows.length;
  at("tags-none").hidden = Boolean(rows.length);
  at("tags").showModal();
}
