// What the model says of an image, drawn and in words. It asks no server: the page that `pneumofed export --web` writes draws with it too.

import { h } from "./dom.js";
import { labelWords, percent, t, tOf, tOr } from "./i18n.js";
import { bigGauge, verdictChip } from "./gauge.js";

/** The elements that show a judgement: the verdict with its number or its reasons, and for whom the model was judged. */
export function judgementOf(case_) {
  const finding = case_.verdict === "cannot judge" ? withoutJudgement(case_) : withJudgement(case_);
  return [...finding, populationOf(case_)].filter(Boolean);
}

/** The reasons in words; a reason of a newer model that has no words yet is shown as it came. */
export const reasonWords = (reasons) => reasons.map((reason) => tOr(`reason.${reason}`, reason));

/** Whether the model was judged for such a patient, in words; a case of an earlier version says nothing of it. */
export function populationWords(population) {
  const { status, outside = [], judged = {} } = population ?? { status: "model_unknown" };
  const list = (groups) => groups.map((group) => tOr(`group.${group}`, group)).join(t("population.and"));
  const own = { age: population?.age_group, sex: population?.sex, view: population?.view };
  if (status === "not_judged") {
    return outside.map((kind) => t("population.not_judged", { own: list([own[kind]]), judged: list(judged[kind]) })).join(" ");
  }
  if (status === "judged") return t("population.judged", { own: list(Object.values(own).filter(Boolean)) });
  return status === "age_unknown" ? t("population.age_unknown", { judged: list(judged.age) }) : t("population.model_unknown");
}

function withJudgement(case_) {
  const values = { low: percent(case_.low), high: percent(case_.high) };
  const side = case_.probability >= case_.threshold ? "above" : "below";
  // Where both round to one number the sentence below would seem to contradict itself.
  const digits = percent(case_.probability) === percent(case_.threshold) && case_.probability !== case_.threshold ? 2 : 0;
  const isClose = case_.low < case_.threshold && case_.threshold < case_.high;
  return [
    h("div", { class: "finding-head" }, verdictChip(case_),
      h("p", { class: "finding-number" }, h("strong", { text: percent(case_.probability, digits) }), h("span", { text: tOf(case_, "finding.interval", values) }))),
    bigGauge(case_),
    h("p", { class: "soft", text: tOf(case_, `finding.${side}`, { threshold: percent(case_.threshold, digits) }) }),
    isClose ? h("p", { class: "close", text: t("finding.close") }) : null,
    likeliestClass(case_),
  ];
}

/** Of more than two classes the most probable one by name; normal may be it also where all others together reach the threshold. */
function likeliestClass({ classes, verdict }) {
  const ranked = Object.entries(classes).sort(([, one], [, other]) => other - one);
  if (ranked.length < 3) return null;
  const words = ([name, value]) => ({ name: labelWords(name), probability: percent(value) });
  const surprises = verdict !== "normal" && ranked[0][0] === "normal";
  const text = surprises ? t("finding.likeliest_normal", { ...words(ranked[1]), normal: percent(ranked[0][1]) }) : t("finding.likeliest", words(ranked[0]));
  return h("p", { class: "likeliest", text });
}

function withoutJudgement(case_) {
  return [
    h("div", { class: "finding-head" }, verdictChip(case_)),
    h("ul", { class: "reasons" }, ...reasonWords(case_.reasons).map((text) => h("li", { text }))),
    h("p", { class: "soft", text: t("finding.without") }),
  ];
}

/** For whom the model was judged; a warning where this patient is none of them. */
function populationOf({ population }) {
  const warns = population?.status === "not_judged";
  return h("p", { class: warns ? "close population" : "soft population", role: warns ? "note" : null, text: populationWords(population) });
}

/** All classes, the most probable first; none where nothing may be said. */
export function classRows(case_) {
  if (case_.verdict === "cannot judge") return [];
  const ranked = Object.entries(case_.classes).sort(([, one], [, other]) => other - one);
  return ranked.map(([name, value]) => {
    const fill = h("i", { class: "class-fill" });
    fill.style.width = `${100 * value}%`;
    return h("li", {}, h("span", { text: labelWords(name) }), h("span", { class: "class-bar", "aria-hidden": "true" }, fill), h("span", { class: "class-number", text: percent(value) }));
  });
}
