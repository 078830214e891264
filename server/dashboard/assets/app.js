// The live page. It asks the coordinator every two seconds and changes only what has changed. All text is set as text, never as
// markup: names and reasons come from other parties.

import { drawChart } from "./charts.js";

const EVERY_MS = 2000;
const HIDDEN_MS = 15000;
const TROUBLE = { late: "warn", left_out: "warn", absent: "warn", stopped: "warn", revoked: "warn" };
const STYLES = { validation: 0, test: 1, external: 2, training: 3 };
const BAD = new Set(["refused", "lost", "failed"]);
const at = (id) => document.getElementById(id);
const shown = new Map();

let me = null;
let chosen = decodeURIComponent(location.hash.slice(1));
let timer = 0;
let events = { run: null, last: 0, lines: [] };

start();

async function start() {
  at("login-form").addEventListener("submit", login);
  at("logout").addEventListener("click", logout);
  at("stop").addEventListener("click", () => at("confirm").showModal());
  at("confirm-yes").addEventListener("click", stopRun);
  addEventListener("hashchange", () => {
    chosen = decodeURIComponent(location.hash.slice(1));
    if (me) turn();
  });
  document.addEventListener("visibilitychange", () => me && !document.hidden && turn());
  setInterval(tick, 1000);
  try {
    enter(await ask("/api/me"));
  } catch (error) {
    leave(error.status === 401 ? "" : error.message);
  }
}

async function ask(path, options = {}) {
  let response;
  try {
    response = await fetch(path, { credentials: "same-origin", ...options });
  } catch {
    throw new Error("the coordinator does not answer");
  }
  if (response.status === 204) return null;
  const body = await response.json().catch(() => ({}));
  if (!response.ok) {
    const sentence = typeof body.detail === "string" ? body.detail : `the coordinator answered ${response.status}`;
    throw Object.assign(new Error(sentence), { status: response.status });
  }
  return body;
}

function post(path, body) {
  const headers = { "Content-Type": "application/json", ...(me?.csrf ? { "X-CSRF-Token": me.csrf } : {}) };
  return ask(path, { method: "POST", headers, body: JSON.stringify(body ?? {}) });
}

async function login(event) {
  event.preventDefault();
  say("login-error", "");
  try {
    const visitor = await post("/api/login", { token: at("token").value });
    at("token").value = "";
    enter(visitor);
    at("main").focus();
  } catch (error) {
    say("login-error", error.message);
  }
}

async function logout() {
  await post("/api/logout").catch(() => null);
  leave("");
}

function enter(visitor) {
  me = visitor;
  say("who-name", visitor.role === "auditor" ? `${visitor.name}, auditor (reads only)` : visitor.name);
  for (const [id, hidden] of [["login", true], ["app", false], ["who", false]]) at(id).hidden = hidden;
  turn();
}

function leave(reason) {
  me = null;
  clearTimeout(timer);
  say("login-error", reason);
  say("link", "");
  document.title = "pneumofed";
  for (const [id, hidden] of [["login", false], ["app", true], ["who", true]]) at(id).hidden = hidden;
  at("token").focus();
}

/** One look at everything, and the time of the next one. */
async function turn() {
  clearTimeout(timer);
  try {
    const [runs, sites] = await Promise.all([ask("/api/runs"), ask("/api/sites")]);
    if (!runs.some((run) => run.name === chosen)) chosen = runs[0]?.name ?? "";
    const [run] = chosen ? await Promise.all([ask(`/api/runs/${encodeURIComponent(chosen)}`), readEvents(chosen)]) : [null];
    showRuns(runs);
    showProcesses(sites);
    at("none").hidden = Boolean(run);
    at("run").hidden = !run;
    if (run) showRun(run, sites);
    showLink("");
  } catch (error) {
    if (error.status === 401) return leave("the session has ended; show the token again");
    showLink(`${error.message}; what is shown may be old`);
  }
  if (me) timer = setTimeout(turn, document.hidden ? HIDDEN_MS : EVERY_MS);
}

async function readEvents(run) {
  if (events.run !== run) events = { run, last: 0, lines: [] };
  const found = await ask(`/api/events?run=${encodeURIComponent(run)}&after=${events.last}&limit=500`);
  if (events.run !== run || !found.length) return;
  events.lines = [...events.lines, ...found.filter((line) => line.id > events.last)].slice(-500);
  events.last = found.at(-1).id;
}

