// The reader's finding: agree with the model, or say what it is, with a note. What is typed is kept, case by case, until it is saved or
// the page is left; it is never written into the browser's storage.

import { at, h, icon, toast } from "./dom.js";
import { labelWords, moment, t, tOr, verdictWords } from "./i18n.js";
import { ask } from "./api.js";
import { agreement } from "./worklist_rows.js";

let labels = [];
/** The keys of labels: the last is that of "unsure", and of many classes only the first have one. The digits before them choose windows, so
 * that no digit means two things. */
export const LABEL_KEYS = ["6", "7", "8", "9", "0"];
const drafts = new Map();

let case_ = null;
let saved = async () => {};
let saving = false;

/** Wires the form once: `allowed` are the labels that the room takes; `next` goes to the next case that nobody has read. */
export function prepareDecision(allowed, next) {
  labels = allowed;
  drawLabels();
  addEventListener("language", drawLabels);
  at("agree").addEventListener("click", agree);
  at("correct").addEventListener("click", () => openCorrection());
  at("note").addEventListener("input", () => keep({ note: at("note").value }));
  at("decision").addEventListener("keydown", (event) => event.key === "Enter" && (event.ctrlKey || event.metaKey) && send());
  at("decision").addEventListener("submit", (event) => {
    event.preventDefault();
    send();
  });
  at("next-open").addEventListener("click", next);
  addEventListener("language", () => case_ && draw());
  addEventListener("beforeunload", (event) => [...drafts.values()].some((draft) => draft.note) && event.preventDefault());
}

const keyOf = (label) => (label === "unsure" ? LABEL_KEYS.at(-1) : LABEL_KEYS.slice(0, -1)[labels.indexOf(label)]);

function drawLabels() {
  at("labels").replaceChildren(...labels.map((label) => h("label", { class: "choice" },
    h("input", { type: "radio", name: "label", value: label, onchange: () => keep({ label }) }), h("span", { text: labelWords(label) }),
    keyOf(label) ? h("kbd", { text: keyOf(label), "aria-hidden": "true" }) : null)));
}

/** Shows form and history for `shown`; `afterSaving` is called when a finding has been kept by the server. */
export function showDecision(shown, afterSaving) {
  case_ = shown;
  saved = afterSaving;
  at("decision-problem").textContent = "";
  draw();
}

/** Opens the choice of labels and goes there. */
export function openCorrection() {
  keep({ open: true });
  draw();
  (at("labels").querySelector("input:checked") ?? at("labels").querySelector("input")).focus();
}

/** Opens the choice of labels with the one of the pressed key chosen; nothing is saved yet. */
export function chooseLabel(pressed) {
  const label = labels.find((one) => keyOf(one) === pressed);
  if (!case_ || !label) return;
  keep({ open: true, label });
  draw();
  at("labels").querySelector("input:checked").focus();
}

/** Says that the model is right. */
export function agree() {
  if (case_ && case_.verdict !== "cannot judge") save(case_.likeliest ?? case_.verdict);
}

/** Says what is chosen; where nothing is, what the model says. */
function send() {
  const { label } = draft();
  if (label) save(label);
  else if (!draft().open && case_.verdict !== "cannot judge") agree();
  else at("decision-problem").textContent = t("decision.choose");
}

const draft = () => drafts.get(case_.id) ?? { open: false, label: "", note: "" };

function keep(change) {
  drafts.set(case_.id, { ...draft(), ...change });
  at("decision-problem").textContent = "";
}

async function save(label) {
  if (saving) return;
  saving = true;
  draw();
  const of = case_;
  try {
    await ask(`/api/cases/${of.id}/findings`, { body: { label, note: draft().note.trim() } });
    drafts.delete(of.id);
    toast(t("decision.saved"));
    if (case_.id !== of.id) return;
    await saved();
    at("next-open").focus();
  } catch (problem) {
    if (case_.id === of.id) at("decision-problem").textContent = `${tOr(`error.${problem.code}`, t("error.internal"))} ${t("decision.kept")}`;
  } finally {
    saving = false;
    draw();
  }
}

function draw() {
  const { open, label, note } = draft();
  const judged = case_.verdict !== "cannot judge";
  const choosing = open || !judged;
  at("agree").hidden = !judged;
  at("agree").disabled = at("save").disabled = saving;
  at("agree-words").textContent = t("decision.agree", { verdict: case_.likeliest ? labelWords(case_.likeliest) : verdictWords(case_) });
  at("correct").hidden = !judged;
  at("correct").setAttribute("aria-expanded", String(choosing));
  at("choices").hidden = !choosing;
  at("save").hidden = !choosing;
  for (const input of at("labels").querySelectorAll("input")) input.checked = input.value === label;
  if (at("note").value !== note) at("note").value = note;
  at("note-count").textContent = note.length > 1500 ? t("decision.left", { count: 2000 - note.length }) : "";
  drawHistory();
}

function drawHistory() {
  const { findings } = case_;
  at("history-none").hidden = Boolean(findings.length);
  at("next-open").hidden = !findings.length;
  at("history").replaceChildren(...findings.toReversed().map((finding, i) => {
    const agrees = finding.agrees ?? agreement({ ...case_, finding: finding.label });
    const words = agrees === null ? "" : t(agrees ? "history.agrees" : "history.corrects");
    return h("li", { class: i ? "" : "latest" },
      h("p", {}, icon(agrees === false ? "pencil" : "check"), h("strong", { text: labelWords(finding.label) }), h("span", { class: "soft", text: words })),
      finding.note ? h("blockquote", { text: finding.note }) : null,
      h("p", { class: "soft", text: `${finding.by} · ${moment(finding.at)}` }));
  }));
}
