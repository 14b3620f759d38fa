/** The page: a script, voices, and the two ways to make speech of them. */

import { createTask, speech } from "./api.js";
import { $, announce, setText, showText } from "./dom.js";
import { Editor } from "./editor.js";
import { EXAMPLE } from "./example.js";
import { forgetKey, key, onKey } from "./key.js";
import { Listening } from "./listen.js";
import { RATE } from "./player.js";
import { withNumbers } from "./script.js";
import { recall, remember } from "./store.js";
import { Tasks } from "./tasks.js";
import { Voices } from "./voices.js";
import { plural, roughly } from "./words.js";

const LONG_S = 10 * 60; // of speech: better made in the background
const TITLE = 90; // characters
const REFUSED = [400, 401, 403, 404, 409, 413, 422, 429]; // the service made no task; with a 503 it may have

const voices = new Voices();
const listening = new Listening();
const tasks = new Tasks(listening);
$("script").value = recall("script", "");
const editor = new Editor({
  textarea: $("script"),
  layer: $("layer"),
  problems: $("problems"),
  onchange: showScript,
});

function showScript(read, text) {
  remember("script", text);
  const isEmpty = !text.trim();
  const parts = [plural(read.speakers.length, "speaker"), `about ${roughly(read.seconds)} of speech`];
  setText($("script-facts"), isEmpty ? "" : parts.join(" · "));
  $("use-example").hidden = !isEmpty;
  $("is-long").hidden = read.seconds < LONG_S;
  offerNumbers(read.labels);
  voices.show(read.speakers);
}

/** Where lines begin with names, offers to make speakers of them. */
function offerNumbers(labels) {
  const isUseful = labels.length > 0 && labels.length <= 4;
  $("use-names").hidden = !isUseful;
  setText($("use-names-text"), isUseful ? `The lines seem to name who speaks: ${labels.join(", ")}.` : "");
}

function titleOf(text) {
  const { lines } = editor.read;
  const first = lines.map((line) => line.text.slice(line.end).trim()).find(Boolean) ?? text.trim();
  return first.length > TITLE ? `${first.slice(0, TITLE).replace(/\s+\S*$/, "")}…` : first;
}

/** Says what went wrong: at the lines where the service named some, otherwise below the buttons. */
function showFailure(error) {
  if (error.lines?.length) editor.refuse(error.lines);
  showText($("failure"), error.message || "The service does not accept this script: see the marked lines.");
}

async function speak() {
  showText($("failure"), "");
  if (!editor.check()) return;
  if (listening.isOn && listening.report.state === "waiting") return; // pressed twice
  const [text, chosen] = [editor.text, voices.chosen(editor.read.speakers)];
  document.querySelectorAll("audio").forEach((audio) => audio.pause());
  try {
    await listening.play(titleOf(text), async (signal) => {
      const { rate, chunks } = await speech(text, chosen, signal);
      if (rate !== RATE) throw new Error(`The service speaks at ${rate} Hz, this page plays ${RATE} Hz.`);
      return chunks;
    });
  } catch (error) {
    showFailure(error);
  }
}

async function make() {
  showText($("failure"), "");
  if (!editor.check()) return;
  const script = editor.text;
  const body = { script, voices: voices.chosen(editor.read.speakers), format: $("format").value, options: {} };
  const before = recall("pending", null);
  const isSame = before && JSON.stringify(before.body) === JSON.stringify(body);
  remember("pending", isSame ? before : { once: token(), body, title: titleOf(script) });
  await submit();
}

/** Asks for the task that is pending, under one key: after a lost answer or a reload it is still one task. */
async function submit() {
  const pending = recall("pending", null);
  if (!pending) return;
  $("make").setAttribute("aria-busy", "true");
  try {
    const task = await createTask(pending.body, pending.once);
    remember("pending", null);
    tasks.add(task, { title: pending.title, format: pending.body.format });
    announce(`${pending.title}: added to the recordings.`);
    showText($("made"), "Added to the recordings below. You can close this page: it goes on.");
  } catch (error) {
    if (REFUSED.includes(error.status)) remember("pending", null);
    showText($("made"), "");
    showFailure(error);
  }
  $("make").removeAttribute("aria-busy");
}

const token = () => [...crypto.getRandomValues(new Uint8Array(16))].map((byte) => byte.toString(16).padStart(2, "0")).join("");

function start() {
  $("speak").addEventListener("click", speak);
  $("make").addEventListener("click", make);
  $("use-example").addEventListener("click", () => editor.replace(EXAMPLE));
  $("number-names").addEventListener("click", () => editor.replace(withNumbers(editor.text, editor.read.labels)));
  $("script").addEventListener("keydown", (event) => {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) speak();
  });
  $("script").addEventListener("input", () => ["made", "failure"].forEach((id) => showText($(id), "")));
  $("format").value = recall("format", "wav");
  $("format").addEventListener("change", () => remember("format", $("format").value));
  $("forget-key").addEventListener("click", forgetKey);
  onKey(() => ($("forget-key").hidden = !key()));
  $("forget-key").hidden = !key();
  voices.load();
  submit();
}

start();

/** For tests and for the curious: what was played so far, as the audio thread counted it. */
window.studio = Object.freeze({
  get played() {
    return listening.report;
  },
});
