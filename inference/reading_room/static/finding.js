// What the model says of the case, and what is known of its image.

import { at, h } from "./dom.js";
import { age, day, moment, number, percent, t } from "./i18n.js";
import { bigGauge, verdictChip } from "./gauge.js";
import { nameOf, populationWords, reasonWords, sentWords, studyLine } from "./worklist_rows.js";

const MOST_CLASSES = 4;

/** Draws the panel's upper part for `case_`, a CaseDetail. */
export function drawFinding(case_) {
  at("case-name").textContent = nameOf(case_);
  at("case-line").textContent = [studyLine(case_), case_.study_date ? day(case_.study_date) : ""].filter(Boolean).join(" · ");
  at("case-sent").textContent = sentWords(case_) ? t("viewer.sent", { name: sentWords(case_) }) : "";
  at("finding").dataset.verdict = case_.verdict;
  const finding = case_.verdict === "cannot judge" ? withoutJudgement(case_) : withJudgement(case_);
  at("finding").replaceChildren(...[...finding, populationOf(case_)].filter(Boolean));
  at("classes").replaceChildren(...classesOf(case_));
  at("classes-section").hidden = !at("classes").children.length;
  at("facts").replaceChildren(...factsOf(case_).map(([words, value]) => h("div", {}, h("dt", { text: t(`fact.${words}`) }), h("dd", { text: value }))));
}

function withJudgement(case_) {
  const values = { low: percent(case_.low), high: percent(case_.high) };
  const side = case_.probability >= case_.threshold ? "above" : "below";
  // Where both round to one number the sentence below would seem to contradict itself.
  const digits = percent(case_.probability) === percent(case_.threshold) && case_.probability !== case_.threshold ? 2 : 0;
  const isClose = case_.low < case_.threshold && case_.threshold < case_.high;
  return [
    h("div", { class: "finding-head" }, verdictChip(case_.verdict),
      h("p", { class: "finding-number" }, h("strong", { text: percent(case_.probability, digits) }), h("span", { text: t("finding.interval", values) }))),
    bigGauge(case_),
    h("p", { class: "soft", text: t(`finding.${side}`, { threshold: percent(case_.threshold, digits) }) }),
    isClose ? h("p", { class: "close", text: t("finding.close") }) : null,
  ];
}

function withoutJudgement(case_) {
  return [
    h("div", { class: "finding-head" }, verdictChip(case_.verdict)),
    h("ul", { class: "reasons" }, ...reasonWords(case_.reasons).map((text) => h("li", { text }))),
    h("p", { class: "soft", text: t("finding.without") }),
  ];
}

/** For whom the model was judged; a warning where this patient is none of them. */
function populationOf({ population }) {
  const warns = population?.status === "not_judged";
  return h("p", { class: warns ? "close population" : "soft population", role: warns ? "note" : null, text: populationWords(population) });
}

/** The strongest classes; none where nothing may be said. */
function classesOf(case_) {
  if (case_.verdict === "cannot judge") return [];
  const ranked = Object.entries(case_.classes).sort(([, one], [, other]) => other - one).slice(0, MOST_CLASSES);
  return ranked.map(([name, value]) => {
    const fill = h("i", { class: "class-fill" });
    fill.style.width = `${100 * value}%`;
    const key = `label.${name}`;
    const words = t(key) === key ? name : t(key);
    return h("li", {}, h("span", { text: words }), h("span", { class: "class-bar", "aria-hidden": "true" }, fill), h("span", { class: "class-number", text: percent(value) }));
  });
}

function factsOf(case_) {
  const { image } = case_;
  const facts = [
    ["accession", case_.accession],
    ["study_date", case_.study_date ? day(case_.study_date) : ""],
    ["arrived", moment(case_.arrived)],
    ["view", [case_.modality, case_.view].filter(Boolean).join(" ")],
    ["patient", [case_.sex ? t(`sex.${case_.sex}`) : "", case_.age_years === null ? "" : age(case_.age_years)].filter(Boolean).join(", ")],
    ["size", t("fact.pixels", { width: number(image.width), height: number(image.height), bits: image.bits })],
    ["format", image.format === "dicom" ? "DICOM" : image.format.toUpperCase()],
    ["manufacturer", image.manufacturer],
    ["case", case_.id.slice(0, 6).toUpperCase()],
    ["model", `${case_.model} (${case_.model_digest.slice(0, 8)})`],
  ];
  return facts.filter(([, value]) => value);
}
