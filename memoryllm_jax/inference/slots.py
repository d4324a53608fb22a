"""The device side of continuous batching: sequences that join and leave a batch between its decode steps.

A fixed number of slots decode together. Each has its own settings, which are arrays over the slots, so that nothing
compiles between two sequences. A prompt enters its slot in pieces, between the steps of the others.

Promise: the tokens and log-probabilities of a slot do not depend on the other slots, to the bit on a CPU. The shapes of
a step are always the same; work that only some slots need is skipped for all or done for all, and changes no other
slot's results; and attention adds zeros for the positions that a longer slot makes it read (`attention.Past`). They do
depend, by rounding, on how the prompt was cut into pieces.

Shapes: B slots, T positions of a piece, U distinct token ids of a piece, V token ids, L layers, K alternatives.
"""

from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from memoryllm_jax.common.errors import ArgumentError
from memoryllm_jax.inference import ahead, pieces, sequences
from memoryllm_jax.inference.decoder import bucket, next_power_of_two
from memoryllm_jax.inference.engine import Contribution, Engine
from memoryllm_jax.inference.pieces import MOST_ALTERNATIVES, Drawn, Likelihoods, Place
from memoryllm_jax.inference.rows import refuse_bigrams
from memoryllm_jax.inference.sampling import Draws, Sampling
from memoryllm_jax.inference.steps import Standing
from memoryllm_jax.model import attention
from memoryllm_jax.model.token_memory import TokenRows
from memoryllm_jax.model.transformer import Factors

PIECE = 256  # most tokens of a piece
_SHORTEST_SPAN = 128
_SCORES_BYTES = 256 << 20  # of a piece's attention scores in one layer, which a device holds at once


class RowEdits(Protocol):
    """Edits of the token memory, other ones for each slot. `tol.slot_edits.SlotEdits` implements it.

    Attributes:
      arrays: what the methods read, arrays on the device. Those of a call are taken just before it.
    """

    arrays: Any

    def apply(self, arrays, ids_B, rows: TokenRows) -> TokenRows:
        """Edits the rows of a decode step's tokens. Row b of `rows` belongs to slot b. For use in jit."""

    def apply_to_slot(self, arrays, slot, ids_U, rows: TokenRows) -> TokenRows:
        """Edits the rows of token ids [U] for one slot, an int32 scalar. For use in jit."""


class Settings(NamedTuple):
    """Settings of the sequence in a slot.

    Attributes:
      seed: seed of the draws, from 0 to 2^32 - 1.
      number: number of the sequence, which its draws depend on.
      sampling: how tokens are drawn.
      end: the length at which the sequence ends at the latest, its prompt included.
      contribution: factors of the FFN outputs. They replace those of `Engine.contribute`.
      alternatives: how many of the likeliest tokens are reported, at most MOST_ALTERNATIVES; 0: log-probabilities of
        the drawn tokens alone; -1: none.
    """

    seed: int = 0
    number: int = 0
    sampling: Sampling = Sampling()
    end: int = 0
    contribution: Contribution = Contribution()
    alternatives: int = -1


class Prefilled(NamedTuple):
    """A piece that was dispatched; `Slots.read_piece` waits for it.

    Attributes:
      slot, occupant: the slot, and the number of its occupant.
      count: tokens of the piece.
      scores: of its tokens, on the device, or None.
      drawn: the first new token, on the device, after the last piece; else None.
    """

    slot: int
    occupant: int
    count: int
    scores: Likelihoods | None
    drawn: Drawn | None


class Piece(NamedTuple):
    """What a piece brought.

    Attributes:
      scores: `Likelihoods` of the piece's tokens as host arrays, if they were asked for. Those of a text's first token
        mean nothing.
      token: the first new token, after the last piece; else None.
      logprob, top_ids_K, top_logprobs_K: the token's log-probability and the likeliest tokens in its place, as
        `Settings.alternatives` asks for them.
    """

    scores: Likelihoods | None
    token: int | None
    logprob: float
    top_ids_K: np.ndarray
    top_logprobs_K: np.ndarray


