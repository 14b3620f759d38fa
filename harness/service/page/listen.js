/** The player at the foot of the page: what is heard, how much is buffered, and where it stalled. */

import { $, announce, saveFile, setText, showText } from "./dom.js";
import { Player, RATE, stopSample, wavOf } from "./player.js";
import { clock, fileName, plural } from "./words.js";

const STATES = { waiting: "Waiting for the first sound", playing: "Playing", stalled: "Waiting for more", ended: "Finished" };
const NOTHING = { state: "waiting", played: 0, waiting: 0, stalls: 0, stalled: 0, digest: 0 };

/** Plays one stream at a time. `report` is the last one of the worklet: see worklet.js. */
export class Listening {
  constructor() {
    this.report = NOTHING;
    this.current = null;
    $("stop").addEventListener("click", () => this.stop());
    $("save").addEventListener("click", () => saveFile(wavOf(this.pieces), fileName(this.title, "wav")));
    $("close").addEventListener("click", () => this.#hide(true));
  }

  get isOn() {
    return this.current !== null;
  }

  /** Plays what `open(signal)` gives: pieces of 16-bit samples. Raises what it raises, unless it was stopped. */
  async play(title, open) {
    this.stop();
    stopSample();
    const current = (this.current = { abort: new AbortController(), isStopped: false });
    const { signal } = current.abort;
    Object.assign(this, { title, pieces: [], report: NOTHING });
    const ended = Promise.withResolvers();
    current.player = new Player((report) => this.current === current && this.#heard(report, ended.resolve));
    this.#show();
    try {
      await current.player.open();
      for await (const piece of await open(signal)) {
        if (current.isStopped) break;
        this.pieces.push(piece);
        current.player.push(piece);
      }
      current.player.end();
      await Promise.race([ended.promise, stopped(signal)]);
    } catch (error) {
      current.player.stop();
      if (current.isStopped) return;
      current.isStopped = true;
      throw error;
    } finally {
      current.player.close();
      if (this.current === current) this.#finish(current.isStopped);
    }
  }

  stop() {
    if (!this.current) return;
    this.current.isStopped = true;
    this.current.player.stop();
    this.current.abort.abort();
    this.#finish(true);
  }

  #heard(report, resolve) {
    if (report.state !== this.report.state) announce(STATES[report.state]);
    this.report = report;
    this.#draw();
    if (report.state === "ended") resolve();
  }

  #show() {
    document.body.classList.add("is-listening");
    showText($("player-title"), this.title);
    Object.assign($("player"), { hidden: false });
    for (const name of ["save", "close"]) $(name).hidden = true;
    $("stop").hidden = false;
    announce(STATES.waiting);
    this.#draw();
  }

  #draw(words = STATES[this.report.state]) {
    const { played, waiting, stalls, stalled, state } = this.report;
    $("player").dataset.state = this.isOn ? state : "ended";
    setText($("player-state"), words);
    setText($("played"), clock(played / RATE));
    setText($("buffered"), `${(waiting / RATE).toFixed(1)} s`);
    $("buffer").value = waiting / RATE;
    const silent = stalls ? ` (${(stalled / RATE).toFixed(1)} s)` : "";
    setText($("stalls"), stalls + silent);
  }

  #finish(isStopped) {
    const hadFocus = document.activeElement === $("stop");
    this.current = null;
    this.report = { ...this.report, waiting: 0 };
    const words = isStopped ? "Stopped" : "Finished";
    this.#draw(words);
    announce(`${words}. ${plural(this.report.stalls, "stall")}.`);
    if (!this.pieces.length) return this.#hide(hadFocus);
    $("stop").hidden = true;
    $("save").hidden = false;
    $("close").hidden = false;
    if (hadFocus) $("close").focus();
  }

  #hide(hadFocus) {
    $("player").hidden = true;
    document.body.classList.remove("is-listening");
    if (hadFocus) $("speak").focus();
  }
}

const stopped = (signal) => new Promise((resolve) => signal.addEventListener("abort", resolve, { once: true }));
