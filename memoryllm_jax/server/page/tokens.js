// Tokens as chips: one button each, with a popover of its probability and alternatives.

import { h } from "./dom.js";
import { alone, endsLine, percent, running } from "./texts.js";

const tip = () => document.getElementById("tip");
let tipOf = null;

/** A token's text by itself, isolated from the direction of the text around it. */
export function tokenText(text) {
  return h("bdi", { class: "token" }, alone(text));
}

/** Texts of tokens, in one line. */
export function tokenTexts(tokens) {
  return h(
    "span",
    { class: "says" },
    tokens.map((token) =>
      h("bdi", { class: "token", title: token.p === undefined ? null : percent(token.p) }, alone(token.text)),
    ),
  );
}

/** A bar that shows a share. */
export function bar(share) {
  const line = h("span", { class: "bar", "aria-hidden": "true" }, h("span", {}));
  line.firstChild.style.width = `${Math.max(1, 100 * Math.min(1, share))}%`;
  return line;
}

function alternatives(token) {
  const rows = token.alternatives.map((other) =>
    h(
      "tr",
      { class: other.text === token.text ? "chosen" : null },
      h("td", {}, tokenText(other.text)),
      h("td", {}, bar(Math.exp(other.logProb))),
      h("td", { class: "n" }, percent(Math.exp(other.logProb))),
    ),
  );
  return h("table", {}, h("tbody", {}, rows));
}

function tipContent(token) {
  const known = Number.isFinite(token.logProb);
  const unknown = token.logProb === null ? "first token: nothing predicts it" : "generate to see its probability";
  return [
    h("p", { class: "tip-head" }, tokenText(token.text), h("span", { class: "quiet" }, `#${token.id}`)),
    known
      ? h("p", {}, `probability ${percent(Math.exp(token.logProb))}`)
      : h("p", { class: "quiet" }, unknown),
    known && token.alternatives?.length > 0 && alternatives(token),
    h("p", { class: "quiet" }, "click or Enter: look inside"),
  ];
}

function hideTip() {
  tipOf?.removeAttribute("aria-describedby");
  tipOf = null;
  tip().hidden = true;
}

function showTip(chip, token) {
  hideTip();
  tipOf = chip;
  const box = tip();
  box.replaceChildren(...tipContent(token).filter(Boolean));
  box.hidden = false;
  chip.setAttribute("aria-describedby", "tip");
  placeTip();
}

/** Below its chip, or above where there is no room below, and within the window. */
function placeTip() {
  const box = tip();
  const at = tipOf.getBoundingClientRect();
  const room = document.documentElement.clientWidth - box.offsetWidth - 8;
  box.style.left = `${Math.max(8, Math.min(at.left, room))}px`;
  const below = at.bottom + 6;
  const fits = below + box.offsetHeight < window.innerHeight || at.top < box.offsetHeight + 6;
  box.style.top = `${fits ? below : at.top - box.offsetHeight - 6}px`;
}

document.addEventListener("keydown", (event) => {
  if (event.key === "Escape") hideTip();
});
document.addEventListener(
  "scroll",
  () => {
    // The arrow keys can scroll a text to the chip that they focus; what scrolls below the pointer is another chip.
    if (tipOf && tipOf === document.activeElement) placeTip();
    else hideTip();
  },
  { passive: true, capture: true },
);
window.addEventListener("hashchange", hideTip);

/**
 * A text as chips, in which the arrow keys go from token to token.
 *
 * Chips are tinted by how unlikely the model found their token. `choose(index)` is called by a click or Enter.
 */
export class Strip {
  constructor(label, choose) {
    this.element = h("div", {
      class: "strip",
      role: "group",
      "aria-label": label,
      dir: "auto",
      keydown: (e) => this.#move(e),
    });
    this.choose = choose;
    this.tokens = [];
    this.chips = [];
  }

  clear() {
    this.tokens = [];
    this.chips = [];
    this.element.replaceChildren();
  }

  /** Adds a token; `marks` are more classes of its chip. */
  add(token, marks = "") {
    const index = this.tokens.length;
    const chip = h(
      "button",
      {
        type: "button",
        class: `chip ${token.given ? "given" : ""} ${marks}`,
        tabindex: index === 0 ? "0" : "-1",
        click: () => this.choose(index),
        mouseenter: () => showTip(chip, token),
        mouseleave: hideTip,
        focus: () => this.#focused(chip, token),
        blur: hideTip,
      },
      h("bdi", { dir: "auto" }, running(token.text)),
    );
    if (Number.isFinite(token.logProb)) {
      // From nothing at a probability of 1 to the full tint at 1/1000.
      chip.style.setProperty("--surprise", Math.min(1, -token.logProb / Math.log(1000)).toFixed(3));
    }
    this.tokens.push(token);
    this.chips.push(chip);
    this.element.append(chip);
    if (endsLine(token.text)) this.element.append(h("br"));
  }

  /** Marks one chip as the current one. */
  mark(index) {
    this.chips.forEach((chip, i) => {
      if (i === index) chip.setAttribute("aria-current", "true");
      else chip.removeAttribute("aria-current");
    });
    if (this.chips[index]) this.#enter(this.chips[index]);
  }

  focus(index) {
    this.chips[index]?.focus();
  }

  #enter(chip) {
    for (const other of this.chips) if (other.tabIndex === 0) other.tabIndex = -1;
    chip.tabIndex = 0;
  }

  #focused(chip, token) {
    this.#enter(chip);
    // Not after a click, whose pointer is on the chip already
    if (chip.matches(":focus-visible")) showTip(chip, token);
  }

  #move(event) {
    const here = this.chips.indexOf(document.activeElement);
    const to = { ArrowRight: here + 1, ArrowLeft: here - 1, Home: 0, End: this.chips.length - 1 }[event.key];
    if (here < 0 || to === undefined || event.ctrlKey || event.altKey || event.metaKey) return;
    event.preventDefault();
    this.chips[to]?.focus();
  }
}
