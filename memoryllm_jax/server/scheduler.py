"""Continuous batching: sequences join and leave the slots of `inference.slots.Slots` between decode steps.

One thread, the engine thread, makes all calls to the slots. In each round it frees the slots of cancelled sequences,
fills free ones from the queue, dispatches one decode step and then some pieces of prompts, and only then reads what the
round before dispatched. So the device works while the host turns tokens into text and hands it to the event loop.
"""

import collections
import threading
import time
from typing import NamedTuple

from memoryllm_jax.common.errors import UserError
from memoryllm_jax.inference.slots import Likelihoods, Pending, Piece, Prefilled, Settings, Slots, Stepped
from memoryllm_jax.inference.text import Streamer
from memoryllm_jax.server import errors, streams
from memoryllm_jax.server.errors import ApiError
from memoryllm_jax.server.statistics import Statistics
from memoryllm_jax.server.stop_texts import GrowingText
from memoryllm_jax.server.streams import Stream
from memoryllm_jax.server.work import Finished, Token, Work
from memoryllm_jax.tol.slot_edits import PoolFullError, SlotEdits

_RECENT = 64  # ended sequences from whose times the rate of the queue is estimated
_LONGEST_RETRY_S = 60
_UNKNOWN_RETRY_S = 5  # where no sequence has ended yet


class QueueFullError(ApiError):
    """The queue has no room for all sequences of a request.

    Args:
      retry_after: seconds after which there may be room.
    """

    def __init__(self, retry_after: int):
        message = f"the server's queue is full: try again in {retry_after} seconds"
        super().__init__(429, message, code="queue_full", headers={"Retry-After": str(retry_after)})
        self.retry_after = retry_after