function showLink(trouble) {
  at("link").classList.toggle("broken", Boolean(trouble));
  say("link", trouble);
}

function showRuns(runs) {
  unlessSame("runs", [runs.map((run) => [run.name, run.state, run.rounds_completed]), chosen], (list) => {
    list.replaceChildren(...runs.map((run) => {
      const link = make("a", run.name);
      link.href = `#${encodeURIComponent(run.name)}`;
      if (run.name === chosen) link.setAttribute("aria-current", "page");
      link.append(make("small", `${run.state}, ${run.rounds_completed} of ${run.rounds} rounds`));
      const item = make("li");
      item.append(link);
      return item;
    }));
    if (!runs.length) list.replaceChildren(make("li", "none yet", "soft"));
  });
}

function showProcesses(sites) {
  unlessSame("processes", sites.processes, (list) => {
    const items = sites.processes.map((process) => {
      const item = make("li");
      item.append(make("span", process.serving ? "serving" : "down", `badge ${process.serving ? "connected" : "failed"}`), ` ${process.name}`);
      if (!process.serving) item.append(make("small", process.detail));
      return item;
    });
    list.replaceChildren(...(items.length ? items : [make("li", "not looked at yet", "soft")]));
  });
}

function showRun(run, sites) {
  document.title = `${run.name}: ${run.state} – pneumofed`;
  at("banner").className = `banner ${run.state}`;
  say("title", run.name);
  say("state", run.state);
  at("state").className = `badge ${run.state}`;
  say("reason", run.reason);
  say("facts", facts(run));
  const open = run.state === "running" || run.state === "submitted";
  at("stop").hidden = me.role !== "coordinator" || !open;
  say("confirm-name", run.name);
  at("progress").value = run.rounds_completed / run.rounds;
  at("progress-text").dataset.deadline = run.round_now?.deadline ?? "";
  at("progress-text").dataset.words = progressWords(run, open);
  tick();
  showTiles(run);
  showCurves(run, open);
  showCourse(run);
  showSites(sites);
  showMetrics(run);
  showEvents();
}

function facts(run) {
  const parts = [run.title !== run.name ? run.title : "", `${run.strategy}, ${run.model}, seed ${run.seed}`, `needs ${run.min_sites} site${run.min_sites === 1 ? "" : "s"} a round`];
  parts.push(`submitted ${when(run.submitted)}`);
  if (run.ended) parts.push(`ended ${when(run.ended)}`);
  return parts.filter(Boolean).join(" · ");
}

function progressWords(run, open) {
  const done = `${run.rounds_completed} of ${run.rounds} rounds done`;
  if (!open) return done;
  if (run.round_now) return `Round ${run.round_now.number} of ${run.rounds}`;
  return run.state === "submitted" ? "Waits for the coordinator's process" : run.rounds_completed ? done : "Waits for the sites";
}

/** The deadline as time that is left, each second. */
function tick() {
  const place = at("progress-text");
  if (place.dataset.words === undefined) return;
  const deadline = Date.parse(place.dataset.deadline);
  const left = Math.round((deadline - Date.now()) / 1000);
  const remaining = Number.isNaN(left) ? "" : left >= 0 ? `, ${left < 120 ? `${left} s` : duration(left)} until the sites' deadline` : ", training deadline passed";
  say("progress-text", place.dataset.words + remaining);
}

/** `auroc` or `loss` of the set `name` in a round; null where it was not judged. */
function measured(line, name, what) {
  return line[`held_out_${what}`][name] ?? line[`${name}_${what}`] ?? null; // a set may be named `train`
}

/** The held-out sets that were judged: `test` and `external` first, then those with names of the study's own. */
function heldOut(run) {
  const named = new Set(["test", "external", ...run.course.flatMap((one) => Object.keys(one.held_out_auroc)), ...Object.keys(run.results)]);
  named.delete("validation");
  return [...named].filter((name) => run.results[name] || run.course.some((one) => measured(one, name, "auroc") !== null));
}

