/** What is made in the background: its progress, and what was made before. The service keeps it, this page follows. */

import { listTasks, taskEvents } from "./api.js";
import { $, announce, pause, setText, showText } from "./dom.js";
import { isActive, Row } from "./task_row.js";
import { recall, remember } from "./store.js";
import { dateOf } from "./words.js";

const POLL_MS = 4_000; // while something is being made
const AGAIN_MS = 8_000; // after a failure
const FOLLOWED = 2; // tasks with a stream of events each: browsers open few connections to one place
const KEPT = 100; // titles
const LISTED = 20; // tasks in one list
const NEW_MS = 3_000; // so long a task may be missing in a list that was asked for before

export class Tasks {
  constructor(listening) {
    this.listening = listening;
    this.rows = new Map();
    this.followed = new Set();
    this.about = recall("tasks", {}); // by id: the title and format that the service does not store
    $("tasks-again").addEventListener("click", () => this.wake());
    this.wake = () => {};
    this.#run();
  }

  /** A task that was just asked for. */
  add(task, { title, format }) {
    this.about = Object.fromEntries([...Object.entries(this.about), [task.id, { title, format }]].slice(-KEPT));
    remember("tasks", this.about);
    this.#drop(task.id); // the list may have had it before its title was known
    this.#update({ created: new Date().toISOString(), ...task });
    this.#arrange();
    this.wake();
  }

  /** Asks for the list again and again while something is being made, and otherwise when woken. */
  async #run() {
    for (;;) {
      const woken = new Promise((resolve) => (this.wake = resolve));
      const wait = await this.#refresh();
      await (wait ? Promise.race([woken, pause(wait)]) : woken);
    }
  }

  /** Asks for the list; returns milliseconds until the next time, 0 for none. */
  async #refresh() {
    try {
      const tasks = await listTasks();
      this.#keep(tasks);
      tasks.forEach((task) => this.#update(task));
      this.#arrange();
      this.#sayError("");
      return tasks.some(isActive) ? POLL_MS : 0;
    } catch (error) {
      this.#sayError(error.message);
      return error.status === 401 ? 0 : AGAIN_MS;
    }
  }

  #sayError(text) {
    showText($("tasks-error"), text && `No list of recordings. ${text}`);
    $("tasks-again").hidden = !text;
    $("no-tasks").hidden = Boolean(text) || this.rows.size > 0;
  }

  /** Takes away what the service no longer has; a full list may have left out a task that is still being made. */
  #keep(tasks) {
    const ids = new Set(tasks.map(({ id }) => id));
    for (const [id, row] of [...this.rows]) {
      const mayBeLeftOut = isActive(row.task) && (tasks.length >= LISTED || performance.now() - row.since < NEW_MS);
      if (ids.has(id) || mayBeLeftOut) continue;
      this.#drop(id);
    }
  }

  #drop(id) {
    this.rows.get(id)?.element.remove();
    this.rows.delete(id);
  }

  #update(task) {
    const row = this.rows.get(task.id);
    if (!row) {
      const fresh = new Row(task, this.about[task.id] ?? {}, { listening: this.listening, onchange: () => this.wake() });
      this.rows.set(task.id, fresh);
      return;
    }
    const wasActive = isActive(row.task);
    if (!wasActive && isActive(task)) return; // an answer that was overtaken by an event
    row.update(task);
    if (wasActive && !isActive(task)) announce(`${row.title}: ${row.status}.`);
  }

  /** Newest first, without moving rows that are in place: a moved element loses the keyboard's focus. */
  #arrange() {
    const time = (row) => dateOf(row.task.created)?.getTime() ?? 0;
    const rows = [...this.rows.values()].sort((a, b) => time(b) - time(a));
    rows.forEach(({ element }, index) => {
      const there = $("tasks").children[index] ?? null;
      if (there !== element) $("tasks").insertBefore(element, there);
    });
    $("no-tasks").hidden = rows.length > 0;
    this.#follow(rows.filter((row) => isActive(row.task)).reverse());
    this.#entitle(rows);
  }

  #follow(rows) {
    const running = [...rows].sort((a, b) => (b.task.status === "running") - (a.task.status === "running"));
    for (const { task } of running) {
      if (this.followed.size < FOLLOWED && !this.followed.has(task.id)) this.#listenTo(task.id);
    }
  }

  async #listenTo(id) {
    this.followed.add(id);
    try {
      for await (const task of taskEvents(id)) {
        this.#update({ ...task, id });
        this.#entitle([...this.rows.values()]);
        if (!isActive(task)) break;
      }
    } catch {
      // the list is asked for in any case
    }
    await pause(1000); // a stream that ends at once is not to be opened in a loop
    this.followed.delete(id);
    this.wake();
  }

  #entitle(rows) {
    const running = rows.find(({ task }) => task.status === "running" && task.of_frames);
    const percent = running && Math.floor((100 * running.task.frames) / running.task.of_frames);
    const title = running ? `${percent}% · Studio` : "Studio";
    if (document.title !== title) document.title = title;
    setText($("tasks-count"), rows.length ? String(rows.length) : "");
  }
}
