"""Small: which token memories are worth their parameters, at four sizes and three vocabularies, on two CPU cores.

    python -m memoryllm_jax.compare --protocol=configs/protocols/small.py --workdir=DIR --texts=TEXTS

TEXTS holds train-*.json.gz and validation-*.json.gz.
"""

from memoryllm_jax.experiments.protocol import Experiment, Protocol, Sweep, Variant

SIZES = {
    "S": {"model.dim": 64, "model.layers": 4, "model.heads": 4},
    "M": {"model.dim": 96, "model.layers": 6, "model.heads": 6},
    "L": {"model.dim": 128, "model.layers": 6, "model.heads": 8},
    "XL": {"model.dim": 192, "model.layers": 6, "model.heads": 12},
}
VARIANTS = ("base", "memory", "flex-1", "flex-3", "no-memory-0", "no-memory-3", "value-3", "ple-3")


def get_protocol() -> Protocol:
    return Protocol(
        config="configs/tiny.py",
        # 2,048 tokens a step, so that the shortest runs have a few hundred steps.
        fields={
            "batch_size": 8,
            "seq_len": 256,
            "data.epochs": 4,
        },
        sizes=SIZES,
        vocabularies={str(ids): f"sentencepiece:train:{ids}" for ids in (512, 4096, 32000)},
        variants=tuple(Variant(name) for name in VARIANTS),
        sweep=Sweep(tokens=1e6, rates=(2e-3, 4e-3, 8e-3), sizes={"S": "S", "M": "M", "L": "M", "XL": "M"}),
        experiments=(
            Experiment("vocabulary", VARIANTS, ("S",), ("512", "4096", "32000"), (0.5e6, 1e6, 2e6, 4e6), (0, 1, 2)),
        ),
        held_out_sizes=("XL",),
    )
