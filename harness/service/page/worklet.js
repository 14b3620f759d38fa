/**
 * Plays 16-bit samples on the audio thread, in order and without a gap while there are any.
 *
 * Messages in: {samples: Int16Array}, {end: true} after the last ones, {stop: true}. Messages out, ten times a second
 * and at each change: state ("waiting", "playing", "stalled", "ended"), samples played and waiting, stalls, and a digest
 * (FNV-1a, 32 bits, over the samples' bytes, low byte first) of what was played. Samples are played unchanged.
 */

const FIRST_S = 0.25; // buffered before the first sound
const AGAIN_S = 0.5; // buffered before it goes on after a stall
const REPORTS_PER_S = 10;
const [OFFSET_BASIS, PRIME] = [0x811c9dc5, 0x01000193];

class Playback extends AudioWorkletProcessor {
  constructor() {
    super();
    this.queue = [];
    this.at = 0; // the next sample of the first piece
    this.waiting = 0;
    this.played = 0;
    this.digest = OFFSET_BASIS;
    this.stalls = 0;
    this.stalled = 0; // samples of silence in stalls
    this.state = "waiting";
    this.hasEnd = false;
    this.sinceReport = 0;
    this.port.onmessage = ({ data }) => this.receive(data);
  }

  receive({ samples, end, stop }) {
    if (samples?.length) {
      this.queue.push(samples);
      this.waiting += samples.length;
    }
    this.hasEnd ||= Boolean(end);
    if (stop) this.change("ended");
  }

  process(_inputs, [[output]]) {
    if (this.state === "ended") return false;
    this.begin();
    if (this.state === "stalled") this.stalled += output.length;
    if (this.state === "playing") this.play(output);
    this.sinceReport += output.length;
    if (this.sinceReport * REPORTS_PER_S >= sampleRate) this.report();
    return this.state !== "ended";
  }

  /** Starts, goes on after a stall, or ends. A stall counts once sound follows: silence after the last sound is none. */
  begin() {
    if (this.state === "playing") return;
    if (this.hasEnd && !this.waiting) return this.change("ended");
    const needed = this.state === "stalled" ? AGAIN_S : FIRST_S;
    if (!this.hasEnd && this.waiting < needed * sampleRate) return;
    if (this.state === "stalled") this.stalls += 1;
    this.change("playing");
  }

  play(output) {
    let filled = 0;
    while (filled < output.length && this.queue.length) {
      const [piece] = this.queue;
      const count = Math.min(output.length - filled, piece.length - this.at);
      for (let index = 0; index < count; index += 1) output[filled + index] = this.take(piece[this.at + index]);
      filled += count;
      this.at += count;
      if (this.at === piece.length) {
        this.queue.shift();
        this.at = 0;
      }
    }
    this.waiting -= filled;
    this.played += filled;
    if (!this.waiting) this.change(this.hasEnd ? "ended" : "stalled");
  }

  take(sample) {
    this.digest = Math.imul(this.digest ^ (sample & 255), PRIME);
    this.digest = Math.imul(this.digest ^ ((sample >> 8) & 255), PRIME);
    return sample / 32768;
  }

  change(state) {
    this.state = state;
    this.report();
  }

  report() {
    this.sinceReport = 0;
    this.port.postMessage({
      state: this.state,
      played: this.played,
      waiting: this.waiting,
      stalls: this.stalls,
      stalled: this.stalled,
      digest: this.digest >>> 0,
    });
  }
}

registerProcessor("playback", Playback);