class Scheduler:
    """Generates sequences, as many at a time as there are slots; others wait in a queue, first come first served.

    Args:
      slots: the device's side; only the engine thread calls it.
      edits: places overlays in slots; None where no row can be edited.
      tokenizer: the model's tokenizer.
      queue: sequences that may wait.
      time_limit: seconds from submission after which a sequence is ended.
    Attributes:
      statistics: totals since the start. The engine thread writes them; reading needs no lock.
      error: what ended the engine thread; None while all is well.
    """

    def __init__(self, slots: Slots, edits: SlotEdits | None, tokenizer, queue: int, time_limit: float):
        self.statistics = Statistics()
        self.error: BaseException | None = None
        self._slots, self._edits, self._tokenizer = slots, edits, tokenizer
        self._most_waiting, self._time_limit = queue, time_limit
        # The lock guards the queue, the cancelled streams and the two flags below, which several threads use.
        self._changed = threading.Condition()
        self._queue: collections.deque[_Sequence] = collections.deque()
        self._cancelled: set[Stream] = set()
        self._is_closing = False
        self._is_dropping = False  # whether `close` ends what runs
        # The others belong to the engine thread.
        self._occupants: list[_Sequence | None] = [None] * slots.slots
        self._reading: collections.deque[_Sequence] = collections.deque()  # those whose prompts are not read yet
        self._in_flight: list[_Step | _Piece] = []
        self._changes: dict[_Sequence, list] = {}  # events to hand over at the end of the round
        self._ended: collections.deque[float] = collections.deque(maxlen=_RECENT)
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    @property
    def running(self) -> int:
        """The number of sequences in slots."""
        return sum(occupant is not None for occupant in self._occupants)

    @property
    def waiting(self) -> int:
        """The number of sequences in the queue."""
        return len(self._queue)

    def submit(self, works: list[Work], time_limit: float | None = None) -> list[Stream]:
        """Puts the sequences of one request into the queue, all of them or none. Call it in the event loop.

        Args:
          time_limit: seconds after which they are ended; None: the scheduler's own.
        Raises: ApiError 400 if they can never be served, 503 if the server is closing or failed; QueueFullError.
        """
        self._check(works)
        with self._changed:
            self._check_open()
            missing = len(self._queue) + len(works) - self._most_waiting - (len(self._occupants) - self.running)
            if missing > 0:
                raise QueueFullError(self._retry_after(missing))
            seconds = self._time_limit if time_limit is None else time_limit
            made = [Stream(work, seconds, self._cancel) for work in works]
            self._queue.extend(_Sequence(stream, self._slots.capacity, self._tokenizer) for stream in made)
            self._changed.notify()
        return made

    def close(self, drain: bool = True) -> None:
        """Refuses new sequences and ends the engine thread.

        Args:
          drain: whether to finish the sequences that were accepted; else their streams fail.
        """
        with self._changed:
            self._is_closing, self._is_dropping = True, not drain
            self._changed.notify()
        self._thread.join()

    def _check(self, works):
        most = len(self._occupants) + self._most_waiting
        if len(works) > most:
            raise ApiError(400, f"expected at most {most} sequences of a request, found {len(works)}")
        for work in works:
            longest = self._slots.capacity - (work.max_tokens > 0)
            if not 1 <= len(work.ids) <= longest:
                message = f"prompt: expected 1 to {longest} tokens, found {len(work.ids)}"
                raise ApiError(400, message, "prompt", "context_length_exceeded")

    def _check_open(self):
        if self._is_closing:
            raise _closing()
        if self.error is not None:
            raise _failed()

    def _retry_after(self, missing: int) -> int:
        """Seconds until so many more sequences have ended, at the rate of the recent ones."""
        if len(self._ended) < 2:
            return _UNKNOWN_RETRY_S
        # Up to now and not up to the last end, so that the estimate grows while none ends.
        seconds = (time.monotonic() - self._ended[0]) / len(self._ended) * missing
        return min(_LONGEST_RETRY_S, 1 + int(seconds))

    def _cancel(self, stream: Stream) -> None:
        """Takes a stream's sequence out of the queue, or has the engine thread free its slot. For any thread."""
        with self._changed:
            for sequence in self._queue:
                if sequence.stream is stream:
                    self._queue.remove(sequence)
                    self._count("cancelled", 1)
                    return
            self._cancelled.add(stream)
            self._changed.notify()

    def _run(self):
        """The engine thread."""
        try:
            while self._wait():
                self._round()
        except BaseException as error:
            self._fail(error)

    def _wait(self) -> bool:
        """Waits until there is something to do. Returns: False if nothing will come."""
        with self._changed:
            while True:
                if self._is_dropping:
                    raise _closing()
                if self._queue or self._in_flight or self.running:
                    return True
                self._cancelled.clear()  # their sequences have ended meanwhile
                if self._is_closing:
                    return False
                self._changed.wait()

    def _round(self):
        self._free_cancelled()
        self._fill_slots()
        before, self._in_flight = self._in_flight, []
        # The step comes first: between the reading of a step, which fetches the rows that the next one needs, and
        # that next one, no prompt's rows can displace them in a cache.
        self._step()
        self._read_prompts()
        for dispatched in before:
            if isinstance(dispatched, _Step):
                self._handle_step(dispatched)
            else:
                self._handle_piece(dispatched)
        changes, self._changes = self._changes, {}
        streams.post([(sequence.stream, events) for sequence, events in changes.items()])

    def _free_cancelled(self):
        with self._changed:
            cancelled, self._cancelled = self._cancelled, set()
        if cancelled:
            for occupant in self._occupants:
                if occupant is not None and occupant.stream in cancelled:
                    self._end(occupant, "cancelled")

    def _fill_slots(self):
        for slot, occupant in enumerate(self._occupants):
            # Until there is a sequence whose settings and edits fit.
            while occupant is None:
                with self._changed:
                    if not self._queue:
                        return
                    # Both at once, so that `submit` counts the sequence either as waiting or as running.
                    occupant = self._occupants[slot] = self._queue.popleft()
                occupant.slot = slot
                self.statistics.queue_s.add(time.monotonic() - occupant.submitted)
                try:
                    self._slots.begin(slot, occupant.settings)
                    if self._edits is not None:
                        self._edits.place(slot, occupant.work.overlay)
                except UserError as error:
                    self._emit(occupant, _refusal(error))
                    self._end(occupant, "failed")
                    occupant = None
                else:
                    self._reading.append(occupant)

    def _step(self):
        """Dispatches a decode step, if a sequence waits for one."""
        # Those with all their steps dispatched are members too: one that was not taken makes up for it in this one.
        members = [s for s in self._occupants if s is not None and s.dispatched]
        if any(s.dispatched < s.most for s in members):
            for sequence in members:
                sequence.dispatched += 1
            self._in_flight.append(_Step(members, self._slots.step()))
            self.statistics.steps += 1

    def _read_prompts(self):
        """Dispatches pieces of prompts, up to a fixed number of tokens so that running streams do not stall."""
        left = self._slots.piece
        while self._reading:
            sequence = self._reading[0]
            ids = sequence.work.ids
            start, end = sequence.read, min(sequence.read + self._slots.piece, len(ids))
            if end - start > left:
                return
            left -= end - start
            is_last = end == len(ids)
            prefilled = self._slots.prefill(sequence.slot, list(ids[start:end]), start, sequence.scores, is_last)
            self._in_flight.append(_Piece(sequence, start, end, prefilled))
            self.statistics.prompt_tokens += end - start
            sequence.read = end
            if is_last:
                self._reading.popleft()
                sequence.dispatched = 1

    def _handle_step(self, step: "_Step"):
        found = self._slots.read(step.pending)
        for sequence in step.members:
            # A slot may have another occupant by now: the token belongs to the one that the step was dispatched for.
            if sequence.is_over:
                continue
            if found.was_taken_B[sequence.slot]:
                self._add(sequence, _of_step(found, sequence))
            else:  # it had no step left, or the row of its last token had to be read first
                sequence.dispatched -= 1

    def _handle_piece(self, dispatched: "_Piece"):
        sequence = dispatched.sequence
        if sequence.is_over:
            return
        piece = self._slots.read_piece(dispatched.prefilled)
        if sequence.work.echo:
            self._echo(dispatched, piece.scores)
        if piece.token is None:
            return
        if sequence.most == 0:
            self._finish(sequence, "length")
        else:
            self._add(sequence, _of_piece(piece, sequence))

    def _add(self, sequence: "_Sequence", drawn: Token):
        """Adds a token that was drawn for a sequence."""
        if drawn.id in sequence.work.stop_ids:
            self._finish(sequence, "stop")
            return
        if sequence.new == 0:
            self.statistics.first_token_s.add(time.monotonic() - sequence.submitted)
        sequence.new += 1
        self.statistics.new_tokens += 1
        text, is_stopped = sequence.text.add(drawn.id)
        self._emit(sequence, drawn._replace(text=text))
        if is_stopped:
            self._emit(sequence, Finished("stop"))
            self._end(sequence, "stop")
        elif sequence.new == sequence.most:
            self._finish(sequence, "length")

    def _echo(self, piece: "_Piece", scores: Likelihoods | None):
        """Emits the tokens of a piece of a prompt."""
        sequence = piece.sequence
        ids, alternatives = sequence.work.ids, sequence.work.alternatives
        for place, position in enumerate(range(piece.start, piece.end)):
            text = sequence.echoed.add(ids[position])
            if position == len(ids) - 1:
                text += sequence.echoed.end()
            if scores is None or position == 0:
                token = Token(ids[position], text)
            else:
                likelihoods = (x[place] for x in scores)
                token = _token(ids[position], *likelihoods, alternatives)._replace(text=text)
            self._emit(sequence, token)

    def _finish(self, sequence: "_Sequence", reason: str):
        text, is_stopped = sequence.text.end()
        reason = "stop" if is_stopped else reason
        self._emit(sequence, Finished(reason, text))
        self._end(sequence, reason)

    def _emit(self, sequence: "_Sequence", event):
        self._changes.setdefault(sequence, []).append(event)

    def _end(self, sequence: "_Sequence", how: str):
        """Frees the slot of a sequence."""
        slot = sequence.slot
        if sequence in self._reading:
            self._reading.remove(sequence)
        self._slots.end(slot)
        if self._edits is not None:
            self._edits.free(slot)
        sequence.is_over = True
        self._occupants[slot] = None
        self._ended.append(time.monotonic())
        self._count(how, 1)

    def _count(self, how: str, sequences: int):
        with self._changed:  # as the event loop counts those that leave the queue
            self.statistics.sequences[how] += sequences

    def _fail(self, error: BaseException):
        """Ends all streams with an error. Later ones are refused."""
        with self._changed:
            self.error = error
            ended = [s for s in (*self._occupants, *self._queue) if s is not None]
            self._queue.clear()
            self._occupants = [None] * len(self._occupants)
        self._count("failed", len(ended))
        last = error
        if not isinstance(error, ApiError):
            errors.report(error, "the engine")
            last = _failed()
        streams.post([(s.stream, [*self._changes.get(s, []), last]) for s in ended])


