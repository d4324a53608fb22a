"""The model that a server serves, with what its routes share."""

import asyncio
import concurrent.futures
import contextlib
import os
import sys
import time
from collections.abc import Callable
from typing import TypeVar

from starlette.requests import Request

from memoryllm_jax.analysis.key_values import Parameters
from memoryllm_jax.common.errors import ArgumentError, UserError
from memoryllm_jax.hf import source
from memoryllm_jax.inference.engine import Engine
from memoryllm_jax.inference.sampling import Sampling
from memoryllm_jax.inference.slots import Slots
from memoryllm_jax.server import chat_template
from memoryllm_jax.server.changes import Changed, Changes, Editing, Edits, contribution_of
from memoryllm_jax.server.chat_template import ChatTemplate
from memoryllm_jax.server.errors import ApiError
from memoryllm_jax.server.events import unless_gone
from memoryllm_jax.server.looker import Looker
from memoryllm_jax.server.losses import LossMeter
from memoryllm_jax.server.options import ServerOptions
from memoryllm_jax.server.scheduler import Scheduler
from memoryllm_jax.server.security import read_key
from memoryllm_jax.server.statistics import Statistics
from memoryllm_jax.server.token_names import TokenNames
from memoryllm_jax.server.work import Work
from memoryllm_jax.server.worker_rows import WorkerRows
from memoryllm_jax.tol.edit_spec import Suppress
from memoryllm_jax.tol.overlay import Overlay
from memoryllm_jax.tol.slot_edits import SlotEdits

T = TypeVar("T")

_THREADS = (
    "compute",  # views and losses
    "pass",  # passes over the vocabulary
    "edit",  # overlays, which completions wait for
    "suppress",  # overlays that need a key's coefficients: also a pass, and the first one may have to read weights
)
_COMPILE_SECONDS = 3600.0  # most time that compiling for one length may take


