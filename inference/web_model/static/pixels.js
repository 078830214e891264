// Grey values from a file to the network's input. Every step is the arithmetic of `pneumofed.common.imaging.images`, which is Pillow's, so
// that the same pixels give the same input to the last bit.

export const MIN_SIDE_PX = 16;
export const MAX_SIDE_PX = 16384;
export const MAX_PIXELS = 1e8;
export const MAX_FILE_BYTES = 512 * 2 ** 20;

/** A file that cannot be used; `reason` is the word of `pneumofed.common.errors.SkipReason`, in small letters. */
export class ImageProblem extends Error {
  constructor(reason) {
    super(reason);
    this.reason = reason;
  }
}

/** Refuses an image by its declared size, before memory is taken for it. */
export function checkSize(height, width) {
  if (!(Math.min(height, width) >= MIN_SIDE_PX)) throw new ImageProblem("too_small");
  if (Math.max(height, width) > MAX_SIDE_PX || height * width > MAX_PIXELS) throw new ImageProblem("too_large");
}

/** Luma of ITU-R BT.601-2, rounded as Pillow rounds it (`L24` of its Convert.c); all in 0 to 255. */
export const luma = (red, green, blue) => (red * 19595 + green * 38470 + blue * 7471 + 0x8000) >> 16;

/** Rounds halves to the even neighbour, as Python and NumPy do. */
export function roundHalfEven(value) {
  const low = Math.floor(value);
  const rest = value - low;
  if (rest !== 0.5) return rest < 0.5 ? low : low + 1;
  return low % 2 === 0 ? low : low + 1;
}

/** Pillow's bilinear resampling (Resample.c, 32 bits a channel): a triangle as wide as the reduction, along rows and then columns. */
export function resize(image, height, width) {
  const across = width === image.width ? image : alongRows(image, width);
  return height === image.height ? across : alongColumns(across, height);
}

/** Clips to [0, 1], in place. */
export function clip(image) {
  const { pixels } = image;
  for (let i = 0; i < pixels.length; i++) pixels[i] = Math.min(1, Math.max(0, pixels[i]));
  return image;
}

/** A square of `size` pixels a side with the aspect ratio kept: `pad` adds black, `crop` cuts the longer side. */
export function fitSquare(image, size, fit) {
  const { height, width } = image;
  if (fit === "crop") {
    const side = Math.min(height, width);
    const cut = crop(image, Math.floor((height - side) / 2), Math.floor((width - side) / 2), side, side);
    return clip(resize(cut, size, size));
  }
  const scale = size / Math.max(height, width);
  const rows = Math.max(1, roundHalfEven(height * scale));
  const columns = Math.max(1, roundHalfEven(width * scale));
  const inner = clip(resize({ ...image, pixels: image.pixels.slice() }, rows, columns));
  const square = { height: size, width: size, pixels: new Float32Array(size * size) };
  const top = Math.floor((size - rows) / 2);
  const left = Math.floor((size - columns) / 2);
  for (let y = 0; y < rows; y++) square.pixels.set(inner.pixels.subarray(y * columns, (y + 1) * columns), (top + y) * size + left);
  return square;
}

/** What the network sees, in the 256 grey levels that the training cache keeps: `model_input` of the predictor. */
export function modelInput(image, { size_px: size, fit }) {
  const square = fitSquare(image, size, fit);
  const { pixels } = square;
  for (let i = 0; i < pixels.length; i++) pixels[i] = roundHalfEven(Math.fround(pixels[i] * 255)) / 255;
  return square;
}

/** The part of an image that begins at row `top` and column `left`; a copy. */
export function crop(image, top, left, height, width) {
  const pixels = new Float32Array(height * width);
  for (let y = 0; y < height; y++) {
    const start = (top + y) * image.width + left;
    pixels.set(image.pixels.subarray(start, start + width), y * width);
  }
  return { height, width, pixels };
}

/** Turns and mirrors by the orientation of EXIF 2.32, 4.6.4, tag 0112 (1 to 8); 1 and what is none of these change nothing. */
export function orient(image, orientation) {
  if (!(orientation > 1 && orientation <= 8)) return image;
  const { height, width, pixels } = image;
  const [rows, columns] = orientation > 4 ? [width, height] : [height, width];
  const turned = new pixels.constructor(pixels.length);
  const from = [
    (y, x) => [y, width - 1 - x], (y, x) => [height - 1 - y, width - 1 - x], (y, x) => [height - 1 - y, x], (y, x) => [x, y],
    (y, x) => [height - 1 - x, y], (y, x) => [height - 1 - x, width - 1 - y], (y, x) => [x, width - 1 - y],
  ][orientation - 2];
  for (let y = 0; y < rows; y++) {
    for (let x = 0; x < columns; x++) {
      const [row, column] = from(y, x);
      turned[y * columns + x] = pixels[row * width + column];
    }
  }
  return { ...image, height: rows, width: columns, pixels: turned };
}

/** Where each of `outSize` places looks, and with which weights (`precompute_coeffs` of Resample.c). */
function weightsOf(inSize, outSize) {
  const scale = inSize / outSize;
  const support = Math.max(scale, 1);
  const found = [];
  for (let place = 0; place < outSize; place++) {
    const center = (place + 0.5) * scale;
    const first = Math.max(0, Math.trunc(center - support + 0.5));
    const last = Math.min(inSize, Math.trunc(center + support + 0.5));
    const weights = new Float64Array(last - first);
    let sum = 0;
    for (let i = 0; i < weights.length; i++) {
      weights[i] = Math.max(0, 1 - Math.abs((i + first - center + 0.5) * (1 / support)));
      sum += weights[i];
    }
    if (sum !== 0) for (let i = 0; i < weights.length; i++) weights[i] /= sum;
    found.push({ first, weights });
  }
  return found;
}

function alongRows({ height, width, pixels }, columns) {
  const places = weightsOf(width, columns);
  const out = new Float32Array(height * columns);
  for (let y = 0; y < height; y++) {
    for (let x = 0; x < columns; x++) {
      const { first, weights } = places[x];
      const start = y * width + first;
      let sum = 0;
      for (let i = 0; i < weights.length; i++) sum += pixels[start + i] * weights[i];
      out[y * columns + x] = sum;
    }
  }
  return { height, width: columns, pixels: out };
}

function alongColumns({ height, width, pixels }, rows) {
  const places = weightsOf(height, rows);
  const out = new Float32Array(rows * width);
  for (let y = 0; y < rows; y++) {
    const { first, weights } = places[y];
    for (let x = 0; x < width; x++) {
      let sum = 0;
      for (let i = 0; i < weights.length; i++) sum += pixels[(first + i) * width + x] * weights[i];
      out[y * width + x] = sum;
    }
  }
  return { height: rows, width, pixels: out };
}
