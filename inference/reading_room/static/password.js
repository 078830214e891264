// Changing one's own password.

import { at, toast } from "./dom.js";
import { t, tOr } from "./i18n.js";
import { ask } from "./api.js";
import { currentUser } from "./session.js";

/** Wires the dialog. */
export function preparePassword() {
  at("open-password").addEventListener("click", () => {
    at("password-user").value = currentUser().user;
    at("password-dialog").showModal();
  });
  at("password-cancel").addEventListener("click", close);
  at("password-form").addEventListener("submit", (event) => {
    event.preventDefault();
    change();
  });
}

async function change() {
  if (at("new-password").value !== at("new-password-again").value) return say("password.differ");
  try {
    await ask("/api/password", { body: { old: at("old-password").value, new: at("new-password").value } });
    close();
    toast(t("password.changed"));
  } catch (problem) {
    say(`error.${problem.code}`);
  }
  return undefined;
}

function say(key) {
  at("password-problem").textContent = tOr(key, t("error.internal"));
}

function close() {
  at("password-form").reset();
  at("password-problem").textContent = "";
  at("password-dialog").close();
}