class ServedModel:
    """A trained model and its server's options.

    Args:
      engine: the model; the caller closes it.
      options: of the server.
    Attributes:
      engine, options: as given.
      name: the model's name in requests.
      looker: looks into the model.
      editing: makes the overlays that requests ask for; call `overlay` for one.
      losses: measures the loss of the model and of a changed one; in the worker thread only.
      created: when the server started, in seconds since 1970.
      api_key: the key that requests must bring, or None.
      context: most tokens of a sequence, its prompt included.
      most_sequences: of one request.
      scheduler: generates sequences.
      token_names: names of single tokens.
      chat: the chat template, or None.
    Raises: UserError.
    """

    def __init__(self, engine: Engine, options: ServerOptions):
        self.engine, self.options = engine, options
        self.name = options.name or os.path.basename(engine.trained.workdir.rstrip("/"))
        self.created = int(time.time())
        self.api_key = read_key(options.api_key_file)
        self.context = options.context or engine.context
        if self.context > engine.context:
            raise ArgumentError("context", f"expected at most the model's {engine.context}, found {self.context}")
        self.most_sequences = options.slots + options.queue
        self.token_names = TokenNames(engine.tokenizer)
        self.chat = _chat_template(engine)
        self._params = Parameters(engine.trained, engine.params)  # what the engine lacks is read at its first use
        self.editing = Editing(engine, self._params, options.overlays)
        self._worker_rows = WorkerRows(engine)
        self.losses = LossMeter(engine, self._worker_rows.source)
        self.looker = Looker(engine, self._worker_rows.source, self._params)
        self._is_closing = False
        # One thread each, so that what is quick does not wait for what may take minutes.
        self._threads = {name: concurrent.futures.ThreadPoolExecutor(1, name) for name in _THREADS}
        memory = self.editing.memory
        self._slot_edits = SlotEdits(memory, engine.trained.mesh, options.slots) if memory else None
        self._slots = Slots(engine, options.slots, self.context, self._slot_edits)
        self.scheduler = Scheduler(self._slots, self._slot_edits, engine.tokenizer, options.queue, options.time_limit)

    @property
    def is_healthy(self) -> bool:
        """Whether requests are answered: the engine has not failed, and the server is not closing."""
        return self.scheduler.error is None and not self._is_closing

    def compute_later(self, function: Callable[[], None]) -> None:
        """Calls a function in the thread of `compute`, after the calls that wait, unless the model is closed before."""
        self._later("compute", function)

    def pass_later(self, function: Callable[[], None]) -> None:
        """Calls a function so in the thread of `pass_over`."""
        self._later("pass", function)

    def _later(self, thread, function):
        with contextlib.suppress(RuntimeError):  # closed already
            self._threads[thread].submit(function)

    async def compute(self, function: Callable[..., T], *arguments) -> T:
        """Calls a function that computes, in the worker thread, so that the event loop is never blocked."""
        return await self._in_thread("compute", function, *arguments)

    async def pass_over(self, function: Callable[..., T], *arguments) -> T:
        """Calls a function that passes over the vocabulary, which may take minutes, in a thread for these alone."""
        return await self._in_thread("pass", function, *arguments)

    async def edit(self, function: Callable[..., T], *arguments) -> T:
        """Calls a function that reads or writes overlays, in a thread for these alone."""
        return await self._in_thread("edit", function, *arguments)

    async def overlay(self, request: Request, edits: Edits, for_slot: bool = False) -> Overlay | None:
        """The overlay that edits come to, None if there are none. Do not change it: others are given the same one.

        Args:
          request: what asks for it; if its client goes away while the edits wait, they are not made.
          for_slot: whether a slot must have room for the edits.
        Raises: ApiError for edits that do not fit the model, ArgumentError for those that do not fit a slot,
          ClientDisconnect.
        """
        if edits.overlay is None and not edits.edits:
            return None
        suppresses = any(isinstance(edit, Suppress) for edit in edits.edits or ())
        thread = "suppress" if suppresses else "edit"
        return await unless_gone(request.receive, self._in_thread(thread, self._overlay, edits, for_slot))

    def _overlay(self, edits, for_slot):
        overlay = self.editing.overlay(edits)
        if for_slot:
            self._slot_edits.check(overlay)
        return overlay

    async def changed(self, request: Request, changes: Changes, for_slot: bool = False) -> Changed:
        """What a request changes in the model. The arguments and errors are those of `overlay`."""
        contribution = contribution_of(changes.contribution, self.engine.config)
        return Changed(await self.overlay(request, changes, for_slot), contribution)

    async def _in_thread(self, name, function, *arguments):
        return await asyncio.get_running_loop().run_in_executor(self._threads[name], function, *arguments)

    def compile(self) -> None:
        """Compiles what most requests need, and generates a text. Call it before any request.

        Raises: the error of the engine, if it fails.
        """
        self._slots.compile()  # the engine thread has nothing to do yet
        try:
            asyncio.run(self._generate_once())
        except ApiError:
            if self.scheduler.error is not None:
                raise self.scheduler.error from None
            raise
        self.scheduler.statistics = Statistics()  # these were nobody's requests

    async def _generate_once(self):
        work = Work((0,), max_tokens=2, sampling=Sampling(0))
        (stream,) = self.scheduler.submit([work], time_limit=_COMPILE_SECONDS)
        async for _ in stream:
            pass

    def begin_closing(self) -> None:
        """Lets /health say that the server is closing, while what runs is finished."""
        self._is_closing = True

    def close(self) -> None:
        """Ends the threads, after what is under way."""
        self._is_closing = True
        for thread in self._threads.values():
            thread.shutdown(cancel_futures=True)
        self.scheduler.close()
        self.looker.close()
        self._worker_rows.close()


def _chat_template(engine: Engine) -> ChatTemplate | None:
    """The chat template of the tokenizer. One that is not valid is said on stderr: completions work without."""
    trained = engine.trained
    files = source.of(trained.description.source, trained.workdir).files
    try:
        return chat_template.of(files, engine.tokenizer, trained.workdir)
    except UserError as error:
        print(f"no chat: {error}", file=sys.stderr, flush=True)
        return None
