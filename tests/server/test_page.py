"""The page in Debian's Chromium, each of its views used as a person would."""

import contextlib
import re
import shutil
from pathlib import Path

import pytest
from lab import GREEDY

from memoryllm_jax.server import page_files
from memoryllm_jax.tol.overlay import Overlay

sync_api = pytest.importorskip("playwright.sync_api", reason="Playwright is not installed: pip install playwright")
expect = sync_api.expect
expect.set_options(timeout=20_000)
PAGE = Path(page_files.__file__).parent / "page"
CHROMIUM = shutil.which("chromium")


@pytest.fixture(scope="module")
def tab():
    """One tab for all tests: to open another takes longer than to load the page again."""
    if CHROMIUM is None:
        pytest.skip("no chromium on this machine, such as that of Debian: apt-get install chromium")
    with (
        sync_api.sync_playwright() as playwright,
        playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"]) as browser,
    ):
        tab = browser.new_page(reduced_motion="reduce")
        tab.set_default_timeout(20_000)
        tab.faults = []
        tab.on("pageerror", lambda error: tab.faults.append(str(error)))
        tab.on("console", lambda message: tab.faults.append(message.text) if "Security" in message.text else None)
        tab.on("dialog", lambda dialog: (tab.faults.append(dialog.message), dialog.dismiss()))
        yield tab


@pytest.fixture
def page(tab, address):
    """The page, open at Generate."""
    with opened(tab, address) as page:
        yield page


@contextlib.contextmanager
def opened(tab, address, prepare=lambda page: None, width=1400):
    """The page, opened anew. A script that fails, and anything that the browser refuses, fails the test."""
    tab.set_viewport_size({"width": width, "height": 900})
    tab.mouse.move(0, 0)
    prepare(tab)
    tab.goto(address)
    try:
        yield tab
        assert not tab.faults
    finally:
        tab.faults.clear()
        tab.unroute_all(behavior="ignoreErrors")
        tab.evaluate("sessionStorage.clear()")
        tab.goto("about:blank")


def view(page, name):
    return page.locator(f"#view-{name}")


def chips(page, name):
    return view(page, name).locator(".chip")


def set_sampling(page, name, **values):
    """Sets fields such as Tokens and Temperature in the open view."""
    view(page, name).locator("summary").click()
    for label, value in values.items():
        field = view(page, name).get_by_label(label, exact=True)
        field.fill(str(value))
        field.blur()
        expect(field).to_have_value(str(value))
    view(page, name).locator("summary").click()


def generated(page):
    """Generates greedily with the keyboard alone; returns the chips of the text."""
    expect(chips(page, "generate").first).to_be_visible()
    set_sampling(page, "generate", Tokens=6, Temperature=0)
    view(page, "generate").get_by_label("Prompt").focus()
    page.keyboard.press("Control+Enter")
    expect(view(page, "generate").locator(".note")).to_have_text("6 new tokens")
    expect(page.get_by_role("button", name="Stop")).to_be_disabled()
    return chips(page, "generate")


def test_generate(page, served):
    expect(page.locator("#facts")).to_contain_text("tiny · flex-3 · ")
    tip = page.get_by_role("tooltip")
    chips(page, "generate").nth(1).hover()
    expect(tip).to_contain_text("generate to see its probability")
    text = generated(page)
    ids = served.engine.prompt("The file is")
    new = [token for batch in served.engine.generate([ids], 6, GREEDY) for _, token in batch]
    expect(text).to_have_count(len(ids) + 6)

    # Alternatives by the pointer and, with the arrow keys, by the keyboard
    text.nth(len(ids)).hover()
    expect(tip).to_contain_text(f"#{new[0]}")
    assert tip.locator("tr").count() == 5 and "%" in tip.locator("tr").first.inner_text()
    page.mouse.move(0, 0)
    text.first.focus()
    page.keyboard.press("End")
    expect(tip).to_contain_text(f"#{new[-1]}")
    expect(text.last).to_have_attribute("aria-describedby", "tip")
    page.keyboard.press("Escape")
    expect(tip).to_be_hidden()


