// The tags of a DICOM file (PS3.5, sections 7 and A): explicit and implicit VR, little and big endian, deflated. Only tags that are asked
// for are kept, and none that names a patient. Values are read as `pneumofed.common.imaging.dicom_tags` reads them: malformed ones count
// as absent.

import { ImageProblem, MAX_FILE_BYTES } from "./pixels.js";

/** Keyword by tag, with the VR that implicit files have it in (PS3.6, table 6-1). */
const TAGS = {
  "00080020": ["StudyDate", "DA"], "00080060": ["Modality", "CS"], "00080068": ["PresentationIntentType", "CS"],
  "00080100": ["CodeValue", "SH"], "00080102": ["CodingSchemeDesignator", "SH"], "0008103E": ["SeriesDescription", "LO"],
  "00082218": ["AnatomicRegionSequence", "SQ"], "00100030": ["PatientBirthDate", "DA"], "00100040": ["PatientSex", "CS"],
  "00101010": ["PatientAge", "AS"], "00180015": ["BodyPartExamined", "CS"], "00181030": ["ProtocolName", "LO"],
  "00181164": ["ImagerPixelSpacing", "DS"], "00182010": ["NominalScannedPixelSpacing", "DS"], "00185100": ["PatientPosition", "CS"],
  "00185101": ["ViewPosition", "CS"], "00200020": ["PatientOrientation", "CS"], "00280002": ["SamplesPerPixel", "US"],
  "00280004": ["PhotometricInterpretation", "CS"], "00280008": ["NumberOfFrames", "IS"], "00280010": ["Rows", "US"],
  "00280011": ["Columns", "US"], "00280030": ["PixelSpacing", "DS"], "00280034": ["PixelAspectRatio", "IS"],
  "00280100": ["BitsAllocated", "US"], "00280101": ["BitsStored", "US"], "00280102": ["HighBit", "US"],
  "00280103": ["PixelRepresentation", "US"], "00280120": ["PixelPaddingValue", "US"], "00280121": ["PixelPaddingRangeLimit", "US"],
  "00281050": ["WindowCenter", "DS"], "00281051": ["WindowWidth", "DS"], "00281052": ["RescaleIntercept", "DS"],
  "00281053": ["RescaleSlope", "DS"], "00281056": ["VOILUTFunction", "CS"], "00283000": ["ModalityLUTSequence", "SQ"],
  "00283002": ["LUTDescriptor", "US"], "00283006": ["LUTData", "OW"], "00283010": ["VOILUTSequence", "SQ"],
  "00540220": ["ViewCodeSequence", "SQ"], "20500020": ["PresentationLUTShape", "CS"], "7FE00010": ["PixelData", "OW"],
};
const LONG_FORM = new Set(["OB", "OD", "OF", "OL", "OV", "OW", "SQ", "SV", "UC", "UN", "UR", "UT", "UV"]); // PS3.5, table 7.1-1
const UNDEFINED = 0xffffffff;
const MOST_NESTED = 32;
const MAX_TEXT = 64;
const SYNTAXES = {
  "1.2.840.10008.1.2": { explicit: false, little: true },
  "1.2.840.10008.1.2.1": { explicit: true, little: true },
  "1.2.840.10008.1.2.2": { explicit: true, little: false },
  "1.2.840.10008.1.2.1.99": { explicit: true, little: true, deflated: true },
};

/**
 * Parses the file `bytes`, with or without preamble and file meta information.
 * @returns {Promise<{tags: Object, little: boolean}>} `tags` by keyword, each {vr, bytes, items}.
 */
export async function parseDicom(bytes) {
  const certain = String.fromCharCode(...bytes.subarray(128, 132)) === "DICM";
  const start = certain ? 132 : 0;
  const meta = readMeta(bytes, start);
  const form = meta.syntax ? SYNTAXES[meta.syntax] : guessForm(bytes, meta.end);
  if (!form) throw new ImageProblem("unsupported_compression");
  const body = form.deflated ? await inflateRaw(bytes.subarray(meta.end)) : bytes.subarray(meta.end);
  const reader = { view: new DataView(body.buffer, body.byteOffset, body.byteLength), bytes: body, ...form };
  const tags = readItem(reader, 0, body.length, 0).tags;
  if (!tags.PixelData?.bytes.length) throw new ImageProblem(tags.PixelData?.cut ? "corrupt" : "no_pixel_data");
  return { tags, little: form.little };
}

