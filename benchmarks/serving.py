"""Builds a ToL file, and times decoding by `generate` at several batch sizes against the memory's bandwidth.

    python benchmarks/serving.py --output=benchmarks/results/NAME.json
    python benchmarks/serving.py --sides=llama --output=benchmarks/results/NAME.json

Sides: base, memory with live rows, memory with the ToL file's rows on the device, in host memory or on disk, and llama:
base in transformers, with a static cache, which is compiled on a GPU. llama needs PyTorch, and a process of its own. A
call to the device takes as many steps as in the command `generate` without streaming; of a side with /streamed, one.

The models are untrained. Prompts are tokens of prepared data, or drawn at random (synthetic.py). Texts are sampled at
temperature 1, so that tokens hardly repeat and nearly every row from host or disk is a new one; the file's pages are in
the page cache if memory has room for them. A step's time is the difference of two texts' times, by the difference of
their lengths: prefill and start are not in it. decode.py compares sides on real text, in turns, at batch 1.

The least time of a step is that of reading each needed byte once at the measured bandwidth: weights, the rows of its
tokens, and keys and values of the earlier positions.
"""

import contextlib
import dataclasses
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Annotated

import common
import numpy as np
import peers
import synthetic
import untrained

from memoryllm_jax.common import cli, options
from memoryllm_jax.common.errors import ArgumentError
from memoryllm_jax.common.options import Option
from memoryllm_jax.config import Config, default, resolve
from memoryllm_jax.data.dataset import Dataset
from memoryllm_jax.inference.generation import STEPS_PER_CALL
from memoryllm_jax.inference.sampling import Sampling
from memoryllm_jax.model import flops
from memoryllm_jax.tol import compress
from memoryllm_jax.tol.serving import PLACES, open_engine

SIDES = ("device", "device/streamed", "live", "base", "host", "disk")
# A function that samples a text of so many tokens for each prompt, and waits for them
Generate = Callable[[list[list[int]], int], object]


@dataclasses.dataclass(frozen=True)
class Settings:
    """What is measured."""

    data: Annotated[str, Option("prepared data; by default ids drawn at random")] = ""
    vocab_size: Annotated[int, Option("vocabulary size of ids drawn at random")] = 128_256
    sides: Annotated[tuple[str, ...], Option(f"of {', '.join(SIDES)}; or llama alone")] = SIDES
    dim: Annotated[int, Option("model width")] = 2048
    layers: Annotated[int, Option("layers")] = 24
    heads: Annotated[int, Option("heads")] = 32
    dtype: Annotated[str, Option("of the computation", choices=("float32", "bfloat16"))] = "bfloat16"
    batches: Annotated[tuple[str, ...], Option("numbers of texts that are sampled together")] = ("1", "32")
    platform: Annotated[str, Option("device of llama; the others' is JAX's", choices=("cpu", "gpu"))] = "gpu"
    prompt: Annotated[int, Option("tokens of a prompt", least=1)] = 1024
    tokens: Annotated[int, Option("tokens of the longer texts; the shorter ones have a quarter of it", least=4)] = 256
    rounds: Annotated[int, Option("times that each pair of texts is sampled", least=1)] = 4

    def __post_init__(self):
        options.check(self)
        if "llama" in self.sides and len(self.sides) > 1:
            raise ArgumentError("sides", f"expected llama alone, found {','.join(self.sides)}")
        for side in self.sides:
            if side not in (*SIDES, "llama"):
                raise ArgumentError("sides", f"expected sides of {', '.join(SIDES)}, or llama, found {side}")

    @property
    def context(self) -> int:
        return self.prompt + self.tokens + 1


def config_of(architecture: str, dataset: Dataset, settings: Settings) -> Config:
    """The config of an untrained model."""
    c = default(architecture)
    c.model.update({name: getattr(settings, name) for name in ("dim", "layers", "heads", "dtype")})
    c.model.vocab_size, c.seq_len = dataset.vocab_size, settings.context
    return resolve(c)


def least_bytes(config: Config, side: str, batch: int, positions: float) -> float:
    """Bytes that a decode step must read, each once.

    Args:
      config: of base or memory, as the side has it.
      batch: sequences.
      positions: earlier positions of each sequence.
    """
    m, parts = config.model, flops.parameters(config)
    numbers = parts["active"] + m.vocab_size * m.dim  # the output head
    if side == "live":
        numbers += parts["memory"]
    rows = 1  # of width dim for each token: its embedding, and from a file those of the layers
    if side.split("/")[0] in PLACES:
        rows += m.layers
    numbers += batch * rows * m.dim
    numbers += batch * positions * m.layers * 2 * m.key_heads * m.head_dim
    return numbers * np.dtype("float32").itemsize / (2 if m.dtype == "bfloat16" else 1)


def seconds_a_step(generate: Generate, prompts: list[list[int]], settings: Settings) -> list[float]:
    """The time of a decode step, measured `rounds` times. Everything is compiled before."""
    few, many = settings.tokens // 4, settings.tokens

    def seconds(tokens: int) -> float:
        start = time.perf_counter()
        generate(prompts, tokens)
        return time.perf_counter() - start

    for tokens in (few, many):
        seconds(tokens)
    return [(seconds(many) - seconds(few)) / (many - few) for _ in range(settings.rounds)]


