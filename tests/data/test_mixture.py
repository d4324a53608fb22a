"""Paths of several folders, and how a mixture deals sequences to its sources."""

from fractions import Fraction

import grain
import pytest

from memoryllm_jax.common.errors import UserError
from memoryllm_jax.data.mixture import Interleave, Part, parts_of, shares_of, short_names


def test_paths_are_cut_where_weights_begin(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("a", "b:2", "a,b:2", "c"):
        (tmp_path / name).mkdir()
    for path, expected in {
        "a:.7,c:3e-1": [("a", "0.7"), ("c", "0.3")],
        "gs://b/d:2": [("gs://b/d:2", None)],  # nothing to weigh it against
        "a,b:2": [("a,b:2", None)],  # a folder of this name
        "c,b:2": [("c", None), ("b:2", None)],  # and another one in a list
        "b:2:5,a:1": [("b:2", "5"), ("a", "1")],
        "http://host:80": [("http://host:80", None)],
        "http://host:80:0.5,gs://b/d:4,s3://b:1.5": [("http://host:80", "0.5"), ("gs://b/d", "4"), ("s3://b", "1.5")],
        "http://host:80/x:y,c": [("http://host:80/x:y", None), ("c", None)],
    }.items():
        wanted = [Part(name, None if weight is None else Fraction(weight)) for name, weight in expected]
        assert parts_of(path) == wanted, path
    assert shares_of(parts_of("a:7,c:3")) == (Fraction(7, 10), Fraction(3, 10))
    assert short_names(["gs://x/web/v1", "/data/code/v1/"]) == ["web/v1", "code/v1"]


@pytest.mark.parametrize(
    "names, message",
    [
        ("DATA,", "found an empty name"),
        ("DATA,DATA/", "expected each folder once, found .* more than once"),
        ("DATA:1,DATA:2", "expected each folder once, found .* more than once"),
        ("DATA,embedded", "expected folders of prepared data in a list, found embedded"),
        ("DATA:1,embedded:1", "expected folders of prepared data in a list, found embedded"),
        (
            "DATA,none",
            "expected folders, separated by commas and without commas in their names, .* found no folder 'none'",
        ),
        ("DATA:nan,s3://b/c:1", "each alone or with a weight as in .*; found no folder '.*:nan'"),
        (
            "DATA,s3://b/c:1",
            r"expected a weight after each folder, as in A:0.7,B:0.3, or after none, found none after '/",
        ),
        ("DATA:٣,s3://b/c:1", "found no folder '.*:٣'"),
        ("DATA:0,s3://b/c:1", "expected a weight above 0 for /.*, found 0$"),
        ("DATA:-1,s3://b/c:1", "expected a weight above 0 for /.*, found -1$"),
    ],
)
def test_paths_that_are_refused(data_path, names, message):
    with pytest.raises(UserError, match=message):
        parts_of(names.replace("DATA", data_path))


@pytest.mark.parametrize("weights", [[1], [3, 1], [5, 2, 1], [1, 40, 7, 2]])
def test_numbers_are_dealt_as_grain_does(weights):
    interleave = Interleave(shares_of([Part("", Fraction(weight)) for weight in weights]))
    # Grain scales the smallest weight to 100, so these are exact there too.
    mixed = grain.MapDataset.mix(
        [grain.MapDataset.range(n * 10**6, (n + 1) * 10**6) for n in range(len(weights))], weights
    )
    found = [interleave.place(number) for number in range(500)]
    assert found == [divmod(mixed[number], 10**6) for number in range(500)]


def test_any_stretch_has_the_shares_of_its_sources():
    shares = shares_of([Part("", Fraction(weight)) for weight in ("0.7", "1e-9", "0.1234567", "1", "3")])
    interleave = Interleave(shares)
    for start in (0, 1, 12345, 10**12):
        for length in (1, 7, 1000, 10**9):
            before, after = interleave.counts(start), interleave.counts(start + length)
            assert sum(after) - sum(before) == length
            for share, first, last in zip(shares, before, after):
                assert abs(last - first - share * length) < len(shares)
