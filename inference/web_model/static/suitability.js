// Whether an image can be judged: what its file says of itself, and the three tests of `pneumofed.common.model_bundle.suitability`, whose
// densities and limits the bundle holds. Statistics are those of `pneumofed.common.model_bundle.image_statistics`, in double precision.

import { clip, crop, resize } from "./pixels.js";
import { isFrontal, isOtherPart } from "./views.js";

const THUMBNAIL_PX = 64;
const PADDING_GREY = Math.fround(0.02);
const CELLS_PER_SIDE = 8;
const BINS = 32;
const TINY = 1e-6;
const RADIOGRAPHY = ["CR", "DX", "DR", "RG", "XR", "OT", "SC"];

/** What in the file's own account speaks against a frontal chest radiograph: `header_reasons`. */
export function headerReasons(info, { parts, max_aspect: maxAspect, max_colour: maxColour }) {
  const sides = [info.height_px, info.width_px];
  const rules = [
    ["not_a_radiograph", Boolean(info.modality) && !RADIOGRAPHY.includes(info.modality)],
    ["not_the_chest", isOtherPart(info.body_part ?? "", parts)],
    ["not_frontal", !isFrontal(info.view ?? "")],
    ["colour", info.colour > maxColour],
    ["shape", Math.max(...sides) > maxAspect * Math.min(...sides)],
  ];
  return rules.filter(([, applies]) => applies).map(([reason]) => reason);
}

/**
 * The tests' scores of an image, the larger the stranger, and the turn that brings it nearest to the reference.
 * @param {{features, pixels, cells}} suitability whose densities count, as `openDensity` gives them.
 * @param {{height, width, pixels}} square the network's input.
 * @param {Float32Array} features the classifier's input.
 */
export function scoresOf(suitability, square, features) {
  const grey = thumbnail(square);
  const turned = [turn(grey), turn(turn(grey)), turn(turn(turn(grey))), grey.map((value) => 1 - value)];
  const distances = turned.map((one) => distance(suitability.cells, cellsOf(one)));
  const nearest = Math.min(...distances);
  return {
    features: distance(suitability.features, features),
    pixels: distance(suitability.pixels, statisticsOf(grey)),
    turn: distance(suitability.cells, cellsOf(grey)) - nearest,
    isInverted: distances.indexOf(nearest) === 3,
  };
}

/** The reasons of the tests that refuse, the most specific one first. A score that is no number refuses. */
export function testReasons(scores, limits) {
  const refuses = (test) => !(scores[test] <= (limits[test] ?? Infinity));
  const found = [["turn", scores.isInverted ? "inverted" : "turned"], ["pixels", "unlike_reference"], ["features", "far_from_reference"]];
  return found.filter(([test]) => refuses(test)).map(([, reason]) => reason);
}

/** A density of the manifest with its numbers unpacked. */
export function openDensity({ mean, scale, axes, variances, rest }) {
  return { mean: unpack(mean), scale: unpack(scale), axes: unpack(axes), variances: unpack(variances), rest };
}

/** Squared Mahalanobis distance of a point from the mean, divided by the dimensions: `Density.distance`. */
export function distance({ mean, scale, axes, variances, rest }, point) {
  const centred = Float64Array.from(mean, (middle, i) => (point[i] - middle) / scale[i]);
  let [inside, share] = [0, 0];
  for (let axis = 0; axis < variances.length; axis++) {
    let along = 0;
    for (let i = 0; i < mean.length; i++) along += centred[i] * axes[axis * mean.length + i];
    inside += along ** 2;
    share += along ** 2 / variances[axis];
  }
  const outside = Math.max(centred.reduce((sum, value) => sum + value ** 2, 0) - inside, 0);
  return (share + outside / rest) / mean.length;
}

/** The square without its black rim, 64 pixels a side, double precision. */
export function thumbnail(square) {
  return Float64Array.from(clip(resize(trim(square), THUMBNAIL_PX, THUMBNAIL_PX)).pixels);
}

function unpack({ float32 }) {
  const bytes = Uint8Array.from(atob(float32), (letter) => letter.charCodeAt(0));
  return new Float32Array(bytes.buffer);
}

function trim(square) {
  const { height, width, pixels } = square;
  const lit = [[], []];
  for (let y = 0; y < height; y++) if (pixels.subarray(y * width, (y + 1) * width).some((value) => value > PADDING_GREY)) lit[0].push(y);
  for (let x = 0; x < width; x++) {
    for (let y = 0; y < height; y++) {
      if (pixels[y * width + x] > PADDING_GREY) {
        lit[1].push(x);
        break;
      }
    }
  }
  if (lit[0].length < 2 || lit[1].length < 2) return { height, width, pixels: pixels.slice() };
  return crop(square, lit[0][0], lit[1][0], lit[0].at(-1) - lit[0][0] + 1, lit[1].at(-1) - lit[1][0] + 1);
}

/** A quarter turn against the clock, as `numpy.rot90`. */
function turn(grey) {
  const out = new Float64Array(grey.length);
  for (let y = 0; y < THUMBNAIL_PX; y++) {
    for (let x = 0; x < THUMBNAIL_PX; x++) out[y * THUMBNAIL_PX + x] = grey[x * THUMBNAIL_PX + THUMBNAIL_PX - 1 - y];
  }
  return out;
}

