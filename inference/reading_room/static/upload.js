// Files dropped anywhere on the page, or chosen. Each is sent by itself, three at a time, so that each has its progress and a bad one
// stops no other. Names of files stay on this page: they may name a patient.

import { announce, at, h, icon } from "./dom.js";
import { megabytes, t, tOr } from "./i18n.js";
import { Problem, sendFile } from "./api.js";
import { valueProblem } from "./clinical.js";
import { isTable, readTable } from "./upload_table.js";

const AT_ONCE = 3;
const BUSY_TRIES = 5;
/** By case, what this page sent it as: {file, patient}. Only here, in memory: it goes with the page. */
const sent = new Map();
const waiting = [];
const jobs = [];

let running = 0;
let limits = null;
let clinical = [];
let onArrival = () => {};

/** Wires the drop zone and the chooser; `told` is called whenever a case has arrived. */
export function prepareUpload(room, told) {
  limits = room.limits;
  clinical = room.model.clinical.map(({ name }) => name);
  onArrival = told;
  at("files").addEventListener("change", () => {
    addFiles([...at("files").files]);
    at("files").value = "";
  });
  at("choose").addEventListener("click", chooseFiles);
  at("uploads-clear").addEventListener("click", clearDone);
  addEventListener("dragover", (event) => showTarget(event, carriesFiles(event)));
  addEventListener("dragleave", (event) => showTarget(event, event.relatedTarget !== null));
  addEventListener("drop", drop);
  addEventListener("language", () => jobs.forEach(draw));
}

/** What this page sent the case as, {file, patient} (empty where unknown), or undefined. */
export const sentAs = (id) => sent.get(id);

export function chooseFiles() {
  at("files").click();
}

const carriesFiles = (event) => [...(event.dataTransfer?.types ?? [])].includes("Files");

function showTarget(event, on) {
  if (!carriesFiles(event)) return;
  event.preventDefault();
  document.body.classList.toggle("dropping", on && !at("room").hidden);
}

async function drop(event) {
  showTarget(event, false);
  if (at("room").hidden || !carriesFiles(event)) return;
  const entries = [...event.dataTransfer.items].map((item) => item.webkitGetAsEntry?.()).filter(Boolean);
  const files = entries.length ? await Promise.all(entries.map(filesOf)) : [[...event.dataTransfer.files]];
  addFiles(files.flat());
}

/** The files of a dropped file or folder. A study is often a folder. */
async function filesOf(entry) {
  if (entry.isFile) return new Promise((resolve) => entry.file((file) => resolve([file]), () => resolve([])));
  const reader = entry.createReader();
  const found = [];
  for (;;) {
    const batch = await new Promise((resolve) => reader.readEntries(resolve, () => resolve([])));
    if (!batch.length) return (await Promise.all(found.map(filesOf))).flat();
    found.push(...batch);
  }
}

async function addFiles(all) {
  const tables = clinical.length ? all.filter(isTable) : [];
  const files = all.filter((file) => !tables.includes(file));
  const rows = new Map();
  for (const table of tables) takeTable(table, await table.text(), files, rows);
  const fresh = files.map((file) => ({ file, values: rows.get(file.name) ?? null, state: "waiting", part: 0, code: "", case: null, row: h("li", { class: "upload" }) }));
  jobs.push(...fresh);
  waiting.push(...fresh);
  at("upload-rows").append(...fresh.map((job) => job.row));
  at("uploads").hidden = !jobs.length;
  fresh.forEach(draw);
  while (running < AT_ONCE && waiting.length) work();
}

/** Reads a table of clinical values, and says in the list what came of it. */
function takeTable(table, text, files, rows) {
  const found = readTable(text, clinical);
  for (const [name, values] of found.rows) rows.set(name, values);
  const count = files.filter((file) => found.rows.has(file.name)).length;
  const words = () => (found.problem ? t(`upload.${found.problem}`) : t("upload.table", { count, columns: found.columns.join(", ") }));
  const job = { file: table, state: found.problem ? "refused" : "known", part: 1, code: "", case: null, words, row: h("li", { class: "upload" }) };
  jobs.push(job);
  at("upload-rows").append(job.row);
  draw(job);
}

