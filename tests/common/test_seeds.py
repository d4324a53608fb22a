"""Pages of several seeds as one page: means and deviations of what is measured, and what the seeds do not share."""

import csv
import json

import pytest

from memoryllm_jax.common import plots, seeds


def seed(number: int, loss: float, layer: int, word: str) -> seeds.Seed:
    def measure(page):
        page.heading("Losses")
        page.table(["model", "layer", "loss"], [["base", layer, loss], ["memory", 3, 1.0]], csv="losses")
        page.figure("loss", plots.by_layer({"base": [loss, 2.0]}, "loss"), "Loss")
        page.heading("Words")
        page.table(["word"], [[word]])
        return {"loss": loss, "layers": [layer], "word": word, "same": ["x", 4, None]}

    return seeds.Seed("losses: base", {"model": "base", "checkpoint": f"run-{number}"}, measure)


def test_a_page_of_several_seeds_has_means_and_deviations(tmp_path, monkeypatch):
    drawn = {}
    monkeypatch.setattr(plots.Chart, "_draw_lines", lambda chart, ax: drawn.update(chart.lines))
    every = [seed(0, 1.0, 5, "a"), seed(1, 2.0, 3, "b"), seed(2, 3.0, 5, "b")]
    seeds.write(str(tmp_path), "losses", "What is measured.", iter(every), 3)
    found = json.loads((tmp_path / "losses.json").read_text())
    assert found["results"] == {"loss": 2.0, "layers": [[5, 3, 5]], "word": ["a", "b", "b"], "same": ["x", 4, None]}
    assert found["sd"] == {"loss": 1.0, "layers": [None], "word": None, "same": [None] * 3} and found["seeds"] == 3
    assert found["facts"]["model"] == "base" and found["facts"]["checkpoint"] == "run-0; run-1; run-2"
    page = (tmp_path / "losses.html").read_text()
    assert "2 ± 1" in page and "5 / 3 / 5" in page and page.count("What is measured.") == 1
    assert "Losses" in page and "Words" not in page  # of the second part, the seeds have nothing in common
    assert list(csv.reader(open(tmp_path / "losses-losses.csv"))) == [
        ["model", "layer", "loss", "loss, sd"],
        ["base", "5 / 3 / 5", "2.0", "1.0"],
        ["memory", "3", "1.0", ""],
    ]
    assert drawn["base"].y.tolist() == [2.0, 2.0] and drawn["base"].error.tolist() == [1.0, 0.0]
    assert json.loads((tmp_path / "seed-1" / "losses.json").read_text())["results"]["word"] == "b"


def test_a_page_of_one_seed_is_that_of_the_seed(tmp_path):
    line = seeds.write(str(tmp_path), "losses", "What is measured.", [seed(0, 1.0, 5, "a")], 1)
    assert line.startswith(f"{tmp_path}/losses.html: ") and not (tmp_path / "seed-0").exists()
    assert json.loads((tmp_path / "losses.json").read_text()).keys() == {"facts", "results"}


def test_lines_that_only_some_seeds_have_are_no_chart_of_all():
    one, other = plots.by_layer({"base": [1.0]}, "loss"), plots.by_layer({"base": [1.0, 2.0]}, "loss")
    assert seeds._chart([one, other]) is None and seeds._chart([one, object()]) is None
    assert seeds._chart([one, one]).lines["base"].y == pytest.approx([1.0])
