// Which projection of which part of the body a DICOM image is, and which groups its patient belongs to: the rules of
// `pneumofed.common.imaging.dicom_views` and `patient_groups`, where the sources stand.

import { codeOf, codesOf, firstItem, textOf } from "./dicom.js";

const SIDE = "(?:LT|RT|LEFT|RIGHT|L|R)?";
const whole = (pattern) => new RegExp(`^(?:${pattern})$`);
const KINDS = {
  frontal: whole("PA|AP|FRONTAL|FRONT|POSTEROANTERIOR|ANTEROPOSTERIOR|POSTERO|ANTERO|APPA|PAAP"),
  lateral: whole(`${SIDE}(?:LAT|LATERAL|LATERALE|LATERALIS|PROFILE?)[0-9]?${SIDE}|LATERO|SAGITTAL|SEITLICH|X?TLAT|XTABLELAT`),
  oblique: whole(`${SIDE}(?:OBL|OBLIQUE|OBLIQUA|OBLIQ)${SIDE}|[LR][AP]O|[LR]LO|MLO|LMO`),
  decubitus: whole(`${SIDE}(?:DECUB|DECUBITUS|DECUBITO|DECUBITAL|DEC)${SIDE}|[LR]LD`),
};
const LATERAL_CODES = ["LL", "RL", "LM", "ML"];
const WEAK_LATERAL = ["XTABLE", "CROSSTABLE", "XTBL", "XTL"];
const OTHER = new Set([
  "SWIMMERS", "SWIMMER", "SWIM", "AXIAL", "TANGENTIAL", "SUNRISE", "MERCHANT", "WATERS", "TOWNES", "CALDWELL", "ODONTOID", "OTHER", "CC",
  "XCC", "XCCL", "SMV", "SKYLINE", "FROGLEG", "SCAPY", "PLANTODORSAL", "DORSOPLANTAR", "VERTEX",
]);
const ORDER = ["decubitus", "oblique", "other", "lateral", "frontal"];
const LYING_ON_A_SIDE = ["HFDR", "HFDL", "FFDR", "FFDL"]; // PS3.3, C.7.3.1.1.2
const LEGACY_SCHEMES = ["SRT", "SNM3", "99SDM"];
const AGE_LIMITS = [["infant", 2], ["child", 12], ["adolescent", 18], ["adult", 65], ["older_adult", 126]]; // years, upper ends
const [NEWBORN_DAYS, DAYS_PER_YEAR, ROUNDING] = [28, 365.25, 1e-6];

const split = (text) => text.toUpperCase().match(/[A-Z0-9]+/g) ?? [];

/** frontal, lateral, oblique, decubitus, other or unknown: `classify_view`. */
export function classifyView(view) {
  const words = split(view);
  if (["L", "LAT L", "LAT R"].includes(words.join(" "))) return "lateral";
  const kinds = kindsOf(words);
  if (words.some((word) => LATERAL_CODES.includes(word))) kinds.add("lateral");
  const found = ORDER.find((kind) => kinds.has(kind)) ?? "unknown";
  const has = (...all) => all.every((word) => words.includes(word));
  const isAcross = words.some((word) => WEAK_LATERAL.includes(word)) || has("CROSS", "TABLE") || has("X", "TABLE");
  return found === "unknown" && isAcross ? "lateral" : found;
}

/** False for what is stated not to be frontal; an unknown view passes. */
export const isFrontal = (view) => ["frontal", "unknown"].includes(classifyView(view));

/** Whether a body part is stated that is not the chest. */
export function isOtherPart(bodyPart, { chest, other }) {
  const words = split(bodyPart);
  return !words.some((word) => chest.includes(word)) && words.some((word) => other.includes(word));
}

/** The word for the projection: what is not frontal counts first, then what is stated, then a hint (`read_view`). */
export function readView(tags, codes) {
  const stated = statements(tags, codes).filter(({ kind }) => kind !== "unknown");
  const decided = stated.find(({ kind }) => kind !== "frontal") ?? stated[0];
  if (decided) return decided.word;
  for (const keyword of ["SeriesDescription", "ProtocolName"]) {
    const kinds = [...kindsOf(split(textOf(tags, keyword)))];
    if (kinds.length === 1) return kinds[0].toUpperCase();
  }
  return codeOf(tags, "ViewPosition");
}

/** The word of Anatomic Region Sequence, else Body Part Examined, else nothing. */
export const readBodyPart = (tags, codes) => findCode(tags, "AnatomicRegionSequence", codes) || codeOf(tags, "BodyPartExamined");

/** The groups of the patient that are known, by kind: age, sex, view. */
export function groupsOf(tags, view) {
  const sex = codeOf(tags, "PatientSex");
  const birth = dateOf(textOf(tags, "PatientBirthDate"));
  const known = {
    age: ageGroupOfString(textOf(tags, "PatientAge")) ?? ageGroupBetween(birth, dateOf(textOf(tags, "StudyDate"))),
    sex: ["F", "M"].includes(sex) ? sex : null,
    view: viewGroupOf(view),
  };
  return Object.fromEntries(Object.entries(known).filter(([, group]) => group));
}

