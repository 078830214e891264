// One radiograph on the page: its pane, its captions, its pixels and its heat map.

import { h } from "./dom.js";
import { magnified, number, t } from "./i18n.js";
import { ask, askBytes } from "./api.js";
import { clampWindow, presetsOf } from "./grey.js";
import { heatLayer, mayShowHeat } from "./heat.js";
import { LENS_TIMES, Pane } from "./pane.js";
import { lengthKind, lengthWords } from "./ruler.js";
import { takeInput } from "./pane_input.js";

const FIRST_SIDE_PX = 2048;
const SHARPER_ABOVE = 1.25;

/** A radiograph in `figure`. `hand` says which tool is chosen, is told of changed views (`follow`) and of everything (`changed`). */
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
    });
  }

  /** Loads and shows the image of `case_`, a CaseDetail. @throws {Problem} */
  async show(case_, signal) {
    this.clear();
    this.case = case_;
    this.figure.dataset.state = "loading";
    await this.load(FIRST_SIDE_PX, signal);
    this.presets = presetsOf(this.pane.image.values, case_.image.window);
    this.pane.setWindow(case_.image.window, false);
    this.preset = "own";
    this.pane.fit();
    this.figure.dataset.state = "ready";
    this.hand.changed();
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
    Object.assign(this, { case: null, layer: null, presets: null, preset: "own", side: 0 });
    this.figure.dataset.state = "empty";
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
    this.preset = "own";
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
    if (!on || !mayShowHeat(this.case)) {
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
    this.corners.zoom.textContent = shown ? magnified(pane.magnification()) : "";
    const turned = shown ? [pane.mirrored ? t("viewer.mirrored") : "", pane.quarters ? t("viewer.turned", { degrees: 90 * pane.quarters }) : ""] : [];
    this.corners.turned.textContent = turned.filter(Boolean).join(" · ");
    if (pane.ruler && shown) pane.rulerWords = lengthWords(pane.ruler, this.case.image);
    this.corners.length.textContent = pane.ruler && shown ? `${pane.rulerWords} ${lengthKind(this.case.image)}` : "";
    const heat = pane.heat ? t("viewer.heat_on") : "";
    const told = [t("viewer.radiograph"), windowed, ...turned, this.corners.length.textContent, heat];
    pane.canvas.setAttribute("aria-label", told.filter(Boolean).join(". "));
    this.hand.changed?.();
    this.sharpen();
  }

  /** Fetches the whole image once more of it is wanted than the first, smaller one shows. */
  sharpen() {
    if (!this.case || !this.pane.image || !this.side) return;
    const { width, fullWidth } = this.pane.image;
    const wanted = this.pane.fitScale() * this.pane.view.zoom * (this.pane.lens ? LENS_TIMES : 1) > SHARPER_ABOVE;
    if (width >= fullWidth || !wanted) return;
    this.side = 0;
    this.load(Math.max(this.case.image.width, this.case.image.height), this.signal).catch(() => null);
  }
}

/** Width and level of `window`, parts of the pixels' range, in the file's values; in percent where the file does not say what they mean. */
function windowWords({ center, width }, values) {
  if (!values) return { width: `${number(100 * width)} %`, level: `${number(100 * center)} %`, unit: "" };
  const span = values.high - values.low;
  const digits = Math.abs(span) < 50 ? 2 : 0;
  return { width: number(width * Math.abs(span), digits), level: number(values.low + center * span, digits), unit: values.unit };
}