function showTiles(run) {
  const best = run.course.find((line) => line.round === run.best_round);
  const judged = (name) => {
    const final = run.results[name]?.auroc;
    const value = final ? final.value : best ? measured(best, name, "auroc") : null;
    const under = final ? `interval ${number(final.low)} to ${number(final.high)}` : best && value !== null ? `in round ${run.best_round}, best by validation` : "not measured";
    return { name: `${name[0].toUpperCase()}${name.slice(1)} AUROC`, value, under };
  };
  const validation = judged("validation");
  say("tile-auroc", number(validation.value));
  say("tile-auroc-under", run.state === "succeeded" && validation.value !== null ? `in round ${run.best_round}, the best` : validation.under);
  unlessSame("after-sets", heldOut(run).map(judged), (after) => {
    for (const old of document.querySelectorAll(".set-tile")) old.remove();
    for (const one of heldOut(run).map(judged)) {
      const tile = make("div", "", "set-tile");
      tile.append(make("dt", one.name), make("dd", number(one.value)), make("dd", one.under, "under"));
      after.before(tile);
    }
  });
  say("tile-bytes", bytes(run.bytes_down + run.bytes_up));
  say("tile-bytes-under", `${bytes(run.bytes_down)} to sites, ${bytes(run.bytes_up)} back`);
  const spent = Object.entries(run.privacy.epsilon);
  const most = spent.reduce((found, one) => (one[1] > found[1] ? one : found), ["", -Infinity]);
  say("tile-privacy", spent.length ? `ε ${most[1].toFixed(2)} at most` : "none");
  say("tile-privacy-under", spent.length ? `at ${most[0]}` : "no differential privacy in this run");
}

function showCurves(run, open) {
  const sets = ["validation", ...heldOut(run)];
  const others = sets.filter((name) => !(name in STYLES));
  const styles = Object.fromEntries(others.map((name, index) => [name, Object.keys(STYLES).length + index]));
  const line = (name, what) => ({ name, style: STYLES[name] ?? styles[name], points: run.course.map((one) => [one.round, what === "training" ? one.train_loss : measured(one, name, what)]).filter((point) => point[1] !== null) });
  const waiting = open ? "after the first round" : "no round was completed";
  const common = { rounds: run.rounds, waiting };
  unlessSame("auroc", [run.course, run.rounds, waiting], (place) =>
    drawChart(place, sets.map((name) => line(name, "auroc")), { ...common, label: "AUROC by round", from: 0.5, to: 1 }));
  unlessSame("loss", [run.course, run.rounds, waiting], (place) =>
    drawChart(place, [...sets.map((name) => line(name, "loss")), line("training", "training")], { ...common, label: "Loss by round", from: 0 }));
}

function showCourse(run) {
  const sets = ["validation", ...heldOut(run)];
  unlessSame("course-head", sets, (head) => {
    const cell = (scope, text, span = 1) => Object.assign(make("th", text), { scope, colSpan: span });
    const groups = make("tr");
    groups.append(make("td"), cell("colgroup", "Sites", 2), cell("colgroup", "AUROC", sets.length), cell("colgroup", "Loss", sets.length + 1), cell("colgroup", "Cost", 2));
    const columns = make("tr");
    columns.append(...["Round", "asked", "good", ...sets, "training", ...sets, "MB", "s"].map((text) => cell("col", text)));
    head.replaceChildren(groups, columns);
  });
  unlessSame("course", [run.course, run.best_round], (body) => fill(body, 6 + 2 * sets.length, run.course.map((line) => {
    const judged = [...sets.map((name) => measured(line, name, "auroc")), line.train_loss, ...sets.map((name) => measured(line, name, "loss"))];
    const cells = [line.drawn, line.good, ...judged.map((value) => number(value)), ((line.bytes_down + line.bytes_up) / 1e6).toFixed(1), number(line.seconds, 1)];
    const made = row(line.round === run.best_round ? `${line.round} (best)` : line.round, cells);
    if (line.round === run.best_round) made.className = "best";
    return made;
  })));
}

