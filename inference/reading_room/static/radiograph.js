// One radiograph or CT series on the page: its pane, its captions, its pixels, of a series the slice that is shown, and its heat map.

import { h } from "./dom.js";
import { magnified, number, t } from "./i18n.js";
import { ask, askBytes } from "./api.js";
import { clampWindow, ctPresets, presetsOf } from "./grey.js";
import { heatLayer, mayShowHeat } from "./heat.js";
import { LENS_TIMES, Pane } from "./pane.js";
import { lengthKind, lengthWords } from "./ruler.js";
import { takeInput } from "./pane_input.js";
import { Slices } from "./slices.js";

const FIRST_SIDE_PX = 2048;
const SHARPER_ABOVE = 1.25;

/** A radiograph or a series in `figure`. `hand` says which tool is chosen, is told of changed views (`follow`), of slices that went by
 *  (`followSlices`, in mm) and of everything (`changed`). */
export class Radiograph {
  constructor(figure, hand) {
    this.figure = figure;
    this.hand = hand;
    this.case = null;
    this.pane = new Pane(figure.querySelector("canvas"), () => this.describe());
    this.corners = Object.fromEntries([...figure.querySelectorAll("[data-corner]")].map((one) => [one.dataset.corner, one]));
    takeInput(this.pane, {
      tool: hand.tool,
      onView: (view) => hand.follow(view),
      onWindow: (window) => this.setWindow(window),
      onRuler: (ruler) => this.measure(ruler),
      slices: () => this.slices?.count ?? 0,
      onSlices: (steps) => this.moveBy(steps),
    });
    this.slider = figure.querySelector(".slices input");
    this.slider.addEventListener("input", () => this.goTo(Number(this.slider.value)));
  }

  /** Loads and shows the image of `case_`, a CaseDetail. @throws {Problem} */
  async show(case_, signal) {
    this.clear();
    this.case = case_;
    this.figure.dataset.state = "loading";
    if (case_.image.facts.series) await this.open(case_, signal);
    else await this.load(FIRST_SIDE_PX, signal);
    if (this.case !== case_ || !this.pane.image) return;
    const { facts, window } = case_.image;
    this.presets = this.slices ? ctPresets(facts.values) : presetsOf(this.pane.image.values, window);
    this.pane.setWindow(window, false);
    this.preset = this.slices ? "lungs" : "own";
    this.pane.fit();
    this.figure.dataset.state = "ready";
    this.hand.changed();
  }

  /** Loads the middle slice of a series; the others are loaded as they are wanted. @throws {Problem} */
  open(case_, signal) {
    return new Promise((resolve, reject) => {
      const first = (number) => {
        if (this.case !== case_) return resolve();
        if (slices.problem && !slices.held.has(number)) return reject(slices.problem);
        slices.arrived = (one) => this.arrived(one);
        this.showSlice();
        return resolve();
      };
      const slices = new Slices(case_, signal, (number) => (number === this.slice || slices.problem) && first(number));
      signal.addEventListener("abort", () => resolve());
      Object.assign(this, { slices, slice: slices.middle });
      Object.assign(this.slider, { min: 1, max: slices.count, value: this.slice });
      this.slider.parentElement.hidden = false;
      this.drawMark();
      slices.want(this.slice);
    });
  }

  /** Goes to the slice with this number, or the nearest that there is. */
  goTo(number) {
    if (!this.slices) return;
    const before = this.slice;
    this.slice = this.slices.clamp(number);
    this.slider.value = this.slice;
    if (this.slice !== before || this.slices.problem) this.slices.want(this.slice, this.slice - before);
    this.showSlice();
  }

  /** Goes on by so many slices, toward the head; another series goes on by as many mm. */
  moveBy(steps) {
    if (!this.slices) return;
    const before = this.slice;
    this.goTo(before + steps);
    this.hand.followSlices?.((this.slice - before) * this.slices.series.spacing_mm);
  }

  /** Goes on by so many mm, as the other series did; what is less than a slice is kept for the next time. */
  moveByMm(mm) {
    if (!this.slices) return;
    this.left = (this.left ?? 0) + mm / this.slices.series.spacing_mm;
    const steps = Math.trunc(this.left);
    this.left -= steps;
    if (steps) this.goTo(this.slice + steps);
  }

  /** To the slice with most of the heat map's weight. */
  toStrongest() {
    const strongest = this.slices?.series.strongest;
    if (strongest) this.moveBy(strongest - this.slice);
  }

  arrived(number) {
    if (number === this.slice) this.showSlice();
  }

  /** Shows the slice that is wanted if it is here; until then the one before stays, with its own number. */
  showSlice() {
    const found = this.slices.take(this.slice);
    this.figure.toggleAttribute("data-waiting", !found);
    if (!found || this.shown === this.slice) return;
    this.shown = this.slice;
    this.side = 0;
    this.pane.setHeat(null);
    this.measure(null);
    this.pane.setImage(found.values, found.width, found.height, this.case.image.width);
    this.drawHeat();
  }

  /** Marks the strongest slice beside the slider while the heat map is on: a reader who has not asked for it is led nowhere. */
  drawMark() {
    const mark = this.slider.parentElement.querySelector("i");
    const { strongest, slices } = this.slices.series;
    mark.hidden = !strongest || !this.heat;
    if (strongest) mark.style.setProperty("--place", slices > 1 ? String(1 - (strongest - 1) / (slices - 1)) : "0.5");
  }

  async load(side, signal) {
    const mine = this.case;
    const { bytes, headers } = await askBytes(`/api/cases/${mine.id}/pixels?max_side=${side}`, signal);
    if (this.case !== mine) return;
    const [width, height] = ["X-Image-Width", "X-Image-Height"].map((name) => Number(headers.get(name)));
    this.signal = signal;
    this.side = side;
    this.pane.setImage(new Uint16Array(bytes), width, height, mine.image.width);
  }

