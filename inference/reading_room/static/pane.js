// One radiograph on a canvas. Where it looks is kept in parts of the image ({zoom: 1 fits, x, y: what stands in the middle}), so that
// two panes with images of different sizes can look at the same place.

import { lookupTable, paint } from "./grey.js";

const LARGEST_ZOOM = 40;
const LEAST_ZOOM = 0.05;
const FITTED = { zoom: 1, x: 0.5, y: 0.5 };

/** A pane on `canvas`. `onChange` is called after each change of view or window that `redraw` shows. */
export class Pane {
  constructor(canvas, onChange = () => {}) {
    Object.assign(this, { canvas, onChange, view: { ...FITTED }, window: { center: 0.5, width: 1 }, inverted: false, opacity: 0.5 });
    this.image = null;
    this.heat = null;
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
    this.image = this.heat = null;
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

  fit() {
    this.setView(FITTED);
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
    const scale = (this.fitScale() * this.view.zoom) / this.ratio();
    this.setView({ ...this.view, x: this.view.x - dx / scale / this.image.width, y: this.view.y - dy / scale / this.image.height });
  }

  /** Zooms so that what lies below (`px`, `py`), CSS pixels from the canvas's middle, stays there. */
  zoomBy(factor, px = 0, py = 0) {
    if (!this.image) return;
    const before = this.fitScale() * this.view.zoom;
    const zoom = Math.min(LARGEST_ZOOM, Math.max(LEAST_ZOOM, this.view.zoom * factor));
    const moved = this.ratio() * (1 / before - 1 / (this.fitScale() * zoom));
    this.setView({ zoom, x: this.view.x + (px * moved) / this.image.width, y: this.view.y + (py * moved) / this.image.height });
  }

  fitScale() {
    return this.image ? Math.min(this.canvas.width / this.image.width, this.canvas.height / this.image.height) : 1;
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
    const { width, height } = this.image;
    const scale = this.fitScale() * this.view.zoom;
    context.translate(this.canvas.width / 2 - this.view.x * width * scale, this.canvas.height / 2 - this.view.y * height * scale);
    context.imageSmoothingEnabled = true;
    context.imageSmoothingQuality = "high";
    context.drawImage(this.bitmap, 0, 0, width * scale, height * scale);
    if (this.heat) this.drawHeat(context, width * scale, height * scale);
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