def test_look(page, served):
    text, layers = generated(page), served.engine.config.layers
    text.nth(2).focus()
    page.keyboard.press("Enter")
    look = view(page, "look")
    assert page.url.endswith("#look")
    expect(look.locator(".chip").nth(2)).to_be_focused()
    expect(look.locator(".tokens li")).to_have_count(12)
    assert look.locator(".settling tbody tr").count() == layers
    assert look.locator(".settling thead th").all_inner_texts()[1:] == [
        "Residual", "Attention", "FFN-M", "FFN-C", "Layer's output"
    ]  # fmt: skip
    assert look.locator("svg.chart polyline").count() == 5
    rows = look.get_by_role("radiogroup", name="Layer")
    assert rows.get_by_role("radio").count() == layers
    rows.get_by_role("radio").first.focus()
    page.keyboard.press("ArrowDown")
    expect(look.get_by_role("heading", name="Layer 1: strongest keys of FFN-M")).to_be_visible()
    look.get_by_role("button", name=re.compile("tokens that use key .* of layer 1 most")).first.click()
    expect(look.locator(".users li")).to_have_count(12)
    look.get_by_label("Layers to compare").select_option("layer 1")
    expect(look.get_by_role("progressbar")).to_have_count(0)

    # Any token, by its id; and on to Edit
    look.get_by_role("combobox", name="Any of the").fill("#300")
    expect(look.locator(".search").get_by_role("option")).to_have_count(1)
    page.keyboard.press("Enter")
    expect(look.locator(".subject")).to_contain_text("#300")
    expect(look.get_by_role("heading", name="How the prediction settles")).to_be_hidden()
    look.get_by_role("button", name="Edit this token").click()
    field = view(page, "edit").get_by_role("combobox", name="Token", exact=True)
    assert field.input_value() == look.locator(".glyph").inner_text()
    expect(view(page, "edit").get_by_role("combobox", name="By the token")).to_be_focused()

    # Back, nothing is lost
    page.get_by_role("tab", name="Edit").focus()
    page.keyboard.press("ArrowLeft")
    expect(look.locator(".subject")).to_contain_text("#300")
    look.get_by_role("button", name=re.compile("suppress key .* of layer 1")).first.click()
    expect(view(page, "edit").get_by_label("Layer", exact=True)).to_have_value("1")


def test_edit(page, served, tmp_path):
    expect(chips(page, "generate").first).to_be_visible()
    set_sampling(page, "generate", Tokens=6, Temperature=0)
    page.get_by_role("tab", name="Edit").click()
    edit = view(page, "edit")
    token = served.engine.prompt("The file is")[-1]
    edit.get_by_text("Zero", exact=True).click()
    edit.get_by_role("combobox", name="Token", exact=True).fill(f"#{token}")
    expect(edit.locator(".search").get_by_role("option")).to_have_count(1)
    page.keyboard.press("Enter")
    page.keyboard.press("Enter")  # in a field, it sends the form
    expect(edit.locator(".edits li")).to_have_count(1)
    verdict = edit.locator(".beside + .note")
    expect(verdict).not_to_be_empty()
    edit.get_by_label("Text", exact=True).fill("The file is what the file is")
    edit.get_by_role("button", name="Measure the loss").click()
    expect(edit.locator(".loss")).to_contain_text("nats a token")
    assert edit.locator(".loss strong").inner_text() != "0.0000"

    with page.expect_download() as download:
        edit.get_by_role("button", name="Save as a file").click()
    path = tmp_path / "edits.safetensors"
    download.value.save_as(path)
    (saved,) = Overlay.open(str(path), served.editing.memory).edits
    assert saved.text == edit.locator(".edits bdi").inner_text()

    # The edited text is looked at with its edits, and a reload loses neither these nor what can be undone.
    with page.expect_request("**/api/look/position") as asked:
        edit.locator(".beside > div").last.locator(".chip").nth(2).click()
    asked = asked.value.post_data_json
    assert asked["edits"] == [{"operation": "zero", "token": token}] and len(asked["ids"]) == 3
    expect(view(page, "look").get_by_text("By the model with the edits that wrote this text.")).to_be_visible()
    page.reload()
    expect(view(page, "look").locator(".settling")).to_be_visible()
    page.get_by_role("tab", name="Edit").click()
    expect(edit.locator(".edits li")).to_have_count(1)
    expect(verdict).not_to_be_empty()
    edit.get_by_role("button", name="Undo").click()
    expect(edit.locator(".edits li")).to_have_count(0)
    expect(verdict).to_have_text("Both texts are the same.")


def test_ablate(page):
    expect(chips(page, "generate").first).to_be_visible()
    set_sampling(page, "generate", Tokens=16, Temperature=0.75)
    page.get_by_role("tab", name="Ablate").click()
    ablate = view(page, "ablate")
    verdict = ablate.locator(".beside + .note")
    expect(verdict).to_have_text("Both texts are the same.")
    asked = []

    def note(route):
        asked.append(route.request.post_data_json.get("contribution"))
        route.continue_()

    def asks_for(contribution):
        return page.expect_response(lambda response: asked and asked[-1] == contribution)

    page.route("**/v1/completions", note)
    doubled = {"alpha": 2, "drop_layers": [], "alpha_compute": 2, "drop_compute": []}
    with asks_for(doubled):
        for slider in ("memory", "compute"):
            ablate.locator(f"#alpha-{slider}").focus()
            page.keyboard.press("End")
    expect(verdict).to_have_text(re.compile("differ|then the texts part"))
    with asks_for(doubled | {"drop_compute": [1]}):
        ablate.get_by_role("group", name="FFN-C").get_by_role("button", name="layer 1").click()
    assert None not in asked  # the original is generated once
    ablate.get_by_role("button", name="Reset").click()
    expect(verdict).to_have_text("Both texts are the same.")


