/** One recording: how far it is, and what can be done with it. */

import { audioAddress, audioFrom, removeTask, taskAudio } from "./api.js";
import { announce, h, pause, saveFile, setText, showText } from "./dom.js";
import { key } from "./key.js";
import { samplesInWav } from "./player.js";
import { clock, dateOf, day, fileName, plural, roughly, secondsUntil } from "./words.js";

const FRAMES_PER_S = 7.5;
const STATUS = { queued: "Waiting", running: "Being made", done: "Done", failed: "Failed", cancelled: "Cancelled" };
const MORE_MS = 1_000; // until more of a recording is asked for

export const isActive = ({ status }) => status === "queued" || status === "running";
const isBegun = ({ frames, of_frames: all }) => frames > 0 && all > 0;

export class Row {
  constructor(task, { title, format }, { listening, onchange }) {
    Object.assign(this, { task, listening, onchange, since: performance.now() });
    this.format = task.format ?? format ?? "wav";
    this.named = title || task.title;
    this.title = this.named || titleOf(task);
    this.#build();
    this.update(task);
  }

  get status() {
    return (STATUS[this.task.status] ?? String(this.task.status)).toLowerCase();
  }

  update(task) {
    this.task = task;
    const { status } = task;
    this.element.dataset.status = status;
    setText(this.badge, STATUS[status] ?? String(status));
    setText(this.detail, detailOf(task, this.format, this.named));
    showText(this.error, status === "failed" ? String(task.error || "The service does not say why.") : this.trouble ?? "");
    this.bar.hidden = !(status === "running" || (status === "queued" && isBegun(task)));
    this.bar.max = Math.max(1, task.of_frames ?? 1);
    this.bar.value = task.frames ?? 0;
    this.hear.hidden = !(isActive(task) && this.format === "wav" && task.seconds_of_audio > 0);
    this.play.hidden = this.download.hidden = status !== "done";
    this.cancel.hidden = !isActive(task);
  }

  #build() {
    const button = (text, onclick, kind = "quiet") =>
      h("button", { type: "button", class: kind, "aria-label": `${text}: ${this.title}`, onclick }, text);
    this.badge = h("span", { class: "badge" });
    this.detail = h("p", { class: "detail" });
    this.error = h("p", { class: "error", role: "alert" });
    this.bar = h("progress", { "aria-label": `Progress of ${this.title}` });
    this.hear = button("Listen", () => this.#try(() => this.#listen()));
    this.play = button("Play", () => this.#try(() => this.#open()));
    this.cancel = button("Cancel", () => this.#try(() => this.#cancel()));
    const name = fileName(this.title, this.format);
    this.download = h("a", { class: "button quiet", href: audioAddress(this.task.id), download: name }, "Download");
    this.download.setAttribute("aria-label", `Download: ${this.title}`);
    this.download.addEventListener("click", (event) => this.#save(event, name));
    const head = h("div", { class: "task-head" }, h("h3", {}, this.title), this.badge);
    const actions = h("div", { class: "actions" }, this.hear, this.play, this.download, this.cancel);
    this.element = h("li", { class: "task" }, head, this.detail, this.bar, this.error, actions);
  }

  async #try(act) {
    this.trouble = "";
    try {
      await act();
    } catch (error) {
      this.trouble = error.message;
    }
    if (this.element.isConnected) this.update(this.task);
  }

  /** Plays a recording while it is being made, from its start. */
  #listen() {
    return this.listening.play(this.title, (signal) => samplesInWav(this.#growing(signal)));
  }

  async *#growing(signal) {
    for (let position = 0; ; await pause(MORE_MS, signal)) {
      const isComplete = !isActive(this.task);
      for await (const piece of audioFrom(this.task.id, position, signal)) {
        position += piece.length;
        yield piece;
      }
      if (isComplete) return;
    }
  }

  /** Browsers send no key for the source of a player: with one, the recording is fetched first. */
  async #open() {
    this.listening.stop();
    if (!this.audio) {
      const source = key() ? URL.createObjectURL(await taskAudio(this.task.id)) : audioAddress(this.task.id);
      this.audio = h("audio", { controls: true, src: source, "aria-label": this.title });
      this.audio.addEventListener("play", () => this.listening.stop());
      this.element.append(this.audio);
    }
    try {
      await this.audio.play();
    } catch {
      this.audio.remove();
      this.audio = null;
      if (this.format === "wav") return this.#listen();
      throw new Error("This browser cannot play it. Download it to hear it.");
    }
  }

  async #save(event, name) {
    if (!key()) return; // the browser loads it itself, straight to the disk
    event.preventDefault();
    this.#try(async () => saveFile(await taskAudio(this.task.id), name));
  }

  async #cancel() {
    await removeTask(this.task.id);
    announce(`${this.title}: cancelled.`);
    this.onchange();
  }
}

function titleOf(task) {
  const created = dateOf(task.created);
  return created ? `Recording of ${day(created).replace("Today", "today")}` : "Recording";
}

/** What there is to say of a task; when it was made stands in the title of one without a name. */
function detailOf(task, format, named) {
  const parts = { queued: queuedParts, running: runningParts, done: doneParts }[task.status]?.(task, format) ?? [];
  const created = named && dateOf(task.created);
  return [...parts, created && day(created)].filter(Boolean).join(" · ");
}

const percent = ({ frames, of_frames: all }) => `${Math.floor((100 * (frames ?? 0)) / all)}%`;

function queuedParts(task) {
  const { position, estimated_start: start } = task;
  const wait = secondsUntil(start);
  return [
    isBegun(task) && `${percent(task)} made, goes on when there is room`,
    Number.isInteger(position) && `Place ${position} in the queue`,
    wait !== null && (wait > 0 ? `starts in about ${roughly(wait)}` : "starts soon"),
  ];
}

function runningParts(task) {
  const { frames, of_frames: all, eta_s: left, rtf } = task;
  return [
    all > 0 && percent(task),
    all > 0 && `${clock((frames ?? 0) / FRAMES_PER_S)} of about ${clock(all / FRAMES_PER_S)}`,
    left != null && `about ${roughly(left)} left`,
    rtf > 0 && `${(1 / rtf).toFixed(1)} times as fast as speech`,
  ];
}

function doneParts({ seconds_of_audio: made, speakers }, format) {
  const count = Array.isArray(speakers) ? speakers.length : speakers;
  return [made != null && clock(made), format.toUpperCase(), count > 0 && plural(count, "speaker")];
}
