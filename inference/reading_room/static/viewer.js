// The viewer: one case, its radiograph or CT series on a pane, and beside it, if wanted, an earlier one of the same patient.

import { announce, at, h, toast } from "./dom.js";
import { day, moment, percent, t, tOr, verdictWords } from "./i18n.js";
import { ask } from "./api.js";
import { drawFinding } from "./finding.js";
import { drawClinical, prepareClinical } from "./clinical.js";
import { showDecision } from "./decision.js";
import { Radiograph } from "./radiograph.js";
import { nameOf } from "./worklist_rows.js";
import { currentQuery } from "./worklist.js";
import { chooseTool, prepareTools, showTools } from "./tools.js";
import { prepareTags } from "./tags.js";

const state = { id: null, case: null, linked: true, tool: "window", heat: false, opacity: 0.55, isChosen: false, main: null, previous: null };

let loading = new AbortController();

/** Wires the viewer once. */
export function prepareViewer(room) {
  const hand = (other) => ({
    tool: (event) => toolFor(event),
    follow: (view) => state.linked && other().follow(view),
    followSlices: (mm) => state.linked && other().moveByMm(mm),
    changed: () => showTools(state),
  });
  state.main = new Radiograph(at("pane-main"), hand(() => state.previous));
  state.previous = new Radiograph(at("pane-previous"), hand(() => state.main));
  prepareTags(() => state.case);
  prepareClinical(room.model, valuesChanged);
  prepareTools(state, { compareWith, heatChanged }, room.model.slices > 0);
  at("case-again").addEventListener("click", () => openCase(state.id));
  addEventListener("language", () => state.case && drawCase());
  addEventListener("back", () => {
    if (state.id && !state.case) openCase(state.id);
    for (const one of [state.main, state.previous]) one.slices?.want(one.slice);
  });
}

/** The tool of a hand on the image. A finger on a series goes through its slices, unless the reader has chosen another tool. */
function toolFor(event) {
  if (event?.pointerType === "touch" && state.main.slices && state.tool === "window" && !state.isChosen) chooseTool(state, "scroll");
  return state.tool;
}

/** Shows the case with this id, and asks for all it needs. */
export async function openCase(id) {
  leaveCase();
  state.id = id;
  showProblem(null);
  at("viewer").dataset.state = "loading";
  const { signal } = loading;
  try {
    const found = await ask(`/api/cases/${id}`, { signal });
    if (signal.aborted) return;
    state.case = found;
    drawCase();
    showDecision(found, refreshCase);
    announce(t("viewer.opened", { name: nameOf(found), verdict: verdictWords(found) }));
    await state.main.show(found, signal);
    heatChanged();
  } catch (problem) {
    if (problem.name !== "AbortError" && !signal.aborted) showProblem(problem);
  }
}

/** Forgets the case that is shown. */
export function leaveCase() {
  loading.abort();
  loading = new AbortController();
  Object.assign(state, { id: null, case: null });
  drawClinical(null);
  state.main.clear();
  closeComparison();
}

/** Goes to the next case of the worklist as it is filtered and ordered. `changes` are made to the filter. */
export async function goOn(backwards, changes = {}) {
  if (!state.id) return;
  const query = { ...currentQuery(), ...changes, offset: 0 };
  try {
    const next = await ask("/api/next", { body: { after: state.id, query, backwards } });
    if (next.case) location.hash = `#/case/${next.case}`;
    else toast(t(changes.status ? "viewer.none_open" : backwards ? "viewer.first" : "viewer.last"));
  } catch (problem) {
    toast(tOr(`error.${problem.code}`, t("error.internal")));
  }
}

/** The state that the keys act on. */
export const viewerState = () => state;

/** Shows or hides the heat maps by what is chosen now, and asks for those that are missing. */
export function heatChanged() {
  for (const radiograph of [state.main, state.previous]) radiograph.showHeat(state.heat, state.opacity, loading.signal);
  showTools(state);
}

/** Puts the earlier case with this id beside the present one; without an id closes it. */
export async function compareWith(id) {
  if (!id) return closeComparison();
  at("panes").dataset.panes = "2";
  at("pane-previous").hidden = false;
  showTools(state, id);
  const { signal } = loading;
  try {
    const earlier = await ask(`/api/cases/${id}`, { signal });
    if (signal.aborted) return undefined;
    await state.previous.show(earlier, signal);
    state.previous.follow(state.main.pane.view);
    drawCaptions();
    heatChanged();
  } catch (problem) {
    if (problem.name === "AbortError") return undefined;
    closeComparison();
    toast(tOr(`error.${problem.code}`, t("error.internal")));
  }
  return undefined;
}

function closeComparison() {
  state.previous.clear();
  at("pane-previous").hidden = true;
  at("panes").dataset.panes = "1";
  if (state.case) drawCaptions();
  showTools(state);
}

async function refreshCase() {
  const { signal } = loading;
  const found = await ask(`/api/cases/${state.id}`, { signal });
  if (signal.aborted) return;
  state.case = found;
  drawCase();
  showDecision(found, refreshCase);
}

/** Other values give another answer and another map. */
async function valuesChanged() {
  const { signal } = loading;
  await refreshCase();
  if (signal.aborted) return;
  await state.main.show(state.case, signal);
  heatChanged();
}

function drawCase() {
  at("viewer").dataset.state = "ready";
  at("viewer-title").textContent = nameOf(state.case);
  drawCaptions();
  at("compare").replaceChildren(h("option", { value: "", text: t("compare.none", { count: state.case.previous.length }) }),
    ...state.case.previous.map((line) => h("option", { value: line.id, text: optionOf(line) })));
  drawFinding(state.case);
  drawClinical(state.case);
  showTools(state);
}

function drawCaptions() {
  const earlier = state.previous.case;
  state.main.caption(captionOf(state.case), earlier ? t("compare.present") : "");
  if (earlier) state.previous.caption(captionOf(earlier), t("compare.earlier"));
}

const captionOf = (case_) => [nameOf(case_), case_.study_date ? day(case_.study_date) : moment(case_.arrived)];

function optionOf(line) {
  const date = day(line.study_date ?? line.arrived);
  const judged = line.verdict === "cannot judge" ? t("verdict.cannot_judge") : percent(line.probability);
  return `${date} · ${[line.view, judged].filter(Boolean).join(" · ")}`;
}

function showProblem(problem) {
  at("viewer").dataset.state = problem ? "failed" : "loading";
  at("case-problem").textContent = problem ? tOr(`error.${problem.code}`, t("error.internal")) : "";
}
