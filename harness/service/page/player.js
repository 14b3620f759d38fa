/** Sound: pieces of 16-bit samples played gap-free as they come, and short samples of voices. */

export const RATE = 24_000; // Hz, mono
const LAST_SOUNDS_MS = 1_000; // between the audio thread and the loudspeaker, at most
const IS_LITTLE_ENDIAN = new Uint8Array(new Uint16Array([1]).buffer)[0] === 1;

/** One stream of sound. `onreport` gets what the worklet says: see worklet.js. */
export class Player {
  #node = null;
  #context = null;
  #half = null; // a first byte of a sample whose second one has not come yet

  constructor(onreport) {
    this.onreport = onreport;
  }

  /** To be called from a key or click, or browsers stay silent. Raises Error where the browser cannot play streams. */
  async open() {
    this.#context = new AudioContext({ sampleRate: RATE, latencyHint: "playback" });
    if (!this.#context.audioWorklet) {
      throw new Error(
        "This browser plays speech while it is made only over https or on the machine itself. " +
          "Make it in the background instead, and play it when it is done.",
      );
    }
    await this.#context.audioWorklet.addModule(new URL("./worklet.js", import.meta.url).href);
    this.#node = new AudioWorkletNode(this.#context, "playback", { numberOfInputs: 0, outputChannelCount: [1] });
    this.#node.port.onmessage = ({ data }) => this.onreport(data);
    this.#node.connect(this.#context.destination);
    this.#context.resume();
  }

  /** Queues bytes; a piece may end within a sample. */
  push(bytes) {
    const whole = this.#half === null ? bytes : joined(this.#half, bytes);
    const even = whole.length - (whole.length % 2);
    this.#half = even < whole.length ? whole.slice(even) : null;
    const samples = samplesOf(whole.slice(0, even));
    this.#node.port.postMessage({ samples }, [samples.buffer]);
  }

  end() {
    this.#node.port.postMessage({ end: true });
  }

  stop() {
    this.#node?.port.postMessage({ stop: true });
  }

  /** Frees the device, after the last sounds have left it. */
  close() {
    setTimeout(() => this.#context?.close(), LAST_SOUNDS_MS);
  }
}

function joined(first, second) {
  const both = new Uint8Array(first.length + second.length);
  both.set(first);
  both.set(second, first.length);
  return both;
}

function samplesOf(bytes) {
  if (IS_LITTLE_ENDIAN) return new Int16Array(bytes.buffer);
  const view = new DataView(bytes.buffer);
  return Int16Array.from({ length: bytes.length / 2 }, (_, index) => view.getInt16(2 * index, true));
}

/** A WAV file of 16-bit mono samples, as a Blob of the pieces given. */
export function wavOf(pieces) {
  const length = pieces.reduce((sum, piece) => sum + piece.length, 0);
  const view = new DataView(new ArrayBuffer(44));
  const word = (at, letters) => [...letters].forEach((letter, index) => view.setUint8(at + index, letter.charCodeAt(0)));
  word(0, "RIFF");
  view.setUint32(4, 36 + length, true);
  word(8, "WAVEfmt ");
  view.setUint32(16, 16, true);
  view.setUint16(20, 1, true);
  view.setUint16(22, 1, true);
  view.setUint32(24, RATE, true);
  view.setUint32(28, 2 * RATE, true);
  view.setUint16(32, 2, true);
  view.setUint16(34, 16, true);
  word(36, "data");
  view.setUint32(40, length, true);
  return new Blob([view, ...pieces], { type: "audio/wav" });
}

/** The bytes of the samples in a WAV file that comes in pieces. Raises Error for another kind of WAV. */
export async function* samplesInWav(pieces) {
  let start = new Uint8Array(0);
  let isInside = false;
  for await (const piece of pieces) {
    if (isInside) yield piece;
    else {
      start = joined(start, piece);
      const at = startOfSamples(start);
      isInside = at !== null;
      if (isInside && at < start.length) yield start.slice(at);
    }
  }
}

/** Where the samples begin; null if the header is not complete. */
function startOfSamples(bytes) {
  const view = new DataView(bytes.buffer, bytes.byteOffset, bytes.length);
  const name = (at) => String.fromCharCode(...bytes.subarray(at, at + 4));
  for (let at = 12; at + 8 <= bytes.length; at += 8 + view.getUint32(at + 4, true)) {
    if (name(at) === "data") return at + 8;
    if (name(at) !== "fmt " || at + 24 > bytes.length) continue;
    const found = [view.getUint16(at + 8, true), view.getUint16(at + 10, true), view.getUint32(at + 12, true)];
    if (String(found) !== String([1, 1, RATE])) throw new Error("This recording cannot be played while it is made.");
  }
  return null;
}

let sounding = null;

/** Plays a short file, instead of the one before; resolves when it ends or is stopped. */
export async function playSample(data) {
  stopSample();
  const context = new AudioContext();
  const source = new AudioBufferSourceNode(context, { buffer: await context.decodeAudioData(data) });
  source.connect(context.destination);
  sounding = source;
  await new Promise((resolve) => {
    source.onended = resolve;
    source.start();
  });
  await context.close();
}

export function stopSample() {
  sounding?.stop();
  sounding = null;
}
