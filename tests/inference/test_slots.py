"""Sequences that join and leave a batch between its steps, in a model with random weights."""

import dataclasses
import types

import numpy as np
import pytest
from lab import HostRows, random_decoder

from memoryllm_jax.inference import generation
from memoryllm_jax.inference.sampling import Sampling
from memoryllm_jax.inference.slots import Settings, Slots

GREEDY, VOCAB, CAPACITY, SLOTS = Sampling(temperature=0), 60, 300, 4


@dataclasses.dataclass
class Request:
    """One sequence, and what its slot gave for it."""

    prompt: list[int]
    settings: Settings
    piece: int = 16
    scores: bool = False

    def __post_init__(self):
        self.tokens, self.values, self.scored, self.entered = [], [], [], 0


def engine(decoder, rows):
    """What `Slots` need of an engine."""
    tokenizer = types.SimpleNamespace(vocab_size=VOCAB)
    return types.SimpleNamespace(decoder=decoder, rows=rows, config=decoder.config, tokenizer=tokenizer)


def serve(slots, requests, order=None, rng=None):
    """Runs requests as a scheduler does: pieces between steps, the next step dispatched before the last one is read.

    Args:
      order: (slot, request) by which requests enter, in place of the first free slot.
      rng: decides at random when requests enter.
    """
    waiting, running, unread = list(requests), {}, []
    while waiting or running or unread:
        free = [slot for slot in range(SLOTS) if slot not in running]
        if waiting and free and (rng is None or rng.random() < 0.5 or not running):
            slot = free[0] if rng is None else int(rng.choice(free))
            running[slot] = waiting.pop(0)
            slots.begin(slot, running[slot].settings)
        for slot, r in running.items():
            if r.entered < len(r.prompt):
                ids = r.prompt[r.entered : r.entered + r.piece]
                is_last = r.entered + len(ids) == len(r.prompt)
                unread.append((slot, r, slots.prefill(slot, ids, r.entered, r.scores, is_last)))
                r.entered += len(ids)
        if slots.is_running:
            unread.append((None, None, slots.step()))
        while len(unread) > (1 if slots.is_running else 0):
            slot, r, result = unread.pop(0)
            if r is None:
                found = slots.read(result)
                for slot, r in running.items():
                    if found.was_taken_B[slot]:
                        add(r, found.tokens_B[slot], [x[slot] for x in found[1:4]])
            else:
                found = slots.read_piece(result)
                r.scored += [] if found.scores is None else list(found.scores.log_probs_T)
                if found.token is not None:
                    add(r, found.token, found[2:])
            for slot, r in list(running.items()):
                if len(r.prompt) + len(r.tokens) >= r.settings.end:
                    slots.end(slot)
                    del running[slot]
    return requests


def add(request, token, values):
    assert len(request.prompt) + len(request.tokens) < request.settings.end
    request.tokens.append(int(token))
    if request.settings.alternatives >= 0:
        request.values.append(np.concatenate([np.ravel(x) for x in values]))


def alone(decoder, rows, request):
    s = request.settings
    new = s.end - len(request.prompt)
    steps = generation.generate(decoder, rows, [request.prompt], new, s.sampling, s.seed, CAPACITY, VOCAB)
    return [token for [(_, token)] in steps]


def some_requests(count, rng):
    out = []
    for k in range(count):
        n, new = int(rng.integers(1, 60)), int(rng.integers(1, 20))
        if k == 3:
            n, new = 120, 30  # its span grows while it runs
        how = [GREEDY, Sampling(0.9), Sampling(1.1, top_k=9), Sampling(0.8, top_p=0.9), Sampling(1.0, 20, 0.8)][k % 5]
        settings = Settings(k, 0, how, n + new, alternatives=int(rng.integers(-1, 4)))
        out.append(Request(rng.integers(3, VOCAB, n).tolist(), settings, int(rng.integers(1, 17)), k % 3 == 0))
    return out


@pytest.fixture(scope="module")
def model(make_config):
    decoder, live, _ = random_decoder(make_config("flex-3", **{"model.vocab_size": 64}).model)
    return decoder, live


@pytest.mark.parametrize("place", ["live", "host"])
def test_texts_are_those_of_generate(model, place):
    decoder, live = model
    rows = live if place == "live" else HostRows(live)
    requests = some_requests(12, np.random.default_rng(0))
    serve(Slots(engine(decoder, rows), SLOTS, CAPACITY), requests)
    for r in requests:
        assert r.tokens == alone(decoder, live, r)
