// One image, judged: calibration, threshold, the bundle's suitability check and its population, as `Predictor.judge` does it.

import { headerReasons, openDensity, scoresOf, testReasons } from "./suitability.js";

const AGE = "age";

/** Makes a bundle's facts ready: the numbers of its densities are unpacked once. */
export function openFacts(facts) {
  const { suitability } = facts;
  if (!suitability) return facts;
  const [features, pixels, cells] = [suitability.features, suitability.pixels, suitability.cells].map(openDensity);
  return { ...facts, suitability: { features, pixels, cells, limits: suitability.limits } };
}

/**
 * Judges one image.
 * @param facts of `openFacts`.
 * @param info what the file says of the image.
 * @param square the network's input.
 * @param {{logits: Float32Array, features: Float32Array}} outputs of the graph.
 * @returns {{verdict, reasons, population}} and, only where the image can be judged, {probability, low, high, classes, likeliest}.
 */
export function judge(facts, info, square, outputs) {
  const logits = Array.from(outputs.logits);
  const reasons = reasonsOf(facts, info, square, outputs);
  const found = { reasons, threshold: facts.threshold, positive: facts.positive, population: checkPopulation(facts.population, info.groups) };
  if (reasons.length) return { ...found, verdict: "cannot judge" };
  const score = scoreOf(logits);
  const probability = logistic(facts.calibration.slope * score + facts.calibration.intercept);
  const [low, high] = intervalOf(facts.calibration.lines, score);
  const verdict = probability >= facts.threshold ? facts.positive : "normal";
  const classes = classesOf(facts.classes, logits, probability, facts.calibration.class_lines ?? []);
  return { ...found, verdict, likeliest: verdict === "finding" ? likeliestOf(classes) : null, probability, low, high, classes };
}

/** The logit of P(pneumonia) = 1 - P(class 0): `pneumonia_score`. */
export const scoreOf = (logits) => logSumExp(logits.slice(1)) - logits[0];

/** The lowest and the highest end of the 95 % bands of the calibration's lines: `Calibration.interval`. */
export function intervalOf(lines, score) {
  if (!lines.length) return [0, 1];
  const bands = lines.map(({ slope, intercept, covariance: [variance, both, other] }) => {
    const half = 1.959963984540054 * Math.sqrt(Math.max(variance * score ** 2 + 2 * both * score + other, 0));
    return [slope * score + intercept - half, slope * score + intercept + half];
  });
  return [logistic(Math.min(...bands.map(([low]) => low))), logistic(Math.max(...bands.map(([, high]) => high)))];
}

/** Whether the model was judged for such a patient: `JudgedPopulation.check`. The form is that of the reading room's API. */
export function checkPopulation(judged, groups) {
  const outside = Object.entries(groups).filter(([kind, group]) => judged[kind].length && !judged[kind].includes(group)).map(([kind]) => kind);
  let status = "judged";
  if (!judged[AGE].length) status = "model_unknown";
  else if (!groups[AGE]) status = "age_unknown";
  if (outside.length) status = "not_judged";
  return { status, outside, judged, age_group: groups.age ?? null, sex: groups.sex ?? null, view: groups.view ?? null };
}

function reasonsOf(facts, info, square, outputs) {
  const own = headerReasons(info, facts.rules);
  if (own.length) return own;
  const { suitability } = facts;
  const strange = suitability ? testReasons(scoresOf(suitability, square, outputs.features), suitability.limits) : [];
  if (strange.length) return strange;
  return outputs.logits.every(Number.isFinite) ? [] : ["far_from_reference"];
}

/** Class 0 is 1 - P(pneumonia), the others share P(pneumonia) by their calibrated probabilities against the rest, or as the network does:
 *  `Calibration.class_probabilities`. */
function classesOf(names, logits, probability, lines) {
  const own = lines.map(({ slope, intercept }, i) => logLogistic(slope * (logits[i + 1] - logSumExp(logits.filter((_, k) => k !== i + 1))) + intercept));
  const weights = lines.length ? own : logits.slice(1);
  const all = logSumExp(weights);
  const shares = weights.map((weight) => Math.exp(weight - all) * probability);
  return Object.fromEntries(names.map((name, i) => [name, i ? shares[i - 1] : 1 - probability]));
}

/** log of `logistic`, exact also where that is next to 0. */
const logLogistic = (x) => Math.min(x, 0) - Math.log1p(Math.exp(-Math.abs(x)));

/** The most probable class but normal, the first of those that are level: `Prediction.likeliest`. */
function likeliestOf(classes) {
  const others = Object.entries(classes).filter(([name]) => name !== "normal");
  return others.reduce((best, next) => (next[1] > best[1] ? next : best))[0];
}

function logSumExp(values) {
  const most = Math.max(...values);
  return most + Math.log(values.reduce((sum, value) => sum + Math.exp(value - most), 0));
}

function logistic(value) {
  return value >= 0 ? 1 / (1 + Math.exp(-value)) : Math.exp(value) / (1 + Math.exp(value));
}