@contextlib.contextmanager
def opened(side: str, folder: str) -> Iterator[tuple[Generate, Callable[[], dict]]]:
    """Opens a side. Yields: (its `Generate`, a function that returns its statistics of rows)."""
    architecture = "base" if side == "base" else "memory"
    side, _, streamed = side.partition("/")
    steps = 1 if streamed else STEPS_PER_CALL
    tol = f"{folder}/tol.safetensors" if side in PLACES else ""
    engine = open_engine(f"{folder}/{architecture}", tol, side if tol else "")

    def generate(prompts, tokens):
        for _ in engine.generate(prompts, tokens, Sampling(1.0), steps_per_call=steps):
            pass

    with contextlib.closing(engine):
        yield generate, engine.rows.stats


@contextlib.contextmanager
def opened_llama(config: Config, platform: str) -> Iterator[tuple[Generate, Callable[[], dict]]]:
    """As `opened`, for base in transformers."""
    import torch
    from transformers import StoppingCriteria

    device = "cuda" if platform == "gpu" else "cpu"
    model = peers.llama_model(config.model, config.seq_len, device, config.model.dtype).eval()
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = None, 0

    class After(StoppingCriteria):
        """Ends texts at a length below max_length, which is the same for all texts so that one shape compiles."""

        def __init__(self, length):
            self.length = length

        def __call__(self, input_ids, scores, **_):
            return torch.full((len(input_ids),), input_ids.shape[1] >= self.length, device=input_ids.device)

    def generate(prompts, tokens):
        ids = torch.tensor(prompts, device=device)
        how = {"do_sample": True, "temperature": 1.0, "top_k": 0, "cache_implementation": "static"}
        end = After(ids.shape[1] + tokens)
        return model.generate(
            ids, attention_mask=torch.ones_like(ids), max_length=config.seq_len - 1, stopping_criteria=[end], **how
        ).cpu()

    yield generate, dict


def measure(settings: Settings, folder: str, dataset: Dataset, write: Callable[[dict], None]) -> None:
    """Times all sides, and calls `write` with all results so far after each."""
    bandwidth = common.bandwidth(0 if settings.dim >= 512 else 1 << 26) if settings.sides != ("llama",) else None
    results = {}
    for side in settings.sides:
        config = config_of("base" if side in ("base", "llama") else "memory", dataset, settings)
        with opened_llama(config, settings.platform) if side == "llama" else opened(side, folder) as (generate, stats):
            for batch in map(int, settings.batches):
                stream = dataset.validation.read(0, batch * settings.prompt)
                prompts = stream.reshape(batch, -1).tolist()
                seconds = seconds_a_step(generate, prompts, settings)
                # The mean over the steps between the shorter and the longer text.
                needed = least_bytes(config, side, batch, settings.prompt + settings.tokens * 5 / 8)
                found = {"ms_a_step": [1e3 * s for s in seconds], "least_bytes": needed, "rows": stats()}
                if bandwidth:
                    found |= {"least_ms": 1e3 * needed / bandwidth}
                    found |= {"over_least": statistics.median(found["ms_a_step"]) / found["least_ms"]}
                results[f"{side}, batch {batch}"] = found
                print(f"{side}, batch {batch}: {statistics.median(found['ms_a_step']):.2f} ms a step", flush=True)
                write({"bandwidth": bandwidth, "results": results})


def build(folder: str, dataset: Dataset, settings: Settings) -> dict:
    """Makes the untrained models, and builds the ToL file of memory. Returns: time and size of the build."""
    for architecture in ("base", "memory"):
        untrained.write(config_of(architecture, dataset, settings), dataset, f"{folder}/{architecture}")
    tol = f"{folder}/tol.safetensors"
    start = time.perf_counter()
    print(compress.precompute(f"{folder}/memory", tol, compress.Options()), flush=True)
    return {"seconds": time.perf_counter() - start, "bytes": os.path.getsize(tol)}


def main(
    settings: Settings,
    output: Annotated[str, Option("JSON file for the result", writes=True)] = "",
    scratch: Annotated[str | None, Option("folder for temporary files: at 1b, 27 GB")] = None,
) -> None:
    more = {"settings": dataclasses.asdict(settings) | {"data": bool(settings.data)}}
    if settings.sides == ("llama",):
        more["device"] = peers.gpu_facts()["device"] if settings.platform == "gpu" else "cpu"
    else:
        import jax

        more["device"] = jax.devices()[0].device_kind
    with tempfile.TemporaryDirectory(dir=scratch) as folder:
        data = settings.data
        if not data:
            data = f"{folder}/data"
            synthetic.write(data, settings.vocab_size, 1000)
        dataset = Dataset(data)
        needed = settings.prompt * max(map(int, settings.batches))
        if dataset.validation.tokens < needed:
            found = f"found {dataset.validation.tokens:,}"
            raise ArgumentError("data", f"expected {needed:,} held-out tokens for the prompts, {found}")

        def write(found: dict) -> None:
            common.write(output, found.pop("results"), more | found)

        if settings.sides != ("llama",):
            more["tol_build"] = build(folder, dataset, settings)
            write({"results": {}})
        measure(settings, folder, dataset, write)


if __name__ == "__main__":
    cli.run(main)
