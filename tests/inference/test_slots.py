"""Sequences that join and leave a batch between its steps."""

import dataclasses
import types

import jax.numpy as jnp
import numpy as np
import pytest
from lab import CONTEXT, HostRows, random_decoder

from memoryllm_jax.common.errors import ArgumentError
from memoryllm_jax.inference import generation, scoring
from memoryllm_jax.inference.decoder import Decoder
from memoryllm_jax.inference.engine import Contribution
from memoryllm_jax.inference.rows import RowSource
from memoryllm_jax.inference.sampling import Sampling
from memoryllm_jax.inference.slots import Settings, Slots

VOCAB, CAPACITY, SLOTS = 60, 160, 4  # attention over more than 128 positions takes several tiles
HOW = (Sampling(0.0), Sampling(0.9), Sampling(1.1, top_k=30, top_p=0.9))


@dataclasses.dataclass
class Request:
    """A sequence, the size of its prompt's pieces, whether they are scored, and what its slot has given so far."""

    prompt: list[int]
    settings: Settings
    piece: int = 16
    scores: bool = False

    def __post_init__(self):
        self.tokens, self.values, self.scored, self.entered = [], [], [], 0

    @property
    def is_done(self):
        return len(self.prompt) + len(self.tokens) == self.settings.end

    def add(self, token, values):
        assert not self.is_done
        self.tokens.append(int(token))
        self.values.append(np.concatenate([np.ravel(x) for x in values]))


class Model:
    """What `Slots` need of an engine."""

    def __init__(self, decoder: Decoder, rows: RowSource):
        self.decoder, self.rows, self.config = decoder, rows, decoder.config
        self.tokenizer = types.SimpleNamespace(vocab_size=VOCAB)
        self.context = CAPACITY


def serve(slots, requests, rng=None):
    """Runs requests as a scheduler does: pieces between steps, and a step dispatched before the last one is read.

    Args:
      rng: decides when a request enters, and its slot; else it enters the first free one at once.
    """
    waiting, running, unread = list(requests), {}, []
    while waiting or running or unread:
        free = [slot for slot in range(slots.slots) if slot not in running]
        if waiting and free and (rng is None or rng.random() < 0.3 or not running):
            slot = free[0] if rng is None else int(rng.choice(free))
            running[slot] = waiting.pop(0)
            slots.begin(slot, running[slot].settings)
        for slot, request in running.items():
            ids = request.prompt[request.entered :][: request.piece]
            if ids:
                is_last = request.entered + len(ids) == len(request.prompt)
                unread.append((request, slots.prefill(slot, ids, request.entered, request.scores, is_last)))
                request.entered += len(ids)
        is_decoding = any(r.entered == len(r.prompt) and not r.is_done for r in running.values())
        if is_decoding:
            unread.append((None, slots.step()))
        while len(unread) > is_decoding:
            read(slots, running, *unread.pop(0))
        for slot in [slot for slot, request in running.items() if request.is_done]:
            slots.end(slot)
            del running[slot]


def read(slots, running, request, result):
    if request is None:
        found = slots.read(result)
        for slot, stepping in running.items():
            if found.was_taken_B[slot]:
                count = max(stepping.settings.alternatives, 0)
                values = found.top_ids_BK[slot, :count], found.top_logprobs_BK[slot, :count]
                stepping.add(found.tokens_B[slot], (found.logprob_B[slot], *values))
        return
    piece = slots.read_piece(result)
    if piece.scores is not None:
        request.scored += [np.concatenate([np.ravel(x[i]) for x in piece.scores]) for i in range(len(piece.scores[0]))]
    if piece.token is not None:
        count = max(request.settings.alternatives, 0)
        request.add(piece.token, (piece.logprob, piece.top_ids_K[:count], piece.top_logprobs_K[:count]))


def some_requests(seed=0, most=17, count=10, vocab=VOCAB, ways=HOW, long=()):
    """Requests of each way to draw, numbered as one call of `generate` for each would number them.

    Args:
      most: prompts are shorter.
      long: numbers of requests with long texts.
    """
    rng, out = np.random.default_rng(seed), []
    for k in range(count):
        length, new = (120, 25) if k in long else (int(rng.integers(1, most)), int(rng.integers(2, 12)))
        how, number = ways[k % len(ways)], k // len(ways)
        settings = Settings(5, number, how, length + new, alternatives=int(rng.integers(-1, 4)))
        prompt = rng.integers(3, vocab, length).tolist()
        out.append(Request(prompt, settings, int(rng.integers(1, 17)), scores=k % 3 == 0))
    return out


