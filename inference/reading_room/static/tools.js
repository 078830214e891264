// The viewer's toolbar and the keys that do the same.

import { announce, at, toast } from "./dom.js";
import { percent, t } from "./i18n.js";
import { addKeys } from "./keys.js";
import { drawLegend, mayShowHeat } from "./heat.js";

const STEP_PX = 60;
const ZOOM_STEP = 1.25;
const WINDOW_STEP = 0.04;
const OPACITY_STEP = 0.1;
const TOOLS = ["window", "pan", "ruler", "lens", "scroll"];
const PRESETS = ["own", "auto", "lungs", "mediastinum", "full"];
const CT_PRESETS = ["lungs", "mediastinum", "bone", "full"];
const FAR = 10;

/** Wires buttons and keys to `state` of the viewer; `act` has `compareWith` and `heatChanged`; `judgesSeries`, whether the model does. */
export function prepareTools(state, act, judgesSeries) {
  drawLegend(at("legend"));
  const zoom = (factor) => look(state, (pane) => pane.zoomBy(factor));
  const actions = {
    "zoom-out": () => zoom(1 / ZOOM_STEP),
    "zoom-in": () => zoom(ZOOM_STEP),
    fit: () => look(state, (pane) => pane.fit()),
    one: () => look(state, (pane) => pane.oneToOne()),
    invert: () => both(state, (radiograph) => radiograph.case && radiograph.invert()),
    reset: () => both(state, (radiograph) => radiograph.reset()),
    heat: () => toggleHeat(state, act),
    link: () => toggleLink(state),
    turn: () => both(state, (radiograph) => radiograph.pane.turn()),
    mirror: () => both(state, (radiograph) => radiograph.pane.mirror()),
    strongest: () => state.main.toStrongest(),
    ...Object.fromEntries(TOOLS.map((tool) => [`tool-${tool}`, () => chooseTool(state, tool)])),
  };
  for (const [id, action] of Object.entries(actions)) at(id).addEventListener("click", action);
  for (const tool of TOOLS) at(`tool-${tool}`).addEventListener("click", () => Object.assign(state, { isChosen: true }));
  at("preset").addEventListener("change", () => both(state, (radiograph) => radiograph.choosePreset(at("preset").value)));
  at("opacity").addEventListener("input", () => setOpacity(state, act, at("opacity").value / 100));
  at("compare").addEventListener("change", () => act.compareWith(at("compare").value));
  bindKeys(state, act, actions, zoom);
  if (judgesSeries) bindSeriesKeys(state, actions);
}

const isSeries = (state) => Boolean(state.main?.slices);

function bindSeriesKeys(state, actions) {
  const key = (words, keys, action) => addKeys({ scope: "viewer", words: `keys.${words}`, keys, act: action, when: () => isSeries(state) });
  const ends = { Home: Infinity, End: -Infinity };
  key("slices", ["ArrowUp", "ArrowDown"], (pressed) => state.main.moveBy(pressed === "ArrowUp" ? 1 : -1));
  key("slices_far", ["PageUp", "PageDown"], (pressed) => state.main.moveBy(pressed === "PageUp" ? FAR : -FAR));
  key("slices_ends", ["Home", "End"], (pressed) => state.main.moveBy(ends[pressed]));
  key("strongest", ["y"], actions.strongest);
  key("level_series", [".", ","], (pressed) => nudge(state, pressed === "." ? -1 : 1, 0));
}

function bindKeys(state, act, actions, zoom) {
  const key = (words, keys, action, when) => addKeys({ scope: "viewer", words: `keys.${words}`, keys, act: action, when });
  key("heat", ["h"], actions.heat);
  key("opacity", ["[", "]"], (pressed) => setOpacity(state, act, state.opacity + (pressed === "]" ? OPACITY_STEP : -OPACITY_STEP)));
  key("presets", ["1", "2", "3", "4", "5"], (pressed) => both(state, (one) => one.choosePreset((one.slices ? CT_PRESETS : PRESETS)[Number(pressed) - 1])));
  key("width", ["ArrowLeft", "ArrowRight"], (pressed) => nudge(state, 0, pressed === "ArrowRight" ? 1 : -1));
  key("level", ["ArrowUp", "ArrowDown"], (pressed) => nudge(state, pressed === "ArrowUp" ? -1 : 1, 0), () => !isSeries(state));
  key("zoom", ["+", "-", "="], (pressed) => zoom(pressed === "-" ? 1 / ZOOM_STEP : ZOOM_STEP));
  key("pan", ["Shift+ArrowLeft", "Shift+ArrowRight", "Shift+ArrowUp", "Shift+ArrowDown"], (pressed) => pan(state, pressed));
  key("fit", ["f"], actions.fit);
  key("one", ["o"], actions.one);
  key("tool", ["w"], () => chooseTool(state, state.tool === "window" ? "pan" : "window"));
  key("ruler", ["d"], () => chooseTool(state, state.tool === "ruler" ? "window" : "ruler"));
  key("lens", ["z"], () => chooseTool(state, state.tool === "lens" ? "window" : "lens"));
  key("turn", ["t"], actions.turn);
  key("mirror", ["x"], actions.mirror);
  key("invert", ["i"], actions.invert);
  key("reset", ["r"], actions.reset);
  key("compare", ["c"], () => compareKey(state, act));
  key("link", ["s"], actions.link);
}

