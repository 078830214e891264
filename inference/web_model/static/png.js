// PNG (ISO/IEC 15948), decoded here and not by the browser, which would cut 16 bits to 8 and apply what the file says of colours. Grey
// values are those that Pillow gives: `_to_grey` of `pneumofed.common.imaging.images`.

import { checkSize, ImageProblem, luma } from "./pixels.js";

const SAMPLES = { 0: 1, 2: 3, 3: 1, 4: 2, 6: 4 }; // by colour type: grey, RGB, palette, grey and alpha, RGBA
const DEPTHS = { 0: [1, 2, 4, 8, 16], 2: [8, 16], 3: [1, 2, 4, 8], 4: [8, 16], 6: [8, 16] };
const ADAM7 = [[0, 0, 8, 8], [0, 4, 8, 8], [4, 0, 8, 4], [0, 2, 4, 4], [2, 0, 4, 2], [0, 1, 2, 2], [1, 0, 2, 1]]; // row, column, and their steps

/**
 * Decodes a PNG file.
 * @returns {Promise<{height, width, grey, levels, rgb, orientation}>} `grey` holds values from 0 to `levels`; `rgb` a function of a place
 *   that gives red, green and blue for measuring colour, null for a grey file.
 */
export async function decodePng(bytes) {
  const file = readChunks(bytes);
  const { height, width, depth, type, interlaced } = file;
  checkSize(height, width);
  if (!DEPTHS[type]?.includes(depth)) throw new ImageProblem("corrupt");
  const passes = interlaced ? ADAM7 : [[0, 0, 1, 1]];
  const bits = depth * SAMPLES[type];
  const sizes = passes.map(([top, left, down, across]) => [Math.ceil((height - top) / down), Math.ceil((width - left) / across)]);
  const rowBytes = (columns) => Math.ceil((columns * bits) / 8);
  const total = sizes.reduce((sum, [rows, columns]) => sum + (rows > 0 && columns > 0 ? rows * (1 + rowBytes(columns)) : 0), 0);
  const data = await inflate(file.data, total);
  const samples = new (depth === 16 ? Uint16Array : Uint8Array)(height * width * SAMPLES[type]);
  let position = 0;
  passes.forEach(([top, left, down, across], pass) => {
    const [rows, columns] = sizes[pass];
    if (!(rows > 0 && columns > 0)) return;
    const length = rowBytes(columns);
    const lines = unfilter(data.subarray(position, position + rows * (1 + length)), rows, length, Math.max(1, bits >> 3));
    position += rows * (1 + length);
    for (let y = 0; y < rows; y++) {
      const line = lines.subarray(y * length, (y + 1) * length);
      for (let x = 0; x < columns; x++) {
        const target = ((top + y * down) * width + left + x * across) * SAMPLES[type];
        for (let s = 0; s < SAMPLES[type]; s++) samples[target + s] = sampleAt(line, x * SAMPLES[type] + s, depth);
      }
    }
  });
  return { height, width, orientation: file.orientation, ...toGrey(samples, file) };
}

function readChunks(bytes) {
  const view = new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength);
  const file = { parts: [], palette: null, transparency: null, significant: 0, orientation: 1 };
  for (let position = 8; position + 12 <= bytes.length; ) {
    const length = view.getUint32(position);
    const name = String.fromCharCode(...bytes.subarray(position + 4, position + 8));
    const content = bytes.subarray(position + 8, position + 8 + length);
    if (content.length < length) throw new ImageProblem("corrupt");
    if (name === "IHDR") readHeader(file, content);
    else if (name === "PLTE") file.palette = content;
    else if (name === "tRNS") file.transparency = content;
    else if (name === "sBIT" && !file.parts.length) file.significant = content[0] ?? 0;
    else if (name === "eXIf") file.orientation = readOrientation(content);
    else if (name === "IDAT") file.parts.push(content);
    else if (name === "IEND") break;
    position += 12 + length;
  }
  if (!file.parts.length || !file.width || (file.type === 3 && !file.palette)) throw new ImageProblem("corrupt");
  return { ...file, data: new Blob(file.parts) };
}

function readHeader(file, content) {
  if (content.length < 13) throw new ImageProblem("corrupt");
  const view = new DataView(content.buffer, content.byteOffset, content.byteLength);
  const [depth, type, , , interlace] = content.subarray(8);
  Object.assign(file, { width: view.getUint32(0), height: view.getUint32(4), depth, type, interlaced: interlace === 1 });
}

/** The orientation in the first directory of EXIF data (TIFF 6.0, section 2); 1 where there is none. */
export function readOrientation(content) {
  if (content.length < 14) return 1;
  const view = new DataView(content.buffer, content.byteOffset, content.byteLength);
  const little = view.getUint16(0) === 0x4949;
  const start = view.getUint32(4, little);
  if (start + 2 > content.length) return 1;
  for (let i = 0; i < view.getUint16(start, little) && start + 2 + 12 * (i + 1) <= content.length; i++) {
    const entry = start + 2 + 12 * i;
    if (view.getUint16(entry, little) === 0x0112) return view.getUint16(entry + 8, little);
  }
  return 1;
}