/** The group of an Age String such as 012D, 010W, 006M or 045Y (PS3.5, 6.2): completed units; null where they leave it open. */
export function ageGroupOfString(text) {
  const [, digits, unit] = /^(\d{1,3})([DWMY])$/.exec(text.trim().toUpperCase()) ?? [];
  if (!unit) return null;
  const days = Number(digits) * (unit === "W" ? 7 : 1);
  if (unit === "D" || unit === "W") return days < NEWBORN_DAYS ? "newborn" : ageGroupOf(days / DAYS_PER_YEAR);
  return ageGroupOf(unit === "M" ? Number(digits) / 12 : Number(digits));
}

/** AP or PA; null where a view is neither, both, or not frontal. */
export function viewGroupOf(view) {
  if (!view || classifyView(view) !== "frontal") return null;
  const words = view.toUpperCase().match(/[A-Z]+/g) ?? [];
  const named = [["AP", "ANTEROPOSTERIOR"], ["PA", "POSTEROANTERIOR"]].filter((spellings) => words.some((word) => spellings.includes(word)));
  return named.length === 1 ? named[0][0] : null;
}

function ageGroupOf(years) {
  if (!(years > ROUNDING) || years >= 126) return null;
  if (years < NEWBORN_DAYS / DAYS_PER_YEAR - ROUNDING) return "newborn";
  return AGE_LIMITS.find(([, below]) => years < below - ROUNDING)?.[0] ?? null;
}

/** The group on the day of the examination; null where a day is not known or the birth lies after it. */
export function ageGroupBetween(birth, study) {
  if (!birth || !study || birth > study) return null;
  if ((study - birth) / 86400000 < NEWBORN_DAYS) return "newborn";
  const isBefore = study.getUTCMonth() < birth.getUTCMonth()
    || (study.getUTCMonth() === birth.getUTCMonth() && study.getUTCDate() < birth.getUTCDate());
  const years = study.getUTCFullYear() - birth.getUTCFullYear() - (isBefore ? 1 : 0);
  return years < 2 ? "infant" : ageGroupOf(years);
}

/** A Date such as 20240131 (PS3.5, 6.2, DA); null where it names no day. */
export function dateOf(text) {
  const [, year, month, day] = /^(\d{4})(\d{2})(\d{2})$/.exec(text) ?? [];
  if (!day || year === "0000") return null;
  const date = new Date(`${year}-${month}-${day}T00:00:00Z`);
  return !Number.isNaN(date.valueOf()) && date.getUTCDate() === Number(day) ? date : null;
}

function kindsOf(words) {
  const kinds = new Set(Object.entries(KINDS).filter(([, pattern]) => words.some((word) => pattern.test(word))).map(([kind]) => kind));
  if (words.some((word) => OTHER.has(word))) kinds.add("other");
  if (kinds.has("decubitus")) kinds.delete("lateral");
  return kinds;
}

function statements(tags, codes) {
  const found = [];
  const position = classifyView(textOf(tags, "ViewPosition"));
  found.push({ kind: position, word: codeOf(tags, "ViewPosition") || position.toUpperCase() });
  const coded = findCode(tags, "ViewCodeSequence", codes);
  if (coded) found.push({ kind: classifyView(coded), word: coded });
  if (LYING_ON_A_SIDE.includes(textOf(tags, "PatientPosition").toUpperCase())) found.push({ kind: "decubitus", word: "DECUBITUS" });
  const turned = projectionOf(codesOf(tags, "PatientOrientation"));
  found.push({ kind: turned, word: turned.toUpperCase() });
  return found;
}

/** The word of the coded concept in a sequence's first item; `codes` are {snomed, legacy, word}. */
function findCode(tags, keyword, codes) {
  const item = firstItem(tags, keyword);
  if (!item) return "";
  const value = textOf(item, "CodeValue").toUpperCase();
  const scheme = textOf(item, "CodingSchemeDesignator").toUpperCase();
  if (scheme === "SCT") return codes.find(({ snomed }) => snomed === value)?.word ?? "";
  return codes.find(({ legacy }) => LEGACY_SCHEMES.includes(scheme) && legacy === value)?.word ?? "";
}

/** By the directions of rows and columns (PS3.3, C.7.6.1.1.1). */
function projectionOf(orientation) {
  const axis = { L: "x", R: "x", A: "y", P: "y", H: "z", F: "z" };
  if (orientation.length !== 2 || !orientation.every((text) => text && [...text].every((letter) => letter in axis))) return "unknown";
  const isSlanted = (text) => ["x", "y"].every((wanted) => [...text].some((letter) => axis[letter] === wanted));
  if (orientation.some(isSlanted)) return "oblique";
  const main = [...new Set(orientation.map((text) => axis[text[0]]))].sort().join("");
  return { xz: "frontal", yz: "lateral", xy: "other" }[main] ?? "unknown";
}