/** Puts the state into the toolbar. `comparing` is the id of a case that is being loaded. */
export function showTools(state, comparing = state.previous?.case?.id ?? "") {
  if (!state.main || !state.previous) return;
  const { case: shown, pane, preset } = state.main;
  for (const [id, on] of [["heat", state.heat && mayShowHeat(shown)], ["invert", pane.inverted], ["link", state.linked],
    ["mirror", pane.mirrored], ...TOOLS.map((tool) => [`tool-${tool}`, state.tool === tool])]) at(id).setAttribute("aria-pressed", String(Boolean(on)));
  showSeriesTools(state);
  at("preset").value = preset;
  at("heat").disabled = Boolean(shown) && !mayShowHeat(shown);
  at("heat").title = at("heat").disabled ? t("heat.none") : t("heat.title");
  at("opacity").disabled = !state.heat;
  at("opacity").value = Math.round(100 * state.opacity);
  at("opacity").setAttribute("aria-valuetext", percent(state.opacity));
  at("legend-box").hidden = !pane.heat && !(state.main.slices && state.main.heat); // the map of the next slice is on its way
  at("legend-scale").hidden = Boolean(pane.heat?.isEmpty);
  at("legend-empty").hidden = !pane.heat?.isEmpty;
  showMapWarning(state.main.slices && state.main.heat ? { isEmpty: false } : pane.heat, shown);
  at("compare").disabled = !shown?.previous.length;
  at("compare").value = comparing;
  at("link").hidden = !comparing;
}

/** What only a series has, and what only a radiograph has. */
function showSeriesTools(state) {
  const { slices } = state.main;
  for (const id of ["strongest", "tool-scroll"]) at(id).hidden = !slices;
  at("strongest").disabled = !slices?.series.strongest;
  if (!slices && state.tool === "scroll") chooseTool(state, "window");
  for (const option of at("preset").options) {
    if (option.value !== "custom") option.hidden = !(slices ? CT_PRESETS : PRESETS).includes(option.value);
  }
}

/** Says below the probability what is wrong with where the map lies, while it can be seen; that it is empty stands in the legend. */
function showMapWarning(heat, shown) {
  const told = heat && !heat.isEmpty ? shown.map_warnings.filter((warning) => warning !== "empty") : [];
  const text = told.map((warning) => t(`heat.warning_${warning}`)).join(" ");
  if (at("map-warning").textContent !== text) at("map-warning").textContent = text;
  at("map-warning").hidden = !text;
}

function both(state, action) {
  action(state.main);
  action(state.previous);
}

/** Moves the present pane, and the other with it. */
function look(state, action) {
  action(state.main.pane);
  if (state.linked) state.previous.follow(state.main.pane.view);
}

function pan(state, pressed) {
  const [dx, dy] = { Left: [1, 0], Right: [-1, 0], Up: [0, 1], Down: [0, -1] }[pressed.replace("Shift+Arrow", "")];
  look(state, (pane) => pane.panBy(dx * STEP_PX, dy * STEP_PX));
}

function nudge(state, level, width) {
  both(state, (radiograph) => {
    if (!radiograph.case) return;
    const window = radiograph.pane.window;
    radiograph.setWindow({ center: window.center + level * WINDOW_STEP, width: window.width + width * WINDOW_STEP });
  });
}

/** Chooses what dragging does. */
export function chooseTool(state, tool) {
  state.tool = tool;
  for (const one of [state.main, state.previous]) {
    one.figure.dataset.tool = tool;
    one.pane.setLens(null);
    if (tool !== "ruler") one.measure(null);
  }
  showTools(state);
}

function toggleHeat(state, act) {
  if (state.main.case && !mayShowHeat(state.main.case)) {
    toast(t("heat.none"));
    return;
  }
  state.heat = !state.heat;
  act.heatChanged();
  announce(t(state.heat ? "heat.shown" : "heat.hidden"));
}

function setOpacity(state, act, value) {
  state.opacity = Math.min(1, Math.max(0.1, value));
  if (state.heat) act.heatChanged();
  else showTools(state);
}

function toggleLink(state) {
  if (!state.previous.case) return;
  state.linked = !state.linked;
  if (state.linked) state.previous.follow(state.main.pane.view);
  showTools(state);
}

function compareKey(state, act) {
  const options = [...at("compare").options].map((option) => option.value);
  if (options.length < 2) toast(t("compare.nothing"));
  else act.compareWith(state.previous.case ? "" : options[1]);
}
