// What the model says of the case, and what is known of its image.

import { at, h } from "./dom.js";
import { age, day, moment, number, t } from "./i18n.js";
import { classRows, judgementOf } from "./judgement.js";
import { nameOf, sentWords, studyLine } from "./worklist_rows.js";

/** Draws the panel's upper part for `case_`, a CaseDetail. */
export function drawFinding(case_) {
  at("case-name").textContent = nameOf(case_);
  at("case-line").textContent = [studyLine(case_), case_.study_date ? day(case_.study_date) : ""].filter(Boolean).join(" · ");
  at("case-sent").textContent = sentWords(case_) ? t("viewer.sent", { name: sentWords(case_) }) : "";
  at("finding").dataset.verdict = case_.verdict === "finding" ? "pneumonia" : case_.verdict;
  at("finding").replaceChildren(...judgementOf(case_));
  at("classes").replaceChildren(...classRows(case_));
  at("classes-section").hidden = !at("classes").children.length;
  at("facts").replaceChildren(...factsOf(case_).map(([words, value]) => h("div", {}, h("dt", { text: t(`fact.${words}`) }), h("dd", { text: value }))));
}

function factsOf(case_) {
  const { image } = case_;
  const { series } = image.facts;
  const facts = [
    ["accession", case_.accession],
    ["study_date", case_.study_date ? day(case_.study_date) : ""],
    ["arrived", moment(case_.arrived)],
    ["view", [case_.modality, case_.view].filter(Boolean).join(" ")],
    ["patient", [case_.sex ? t(`sex.${case_.sex}`) : "", case_.age_years === null ? "" : age(case_.age_years)].filter(Boolean).join(", ")],
    ["size", t("fact.pixels", { width: number(image.width), height: number(image.height), bits: image.bits })],
    ["slices", series ? t("fact.stack", { slices: number(series.slices), spacing: number(series.spacing_mm, 2) }) : ""],
    ["notes", series?.notes.join("; ")],
    ["format", { dicom: "DICOM", nifti: "NIfTI" }[image.format] ?? image.format.toUpperCase()],
    ["manufacturer", image.manufacturer],
    ["case", case_.id.slice(0, 6).toUpperCase()],
    ["model", `${case_.model} (${case_.model_digest.slice(0, 8)})`],
  ];
  return facts.filter(([, value]) => value);
}