class _Sequence:
    """A sequence in the queue or in a slot.

    Args:
      stream: takes its events.
      capacity: most tokens of a sequence.
    Attributes:
      work: as submitted.
      submitted: when, in seconds of the monotonic clock.
      settings: what its slot begins with.
      scores: whether the log-probabilities of its prompt are wanted.
      most: most new tokens.
      slot: where it runs.
      read: prompt tokens whose pieces were dispatched.
      dispatched: new tokens that were handled or whose piece or step is in flight.
      new: new tokens that were handled.
      is_over: whether it has ended, so that tokens that were dispatched for it are ignored.
    """

    def __init__(self, stream: Stream, capacity: int, tokenizer):
        work = stream.work
        self.stream, self.work, self.submitted = stream, work, time.monotonic()
        end = min(len(work.ids) + work.max_tokens, capacity)
        self.most = end - len(work.ids)
        alternatives = -1 if work.alternatives is None else work.alternatives
        self.settings = Settings(work.seed, work.number, work.sampling, end, work.contribution, alternatives)
        self.scores = work.echo and work.alternatives is not None
        self.text = GrowingText(tokenizer, list(work.ids), work.stop_texts)
        self.echoed = Streamer(tokenizer, []) if work.echo else None
        self.slot = -1
        self.read = self.dispatched = self.new = 0
        self.is_over = False


