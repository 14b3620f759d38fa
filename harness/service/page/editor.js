/** The script as it is written: speakers coloured, mistakes at their line. */

import { h } from "./dom.js";
import { readScript } from "./script.js";

const PATIENCE_MS = 700; // of nothing typed, before new mistakes are shown
const LISTED = 6; // problems that are listed
const UNDOABLE = 8_000; // characters: Chromium takes a second for 20,000, and time grows with their square
const NARROWEST_NOTE = 240; // pixels beside a line that a note needs

/**
 * A textarea over a layer that draws the same text in colours. Both wrap alike: they share font, width and padding.
 * `onchange(read, text)` is called with what the script says, at the start and after each change of the text.
 */
export class Editor {
  constructor({ textarea, layer, problems, onchange }) {
    Object.assign(this, { textarea, layer, problems, onchange });
    this.drawn = [];
    this.refused = []; // what the server said of this text: [{line, message}]
    this.shown = new Set(); // the messages that are on the page
    textarea.addEventListener("input", () => this.#edited());
    textarea.addEventListener("blur", () => this.#showProblems());
    new ResizeObserver(() => this.#fitNotes()).observe(layer);
    this.#edited();
  }

  get text() {
    return this.textarea.value;
  }

  /** Replaces the text; the browser's undo brings the old one back if the new one is short. */
  replace(text) {
    this.textarea.focus();
    this.textarea.select();
    if (text.length < UNDOABLE) document.execCommand?.("insertText", false, text);
    if (this.text !== text) this.textarea.value = text;
    this.textarea.setSelectionRange(0, 0);
    this.layer.parentElement.scrollTop = 0;
    this.#edited();
  }

  /** Shows all mistakes, goes to the first, and says whether there is none. */
  check() {
    this.#showProblems();
    const [first] = this.read.errors;
    if (first) this.goTo(first.line);
    return !first;
  }

  /** Shows at their lines what the server refused, and goes to the first. */
  refuse(refused) {
    const lines = this.read.lines.length;
    this.refused = refused.map(({ line, message }) => ({ line: Math.min(Math.max(line, 1), lines), message }));
    this.#showProblems();
    this.goTo(this.refused[0].line);
  }

  /** Puts the caret at the start of a line. */
  goTo(line) {
    const before = this.text.split("\n").slice(0, line - 1);
    const at = before.reduce((sum, each) => sum + each.length + 1, 0);
    this.textarea.focus({ preventScroll: true });
    this.textarea.setSelectionRange(at, at);
    this.layer.children[line - 1]?.scrollIntoView({ block: "nearest" });
  }

  #edited() {
    this.refused = [];
    this.read = readScript(this.text);
    const stillThere = this.#problems().filter(({ message }) => this.shown.has(message));
    this.#draw(stillThere);
    clearTimeout(this.timer);
    this.timer = setTimeout(() => this.#showProblems(this.#caretLine()), PATIENCE_MS);
    this.onchange(this.read, this.text);
  }

  /** Shows all problems; an unfinished line that somebody writes at, or an empty script, is none yet. */
  #showProblems(writingAt = 0) {
    clearTimeout(this.timer);
    const isEmpty = writingAt && !this.text.trim();
    const isPending = ({ isUnfinished, line }) => isUnfinished && (isEmpty || line === writingAt);
    const problems = this.#problems().filter((problem) => !isPending(problem));
    this.shown = new Set(problems.map(({ message }) => message));
    this.#draw(problems);
    this.#list(problems);
    this.textarea.setAttribute("aria-invalid", String(problems.some(({ kind }) => kind === "error")));
  }

  /** Errors and remarks by line, errors first; at most one of each kind at a line. */
  #problems() {
    const errors = [...this.read.errors, ...this.refused].map((each) => ({ ...each, kind: "error" }));
    const remarks = this.read.remarks.map((each) => ({ ...each, kind: "remark" }));
    return [...errors, ...remarks].sort((a, b) => a.line - b.line);
  }

  #caretLine() {
    const hasFocus = document.activeElement === this.textarea;
    return hasFocus ? this.text.slice(0, this.textarea.selectionStart).split("\n").length : -1;
  }

  /** Draws the lines that differ from those drawn before: all others keep their elements. */
  #draw(problems) {
    const notes = new Map([...problems].reverse().map((problem) => [problem.line, problem]));
    const lines = this.read.lines.map((line, index) => ({ ...line, note: notes.get(index + 1) }));
    const [from, tail] = unchanged(this.drawn, lines);
    const old = [...this.layer.children].slice(from, this.drawn.length - tail);
    const next = this.layer.children[this.drawn.length - tail] ?? null;
    const fresh = document.createDocumentFragment();
    fresh.append(...lines.slice(from, lines.length - tail).map(lineElement));
    for (const element of old) element.remove();
    this.layer.insertBefore(fresh, next);
    this.drawn = lines;
    this.#fitNotes();
  }

  /** A list that says the same keeps its buttons: one of them may be about to be clicked. */
  #list(problems) {
    const said = JSON.stringify(problems);
    if (said === this.listed) return;
    this.listed = said;
    const shown = problems.slice(0, LISTED).map(({ line, message, kind }) => {
      const place = h("button", { type: "button", class: "link", onclick: () => this.goTo(line) }, `Line ${line}`);
      return h("li", { class: kind }, place, h("span", {}, message));
    });
    const more = problems.length - LISTED;
    if (more > 0) shown.push(h("li", { class: "remark" }, h("span", {}, `${more} more`)));
    this.problems.replaceChildren(...shown);
    this.problems.hidden = !shown.length;
  }

  /** A note stands beside its line where there is room; the list below the script has it in any case. */
  #fitNotes() {
    for (const note of this.layer.querySelectorAll(".note")) {
      note.hidden = false;
      const room = note.parentElement.clientWidth - note.offsetLeft - 12;
      note.style.maxWidth = `${room}px`;
      note.hidden = room < NARROWEST_NOTE;
    }
  }
}

/** How many lines at the start, and how many at the end, are as they were. */
function unchanged(before, after) {
  const most = Math.min(before.length, after.length);
  let from = 0;
  while (from < most && isSame(before[from], after[from])) from += 1;
  let tail = 0;
  while (tail < most - from && isSame(before[before.length - 1 - tail], after[after.length - 1 - tail])) tail += 1;
  return [from, tail];
}

const isSame = (a, b) =>
  a.text === b.text && a.speaker === b.speaker && a.end === b.end && a.note?.message === b.note?.message;

function lineElement({ text, speaker, end, note }) {
  const line = h("div", { class: note ? `line has-${note.kind}` : "line", "data-speaker": speaker });
  if (end) line.append(h("span", { class: "marker" }, text.slice(0, end)));
  line.append(text.slice(end));
  if (note) line.append(h("span", { class: "note" }, note.message));
  return line;
}