function showSites(sites) {
  const lines = sites.sites.map((site) => ({ ...site, seen: ago(site.last_seen) }));
  unlessSame("sites", lines, (body) => fill(body, 5, lines.map((site) => {
    const made = row(site.name, []);
    const seen = make("td", site.seen);
    if (site.last_seen) seen.title = new Date(site.last_seen).toLocaleString();
    const state = make("td");
    state.append(make("span", site.state, `badge ${site.state.replaceAll(" ", "-")}`));
    const key = make("td", site.fingerprint ? `${site.fingerprint.slice(0, 19)}…` : "–", "key");
    key.title = site.fingerprint;
    made.append(state, make("td", site.detail, "long"), seen, key);
    return made;
  })));
  say("sites-note", sites.taken ? "" : "The coordinator has not looked at its sites yet.");
}

function showMetrics(run) {
  unlessSame("metrics", run.sites, (body) => fill(body, 9, run.sites.map((site) => row(site.name, [
    `${site.rounds_answered} of ${site.rounds_drawn}${site.staleness ? `, the last ${site.staleness} old` : ""}`, count(site.images), number(site.train_loss), number(site.train_sec, 1),
    count(site.validation_images), number(site.auroc), number(site.sensitivity), number(site.specificity),
  ]))));
}

function showEvents() {
  unlessSame("events", [events.run, events.last], (body) => fill(body, 3, [...events.lines].reverse().map((event) => {
    const made = make("tr");
    const time = make("td", new Date(event.time).toLocaleTimeString());
    time.title = new Date(event.time).toLocaleString();
    const kind = BAD.has(event.kind) ? "bad" : TROUBLE[event.kind] ?? "";
    made.append(time, make("td", event.round ?? ""), make("td", event.text, `long ${kind}`));
    return made;
  })));
}

async function stopRun(event) {
  event.preventDefault();
  const name = at("confirm-name").textContent;
  say("confirm-error", "");
  at("confirm-yes").disabled = true;
  try {
    await post(`/api/runs/${encodeURIComponent(name)}/stop`);
    at("confirm").close();
    await turn();
  } catch (error) {
    say("confirm-error", error.message);
  } finally {
    at("confirm-yes").disabled = false;
  }
}

/** Calls `draw` with the element unless it shows this already, so that nothing flickers or loses its place. */
function unlessSame(id, content, draw) {
  const text = JSON.stringify(content);
  if (shown.get(id) === text) return;
  shown.set(id, text);
  draw(at(id));
}

function say(id, text) {
  if (at(id).textContent !== text) at(id).textContent = text;
}

function fill(body, columns, rows) {
  if (rows.length) return body.replaceChildren(...rows);
  const cell = make("td", "nothing yet", "nothing");
  cell.colSpan = columns;
  const empty = make("tr");
  empty.append(cell);
  body.replaceChildren(empty);
}

function row(title, cells) {
  const made = make("tr");
  const head = make("th", title);
  head.scope = "row";
  made.append(head, ...cells.map((cell) => make("td", cell)));
  return made;
}

function make(tag, text, className) {
  const node = document.createElement(tag);
  if (text !== undefined) node.textContent = String(text);
  if (className) node.className = className;
  return node;
}

function number(value, digits = 3) {
  return value === null || value === undefined ? "–" : value.toFixed(digits);
}

function count(value) {
  return value === null ? "–" : value.toLocaleString("en");
}

function bytes(value) {
  if (value < 1e6) return `${(value / 1e3).toFixed(value < 1e4 && value ? 1 : 0)} kB`;
  return value < 1e9 ? `${(value / 1e6).toFixed(1)} MB` : `${(value / 1e9).toFixed(2)} GB`;
}

function when(time) {
  return new Date(time).toLocaleString(undefined, { dateStyle: "medium", timeStyle: "short" });
}

function ago(time) {
  if (!time) return "never";
  const seconds = Math.max(0, (Date.now() - Date.parse(time)) / 1000);
  return seconds < 10 ? "now" : `${duration(seconds)} ago`;
}

function duration(seconds) {
  if (seconds < 60) return `${Math.floor(seconds / 10) * 10 || Math.round(seconds)} s`;
  if (seconds < 3600) return `${Math.floor(seconds / 60)} min`;
  return seconds < 86400 ? `${Math.floor(seconds / 3600)} h ${Math.floor((seconds % 3600) / 60)} min` : `${Math.floor(seconds / 86400)} days`;
}
