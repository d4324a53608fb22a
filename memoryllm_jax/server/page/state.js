// What the views share. It lives as long as the page, so switching views loses nothing.

import { post } from "./api.js";

export const state = {
  model: null, // the answer of /api/model
  prompt: "",
  sampling: { max_tokens: 48, temperature: 0.7, top_p: 1, top_k: 0, seed: 1 },
  sequence: [], // the tokens that Generate shows: {id, text, logProb, alternatives, given}
  // A kept overlay {name, texts}, and after it edits: {edit, text}, with the edit in the JSON of the API
  changes: { overlay: null, edits: [] },
};

/** The name of an FFN: a model such as base has only one, and no need to tell two apart. */
export function ffnName(ffn) {
  if (ffn === "memory") return "FFN-M";
  return state.model.ffns.length > 1 ? "FFN-C" : "FFN";
}

const changes = new EventTarget();

/** Calls `call` whenever `name` of the state has changed. */
export function onChange(name, call) {
  changes.addEventListener(name, () => call());
}

/** Says that `name` of the state has changed. */
export function changed(name) {
  changes.dispatchEvent(new Event(name));
}

/** Changes one entry of the state. */
export function set(name, value) {
  state[name] = value;
  changed(name);
}

const earlier = [];

/** Changes the edits; `undoChanges` takes this back. */
export function setChanges(changes) {
  earlier.push(state.changes);
  set("changes", changes);
}

/** Takes the last change of the edits back. */
export function undoChanges() {
  if (earlier.length > 0) set("changes", earlier.pop());
}

/** Whether there is a change of the edits to undo. */
export function canUndo() {
  return earlier.length > 0;
}

/** Whether the memory is changed at all. */
export function isChanged() {
  return state.changes.overlay !== null || state.changes.edits.length > 0;
}

/** The changes of the memory as the fields of a request. */
export function changesBody(changes = state.changes) {
  const overlay = changes.overlay === null ? {} : { overlay: changes.overlay.name };
  return { ...overlay, edits: changes.edits.map(({ edit }) => edit) };
}

let tokenized = { text: null, tokens: [] };

/** The tokens of the shared prompt as the model reads it. */
export async function promptTokens(signal) {
  const text = state.prompt;
  if (tokenized.text !== text) {
    const { tokens } = await post("/api/tokenize", { text }, signal);
    tokenized = { text, tokens };
  }
  return tokenized.tokens;
}

/** The fields of a completion request with the shared way of drawing tokens, which all views use. */
export function completionBody(ids, more) {
  const { top_k, ...sampling } = state.sampling;
  return { model: state.model.name, prompt: ids, ...sampling, ...(top_k > 0 ? { top_k } : {}), ...more };
}
