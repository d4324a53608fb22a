"""JSON decoded into typed structures: the right value, or one sentence that names the field."""

import typing

import pytest

from memoryllm_jax.common import records
from memoryllm_jax.common.errors import UserError


class Layer(records.Record):
    width: records.Size
    kind: typing.Literal["wide", "narrow"] = "wide"

    def __post_init__(self):
        if self.width == 7:
            raise ValueError("expected an even width, found 7")


class Model(records.Record):
    steps: records.Count
    layers: tuple[Layer, ...] = ()
    scale: float = 1.0


def test_fields_are_typed_and_others_ignored():
    text = b'{"steps": 3, "layers": [{"width": 8}], "later": {"version": [1, ' + b"9" * 5000 + b"]}}"
    assert records.parse(Model, text, "file") == Model(steps=3, layers=(Layer(width=8),))
    assert records.to_json(Model(steps=3)) == {"steps": 3, "layers": (), "scale": 1.0}


@pytest.mark.parametrize(
    "text, problem",
    [
        (b"[]", "file: expected object, found array"),
        (b'{"layers": []}', "file: expected a field steps, found none"),
        (b'{"steps": 2.5}', "file: steps: expected int, found float"),
        (b'{"steps": -1}', "file: steps: expected int >= 0, found -1"),
        (b'{"steps": 18014398509481984}', "file: steps: expected int <= 9007199254740992, found 18014398509481984"),
        (b'{"steps": ' + b"9" * 5000 + b"}", "file: steps: expected an integer of at most 64 bits, found a larger one"),
        (b'{"steps": 1, "scale": 1e999}', "file: scale: expected a finite number, found a larger one"),
        (b'{"steps": 1, "layers": null}', "file: layers: expected array, found null"),
        (b'{"steps": 1, "layers": [{"width": 8}, {"width": 0}]}', "file: layers[1].width: expected int >= 1, found 0"),
        (b'{"steps": 1, "layers": [{"width": 7}]}', "file: layers[0]: expected an even width, found 7"),
        (
            b'{"steps": 1, "layers": [{"width": 8, "kind": "odd"}]}',
            "file: layers[0].kind: expected a known value, found 'odd'",
        ),
        (
            b'{"steps": 1, "x": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
            "file: expected a model, found JSON that is nested too deeply",
        ),
        (b'{"steps": 1', "file: expected a model, found invalid JSON: Input data was truncated"),
    ],
)
def test_a_message_names_field_expectation_and_value(text, problem):
    with pytest.raises(UserError) as error:
        records.parse(Model, text, "file", "a model")
    assert str(error.value) == problem


def test_a_tree_is_converted_with_the_same_messages():
    assert records.convert(Model, {"steps": 3}, "file") == Model(steps=3)
    with pytest.raises(UserError, match=r"^file: steps: expected int >= 0, found -1$"):
        records.convert(Model, {"steps": -1}, "file")
    with pytest.raises(UserError, match=r"^file: expected Unicode text, found half a surrogate pair"):
        records.convert(Model, "\ud800", "file")