class Pending(NamedTuple):
    """A decode step that was dispatched; `Slots.read` waits for it.

    Attributes:
      tokens_B: int32 on the device, the drawn tokens; -1 for slots that took no step.
      likelihoods: of the drawn tokens, on the device; None if no slot asked for them.
      occupant_B: number of each slot's occupant.
      is_decoding_B: bool, the slots whose prompts were complete.
    """

    tokens_B: jax.Array
    likelihoods: Likelihoods | None
    occupant_B: np.ndarray
    is_decoding_B: np.ndarray


class Stepped(NamedTuple):
    """What a decode step brought, as host arrays over the slots.

    Attributes:
      tokens_B: int32, the drawn tokens; -1 where `was_taken_B` is false.
      logprob_B: float32, their log-probabilities in nats in the model's distribution; 0 where they are not asked for.
      top_ids_BK, top_logprobs_BK: the likeliest tokens in their place, the likeliest first; 0 where they are not asked
        for.
      was_taken_B: bool, whether the slot took the step. It did not if it had no running sequence, if the slot has
        another occupant by now, or if the row of its last token had to be read first: then the next step takes it.
    """

    tokens_B: np.ndarray
    logprob_B: np.ndarray
    top_ids_BK: np.ndarray
    top_logprobs_BK: np.ndarray
    was_taken_B: np.ndarray


class _Occupants(NamedTuple):
    """Settings of all slots, on the host or the devices.

    Attributes:
      draws: how tokens are drawn.
      end_B: int32, the length at which each sequence ends.
      alternatives_B: int32, as of `Settings`.
      is_decoding_B: bool, whether the slot has an occupant whose prompt is complete.
      factors: float32 [L, B], of the FFN outputs.
    """

    draws: Draws
    end_B: jax.Array | np.ndarray
    alternatives_B: jax.Array | np.ndarray
    is_decoding_B: jax.Array | np.ndarray
    factors: Factors


