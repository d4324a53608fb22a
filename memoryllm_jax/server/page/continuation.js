// A continuation of the shared prompt that arrives as chips.

import { complete } from "./api.js";
import { Task, h, say } from "./dom.js";
import { promptField, samplingFields } from "./fields.js";
import { completionBody, promptTokens, state } from "./state.js";
import { whole } from "./texts.js";
import { Strip } from "./tokens.js";

/** A place of the page for one continuation; starting the next one cancels the one that runs. */
export class Continuation {
  /**
   * @param label what the text is, for screen readers.
   * @param look is called with the text, as `state.text`, and the index of the token that was chosen.
   */
  constructor(label, look) {
    this.strip = new Strip(label, (index) => look(this.text, index));
    this.changes = {};
    this.place = h("div", {});
    this.task = new Task(this.place);
    this.element = h("div", { class: "continuation" }, this.place, this.strip.element);
  }

  get tokens() {
    return this.strip.tokens;
  }

  /** The text as `state.text`. */
  get text() {
    return { tokens: this.strip.tokens, changes: this.changes };
  }

  /** Shows tokens that are there already. */
  show(tokens) {
    this.task.cancel();
    this.strip.clear();
    this.changes = {};
    tokens.forEach((token) => this.strip.add(token));
  }

  cancel() {
    this.task.cancel();
  }

  /**
   * Continues the prompt.
   *
   * @param changes fields of the request that change the model, such as edits.
   * @param arrived is called after each batch of tokens with the number of new ones.
   * @returns whether the text is complete.
   */
  async run(changes, arrived = () => {}) {
    this.element.classList.add("stale");
    const done = await this.task.run("Waiting for the first token", async (signal, setDone, quiet) => {
      const prompt = await promptTokens(signal);
      let count = 0;
      for await (const batch of complete(
        completionBody(
          prompt.map(({ id }) => id),
          changes,
        ),
        signal,
      )) {
        if (count === 0) {
          quiet();
          this.strip.clear();
          this.changes = changes;
          this.element.classList.remove("stale");
        }
        for (const token of batch) {
          this.strip.add({ ...token, given: count < prompt.length });
          count += 1;
        }
        arrived(count - prompt.length);
      }
    });
    this.element.classList.remove("stale");
    return done;
  }
}

/** Marks what two texts have in common, up to the first difference. Returns a sentence about it. */
function markCommon(one, other) {
  let same = 0;
  while (same < one.tokens.length && same < other.tokens.length && one.tokens[same].id === other.tokens[same].id)
    same += 1;
  for (const { strip } of [one, other]) {
    strip.chips.forEach((chip, i) => {
      chip.classList.toggle("same", i < same && !strip.tokens[i].given);
      chip.classList.toggle("parting", i === same);
    });
  }
  if (same === one.tokens.length && same === other.tokens.length) return "Both texts are the same.";
  const given = one.tokens.filter((token) => token.given).length;
  if (same <= given) return "They differ from the first new token on.";
  const common = same === given + 1 ? "The first new token is" : `The first ${whole(same - given)} new tokens are`;
  return `${common} the same; then the texts part.`;
}

/** The text of the model as it is, and beside it that of the model with changes, drawn in the same way. */
export class SideBySide {
  constructor(titles, look) {
    const [one, other] = titles.map((title) => new Continuation(title, look));
    this.one = one;
    this.other = other;
    this.verdict = h("p", { class: "note quiet" });
    const part = (title, text) => h("div", {}, h("h3", {}, title), text.element);
    this.element = h(
      "div",
      {},
      h("div", { class: "beside" }, part(titles[0], one), part(titles[1], other)),
      this.verdict,
    );
    this.original = { wanted: "", done: null };
    this.runs = 0;
  }

  /** A part of a view: prompt, sampling and both texts. `run` is called by the button and by Ctrl+Enter in the prompt. */
  section(title, button, run) {
    return h(
      "section",
      {},
      h("h2", {}, title),
      promptField(run),
      h("div", { class: "row" }, h("button", { type: "button", class: "primary", click: run }, button), samplingFields()),
      this.element,
    );
  }

  /** Generates what is not there yet; `changes` are the fields of the request that change the model. */
  async run(changes) {
    const run = (this.runs += 1);
    this.verdict.textContent = "";
    const done = await Promise.all([this.#unchanged(), this.other.run(changes)]);
    if (run !== this.runs || !done.every(Boolean)) return;
    this.verdict.textContent = markCommon(this.one, this.other);
    say(this.verdict.textContent);
  }

  /** The text of the unchanged model, which is generated once for a prompt and a way of drawing. */
  async #unchanged() {
    const wanted = JSON.stringify([state.prompt, state.sampling]);
    if (this.original.wanted !== wanted) this.original = { wanted, done: this.one.run({}) };
    const { done } = this.original;
    if (await done) return true;
    if (this.original.done === done) this.original = { wanted: "", done: null };
    return false;
  }
}