def generated(model, requests):
    """The texts of `generate` alone, in the order of the requests."""
    texts = {}
    for how in {r.settings.sampling for r in requests}:
        members = [r for r in requests if r.settings.sampling == how]
        most = max(r.settings.end - len(r.prompt) for r in members)
        arguments = model.decoder, model.rows, [r.prompt for r in members], most, how, 5
        for new in generation.generate(*arguments, model.context, model.tokenizer.vocab_size):
            for number, token in new:
                texts.setdefault((how, number), []).append(token)
    found = [texts[r.settings.sampling, r.settings.number] for r in requests]
    return [text[: r.settings.end - len(r.prompt)] for text, r in zip(found, requests)]


@pytest.fixture(scope="module")
def model(make_config):
    decoder, live, _ = random_decoder(make_config("flex-3", **{"model.vocab_size": 64}).model)
    return Model(decoder, live)


@pytest.fixture(scope="module")
def served(model):
    """(requests that were served one after the other, the slots)"""
    slots, requests = Slots(model, SLOTS, CAPACITY), some_requests(long=(4,))
    for request in requests:
        serve(slots, [request])
    return requests, slots


def test_texts_are_those_of_generate_whatever_the_pieces(model, served):
    requests, _ = served
    assert [r.tokens for r in requests] == generated(model, requests)
    assert len({token for r in requests for token in r.tokens}) > 20


@pytest.mark.parametrize("place", ["live", "host"])
def test_results_have_the_same_bits_whatever_else_is_in_the_batch(model, served, place):
    expected, slots = served
    rng = np.random.default_rng(1)
    if place == "host":
        slots = Slots(Model(model.decoder, HostRows(model.rows)), SLOTS, CAPACITY)
    order = rng.permutation(len(expected))
    requests = [some_requests(long=(4,))[k] for k in order]
    serve(slots, requests, rng)
    for k, found in zip(order, requests):
        assert found.tokens == expected[k].tokens
        np.testing.assert_array_equal(np.stack(found.values), np.stack(expected[k].values))
        np.testing.assert_array_equal(found.scored, expected[k].scored)


def test_log_probabilities_are_those_of_the_whole_text(model, served):
    requests, _ = served
    whole = [r.prompt + r.tokens for r in requests]
    scores = scoring.score(model.decoder, model.rows, whole, CAPACITY)
    for r, expected in zip(requests, scores):
        if r.settings.alternatives >= 0:
            found = np.stack(r.values)
            np.testing.assert_allclose(found[:, 0], expected.log_probs_T[-len(found) :], atol=2e-5)
            ids, log_probs = np.split(found[:, 1:], 2, axis=1)
            assert (np.diff(log_probs) <= 0).all()
            if ids.size:
                np.testing.assert_array_equal(ids[:, 0] == r.tokens, expected.greedy_T[-len(found) :])
        if r.scores:
            assert len(r.scored) == len(r.prompt)
            np.testing.assert_allclose(
                [x[0] for x in r.scored[1:]], expected.log_probs_T[: len(r.prompt) - 1], atol=2e-5
            )


@pytest.mark.parametrize(
    "architecture, overrides, mesh",
    [
        ("base", {"model.kv_heads": 2}, (1, 1, 2)),
        ("value-3", {"model.tie_embeddings": True}, (2, 1, 2)),
    ],
)
def test_other_models_and_meshes(make_config, architecture, overrides, mesh):
    decoder, rows, _ = random_decoder(make_config(architecture, **{"model.vocab_size": 64, **overrides}).model, mesh)
    model, requests = Model(decoder, rows), some_requests(2, count=6, ways=HOW[:1])
    serve(Slots(model, SLOTS, 32), requests, np.random.default_rng(0))
    assert [r.tokens for r in requests] == generated(model, requests)
    if mesh[0] == 2:
        with pytest.raises(ArgumentError, match="slots: expected a multiple of the mesh's 2 batch shards, found 3"):
            Slots(model, 3, 32)


def test_rows_of_a_file_whose_cache_is_too_small_for_the_batch(lab):
    with lab.model("tied", lab.tol("tied"), "disk", 1024) as model:
        requests = some_requests(3, count=6, vocab=500, ways=HOW[2:])
        serve(Slots(model, SLOTS, CONTEXT), requests, np.random.default_rng(0))
        assert [r.tokens for r in requests] == generated(model, requests)
        assert model.rows.misses > 0


