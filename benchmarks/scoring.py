"""Time and memory of scoring a window of text: ours, and transformers on PyTorch with the same weights.

    python benchmarks/scoring.py --hf=HF_DIR --workdir=DIR --output=benchmarks/results/NAME.json

HF_DIR is a Llama in safetensors, and DIR what `export --import=HF_DIR --workdir=DIR` made of it. Each round runs each
side in a process of its own, so that peak memory is that of one side, and the first window includes what is compiled.
The ids are random, because the time does not depend on them. Both sides compute in float32, and give the
log-probability of every id; their means must agree.
"""

import dataclasses
import json
import os
import time
from collections.abc import Callable
from typing import Annotated

import common
import numpy as np
import workers

from memoryllm_jax.common import cli
from memoryllm_jax.common.errors import UserError
from memoryllm_jax.common.options import Option

SIDES = ("ours", "transformers")
_WINDOWS = 2  # windows after the first


@dataclasses.dataclass(frozen=True)
class Settings:
    """What is measured."""

    hf: Annotated[str, Option("Hugging Face directory of a Llama")]
    workdir: Annotated[str, Option("the same model, imported")]
    tokens: Annotated[int, Option("positions of the window")] = 4096
    rounds: Annotated[int, Option("processes of each side")] = 3


def our_scores(settings: Settings):
    """Loads the model. Returns: function of ids [T + 1] -> log-probabilities [T]; and the number of ids."""
    from memoryllm_jax.inference import scoring
    from memoryllm_jax.tol.serving import open_engine

    engine = open_engine(settings.workdir, dtype="float32")

    def score(ids):
        return scoring.score(engine.decoder, engine.rows, [ids.tolist()], settings.tokens)[0].log_probs_T

    return score, engine.config.vocab_size


def their_scores(settings: Settings):
    """The same by transformers with SDPA, which holds the logits of the whole window at once."""
    import torch
    import transformers

    torch.set_num_threads(os.cpu_count())
    model = transformers.AutoModelForCausalLM.from_pretrained(
        settings.hf, attn_implementation="sdpa", dtype=torch.float32
    ).eval()

    def score(ids):
        ids = torch.tensor(ids[None].astype(np.int64))
        with torch.inference_mode():
            logits = model(input_ids=ids[:, :-1], use_cache=False).logits[0]
            targets = logits.gather(-1, ids[0, 1:, None])[:, 0]
            # In parts, because the exponentials of the whole window would take as much memory again as its logits.
            return (targets - torch.cat([part.logsumexp(-1) for part in logits.split(256)])).numpy()

    return score, model.config.vocab_size


def prepare(side: str, settings: Settings) -> tuple[dict, Callable[[], dict]]:
    """Loads the model.

    Returns: the seconds that it took, and a function that scores a window and returns its figures.
    """
    start = time.perf_counter()
    score, vocab_size = (our_scores if side == "ours" else their_scores)(settings)
    load = time.perf_counter() - start
    ids = np.random.default_rng(0).integers(3, vocab_size, settings.tokens + 1)

    def measure():
        start = time.perf_counter()
        mean = float(score(ids).mean(dtype=float))
        return {"seconds": time.perf_counter() - start, "mean": mean, "peak": common.peak_memory()}

    return {"load": load}, measure


def measure_process(side: str) -> dict[str, float]:
    """The figures of one process of a side. Raises: FailedError."""
    worker = workers.Worker(side, ("--nocompile_cache",))
    load = worker.read()["load"]
    first, *later = [worker.round() for _ in range(1 + _WINDOWS)]
    worker.end()
    fastest = min(found["seconds"] for found in later)
    return {"load": load, "first": first["seconds"], "later": fastest} | {
        name: later[-1][name] for name in ("peak", "mean")
    }


def main(
    settings: Settings,
    output: Annotated[str, Option("JSON file for the result", writes=True)] = "",
    worker: Annotated[str, Option("internal: the side that this process measures")] = "",
) -> None:
    if worker:
        return workers.serve(lambda: prepare(worker, settings))
    rounds = {side: [] for side in SIDES}
    for number in range(settings.rounds):
        for side in SIDES if number % 2 == 0 else SIDES[::-1]:  # so that order favours none
            rounds[side].append(measure_process(side))
            print(side, rounds[side][-1], flush=True)
    means = [figures["mean"] for side in SIDES for figures in rounds[side]]
    if max(means) - min(means) > 1e-4:
        raise UserError(f"expected the same mean log-probability everywhere, found {min(means)} to {max(means)}")
    names = ("load", "first", "later", "peak")
    results = {side: {name: [figures[name] for figures in rounds[side]] for name in names} for side in SIDES}
    results["transformers over ours"] = {
        name: common.ratio(results["transformers"][name], results["ours"][name]) for name in names
    }
    print(json.dumps(results["transformers over ours"], indent=1))
    common.write(output, results, {"settings": {"tokens": settings.tokens, "rounds": settings.rounds}})


if __name__ == "__main__":
    cli.run(main)
