// A distance on the image: its line, its length, and where that length holds.

import { number, t } from "./i18n.js";

const TICK_PX = 7;

/** The length of `ruler` ({from, to} in parts of the image) on `image` of a CaseDetail, in words. */
export function lengthWords({ from, to }, image) {
  const [across, down] = [(to.x - from.x) * image.width, (to.y - from.y) * image.height];
  const { pixel } = image.facts;
  if (!pixel) return t("ruler.pixels", { length: number(Math.hypot(across, down)) });
  return t("ruler.mm", { length: number(Math.hypot(across * pixel.column_mm, down * pixel.row_mm), 1) });
}

/** Where a length on `image` holds: a projection is larger on the detector than in the patient. */
export const lengthKind = (image) => t(`ruler.${image.facts.pixel?.kind ?? "unknown"}`);

/** Draws a line between two points of the canvas, with `words` at its end; `ratio` is canvas pixels for a CSS pixel. */
export function drawRuler(context, [x0, y0], [x1, y1], words, ratio) {
  const length = Math.hypot(x1 - x0, y1 - y0) || 1;
  const [nx, ny] = [(-(y1 - y0) / length) * TICK_PX * ratio, ((x1 - x0) / length) * TICK_PX * ratio];
  context.save();
  context.beginPath();
  for (const [ax, ay, bx, by] of [[x0, y0, x1, y1], [x0 - nx, y0 - ny, x0 + nx, y0 + ny], [x1 - nx, y1 - ny, x1 + nx, y1 + ny]]) {
    context.moveTo(ax, ay);
    context.lineTo(bx, by);
  }
  for (const [style, width] of [["#000", 4], ["#ffd98a", 1.6]]) {
    Object.assign(context, { strokeStyle: style, lineWidth: width * ratio });
    context.stroke();
  }
  Object.assign(context, { font: `600 ${14 * ratio}px system-ui, sans-serif`, lineWidth: 4 * ratio, strokeStyle: "#000", fillStyle: "#ffd98a" });
  const left = Math.min(x1 + 12 * ratio, context.canvas.width - context.measureText(words).width - 6 * ratio);
  const top = Math.max(18 * ratio, Math.min(y1 - 10 * ratio, context.canvas.height - 8 * ratio));
  context.strokeText(words, left, top);
  context.fillText(words, left, top);
  context.restore();
}
