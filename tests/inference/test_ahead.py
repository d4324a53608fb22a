"""Compiling ahead of time, from shapes alone."""

import contextlib
import functools
import threading

import jax
import pytest

from memoryllm_jax.inference import ahead
from memoryllm_jax.inference.sampling import Sampling
from memoryllm_jax.inference.text import compile_texts, print_texts
from memoryllm_jax.tol.edit import Editor
from memoryllm_jax.tol.edit_spec import Swap
from memoryllm_jax.tol.overlay import Overlay
from memoryllm_jax.tol.serving import EngineOptions, memory_of, open_engine


@pytest.fixture
def compiled():
    """The durations of all compilations from now on."""
    durations = []

    def listen(event, duration, **_):
        if event == "/jax/core/compile/backend_compile_duration":
            durations.append(duration)

    jax.monitoring.register_event_duration_secs_listener(listen)
    yield durations
    jax.monitoring.unregister_event_duration_listener(listen)


def test_a_text_needs_no_compilation_after_that_from_shapes(lab, compiled, tmp_path):
    edits = str(tmp_path / "edits")
    with lab.model("flex-3") as engine:
        overlay = Overlay(memory_of(engine))
        Editor(overlay).add(Swap(token=40, by=41))
        overlay.save(edits)
    how = {"max_tokens": 5, "sampling": Sampling(temperature=0), "seed": 0, "stops": ()}
    for prompts, changes in ((["The file"], {}), (["The file", "A class"], {"alpha": 0.5, "overlay": edits})):
        options = EngineOptions(lab.workdir("flex-3"), **changes)
        found = []
        for compile_ahead in (functools.partial(compile_texts, prompts=prompts, **how), None):
            with contextlib.closing(options.open(compile_ahead=compile_ahead)) as engine:
                compiled.clear()
                results, _ = print_texts(engine, prompts, **how)
                found.append((results, len(compiled)))
        (texts, few), (expected, many) = found
        assert texts == expected and few <= 1 < many  # the first tokens get another shape in a function of their own


def test_errors_are_those_of_the_calls_themselves(lab):
    def fail(engine):
        raise ValueError("dropped")

    with contextlib.closing(open_engine(lab.workdir("flex-3"), compile_ahead=fail)) as engine:
        assert next(engine.generate([[1, 2]], 1, Sampling()))


def test_nothing_more_is_compiled_once_the_parameters_cannot_be_read(compiled):
    first = threading.Event()

    def compile_two():
        x = jax.ShapeDtypeStruct((3,), "float32")
        ahead.jit(lambda x: x + 1)(x)
        first.set()
        ahead._state.stop.wait(10)
        ahead.jit(lambda x: x + 2)(x)

    with pytest.raises(ValueError, match="damaged"), ahead.in_background(compile_two):
        first.wait()
        raise ValueError("damaged")
    assert len(compiled) == 1
