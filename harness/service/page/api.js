/** The service, by HTTP: keys, errors in words, events, and bytes as they come. */

import { askKey, key } from "./key.js";

/** What the service refused, and why. `lines`: [{line, message}] where it refused lines of the script. */
export class ServiceError extends Error {
  constructor(status, message, lines = []) {
    super(message);
    Object.assign(this, { status, lines });
  }
}

const SILENT = "The service does not answer. Check that it is running, then try again.";
const BY_STATUS = {
  404: "The service has no such recording any more.",
  413: "That is more than the service accepts.",
  422: "The service does not accept this.",
  429: "The service is at its limit.",
  503: "The service has no room now.",
};
const NOT_FOUND_RANGE = 416;

export const address = (path) => new URL(path, document.baseURI).href;
const ofTask = (id, more = "") => `v1/tasks/${encodeURIComponent(id)}${more}`;
export const audioAddress = (id) => address(ofTask(id, "/audio"));

/** Sends a request; asks for a key where one is needed. Raises ServiceError, or AbortError when stopped. */
export async function call(path, { headers = {}, accept = [], ...options } = {}) {
  for (let refused = false; ; refused = true) {
    const sent = key() ? { ...headers, Authorization: `Bearer ${key()}` } : headers;
    const tried = key();
    const response = await send(path, { ...options, headers: sent });
    if (response.ok || accept.includes(response.status)) return response;
    if (response.status !== 401) throw await errorOf(response);
    const isStale = tried !== key(); // another request has asked meanwhile
    if (!isStale && !(await askKey(refused || Boolean(tried)))) {
      throw new ServiceError(401, "The service needs a key. Press the button again to enter one.");
    }
  }
}

async function send(path, options) {
  try {
    return await fetch(address(path), { cache: "no-store", ...options });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ServiceError(0, SILENT);
  }
}

async function errorOf(response) {
  const { status } = response;
  const detail = (await response.json().catch(() => null))?.detail;
  const wait = Number(response.headers.get("Retry-After"));
  const later = wait > 0 ? ` Try again in ${wait} s.` : "";
  if (Array.isArray(detail)) {
    const lines = detail.filter((each) => Number.isInteger(each?.line));
    const others = detail.filter((each) => !lines.includes(each)).map((each) => String(each?.message ?? each?.msg ?? each));
    return new ServiceError(status, others.join("; ") || (lines.length ? "" : BY_STATUS[422]), lines.map(asLine));
  }
  const said = typeof detail === "string" && detail ? detail : (BY_STATUS[status] ?? `The service failed (${status}).`);
  return new ServiceError(status, said + later);
}

const asLine = ({ line, message }) => ({ line, message: String(message) });

const json = async (path, options) => (await call(path, options)).json();
const posted = (content, headers = {}) => ({
  method: "POST",
  headers: { "Content-Type": "application/json", ...headers },
  body: JSON.stringify(content),
});

export const listVoices = () => json("v1/voices");
export const listTasks = async () => (await json("v1/tasks?limit=20")) ?? [];
export const removeTask = (id) => call(ofTask(id), { method: "DELETE", accept: [404] });
export const createTask = (body, once) => json("v1/tasks", posted(body, { "Idempotency-Key": once }));
export const voiceSample = async (id) => (await call(`v1/voices/${encodeURIComponent(id)}/sample`)).arrayBuffer();
export const taskAudio = async (id) => (await call(ofTask(id, "/audio"))).blob();

export function addVoice(file) {
  const body = new FormData();
  body.append("file", file, file.name);
  return json("v1/voices", { method: "POST", body });
}

/** Speech as it is made: {rate, chunks}, chunks being pieces of 16-bit samples that may end within a sample. */
export async function speech(script, voices, signal) {
  const body = { input: script, voices, response_format: "pcm", stream: true };
  const response = await call("v1/audio/speech", { ...posted(body), signal });
  return { rate: Number(response.headers.get("X-Sample-Rate") ?? 24000), chunks: chunksOf(response) };
}

/** The bytes of a task's audio from a position; nothing where there are none yet. */
export async function* audioFrom(id, position, signal) {
  const headers = { Range: `bytes=${position}-` };
  const response = await call(ofTask(id, "/audio"), { headers, signal, accept: [404, NOT_FOUND_RANGE] });
  if (!response.ok) return;
  let skipped = response.status === 206 ? 0 : position;
  for await (const chunk of chunksOf(response)) {
    const rest = chunk.subarray(Math.min(skipped, chunk.length));
    skipped -= chunk.length - rest.length;
    if (rest.length) yield rest;
  }
}

/** The states of a task as they change, until the service ends the stream. */
export async function* taskEvents(id, signal) {
  const response = await call(ofTask(id, "/events"), { headers: { Accept: "text/event-stream" }, signal });
  const decoder = new TextDecoder();
  let rest = "";
  for await (const chunk of chunksOf(response)) {
    const events = (rest + decoder.decode(chunk, { stream: true })).replaceAll("\r\n", "\n").split("\n\n");
    rest = events.pop();
    for (const event of events) {
      const data = event.split("\n").filter((line) => line.startsWith("data:")).map((line) => line.slice(5));
      if (data.length) yield JSON.parse(data.join("\n"));
    }
  }
}

async function* chunksOf(response) {
  const reader = response.body.getReader();
  try {
    for (;;) {
      const { done, value } = await reader.read();
      if (done) return;
      yield value;
    }
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ServiceError(0, "The connection to the service broke.");
  } finally {
    reader.cancel().catch(() => {});
  }
}
