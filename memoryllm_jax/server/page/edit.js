// Edit: change rows of the token memory, compare the text and the loss before and after, and keep the edits.

import { post } from "./api.js";
import { SideBySide } from "./continuation.js";
import { Pause, Task, errorBox, field, h, say } from "./dom.js";
import { LayerChips, TokenSearch } from "./fields.js";
import { keeping } from "./keeping.js";
import { lossSection } from "./loss.js";
import { canUndo, changesBody, isChanged, onChange, setChanges, state, undoChanges } from "./state.js";
import { number } from "./texts.js";

const OPERATIONS = {
  replace: { label: "Replace", says: "The token gets the rows of another one." },
  blend: { label: "Blend", says: "The token's rows move a share of the way to those of another one." },
  swap: { label: "Swap", says: "Two tokens exchange their rows." },
  zero: { label: "Zero", says: "The token's rows become zero: they add nothing at it." },
  suppress: { label: "Suppress a key", says: "One key of a layer no longer adds its value, at any token." },
};

/**
 * Fills the view.
 *
 * @param look(text, index) opens a token of a text in Look; `open()` shows this view.
 * @returns {token(token), key(layer, key)}: begin an edit of a token or a key.
 */
export function editView(view, look, open) {
  if (!state.model.can_edit) {
    view.append(h("p", { class: "quiet" }, "This model adds no row for a token, so there are none to edit."));
    return { token: open, key: open };
  }
  const form = editForm();
  view.append(
    h(
      "div",
      { class: "two" },
      h("section", {}, h("h2", {}, "Change the memory"), form.element),
      h("section", {}, h("h2", {}, "Edits"), editList(), keeping()),
    ),
    comparison(view, look),
    lossSection("The loss, before and after", "changes", changesBody),
  );
  return {
    token(token) {
      form.begin("replace", { token });
      open();
      form.focus();
    },
    key(layer, key) {
      form.begin("suppress", { layer, key });
      open();
      form.focus();
    },
  };
}

/** The form that adds an edit. */
function editForm() {
  const place = h("div", {});
  const task = new Task(place);
  const token = new TokenSearch("Token");
  const by = new TokenSearch("By the token");
  const share = h("input", { type: "range", min: "0", max: "1", step: "0.05", value: "0.5", input: showShare });
  const shareText = h("output", { class: "n" });
  const layers = new LayerChips("Layers of the edit", state.model.layers);
  const layer = h("input", {
    type: "number",
    min: "0",
    max: String(state.model.layers - 1),
    value: "0",
    required: true,
  });
  const key = h("input", {
    type: "number",
    min: "0",
    max: String((state.model.keys.memory ?? 1) - 1),
    value: "0",
    required: true,
  });
  const says = h("p", { class: "note quiet" });
  let operation = "replace";

  // Rows of a table are not made by keys.
  const names = Object.keys(OPERATIONS).filter((name) => name !== "suppress" || state.model.keys.memory);
  const choices = names.map((name) => {
    const input = h("input", {
      type: "radio",
      name: "operation",
      id: `operation-${name}`,
      change: () => setOperation(name),
    });
    return h("span", { class: "choice" }, input, h("label", { for: input.id }, OPERATIONS[name].label));
  });
  const shareField = field("Share of the other token", h("div", { class: "row" }, share, shareText));
  const everyLayer = h("button", { type: "button", class: "plain", click: () => layers.set(all()) }, "all");
  const layersField = h(
    "div",
    { class: "field" },
    h("span", { class: "label" }, "Layers ", everyLayer),
    layers.element,
  );
  const keyFields = h("div", { class: "fields" }, field("Layer", layer), field("Key", key));
  const element = h(
    "form",
    {
      submit: (event) => {
        event.preventDefault();
        add();
      },
    },
    h("fieldset", { class: "choices" }, h("legend", { class: "unseen" }, "Operation"), choices),
    says,
    h("div", { class: "fields" }, token.element, by.element),
    shareField,
    layersField,
    keyFields,
    h("p", { class: "row" }, h("button", { class: "primary", type: "submit" }, "Add this edit")),
    place,
  );

  function all() {
    return Array.from({ length: state.model.layers }, (_, i) => i);
  }

  function showShare() {
    shareText.textContent = number(Number(share.value));
  }

  function setOperation(name) {
    operation = name;
    element.querySelector(`#operation-${name}`).checked = true;
    says.textContent = OPERATIONS[name].says;
    const isKey = name === "suppress";
    token.element.hidden = isKey;
    by.element.hidden = isKey || name === "zero";
    shareField.hidden = name !== "blend";
    layersField.hidden = isKey;
    keyFields.hidden = !isKey;
    // Hidden fields must not keep the form from being sent.
    layer.disabled = key.disabled = !isKey;
    task.cancel();
  }

  function edit() {
    if (operation === "suppress") return { operation, layer: Number(layer.value), key: Number(key.value) };
    const chosen = layers.sorted.length === state.model.layers ? {} : { layers: layers.sorted };
    const two = operation === "zero" ? {} : { by: by.value.id };
    const part = operation === "blend" ? { share: Number(share.value) } : {};
    return { operation, token: token.value.id, ...two, ...part, ...chosen };
  }

  function missing() {
    if (operation === "suppress") return null;
    if (!token.value) return [token, "Choose a token from the list that appears while you type."];
    if (operation !== "zero" && !by.value)
      return [by, "Choose the other token from the list that appears while you type."];
    if (layers.sorted.length === 0) return [null, "Choose at least one layer."];
    return null;
  }

  async function add() {
    task.cancel();
    const problem = missing();
    if (problem) {
      place.replaceChildren(errorBox(new Error(problem[1])));
      problem[0]?.input.focus();
      return;
    }
    const added = edit();
    await task.run("Checking the edit", async (signal) => {
      const before = state.changes;
      const known = await textsOf(before, signal);
      const texts = await textsOf({ ...before, edits: [...before.edits, { edit: added }] }, signal);
      if (signal.aborted) return;
      const text = texts.slice(known.length).join("; ");
      setChanges({ ...before, edits: [...before.edits, { edit: added, text }] });
      say(`Added: ${text}`);
    });
  }

  layers.set(all());
  showShare();
  setOperation("replace");
  return {
    element,
    begin(name, given) {
      setOperation(name);
      if (given.token) token.set(given.token);
      if (given.layer !== undefined) layer.value = String(given.layer);
      if (given.key !== undefined) key.value = String(given.key);
    },
    focus() {
      (operation === "suppress" ? element.querySelector("[type=submit]") : by.input).focus();
    },
  };
}

