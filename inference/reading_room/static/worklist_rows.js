// The rows of the worklist. A row that has not changed is left alone, so that its focus and its picture stay.

import { at, h, icon, unseen } from "./dom.js";
import { age, currentLanguage, day, labelWords, moment, t } from "./i18n.js";
import { reasonWords } from "./judgement.js";
import { sentAs } from "./upload.js";
import { smallBar, verdictChip } from "./gauge.js";

const THUMBNAIL_PX = 96;
const drawn = new Map();

/** Draws `cases` in their order. */
export function drawRows(cases) {
  const rows = cases.map((case_) => {
    const mark = JSON.stringify([case_, currentLanguage(), sentAs(case_.id)]);
    const before = drawn.get(case_.id);
    return before?.mark === mark ? before : { mark, row: drawRow(case_) };
  });
  const focused = document.activeElement?.closest?.("tr")?.dataset.case;
  drawn.clear();
  cases.forEach((case_, i) => drawn.set(case_.id, rows[i]));
  at("rows").replaceChildren(...rows.map(({ row }) => row));
  if (focused) drawn.get(focused)?.row.querySelector("a.open").focus();
}

/** How a case is called on the page: the hospital's number, or the beginning of its own. */
export const nameOf = (case_) => case_.patient || t("case.unnamed", { id: case_.id.slice(0, 6).toUpperCase() });

/** What this page sent the case as: name of the file and of the patient; empty for cases that others sent, or an earlier page. */
export const sentWords = (case_) => Object.values(sentAs(case_.id) ?? {}).filter(Boolean).join(" · ");

/** View, sex and age in one line; what is not known is left out. */
export function studyLine(case_) {
  const parts = [[case_.modality, case_.view].filter(Boolean).join(" "), case_.sex ? t(`sex.${case_.sex}`) : ""];
  return [...parts, case_.age_years === null ? "" : age(case_.age_years)].filter(Boolean).join(" · ");
}

function drawRow(case_) {
  const picture = h("img", { src: `/api/cases/${case_.id}/image.png?max_side=${THUMBNAIL_PX}`, alt: "", loading: "lazy", decoding: "async" });
  const open = h("a", { class: "open", href: `#/case/${case_.id}` }, h("strong", { text: nameOf(case_) }), unseen(` – ${t("list.open")}`));
  const row = h("tr", { "data-case": case_.id, class: case_.status },
    h("td", { class: "picture" }, h("span", { class: "thumb" }, picture)),
    h("th", { scope: "row" }, open, h("small", { text: case_.accession || (case_.patient ? case_.id.slice(0, 6).toUpperCase() : " ") }),
      sentWords(case_) ? h("small", { class: "sent", text: sentWords(case_) }) : null),
    h("td", { class: "study" }, h("span", { text: studyLine(case_) || "–" }), h("small", { text: case_.study_date ? day(case_.study_date) : "" })),
    h("td", { class: "arrived", text: moment(case_.arrived) }),
    h("td", { class: "verdict" }, verdictChip(case_)),
    h("td", { class: "chance" }, ...chanceOf(case_)),
    h("td", { class: "reading" }, ...readingOf(case_)));
  row.addEventListener("click", (event) => event.target.closest("a, button") || open.click());
  return row;
}

function chanceOf(case_) {
  const outside = case_.population?.status === "not_judged" ? t("population.short") : "";
  if (case_.verdict !== "cannot judge") return [smallBar(case_), outside ? h("small", { text: outside }) : ""];
  return [smallBar(case_), h("small", { text: reasonWords(case_.reasons).join(" · ") })];
}

function readingOf(case_) {
  if (case_.status === "open") return [h("span", { class: "state open" }, t("status.open"))];
  const agrees = agreement(case_);
  const words = case_.finding ? labelWords(case_.finding) : t("status.read");
  return [
    h("span", { class: `state read ${agrees === false ? "corrected" : ""}` }, icon(agrees === false ? "pencil" : "check"), words),
    h("small", { text: agrees === false ? t("reading.corrected", { user: case_.finding_by ?? "" }) : case_.finding_by ?? "" }),
  ];
}

/** Whether the finding agrees with the model's verdict; null where either says nothing. */
export function agreement(case_) {
  if (!case_.finding || case_.finding === "unsure" || case_.verdict === "cannot judge") return null;
  if (case_.verdict === "finding") return case_.finding === case_.likeliest;
  return (case_.finding === "normal") === (case_.verdict === "normal");
}
