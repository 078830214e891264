// From stored values to grey: modality LUT or rescale, VOI LUT or window, inversion (PS3.3, C.11; PS3.4, N.2), with the formulas and the
// order of `pneumofed.common.imaging.dicom_decode` and `dicom_pixels`, on the distinct values of the image.

import { codeOf, firstItem, integerOf, numberOf, numbersOf, parseDicom } from "./dicom.js";
import { checkSize, clip, ImageProblem, resize, roundHalfEven } from "./pixels.js";
import { groupsOf, readBodyPart, readView } from "./views.js";

const CODES = 65536;
const LUNG_WINDOW = { center: -600, width: 1500 };
const ASPECT_TAGS = ["PixelSpacing", "ImagerPixelSpacing", "NominalScannedPixelSpacing", "PixelAspectRatio"];
const [MIN_DIFFERENCE, MAX_RATIO] = [0.01, 4];

/**
 * Decodes an uncompressed DICOM radiograph.
 * @param {Uint8Array} bytes of the file.
 * @param {{window, codes}} settings `window` {center, width} replaces the file's own; `codes` are the coded views and regions.
 * @returns {Promise<{height, width, pixels, info}>}
 */
export async function decodeDicom(bytes, { window, codes }) {
  const { tags, little } = await parseDicom(bytes);
  const layout = readLayout(tags);
  const [height, width] = squareShape(tags, layout.rows, layout.columns);
  checkSize(height, width);
  const stored = readCodes(tags.PixelData, layout, little);
  const values = distinct(stored, layout.signed);
  const tissue = values.filter((value) => !isPadding(tags, layout, value));
  const grey = greyOf(tags, tissue, window, little);
  const isInverted = layout.photometric === "MONOCHROME1" || codeOf(tags, "PresentationLUTShape") === "INVERSE";
  const table = new Float32Array(CODES);
  tissue.forEach((value, i) => (table[value & 0xffff] = isInverted ? 1 - grey[i] : grey[i]));
  const pixels = new Float32Array(stored.length);
  for (let i = 0; i < stored.length; i++) pixels[i] = table[stored[i]];
  const image = { height: layout.rows, width: layout.columns, pixels };
  const shaped = height === layout.rows && width === layout.columns ? image : clip(resize(image, height, width));
  return { ...shaped, info: describe(tags, layout, height, width, codes) };
}

function describe(tags, layout, height, width, codes) {
  const view = readView(tags, codes.views);
  return {
    format: "dicom", height_px: height, width_px: width, bits: layout.stored, colour: 0, view,
    modality: codeOf(tags, "Modality"), body_part: readBodyPart(tags, codes.regions), groups: groupsOf(tags, view),
  };
}

/** The Image Pixel module (PS3.3, C.7.6.3), checked. */
function readLayout(tags) {
  if (integerOf(tags, "NumberOfFrames", 1) > 1) throw new ImageProblem("multi_frame");
  const photometric = codeOf(tags, "PhotometricInterpretation");
  if (!photometric) throw new ImageProblem("corrupt");
  if (integerOf(tags, "SamplesPerPixel", 1) !== 1 || !["MONOCHROME1", "MONOCHROME2"].includes(photometric)) throw new ImageProblem("colour");
  const rows = integerOf(tags, "Rows");
  const columns = integerOf(tags, "Columns");
  checkSize(rows, columns);
  const allocated = integerOf(tags, "BitsAllocated");
  const stored = integerOf(tags, "BitsStored", allocated);
  if (![8, 16].includes(allocated) || stored < 8 || stored > allocated) throw new ImageProblem("unsupported_bits");
  const high = integerOf(tags, "HighBit", stored - 1);
  const usable = stored <= high + 1 && high + 1 <= allocated ? high : stored - 1; // PS3.5, 8.1.1
  return { rows, columns, allocated, stored, high: usable, signed: integerOf(tags, "PixelRepresentation", 0) === 1, photometric };
}

/** Stored values without what lies beside them in their words, as 16 bits, negative ones in two's complement. */
function readCodes(element, { rows, columns, allocated, stored, high, signed }, little) {
  const count = rows * columns;
  const { bytes, vr } = element;
  if (bytes.length < (count * allocated) / 8) throw new ImageProblem("corrupt");
  const view = new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength);
  const swapped = !little && vr === "OW"; // bytes in words of 16 bits (PS3.5, 8.1.2)
  const [up, down] = [32 - 1 - high, 32 - stored];
  const codes = new Uint16Array(count);
  for (let i = 0; i < count; i++) {
    const raw = allocated === 16 ? view.getUint16(2 * i, little) : bytes[swapped ? i ^ 1 : i];
    codes[i] = signed ? (raw << up) >> down : (raw << up) >>> down;
  }
  return codes;
}

/** The distinct stored values, in the order of their codes. */
function distinct(codes, signed) {
  const seen = new Uint8Array(CODES);
  for (const code of codes) seen[code] = 1;
  const found = [];
  for (let code = 0; code < CODES; code++) if (seen[code]) found.push(signed ? (code << 16) >> 16 : code);
  return found;
}

/** Pixel Padding Value (0028,0120) up to its Range Limit (0028,0121): PS3.3, C.7.5.1.1.2. */
function isPadding(tags, layout, value) {
  const padding = numberOf(tags, "PixelPaddingValue", NaN);
  const span = 2 ** layout.allocated;
  const least = layout.signed ? -span / 2 : 0;
  const ends = [padding, numberOf(tags, "PixelPaddingRangeLimit", padding)].map((end) => ((((end - least) % span) + span) % span) + least);
  return value >= Math.min(...ends) && value <= Math.max(...ends);
}