class _Step(NamedTuple):
    """A decode step that was dispatched: what draws tokens for the members."""

    members: list[_Sequence]
    pending: Pending


class _Piece(NamedTuple):
    """A piece of a prompt that was dispatched: its tokens from `start` to before `end`."""

    sequence: _Sequence
    start: int
    end: int
    prefilled: Prefilled


def _of_step(found: Stepped, sequence: _Sequence) -> Token:
    slot, alternatives = sequence.slot, sequence.work.alternatives
    id = int(found.tokens_B[slot])
    if alternatives is None:
        return Token(id, "")
    return _token(id, found.logprob_B[slot], found.top_ids_BK[slot], found.top_logprobs_BK[slot], alternatives)


def _of_piece(piece: Piece, sequence: _Sequence) -> Token:
    alternatives = sequence.work.alternatives
    if alternatives is None:
        return Token(piece.token, "")
    return _token(piece.token, piece.logprob, piece.top_ids_K, piece.top_logprobs_K, alternatives)


def _token(id: int, log_prob: float, ids_K, log_probs_K, alternatives: int) -> Token:
    """A token, without its text, and as many of the likeliest ones in its place as are wanted."""
    likeliest = zip(ids_K[:alternatives].tolist(), log_probs_K[:alternatives].tolist())
    return Token(id, "", float(log_prob), tuple(likeliest))


def _refusal(error: UserError) -> ApiError:
    """What a sequence is told whose settings or edits do not fit."""
    if isinstance(error, PoolFullError):
        return ApiError(429, str(error), error.name, "edits_full", {"Retry-After": "1"})
    return ApiError(400, str(error), getattr(error, "name", None))


def _failed() -> ApiError:
    # Its error is on stderr: clients do not learn details of the server.
    return ApiError(503, "the engine failed, and the server has to be started again", code="failed")


def _closing() -> ApiError:
    return ApiError(503, "the server is closing", code="closing")