HOSTILE = {
    "<img src=x onerror=alert(1)>": "<img␣src=x␣onerror=alert(1)>",
    "<script>alert(1)</script>": "<script>alert(1)</script>",
    "\u202egnp.exe": "⟨U+202E⟩gnp.exe",
    "a\u200bb\u00a0": "a⟨U+200B⟩b⟨U+00A0⟩",
    "\u0301": "◌\u0301",
    "\r\n": "␍↵",
    "שלום": "שלום",
    "__proto__": "__proto__",
    "": "(no text)",
}


def test_texts_of_tokens_are_only_texts(tab, address):
    tokens = [{"id": i, "text": text} for i, text in enumerate(HOSTILE)]

    def prepare(page):
        page.route("**/api/tokens?*", lambda route: route.fulfill(json={"tokens": tokens, "total": len(tokens)}))
        page.route("**/api/tokenize", lambda route: route.fulfill(json={"tokens": tokens}))

    with opened(tab, address, prepare) as page:
        expect(chips(page, "generate")).to_have_count(len(tokens))
        page.get_by_role("tab", name="Look").click()
        view(page, "look").get_by_role("combobox").fill("x")
        options = view(page, "look").locator(".search").get_by_role("option")
        expect(options).to_have_count(len(tokens))
        assert options.locator(".token").all_text_contents() == list(HOSTILE.values())
        assert page.locator("main img, main script").count() == 0


def test_no_script_makes_markup_of_text():
    sinks = r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|setHTML|DOMParser|srcdoc|createContextualFragment"
    for script in PAGE.glob("*.js"):
        assert not re.search(rf"{sinks}|\beval\(|new Function|https?://(?!www\.w3\.org)", script.read_text()), script
    index = (PAGE / "index.html").read_text()
    assert not re.search(r"<script(?! type=\"module\" src=)|<style|\sstyle=|\son\w+=|https?://", index)


def test_it_asks_for_the_key_and_says_errors_at_their_place(tab, address):
    keys = []

    def model(route):
        keys.append(route.request.headers.get("authorization"))
        refusal = {"error": {"message": "Authorization: expected a key", "type": "", "param": None, "code": None}}
        route.continue_() if keys[-1] == "Bearer right" else route.fulfill(status=401, json=refusal)

    with opened(tab, address, lambda page: page.route("**/api/model", model)) as page:
        page.locator("#key-input").fill("wrong")
        page.keyboard.press("Enter")
        expect(page.get_by_role("dialog")).to_contain_text("It did not accept the last one.")
        page.locator("#key-input").fill("right")
        page.keyboard.press("Enter")
        expect(chips(page, "generate").first).to_be_visible()
        assert keys == [None, "Bearer wrong", "Bearer right"]

        busy = {"error": {"message": "All slots are taken.", "type": "", "param": None, "code": None}}
        page.route(
            "**/v1/completions", lambda route: route.fulfill(status=429, headers={"Retry-After": "3"}, json=busy)
        )
        page.get_by_role("button", name="Generate", exact=True).click()
        expect(view(page, "generate").get_by_role("alert")).to_have_text(
            "All slots are taken. Wait 3 s, then try again."
        )


def test_work_shows_progress_and_is_cancelled_when_the_person_goes_on(page):
    expect(chips(page, "generate").first).to_be_visible()
    page.route("**/api/look/nearest", lambda route: None)  # which takes forever
    page.route("**/api/look/position", lambda route: route.fulfill(status=500))  # which keeps back nothing else
    chips(page, "generate").nth(1).click()
    progress = view(page, "look").get_by_role("progressbar")
    expect(progress).to_have_accessible_name("Comparing with the rows of all tokens")
    with page.expect_event("requestfailed") as failed:
        chips(page, "look").nth(2).click()
    assert failed.value.url.endswith("/api/look/nearest")


def test_narrow_screens_need_no_sideways_scrolling(tab, address):
    with opened(tab, address, width=420) as page:
        text = generated(page)
        text.last.hover()
        box = page.get_by_role("tooltip").bounding_box()
        assert box["x"] >= 0 and box["x"] + box["width"] <= 420
        text.nth(2).click()
        expect(view(page, "look").locator(".tokens li")).to_have_count(12)
        for name in ("Look", "Edit", "Ablate", "Generate"):
            page.get_by_role("tab", name=name).click()
            assert page.locator("html").evaluate("element => element.scrollWidth") <= 420
        page.get_by_role("tab", name="Ablate").click()
        one, other = (panel.bounding_box() for panel in view(page, "ablate").locator(".beside > div").all())
        assert one["x"] == other["x"] and one["width"] > 350
