// The clinical values of the case: typed or changed by the reader, checked by the server, and what the answer rests on. What is typed is
// kept, case by case, until it is sent or the page is left.

import { announce, at, h } from "./dom.js";
import { number, percent, t, tOf, tOr } from "./i18n.js";
import { ask } from "./api.js";

const NONE = ";";
const drafts = new Map();

let columns = [];
let digest = "";
let case_ = null;
let changed = async () => {};
let sending = false;
let loading = new AbortController();

/** Wires the form once, for a model that takes `model.clinical`; `reload` shows the case anew. */
export function prepareClinical(model, reload) {
  [columns, digest, changed] = [model.clinical, model.digest, reload];
  at("clinical").addEventListener("submit", (event) => {
    event.preventDefault();
    send();
  });
  at("evidence").addEventListener("toggle", showEvidence);
}

/** Shows the values of `shown`, a CaseDetail; null forgets them. */
export function drawClinical(shown) {
  loading.abort();
  case_ = shown;
  at("clinical-section").hidden = !shown || !(columns.length || shown.clinical);
  if (at("clinical-section").hidden) return;
  const own = shown.model_digest === digest && columns.length > 0;
  at("clinical-problem").textContent = "";
  at("clinical-answer").replaceChildren(...answerOf(shown));
  at("clinical").hidden = !own;
  at("clinical-fixed").hidden = own;
  at("clinical-fields").replaceChildren(...columns.map(fieldOf));
  showEvidence();
}

/** A column as people read it; one that has no words here as the model names it. */
export const columnWords = (name) => tOr(`clinical.column.${name}`, name.charAt(0).toUpperCase() + name.slice(1).replaceAll("_", " "));

/** What the server says of values that it refuses, in the language of the page. */
export function valueProblem({ code, column }) {
  const found = columns.find((one) => one.name === column);
  const values = found ? { column: columnWords(column), low: number(found.low, 2), high: number(found.high, 2), unit: found.unit ?? "" } : {};
  return t(`error.${code}`, { ...values, codes: found?.codes.map(codeWords).join(", ") ?? "" }).trim();
}

const codeWords = (code) => tOr(`clinical.code.${code.toLowerCase()}`, code);

function answerOf(shown) {
  const { clinical } = shown;
  if (shown.verdict === "cannot judge") return [];
  if (!clinical?.values.length) return [h("span", { class: "soft", text: t("clinical.none_known") })];
  const values = { both: percent(shown.probability), image: percent(clinical.image_only) };
  return [h("span", { text: tOf(shown, "clinical.answer", values) })];
}

function known(name) {
  return case_.clinical?.values.find((one) => one.name === name);
}

function fieldOf(column) {
  const id = `clinical-${column.name}`;
  const unit = column.unit ? h("span", { class: "soft", text: column.unit }) : null;
  const head = column.kind === "codes" ? h("span", { id: `${id}-name`, text: columnWords(column.name) }) : h("label", { for: id, text: columnWords(column.name) });
  const field = { number: numberField, binary: choiceField, codes: codesField }[column.kind](column, id);
  return h("div", { class: "clinical-field", "data-column": column.name }, head, h("span", { class: "clinical-value" }, field, unit),
    h("small", { class: "soft", id: `${id}-source`, text: sourceOf(column) }));
}

function sourceOf(column) {
  const found = known(column.name);
  const range = column.kind === "number" ? t("clinical.range", { low: number(column.low, 2), high: number(column.high, 2) }) : "";
  const source = found ? t(`clinical.source.${found.source}`, { user: case_.clinical.given_by }) : t("clinical.unknown");
  return [source, range].filter(Boolean).join(" · ");
}

function draftOf(column) {
  const draft = drafts.get(case_.id) ?? {};
  return column.name in draft ? draft[column.name] : known(column.name)?.value ?? null;
}

const keep = (name, value) => drafts.set(case_.id, { ...drafts.get(case_.id), [name]: value });

function numberField(column, id) {
  const value = draftOf(column);
  return h("input", { id, type: "text", inputmode: "decimal", maxlength: "12", "aria-describedby": `${id}-source`, value: value === null ? "" : String(value),
    oninput: (event) => keep(column.name, event.target.value.trim()) });
}

function choiceField(column, id) {
  const now = draftOf(column);
  const option = (value, words) => h("option", { value: String(value), text: t(words), selected: value === now });
  return h("select", { id, "aria-describedby": `${id}-source`, onchange: ({ target }) => keep(column.name, { true: true, false: false }[target.value] ?? null) },
    option(null, "clinical.unknown"), option(true, "clinical.yes"), option(false, "clinical.no"));
}

