/** What this browser remembers; where storage is switched off, it remembers nothing. */

const PREFIX = "studio.";

export function recall(name, otherwise, storage = "localStorage") {
  try {
    const stored = window[storage].getItem(PREFIX + name);
    return stored === null ? otherwise : JSON.parse(stored);
  } catch {
    return otherwise;
  }
}

/** Stores a value; null and undefined remove it. */
export function remember(name, value, storage = "localStorage") {
  try {
    if (value == null) window[storage].removeItem(PREFIX + name);
    else window[storage].setItem(PREFIX + name, JSON.stringify(value));
  } catch {
    // full or switched off: the page works without
  }
}
