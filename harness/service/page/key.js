/** The access key: asked for where the service needs one, and kept until this tab is closed. */

import { $, showText } from "./dom.js";
import { recall, remember } from "./store.js";

let asking = null;
const watchers = [];

export const key = () => recall("key", "", "sessionStorage");
export const onKey = (watcher) => watchers.push(watcher);

export function forgetKey() {
  remember("key", null, "sessionStorage");
  watchers.forEach((watcher) => watcher());
}

/** Opens the dialog, once for all who wait, and says whether a key was entered. */
export function askKey(wasRefused) {
  asking ??= ask(wasRefused).finally(() => (asking = null));
  return asking;
}

function ask(wasRefused) {
  const [dialog, field] = [$("key-dialog"), $("key")];
  showText($("key-refused"), wasRefused ? "The service did not accept this key." : "");
  field.value = "";
  field.setAttribute("aria-invalid", String(wasRefused));
  dialog.returnValue = "";
  dialog.showModal();
  return new Promise((resolve) => {
    const closed = () => {
      const entered = dialog.returnValue === "use" ? field.value.trim() : "";
      if (entered) remember("key", entered, "sessionStorage");
      watchers.forEach((watcher) => watcher());
      resolve(Boolean(entered));
    };
    dialog.addEventListener("close", closed, { once: true });
  });
}