class Slots:
    """A batch whose sequences join and leave between steps. For use by one thread.

    A sequence's life: `begin`, `prefill` for each piece of its prompt, `step` while it runs, `end`. `prefill` and
    `step` do not wait for the device; what they return is read in the order of the calls. The next step may be
    dispatched before the last one is read. It may take a step for a sequence that has ended; after `end` or `begin`,
    `read` leaves that out.

    Args:
      engine: the model. The factors of `Engine.contribute` are not used.
      slots: number of slots, a multiple of the mesh's batch shards.
      capacity: most positions of a sequence, its prompt included.
      edits: edits of the token memory by slot, or None.
    Attributes:
      slots, capacity: as given.
      piece: most tokens of a piece.
    Raises: ArgumentError; UserError for a model that cannot generate text.
    """

    def __init__(self, engine: Engine, slots: int, capacity: int, edits: RowEdits | None = None):
        self._decoder, self._rows, self._edits = engine.decoder, engine.rows, edits
        self._config, self._vocab_size = engine.config, engine.tokenizer.vocab_size
        refuse_bigrams(self._config)
        shards, mesh = self._decoder.shards, self._decoder.mesh
        if slots < 1 or slots % shards:
            raise ArgumentError("slots", f"expected a multiple of the mesh's {shards} batch shards, found {slots}")
        self.slots, self.capacity = slots, capacity
        self._is_cpu = mesh.devices.flat[0].platform == "cpu"
        of_position = 4 * self._config.heads * next_power_of_two(capacity)
        self.piece = min(PIECE, 1 << (max(16, _SCORES_BYTES // of_position).bit_length() - 1))
        if not self._rows.on_device:
            self._rows.reserve(slots)
        whole, of_cache = NamedSharding(mesh, P()), NamedSharding(mesh, sequences.CACHE)
        self._put = ahead.jit(lambda tree: tree, out_shardings=whole)
        self._step = ahead.jit(
            self._step_body,
            donate_argnames="cache",
            out_shardings=(whole, whole, of_cache),
        )
        self._first = ahead.jit(self._first_body, out_shardings=whole)
        if edits is not None:
            self._edit_piece = ahead.jit(edits.apply_to_slot)
        self._make_arrays()

    def _make_arrays(self):
        B, L = self.slots, self._config.layers
        self._settings = _Occupants(
            Draws(
                np.zeros(B, np.uint32),
                np.zeros(B, np.int32),
                np.zeros(B, np.float32),
                np.zeros(B, np.int32),
                np.ones(B, np.float32),
            ),
            np.zeros(B, np.int32),
            np.full(B, -1, np.int32),
            np.zeros(B, bool),
            Factors(np.ones((L, B), np.float32), np.ones((L, B), np.float32)),
        )
        self._occupants = None  # the settings on the devices; None: they have changed
        self._occupant_B = np.zeros(B, np.int64)
        # The last token that was read of each slot, -1 if there is none, its position, and the steps not read yet.
        self._last_B = np.full(B, -1, np.int32)
        self._position_B = np.zeros(B, np.int32)
        self._unread_B = np.zeros(B, np.int32)
        self._before: dict[int, jax.Array] = {}  # by slot, the state before its next piece, which scores start from
        with jax.set_mesh(self._decoder.mesh):
            self._standing = self._put(Standing(np.zeros(B, np.int32), np.zeros(B, np.int32)))
        self._cache = self._decoder.empty_cache(B, self.capacity, in_segments=self._is_cpu)

    def compile(self) -> None:
        """Compiles pieces and steps of all sizes, with pieces in slot 0. Call it while no slot has a sequence."""
        settings = Settings(sampling=Sampling(0.0), end=self.capacity, alternatives=MOST_ALTERNATIVES)
        lengths = sorted({min(self.capacity, 1 << power) for power in range(4, self.capacity.bit_length() + 1)})
        # The longest length of each span is enough.
        longest = {self._reach(length).span: length for length in lengths}
        for length in longest.values():
            self.begin(0, settings)
            for size in sorted({min(size, self.piece) for size in lengths if size <= length}):
                # What the cache holds does not matter, so no earlier piece has to enter.
                self.prefill(0, [0] * size, length - size, scores=True, is_last=False)
            # The step reaches one position more.
            self.prefill(0, [0], max(0, length - 2), scores=True, is_last=True)
            self.read(self.step())
        self.end(0)

    def begin(self, slot: int, settings: Settings) -> None:
        """Gives a slot to a new sequence. Raises: ArgumentError for settings that do not fit the model or the slots."""
        if not 0 <= settings.seed < 2**32:
            raise ArgumentError("seed", f"expected a number from 0 to {2**32 - 1}, found {settings.seed}")
        if settings.end > self.capacity:
            raise ArgumentError("end", f"expected at most {self.capacity} positions, found {settings.end}")
        if not -1 <= settings.alternatives <= MOST_ALTERNATIVES:
            raise ArgumentError(
                "alternatives", f"expected a number from -1 to {MOST_ALTERNATIVES}, found {settings.alternatives}"
            )
        factors = settings.contribution.factors(self._config)
        self._set(slot, settings, factors)

    def end(self, slot: int) -> None:
        """Frees a slot. What it did in steps that are not read yet is dropped."""
        self._set(slot, Settings(sampling=Sampling(0.0)), (1.0, 1.0))

    def _set(self, slot, settings, factors):
        how, draws = self._settings, self._settings.draws
        draws.seed_B[slot], draws.number_B[slot] = settings.seed, settings.number
        sampling = settings.sampling
        draws.temperature_B[slot], draws.top_k_B[slot] = sampling.temperature, min(sampling.top_k, self._vocab_size)
        draws.top_p_B[slot] = sampling.top_p
        how.end_B[slot], how.alternatives_B[slot], how.is_decoding_B[slot] = settings.end, settings.alternatives, False
        how.factors.memory[:, slot], how.factors.compute[:, slot] = factors
        self._occupants = None
        self._occupant_B[slot] += 1
        self._last_B[slot], self._position_B[slot], self._unread_B[slot] = -1, 0, 0
        self._before.pop(slot, None)

    def _next_positions(self):
        """The positions after the last tokens, if all steps are taken that are not read yet."""
        return self._position_B + self._unread_B + 1

    def prefill(self, slot: int, ids: list[int], start: int, scores: bool, is_last: bool) -> Prefilled:
        """Dispatches a piece of a slot's prompt, and after the last piece the draw of the first new token.

        Args:
          ids: at least one token, and at most `piece`.
          start: position of the first of them; all earlier ones have entered.
          scores: whether to score the tokens. It is the same for all pieces of a prompt.
          is_last: whether the prompt is complete.
        """
        count = len(ids)
        if not 1 <= count <= self.piece:
            raise ArgumentError("ids", f"expected 1 to {self.piece} tokens, found {count}")
        if start + count > self.capacity:
            raise ArgumentError("ids", f"expected at most {self.capacity} positions, found {start + count}")
        ids_T = np.pad(ids, (0, bucket(count, self.piece) - count), mode="edge").astype(np.int32)
        place = Place(np.int32(slot), np.int32(start), np.int32(count))
        with jax.set_mesh(self._decoder.mesh):
            x_bTD = self._run_piece(slot, ids_T, place)
            last_D = pieces.last_state(x_bTD, place)
            found = self._score(slot, x_bTD, ids_T) if scores else None
            self._before[slot] = last_D
            drawn = self._draw_first(slot, last_D, place) if is_last else None
        return Prefilled(slot, int(self._occupant_B[slot]), count, found, drawn)

    def _run_piece(self, slot, ids_T, place):
        ids, index_T = np.unique(ids_T, return_inverse=True)
        # As many as the piece has positions: other numbers would compile each layer anew.
        ids = np.pad(ids, (0, len(ids_T) - len(ids)), mode="edge").astype(np.int32)
        rows = self._rows.fetch(ids)
        if self._edits is not None:
            if rows.rows_LSUP is not None:
                rows = rows._replace(rows_LSUP=list(rows.rows_LSUP))
            rows = self._edit_piece(self._edits.arrays, place.slot, ids, rows)
        factors = Factors(*(of_LB[:, slot].copy() for of_LB in self._settings.factors))
        params = self._decoder.params | {"factors": factors}
        reach, shards = self._reach(int(place.start + place.count)), self._decoder.shards
        x_bTD, self._cache = pieces.run(
            self._config, params, rows, index_T.astype(np.int32), place, self._cache, reach, shards
        )
        return x_bTD

    def _score(self, slot, x_bTD, ids_T):
        before_D = self._before.get(slot)
        if before_D is None:
            before_D = self._put(np.zeros(self._config.dim, self._config.dtype))
        head = self._decoder.params["final_norm"], self._decoder.params["head"]
        has_alternatives = self._settings.alternatives_B[slot] > 0
        return pieces.score(self._config, *head, x_bTD, before_D, ids_T, has_alternatives, self._vocab_size)

    def _draw_first(self, slot, last_D, place):
        self._settings.is_decoding_B[slot] = True
        self._occupants = None
        self._position_B[slot] = place.start + place.count
        head = self._decoder.params["final_norm"], self._decoder.params["head"]
        drawn, self._standing = self._first(*head, last_D, place, self._standing, self._on_devices())
        return drawn

    def _first_body(self, final_norm, head_VD, last_D, place, standing, occupants):
        logits_1V = pieces.logits_after(self._config, final_norm, head_VD, last_D)
        draws, alternatives_1 = jax.tree.map(
            lambda x_B: x_B[place.slot][None], (occupants.draws, occupants.alternatives_B)
        )
        position_1 = (place.start + place.count)[None]
        drawn = pieces.draw(self._config, logits_1V, draws, alternatives_1, position_1, self._vocab_size)
        tokens_B = standing.tokens_B.at[place.slot].set(drawn.tokens_B[0])
        return drawn, Standing(tokens_B, standing.position_B.at[place.slot].set(position_1[0]))

    def read_piece(self, prefilled: Prefilled) -> Piece:
        """Waits for a piece, and returns what it brought."""
        scores, drawn = jax.device_get((prefilled.scores, prefilled.drawn))
        if scores is not None:
            scores = jax.tree.map(lambda x: x[: prefilled.count], scores)
        if drawn is None:
            return Piece(scores, None, 0.0, np.zeros(0, np.int32), np.zeros(0, np.float32))
        token, slot = int(drawn.tokens_B[0]), prefilled.slot
        if self._occupant_B[slot] == prefilled.occupant and self._last_B[slot] < 0:
            self._last_B[slot] = token
            self._hold()
        of_token = drawn.likelihoods
        return Piece(
            scores, token, float(of_token.log_probs_T[0]), of_token.top_ids_TK[0], of_token.top_log_probs_TK[0]
        )

    def step(self) -> Pending:
        """Dispatches a decode step of all slots whose sequences run."""
        how = self._settings
        next_B = np.minimum(self._next_positions(), how.end_B)
        longest = int(np.where(how.is_decoding_B, next_B, 1).max())
        with jax.set_mesh(self._decoder.mesh):
            drawn, self._standing, self._cache = self._step(
                self._decoder.params,
                self._rows.arrays,
                None if self._edits is None else self._edits.arrays,
                self._standing,
                self._on_devices(),
                cache=self._cache,
                reach=self._reach(longest),
            )
        wants_any = (how.is_decoding_B & (how.alternatives_B >= 0)).any()
        self._unread_B += how.is_decoding_B
        likelihoods = drawn.likelihoods if wants_any else None
        return Pending(drawn.tokens_B, likelihoods, self._occupant_B.copy(), how.is_decoding_B.copy())

    def _step_body(self, params, arrays, edits, standing, occupants, cache, reach):
        tokens_B, position_B = standing
        takes_B = occupants.is_decoding_B & (position_B + 1 < occupants.end_B)
        if not self._rows.on_device:
            takes_B &= self._rows.holds(arrays, tokens_B)
        rows = self._rows.gather(arrays, tokens_B)
        if self._edits is not None:
            rows = self._edits.apply(edits, tokens_B, rows)
        # Slots that take no step must not write: a piece of a prompt may have been written there.
        at_B = jnp.where(takes_B, position_B, self.capacity)
        params = params | {"factors": occupants.factors}
        logits_BV, cache = self._decoder.step(params, rows, jnp.arange(self.slots), at_B, cache, reach)
        drawn = pieces.draw(
            self._config, logits_BV, occupants.draws, occupants.alternatives_B, position_B + 1, self._vocab_size
        )
        after = Standing(jnp.where(takes_B, drawn.tokens_B, tokens_B), position_B + takes_B)
        return drawn._replace(tokens_B=jnp.where(takes_B, drawn.tokens_B, -1)), after, cache

    def read(self, pending: Pending) -> Stepped:
        """Waits for a step, and returns what it brought. Steps are read in the order in which they were dispatched.

        Where rows are kept in a cache, this reads the rows of the last tokens that the cache lacks, those that a piece
        has displaced too.
        """
        drawn_B, found = jax.device_get((pending.tokens_B, pending.likelihoods))
        is_same_B = pending.occupant_B == self._occupant_B
        was_taken_B = is_same_B & (drawn_B >= 0)
        self._unread_B -= is_same_B & pending.is_decoding_B
        self._position_B += was_taken_B
        self._last_B = np.where(was_taken_B, drawn_B, self._last_B)
        self._hold()
        if found is None:
            B = self.slots
            found = Likelihoods(np.zeros(B, np.float32), np.zeros((B, 0), np.int32), np.zeros((B, 0), np.float32))
        return Stepped(np.where(was_taken_B, drawn_B, -1), *found, was_taken_B)

    def _hold(self):
        """Reads the rows of the last tokens that the cache of rows lacks."""
        if self._rows.on_device:
            return
        how = self._settings
        goes_on_B = how.is_decoding_B & (self._last_B >= 0) & (self._position_B + 1 < how.end_B)
        if goes_on_B.any():
            # All together: held one by one, one could displace another.
            self._rows.hold(self._last_B[goes_on_B])

    def _on_devices(self):
        """The settings of all slots on the devices."""
        if self._occupants is None:
            # Copied, because the arrays on the host change while the device may still read them.
            self._occupants = self._put(jax.tree.map(np.copy, self._settings))
        return self._occupants

    def _reach(self, positions: int) -> attention.Reach:
        """What attention reads of the cache for sequences of so many positions."""
        if self._is_cpu:
            ends = np.cumsum(attention.segments(self.capacity))
            return attention.Reach(segments=np.int32(np.searchsorted(ends, positions) + 1))
        # Each segment would launch many small kernels, and wait for the host. Powers of two, so that few spans compile.
        return attention.Reach(span=min(self.capacity, max(_SHORTEST_SPAN, next_power_of_two(positions))))
