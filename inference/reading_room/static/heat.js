// The heat map in colour: dark red through amber to pale yellow, as light from a warm body. What is weak stays clear, so that the
// radiograph below it is not tinted where the model saw nothing.

const STOPS = [[0, 96, 20, 60], [0.35, 190, 48, 40], [0.65, 240, 140, 40], [1, 255, 236, 150]];
const CLEAR_BELOW = 0.25;
const STRONGEST = 0.85;

/** Whether there is a map to show: what the model cannot judge it cannot explain either. */
export const mayShowHeat = (case_) => Boolean(case_?.has_map);

/** The colour of one value in [0, 1] as [red, green, blue, alpha], each 0 to 255. */
export function heatColour(value) {
  const upper = STOPS.findIndex(([stop]) => value <= stop);
  const [from, ...below] = STOPS[Math.max(0, upper - 1)];
  const [to, ...above] = STOPS[Math.max(0, upper)];
  const part = to > from ? (value - from) / (to - from) : 0;
  const alpha = Math.max(0, (value - CLEAR_BELOW) / (1 - CLEAR_BELOW));
  return [...below.map((channel, i) => channel + (above[i] - channel) * part), 255 * STRONGEST * alpha ** 0.8].map(Math.round);
}

/** The map as a canvas of `side` pixels each way, smooth between its cells, the area of the image it covers, and whether nothing
 *  of it can be seen. */
export function heatLayer(map, side = 256) {
  const canvas = document.createElement("canvas");
  canvas.width = canvas.height = side;
  const context = canvas.getContext("2d");
  const picture = context.createImageData(side, side);
  for (let y = 0; y < side; y++) {
    for (let x = 0; x < side; x++) {
      const value = sample(map, ((x + 0.5) / side) * map.columns - 0.5, ((y + 0.5) / side) * map.rows - 0.5);
      picture.data.set(heatColour(value), 4 * (y * side + x));
    }
  }
  context.putImageData(picture, 0, 0);
  return { canvas, area: map.area, isEmpty: Math.max(...map.values) <= CLEAR_BELOW };
}

/** The value at a place between the cells' centres, bilinear; the border goes on outwards. */
export function sample(map, x, y) {
  const column = Math.min(map.columns - 1, Math.max(0, x));
  const row = Math.min(map.rows - 1, Math.max(0, y));
  const [left, top] = [Math.floor(column), Math.floor(row)];
  const [right, bottom] = [Math.min(left + 1, map.columns - 1), Math.min(top + 1, map.rows - 1)];
  const [across, down] = [column - left, row - top];
  const cell = (r, c) => map.values[r * map.columns + c];
  return (cell(top, left) * (1 - across) + cell(top, right) * across) * (1 - down)
    + (cell(bottom, left) * (1 - across) + cell(bottom, right) * across) * down;
}

/** Draws the colours from weak to strong, for the legend. */
export function drawLegend(canvas) {
  const context = canvas.getContext("2d");
  for (let x = 0; x < canvas.width; x++) {
    const [red, green, blue, alpha] = heatColour(x / (canvas.width - 1));
    context.fillStyle = `rgba(${red}, ${green}, ${blue}, ${alpha / 255})`;
    context.fillRect(x, 0, 1, canvas.height);
  }
}
