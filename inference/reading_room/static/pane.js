// One radiograph on a canvas. Where it looks is kept in parts of the image ({zoom: 1 fits, x, y: what stands in the middle}), so that
// two panes with images of different sizes can look at the same place. Turning and mirroring change only how it is drawn.

import { lookupTable, paint } from "./grey.js";
import { drawRuler } from "./ruler.js";

const LARGEST_ZOOM = 40;
const LEAST_ZOOM = 0.05;
const FITTED = { zoom: 1, x: 0.5, y: 0.5 };
const UPRIGHT = { quarters: 0, mirrored: false };
export const LENS_TIMES = 3;
const LENS_RADIUS_PX = 110;

/** A pane on `canvas`. `onChange` is called after each change of view or window that `redraw` shows. */
export class Pane {
  constructor(canvas, onChange = () => {}) {
    Object.assign(this, { canvas, onChange, view: { ...FITTED }, window: { center: 0.5, width: 1 }, inverted: false, opacity: 0.5 });
    Object.assign(this, { image: null, heat: null, lens: null, ruler: null, rulerWords: "", ...UPRIGHT });
    this.bitmap = document.createElement("canvas");
    this.table = null;
    this.due = 0;
    this.observer = new ResizeObserver(() => this.resize());
    this.observer.observe(canvas);
  }

  /** Shows `values`, Uint16Array of `width` x `height`. `fullWidth` is the width of the file's image, for 1:1. */
  setImage(values, width, height, fullWidth) {
    this.image = { values, width, height, fullWidth };
    Object.assign(this.bitmap, { width, height });
    this.picture = new ImageData(width, height);
    this.colours = new Uint32Array(this.picture.data.buffer);
    this.table = null;
    this.redraw();
  }

  clear() {
    Object.assign(this, { image: null, heat: null, lens: null, ruler: null, ...UPRIGHT });
    this.redraw();
  }

  setWindow(window, inverted = this.inverted) {
    Object.assign(this, { window, inverted, table: null });
    this.redraw();
  }

  setView(view) {
    const clamp = (value) => Math.min(1, Math.max(0, value));
    this.view = { zoom: Math.min(LARGEST_ZOOM, Math.max(LEAST_ZOOM, view.zoom)), x: clamp(view.x), y: clamp(view.y) };
    this.redraw();
  }

  /** `layer` of `heatLayer`, or null for none. */
  setHeat(layer, opacity = this.opacity) {
    Object.assign(this, { heat: layer, opacity });
    this.redraw();
  }

  /** Shows what lies below (`x`, `y`), CSS pixels from the canvas's middle, larger; null takes the glass away. */
  setLens(lens) {
    if (!lens && !this.lens) return;
    this.lens = lens;
    this.redraw();
  }

  /** A line from `from` to `to`, parts of the image, or null. */
  setRuler(ruler) {
    this.ruler = ruler;
    this.redraw();
  }

  fit() {
    this.setView(FITTED);
  }

  /** A quarter turn clockwise on the screen. */
  turn() {
    this.quarters = (this.quarters + 1) % 4;
    this.redraw();
  }

  /** Left and right of the screen change places. */
  mirror() {
    this.mirrored = !this.mirrored;
    this.quarters = (4 - this.quarters) % 4;
    this.redraw();
  }

  /** As the file has it. */
  upright() {
    Object.assign(this, UPRIGHT);
    this.redraw();
  }

  /** One pixel of the file on one pixel of the screen. */
  oneToOne() {
    this.setView({ ...this.view, zoom: this.image ? this.image.width / this.image.fullWidth / this.fitScale() : 1 });
  }

  /** Screen pixels for one pixel of the file. */
  magnification() {
    return this.image ? (this.fitScale() * this.view.zoom * this.image.width) / this.image.fullWidth : 1;
  }

  /** Moves the image by CSS pixels. */
  panBy(dx, dy) {
    if (!this.image) return;
    const moved = this.toImage(dx, dy);
    this.setView({ ...this.view, x: this.view.x - moved.x, y: this.view.y - moved.y });
  }

  /** Zooms so that what lies below (`px`, `py`), CSS pixels from the canvas's middle, stays there. */
  zoomBy(factor, px = 0, py = 0) {
    if (!this.image) return;
    const zoom = Math.min(LARGEST_ZOOM, Math.max(LEAST_ZOOM, this.view.zoom * factor));
    const before = this.toImage(px, py);
    const left = 1 - this.view.zoom / zoom;
    this.setView({ zoom, x: this.view.x + before.x * left, y: this.view.y + before.y * left });
  }