/** Mean greys of the cells in units of the deviation: `cells_of`. */
export function cellsOf(grey) {
  const side = THUMBNAIL_PX / CELLS_PER_SIDE;
  const cells = new Float64Array(CELLS_PER_SIDE ** 2);
  grey.forEach((value, i) => {
    const row = Math.floor(i / THUMBNAIL_PX / side);
    cells[row * CELLS_PER_SIDE + Math.floor((i % THUMBNAIL_PX) / side)] += value / side ** 2;
  });
  const [middle, spread] = [mean(grey), Math.max(deviation(grey), TINY)];
  return Float32Array.from(cells, (cell) => (cell - middle) / spread);
}

/** The numbers of `LAYOUT_STATISTICS`: `statistics_of`. */
export function statisticsOf(grey) {
  return Float32Array.from([...histogram(grey), ...symmetry(grey), ...texture(grey), ...layout(grey)]);
}

const mean = (values) => values.reduce((sum, value) => sum + value, 0) / values.length;

function deviation(values) {
  const middle = mean(values);
  return Math.sqrt(mean(values.map((value) => (value - middle) ** 2)));
}

function scaled(grey) {
  const [middle, spread] = [mean(grey), Math.max(deviation(grey), TINY)];
  return grey.map((value) => (value - middle) / spread);
}

function histogram(grey) {
  const z = scaled(grey);
  const counts = new Float64Array(BINS);
  for (const value of grey) counts[Math.min(BINS - 1, Math.floor(value * BINS))]++;
  const entropy = -counts.reduce((sum, count) => sum + (count ? (count / grey.length) * Math.log(count / grey.length) : 0), 0) / Math.log(BINS);
  const share = (test) => Math.sqrt(grey.filter(test).length / grey.length);
  const sorted = grey.slice().sort();
  return [
    mean(grey), deviation(grey), mean(z.map((value) => value ** 3)), Math.log(mean(z.map((value) => value ** 4)) + 1),
    ...[0.05, 0.5, 0.95].map((part) => quantile(sorted, part)), entropy, share((value) => value < 0.05), share((value) => value > 0.95),
  ];
}

/** Linear between neighbours, as `numpy.quantile`. */
function quantile(sorted, part) {
  const place = part * (sorted.length - 1);
  const low = Math.floor(place);
  return sorted[low] + (sorted[Math.min(low + 1, sorted.length - 1)] - sorted[low]) * (place - low);
}

const at = (grey, y, x) => grey[y * THUMBNAIL_PX + x];

function mapped(place) {
  return (grey) => Float64Array.from(grey, (_, i) => at(grey, ...place(Math.floor(i / THUMBNAIL_PX), i % THUMBNAIL_PX)));
}

function symmetry(grey) {
  const last = THUMBNAIL_PX - 1;
  return [mapped((y, x) => [y, last - x]), mapped((y, x) => [last - y, x]), mapped((y, x) => [x, y])].map((mirror) => correlation(grey, mirror(grey)));
}

function correlation(first, second) {
  const [a, b] = [first, second].map((values) => {
    const middle = mean(values);
    return values.map((value) => value - middle);
  });
  const dot = (one, other) => one.reduce((sum, value, i) => sum + value * other[i], 0);
  return dot(a, b) / Math.max(Math.sqrt(dot(a, a) * dot(b, b)), TINY);
}

/** Mean absolute difference along rows plus that along columns, of order 1 or 2. */
function differences(grey, order) {
  const sums = [0, 0];
  const reach = THUMBNAIL_PX - order;
  const step = (take) => Math.abs(order === 1 ? take(1) - take(0) : take(2) - 2 * take(1) + take(0));
  for (let along = 0; along < reach; along++) {
    for (let across = 0; across < THUMBNAIL_PX; across++) {
      sums[0] += step((i) => at(grey, along + i, across));
      sums[1] += step((i) => at(grey, across, along + i));
    }
  }
  return (sums[0] + sums[1]) / (reach * THUMBNAIL_PX);
}

function texture(grey) {
  const [steps, bends] = [differences(grey, 1), differences(grey, 2)];
  return [Math.log(steps + TINY), Math.log((bends + TINY) / (steps + TINY))];
}

function layout(grey) {
  const z = scaled(grey);
  const size = THUMBNAIL_PX;
  const [fifth, third, eighth] = [5, 3, 8].map((part) => Math.floor(size / part));
  const sum = (rows, columns) => {
    let total = 0;
    for (let y = rows[0]; y < rows[1]; y++) for (let x = columns[0]; x < columns[1]; x++) total += at(z, y, x);
    return total;
  };
  const area = (rows, columns) => sum(rows, columns) / ((rows[1] - rows[0]) * (columns[1] - columns[0]));
  const all = [0, size];
  const inside = [eighth, size - eighth];
  const middle = area(all, [2 * fifth, size - 2 * fifth]);
  const sides = (area(all, [0, fifth]) + area(all, [size - fifth, size])) / 2;
  const inner = sum(inside, inside);
  const innerSize = (size - 2 * eighth) ** 2;
  const rim = (sum(all, all) - inner) / (size ** 2 - innerSize);
  const rows = [third, size - third];
  const lungs = (area(rows, [fifth, 2 * fifth]) + area(rows, [size - 2 * fifth, size - fifth])) / 2;
  const shoulders = (area([0, eighth], [0, third]) + area([0, eighth], [size - third, size])) / 2;
  const below = area([size - third, size], all) - area([0, third], all);
  return [middle - sides, below, inner / innerSize - rim, lungs - middle, shoulders - lungs];
}
