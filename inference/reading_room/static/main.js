// The page's start: who is there, what the room is, and which of its two pages is in front. Addresses hold nothing but a case's opaque
// number.

import { at } from "./dom.js";
import { applyWords, currentLanguage, day, percent, setLanguage, t, tOr } from "./i18n.js";
import { ask } from "./api.js";
import { tryNow } from "./connection.js";
import { addKeys, openHelp, prepareKeys, setScope } from "./keys.js";
import { currentUser, logout, needLogin, prepareLogin, resume } from "./session.js";
import { chooseFiles, prepareUpload } from "./upload.js";
import { loadWorklist, moveFocus, prepareWorklist } from "./worklist.js";
import { goOn, openCase, leaveCase, prepareViewer, viewerState } from "./viewer.js";
import { agree, chooseLabel, LABEL_KEYS, openCorrection, prepareDecision } from "./decision.js";
import { preparePassword } from "./password.js";
import { openTags } from "./tags.js";
import { prepareRemoval } from "./remove.js";

const ROUTE = /^#\/case\/([0-9a-f]{32})$/;
const LANGUAGES = { en: "zh", zh: "en" };

let room = null;
let beginning = false;
let arrivals = 0;

start();

async function start() {
  applyWords();
  drawLanguage();
  at("language").addEventListener("click", () => setLanguage(LANGUAGES[currentLanguage()]));
  at("login-language").addEventListener("click", () => setLanguage(LANGUAGES[currentLanguage()]));
  addEventListener("language", drawLanguage);
  at("lost-now").addEventListener("click", tryNow);
  at("start-again").addEventListener("click", begin);
  addEventListener("back", () => at("starting").hidden || begin());
  prepareLogin(enter);
  await begin();
}

/** Goes on with the browser's session, or asks for a login. */
async function begin() {
  if (beginning || room) return;
  beginning = true;
  showStart("");
  try {
    if (await resume()) {
      await enter();
    } else {
      showStart(null);
      needLogin("");
    }
  } catch (problem) {
    showStart(problem.code);
  }
  beginning = false;
}

/** With somebody signed in: asks for the room, wires everything, and shows the page that the address names. */
async function enter() {
  try {
    room = await ask("/api/room");
  } catch (problem) {
    showStart(problem.code);
    return;
  }
  showStart(null);
  if (room.model.slices) {
    for (const part of document.querySelectorAll("[data-t-ct]")) part.dataset.t = part.dataset.tCt;
    applyWords();
  }
  if (room.model.positive === "finding") {
    for (const part of document.querySelectorAll('[data-t="heat.strong"]')) part.dataset.t = "heat.strong.any";
    for (const part of document.querySelectorAll('[data-t-title="heat.strong"]')) part.dataset.tTitle = "heat.strong.any";
    applyWords();
  }
  prepareWorklist(room);
  prepareViewer(room);
  prepareDecision(room.model.labels, () => goOn(false, { status: "open" }));
  prepareUpload(room, arrived);
  preparePassword();
  prepareRemoval(() => viewerState().id, backToList);
  prepareKeys();
  bindKeys();
  const buttons = { logout, "open-help": openHelp, back: backToList, "case-before": () => goOn(true), "case-after": () => goOn(false) };
  for (const [id, action] of Object.entries(buttons)) at(id).addEventListener("click", action);
  document.querySelector(".skip").addEventListener("click", (event) => {
    event.preventDefault();
    (at("worklist").hidden ? at("pane-main").querySelector("canvas") : at("worklist")).focus();
  });
  addEventListener("hashchange", route);
  addEventListener("back", () => at("worklist").hidden || loadWorklist());
  addEventListener("language", () => {
    at("toast").hidden = true;
    drawRoom();
  });
  applyWords();
  drawRoom();
  route();
}

function route() {
  const found = ROUTE.exec(location.hash);
  const scope = found ? "viewer" : "worklist";
  setScope(scope);
  at("worklist").hidden = scope !== "worklist";
  at("viewer").hidden = scope !== "viewer";
  document.body.dataset.page = scope;
  document.title = `${t(`title.${scope}`)} – pneumofed`; // nothing of a patient: the browser keeps titles
  if (found) {
    scrollTo(0, 0); // on a narrow screen the list was longer than the viewer
    openCase(found[1]);
    at("pane-main").querySelector("canvas").focus({ preventScroll: true });
  } else {
    const left = viewerState().id;
    leaveCase();
    loadWorklist().then(() => left && focusRow(left));
  }
}

/** Back in the list the reader stands where they left it. */
function focusRow(id) {
  const link = at("rows").querySelector(`tr[data-case="${id}"] a.open`);
  (link ?? at("worklist")).focus();
}

function backToList() {
  location.hash = "#/";
}

function arrived() {
  clearTimeout(arrivals);
  arrivals = setTimeout(() => at("worklist").hidden || loadWorklist(), 300);
}

function bindKeys() {
  const key = (scope, words, keys, act) => addKeys({ scope, words: `keys.${words}`, keys, act });
  key("all", "help", ["?"], openHelp);
  key("all", "language", ["l"], () => setLanguage(LANGUAGES[currentLanguage()]));
  key("all", "upload", ["u"], chooseFiles);
  key("worklist", "rows", ["ArrowDown", "ArrowUp", "j", "k"], (pressed) => moveFocus(["ArrowDown", "j"].includes(pressed) ? 1 : -1));
  key("worklist", "search", ["/"], () => at("search").focus());
  key("viewer", "next", ["n", "j"], () => goOn(false));
  key("viewer", "before", ["p", "k"], () => goOn(true));
  key("viewer", "next_open", ["g"], () => goOn(false, { status: "open" }));
  key("viewer", "agree", ["a"], agree);
  key("viewer", "correct", ["e"], openCorrection);
  key("viewer", "labels", LABEL_KEYS, chooseLabel);
  key("viewer", "tags", ["v"], () => openTags(viewerState().case));
  key("viewer", "note", ["m"], () => at("note").focus());
  key("viewer", "back", ["Escape", "b"], backToList);
}

function drawLanguage() {
  const other = currentLanguage() === "en" ? "中文" : "English";
  for (const id of ["language", "login-language"]) {
    at(id).textContent = other;
    at(id).lang = currentLanguage() === "en" ? "zh-Hans" : "en";
  }
}

function drawRoom() {
  at("hospital").textContent = room.hospital;
  at("user-name").textContent = currentUser().user;
  const { name, digest, created, signer, phantom, threshold, threshold_of: hospital } = room.model;
  const whose = hospital ? t("top.threshold", { threshold: percent(threshold, 1), hospital }) : "";
  at("model-name").textContent = name;
  at("model-name").title = t("top.model", { digest: digest.slice(0, 12), created: day(created), signer }) + whose;
  at("phantom").hidden = !phantom;
  at("list-retention").textContent = t("list.retention", { count: room.retention_days });
  for (const id of ["export-labels", "remove"]) at(id).hidden = currentUser().role !== "admin";
  document.title = `${t(`title.${document.body.dataset.page ?? "worklist"}`)} – pneumofed`;
}

function showStart(code) {
  at("starting").hidden = code === null;
  at("starting-words").textContent = code ? tOr(`error.${code}`, t("error.internal")) : t("list.loading");
  at("start-again").hidden = !code;
  at("room").hidden = code !== null;
}