/** A box for each code, and one that says that there is none of them: without any nothing is known. */
function codesField(column, id) {
  const now = draftOf(column);
  const chosen = now === NONE ? [] : now;
  const boxes = column.codes.map((code) => box(codeWords(code), chosen?.includes(code) ?? false, (on) => {
    const others = (chosen ?? []).filter((one) => one !== code);
    change(column, on ? [...others, code] : others.length ? others : null);
  }));
  const none = box(t("clinical.no_code"), chosen?.length === 0, (on) => change(column, on ? NONE : null));
  return h("span", { class: "clinical-codes", role: "group", "aria-labelledby": `${id}-name`, "aria-describedby": `${id}-source` }, ...boxes, none);
}

function box(words, checked, act) {
  return h("label", { class: "check" }, h("input", { type: "checkbox", checked, onchange: (event) => act(event.target.checked) }), h("span", { text: words }));
}

function change(column, value) {
  keep(column.name, value);
  const field = at("clinical-fields").querySelector(`[data-column="${column.name}"]`);
  const place = [...field.querySelectorAll("input")].indexOf(document.activeElement);
  field.replaceWith(fieldOf(column));
  at("clinical-fields").querySelectorAll(`[data-column="${column.name}"] input`)[place]?.focus();
}

async function send() {
  if (sending) return;
  const of = case_;
  const values = Object.fromEntries(columns.map((column) => [column.name, sentForm(draftOf(column))]));
  busy(true);
  try {
    await ask(`/api/cases/${of.id}/clinical`, { body: { values } });
    drafts.delete(of.id);
    if (case_?.id === of.id) await changed();
    announce(t("clinical.judged"));
  } catch (problem) {
    if (case_?.id === of.id) say(problem);
  } finally {
    busy(false);
  }
}

/** No list of codes is sent empty: that would be "not known". */
const sentForm = (value) => (Array.isArray(value) && !value.length ? NONE : value);

function say(problem) {
  at("clinical-problem").textContent = problem.column ? valueProblem(problem) : tOr(`error.${problem.code}`, t("error.internal"));
  at(`clinical-${problem.column}`)?.focus();
}

function busy(on) {
  sending = on;
  at("clinical-judge").disabled = on;
  at("clinical-judge").textContent = t(on ? "clinical.judging" : "clinical.judge");
}

/** Asks what the answer rests on, where the part is open and there is anything to ask. */
async function showEvidence() {
  loading.abort();
  loading = new AbortController();
  const { signal } = loading;
  const of = case_;
  const there = Boolean(of?.clinical?.values.length) && of.verdict !== "cannot judge";
  at("evidence").hidden = !there;
  at("evidence-rows").replaceChildren();
  if (!there || !at("evidence").open) return;
  at("evidence-words").textContent = t("clinical.computing");
  try {
    const found = await ask(`/api/cases/${of.id}/evidence`, { signal });
    if (!signal.aborted) drawEvidence(found);
  } catch (problem) {
    if (problem.name !== "AbortError" && !signal.aborted) at("evidence-words").textContent = tOr(`error.${problem.code}`, t("error.internal"));
  }
}

function drawEvidence(found) {
  const parts = [[t("clinical.image"), found.image], ...Object.entries(found.values).map(([name, value]) => [shownValue(name), value])];
  const widest = Math.max(...parts.map(([, value]) => Math.abs(value)), 1e-9);
  parts.sort(([, one], [, other]) => Math.abs(other) - Math.abs(one));
  at("evidence-rows").replaceChildren(...parts.map(([words, value]) => {
    const fill = h("i", { class: `evidence-fill ${value < 0 ? "against" : "for"}` });
    fill.style.width = `${(50 * Math.abs(value)) / widest}%`;
    return h("li", {}, h("span", { text: words }), h("span", { class: "evidence-bar", "aria-hidden": "true" }, fill), h("span", { class: "class-number", text: signed(value) }));
  }));
  at("evidence-words").textContent = tOf(case_, "clinical.rests_words");
}

function shownValue(name) {
  const [found, column] = [known(name), columns.find((one) => one.name === name)];
  const { value } = found ?? {};
  if (Array.isArray(value)) return `${columnWords(name)}: ${value.map(codeWords).join(", ") || t("clinical.no_code")}`;
  if (typeof value === "boolean") return `${columnWords(name)}: ${t(value ? "clinical.yes" : "clinical.no")}`;
  return [columnWords(name), value === undefined ? "" : number(value, 2), column?.unit ?? ""].filter(Boolean).join(" ");
}

const signed = (value) => (Math.abs(value) < 0.005 ? "0.00" : `${value > 0 ? "+" : "−"}${Math.abs(value).toFixed(2)}`);
