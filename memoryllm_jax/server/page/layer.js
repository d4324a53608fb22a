// One layer of Look: the strongest keys, what their values say, and which tokens use a key.

import { result } from "./api.js";
import { Task, h } from "./dom.js";
import { bar, tokenText, tokenTexts } from "./tokens.js";
import { number, percent, signed, whole } from "./texts.js";

/** Tokens with a number each, as buttons that open them in Look. */
export function tokenList(tokens, of, open) {
  return h(
    "ol",
    { class: "tokens" },
    tokens.map((token) =>
      h(
        "li",
        {},
        h("button", { type: "button", class: "plain", click: () => open(token) }, tokenText(token.text)),
        h("span", { class: "n quiet" }, of(token)),
      ),
    ),
  );
}

/**
 * Keys with their coefficient, share of the layer's output, and what their values say.
 *
 * @param ffn "memory" or "compute"; only keys of the first have tokens that use them, and can be suppressed.
 * @param go {token(token), suppress(layer, key)} where the person can go on to.
 */
export function keyTable(keys, ffn, layer, go) {
  const isMemory = ffn === "memory";
  const names = ["Key", "Coefficient", "Share", "Its value says", ...(isMemory ? [""] : [])];
  const head = h(
    "tr",
    {},
    names.map((name) => h("th", { scope: "col" }, name)),
  );
  const body = h("tbody", {});
  for (const key of keys) {
    body.append(
      h(
        "tr",
        {},
        h("th", { scope: "row" }, whole(key.key)),
        h("td", { class: "n" }, signed(key.c)),
        h("td", { class: "share" }, bar(key.share), h("span", { class: "n" }, percent(key.share))),
        h("td", { class: "value" }, tokenTexts(key.says)),
        isMemory && h("td", { class: "actions" }, users(key, layer, go), suppress(key, layer, go)),
      ),
    );
  }
  return h("div", { class: "scroll" }, h("table", { class: "keys" }, h("thead", {}, head), body));
}

function suppress(key, layer, go) {
  if (!go.suppress) return null;
  return h(
    "button",
    {
      type: "button",
      class: "plain",
      "aria-label": `suppress key ${key.key} of layer ${layer}`,
      click: () => go.suppress(layer, key.key),
    },
    "suppress",
  );
}

/** A button that shows, below its row, the tokens of the whole vocabulary that use a key most. */
function users(key, layer, go) {
  let row = null;
  const button = h("button", {
    type: "button",
    class: "plain",
    "aria-expanded": "false",
    "aria-label": `tokens that use key ${key.key} of layer ${layer} most`,
    click: toggle,
  });
  button.textContent = "who uses it";

  async function toggle() {
    button.setAttribute("aria-expanded", String(!row));
    if (row) {
      row.task.cancel();
      row.element.remove();
      row = null;
      return;
    }
    const place = h("div", {});
    const list = h("div", {});
    const element = h("tr", { class: "users" }, h("td", { colspan: "5" }, place, list));
    row = { element, task: new Task(place) };
    button.closest("tr").after(element);
    await row.task.run("Reading this key for the whole vocabulary", async (signal, setDone) => {
      const { tokens } = await result(
        "/api/look/key",
        { ffn: "memory", layer, key: key.key, top: 12 },
        signal,
        setDone,
      );
      list.append(tokenList(tokens, (token) => `${signed(token.c)}`, go.token));
    });
  }

  return button;
}

/** The layers as a list to choose from: the size of the token's row in each, and what its sum says. */
export function layerList(layers, chosen, choose) {
  const largest = Math.max(...layers.map((layer) => layer.norm));
  const options = layers.map((layer) =>
    h(
      "button",
      {
        type: "button",
        role: "radio",
        class: "layer-row",
        "aria-checked": String(layer.layer === chosen),
        tabindex: layer.layer === chosen ? "0" : "-1",
        click: () => choose(layer.layer),
      },
      h("span", { class: "n" }, String(layer.layer)),
      h("span", { class: "size" }, bar(layer.norm / largest)),
      h("span", { class: "n" }, number(layer.norm)),
      tokenTexts(layer.says),
    ),
  );
  const step = (event) => {
    const here = options.findIndex((option) => option.getAttribute("aria-checked") === "true");
    const to = { ArrowDown: here + 1, ArrowUp: here - 1, Home: 0, End: options.length - 1 }[event.key];
    if (to === undefined) return;
    event.preventDefault();
    const next = layers[(to + layers.length) % layers.length].layer;
    choose(next);
    options[(to + layers.length) % layers.length].focus();
  };
  const list = h("div", { role: "radiogroup", "aria-label": "Layer", class: "layer-list", keydown: step }, options);
  const show = (layer) =>
    options.forEach((option, i) => {
      option.setAttribute("aria-checked", String(layers[i].layer === layer));
      option.tabIndex = layers[i].layer === layer ? 0 : -1;
    });
  return { list, show };
}