function greyOf(tags, stored, window, little) {
  const values = applyModality(tags, stored, little);
  if (!differ(values)) throw new ImageProblem("constant");
  const grey = applyVoi(tags, values, window, little);
  if (!differ(grey)) throw new ImageProblem("constant");
  return grey;
}

const differ = (values) => values.some((value) => value !== values[0]);

function applyModality(tags, stored, little) {
  const table = readTable(tags, "ModalityLUTSequence", stored, little);
  if (table) return stored.map((value) => lookUp(table, value));
  const slope = numberOf(tags, "RescaleSlope", 1) || 1;
  const intercept = numberOf(tags, "RescaleIntercept", 0);
  return stored.map((value) => value * slope + intercept);
}

/** The window that is given, else what the file says first (PS3.3, C.11.2.1), else for CT the lung window, else the whole range. */
function applyVoi(tags, values, given, little) {
  if (given) return values.map((value) => windowed(value, given, "LINEAR"));
  const table = readTable(tags, "VOILUTSequence", values, little);
  if (table) {
    const full = fullScale(table);
    return values.map((value) => Math.min(1, Math.max(0, lookUp(table, value) / full)));
  }
  const window = fileWindow(tags);
  if (window) return values.map((value) => windowed(value, window, codeOf(tags, "VOILUTFunction")));
  if (codeOf(tags, "Modality") === "CT") return values.map((value) => windowed(value, LUNG_WINDOW, "LINEAR"));
  const low = values.reduce((least, value) => Math.min(least, value));
  const high = values.reduce((most, value) => Math.max(most, value));
  return values.map((value) => (value - low) / (high - low));
}

function fileWindow(tags) {
  const widths = numbersOf(tags, "WindowWidth");
  const pairs = numbersOf(tags, "WindowCenter").map((center, i) => ({ center, width: widths[i] }));
  return pairs.find(({ center, width }) => !Number.isNaN(center) && width > 0);
}

/** PS3.3, C.11.2.1.2.1 and C.11.2.1.3, to [0, 1]. */
function windowed(value, { center, width }, kind) {
  const offset = value - center;
  if (kind === "SIGMOID") return 1 / (1 + Math.exp(Math.min(700, Math.max(-700, (-4 * offset) / width))));
  if (kind !== "LINEAR_EXACT" && width === 1) return offset > -0.5 ? 1 : 0;
  const part = kind !== "LINEAR_EXACT" && width > 1 ? (offset + 0.5) / (width - 1) : offset / width;
  return Math.min(1, Math.max(0, part + 0.5));
}

/** The first item of a LUT sequence (PS3.3, C.11.1.1.1); null where there is none or it is malformed. */
function readTable(tags, keyword, inputs, little) {
  const item = firstItem(tags, keyword);
  const descriptor = item ? numbersOf(item, "LUTDescriptor").map(Math.trunc) : [];
  if (descriptor.length !== 3 || !item.LUTData) return null;
  const count = ((descriptor[0] % CODES) + CODES) % CODES || CODES;
  const entries = tableEntries(item.LUTData, descriptor[2] <= 8 ? 2 * count : 0, little).slice(0, count);
  if (!entries.length) return null;
  return { first: firstInput(descriptor[1], entries.length, inputs), entries, bits: Math.min(16, Math.max(8, descriptor[2])) };
}

/** Fewer than `minBytes` bytes are entries of 8 bits, one in each byte. */
function tableEntries({ vr, bytes }, minBytes, little) {
  if (vr !== "US" && bytes.length < minBytes) return Array.from(bytes);
  const view = new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength);
  return Array.from({ length: bytes.length >> 1 }, (_, i) => view.getUint16(2 * i, little));
}

/** Of the two readings of the first input's 16 bits the one whose table holds more of the inputs. */
function firstInput(first, count, inputs) {
  const other = first >= CODES / 2 ? first - CODES : first < 0 ? first + CODES : first;
  const held = [first, other].map((start) => inputs.filter((value) => value >= start && value < start + count).length);
  return held[1] > held[0] ? other : first;
}

function lookUp({ first, entries }, value) {
  return entries[Math.min(entries.length - 1, Math.max(0, roundHalfEven(value - first)))];
}

/** The entry that is shown white: 2^n - 1, with n the bits that the entries use (`LookupTable.full_scale`). */
function fullScale({ entries, bits }) {
  const most = entries.reduce((largest, value) => Math.max(largest, value));
  const used = Math.max(8, Math.trunc(most).toString(2).length);
  return 2 ** (used <= bits && bits < used + 2 ? bits : used) - 1;
}

/** Rows and columns with square pixels; the longer side of a pixel is divided. */
function squareShape(tags, rows, columns) {
  const ratio = heightToWidth(tags);
  if (Math.abs(ratio - 1) < MIN_DIFFERENCE || ratio < 1 / MAX_RATIO || ratio > MAX_RATIO) return [rows, columns];
  return ratio > 1 ? [roundHalfEven(rows * ratio), columns] : [rows, roundHalfEven(columns / ratio)];
}

function heightToWidth(tags) {
  for (const keyword of ASPECT_TAGS) {
    const values = numbersOf(tags, keyword);
    if (values.length === 2 && values.every((value) => value > 0)) return values[0] / values[1];
  }
  return 1;
}
