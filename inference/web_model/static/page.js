// The page: files are chosen, judged one after the other, and shown, the newest on top. Nothing is kept when the page is closed.

import { at, h } from "./dom.js";
import { applyWords, currentLanguage, day, number, setLanguage, t, tOr } from "./i18n.js";
import { classRows, judgementOf } from "./judgement.js";
import { judgeFile, openModel, prepare } from "./model.js";
import { ImageProblem } from "./pixels.js";

const LANGUAGES = { en: "zh", zh: "en" };
const results = [];
let waiting = 0;
let chain = Promise.resolve();
let status = { key: "web.starting" };
let installPrompt = null;

/** For tests, and for pages that are built on this one. */
globalThis.pneumofed = Object.freeze({ openModel, judgeFile, prepare });

begin();

async function begin() {
  applyWords();
  drawLanguage();
  at("language").addEventListener("click", () => setLanguage(LANGUAGES[currentLanguage()]));
  addEventListener("language", drawAll);
  at("files").addEventListener("change", () => {
    take([...at("files").files]);
    at("files").value = ""; // the same file may be chosen again
  });
  at("clear").addEventListener("click", () => {
    results.length = 0;
    drawAll();
  });
  prepareDrop();
  prepareInstall();
  try {
    const { facts } = await openModel();
    at("phantom").hidden = !facts.card.phantom;
    drawFacts(facts);
    at("files").disabled = false;
    say("web.ready");
    document.body.dataset.state = "ready";
  } catch (problem) {
    console.error(problem);
    say("web.cannot_start");
    document.body.dataset.state = "failed";
  }
}

function take(files) {
  for (const file of files) {
    waiting++;
    chain = chain.then(() => judgeNext(file));
  }
}

async function judgeNext(file) {
  say("web.judging", { name: file.name });
  await painted(); // the network holds the page for as long as it runs
  try {
    results.unshift({ name: file.name, ...(await judgeFile(file)) });
  } catch (problem) {
    if (!(problem instanceof ImageProblem)) console.error(problem);
    results.unshift({ name: file.name, problem: problem instanceof ImageProblem ? problem.reason : "failed" });
  }
  waiting--;
  if (!waiting) say("web.ready");
  drawResults();
  at("results").firstElementChild.scrollIntoView({ block: "nearest" });
}

/** Two frames later: the words are on the screen. A hidden page has no frames. */
const painted = () =>
  new Promise((resolve) => (document.hidden ? resolve() : requestAnimationFrame(() => requestAnimationFrame(resolve))));

function drawAll() {
  drawLanguage();
  drawResults();
  say(status.key, status.values);
  openModel().then(({ facts }) => drawFacts(facts), () => {});
}

function drawLanguage() {
  at("language").textContent = currentLanguage() === "en" ? "中文" : "English";
  at("language").lang = currentLanguage() === "en" ? "zh-Hans" : "en";
  document.title = t("web.title");
}

function say(key, values = {}) {
  status = { key, values };
  at("status").textContent = t(key, values);
}

function drawResults() {
  at("results").replaceChildren(...results.map(drawResult));
  at("clear").hidden = !results.length;
  at("intro").hidden = Boolean(results.length);
}

function drawResult(result) {
  const name = h("h2", { class: "name", text: result.name });
  if (result.problem) {
    const words = tOr(`error.${result.problem}`, t("error.corrupt"));
    return h("li", { class: "result", "data-state": "refused" }, name, h("p", { class: "problem", text: words }));
  }
  const time = Object.values(result.milliseconds).reduce((sum, value) => sum + value);
  const classes = Object.keys(result.classes ?? {}).length > 2 ? h("ul", { class: "classes" }, ...classRows(result)) : null;
  return h("li", { class: "result finding", "data-state": "judged", "data-verdict": result.verdict === "finding" ? "pneumonia" : result.verdict }, name,
    h("figure", {}, pictureOf(result.square), h("figcaption", { class: "soft", text: t("web.seen", { size: number(result.square.width) }) })),
    h("div", { class: "judgement" }, ...judgementOf(result), classes, h("p", { class: "soft", text: t("web.took", { ms: number(time) }) })));
}

/** What the network was given, as a picture. */
function pictureOf({ height, width, pixels }) {
  const canvas = h("canvas", { width, height, role: "img", "aria-label": t("web.picture") });
  const context = canvas.getContext("2d");
  const image = context.createImageData(width, height);
  pixels.forEach((value, i) => image.data.set([255 * value, 255 * value, 255 * value, 255], 4 * i));
  context.putImageData(image, 0, 0);
  return canvas;
}

function drawFacts(facts) {
  const { card, population } = facts;
  const kinds = Object.values(population).filter((groups) => groups.length);
  const judged = kinds.map((groups) => groups.map((group) => tOr(`group.${group}`, group)).join(t("population.and"))).join("; ");
  const rows = [
    ["name", facts.name],
    ["version", facts.digest.slice(0, 16)],
    ["created", day(facts.created)],
    ["signer", facts.signer],
    ["sites", number(card.sites)],
    ["images", card.training_images === null ? "" : number(card.training_images)],
    ["judged_on", population.age.length ? judged : t("population.model_unknown")],
    ["threshold", `${number(100 * facts.threshold, 1)}%${facts.threshold_of ? ` (${facts.threshold_of})` : ""}`],
    ["calibration", t(facts.calibration.lines.length ? "web.calibrated" : "web.not_calibrated")],
    ["graph", t(`web.graph_${facts.precision}`)],
    ["software", facts.software],
  ];
  const known = rows.filter(([, value]) => value);
  at("facts-list").replaceChildren(...known.map(([key, value]) => h("div", {}, h("dt", { text: t(`fact.${key}`) }), h("dd", { text: value }))));
  at("virtual").hidden = !card.virtual;
}

function prepareDrop() {
  addEventListener("dragover", (event) => {
    event.preventDefault();
    document.body.classList.add("dropping");
  });
  for (const name of ["dragleave", "drop"]) addEventListener(name, () => document.body.classList.remove("dropping"));
  addEventListener("drop", (event) => {
    event.preventDefault();
    if (document.body.dataset.state === "ready") take([...event.dataTransfer.files]);
  });
}

/** Where the page is served, it can be installed: its manifest and its worker are of no use, and refused, from a folder. */
function prepareInstall() {
  if (!location.protocol.startsWith("http") || !("serviceWorker" in navigator)) return;
  document.head.append(h("link", { rel: "manifest", href: "manifest.json" }), h("link", { rel: "apple-touch-icon", href: "icon-192.png" }));
  navigator.serviceWorker.register("sw.js").then(
    () => navigator.serviceWorker.ready.then(() => (at("offline").hidden = false)),
    () => {}, // a plain http address of another machine: the page works, and cannot be installed
  );
  addEventListener("beforeinstallprompt", (event) => {
    event.preventDefault();
    installPrompt = event;
    at("install").hidden = false;
  });
  at("install").addEventListener("click", () => {
    installPrompt?.prompt();
    at("install").hidden = true;
  });
}
