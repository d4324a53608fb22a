// How the prediction at one place settles over the layers: a chart of probabilities, and a table of likeliest tokens.

import { h, svg } from "./dom.js";
import { ffnName } from "./state.js";
import { tokenText } from "./tokens.js";
import { alone, percent } from "./texts.js";

// In the order in which a layer adds them
const PARTS = ["residual", "attention", "memory", "compute", "output"];
const NAMES = { residual: "Residual", attention: "Attention", output: "Layer's output" };
const nameOf = (part) => NAMES[part] ?? ffnName(part);

const HEIGHT = 200;
const EDGE = { left: 56, right: 12, top: 10, bottom: 28 };

function partsOf(found) {
  return PARTS.filter((part) => found.layers.some((layer) => layer.parts[part]));
}

/** The least of 1, 2, 5, 10 … per cent that is not below p. */
function ceiling(p) {
  for (const top of [0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5]) if (p <= top) return top;
  return 1;
}

function chart(found, width) {
  const parts = partsOf(found);
  const most = ceiling(Math.max(...found.layers.flatMap((layer) => parts.map((part) => layer.parts[part]?.p ?? 0))));
  const last = Math.max(1, found.layers.length - 1);
  const x = (layer) => EDGE.left + (layer / last) * (width - EDGE.left - EDGE.right);
  const y = (p) => HEIGHT - EDGE.bottom - (p / most) * (HEIGHT - EDGE.top - EDGE.bottom);
  const drawing = svg("svg", { viewBox: `0 0 ${width} ${HEIGHT}`, class: "chart", role: "img" });
  drawing.append(
    svg("title", {}, `Probability of the final token by layer, for ${parts.map((part) => nameOf(part)).join(", ")}`),
  );
  for (const share of [0, 0.5, 1]) {
    const at = y(share * most);
    drawing.append(
      svg("line", { class: "grid", x1: EDGE.left, x2: width - EDGE.right, y1: at, y2: at }),
      svg(
        "text",
        { class: "axis", x: EDGE.left - 8, y: at + 4, "text-anchor": "end" },
        share === 0 ? "0" : percent(share * most),
      ),
    );
  }
  const every = Math.ceil(found.layers.length / (width / 40));
  for (const { layer } of found.layers) {
    if (layer % every === 0) {
      drawing.append(
        svg("text", { class: "axis", x: x(layer), y: HEIGHT - 8, "text-anchor": "middle" }, String(layer)),
      );
    }
  }
  for (const part of parts) {
    const points = found.layers
      .filter((layer) => layer.parts[part])
      .map(({ layer, parts }) => [x(layer), y(parts[part].p)]);
    drawing.append(
      svg("polyline", { class: `line ${part}`, points: points.map((point) => point.join(",")).join(" ") }),
    );
    points.forEach(([cx, cy]) => drawing.append(svg("circle", { class: `dot ${part}`, cx, cy, r: 2.5 })));
  }
  return drawing;
}

function legend(parts) {
  const sample = (part) => {
    const line = svg("line", { class: `line ${part}`, x1: 1, x2: 27, y1: 6, y2: 6 });
    return svg("svg", { viewBox: "0 0 28 12", class: "sample", "aria-hidden": "true" }, line);
  };
  return h(
    "p",
    { class: "legend" },
    parts.map((part) => h("span", {}, sample(part), nameOf(part))),
  );
}

function cell(part, final) {
  if (!part) return h("td", {}, "–");
  const [first, ...others] = part.says;
  return h(
    "td",
    { class: first?.id === final.id ? "final" : null },
    first && tokenText(first.text),
    h("span", { class: "n quiet" }, percent(part.p)),
    h(
      "small",
      { class: "quiet" },
      others.map((other) => h("bdi", {}, alone(other.text))),
    ),
  );
}

function table(found) {
  const parts = partsOf(found);
  const rows = found.layers.map((layer) =>
    h(
      "tr",
      {},
      h("th", { scope: "row" }, String(layer.layer)),
      parts.map((part) => cell(layer.parts[part], found.final)),
    ),
  );
  const head = h(
    "tr",
    {},
    h("th", { scope: "col" }, "Layer"),
    parts.map((part) => h("th", { scope: "col" }, nameOf(part))),
  );
  return h(
    "div",
    { class: "scroll", tabindex: "0", role: "region", "aria-label": "Likeliest tokens by layer" },
    h("table", { class: "settling" }, h("thead", {}, head), h("tbody", {}, rows)),
  );
}

/**
 * The section for one answer of /api/look/position.
 *
 * @param following the token that the text goes on with, if it goes on.
 */
export function settling(found, following) {
  const place = h("div", {});
  let drawn = 0;
  const draw = () => {
    const width = Math.round(Math.min(760, Math.max(300, place.clientWidth || 600)));
    if (width === drawn) return;
    drawn = width;
    place.replaceChildren(chart(found, width));
  };
  draw();
  new ResizeObserver(draw).observe(place);
  return [
    h(
      "p",
      {},
      "After this token the model predicts ",
      tokenText(found.final.text),
      following && following.id === found.final.id && ", and so the text goes on",
      following && following.id !== found.final.id && [", while the text goes on with ", tokenText(following.text)],
      ". How likely each part of each layer makes the predicted token:",
    ),
    legend(partsOf(found)),
    place,
    table(found),
    h(
      "p",
      { class: "note quiet" },
      "Each cell: the part's likeliest token, the probability it gives to the final one, and the next likeliest.",
    ),
  ];
}
