// Keeps edits: as a file, or under a name on the server, from where they are loaded again.

import { file, get, put } from "./api.js";
import { Task, errorBox, field, h, say } from "./dom.js";
import { changesBody, isChanged, onChange, setChanges, state } from "./state.js";

/** Saving as a file, keeping under a name, and loading what was kept. */
export function keeping() {
  const place = h("div", {});
  const task = new Task(place);
  const save = h("button", { type: "button", click: download }, "Save as a file");
  const name = h("input", {
    type: "text",
    pattern: "[A-Za-z0-9_\\-]+",
    placeholder: "letters, digits, - and _",
    autocomplete: "off",
  });
  const keep = h("button", { type: "submit" }, "Keep");
  const kept = h("select", {});
  const load = h("button", { type: "button", click: open }, "Load");
  const keepForm = h(
    "form",
    {
      class: "row",
      submit: (event) => {
        event.preventDefault();
        keepAs(false);
      },
    },
    field("Keep on the server as", name),
    keep,
  );
  const loadRow = h("div", { class: "row" }, field("Kept before", kept), load);

  async function download() {
    const done = await task.run("Making the file", async () => {
      const blob = await file("/api/edit/file", changesBody());
      const url = URL.createObjectURL(blob);
      const link = h("a", { href: url, download: "edits.safetensors" });
      link.click();
      setTimeout(() => URL.revokeObjectURL(url), 60_000);
    });
    if (done) note("Saved. `generate --overlay=edits.safetensors` takes this file.");
  }

  async function open() {
    await task.run("Reading the overlay", async (signal) => {
      const { name, texts } = await get(`/api/overlays/${encodeURIComponent(kept.value)}`, signal);
      setChanges({ overlay: { name, texts }, edits: [] });
    });
  }

  async function keepAs(replace) {
    if (!name.value) {
      place.replaceChildren(errorBox(new Error("Give it a name first.")));
      name.focus();
      return;
    }
    const chosen = name.value;
    let exists = false;
    const done = await task.run("Keeping the edits", async () => {
      try {
        await put(`/api/overlays/${encodeURIComponent(chosen)}`, { ...changesBody(), replace });
      } catch (error) {
        if (error.status !== 409) throw error;
        exists = true;
        return;
      }
      await showKept();
    });
    if (exists) {
      const again = h("button", { type: "button", click: () => keepAs(true) }, "Replace it");
      place.replaceChildren(h("p", { class: "row" }, `There is an overlay ${chosen} already.`, again));
      again.focus();
    } else if (done) note(`Kept. Requests use it with "overlay": "${chosen}".`);
  }

  function note(text) {
    place.replaceChildren(h("p", { class: "quiet" }, text));
    say(text);
  }

  async function showKept() {
    const { overlays } = await get("/api/overlays");
    kept.replaceChildren(...overlays.map((overlay) => h("option", { value: overlay }, overlay)));
    loadRow.hidden = overlays.length === 0;
  }

  const show = () => {
    save.disabled = keep.disabled = !isChanged();
  };
  onChange("changes", show);
  show();
  keepForm.hidden = !state.model.keeps_overlays;
  kept.replaceChildren(...state.model.overlays.map((overlay) => h("option", { value: overlay }, overlay)));
  loadRow.hidden = state.model.overlays.length === 0;
  return h("div", { class: "keeping" }, h("div", { class: "row" }, save), keepForm, loadRow, place);
}
