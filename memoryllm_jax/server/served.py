"""The model that a server serves, with what its routes share."""

import asyncio
import concurrent.futures
import contextlib
import functools
import os
from collections.abc import Callable
from typing import TypeVar

from memoryllm_jax.inference.engine import Engine
from memoryllm_jax.server.looker import Looker
from memoryllm_jax.server.options import ServerOptions

T = TypeVar("T")


class ServedModel:
    """A trained model and its server's options.

    Args:
      engine: the model; the caller closes it.
      options: of the server.
    Attributes:
      engine, options: as given.
      name: the model's name in requests.
      looker: looks into the model; in the worker thread only.
    """

    def __init__(self, engine: Engine, options: ServerOptions):
        self.engine, self.options = engine, options
        self.name = options.name or os.path.basename(engine.trained.workdir.rstrip("/"))
        self._worker = concurrent.futures.ThreadPoolExecutor(1, "compute")

    @functools.cached_property
    def looker(self) -> Looker:
        return Looker(self.engine)

    def later(self, function: Callable[..., None], *arguments) -> None:
        """Calls a function in the worker thread after the calls that wait, unless the model is closed before."""
        with contextlib.suppress(RuntimeError):  # closed already
            self._worker.submit(function, *arguments)

    async def compute(self, function: Callable[..., T], *arguments) -> T:
        """Calls a function in the worker thread, one at a time, so that the event loop is never blocked."""
        return await asyncio.get_running_loop().run_in_executor(self._worker, function, *arguments)

    def close(self) -> None:
        """Ends the worker thread, after the call under way."""
        self._worker.shutdown(cancel_futures=True)
