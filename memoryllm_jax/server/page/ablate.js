// Ablate: scale what the FFNs add, drop layers, and read the text that the model writes then beside the original.

import { SideBySide } from "./continuation.js";
import { Pause, h } from "./dom.js";
import { LayerChips } from "./fields.js";
import { lossSection } from "./loss.js";
import { changed, ffnName, onChange, state } from "./state.js";

/** One FFN's slider and chips of layers. */
function dial(ffn, change) {
  const name = ffnName(ffn);
  const value = h("output", { class: "n" });
  const slider = h("input", {
    type: "range",
    min: "0",
    max: "2",
    step: "0.05",
    value: "1",
    input: show,
    id: `alpha-${ffn}`,
  });
  const dropped = new LayerChips(`Layers in which ${name} is dropped`, state.model.layers, change);

  function show() {
    value.textContent = Number(slider.value).toFixed(2);
    change();
  }

  const element = h(
    "div",
    { class: "dial" },
    h("div", { class: "field" }, h("label", { for: slider.id }, `α of ${name} `, value), slider),
    h("div", { class: "field" }, h("span", { class: "label" }, `Drop ${name} in layers`), dropped.element),
  );
  value.textContent = "1.00";
  return {
    element,
    get alpha() {
      return Number(slider.value);
    },
    get layers() {
      return dropped.sorted;
    },
    reset() {
      slider.value = "1";
      value.textContent = "1.00";
      dropped.set([]);
    },
  };
}

/** Fills the view. `look(text, index)` opens a token of a text in Look. */
export function ablateView(view, look) {
  const { ffns } = state.model;
  const texts = new SideBySide(["Original", "Ablated"], look);
  const regenerate = new Pause(300, run);
  const again = () => {
    changed("factors");
    regenerate.start();
  };
  const dials = Object.fromEntries(ffns.map((ffn) => [ffn, dial(ffn, again)]));
  const reset = h("button", {
    type: "button",
    click: () => {
      Object.values(dials).forEach((one) => one.reset());
      changed("factors");
      run();
    },
  });
  reset.textContent = "Reset";
  let hasRun = false;

  view.append(
    h(
      "section",
      {},
      h("h2", {}, "What the FFNs add"),
      h(
        "div",
        { class: "two" },
        ffns.map((ffn) => dials[ffn].element),
      ),
      h("div", { class: "row" }, reset),
    ),
    texts.section("The text, beside the original", "Generate both", run),
    lossSection("The loss, beside the original", "factors", changes),
  );

  /** The factors as a request has them. A model with one FFN takes alpha and drop_layers for it, whichever it is. */
  function contribution() {
    const main = dials.memory ?? dials.compute;
    const compute = ffns.length > 1 ? { alpha_compute: dials.compute.alpha, drop_compute: dials.compute.layers } : {};
    return { alpha: main.alpha, drop_layers: main.layers, ...compute };
  }

  /** The fields of a request that scale or drop; none if nothing is. */
  function changes() {
    const isWhole = Object.values(dials).every(({ alpha, layers }) => alpha === 1 && layers.length === 0);
    return isWhole ? {} : { contribution: contribution() };
  }

  function run() {
    regenerate.cancel();
    hasRun = true;
    return texts.run(changes());
  }

  view.addEventListener("shown", () => {
    if (!hasRun) run();
  });
  onChange("sampling", () => !view.hidden && regenerate.start());
}
