// Who is signed in. When the session ends the page is covered, not unloaded: after the same user's login it stands as it was, with
// the note that was being typed. Another user gets a fresh page.

import { announce, at } from "./dom.js";
import { t } from "./i18n.js";
import { ask, idleSec, onSessionEnd, setCsrf } from "./api.js";

const CHECK_MS = 5000;

let me = null;
let waiting = null;
let reasonShown = "";

onSessionEnd(() => needLogin("expired"));

/** Who is signed in, or null. */
export const currentUser = () => me;

/** Wires the login form. `onEnter` is called with the user at the first login of this page. */
export function prepareLogin(onEnter) {
  at("login-form").addEventListener("submit", (event) => {
    event.preventDefault();
    login(onEnter);
  });
  addEventListener("language", () => showReason(reasonShown));
  for (const kind of ["pointerdown", "keydown", "wheel"]) addEventListener(kind, stayAwake, { passive: true });
  setInterval(lockWhenIdle, CHECK_MS);
}

/** Goes on with a session that the browser still has. Resolves to null where there is none. */
export async function resume() {
  try {
    return take(await ask("/api/me", { relogin: false }));
  } catch (problem) {
    if (problem.code === "unreachable") throw problem;
    return null;
  }
}

/** Covers the page with the login; resolves when the same user is signed in again. `reason` is a key below `login.`. */
export function needLogin(reason) {
  if (!waiting) {
    let resolve;
    const promise = new Promise((done) => {
      resolve = done;
    });
    waiting = { promise, resolve, before: document.activeElement };
    cover(true);
    showReason(reason);
  }
  return waiting.promise;
}

/** Ends the session and forgets all that this page knows. */
export async function logout() {
  await ask("/api/logout", { method: "POST", relogin: false }).catch(() => null);
  forget();
}

function forget() {
  history.replaceState(null, "", location.pathname);
  location.reload();
}

async function login(onEnter) {
  showReason("");
  at("login-button").disabled = true;
  try {
    const body = { user: at("user").value.trim(), password: at("password").value };
    const before = me;
    take(await ask("/api/login", { body, relogin: false }));
    if (before && before.user !== me.user) return forget();
    uncover();
    if (!before) onEnter(me);
  } catch (problem) {
    showReason(problem.code, problem.retrySec);
    at("password").select();
  } finally {
    at("login-button").disabled = false;
  }
}

function take(user) {
  me = user;
  setCsrf(user.csrf);
  return user;
}

function cover(on) {
  at("login").hidden = !on;
  at("room").hidden = on;
  for (const dialog of document.querySelectorAll("dialog[open]")) if (on) dialog.close();
  if (on) (at("user").value ? at("password") : at("user")).focus();
}

function uncover() {
  at("password").value = "";
  cover(false);
  const done = waiting;
  waiting = null;
  done?.before?.focus?.();
  done?.resolve();
}

function showReason(reason, retrySec) {
  reasonShown = reason;
  const seconds = retrySec ?? 0;
  at("login-reason").textContent = reason ? t(`login.${reason}`, reason === "locked" ? { count: seconds } : {}) : "";
  at("login-reason").dataset.kind = ["wrong_login", "locked", "unreachable"].includes(reason) ? "bad" : "quiet";
  if (reason) announce(at("login-reason").textContent);
}

/** Work on an image that is already here asks nothing of the server, and is no reason to be locked out. */
function stayAwake() {
  if (me && !waiting && idleSec() > me.idle_sec / 4) ask("/api/me").catch(() => null);
}

function lockWhenIdle() {
  if (me && !waiting && idleSec() > me.idle_sec) needLogin("idle");
}
