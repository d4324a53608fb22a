// Look: what the model holds for one token, and how its prediction settles at one place of a text.

import { result } from "./api.js";
import { Task, h } from "./dom.js";
import { TokenSearch } from "./fields.js";
import { keyTable, layerList, tokenList } from "./layer.js";
import { settling } from "./settling.js";
import { hasEdits, isChanged, onChange, state } from "./state.js";
import { Strip, tokenText } from "./tokens.js";
import { number, percent } from "./texts.js";

const NO_TEXT = "Generate a text first, then choose one of its tokens here. Or search for any token.";

/**
 * Fills the view.
 *
 * @param edit gets the functions `token(token)` and `key(layer, key)`, which open Edit.
 * @returns {position(index), focus()}: shows a token of `state.text`; gives that token the focus.
 */
export function lookView(view, edit) {
  const hasMemory = state.model.ffns.includes("memory");
  const strip = new Strip("Tokens of the text", showPosition);
  const noText = h("p", { class: "quiet" }, NO_TEXT);
  const search = new TokenSearch(`Any of the ${state.model.vocab_size.toLocaleString("en-US")} tokens`, (token) =>
    showToken(token),
  );
  const subject = h("div", { class: "subject" });
  const settled = section("How the prediction settles");
  const rows = section("Its rows in FFN-M");
  const near = section("Nearest tokens by row");
  const tasks = [settled.task, rows.task, near.task];
  let shown = { token: null, index: null, layers: [], positions: [] };
  let layer = 0;

  view.append(
    h("div", { class: "look-top" }, h("div", { class: "text" }, noText, strip.element), search.element),
    subject,
    settled.element,
    rows.element,
    near.element,
  );

  const showText = () => {
    strip.clear();
    state.text.tokens.forEach((token) => strip.add(token));
    noText.hidden = state.text.tokens.length > 0;
  };
  onChange("text", () => {
    showText();
    if (shown.index !== null && state.text.tokens[shown.index]?.id !== shown.token.id) shown.index = null;
    strip.mark(shown.index ?? -1);
    showFirst();
  });
  showText();
  view.addEventListener("shown", showFirst);

  /** Opens the view with something to see: the last token of the prompt, which predicts the first new token. */
  function showFirst() {
    if (view.hidden || shown.token || state.text.tokens.length === 0) return;
    const given = state.text.tokens.filter((token) => token.given).length;
    showPosition(Math.max(0, given - 1));
  }

  function section(title) {
    const place = h("div", {});
    const content = h("div", {});
    const element = h("section", { hidden: true }, h("h2", {}, title), place, content);
    return { element, content, task: new Task(place) };
  }

  function showPosition(index) {
    search.set(null);
    begin(state.text.tokens[index], index);
  }

  function showToken(token) {
    begin(token, null);
  }

  async function begin(token, index) {
    tasks.forEach((task) => task.cancel());
    shown = { token, index, layers: [], positions: [] };
    strip.mark(index ?? -1);
    showSubject();
    for (const part of [settled, rows, near]) part.element.hidden = true;
    // One after the other: the server computes one at a time, and this is the order in which they are read.
    const mine = shown;
    if (index !== null) await showSettling(index);
    if (!hasMemory || shown !== mine) return;
    await showRows(token);
    if (shown === mine) await showNearest();
  }

  function showSubject() {
    const { token, index } = shown;
    const facts = [`#${token.id}`];
    if (index !== null) facts.push(`place ${index + 1} of ${state.text.tokens.length}`);
    if (index > 0 && Number.isFinite(token.logProb)) facts.push(`probability ${percent(Math.exp(token.logProb))}`);
    subject.replaceChildren(
      h("h2", { class: "glyph" }, tokenText(token.text)),
      h("p", { class: "quiet" }, facts.join(" · ")),
      state.model.can_edit
        ? h(
            "button",
            { type: "button", click: () => edit.token({ id: token.id, text: token.text }) },
            "Edit this token",
          )
        : "",
    );
    if (index === null && !hasMemory)
      subject.append(h("p", {}, "This model keeps no rows for tokens: choose one in a text."));
  }

  /** Which model the prediction is of, where the text was written by a changed one. */
  function whichModel() {
    const { contribution } = state.text.changes;
    if (contribution) return "By the model as it was trained, not by the ablated one that wrote this text.";
    return hasEdits(state.text.changes) ? "By the model with the edits that wrote this text." : null;
  }

  async function showSettling(index) {
    settled.content.replaceChildren();
    settled.element.hidden = false;
    // What follows the place has no effect on it.
    const ids = state.text.tokens.slice(0, index + 1).map(({ id }) => id);
    const { overlay, edits } = state.text.changes;
    const following = state.text.tokens[index + 1];
    const model = whichModel();
    return settled.task.run("Following the prediction through the layers", async (signal, setDone) => {
      const found = await result("/api/look/position", { ids, position: index, top: 3, overlay, edits }, signal, setDone);
      shown.positions = found.layers;
      settled.content.replaceChildren(...settling(found, following));
      if (model) settled.content.prepend(h("p", { class: "note quiet" }, model));
      if (!hasMemory) showKeysHere();
    });
  }

  /** For a model without FFN-M: the keys of its only FFN at this place. */
  function showKeysHere() {
    rows.element.hidden = false;
    rows.element.querySelector("h2").textContent = "Strongest keys at this place";
    rows.content.replaceChildren(
      ...shown.positions.map((at) =>
        h("div", {}, h("h3", {}, `Layer ${at.layer}`), keyTable(at.keys, "compute", at.layer, {})),
      ),
    );
  }

  async function showRows(token) {
    rows.content.replaceChildren();
    rows.element.hidden = false;
    return rows.task.run("Reading the token's rows", async (signal, setDone) => {
      const found = await result("/api/look/token", { token: token.id, top: 5 }, signal, setDone);
      shown.layers = found.layers;
      layer = Math.min(layer, found.layers.length - 1);
      const detail = h("div", { class: "detail" });
      const { list, show } = layerList(found.layers, layer, (chosen) => {
        layer = chosen;
        show(layer);
        detail.replaceChildren(...layerDetail());
      });
      detail.replaceChildren(...layerDetail());
      const head = h(
        "p",
        { class: "note quiet" },
        "Layer, size of the row, and the tokens that the row points to. Choose a layer.",
        (isChanged() || hasEdits(state.text.changes)) && " Rows and neighbours are those of the model without edits.",
      );
      rows.content.replaceChildren(h("div", { class: "rows" }, h("div", {}, head, list), detail));
    });
  }

  function layerDetail() {
    const go = { token: showToken, suppress: state.model.can_edit ? edit.key : null };
    const found = shown.layers[layer];
    const here = shown.positions.find((at) => at.layer === layer);
    return [
      h("h3", {}, `Layer ${layer}: strongest keys of FFN-M`),
      keyTable(found.keys, "memory", layer, go),
      here?.keys?.length > 0 && h("h3", {}, `Layer ${layer}: strongest keys of FFN-C at this place`),
      here?.keys?.length > 0 && keyTable(here.keys, "compute", layer, go),
    ].filter(Boolean);
  }

  async function showNearest() {
    near.element.hidden = false;
    near.content.replaceChildren();
    const { token } = shown;
    const scope = h("select", { "aria-label": "Layers to compare" }, h("option", { value: "" }, "all layers together"));
    shown.layers.forEach((at) => scope.append(h("option", { value: String(at.layer) }, `layer ${at.layer}`)));
    const list = h("div", {});
    // Where rows are not kept, a search may take minutes of all processors: it is made only when it is asked for.
    const isQuick = state.model.keeps_rows;
    const start = isQuick ? "" : h("button", { type: "button", click: find }, "Compare with all tokens");
    if (isQuick) scope.addEventListener("change", find);
    else scope.value = String(layer);
    near.content.append(h("div", { class: "row" }, scope, start), list);

    function find() {
      list.replaceChildren();
      const wanted = scope.value === "" ? null : Number(scope.value);
      return near.task.run("Comparing with the rows of all tokens", async (signal, setDone) => {
        const { tokens } = await result(
          "/api/look/nearest",
          { token: token.id, layer: wanted, top: 12 },
          signal,
          setDone,
        );
        list.replaceChildren(tokenList(tokens, (other) => number(other.cosine), showToken));
      });
    }

    if (isQuick) await find();
  }

  return {
    position: showPosition,
    focus: () => strip.focus(shown.index),
  };
}
