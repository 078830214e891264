// Taking a case away for good, which an administrator alone may do.

import { at, toast } from "./dom.js";
import { t, tOr } from "./i18n.js";
import { ask } from "./api.js";

/** Wires the dialog. `current` gives the id of the case that is shown, `done` is called when it is gone. */
export function prepareRemoval(current, done) {
  at("remove").addEventListener("click", () => {
    at("remove-problem").textContent = "";
    at("remove-dialog").showModal();
  });
  at("remove-cancel").addEventListener("click", () => at("remove-dialog").close());
  at("remove-yes").addEventListener("click", async () => {
    try {
      await ask(`/api/cases/${current()}`, { method: "DELETE" });
      at("remove-dialog").close();
      toast(t("remove.done"));
      done();
    } catch (problem) {
      at("remove-problem").textContent = tOr(`error.${problem.code}`, t("error.internal"));
    }
  });
}
