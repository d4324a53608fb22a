// Makes elements, shows progress and errors. Text enters the document as text nodes only, never as markup.

const SVG = "http://www.w3.org/2000/svg";

function fill(element, attributes, children) {
  for (const [name, value] of Object.entries(attributes ?? {})) {
    if (value === undefined || value === null || value === false) continue;
    if (typeof value === "function") element.addEventListener(name, value);
    else element.setAttribute(name, value === true ? "" : value);
  }
  element.append(...children.flat().filter((child) => child !== undefined && child !== null && child !== false));
  return element;
}

/** An element: functions among the attributes are listeners; strings among the children become text. */
export function h(tag, attributes, ...children) {
  return fill(document.createElement(tag), attributes, children);
}

/** An element of SVG. */
export function svg(tag, attributes, ...children) {
  return fill(document.createElementNS(SVG, tag), attributes, children);
}

/** Says a sentence to screen readers. Used where something ends, not for each token. */
export function say(sentence) {
  document.getElementById("spoken").textContent = sentence;
}

let lastId = 0;

/** An id that no other element has. */
export function freshId(prefix) {
  lastId += 1;
  return `${prefix}-${lastId}`;
}

/** A label and its field. */
export function field(label, input, hint) {
  input.id ||= freshId("field");
  return h("div", { class: "field" }, h("label", { for: input.id }, label), input, hint && h("small", {}, hint));
}

/** Calls a function once the person has paused: each `start` starts the pause anew. */
export class Pause {
  constructor(milliseconds, call) {
    this.milliseconds = milliseconds;
    this.call = call;
  }

  start() {
    this.cancel();
    this.timer = setTimeout(() => this.call(), this.milliseconds);
  }

  cancel() {
    clearTimeout(this.timer);
  }
}

/** The error in words, at its place. */
export function errorBox(error) {
  const seconds = Number(error.retryAfter);
  const wait = error.status === 429 ? ` Wait ${seconds ? `${seconds} s` : "a little"}, then try again.` : "";
  return h("p", { class: "error", role: "alert" }, `${error.message}${wait}`);
}

/** The time that a part of some work still takes at its speed so far, for the end of a line; "" while it is unclear. */
function timeLeft(share, seconds) {
  const left = share > 0 ? (seconds / share) * (1 - share) : 0;
  if (seconds < 3 || left < 3) return "";
  return left < 90 ? `, about ${Math.round(left)} s left` : `, about ${Math.round(left / 60)} min left`;
}

/**
 * One place of the page with work on demand: starting new work cancels the one before.
 *
 * A sign of progress appears after 300 ms, so that quick answers do not flicker.
 */
export class Task {
  /** @param place the element that shows the sign of progress, and errors. */
  constructor(place) {
    this.place = place;
    this.controller = null;
  }

  cancel() {
    this.controller?.abort();
    this.controller = null;
    clearTimeout(this.timer);
    this.place.replaceChildren();
  }

  /**
   * Runs `work(signal, setDone, quiet)`: setDone takes the share that is done, from 0 to 1, and what is being done;
   * quiet ends the sign of progress before the work ends. Returns whether it completed.
   */
  async run(label, work) {
    this.cancel();
    const controller = (this.controller = new AbortController());
    const bar = h("progress", { "aria-label": label });
    const words = h("span", {}, label);
    const show = () => this.place.replaceChildren(h("p", { class: "progress" }, words, bar));
    this.timer = setTimeout(show, 300);
    try {
      let part = null;
      let began = 0;
      const setDone = (share, doing) => {
        if (doing !== part) [part, began] = [doing, performance.now()];
        bar.value = share;
        words.textContent = (doing || label) + timeLeft(share, (performance.now() - began) / 1000);
      };
      const quiet = () => {
        clearTimeout(this.timer);
        this.place.replaceChildren();
      };
      await work(controller.signal, setDone, quiet);
      if (this.controller !== controller) return false;
      this.cancel();
      return true;
    } catch (error) {
      if (this.controller !== controller || error.name === "AbortError") return false;
      this.cancel();
      this.place.replaceChildren(errorBox(error));
      return false;
    }
  }
}
