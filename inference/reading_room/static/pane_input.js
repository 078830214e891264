// Mouse, pen and touch on a pane. Dragging sets window and level (right: wider, up: brighter) or moves the image, by the chosen tool;
// Shift or another button moves always; the wheel and two fingers zoom; a double click fits. The ruler is drawn by dragging, the
// magnifying glass follows the pointer. On a CT series the wheel goes through the slices and zooms with Ctrl; down is toward the feet.

import { clampWindow } from "./grey.js";

const FULL_RANGE_PX = 700;
const WHEEL = 0.0016;
const NOTCH_PX = 50;
const LEAST_SLICE_PX = 4;

/** Lets the reader's hand act on `pane`. `hand.tool(event)` is `window`, `pan`, `ruler`, `lens` or `scroll`; `hand.onWindow(window)`,
 *  `hand.onView(view)`, `hand.onRuler(ruler)` and, where `hand.slices()` is not 0, `hand.onSlices(steps)` take changes. */
export function takeInput(pane, hand) {
  const fingers = new Map();
  const { canvas } = pane;
  let rest = 0;
  canvas.addEventListener("pointerdown", (event) => {
    canvas.setPointerCapture(event.pointerId);
    fingers.set(event.pointerId, point(event));
    rest = 0;
    if (hand.tool(event) === "lens" && pane.image) pane.setLens(fromMiddle(canvas, event));
    if (hand.tool() !== "ruler" || !pane.image || event.shiftKey || event.button) return;
    const { x, y } = fromMiddle(canvas, event);
    const from = pane.placeAt(x, y);
    hand.onRuler({ from, to: from });
  });
  canvas.addEventListener("pointerleave", () => pane.setLens(null));
  for (const kind of ["pointerup", "pointercancel"]) canvas.addEventListener(kind, (event) => fingers.delete(event.pointerId));
  canvas.addEventListener("pointermove", (event) => {
    if (hand.tool() === "lens" && pane.image) pane.setLens(fromMiddle(canvas, event));
    const before = fingers.get(event.pointerId);
    if (!before || !pane.image) return;
    const now = point(event);
    if (fingers.size > 1) pinch(pane, fingers, event.pointerId, now);
    else if (hand.tool() === "pan" || event.shiftKey || event.buttons > 1) pane.panBy(now.x - before.x, now.y - before.y);
    else if (hand.tool(event) === "scroll" && hand.slices()) rest = scroll(hand, rest + before.y - now.y, Math.max(LEAST_SLICE_PX, canvas.clientHeight / hand.slices()));
    else if (hand.tool() === "ruler") stretch(pane, hand, fromMiddle(canvas, event));
    else if (hand.tool() === "window") hand.onWindow(dragged(pane.window, now.x - before.x, now.y - before.y));
    fingers.set(event.pointerId, now);
    hand.onView(pane.view);
  });
  canvas.addEventListener("wheel", (event) => {
    event.preventDefault();
    const lines = event.deltaMode === WheelEvent.DOM_DELTA_LINE ? 20 : 1;
    if (hand.slices() && !event.ctrlKey) {
      const way = -event.deltaY * lines; // a notch of a wheel is one slice, a pad moves by small parts of one
      rest = Math.abs(way) >= NOTCH_PX ? scroll(hand, Math.sign(way), 1) : scroll(hand, rest + way, NOTCH_PX);
      return;
    }
    const { x, y } = fromMiddle(canvas, event);
    pane.zoomBy(Math.exp(-event.deltaY * lines * WHEEL), x, y);
    hand.onView(pane.view);
  }, { passive: false });
  canvas.addEventListener("dblclick", () => {
    pane.fit();
    hand.onView(pane.view);
  });
  canvas.addEventListener("contextmenu", (event) => event.preventDefault());
}

/** The window after a drag by (`dx`, `dy`) CSS pixels. A lower center is a brighter picture. */
export function dragged(window, dx, dy) {
  return clampWindow({ center: window.center + dy / FULL_RANGE_PX, width: window.width + dx / FULL_RANGE_PX });
}

/** Goes through the slices by `way` CSS pixels, a slice each `size`; what is left for the next time. */
function scroll(hand, way, size) {
  const steps = Math.trunc(way / size);
  if (steps) hand.onSlices(steps);
  return way - steps * size;
}

/** Where the pointer is, CSS pixels from the canvas's middle. */
function fromMiddle(canvas, event) {
  const frame = canvas.getBoundingClientRect();
  return { x: event.clientX - frame.left - frame.width / 2, y: event.clientY - frame.top - frame.height / 2 };
}

function stretch(pane, hand, { x, y }) {
  if (pane.ruler) hand.onRuler({ from: pane.ruler.from, to: pane.placeAt(x, y) });
}

const point = (event) => ({ x: event.clientX, y: event.clientY });

function pinch(pane, fingers, moved, now) {
  const before = fingers.get(moved);
  const [, other] = [...fingers].find(([id]) => id !== moved);
  const spread = (a) => Math.hypot(a.x - other.x, a.y - other.y) || 1;
  const frame = pane.canvas.getBoundingClientRect();
  pane.zoomBy(spread(now) / spread(before), other.x - frame.left - frame.width / 2, other.y - frame.top - frame.height / 2);
}
