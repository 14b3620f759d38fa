/** Builds elements from text, never from markup: whatever a user or a server wrote stays text. */

export const $ = (id) => document.getElementById(id);

/** An element; names that begin with "on" are listeners, true and false set and leave out an attribute. */
export function h(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (value === true) element.setAttribute(name, "");
    else if (value !== false && value != null) element.setAttribute(name, value);
  }
  element.append(...children.filter((child) => child != null));
  return element;
}

/** Sets a text where it differs, so that screen readers hear only changes. */
export function setText(element, text) {
  if (element.textContent !== text) element.textContent = text;
}

/** Shows an element with a text, or hides it for an empty text. */
export function showText(element, text) {
  setText(element, text);
  element.hidden = !text;
}

/** Tells screen readers what has happened. */
export function announce(text) {
  setText($("announcer"), text);
}

/** Hands a file to the browser's downloads. */
export function saveFile(blob, name) {
  const url = URL.createObjectURL(blob);
  h("a", { href: url, download: name }).click();
  setTimeout(() => URL.revokeObjectURL(url), 60_000);
}

/** Waits; rejects with the signal's reason when it is aborted. */
export function pause(milliseconds, signal) {
  return new Promise((resolve, reject) => {
    const timer = setTimeout(resolve, milliseconds);
    signal?.addEventListener("abort", () => (clearTimeout(timer), reject(signal.reason)), { once: true });
  });
}
