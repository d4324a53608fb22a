"""GPU: the questions of small.py, asked of models of 5M to 30M parameters and up to 300 M tokens.

    python -m memoryllm_jax.compare --protocol=configs/protocols/gpu.py --workdir=DIR --texts=TEXTS

TEXTS holds at least 300 M tokens at 4,096 ids, such as a part of C4: no run passes over it twice. A run of the largest
models takes minutes on one GPU and the whole takes days; the experiments are in the order of their worth, and --only
chooses among them.
"""

import dataclasses
import pathlib

from memoryllm_jax.experiments import protocol
from memoryllm_jax.experiments.protocol import Experiment, Protocol, Sweep

SIZES = {  # heads of 64, and 5M, 14M and 31M parameters of attention and FFNs
    "S": {"model.dim": 256, "model.layers": 6, "model.heads": 4},
    "M": {"model.dim": 384, "model.layers": 8, "model.heads": 6},
    "L": {"model.dim": 512, "model.layers": 10, "model.heads": 8},
}
M = 1e6


def get_protocol() -> Protocol:
    small = protocol.load(str(pathlib.Path(__file__).with_name("small.py")))
    variants = {experiment.name: experiment.variants for experiment in small.experiments}
    main = variants["syllables"]
    changed = {
        "batch_size": 64,  # 65,536 tokens a step
        "seq_len": 1024,
        "model.dtype": "bfloat16",
        "model.loss_chunk": 4096,
        "checkpoint.every": 1000,
    }
    return dataclasses.replace(
        small,
        fields={**small.fields, **changed},
        sizes=SIZES,
        sweep=Sweep(
            tokens={"4096": 30 * M, "32000": 30 * M},
            rates=(5e-4, 1e-3, 2e-3),
            sizes={"S": "S", "M": "L", "L": "L"},
        ),
        vocabularies={ids: small.vocabularies[ids] for ids in ("4096", "32000")},
        experiments=(
            Experiment("answer", main, ("L",), ("4096", "32000"), (300 * M,)),
            Experiment("lengths", main, ("L",), ("4096", "32000"), (75 * M, 150 * M)),
            Experiment("seeds", main, ("L",), ("4096", "32000"), (75 * M,), (0, 1, 2)),
            Experiment("sizes", main, ("S", "M"), ("4096",), (75 * M, 150 * M, 300 * M)),
            Experiment("peers", variants["peers"], ("L",), ("4096",), (75 * M, 150 * M)),
        ),
        held_out_sizes=(),
        keep=("answer",),
    )
