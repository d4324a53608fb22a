// Starts the page: what the model is, and the four views as tabs.

import { ablateView } from "./ablate.js";
import { get } from "./api.js";
import { errorBox, h } from "./dom.js";
import { editView } from "./edit.js";
import { generateView } from "./generate.js";
import { lookView } from "./look.js";
import { ffnName, keepInTab, set, state } from "./state.js";
import { whole } from "./texts.js";

const VIEWS = ["generate", "look", "edit", "ablate"];
const tab = (name) => document.getElementById(`tab-${name}`);
const view = (name) => document.getElementById(`view-${name}`);

function current() {
  const name = location.hash.slice(1).split("/")[0];
  return VIEWS.includes(name) ? name : "generate";
}

/** Shows the view that the address names, and tells it so if another one was shown. */
function show() {
  const wasHidden = view(current()).hidden;
  for (const name of VIEWS) {
    const isCurrent = name === current();
    view(name).hidden = !isCurrent;
    tab(name).setAttribute("aria-selected", String(isCurrent));
    tab(name).tabIndex = isCurrent ? 0 : -1;
  }
  if (wasHidden) view(current()).dispatchEvent(new Event("shown"));
}

/** Opens a view at once; the browser reports the change of the address later. */
function open(name) {
  location.hash = name;
  show();
}

function makeTabs() {
  for (const name of VIEWS) tab(name).addEventListener("click", () => open(name));
  document.getElementById("tabs").addEventListener("keydown", (event) => {
    const here = VIEWS.indexOf(current());
    const to = { ArrowRight: here + 1, ArrowLeft: here - 1, Home: 0, End: VIEWS.length - 1 }[event.key];
    if (to === undefined) return;
    event.preventDefault();
    const name = VIEWS[(to + VIEWS.length) % VIEWS.length];
    open(name);
    tab(name).focus();
  });
  window.addEventListener("hashchange", show);
}

/** What the model is, in one line. */
function facts(model) {
  const widths = model.ffns.map((ffn) => `${whole(model.keys[ffn])} keys in ${ffnName(ffn)}`);
  const parts = [model.name, model.architecture, `${model.layers} layers of width ${model.dim}`, ...widths];
  return [...parts, `${whole(model.vocab_size)} tokens`].join(" · ");
}

async function start() {
  makeTabs();
  show();
  const trouble = document.getElementById("trouble");
  try {
    state.model = await get("/api/model");
  } catch (error) {
    document.getElementById("facts").textContent = "No model";
    trouble.replaceChildren(
      errorBox(error),
      h("button", { type: "button", click: () => location.reload() }, "Try again"),
    );
    return;
  }
  document.getElementById("facts").textContent = facts(state.model);
  document.title = `${state.model.name} · memoryllm`;
  state.prompt = "The file is";
  state.sampling.max_tokens = Math.min(48, Math.floor(state.model.context / 2));
  keepInTab();
  const edit = {};
  const look = lookView(view("look"), edit);
  const lookAt = (text, index) => {
    set("text", text);
    look.position(index);
    open("look");
    look.focus();
  };
  Object.assign(
    edit,
    editView(view("edit"), lookAt, () => open("edit")),
  );
  generateView(view("generate"), lookAt);
  ablateView(view("ablate"), lookAt);
  view(current()).dispatchEvent(new Event("shown"));
}

start();