async function textsOf(changes, signal) {
  const body = changesBody(changes);
  if (!body.overlay && body.edits.length === 0) return [];
  return (await post("/api/edit/check", body, signal)).texts;
}

/** The list of edits, with undo. */
function editList() {
  const list = h("ol", { class: "edits" });
  const none = h("p", { class: "quiet" }, "None yet: the model is as it was trained.");
  const undo = h("button", { type: "button", click: () => undoChanges() }, "Undo");
  const clear = h("button", { type: "button", click: () => setChanges({ overlay: null, edits: [] }) }, "Remove all");
  const without = (index) => setChanges({ ...state.changes, edits: state.changes.edits.filter((_, i) => i !== index) });
  const item = (text, remove) =>
    h(
      "li",
      {},
      h("bdi", {}, text),
      h("button", { type: "button", class: "plain", "aria-label": `remove: ${text}`, click: remove }, "remove"),
    );

  function show() {
    const { overlay, edits } = state.changes;
    list.replaceChildren();
    if (overlay !== null) {
      const entry = item(`overlay ${overlay.name}`, () => setChanges({ ...state.changes, overlay: null }));
      entry.append(
        h(
          "ul",
          {},
          overlay.texts.map((text) => h("li", {}, h("bdi", {}, text))),
        ),
      );
      list.append(entry);
    }
    edits.forEach(({ text }, i) => list.append(item(text, () => without(i))));
    none.hidden = isChanged();
    undo.disabled = !canUndo();
    clear.disabled = !isChanged();
  }
  onChange("changes", show);
  show();
  return h("div", {}, none, list, h("div", { class: "row" }, undo, clear));
}

/** The continuation before and after, side by side. */
function comparison(view, look) {
  const texts = new SideBySide(["Before", "After"], look);
  const run = () => texts.run(changesBody());

  // The texts follow the edits while the view is open, and catch up when it is opened.
  let seen = isChanged() ? null : state.changes;
  const follow = new Pause(250, () => {
    if (view.hidden || seen === state.changes) return;
    seen = state.changes;
    run();
  });
  onChange("changes", () => follow.start());
  view.addEventListener("shown", () => follow.start());
  return texts.section("The text, before and after", "Compare", run);
}