  clear() {
    Object.assign(this, { case: null, layer: null, presets: null, preset: "own", side: 0, slices: null, slice: 0, shown: 0, left: 0, heat: false });
    this.figure.dataset.state = "empty";
    this.figure.removeAttribute("data-waiting");
    this.slider.parentElement.hidden = true;
    this.pane.clear();
  }

  setWindow(window, preset = "custom") {
    this.preset = preset;
    this.pane.setWindow(clampWindow(window));
    this.hand.changed();
  }

  choosePreset(name) {
    if (this.presets?.[name]) this.setWindow(this.presets[name], name);
  }

  invert() {
    this.pane.setWindow(this.pane.window, !this.pane.inverted);
    this.hand.changed();
  }

  reset() {
    if (!this.case) return;
    this.pane.setWindow(this.case.image.window, false);
    this.preset = this.slices ? "lungs" : "own";
    this.pane.upright();
    this.measure(null);
    this.pane.fit();
    this.hand.changed();
  }

  /** Shows the length of a line on the image, or takes the line away. */
  measure(ruler) {
    if (ruler && !this.case) return;
    this.pane.rulerWords = ruler ? lengthWords(ruler, this.case.image) : "";
    this.pane.setRuler(ruler);
  }

  /** Looks where another radiograph looks. */
  follow(view) {
    if (this.case) this.pane.setView(view);
  }

  /** Shows the heat map or takes it away; it is asked for when it is first wanted. */
  async showHeat(on, opacity, signal) {
    this.heat = on && mayShowHeat(this.case);
    if (this.slices) {
      this.pane.opacity = opacity;
      this.drawMark();
      await this.drawHeat();
      return;
    }
    if (!this.heat) {
      this.pane.setHeat(null, opacity);
      return;
    }
    const mine = this.case;
    try {
      this.layer ??= heatLayer(await ask(`/api/cases/${mine.id}/map`, { signal }));
    } catch {
      return; // the banner tells of a server that is away; the switch can be tried again
    }
    if (this.case === mine) this.pane.setHeat(this.layer, opacity);
  }

  /** Lays the map of the slice that is shown over it; a map that comes late is not laid over another slice. */
  async drawHeat() {
    const [mine, number] = [this.slices, this.shown];
    if (!this.heat || !number) {
      this.pane.setHeat(null);
      return;
    }
    try {
      const layer = heatLayer(await mine.map(number));
      if (this.slices === mine && this.shown === number && this.heat) this.pane.setHeat(layer);
    } catch {
      // as in `showHeat`
    }
  }

  caption([name = "", date = ""], role) {
    this.corners.name.replaceChildren(h("strong", { text: name }), h("span", { text: date }));
    this.corners.role.textContent = role;
    this.describe();
  }

  /** The corners and the words for a screen reader, after each change of view or window. */
  describe() {
    const { pane } = this;
    const shown = this.case && pane.image;
    const values = shown ? windowWords(pane.window, this.case.image.facts.values) : {};
    const windowed = shown ? t("viewer.window", values).trim() : "";
    this.corners.window.textContent = windowed;
    const slice = shown && this.slices ? sliceWords(this.slices, this.shown) : "";
    this.corners.slice.textContent = slice;
    if (slice) this.slider.setAttribute("aria-valuetext", slice);
    this.corners.zoom.textContent = shown ? magnified(pane.magnification()) : "";
    const turned = shown ? [pane.mirrored ? t("viewer.mirrored") : "", pane.quarters ? t("viewer.turned", { degrees: 90 * pane.quarters }) : ""] : [];
    this.corners.turned.textContent = turned.filter(Boolean).join(" · ");
    if (pane.ruler && shown) pane.rulerWords = lengthWords(pane.ruler, this.case.image);
    this.corners.length.textContent = pane.ruler && shown ? `${pane.rulerWords} ${lengthKind(this.case.image)}` : "";
    const heat = pane.heat ? t("viewer.heat_on") : "";
    const told = [this.slices ? t("viewer.series") : t("viewer.radiograph"), slice, windowed, ...turned, this.corners.length.textContent, heat];
    pane.canvas.setAttribute("aria-label", told.filter(Boolean).join(". "));
    this.hand.changed?.();
    this.sharpen();
  }

  /** Fetches the whole image once more of it is wanted than the first, smaller one shows. */
  sharpen() {
    if (!this.case || this.slices || !this.pane.image || !this.side) return;
    const { width, fullWidth } = this.pane.image;
    const wanted = this.pane.fitScale() * this.pane.view.zoom * (this.pane.lens ? LENS_TIMES : 1) > SHARPER_ABOVE;
    if (width >= fullWidth || !wanted) return;
    this.side = 0;
    this.load(Math.max(this.case.image.width, this.case.image.height), this.signal).catch(() => null);
  }
}

/** Number of a slice and where it lies. */
function sliceWords(slices, number) {
  const position = new Intl.NumberFormat("en", { minimumFractionDigits: 1, maximumFractionDigits: 1 }).format(slices.position(number)).replace("-", "−");
  return t("viewer.slice", { number: String(number), slices: String(slices.count), position });
}

/** Width and level of `window`, parts of the pixels' range, in the file's values; in percent where the file does not say what they mean. */
function windowWords({ center, width }, values) {
  if (!values) return { width: `${number(100 * width)} %`, level: `${number(100 * center)} %`, unit: "" };
  const span = values.high - values.low;
  const digits = Math.abs(span) < 50 ? 2 : 0;
  return { width: number(width * Math.abs(span), digits), level: number(values.low + center * span, digits), unit: values.unit };
}
