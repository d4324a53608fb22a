// Requests to the server: JSON, streams of events, and the API key.

import { named } from "./texts.js";

/** A request that the server refused, in its words. */
class RequestError extends Error {
  constructor(message, status, retryAfter) {
    super(message);
    this.status = status;
    this.retryAfter = retryAfter;
  }
}

const KEY = "api key";
let asking = null;

/** Asks for the API key, once for all requests that wait for it. */
function askForKey(wasRefused) {
  asking ??= new Promise((resolve) => {
    const dialog = document.getElementById("key-dialog");
    const input = document.getElementById("key-input");
    input.value = "";
    document.getElementById("key-note").textContent =
      `${wasRefused ? "It did not accept the last one. " : ""}The page keeps it until the tab is closed.`;
    dialog.addEventListener(
      "close",
      () => {
        asking = null;
        const key = dialog.returnValue === "use" ? input.value.trim() : "";
        if (key) sessionStorage.setItem(KEY, key);
        input.value = "";
        dialog.returnValue = "";
        resolve(Boolean(key));
      },
      { once: true },
    );
    dialog.showModal();
  });
  return asking;
}

async function failure(response) {
  let message = `The server answered with status ${response.status}.`;
  try {
    message = (await response.json()).error.message;
  } catch {
    // The body is not ours, such as a proxy's page: the status says what is known.
  }
  return new RequestError(message, response.status, response.headers.get("Retry-After"));
}

/** A request's response. Raises RequestError in the server's words; asks for a key where one is wanted. */
async function request(method, path, body, signal, more = {}) {
  const key = sessionStorage.getItem(KEY);
  const headers = { ...more };
  if (key) headers.Authorization = `Bearer ${key}`;
  if (body !== undefined) headers["Content-Type"] = "application/json";
  let response;
  try {
    response = await fetch(path, {
      method,
      headers,
      body: body === undefined ? undefined : JSON.stringify(body),
      signal,
    });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new RequestError("The server cannot be reached. Is it still running?", 0);
  }
  if (response.status === 401 && (sessionStorage.getItem(KEY) !== key || (await askForKey(key !== null)))) {
    return request(method, path, body, signal, more);
  }
  if (!response.ok) throw await failure(response);
  return response;
}

export async function get(path, signal) {
  return (await request("GET", path, undefined, signal)).json();
}

export async function post(path, body, signal) {
  return (await request("POST", path, body, signal)).json();
}

export async function put(path, body) {
  return (await request("PUT", path, body)).json();
}

/** The response's body as a file. */
export async function file(path, body) {
  return (await request("POST", path, body)).blob();
}

/** The events of a stream, as parsed JSON. Raises RequestError if one is an error. */
async function* events(path, body, signal) {
  const response = await request("POST", path, body, signal, { Accept: "text/event-stream" });
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let pending = "";
  for (;;) {
    let piece;
    try {
      piece = await reader.read();
    } catch (error) {
      if (error.name === "AbortError") throw error;
      throw new RequestError("The connection to the server broke.", 0);
    }
    if (piece.done) return;
    pending += piece.value.replaceAll("\r\n", "\n");
    const parts = pending.split("\n\n");
    pending = parts.pop();
    for (const part of parts) {
      const lines = part.split("\n").filter((line) => line.startsWith("data:"));
      const data = lines.map((line) => line.slice(5).trimStart()).join("\n");
      if (!data || data === "[DONE]") continue;
      const event = JSON.parse(data);
      if (event.error) throw new RequestError(event.error.message, 500);
      yield event;
    }
  }
}

/** The last event of a stream, which reports {"done": share, "doing": text} until then. */
export async function result(path, body, signal, setDone) {
  let last;
  for await (const event of events(path, body, signal)) {
    if (event.done !== undefined) setDone(event.done, event.doing);
    else last = event;
  }
  if (last === undefined) throw new RequestError("The server ended the answer before its result.", 0);
  return last;
}

/**
 * The tokens of a completion as they arrive, those of the prompt first.
 *
 * Yields lists of {id, text, logProb, alternatives: [{text, logProb}]}.
 */
export async function* complete(body, signal) {
  const asked = { ...body, stream: true, echo: true, logprobs: 5, return_token_ids: true };
  for await (const event of events("/v1/completions", asked, signal)) {
    const choice = event.choices[0];
    const scores = choice?.logprobs;
    if (!scores) continue;
    yield scores.tokens.map((text, i) => ({
      id: choice.token_ids[i],
      text: named(text),
      logProb: scores.token_logprobs[i],
      alternatives: Object.entries(scores.top_logprobs?.[i] ?? {})
        .map(([text, logProb]) => ({ text: named(text), logProb }))
        .sort((a, b) => b.logProb - a.logProb),
    }));
  }
}
