/** Numbers as people read them. Durations are seconds. */

const SECONDS_OF_A_DATE = 1e9; // smaller numbers are a time from now

/** 1:05, or 1:02:03. */
export function clock(seconds) {
  const whole = Math.max(0, Math.floor(seconds));
  const [hours, minutes, rest] = [Math.floor(whole / 3600), Math.floor(whole / 60) % 60, whole % 60];
  const padded = (number) => String(number).padStart(2, "0");
  return hours ? `${hours}:${padded(minutes)}:${padded(rest)}` : `${minutes}:${padded(rest)}`;
}

/** 40 s, 3 min, 1 h 5 min. */
export function roughly(seconds) {
  if (seconds < 59.5) return `${Math.max(1, Math.round(seconds))} s`;
  const minutes = Math.round(seconds / 60);
  if (minutes < 60) return `${minutes} min`;
  return minutes % 60 ? `${Math.floor(minutes / 60)} h ${minutes % 60} min` : `${minutes / 60} h`;
}

export const plural = (count, one, many = `${one}s`) => `${count} ${count === 1 ? one : many}`;

/** A date from ISO text or Unix seconds; null for neither. */
export function dateOf(value) {
  if (value == null || value === "") return null;
  const date = new Date(typeof value === "number" ? value * 1000 : value);
  return Number.isNaN(date.getTime()) ? null : date;
}

/** Seconds from now to a time, which is a date as ISO text or Unix seconds, or a number of seconds; null if unknown. */
export function secondsUntil(value, now = Date.now()) {
  if (typeof value === "number" && value < SECONDS_OF_A_DATE) return value;
  const date = dateOf(value);
  return date && (date.getTime() - now) / 1000;
}

/** "Today, 10:31" or "12 Mar, 10:31". */
export function day(date, now = new Date()) {
  const time = date.toLocaleTimeString([], { hour: "2-digit", minute: "2-digit" });
  const isToday = date.toDateString() === now.toDateString();
  return `${isToday ? "Today" : date.toLocaleDateString([], { day: "numeric", month: "short" })}, ${time}`;
}

/** A name for a file from a title. */
export function fileName(title, extension) {
  const plain = title.normalize("NFKD").replace(/[^\p{L}\p{N}]+/gu, "-").replace(/^-+|-+$/g, "").toLowerCase();
  return `${plain.slice(0, 60) || "podcast"}.${extension}`;
}
