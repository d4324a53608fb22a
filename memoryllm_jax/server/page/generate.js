// Generate: type, watch the continuation arrive as chips, and see what else each token could have been.

import { Continuation } from "./continuation.js";
import { Pause, Task, h, say } from "./dom.js";
import { promptField, samplingFields } from "./fields.js";
import { changesBody, isChanged, onChange, promptTokens, set, state } from "./state.js";
import { whole } from "./texts.js";

/** Fills the view. `look(tokens, index)` opens a token of a text in Look. */
export function generateView(view, look) {
  const text = new Continuation("Tokens of the text", look);
  const note = h("p", { class: "note quiet" });
  const typing = new Task(h("div", {}));
  const start = h("button", { type: "button", class: "primary", click: generate }, "Generate");
  const stop = h("button", { type: "button", disabled: true, click: () => text.cancel() }, "Stop");
  const useEdits = h("input", { type: "checkbox", id: "use-edits" });
  const withEdits = h("label", { class: "check", for: "use-edits" }, useEdits, "with the edits");
  let runs = 0;
  const onlyPrompt = new Pause(150, showPrompt);

  view.append(
    promptField(generate),
    h("div", { class: "row" }, start, stop, samplingFields(), withEdits),
    typing.place,
    text.element,
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
    text.cancel();
    await typing.run("Splitting the prompt into tokens", async (signal) => {
      const tokens = (await promptTokens(signal)).map((token) => ({ ...token, given: true, logProb: undefined }));
      const shown = text.tokens.filter((token) => token.given);
      if (shown.length === tokens.length && shown.every((token, i) => token.id === tokens[i].id)) return;
      text.show(tokens);
      set("sequence", tokens);
      note.textContent = `${whole(tokens.length)} tokens`;
    });
  }

  async function generate() {
    onlyPrompt.cancel();
    typing.cancel();
    start.textContent = "Generate again";
    stop.disabled = false;
    const run = (runs += 1);
    const more = useEdits.checked ? changesBody() : {};
    const done = await text.run(more, (count) => {
      note.textContent = `${whole(count)} new tokens`;
    });
    if (run !== runs) return; // The next one has begun.
    stop.disabled = true;
    set("sequence", text.tokens);
    if (done) say(note.textContent);
  }
}
