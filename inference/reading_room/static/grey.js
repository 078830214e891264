// From 16 bits to what a screen shows. Windows are {center, width} in parts of the full range, as the server gives them.

const LEVELS = 65536;
const FULL = LEVELS - 1;
const OPAQUE = 0xff000000;
const LEAST_WIDTH = 1 / 256;
const LIT = 0.02; // below this part of the range lie collimation and air beside the patient, which no preset should follow

/** The colour (RGBA, little endian) of every stored value: black below the window, white above, linear between. */
export function lookupTable(window, inverted) {
  const table = new Uint32Array(LEVELS);
  const low = (window.center - window.width / 2) * FULL;
  const scale = 255 / (window.width * FULL);
  for (let value = 0; value < LEVELS; value++) {
    const grey = Math.round(Math.min(255, Math.max(0, (value - low) * scale)));
    const shown = inverted ? 255 - grey : grey;
    table[value] = OPAQUE | (shown << 16) | (shown << 8) | shown;
  }
  return table;
}

/** Writes the colours of `values` into `target`, both of the same length. */
export function paint(values, table, target) {
  for (let i = 0; i < values.length; i++) target[i] = table[values[i]];
}

/** The window with its width and center held in what can be shown. */
export function clampWindow({ center, width }) {
  return { center: Math.min(1, Math.max(0, center)), width: Math.min(2, Math.max(LEAST_WIDTH, width)) };
}

/** Windows to choose from: the file's own, the image's own range, its dark and its bright half, and all there is. */
export function presetsOf(values, own) {
  const part = percentiles(values);
  return {
    own,
    auto: between(part(0.005), part(0.995)),
    lungs: between(part(0.005), part(0.7)),
    mediastinum: between(part(0.45), part(0.999)),
    full: { center: 0.5, width: 1 },
  };
}

const CT_WINDOWS = { lungs: [-600, 1500], mediastinum: [40, 400], bone: [400, 1800] }; // level and width in HU (Radiopaedia, "Windowing (CT)")

/** Windows to choose from for a CT, whose grey values are Hounsfield units between the ends `values`. */
export function ctPresets(values) {
  const span = values.high - values.low;
  const parts = Object.entries(CT_WINDOWS).map(([name, [level, width]]) => [name, { center: (level - values.low) / span, width: width / span }]);
  return { ...Object.fromEntries(parts), full: { center: 0.5, width: 1 } };
}

function between(low, high) {
  return clampWindow({ center: (low + high) / 2, width: high - low });
}

/** A function that gives the value, in parts of the range, below which a part of the lit pixels lies. */
function percentiles(values) {
  const counts = new Uint32Array(LEVELS);
  for (let i = 0; i < values.length; i++) counts[values[i]]++;
  const start = Math.round(LIT * FULL);
  let lit = 0;
  for (let value = start; value < LEVELS; value++) lit += counts[value];
  return (part) => {
    let left = part * lit;
    for (let value = start; value < LEVELS; value++) {
      left -= counts[value];
      if (left <= 0) return value / FULL;
    }
    return 1;
  };
}
