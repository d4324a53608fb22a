// The change of the loss on held-out text, or on a text that the person gives.

import { result } from "./api.js";
import { Task, field, h, say } from "./dom.js";
import { onChange, state } from "./state.js";
import { count, signed } from "./texts.js";

/**
 * A section that measures the loss with and without changes.
 *
 * @param title its heading.
 * @param name of the entry of the state whose change makes the numbers out of date.
 * @param changesOf() gives the fields of the request that change the model.
 */
export function lossSection(title, name, changesOf) {
  const place = h("div", {});
  const task = new Task(place);
  const hint = state.model.has_held_out ? "Empty: the held-out text of the training run" : "A text to score";
  const own = h("textarea", { rows: "2", dir: "auto", spellcheck: "false", placeholder: hint });
  const found = h("p", { class: "loss" });
  const start = h("button", { type: "button", click: measure }, "Measure the loss");

  async function measure() {
    found.replaceChildren();
    await task.run("Scoring the text with and without the changes", async (signal, setDone) => {
      const body = { ...changesOf(), text: own.value || null };
      const { before, after, tokens } = await result("/api/edit/loss", body, signal, setDone);
      found.replaceChildren(
        h("strong", {}, signed(after - before, 4)),
        ` nats a token: ${before.toFixed(4)} before, ${after.toFixed(4)} after, over ${count(tokens, "token")}`,
      );
      say(found.textContent);
    });
  }

  onChange(name, () => {
    task.cancel();
    found.replaceChildren();
  });
  return h("section", {}, h("h2", {}, title), field("Text", own), h("div", { class: "row" }, start), place, found);
}
