// Whether the server answers. While it does not, a banner says so and its health is asked, ever more rarely; then `back` is told.

import { at } from "./dom.js";
import { t } from "./i18n.js";

const FIRST_SEC = 2;
const LONGEST_SEC = 30;

let waitSec = 0;
let dueAt = 0;
let timer = 0;

/** A request got no answer: shows the banner and begins to ask. */
export function serverLost() {
  if (waitSec) return;
  waitSec = FIRST_SEC;
  schedule();
}

/** A request got an answer. */
export function serverAnswered() {
  if (!waitSec) return;
  waitSec = 0;
  clearTimeout(timer);
  at("lost").hidden = true;
  dispatchEvent(new Event("back"));
}

/** Asks at once, for the button of the banner. */
export async function tryNow() {
  clearTimeout(timer);
  at("lost-wait").textContent = t("lost.trying");
  try {
    await fetch("/api/health");
    serverAnswered();
  } catch {
    waitSec = Math.min(waitSec * 2, LONGEST_SEC);
    schedule();
  }
}

function schedule() {
  dueAt = performance.now() + waitSec * 1000;
  at("lost").hidden = false;
  tick();
}

function tick() {
  const left = Math.ceil((dueAt - performance.now()) / 1000);
  if (left <= 0) {
    tryNow();
    return;
  }
  at("lost-wait").textContent = t("lost.again", { count: left });
  timer = setTimeout(tick, 1000);
}