/** The first `total` bytes of a zlib stream; what stands behind them does not count. */
async function inflate(blob, total) {
  const reader = blob.stream().pipeThrough(new DecompressionStream("deflate")).getReader();
  const data = new Uint8Array(total);
  let filled = 0;
  try {
    while (filled < total) {
      const { done, value } = await reader.read();
      if (done) break;
      const part = value.subarray(0, total - filled);
      data.set(part, filled);
      filled += part.length;
    }
  } catch {
    throw new ImageProblem("corrupt");
  }
  reader.cancel().catch(() => {});
  if (filled < total) throw new ImageProblem("corrupt");
  return data;
}

/** Undoes the filters of each line (clause 9), in place, and returns the lines without their filter bytes. */
function unfilter(data, rows, length, step) {
  const lines = new Uint8Array(rows * length);
  for (let y = 0; y < rows; y++) {
    const kind = data[y * (1 + length)];
    if (kind > 4) throw new ImageProblem("corrupt");
    const start = y * length;
    for (let x = 0; x < length; x++) {
      const left = x >= step ? lines[start + x - step] : 0;
      const above = y ? lines[start - length + x] : 0;
      const corner = y && x >= step ? lines[start - length + x - step] : 0;
      const guess = [0, left, above, (left + above) >> 1][kind] ?? paeth(left, above, corner);
      lines[start + x] = data[y * (1 + length) + 1 + x] + guess;
    }
  }
  return lines;
}

function paeth(left, above, corner) {
  const guess = left + above - corner;
  const [toLeft, toAbove, toCorner] = [Math.abs(guess - left), Math.abs(guess - above), Math.abs(guess - corner)];
  if (toLeft <= toAbove && toLeft <= toCorner) return left;
  return toAbove <= toCorner ? above : corner;
}

function sampleAt(line, place, depth) {
  if (depth === 16) return (line[2 * place] << 8) | line[2 * place + 1];
  if (depth === 8) return line[place];
  const perByte = 8 / depth;
  return (line[Math.floor(place / perByte)] >> (8 - depth * ((place % perByte) + 1))) & (2 ** depth - 1);
}

function toGrey(samples, file) {
  const { height, width, depth, type, significant } = file;
  const count = height * width;
  if (type === 0 && depth === 16) {
    const most = samples.reduce((largest, value) => Math.max(largest, value), 0);
    return { grey: samples, levels: 2 ** depthOf(most, significant) - 1, rgb: null };
  }
  const rgba = (type === 3 ? fromPalette : toEightBits)(samples, file, new Uint8Array(4 * count));
  const grey = new Uint8Array(count);
  for (let i = 0; i < count; i++) {
    const alpha = rgba[4 * i + 3];
    grey[i] = luma(onBlack(rgba[4 * i], alpha), onBlack(rgba[4 * i + 1], alpha), onBlack(rgba[4 * i + 2], alpha));
  }
  return { grey, levels: 255, rgb: type === 0 || type === 4 ? null : (i) => rgba.subarray(4 * i, 4 * i + 3) };
}

function fromPalette(samples, { palette, transparency }, rgba) {
  for (let i = 0; i < samples.length; i++) {
    for (let s = 0; s < 3; s++) rgba[4 * i + s] = palette[3 * samples[i] + s] ?? 0;
    rgba[4 * i + 3] = transparency?.[samples[i]] ?? 255;
  }
  return rgba;
}

/** Of 16 bits the upper ones, as Pillow's raw modes "RGB;16B", "LA;16B" and "RGBA;16B"; fewer than 8 are spread over the range. */
function toEightBits(samples, { depth, type, transparency }, rgba) {
  const size = SAMPLES[type];
  const isGrey = type === 0 || type === 4;
  const scale = type === 0 ? 255 / (2 ** depth - 1) : 1;
  const key = transparency && Array.from({ length: size }, (_, s) => (transparency[2 * s] << 8) | transparency[2 * s + 1]);
  for (let i = 0; i < rgba.length / 4; i++) {
    let matches = Boolean(key);
    for (let s = 0; s < size; s++) {
      const value = depth === 16 ? samples[i * size + s] >> 8 : samples[i * size + s] * scale;
      rgba[4 * i + s] = value;
      matches &&= value === key[s];
    }
    const alpha = type >= 4 ? rgba[4 * i + size - 1] : matches ? 0 : 255;
    if (isGrey) rgba[4 * i + 1] = rgba[4 * i + 2] = rgba[4 * i];
    rgba[4 * i + 3] = alpha;
  }
  return rgba;
}

/** A colour over black, in the fixed point of Pillow's AlphaComposite.c. */
function onBlack(value, alpha) {
  if (alpha === 255) return value;
  const sum = value * alpha * 128 + 0x4000;
  return (((sum >> 8) + sum) >> 8) >> 7;
}

/** Bits that 16-bit values fill: `_depth_of` of `pneumofed.common.imaging.images`. */
function depthOf(most, significant) {
  const depths = significant >= 8 && significant < 16 ? [significant] : [8, 10, 12, 14];
  return depths.find((depth) => most < 2 ** depth) ?? 16;
}
