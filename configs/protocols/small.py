"""Small: which token memories are worth their parameters, at four sizes and three vocabularies, on two CPU cores.

    python -m memoryllm_jax.compare --protocol=configs/protocols/small.py --workdir=DIR --texts=TEXTS --jobs=2

TEXTS holds 30 M tokens at 4,096 ids; no run passes over it twice. The experiments are in the order of their worth, so
that the first can be reported while the others train.
"""

from memoryllm_jax.experiments.protocol import Experiment, Protocol, Sweep, Variant

SIZES = {  # heads of 16
    "S": {"model.dim": 64, "model.layers": 4, "model.heads": 4},
    "M": {"model.dim": 96, "model.layers": 6, "model.heads": 6},
    "L": {"model.dim": 128, "model.layers": 6, "model.heads": 8},
    "XL": {"model.dim": 192, "model.layers": 6, "model.heads": 12},
}
MAIN = ("base", "memory", "flex-3", "no-memory-3", "ple-3", "rows-3")
PEERS = ("flex-1", "no-memory-0", "value-3", "bov-3", "bigram-3")
SIZED = ("base", "memory", "flex-1", "flex-3", "no-memory-0", "no-memory-3")
CONTROLLED = ("memory", "flex-3", "ple-3")
CONTROLS = tuple(
    Variant(f"{variant}-{rows}", variant, {"model.rows": rows}, rate_of=variant)
    for variant in CONTROLLED
    for rows in ("permuted", "shared", "frozen")
)
WITH_CONTROLS = (*CONTROLLED, *(variant.name for variant in CONTROLS))
SMALL = ("512", "4096")
SEEDS = (0, 1, 2)
M = 1e6


def get_protocol() -> Protocol:
    return Protocol(
        config="configs/tiny.py",
        fields={
            "batch_size": 8,  # 2,048 tokens a step, so that the shortest runs have 245 steps
            "seq_len": 256,
            "data.epochs": 1,
            "eval.every": 1_000_000,  # at the end only, and on little: the runs are compared by their scores
            "eval.batches": 32,
            "checkpoint.every": 1000,
            "checkpoint.keep": 1,
            "log.every": 100,
            "log.tensorboard": False,
            "sample.tokens": 0,
        },
        sizes=SIZES,
        vocabularies={str(ids): f"sentencepiece:train:{ids}" for ids in (512, 4096, 32000)},
        variants=(*(Variant(name) for name in (*MAIN, *PEERS)), *CONTROLS),
        sweep=Sweep(tokens=1 * M, rates=(2e-3, 4e-3, 8e-3), sizes={"S": "S", "M": "L", "L": "L", "XL": "L"}),
        experiments=(
            # 4 M tokens are 20 for each parameter of attention and FFNs in S.
            Experiment("vocabulary", MAIN, ("S",), SMALL, (0.5 * M, 1 * M, 2 * M, 4 * M), SEEDS),
            Experiment("words", MAIN, ("S",), ("32000",), (0.5 * M, 1 * M, 2 * M, 4 * M)),
            Experiment("controls", WITH_CONTROLS, ("S",), SMALL, (1 * M, 4 * M), SEEDS),
            Experiment("words-seeds", MAIN, ("S",), ("32000",), (1 * M,), SEEDS),
            Experiment("sizes", SIZED, ("M", "L"), ("4096",), (1 * M, 2 * M, 4 * M, 8 * M)),
            Experiment("peers", PEERS, ("S",), SMALL, (0.5 * M, 1 * M, 2 * M, 4 * M), SEEDS),
            Experiment("left-out", ("base", "memory", "flex-3"), ("XL",), ("4096",), (1 * M, 2 * M, 4 * M)),
            Experiment("words-peers", PEERS, ("S",), ("32000",), (1 * M,)),
            Experiment("words-controls", WITH_CONTROLS, ("S",), ("32000",), (1 * M,)),
        ),
        held_out_sizes=("XL",),
    )