  /** A way on the screen, in CSS pixels, as a way on the image, in parts of it. */
  toImage(dx, dy) {
    const scale = (this.fitScale() * this.view.zoom) / this.ratio();
    const [cos, sin] = this.direction();
    const [x, y] = [dx * cos + dy * sin, dy * cos - dx * sin];
    return { x: (this.mirrored ? -x : x) / scale / this.image.width, y: y / scale / this.image.height };
  }

  /** What lies below (`px`, `py`), CSS pixels from the canvas's middle, in parts of the image. */
  placeAt(px, py) {
    const way = this.toImage(px, py);
    return { x: this.view.x + way.x, y: this.view.y + way.y };
  }

  /** Cosine and sine of how far the image is turned. */
  direction() {
    return [[1, 0], [0, 1], [-1, 0], [0, -1]][this.quarters];
  }

  fitScale() {
    if (!this.image) return 1;
    const [width, height] = this.quarters % 2 ? [this.image.height, this.image.width] : [this.image.width, this.image.height];
    return Math.min(this.canvas.width / width, this.canvas.height / height);
  }

  ratio() {
    return this.canvas.width / (this.canvas.clientWidth || 1);
  }

  resize() {
    const ratio = devicePixelRatio || 1;
    this.canvas.width = Math.max(1, Math.round(this.canvas.clientWidth * ratio));
    this.canvas.height = Math.max(1, Math.round(this.canvas.clientHeight * ratio));
    this.draw();
    this.onChange(this);
  }

  /** Draws once before the next frame, however often it is called. */
  redraw() {
    if (this.due) return;
    this.due = requestAnimationFrame(() => {
      this.due = 0;
      this.draw();
      this.onChange(this);
    });
  }

  draw() {
    const context = this.canvas.getContext("2d");
    context.setTransform(1, 0, 0, 1, 0, 0);
    context.clearRect(0, 0, this.canvas.width, this.canvas.height);
    if (!this.image) return;
    if (!this.table) this.develop();
    const middle = [this.canvas.width / 2, this.canvas.height / 2];
    this.drawAt(context, middle, this.view, 1);
    if (this.lens) this.drawLens(context, middle);
    if (this.ruler) drawRuler(context, this.onCanvas(this.ruler.from), this.onCanvas(this.ruler.to), this.rulerWords, this.ratio());
  }

  /** Draws the image with its part `place` at the canvas's point (`x`, `y`), `times` as large as the view has it. */
  drawAt(context, [x, y], place, times) {
    const { width, height } = this.image;
    const scale = this.fitScale() * this.view.zoom * times;
    context.save();
    context.translate(x, y);
    context.rotate((this.quarters * Math.PI) / 2);
    context.scale(this.mirrored ? -1 : 1, 1);
    context.translate(-place.x * width * scale, -place.y * height * scale);
    context.imageSmoothingEnabled = true;
    context.imageSmoothingQuality = "high";
    context.drawImage(this.bitmap, 0, 0, width * scale, height * scale);
    if (this.heat) this.drawHeat(context, width * scale, height * scale);
    context.restore();
  }

  drawLens(context, [middleX, middleY]) {
    const [x, y] = [middleX + this.lens.x * this.ratio(), middleY + this.lens.y * this.ratio()];
    context.save();
    context.beginPath();
    context.arc(x, y, Math.min(LENS_RADIUS_PX * this.ratio(), this.canvas.width / 4, this.canvas.height / 4), 0, 2 * Math.PI);
    context.fillStyle = "#000";
    context.fill();
    context.clip();
    this.drawAt(context, [x, y], this.placeAt(this.lens.x, this.lens.y), LENS_TIMES);
    context.lineWidth = 4 * this.ratio();
    context.strokeStyle = "#9ba7b1";
    context.stroke();
    context.restore();
  }

  /** The canvas's point that shows `place` of the image. */
  onCanvas(place) {
    const scale = this.fitScale() * this.view.zoom;
    const [cos, sin] = this.direction();
    const across = (place.x - this.view.x) * this.image.width * scale * (this.mirrored ? -1 : 1);
    const down = (place.y - this.view.y) * this.image.height * scale;
    return [this.canvas.width / 2 + across * cos - down * sin, this.canvas.height / 2 + across * sin + down * cos];
  }

  develop() {
    this.table = lookupTable(this.window, this.inverted);
    paint(this.image.values, this.table, this.colours);
    this.bitmap.getContext("2d").putImageData(this.picture, 0, 0);
  }

  /** The map may reach beyond the image, where the model's square was filled up; that part is not drawn. */
  drawHeat(context, width, height) {
    const { canvas, area } = this.heat;
    context.save();
    context.beginPath();
    context.rect(0, 0, width, height);
    context.clip();
    context.globalAlpha = this.opacity;
    context.drawImage(canvas, area.left * width, area.top * height, area.width * width, area.height * height);
    context.restore();
  }
}