/** The first value as text in one line; empty where the tag is absent. */
export const textOf = (tags, keyword) => textsOf(tags, keyword)[0] ?? "";

/** All values as texts of printable characters, 64 each at most. */
export function textsOf(tags, keyword) {
  const element = tags[keyword];
  if (!element?.bytes?.length) return [];
  if (isBinary(element.vr)) return binaryNumbers(element).map(String);
  const text = String.fromCharCode(...element.bytes.subarray(0, 4096)).replace(/[ \0]+$/, "");
  return text === "" ? [] : text.split("\\").map((part) => part.replace(/[^\x20-\x7e\xa1-\xff]/g, "").trim().slice(0, MAX_TEXT));
}

/** All values as Code Strings, an empty text for each that has not that form. */
export const codesOf = (tags, keyword) =>
  textsOf(tags, keyword).map((text) => (/^[A-Z0-9_ ]{1,16}$/.test(text.toUpperCase()) ? text.toUpperCase() : ""));

/** The first value as a Code String; an empty text where it has not that form. */
export const codeOf = (tags, keyword) => codesOf(tags, keyword)[0] ?? "";

/** All values as numbers, NaN for one that is empty; none where a value is malformed. */
export function numbersOf(tags, keyword) {
  const element = tags[keyword];
  if (!element) return [];
  if (isBinary(element.vr)) return binaryNumbers(element);
  const numbers = textsOf(tags, keyword).map((text) => (text === "" ? NaN : Number(text)));
  const malformed = textsOf(tags, keyword).some((text, i) => text !== "" && !Number.isFinite(numbers[i]));
  return malformed ? [] : numbers;
}

/** The first value as a number, or `otherwise`. */
export function numberOf(tags, keyword, otherwise) {
  const [first] = numbersOf(tags, keyword);
  return first === undefined || Number.isNaN(first) ? otherwise : first;
}

/** The first value cut to an integer; without a value and an `otherwise` the file cannot be used. */
export function integerOf(tags, keyword, otherwise) {
  const found = numberOf(tags, keyword, otherwise);
  if (found === undefined) throw new ImageProblem("corrupt");
  return Math.trunc(found);
}

/** The first item of a sequence, as tags; null where there is none. */
export const firstItem = (tags, keyword) => tags[keyword]?.items?.[0] ?? null;

const isBinary = (vr) => ["US", "SS", "UL", "SL", "FL", "FD"].includes(vr);

function binaryNumbers({ vr, bytes, little }) {
  const view = new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength);
  const [method, size] = { US: ["getUint16", 2], SS: ["getInt16", 2], UL: ["getUint32", 4], SL: ["getInt32", 4], FL: ["getFloat32", 4], FD: ["getFloat64", 8] }[vr];
  return Array.from({ length: Math.floor(bytes.length / size) }, (_, i) => view[method](i * size, little));
}

/** The transfer syntax, and where the data set begins; group 0002 is always explicit and little endian (PS3.10, 7.1). */
function readMeta(bytes, start) {
  const view = new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength);
  let [position, syntax] = [start, ""];
  while (position + 8 <= bytes.length && view.getUint16(position, true) === 2) {
    const element = view.getUint16(position + 2, true);
    const isLong = LONG_FORM.has(vrAt(bytes, position + 4));
    const length = isLong ? view.getUint32(position + 8, true) : view.getUint16(position + 6, true);
    const value = position + (isLong ? 12 : 8);
    if (element === 0x0010) syntax = String.fromCharCode(...bytes.subarray(value, value + length)).replace(/[ \0]+$/, "");
    position = value + length;
  }
  return { syntax, end: position };
}

