"""Trains the models of a protocol and compares them: which token memory is worth its parameters, and when.

    python -m memoryllm_jax.compare --protocol=configs/protocols/small.py --workdir=DIR --texts=TEXTS
    python -m memoryllm_jax.compare --protocol=configs/protocols/small.py --workdir=DIR --only=S,4096,memory,base
    python -m memoryllm_jax.compare --protocol=configs/protocols/small.py --workdir=DIR --texts=TEXTS --dry_run

A protocol names variants, sizes, vocabularies, lengths and seeds (memoryllm_jax/experiments/protocol.py). First short
runs sweep the peak learning rate of each variant; then the experiments train with the best. Each run is a process of
`train` in DIR/runs/KEY. Kill it at any time and run the same line again: it goes on with what is not done. A run that
fails is named, and the others go on.

TEXTS is a folder with files train-* and validation-*, of the kinds that `prepare` reads.
"""

from typing import Annotated

from memoryllm_jax.common import cli
from memoryllm_jax.common.options import Option
from memoryllm_jax.experiments import protocol as protocol_lib
from memoryllm_jax.experiments import runner
from memoryllm_jax.experiments.plan import Plan


def main(
    protocol: Annotated[str, Option("file of the protocol, such as configs/protocols/small.py")],
    workdir: Annotated[str, Option("folder for the data, the runs and the report")],
    texts: Annotated[str, Option("folder of the texts; not needed when the data is prepared")] = "",
    only: Annotated[tuple[str, ...], Option("experiments, variants, sizes and vocabularies to run; empty: all")] = (),
    jobs: Annotated[int, Option("runs that are trained at the same time", least=1)] = 1,
    gflops: Annotated[float, Option("with --dry_run: 1e9 FLOP/s of a process, for the hours", least=1)] = 20.0,
    dry_run: Annotated[bool, Option("prepare the data, print the runs and their cost, train nothing")] = False,
) -> int:
    selection = runner.Selection(protocol_lib.load(protocol), only)
    runner.prepare(selection.protocol, workdir, texts, selection.vocabularies)
    plan = Plan(selection, workdir)
    if dry_run:
        print(plan.text(jobs, gflops * 1e9))
        return 0
    return runner.Runner(selection, workdir, jobs, plan.cost).run()


if __name__ == "__main__":
    cli.run(main, computes=False)
