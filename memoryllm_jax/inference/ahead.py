"""Compiles functions from shapes alone, while the arrays that they will take are still being read.

Inside `only_shapes`, the functions of `jit` compile and do not run: they return the shapes of their results, which the
next function takes. So the calls of a generation, made with shapes in place of the parameters, compile what the same
calls need later.
"""

import contextlib
import functools
import threading
from collections.abc import Callable, Iterator

import jax


class _State(threading.local):
    only_shapes = False
    stop: threading.Event | None = None  # once it is set, nothing more is compiled inside `only_shapes`


class _StoppedError(Exception):
    """What is compiled ahead is no longer needed."""


_state = _State()


def jit(function: Callable, **options) -> Callable:
    """`jax.jit`, whose functions compile only, inside `only_shapes`."""
    jitted = jax.jit(function, **options)

    @functools.wraps(function)
    def call(*args, **kwargs):
        if not _state.only_shapes:
            return jitted(*args, **kwargs)
        if _state.stop is not None and _state.stop.is_set():
            raise _StoppedError
        _state.only_shapes = False  # functions that this one calls are traced as usual
        try:
            # JAX finds the compiled function again when it is called with arrays of these shapes and shardings.
            shardings = jitted.lower(*args, **kwargs).compile().output_shardings
            shapes = jitted.eval_shape(*args, **kwargs)
        finally:
            _state.only_shapes = True
        return jax.tree.map(lambda shape, sharding: shape.update(sharding=sharding), shapes, shardings)

    call.lower = jitted.lower
    return call


def is_on() -> bool:
    """Whether this thread is inside `only_shapes`."""
    return _state.only_shapes


@contextlib.contextmanager
def only_shapes() -> Iterator[None]:
    """Inside, in this thread, the functions of `jit` compile and do not run. They take arrays and ShapeDtypeStructs."""
    _state.only_shapes = True
    try:
        yield
    finally:
        _state.only_shapes = False


@contextlib.contextmanager
def in_background(compile_functions: Callable[[], None]) -> Iterator[None]:
    """Calls a function inside `only_shapes` in another thread, while the block runs; waits for it at the end.

    Its errors are dropped: the calls that it makes ahead of time raise them again, when they are made. If the block
    fails, only the compilation under way, which cannot be interrupted, delays its error.
    """
    stop = threading.Event()

    def run():
        _state.stop = stop
        with contextlib.suppress(Exception), only_shapes():
            compile_functions()

    thread = threading.Thread(target=run, name="compile")
    thread.start()
    try:
        yield
    except BaseException:
        stop.set()
        raise
    finally:
        thread.join()
