// A probability against the operating threshold, with its interval. What cannot be judged has no bar to be misread.

import { h } from "./dom.js";
import { percent, t, tOf, verdictWords } from "./i18n.js";

/** The probability as a sentence, for those who do not see the drawing. */
export function inWords(case_, threshold) {
  const values = { probability: percent(case_.probability), low: percent(case_.low), high: percent(case_.high) };
  return tOf(case_, "gauge.words", { ...values, threshold: percent(threshold) });
}

/** The verdict as a chip: its shape and words tell it apart, not its colour alone. */
export function verdictChip(case_) {
  return h("span", { class: `chip ${kindOf(case_).replace(" ", "_")}`, text: verdictWords(case_) });
}

/** One line of the worklist: number, bar, threshold. */
export function smallBar(case_) {
  if (case_.verdict === "cannot judge") return h("div", { class: "bar void" }, h("span", { class: "unseen", text: t("gauge.none") }));
  const label = inWords(case_, case_.threshold);
  return h("div", { class: "bar-line" },
    h("span", { class: "bar-number", text: percent(case_.probability), "aria-hidden": "true" }),
    h("div", { class: `bar ${kindOf(case_)}`, role: "img", "aria-label": label, title: label }, ...marks(case_, case_.threshold)));
}

/** The viewer's drawing, with a scale and the threshold's own words. */
export function bigGauge(case_) {
  const threshold = h("span", { class: "gauge-threshold", text: t("gauge.threshold", { value: percent(case_.threshold) }) });
  put(threshold, "left", case_.threshold);
  threshold.dataset.side = case_.threshold > 0.5 ? "left" : "right";
  const ends = [0, 0.5, 1].map((value) => put(h("span", { text: t("gauge.tick", { value: value * 100 }) }), "left", value));
  return h("div", { class: "gauge", role: "img", "aria-label": inWords(case_, case_.threshold) },
    h("div", { class: "gauge-top" }, threshold),
    h("div", { class: `bar ${kindOf(case_)}` }, ...marks(case_, case_.threshold)),
    h("div", { class: "gauge-ticks" }, ...ends));
}

/** How a verdict is drawn: any finding as pneumonia is. */
const kindOf = (case_) => (case_.verdict === "finding" ? "pneumonia" : case_.verdict);

function marks(case_, threshold) {
  const interval = put(h("i", { class: "bar-interval" }), "left", case_.low);
  put(interval, "width", Math.max(0, case_.high - case_.low));
  return [interval, put(h("i", { class: "bar-point" }), "left", case_.probability), put(h("i", { class: "bar-threshold" }), "left", threshold)];
}

function put(element, side, part) {
  element.style[side] = `${100 * part}%`;
  return element;
}
