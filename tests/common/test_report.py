"""Pages for people, and which texts a figure can show."""

import json

import numpy as np

from memoryllm_jax.common import plots, report


def test_a_page_escapes_what_it_shows(tmp_path):
    page = report.Report(str(tmp_path), "name", "a <b>", {"data": "<i>"})
    page.table(["x"], [[["</td>"]], [float("nan")]])
    page.raw(report.embedded_json({"text": "</script>"}))
    page.write({"x": np.array([1.0, np.nan])})
    written = (tmp_path / "name.html").read_text()
    assert "a &lt;b&gt;" in written and "<i>" not in written and "&lt;/td&gt;" in written and "</script>" not in written
    assert json.loads((tmp_path / "name.json").read_text())["results"] == {"x": [1.0, None]}


def test_texts_with_characters_that_the_font_lacks_are_not_drawable():
    assert plots.drawable("␣ä") and not plots.drawable("a漢")
