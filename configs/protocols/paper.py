"""Paper: base, memory and flex-3 on text that teaches facts and rules, for the analyses of the MemoryLLM paper.

    python benchmarks/paper.py --work=DIR --english=TEXTS --stages=text
    python -m memoryllm_jax.compare --protocol=configs/protocols/paper.py --workdir=DIR --texts=DIR/texts --jobs=2

Size S of small.py. After these tokens its models answer the tasks of benchmarks/recall_reasoning.py above chance, but
for lookup, which some seeds of each have not learnt (docs/experiments.md).
"""

import pathlib

from memoryllm_jax.experiments import protocol
from memoryllm_jax.experiments.protocol import Experiment, Protocol, Sweep, Variant

VARIANTS = ("base", "memory", "flex-3")
M = 1e6


def get_protocol() -> Protocol:
    small = protocol.load(str(pathlib.Path(__file__).with_name("small.py")))
    return Protocol(
        config=small.config,
        fields=small.fields,
        sizes={"S": small.sizes["S"]},
        vocabularies={"1024": "sentencepiece:train:1024"},
        variants=tuple(Variant(name) for name in VARIANTS),
        sweep=Sweep(tokens={"1024": 0.5 * M}, rates=(4e-3, 8e-3, 16e-3), sizes={"S": "S"}),
        experiments=(Experiment("learnt", VARIANTS, ("S",), ("1024",), (2 * M,), (0, 1, 2)),),
        keep=("learnt",),
    )
