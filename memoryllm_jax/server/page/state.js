// What the views share. Switching views loses nothing, and the prompt and the edits survive a reload of the tab.

import { post } from "./api.js";

export const state = {
  model: null, // the answer of /api/model
  prompt: "",
  sampling: { max_tokens: 48, temperature: 0.7, top_p: 1, top_k: 0, seed: 1 },
  // The text that Look opens: tokens {id, text, logProb, alternatives, given}, and the fields of the request that
  // changed the model which wrote it
  text: { tokens: [], changes: {} },
  // A kept overlay {name, texts}, and after it edits: {edit, text}, with the edit in the JSON of the API
  changes: { overlay: null, edits: [] },
  earlier: [], // what `changes` were before, for undo
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

/** Changes the edits; `undoChanges` takes this back. */
export function setChanges(changes) {
  state.earlier.push(state.changes);
  set("changes", changes);
}

/** Takes the last change of the edits back. */
export function undoChanges() {
  if (canUndo()) set("changes", state.earlier.pop());
}

/** Whether there is a change of the edits to undo. */
export function canUndo() {
  return state.earlier.length > 0;
}

/** Whether the memory is changed at all. */
export function isChanged() {
  return hasEdits(changesBody());
}

/** The changes of the memory as the fields of a request. */
export function changesBody(changes = state.changes) {
  const overlay = changes.overlay === null ? {} : { overlay: changes.overlay.name };
  return { ...overlay, edits: changes.edits.map(({ edit }) => edit) };
}

/** Whether fields of a request edit the memory. */
export function hasEdits({ overlay, edits = [] }) {
  return overlay !== undefined || edits.length > 0;
}

const KEPT = "work";
const ENTRIES = ["prompt", "sampling", "changes", "earlier"];

/** What two models must have in common for one to take what was kept of the other. */
function modelKey() {
  const { name, architecture, layers, keys, vocab_size, context } = state.model;
  return JSON.stringify([name, architecture, layers, keys, vocab_size, context]);
}

/** Takes up what this tab held before it was reloaded, if the model is the same, and keeps it from now on. */
export function keepInTab() {
  const { model, ...before } = JSON.parse(sessionStorage.getItem(KEPT) ?? "{}");
  if (model === modelKey()) Object.assign(state, before);
  const keep = () => {
    const now = Object.fromEntries(ENTRIES.map((name) => [name, state[name]]));
    try {
      sessionStorage.setItem(KEPT, JSON.stringify({ model: modelKey(), ...now }));
    } catch {
      sessionStorage.removeItem(KEPT); // There is no room for so long a prompt.
    }
  };
  ENTRIES.forEach((name) => onChange(name, keep));
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
