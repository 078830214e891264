// Files dropped anywhere on the page, or chosen. Each is sent by itself, three at a time, so that each has its progress and a bad one
// stops no other. Where the model judges CT, what lies in one folder is sent together, as one series. Names of files stay on this page: they
// may name a patient.

import { announce, at, h, icon } from "./dom.js";
import { fileSize, t, tOr } from "./i18n.js";
import { Problem, sendImage } from "./api.js";
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
let judgesSeries = false;
let onArrival = () => {};

/** Wires the drop zone and the chooser; `told` is called whenever a case has arrived. */
export function prepareUpload(room, told) {
  limits = room.limits;
  clinical = room.model.clinical.map(({ name }) => name);
  onArrival = told;
  judgesSeries = room.model.slices > 0;
  for (const id of ["files", "folder"]) {
    at(id).addEventListener("change", () => {
      addFiles([...at(id).files].map((file) => ({ file, folder: folderOf(file.webkitRelativePath) })));
      at(id).value = "";
    });
  }
  at("choose").addEventListener("click", chooseFiles);
  at("choose-folder").hidden = !judgesSeries;
  at("choose-folder").addEventListener("click", () => at("folder").click());
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
  const loose = [...event.dataTransfer.files].map((file) => ({ file, folder: "" }));
  addFiles(entries.length ? (await Promise.all(entries.map(filesOf))).flat() : loose);
}

const folderOf = (path) => path.split("/").slice(0, -1).join("/");

/** The files of a dropped file or folder, each {file, folder}. A study is often a folder. */
async function filesOf(entry) {
  const folder = folderOf(entry.fullPath.replace(/^\//, ""));
  if (entry.isFile) return new Promise((resolve) => entry.file((file) => resolve([{ file, folder }]), () => resolve([])));
  const reader = entry.createReader();
  const found = [];
  for (;;) {
    const batch = await new Promise((resolve) => reader.readEntries(resolve, () => resolve([])));
    if (!batch.length) return (await Promise.all(found.map(filesOf))).flat();
    found.push(...batch);
  }
}

async function addFiles(found) {
  const all = found.map(({ file }) => file);
  const tables = clinical.length ? all.filter(isTable) : [];
  const files = all.filter((file) => !tables.includes(file));
  const rows = new Map();
  for (const table of tables) takeTable(table, await table.text(), files, rows);
  const images = judgesSeries ? seriesOf(found) : files.map((file) => ({ name: file.name, files: [file] }));
  const fresh = images.map((image) => ({ ...image, size: image.files.reduce((sum, file) => sum + file.size, 0), values: rows.get(image.name) ?? null,
    state: "waiting", part: 0, code: "", cause: "", case: null, row: h("li", { class: "upload" }) }));
  jobs.push(...fresh);
  waiting.push(...fresh);
  at("upload-rows").append(...fresh.map((job) => job.row));
  at("uploads").hidden = !jobs.length;
  fresh.forEach(draw);
  while (running < AT_ONCE && waiting.length) work();
}

const WHOLE = /\.(nii|nii\.gz|zip)$/i;
const NO_IMAGE = /^(\..*|DICOMDIR|Thumbs\.db)$/i;

/** The series in what was dropped or chosen: a NIfTI or a zip each by itself, and of each folder all other files together. */
function seriesOf(found) {
  const folders = new Map();
  const whole = [];
  for (const { file, folder } of found) {
    if (WHOLE.test(file.name)) whole.push({ name: file.name, files: [file] });
    else if (!NO_IMAGE.test(file.name)) folders.set(folder, [...(folders.get(folder) ?? []), file]);
  }
  const together = [...folders].map(([folder, files]) => ({ name: files.length > 1 && folder ? folder : files[0].name, files }));
  return [...together, ...whole];
}

/** Reads a table of clinical values, and says in the list what came of it. */
function takeTable(table, text, files, rows) {
  const found = readTable(text, clinical);
  for (const [name, values] of found.rows) rows.set(name, values);
  const count = files.filter((file) => found.rows.has(file.name)).length;
  const words = () => (found.problem ? t(`upload.${found.problem}`) : t("upload.table", { count, columns: found.columns.join(", ") }));
  const job = { name: table.name, files: [table], size: table.size, state: found.problem ? "refused" : "known", part: 1, code: "", case: null, words, row: h("li", { class: "upload" }) };
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
  if (job.files.length > limits.files) return finish(job, "refused", "too_many_files");
  if (job.size > (job.files.length > 1 ? limits.request_bytes : limits.file_bytes)) return finish(job, "refused", "file_too_large");
  update(job, { state: "sending" });
  try {
    const result = await patiently(() => sendImage(job.files, job.values, (part) => update(job, { part, state: part < 1 ? "sending" : "judging" })));
    job.case = result.case;
    job.patient = result.patient_name || sent.get(job.case)?.patient || "";
    if (job.case) sent.set(job.case, { file: job.name, patient: job.patient });
    job.cause = result.cause;
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
  if (code) announce(`${job.name}: ${sentence(job)}`);
}

function update(job, change) {
  Object.assign(job, change);
  draw(job);
}

function draw(job) {
  const { name: sentName, state, part } = job;
  const bar = h("progress", { max: "1", value: state === "judging" ? null : String(part), "aria-label": sentName });
  const slices = job.files.length > 1 ? t("upload.files", { count: job.files.length }) : "";
  const name = h("span", { class: "upload-name", text: [sentName, slices, job.patient].filter(Boolean).join(" · "), title: sentName });
  const busy = state === "sending" || state === "judging";
  const link = job.case ? h("a", { href: `#/case/${job.case}`, text: t("upload.open") }) : null;
  const again = state === "failed" ? h("button", { type: "button", class: "text", text: t("upload.again"), onclick: () => retry(job) }) : null;
  job.row.dataset.state = state;
  job.row.replaceChildren(icon(iconOf(state)), name, h("span", { class: "upload-size", text: fileSize(job.size) }),
    busy ? bar : h("span", { class: "upload-words", text: sentence(job) }), link ?? again ?? "");
  at("uploads-count").textContent = summary();
  at("uploads-clear").hidden = jobs.every((one) => ["waiting", "sending", "judging"].includes(one.state));
}

function sentence({ state, code, cause, column, words }) {
  if (words) return words();
  if (!code) return t(`upload.${state}`);
  if (code.startsWith("value_")) return valueProblem({ code, column });
  const text = tOr(`error.${code}`, t("error.internal")).replace("{limit}", fileSize(limits.file_bytes));
  return cause ? `${text} (${cause})` : text;
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
