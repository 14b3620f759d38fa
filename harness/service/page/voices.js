/** A voice for each speaker of the script, with samples to hear, and voices that people bring themselves. */

import { addVoice, listVoices, voiceSample } from "./api.js";
import { $, announce, h, setText, showText } from "./dom.js";
import { playSample, stopSample } from "./player.js";
import { MAX_SPEAKERS } from "./script.js";
import { recall, remember } from "./store.js";

const SPEAKERS = Array.from({ length: MAX_SPEAKERS }, (_, index) => index + 1);

export class Voices {
  constructor() {
    this.voices = [];
    this.picked = recall("voices", {}); // by speaker: what somebody chose
    this.playing = null;
    this.rows = SPEAKERS.map((speaker) => this.#row(speaker));
    $("voice-rows").append(...this.rows.map(({ element }) => element));
    $("add-voice").addEventListener("click", () => $("voice-file").click());
    $("voice-file").addEventListener("change", () => this.#add());
    $("voices-again").addEventListener("click", () => this.load());
    this.show([]);
  }

  /** Asks the service for its voices. */
  async load() {
    $("voices-again").hidden = true;
    try {
      this.voices = await listVoices();
      this.#say(this.voices.length ? "" : "The service has no voices yet: it uses one of its own, or add one.");
    } catch (error) {
      this.#say(`No list of voices. ${error.message}`, true);
      $("voices-again").hidden = false;
    }
    this.rows.forEach((row) => this.#offer(row));
  }

  /** Shows the speakers of a script; the first one if it has none yet. */
  show(speakers) {
    for (const { element, speaker } of this.rows) {
      element.hidden = !(speakers.length ? speakers.includes(speaker) : speaker === 1);
    }
  }

  /** The voice of each speaker, in order; null where the service has no voices. */
  chosen(speakers) {
    return this.voices.length ? speakers.map((speaker) => this.#of(speaker).id) : null;
  }

  #of(speaker) {
    const { value } = this.rows[speaker - 1].select;
    return this.voices.find(({ id }) => String(id) === value);
  }

  #row(speaker) {
    const id = `voice-${speaker}`;
    const select = h("select", { id, onchange: () => this.#pick(speaker, select.value), disabled: true });
    const button = h("button", { type: "button", class: "quiet", onclick: () => this.#hear(row), disabled: true }, "Sample");
    const label = h("label", { for: id }, h("span", { class: "dot", "aria-hidden": "true" }), `Speaker ${speaker}`);
    const element = h("div", { class: "voice", "data-speaker": speaker }, label, select, button);
    const row = { speaker, select, button, element };
    this.#label(row);
    return row;
  }

  #offer(row) {
    const { speaker, select, button } = row;
    select.replaceChildren(...this.voices.map(({ id, name }) => h("option", { value: id }, name)));
    const picked = this.voices.find(({ id }) => String(id) === this.picked[speaker]);
    const voice = picked ?? this.voices[(speaker - 1) % Math.max(1, this.voices.length)];
    if (voice) select.value = voice.id;
    select.disabled = button.disabled = !this.voices.length;
    this.#label(row);
  }

  #pick(speaker, voice) {
    this.picked = { ...this.picked, [speaker]: voice };
    remember("voices", this.picked);
    this.#label(this.rows[speaker - 1]);
  }

  #label({ speaker, select, button }) {
    const isOn = this.playing === speaker;
    setText(button, isOn ? "Stop" : "Sample");
    const name = select.selectedOptions[0]?.textContent ?? "a voice";
    button.setAttribute("aria-label", isOn ? "Stop the sample" : `Sample of ${name}, for speaker ${speaker}`);
  }

  async #hear({ speaker, select }) {
    const wasOn = this.playing === speaker;
    stopSample();
    if (wasOn) return;
    this.#mark(speaker);
    try {
      const data = await voiceSample(select.value);
      if (this.playing === speaker) await playSample(data);
      this.#say("");
    } catch (error) {
      this.#say(`This sample cannot be played. ${error.message}`, true);
    } finally {
      if (this.playing === speaker) this.#mark(null);
    }
  }

  #mark(speaker) {
    this.playing = speaker;
    this.rows.forEach((row) => this.#label(row));
  }

  async #add() {
    const [file] = $("voice-file").files;
    $("voice-file").value = "";
    if (!file) return;
    if (!(await isWav(file))) return this.#say(`${file.name} is not a WAV file. Choose a recording saved as WAV.`, true);
    this.#say(`Sending ${file.name} …`);
    try {
      const added = await addVoice(file);
      await this.load();
      this.#say(`${added.name} is added. Choose it for a speaker.`);
      announce(`${added.name} is added to the voices.`);
    } catch (error) {
      this.#say(`${file.name} was not added. ${error.message}`, true);
    }
  }

  #say(text, isError = false) {
    showText($("voices-state"), isError ? "" : text);
    showText($("voices-error"), isError ? text : "");
  }
}

async function isWav(file) {
  const start = new TextDecoder("latin1").decode(await file.slice(0, 12).arrayBuffer());
  return start.startsWith("RIFF") && start.endsWith("WAVE");
}