const vrAt = (bytes, position) => String.fromCharCode(bytes[position] ?? 0, bytes[position + 1] ?? 0);

/** How a data set without meta information is encoded, by its first element. */
function guessForm(bytes, start) {
  const explicit = /^[A-Z]{2}$/.test(vrAt(bytes, start + 4));
  const little = !explicit || bytes[start] !== 0 || bytes[start + 1] === 0;
  return { explicit, little };
}

async function inflateRaw(bytes) {
  const reader = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate-raw")).getReader();
  const parts = [];
  let size = 0;
  try {
    for (let next = await reader.read(); !next.done; next = await reader.read()) {
      parts.push(next.value);
      size += next.value.length;
      if (size > MAX_FILE_BYTES) throw new ImageProblem("too_large");
    }
  } catch (problem) {
    if (problem instanceof ImageProblem) throw problem;
    if (!size) throw new ImageProblem("corrupt");
  }
  return new Uint8Array(await new Blob(parts).arrayBuffer());
}

/** Reads elements from `position` to `end`, or to the delimiter of an item or a sequence. */
function readItem(reader, position, end, depth) {
  const tags = {};
  if (depth > MOST_NESTED) throw new ImageProblem("corrupt");
  while (position + 8 <= end) {
    const { group, element, vr, length, value } = readHead(reader, position);
    if (group === 0xfffe && (element === 0xe00d || element === 0xe0dd)) return { tags, position: value };
    const keyword = TAGS[`${hex(group)}${hex(element)}`]?.[0];
    if (keyword === "PixelData" && length === UNDEFINED) throw new ImageProblem("unsupported_compression");
    if (vr === "SQ" || length === UNDEFINED) {
      // A value of unknown kind and undefined length is a sequence in implicit VR (PS3.5, 6.2.2, note 2).
      const inner = vr === "UN" ? { ...reader, explicit: false, little: true } : reader;
      const found = readSequence(inner, value, length === UNDEFINED ? UNDEFINED : Math.min(value + length, end), end, depth);
      if (keyword && vr === "SQ") tags[keyword] ??= { vr, items: found.items };
      position = found.position;
      continue;
    }
    const cut = value + length > end;
    const bytes = cut && keyword !== "PixelData" ? null : reader.bytes.subarray(value, cut ? value : value + length);
    if (keyword && bytes) tags[keyword] ??= { vr, bytes, cut, little: reader.little };
    position = value + length;
  }
  return { tags, position };
}

/** Tag, VR, length and where the value begins (PS3.5, 7.1.2 and 7.1.3). */
function readHead({ view, bytes, explicit, little }, position) {
  const group = view.getUint16(position, little);
  const element = view.getUint16(position + 2, little);
  const known = TAGS[`${hex(group)}${hex(element)}`]?.[1] ?? "UN";
  if (group === 0xfffe || !explicit) return { group, element, vr: known, length: view.getUint32(position + 4, little), value: position + 8 };
  const vr = vrAt(bytes, position + 4);
  if (!/^[A-Z]{2}$/.test(vr)) throw new ImageProblem("corrupt");
  if (!LONG_FORM.has(vr)) return { group, element, vr, length: view.getUint16(position + 6, little), value: position + 8 };
  if (position + 12 > bytes.length) throw new ImageProblem("corrupt");
  return { group, element, vr, length: view.getUint32(position + 8, little), value: position + 12 };
}

function readSequence(reader, position, stop, end, depth) {
  const items = [];
  const last = stop === UNDEFINED ? end : stop;
  while (position + 8 <= last) {
    const { group, element, length, value } = readHead(reader, position);
    if (group !== 0xfffe) throw new ImageProblem("corrupt");
    if (element === 0xe0dd) return { items, position: value };
    const item = readItem(reader, value, length === UNDEFINED ? last : Math.min(value + length, last), depth + 1);
    items.push(item.tags);
    position = length === UNDEFINED ? item.position : value + length;
  }
  return { items, position: stop === UNDEFINED ? position : stop };
}

const hex = (number) => number.toString(16).toUpperCase().padStart(4, "0");