class FakeEdits:
    """Edits that add a number of its own for each slot to the rows of even tokens."""

    def __init__(self, added_B):
        self.arrays = jnp.asarray(added_B, jnp.float32)

    def apply(self, arrays, ids_B, rows):
        added_1B1 = jnp.where(ids_B % 2 == 0, arrays, 0)[None, :, None]
        return rows._replace(rows_LSUP=[y + added_1B1 for y in rows.rows_LSUP])

    def apply_to_slot(self, arrays, slot, ids_U, rows):
        added_1U1 = jnp.where(ids_U % 2 == 0, arrays[slot], 0)[None, :, None]
        return rows._replace(rows_LSUP=[y + added_1U1 for y in rows.rows_LSUP])


class EditedRows:
    """Rows with the edits of a slot that can be set, so that `generate` compiles once for all of them."""

    on_device = True

    def __init__(self, live, edits):
        self.live, self.edits, self.slot = live, edits, 0

    @property
    def arrays(self):
        return self.live.arrays, self.edits.arrays, jnp.int32(self.slot)

    def fetch(self, ids_U):
        return self.edits.apply_to_slot(self.edits.arrays, self.slot, ids_U, self.live.fetch(ids_U))

    def gather(self, arrays, ids_U):
        live, edits, slot = arrays
        return self.edits.apply_to_slot(edits, slot, ids_U, self.live.gather(live, ids_U))


def test_each_slot_has_its_own_edits_and_contribution(model):
    contributions = Contribution(), Contribution(0.3), Contribution(1, 0.5, (0,)), Contribution(1, 1, (), (1,))
    edits = FakeEdits([0.5, 0.0, -0.5, 2.0])
    requests = some_requests(4, count=SLOTS, ways=HOW[:1])
    for k, (r, contribution) in enumerate(zip(requests, contributions)):
        r.settings = r.settings._replace(number=k, contribution=contribution)
    serve(Slots(model, SLOTS, 32, edits), requests)
    texts, rows = [], EditedRows(model.rows, edits)
    for rows.slot, (r, contribution) in enumerate(zip(requests, contributions)):
        decoder, new = model.decoder.scaled(*contribution.factors(model.config)), r.settings.end - len(r.prompt)
        # More tokens than are asked for, so that all of these texts have the same shapes.
        steps = generation.generate(decoder, rows, [r.prompt], 16, HOW[0], 0, CAPACITY, VOCAB)
        texts.append([token for [(_, token)] in steps][:new])
    assert [r.tokens for r in requests] == texts


def test_a_new_occupant_never_sees_a_token_of_the_old_one(model, served):
    _, slots = served
    old, new = Request([5, 6], Settings(end=30)), Request([7, 8, 9], Settings(sampling=HOW[0], end=12))
    slots.begin(0, old.settings)
    slots.prefill(0, old.prompt, 0, False, True)
    pending = [slots.step(), slots.step()]
    assert slots.read(pending[0]).was_taken_B.tolist() == [True, False, False, False]
    slots.begin(0, new.settings)
    piece = slots.prefill(0, new.prompt, 0, False, True)
    late = slots.read(pending[1])
    assert not late.was_taken_B.any() and (late.tokens_B == -1).all()
    tokens = [slots.read_piece(piece).token]
    while len(new.prompt) + len(tokens) < new.settings.end:
        tokens.append(int(slots.read(slots.step()).tokens_B[0]))
    slots.end(0)
    serve(slots, [new])
    assert tokens == new.tokens


@pytest.mark.parametrize(
    "settings, problem",
    [
        (Settings(seed=-1), "seed: expected a number from 0 to 4294967295, found -1"),
        (Settings(end=CAPACITY + 1), f"end: expected at most {CAPACITY} positions, found {CAPACITY + 1}"),
        (Settings(alternatives=21), "alternatives: expected a number from -1 to 20, found 21"),
        (Settings(contribution=Contribution(drop_layers=(2,))), "drop_layers: expected layers from 0 to 1, found 2"),
    ],
)
def test_invalid_settings_are_refused(served, settings, problem):
    with pytest.raises(ArgumentError, match=f"^{problem}$"):
        served[1].begin(0, settings)
