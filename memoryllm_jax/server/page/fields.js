// Fields that several views have: the prompt, how tokens are drawn, a search for tokens, and chips of layers.

import { get } from "./api.js";
import { Pause, errorBox, field, freshId, h } from "./dom.js";
import { changed, onChange, set, state } from "./state.js";
import { tokenText } from "./tokens.js";
import { alone, count } from "./texts.js";

/** The prompt, which all views share. Ctrl+Enter calls `submit`. */
export function promptField(submit) {
  const input = h("textarea", {
    rows: "2",
    spellcheck: "false",
    dir: "auto",
    autocomplete: "off",
    input: () => set("prompt", input.value),
    keydown: (event) => {
      if (event.key !== "Enter" || !(event.ctrlKey || event.metaKey)) return;
      event.preventDefault();
      submit();
    },
  });
  const show = () => {
    if (input.value !== state.prompt) input.value = state.prompt;
  };
  onChange("prompt", show);
  show();
  return field("Prompt", input);
}

const SAMPLING = [
  { name: "max_tokens", label: "Tokens", min: 1, step: 1 }, // at most the context
  { name: "temperature", label: "Temperature", min: 0, max: 2, step: 0.1 },
  { name: "top_p", label: "Top p", min: 0.01, max: 1, step: 0.01 },
  { name: "top_k", label: "Top k (0: all)", min: 0, max: 1000, step: 1 },
  { name: "seed", label: "Seed", min: 0, max: 4294967295, step: 1 },
];

/** How tokens are drawn: the same for all views, so that a change of the model is the only difference. */
export function samplingFields() {
  const inputs = SAMPLING.map(({ name, label, min, max = state.model.context, step }) => {
    const input = h("input", {
      type: "number",
      min: String(min),
      max: String(max),
      step: String(step),
      change: () => {
        const value = Math.min(max, Math.max(min, Number(input.value)));
        if (input.value !== "") state.sampling[name] = step === 1 ? Math.round(value) : value;
        input.value = state.sampling[name];
        changed("sampling");
      },
    });
    const show = () => {
      if (document.activeElement !== input) input.value = state.sampling[name];
    };
    onChange("sampling", show);
    show();
    return field(label, input);
  });
  return h("details", { class: "sampling" }, h("summary", {}, summary()), h("div", { class: "fields" }, inputs));
}

function summary() {
  const text = h("span", {});
  const show = () => {
    const { max_tokens, temperature, seed } = state.sampling;
    const drawn = temperature === 0 ? "likeliest token each time" : `temperature ${temperature}, seed ${seed}`;
    text.textContent = `${count(max_tokens, "token")}, ${drawn}`;
  };
  onChange("sampling", show);
  show();
  return text;
}

/**
 * A field that finds a token by its text or #id, with a list that the arrow keys walk through.
 *
 * `choose(token)` is called with the token, which stays in the field; `value` is it, or null.
 */
export class TokenSearch {
  constructor(label, choose = () => {}, hint = "text, or #id") {
    this.choose = choose;
    this.value = null;
    this.found = [];
    this.at = -1;
    const list = freshId("tokens");
    this.input = h("input", {
      type: "text",
      role: "combobox",
      autocomplete: "off",
      spellcheck: "false",
      "aria-expanded": "false",
      "aria-controls": list,
      "aria-autocomplete": "list",
      placeholder: hint,
      input: () => {
        this.value = null;
        this.search.start();
      },
      focus: () => this.input.value && !this.value && this.search.start(),
      blur: () => this.close(),
      keydown: (event) => this.#key(event),
    });
    this.list = h("ul", { id: list, role: "listbox", "aria-label": label, hidden: true });
    this.note = h("p", { class: "note quiet" });
    this.element = h("div", { class: "search" }, field(label, this.input), this.list, this.note);
    this.search = new Pause(120, () => this.#find());
  }

  /** Shows a token as the one that is chosen. */
  set(token) {
    this.value = token;
    this.input.value = token ? alone(token.text) : "";
    this.close();
  }

  close() {
    this.controller?.abort();
    this.list.hidden = true;
    this.input.setAttribute("aria-expanded", "false");
    this.input.removeAttribute("aria-activedescendant");
    this.note.replaceChildren();
    this.at = -1;
  }

  async #find() {
    // As a chosen token is shown
    const text = this.input.value.replaceAll("↵", "\n").replaceAll("⇥", "\t");
    this.close();
    if (!text || document.activeElement !== this.input) return;
    const controller = (this.controller = new AbortController());
    try {
      const { tokens, total } = await get(
        `/api/tokens?${new URLSearchParams({ search: text, limit: "50" })}`,
        controller.signal,
      );
      if (controller.signal.aborted) return;
      this.#show(tokens, total);
    } catch (error) {
      if (error.name !== "AbortError") this.note.replaceChildren(errorBox(error));
    }
  }

  #show(tokens, total) {
    this.found = tokens;
    this.list.replaceChildren(
      ...tokens.map((token, i) =>
        h(
          "li",
          {
            id: `${this.list.id}-${i}`,
            role: "option",
            "aria-selected": "false",
            // Not at a click, which comes after the field has lost the focus and has closed the list
            mousedown: (event) => {
              event.preventDefault();
              this.#take(i);
            },
          },
          tokenText(token.text),
          h("span", { class: "quiet" }, `#${token.id}`),
        ),
      ),
    );
    this.list.hidden = tokens.length === 0;
    this.input.setAttribute("aria-expanded", String(tokens.length > 0));
    this.note.textContent =
      tokens.length === 0
        ? "no token has this text"
        : total > tokens.length
          ? `${count(total, "token")}; the first ${tokens.length}`
          : "";
    if (tokens.length > 0) this.#go(0);
  }

  #go(index) {
    this.list.children[this.at]?.setAttribute("aria-selected", "false");
    this.at = (index + this.found.length) % this.found.length;
    const option = this.list.children[this.at];
    option.setAttribute("aria-selected", "true");
    option.scrollIntoView({ block: "nearest" });
    this.input.setAttribute("aria-activedescendant", option.id);
  }

  #take(index) {
    const token = this.found[index];
    this.set(token);
    this.choose(token);
  }

  #key(event) {
    if (event.key === "Escape") this.close();
    if (this.list.hidden) return;
    if (event.key === "ArrowDown") this.#go(this.at + 1);
    else if (event.key === "ArrowUp") this.#go(this.at - 1);
    else if (event.key === "Enter") this.#take(this.at);
    else return;
    event.preventDefault();
  }
}

/** Chips to choose layers with; `layers` is the set of those that are on. */
export class LayerChips {
  constructor(label, count, change = () => {}) {
    this.layers = new Set();
    this.chips = Array.from({ length: count }, (_, layer) =>
      h(
        "button",
        {
          type: "button",
          class: "layer",
          "aria-pressed": "false",
          "aria-label": `layer ${layer}`,
          click: () => {
            this.set(this.layers.has(layer) ? [...this.layers].filter((l) => l !== layer) : [...this.layers, layer]);
            change();
          },
        },
        String(layer),
      ),
    );
    this.element = h("div", { class: "layers", role: "group", "aria-label": label }, this.chips);
  }

  set(layers) {
    this.layers = new Set(layers);
    this.chips.forEach((chip, layer) => chip.setAttribute("aria-pressed", String(this.layers.has(layer))));
  }

  /** The layers that are on, in their order. */
  get sorted() {
    return [...this.layers].sort((a, b) => a - b);
  }
}
