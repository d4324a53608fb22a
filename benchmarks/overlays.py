"""What it costs that each sequence of a batch has its own edits: time of a decode step, time to place edits, and bytes.

    python benchmarks/overlays.py --workdir=DIR --output=FILE
    python benchmarks/overlays.py --workdir=DIR --tol=FILE --rows=device --output=FILE

The sides share one model and take turns, so that each round gives ratios. `plain`: slots that can have no edits.
`room`: slots that could have edits, and have none. `each`: every slot has an overlay of its own, with new rows of some
tokens and suppressed keys of some layers; no two have a row or key in common. As in the server, the next step is
dispatched before the tokens of the last one are read. Edits have random values: all shapes are fixed, so that values do
not matter. Ratios of processor time are for CPUs; on an accelerator it is the host's alone.
"""

import time
from typing import Annotated, NamedTuple

import common
import jax
import numpy as np

from memoryllm_jax.common import cli
from memoryllm_jax.common.options import Option
from memoryllm_jax.inference.engine import Engine
from memoryllm_jax.inference.sampling import Sampling
from memoryllm_jax.inference.slots import Settings, Slots
from memoryllm_jax.tol import serving
from memoryllm_jax.tol.memory import Memory
from memoryllm_jax.tol.overlay import Overlay
from memoryllm_jax.tol.overlay_file import Edit
from memoryllm_jax.tol.slot_edits import KEYS_PER_SLOT, ROWS_PER_SLOT, SlotEdits

PROMPT = 16  # tokens
SIDES = ("plain", "room", "each")


def main(
    workdir: Annotated[str, Option("checkpoints of a model with FFN-M; its values do not matter")],
    tol: Annotated[str, Option("ToL file that rows are looked up in")] = "",
    rows: Annotated[str, Option("where the file's rows are: device, host or disk")] = "",
    slots: Annotated[int, Option("sequences that are generated together", least=1)] = 64,
    tokens: Annotated[int, Option("tokens with new rows of an overlay", least=0)] = ROWS_PER_SLOT,
    keys: Annotated[int, Option("suppressed keys of an overlay", least=0)] = KEYS_PER_SLOT,
    steps: Annotated[int, Option("decode steps of a round", least=1)] = 16,
    rounds: Annotated[int, Option("rounds", least=1)] = 9,
    output: Annotated[str, Option("JSON file for the record", writes=True)] = "",
) -> None:
    engine = serving.open_engine(workdir, tol, rows)
    memory = serving.memory_of(engine)
    overlays = [random_overlay(memory, slot, tokens, keys) for slot in range(slots)]
    sides = {name: _Side(name, engine, memory, overlays, (rounds + 1) * steps) for name in SIDES}
    for side in sides.values():
        side.round(steps)  # compiles
    taken: dict[str, list[_Seconds]] = {name: [] for name in SIDES}
    for number in range(rounds):
        turn = number % len(SIDES)  # each round starts with another side, so that order favours none
        for name in SIDES[turn:] + SIDES[:turn]:
            taken[name].append(sides[name].round(steps))
    results: dict = {}
    for clock in _Seconds._fields:
        times = {name: [getattr(seconds, clock) for seconds in taken[name]] for name in SIDES}
        results[clock] = {
            "step_ms": {name: common.spread([1e3 * x for x in times[name]]) for name in SIDES},
            "step_over_plain": {name: common.ratio(times[name], times["plain"]) for name in SIDES[1:]},
        }
    results |= {
        "place_ms": common.spread([1e3 * x for x in sides["each"].place_s]),
        "bytes": {"edits": sides["each"].bytes, "weights": engine.weights_bytes, "rows": engine.rows.stats()},
    }
    print(results)
    settings = {"slots": slots, "tokens": tokens, "keys": keys, "steps": steps, "rounds": rounds}
    common.write(output, results, {"model": engine.trained.facts()["model"], "settings": settings})
    engine.close()


def random_overlay(memory: Memory, number: int, tokens: int, keys: int) -> Overlay:
    """An overlay with new rows of `tokens` tokens and with `keys` suppressed keys, others for each number."""
    rng, overlay = np.random.default_rng(number), Overlay(memory)
    ids = rng.choice(memory.vocab_size, tokens, replace=False).astype(np.int32)
    new = rng.standard_normal((tokens, memory.layers, memory.dim), np.float32)
    if tokens:
        overlay.add(Edit(f"rows {number}", ids=ids, rows=new, mix=[[(int(token), 1.0)] for token in ids]))
    for key in range(keys):
        value, layer = rng.standard_normal(memory.dim, np.float32), (number + key) % memory.layers
        coefficients = rng.standard_normal(memory.vocab_size, np.float32)
        overlay.add(Edit(f"key {number} {key}", layer=layer, coefficients=coefficients, value=value))
    return overlay


class _Seconds(NamedTuple):
    """How long a step takes: by the clock, and in time of all processors, which depends less on other work here."""

    clock: float
    processors: float


class _Side:
    """Slots that generate.

    Attributes:
      place_s: seconds in which each overlay was placed.
      bytes: of the edits on the device.
    """

    def __init__(self, name: str, engine: Engine, memory: Memory, overlays: list[Overlay], most_tokens: int):
        count = len(overlays)
        edits = None if name == "plain" else SlotEdits(memory, engine.trained.mesh, count)
        self.bytes, self.place_s = 0 if edits is None else edits.bytes, []
        capacity = PROMPT + most_tokens + 2
        self._slots, self._pending = Slots(engine, count, capacity, edits), None
        rng = np.random.default_rng(0)
        for slot, overlay in enumerate(overlays):
            if name == "each":
                edits.check(overlay)  # as the server does while other sequences run
                start = time.perf_counter()
                edits.place(slot, overlay)
                jax.block_until_ready(edits.arrays)
                self.place_s.append(time.perf_counter() - start)
            self._slots.begin(slot, Settings(sampling=Sampling(0), end=capacity))
            prompt = rng.integers(0, engine.tokenizer.vocab_size, PROMPT).tolist()
            self._slots.read_piece(self._slots.prefill(slot, prompt, 0, scores=False, is_last=True))
        self.place_s = self.place_s[1:]  # the first one compiled

    def round(self, steps: int) -> _Seconds:
        """Takes decode steps. Returns: what one takes."""
        clock, processors, taken = time.perf_counter(), time.process_time(), 0
        # A slot whose row has to be read from the file first takes its step later.
        while taken < steps * self._slots.slots:
            pending = self._slots.step()
            if self._pending is not None:
                taken += self._slots.read(self._pending).was_taken_B.sum()
            self._pending = pending
        return _Seconds((time.perf_counter() - clock) / steps, (time.process_time() - processors) / steps)


if __name__ == "__main__":
    cli.run(main)
