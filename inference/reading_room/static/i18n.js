// English and Chinese. The choice of language is one of two things that this page keeps in the browser.

import en from "./words_en.js";
import zh from "./words_zh.js";

const TABLES = { en, zh };
const LOCALES = { en: "en-GB", zh: "zh-CN" };
const KEPT = "pneumofed-language";

let language = kept() ?? guess();

/** The language now: `en` or `zh`. */
export const currentLanguage = () => language;

/** The words for `key`, with `{name}` replaced. With `count` the form for that number: `key.one` or `key.other`. */
export function t(key, values = {}) {
  const table = TABLES[language];
  const form = "count" in values ? `${key}.${new Intl.PluralRules(LOCALES[language]).select(values.count)}` : key;
  const words = table[form] ?? table[`${key}.other`] ?? table[key];
  if (words === undefined) return key;
  const filled = "count" in values ? { ...values, count: number(values.count) } : values;
  return words.replace(/\{(\w+)\}/g, (whole, name) => filled[name] ?? whole);
}

/** The words for `key` of a case: of a model of own classes, whose probability is of any finding, those of `key.any`. */
export const tOf = (case_, key, values = {}) => t(case_.positive === "finding" ? `${key}.any` : key, values);

/** A class or label as people read it; a study's own class that has no words here as it is written. */
export const labelWords = (name) => tOr(`label.${name}`, name.charAt(0).toUpperCase() + name.slice(1).replaceAll("_", " "));

/** A verdict as people read it, of a finding the class that the model thinks most probable; the number beside it is of any finding. */
export const verdictWords = (case_) =>
  case_.likeliest ? t("verdict.likeliest", { name: labelWords(case_.likeliest) }) : t(`verdict.${case_.verdict.replace(" ", "_")}`);

/** The words for `key`, or `otherwise` where there are none. */
export const tOr = (key, otherwise) => TABLES[language][key] ?? otherwise;

/** Changes the language, keeps the choice, and tells all who draw text. */
export function setLanguage(wanted) {
  language = wanted;
  try {
    localStorage.setItem(KEPT, wanted);
  } catch {
    // as in `kept`: the choice holds until the page is closed
  }
  applyWords();
  dispatchEvent(new Event("language"));
}

/** Puts the words into all elements that carry `data-t` (text), `data-t-label`, `data-t-title` or `data-t-placeholder`. */
export function applyWords(root = document) {
  document.documentElement.lang = language === "zh" ? "zh-Hans" : "en";
  for (const element of root.querySelectorAll("[data-t]")) element.textContent = t(element.dataset.t);
  for (const [name, attribute] of [["label", "aria-label"], ["title", "title"], ["placeholder", "placeholder"]]) {
    for (const element of root.querySelectorAll(`[data-t-${name}]`)) {
      element.setAttribute(attribute, t(element.getAttribute(`data-t-${name}`)));
    }
  }
}

export const number = (value, digits = 0) =>
  new Intl.NumberFormat(LOCALES[language], { maximumFractionDigits: digits }).format(value);

/** A probability in whole percent, or with digits behind the point; what would round to certainty is not called certain. */
export function percent(value, digits = 0) {
  const format = new Intl.NumberFormat(LOCALES[language], { style: "percent", minimumFractionDigits: digits });
  if (value > 0.99) return `>${format.format(0.99)}`;
  return value < 0.01 ? `<${format.format(0.01)}` : format.format(value);
}

/** A magnification in percent. */
export const magnified = (value) => new Intl.NumberFormat(LOCALES[language], { style: "percent" }).format(value);

/** A moment in the reader's own time zone. */
export const moment = (iso) =>
  new Intl.DateTimeFormat(LOCALES[language], { dateStyle: "medium", timeStyle: "short" }).format(new Date(iso));

/** A day as it stands in the file, whatever the time zone. */
export const day = (iso) => new Intl.DateTimeFormat(LOCALES[language], { dateStyle: "medium", timeZone: "UTC" }).format(new Date(iso));

/** The size of a file. */
export function fileSize(bytes) {
  const [unit, size] = bytes < 2 ** 10 ? ["byte", 1] : bytes < 2 ** 20 ? ["kilobyte", 2 ** 10] : ["megabyte", 2 ** 20];
  const unitDisplay = unit === "byte" ? "long" : "short"; // there is no plural of the short one: "5 byte"
  const options = { style: "unit", unit, unitDisplay, maximumFractionDigits: bytes < 10 * size ? 1 : 0 };
  return new Intl.NumberFormat(LOCALES[language], options).format(bytes / size);
}

/** Age in words; months below two years, as in the DICOM file. */
export const age = (years) =>
  years < 2 ? t("age.months", { count: Math.round(years * 12) }) : t("age.years", { count: Math.floor(years) });

/** The language that was chosen before; null where there is none, or where the browser keeps nothing for this page. */
function kept() {
  try {
    const found = localStorage.getItem(KEPT);
    return TABLES[found] ? found : null;
  } catch {
    return null;
  }
}

function guess() {
  return navigator.language.toLowerCase().startsWith("zh") ? "zh" : "en";
}
