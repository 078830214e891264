// Files that are no DICOM: the format is found by the content, PNG is decoded here, the others by the browser.

import { ImageProblem, checkSize, luma, orient } from "./pixels.js";
import { decodePng } from "./png.js";

const COLOUR_SIDE_PX = 64;
const STRIP_ROWS = 256; // phones limit the area of a canvas
const TYPES = { jpeg: "image/jpeg", bmp: "image/bmp", webp: "image/webp" };

/** The format by the first bytes, as `_find_format` of `pneumofed.common.imaging.images` finds it. */
export function findFormat(bytes) {
  const begins = (text, start = 0) => [...text].every((letter, i) => bytes[start + i] === letter.charCodeAt(0));
  if (!bytes.length) throw new ImageProblem("empty");
  if (begins("DICM", 128)) return "dicom";
  if (begins("\xff\xd8\xff")) return "jpeg";
  if (begins("\x89PNG\r\n\x1a\n")) return "png";
  if (["II*\0", "MM\0*", "II+\0", "MM\0+"].some((magic) => begins(magic))) throw new ImageProblem("tiff");
  if (begins("RIFF") && begins("WEBP", 8)) return "webp";
  if (begins("BM") && begins("\0\0\0", 15)) return "bmp";
  if (["\x02\0", "\x08\0", "\0\x08\0"].some((magic) => begins(magic))) return "dicom";
  if (["PK\x03\x04", "Rar!", "7z\xbc\xaf", "\x1f\x8b"].some((magic) => begins(magic))) throw new ImageProblem("archive_file");
  throw new ImageProblem("unknown_format");
}

/** Decodes a picture to {height, width, pixels, info}, grey values in [0, 1]. */
export async function decodeRaster(bytes, format) {
  const found = format === "png" ? await decodePng(bytes) : await decodeInBrowser(bytes, format);
  const { height, width, grey, levels, rgb, orientation } = found;
  let [least, most] = [levels + 1, -1];
  for (const value of grey) {
    if (value < least) least = value;
    if (value > most) most = value;
  }
  if (least === most) throw new ImageProblem("constant");
  const pixels = new Float32Array(grey.length);
  for (let i = 0; i < grey.length; i++) pixels[i] = grey[i] / levels;
  const colour = rgb ? measureColour(height, width, rgb) : 0;
  const image = orient({ height, width, pixels }, orientation);
  const info = { format, height_px: image.height, width_px: image.width, bits: Math.ceil(Math.log2(levels + 1)), colour, groups: {} };
  return { ...image, info };
}

/** Mean distance of the largest to the smallest of red, green and blue in [0, 1], on the picture reduced to about 64 pixels. */
export function measureColour(height, width, rgb) {
  const factor = Math.max(1, Math.floor(Math.min(height, width) / COLOUR_SIDE_PX));
  let [sum, blocks] = [0, 0];
  for (let top = 0; top < height; top += factor) {
    for (let left = 0; left < width; left += factor) {
      const mean = meanColour(rgb, width, [top, Math.min(height, top + factor)], [left, Math.min(width, left + factor)]);
      sum += Math.max(...mean) - Math.min(...mean);
      blocks++;
    }
  }
  return sum / blocks / 255;
}

function meanColour(rgb, width, rows, columns) {
  const sums = [0, 0, 0];
  for (let y = rows[0]; y < rows[1]; y++) {
    for (let x = columns[0]; x < columns[1]; x++) rgb(y * width + x).forEach((value, s) => (sums[s] += value));
  }
  const count = (rows[1] - rows[0]) * (columns[1] - columns[0]);
  return sums.map((sum) => Math.floor((sum + Math.floor(count / 2)) / count));
}

async function decodeInBrowser(bytes, format) {
  if (format === "jpeg") checkJpeg(bytes);
  if (format === "webp" && isAnimated(bytes)) throw new ImageProblem("multi_frame");
  const options = { colorSpaceConversion: "none", premultiplyAlpha: "default", imageOrientation: "from-image" };
  const bitmap = await createImageBitmap(new Blob([bytes], { type: TYPES[format] }), options).catch(() => {
    throw new ImageProblem("corrupt");
  });
  const { height, width } = bitmap;
  checkSize(height, width);
  if (!canvasIsTrue()) throw new ImageProblem("canvas");
  const colours = new Uint8Array(3 * height * width);
  const grey = new Uint8Array(height * width);
  let coloured = false;
  const context = drawingOf(width, Math.min(height, STRIP_ROWS));
  for (let top = 0; top < height; top += STRIP_ROWS) {
    const rows = Math.min(STRIP_ROWS, height - top);
    context.fillRect(0, 0, width, rows); // what is transparent becomes black
    context.drawImage(bitmap, 0, top, width, rows, 0, 0, width, rows);
    const { data } = context.getImageData(0, 0, width, rows);
    for (let i = 0; i < rows * width; i++) {
      const [red, green, blue] = [data[4 * i], data[4 * i + 1], data[4 * i + 2]];
      const place = top * width + i;
      grey[place] = luma(red, green, blue);
      [colours[3 * place], colours[3 * place + 1], colours[3 * place + 2]] = [red, green, blue];
      coloured ||= red !== green || green !== blue;
    }
  }
  bitmap.close();
  return { height, width, grey, levels: 255, orientation: 1, rgb: coloured ? (i) => colours.subarray(3 * i, 3 * i + 3) : null };
}

function drawingOf(width, height) {
  const canvas = Object.assign(document.createElement("canvas"), { width, height });
  const context = canvas.getContext("2d", { alpha: false, willReadFrequently: true, colorSpace: "srgb" });
  if (!context) throw new ImageProblem("too_large");
  context.imageSmoothingEnabled = false;
  return context;
}

/** Whether the canvas gives back what was put into it: browsers that hide from fingerprinting change it, and with it the radiograph. */
function canvasIsTrue() {
  const context = drawingOf(16, 16);
  const put = context.createImageData(16, 16);
  for (let i = 0; i < put.data.length; i++) put.data[i] = i % 4 === 3 ? 255 : (i * 37) % 256;
  context.putImageData(put, 0, 0);
  return context.getImageData(0, 0, 16, 16).data.every((value, i) => value === put.data[i]);
}

/** Size and kind by the frame header (ITU-T T.81, B.2.2), before anything is decoded. */
function checkJpeg(bytes) {
  for (let position = 2; position + 10 <= bytes.length && bytes[position] === 0xff; ) {
    const marker = bytes[position + 1];
    if (marker >= 0xc0 && marker <= 0xcf && ![0xc4, 0xc8, 0xcc].includes(marker)) {
      checkSize((bytes[position + 5] << 8) | bytes[position + 6], (bytes[position + 7] << 8) | bytes[position + 8]);
      if (bytes[position + 9] === 4) throw new ImageProblem("colour"); // inks (CMYK): browsers differ in how they are shown
      return;
    }
    position += marker === 0xff ? 1 : 2 + ((bytes[position + 2] << 8) | bytes[position + 3]);
  }
  throw new ImageProblem("corrupt");
}

/** The animation bit of a WebP file (RFC 9649, 2.7). */
function isAnimated(bytes) {
  return String.fromCharCode(...bytes.subarray(12, 16)) === "VP8X" && Boolean(bytes[20] & 2);
}