async function work() {
  running++;
  while (waiting.length) await send(waiting.shift());
  running--;
  if (!running) announce(summary());
}

async function send(job) {
  if (job.file.size > limits.file_bytes) return finish(job, "refused", "file_too_large");
  update(job, { state: "sending" });
  try {
    const result = await patiently(() => sendFile(job.file, job.values, (part) => update(job, { part, state: part < 1 ? "sending" : "judging" })));
    job.case = result.case;
    job.patient = result.patient_name || sent.get(job.case)?.patient || "";
    if (job.case) sent.set(job.case, { file: job.file.name, patient: job.patient });
    job.column = result.column ?? null;
    finish(job, result.outcome, result.error ?? "");
    if (result.outcome !== "refused") onArrival();
  } catch (problem) {
    finish(job, "failed", problem.code ?? "internal");
  }
}

const AGAIN = new Set(["busy", "not_ready"]);

/** Tries again when the server says that it is busy or still starting. */
async function patiently(action) {
  for (let tries = 1; ; tries++) {
    try {
      return await action();
    } catch (problem) {
      if (!(problem instanceof Problem) || !AGAIN.has(problem.code) || tries >= BUSY_TRIES) throw problem;
      await new Promise((resolve) => setTimeout(resolve, 1000 * (problem.retrySec ?? 1)));
    }
  }
}

function finish(job, state, code) {
  update(job, { state, code, part: 1 });
  if (code) announce(`${job.file.name}: ${sentence(job)}`);
}

function update(job, change) {
  Object.assign(job, change);
  draw(job);
}

function draw(job) {
  const { file, state, part } = job;
  const bar = h("progress", { max: "1", value: state === "judging" ? null : String(part), "aria-label": file.name });
  const name = h("span", { class: "upload-name", text: job.patient ? `${file.name} · ${job.patient}` : file.name, title: file.name });
  const busy = state === "sending" || state === "judging";
  const link = job.case ? h("a", { href: `#/case/${job.case}`, text: t("upload.open") }) : null;
  const again = state === "failed" ? h("button", { type: "button", class: "text", text: t("upload.again"), onclick: () => retry(job) }) : null;
  job.row.dataset.state = state;
  job.row.replaceChildren(icon(iconOf(state)), name, h("span", { class: "upload-size", text: megabytes(file.size) }),
    busy ? bar : h("span", { class: "upload-words", text: sentence(job) }), link ?? again ?? "");
  at("uploads-count").textContent = summary();
  at("uploads-clear").hidden = jobs.every((one) => ["waiting", "sending", "judging"].includes(one.state));
}

function sentence({ state, code, column, words }) {
  if (words) return words();
  if (!code) return t(`upload.${state}`);
  if (code.startsWith("value_")) return valueProblem({ code, column });
  return tOr(`error.${code}`, t("error.internal")).replace("{limit}", megabytes(limits.file_bytes));
}

const iconOf = (state) => ({ new: "check", known: "check", refused: "stop", failed: "stop" })[state] ?? "clock";

function retry(job) {
  update(job, { state: "waiting", code: "", part: 0 });
  waiting.push(job);
  if (running < AT_ONCE) work();
}

function summary() {
  const of = (...states) => jobs.filter((job) => !job.words && states.includes(job.state)).length;
  const parts = [t("upload.done", { count: of("new", "known") })];
  if (of("refused", "failed")) parts.push(t("upload.bad", { count: of("refused", "failed") }));
  if (of("waiting", "sending", "judging")) parts.push(t("upload.left", { count: of("waiting", "sending", "judging") }));
  return parts.join(" · ");
}

function clearDone() {
  for (const job of jobs.filter(({ state }) => ["new", "known", "refused", "failed"].includes(state))) {
    job.row.remove();
    jobs.splice(jobs.indexOf(job), 1);
  }
  at("uploads").hidden = !jobs.length;
}
