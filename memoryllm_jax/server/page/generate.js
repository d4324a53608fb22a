// Generate: type, watch the continuation arrive as chips, and see what else each token could have been.

import { Continuation } from "./continuation.js";
import { Pause, Task, h, say } from "./dom.js";
import { promptField, samplingFields } from "./fields.js";
import { changesBody, isChanged, onChange, promptTokens, set, state } from "./state.js";
import { count, whole } from "./texts.js";

/** Fills the view. `look(text, index)` opens a token of a text, which is one as `state.text`, in Look. */
export function generateView(view, look) {
  const writing = new Continuation("Tokens of the text", look);
  const note = h("p", { class: "note quiet" });
  const typing = new Task(h("div", {}));
  const start = h("button", { type: "button", class: "primary", click: generate }, "Generate");
  const stop = h("button", { type: "button", disabled: true, click: () => writing.cancel() }, "Stop");
  const useEdits = h("input", { type: "checkbox", id: "use-edits" });
  const withEdits = h("label", { class: "check", for: "use-edits" }, useEdits, "with the edits");
  let runs = 0;
  const onlyPrompt = new Pause(150, showPrompt);

  view.append(
    promptField(generate),
    h("div", { class: "row" }, start, stop, samplingFields(), withEdits),
    typing.place,
    writing.element,
    note,
    h(
      "p",
      { class: "legend quiet" },
      h("span", { class: "scale", "aria-hidden": "true" }),
      "The stronger the tint, the less likely the token.",
    ),
  );

  const showEdits = () => {
    withEdits.hidden = !isChanged();
    if (!isChanged()) useEdits.checked = false;
  };
  onChange("changes", showEdits);
  showEdits();
  onChange("prompt", () => onlyPrompt.start());
  showPrompt();

  async function showPrompt() {
    writing.cancel();
    await typing.run("Splitting the prompt into tokens", async (signal) => {
      const tokens = (await promptTokens(signal)).map((token) => ({ ...token, given: true }));
      const shown = writing.tokens.filter((token) => token.given);
      if (shown.length === tokens.length && shown.every((token, i) => token.id === tokens[i].id)) return;
      writing.show(tokens);
      set("text", writing.text);
      const { context } = state.model;
      const excess = tokens.length < context ? "" : `: too many for the context of ${whole(context)}`;
      note.textContent = `${count(tokens.length, "token")}${excess}`;
    });
  }

  async function generate() {
    onlyPrompt.cancel();
    typing.cancel();
    start.textContent = "Generate again";
    stop.disabled = false;
    const run = (runs += 1);
    const changes = useEdits.checked ? changesBody() : {};
    const done = await writing.run(changes, (arrived) => {
      note.textContent = count(arrived, "new token");
    });
    if (run !== runs) return; // The next one has begun.
    stop.disabled = true;
    set("text", writing.text);
    if (done) say(note.textContent);
  }
}
