// All that is asked of the server. A session that has ended is renewed by the login and the request goes on, so that nothing typed
// is lost; a server that does not answer is watched until it does.

import { serverAnswered, serverLost } from "./connection.js";

let csrf = "";
let lastAsked = performance.now();
let renewSession = () => Promise.reject(new Problem("not_signed_in", 401));

/** An answer above 399, or none at all. `code` is one of the words of the server's schema, or `unreachable`. */
export class Problem extends Error {
  constructor(code, status = 0, retrySec = null, column = null) {
    super(code);
    Object.assign(this, { code, status, retrySec, column });
  }
}

/** Sets the token that goes with every change; it comes with the login. */
export function setCsrf(token) {
  csrf = token;
}

/** Sets what renews a session that has ended: `renew()` resolves when the same user is signed in again. `session.js` needs this module,
 *  so this one cannot import it. */
export function onSessionEnd(renew) {
  renewSession = renew;
}

/** Seconds since the server was last asked for something. */
export const idleSec = () => (performance.now() - lastAsked) / 1000;

/** The server's answer to `path` as JSON (null where it is empty). A POST if there is a `body`.
 *  @throws {Problem} */
export async function ask(path, options = {}) {
  const response = await send(path, options);
  return response.status === 204 ? null : response.json();
}

/** The answer's bytes and headers. @throws {Problem} */
export async function askBytes(path, signal) {
  const response = await send(path, { signal });
  return { bytes: await response.arrayBuffer(), headers: response.headers };
}

async function send(path, { method, body, signal, relogin = true } = {}) {
  const response = await reach(path, {
    method: method ?? (body === undefined ? "GET" : "POST"),
    body: body === undefined ? undefined : JSON.stringify(body),
    headers: { ...(body === undefined ? {} : { "Content-Type": "application/json" }), "X-CSRF-Token": csrf },
    credentials: "same-origin",
    signal,
  });
  if (response.ok) return response;
  const problem = read(response.status, await response.json().catch(() => ({})));
  if (problem.code !== "not_signed_in" || !relogin) throw problem;
  await renewSession();
  return send(path, { method, body, signal, relogin });
}

async function reach(path, request) {
  lastAsked = performance.now();
  try {
    const response = await fetch(path, request);
    serverAnswered();
    return response;
  } catch (error) {
    if (error.name === "AbortError") throw error;
    serverLost();
    throw new Problem("unreachable");
  }
}

function read(status, body) {
  return new Problem(body.error ?? "internal", status, body.retry_sec ?? null, body.column ?? null);
}

/** What came of one image sent as an upload, its file or the files of its series, with its clinical `values` by column, or null; `onProgress`
 *  gets the part that has been sent, in [0, 1]. @throws {Problem} */
export async function sendImage(files, values, onProgress) {
  try {
    return (await sendImageOnce(files, values, onProgress)).files[0];
  } catch (problem) {
    if (problem.code !== "not_signed_in") throw problem;
    await renewSession();
    return sendImage(files, values, onProgress);
  }
}

function sendImageOnce(files, values, onProgress) {
  lastAsked = performance.now();
  const form = new FormData();
  for (const file of files) form.append("files", file, "image"); // the name may name a patient; it stays here
  if (values) form.append("clinical", JSON.stringify(values));
  return new Promise((resolve, reject) => {
    const request = new XMLHttpRequest();
    request.open("POST", "/api/cases");
    request.setRequestHeader("X-CSRF-Token", csrf);
    request.responseType = "json";
    request.upload.addEventListener("progress", (event) => event.lengthComputable && onProgress(event.loaded / event.total));
    request.addEventListener("load", () => {
      serverAnswered();
      if (request.status < 300 && request.response) resolve(request.response);
      else reject(read(request.status, request.response ?? {}));
    });
    request.addEventListener("error", () => {
      serverLost();
      reject(new Problem("unreachable"));
    });
    request.send(form);
  });
}
