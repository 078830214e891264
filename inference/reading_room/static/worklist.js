// The worklist: what is asked for (search, filter, order, page) and the states it can be in. `worklist_rows.js` draws it.

import { announce, at, h } from "./dom.js";
import { labelWords, number, percent, t, tOr } from "./i18n.js";
import { ask } from "./api.js";
import { drawRows } from "./worklist_rows.js";

const PAGE = 25;
const TYPING_MS = 250;
const REFRESH_MS = 20000;
const SEEN_MS = 120000;
const NOTHING = { text: "", verdict: [], status: null, finding: [], arrived_from: null, arrived_to: null };

let query = { ...NOTHING, sort: "arrival", descending: true, offset: 0, limit: PAGE };
let list = null;
let threshold = 0.5;
let asked = 0;
let timer = 0;
let active = performance.now();

/** What the worklist is filtered and ordered by, for going to the next case. */
export const currentQuery = () => query;

/** The choices that depend on the model: its readers' labels, and what it calls all but normal. */
function prepareFilters({ labels, positive }) {
  if (positive === "finding") at("filter-verdict").options[0].after(h("option", { value: "finding", "data-t": "verdict.finding", text: t("verdict.finding") }));
  const all = at("filter-finding").options[0];
  const drawFindings = () => {
    const before = at("filter-finding").value;
    at("filter-finding").replaceChildren(all, ...labels.map((label) => h("option", { value: label, text: labelWords(label) })));
    at("filter-finding").value = before;
  };
  drawFindings();
  addEventListener("language", drawFindings);
}

/** Wires search, filters, order and pages. */
export function prepareWorklist(room) {
  threshold = room.model.threshold;
  prepareFilters(room.model);
  at("filters").addEventListener("submit", (event) => event.preventDefault());
  at("search").addEventListener("input", () => {
    clearTimeout(timer);
    timer = setTimeout(() => change({ text: at("search").value.trim() }), TYPING_MS);
  });
  at("filter-verdict").addEventListener("change", () => change({ verdict: chosen("filter-verdict") }));
  at("filter-status").addEventListener("change", () => change({ status: at("filter-status").value || null }));
  at("filter-finding").addEventListener("change", () => change({ finding: chosen("filter-finding") }));
  at("filter-from").addEventListener("change", () => change({ arrived_from: at("filter-from").value || null }));
  at("filter-to").addEventListener("change", () => change({ arrived_to: at("filter-to").value || null }));
  at("filter-clear").addEventListener("click", clearFilters);
  at("empty-clear").addEventListener("click", clearFilters);
  for (const sort of ["arrival", "probability"]) at(`sort-${sort}`).addEventListener("click", () => turnOrder(sort));
  at("page-before").addEventListener("click", () => change({ offset: Math.max(0, query.offset - PAGE) }));
  at("page-after").addEventListener("click", () => change({ offset: query.offset + PAGE }));
  at("list-again").addEventListener("click", () => loadWorklist());
  addEventListener("language", draw);
  for (const kind of ["pointermove", "keydown"]) addEventListener(kind, () => { active = performance.now(); }, { passive: true });
  setInterval(refresh, REFRESH_MS);
}

/** Asks for the page of the worklist that is wanted now, and draws it. */
export async function loadWorklist() {
  const mine = ++asked;
  if (!list) showState("loading");
  try {
    const answer = await ask("/api/worklist", { body: query });
    if (mine !== asked) return;
    if (!answer.cases.length && query.offset) return change({ offset: 0 });
    list = answer;
    draw();
  } catch (problem) {
    if (mine !== asked) return;
    at("list-problem").textContent = tOr(`error.${problem.code}`, t("error.internal"));
    if (!list) showState("failed");
  }
}

/** Moves the focus by `step` rows, from outside into the list. */
export function moveFocus(step) {
  const links = [...at("rows").querySelectorAll("a.open")];
  const here = links.findIndex((link) => link.closest("tr").contains(document.activeElement));
  links[here < 0 ? 0 : Math.min(links.length - 1, Math.max(0, here + step))]?.focus();
}

/** Others add cases too; but a page that nobody looks at must let its session end. */
function refresh() {
  if (!at("worklist").hidden && !at("room").hidden && !document.hidden && performance.now() - active < SEEN_MS) loadWorklist();
}

function change(part) {
  query = { ...query, offset: 0, ...part };
  return loadWorklist();
}

function chosen(id) {
  return at(id).value ? [at(id).value] : [];
}

function clearFilters() {
  for (const id of ["search", "filter-verdict", "filter-status", "filter-finding", "filter-from", "filter-to"]) at(id).value = "";
  change(NOTHING);
  at("search").focus();
}

function turnOrder(sort) {
  change({ sort, descending: query.sort === sort ? !query.descending : true });
}

function isFiltered() {
  return Boolean(query.text || query.verdict.length || query.status || query.finding.length || query.arrived_from || query.arrived_to);
}

function draw() {
  if (!list) return;
  drawRows(list.cases);
  showState(list.cases.length ? "rows" : isFiltered() ? "nothing" : "empty");
  at("filter-clear").hidden = !isFiltered();
  at("list-count").textContent = t("list.count", { total: number(list.total), open: number(list.open) });
  drawPaging();
  at("list-threshold").textContent = t("gauge.threshold", { value: percent(threshold) });
  for (const sort of ["arrival", "probability"]) {
    const order = query.sort === sort ? (query.descending ? "descending" : "ascending") : "none";
    at(`sort-${sort}`).closest("th").setAttribute("aria-sort", order);
  }
  if (isFiltered()) announce(at("list-count").textContent);
}

function drawPaging() {
  const last = Math.min(list.total, query.offset + list.cases.length);
  at("paging").hidden = list.total <= PAGE;
  at("page-words").textContent = t("list.page", { first: number(query.offset + 1), last: number(last), total: number(list.total) });
  at("page-before").disabled = query.offset === 0;
  at("page-after").disabled = last >= list.total;
}

function showState(state) {
  at("list").setAttribute("aria-busy", String(state === "loading"));
  for (const name of ["loading", "failed", "empty", "nothing", "rows"]) at(`list-${name}`).hidden = name !== state;
  at("worklist").dataset.state = state;
}
