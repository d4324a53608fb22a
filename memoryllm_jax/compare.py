"""Trains the models of a protocol and compares them: which token memory is worth its parameters, and when.

    python -m memoryllm_jax.compare --protocol=configs/protocols/small.py --workdir=DIR --texts=TEXTS
    python -m memoryllm_jax.compare --protocol=configs/protocols/small.py --workdir=DIR --only=S,4096,memory,base
    python -m memoryllm_jax.compare --protocol=configs/protocols/small.py --workdir=DIR --texts=TEXTS --dry_run
    python -m memoryllm_jax.compare --protocol=configs/protocols/small.py --workdir=DIR --report

A protocol names variants, sizes, vocabularies, lengths and seeds (memoryllm_jax/experiments/protocol.py). First short
runs sweep the peak learning rate of each variant; then the experiments train with the best. Each run is a process of
`train` in DIR/runs/KEY. Kill it at any time and run the same line again: it goes on with what is not done. A run that
fails is named, and the others go on.

At the end, and with --report at any time, DIR/comparison.html shows what the finished runs say: the answers to the
protocol's contrasts, with 95% intervals that hold all together, where base overtakes each memory, and as exploration
all losses, where differences come from, what is equal, and a law fitted to the runs. DIR/comparison.json holds the
numbers of the page and names no path, CSV and PNG files its tables and pictures. DIR/runs.tar.xz has the scores of
each run: unpacked in another DIR (tar -xf runs.tar.xz -C DIR), these runs are done there, without models.

TEXTS is a folder with files train-* and validation-*, of the kinds that `prepare` reads.
"""

from typing import Annotated

from memoryllm_jax.common import cli, plots
from memoryllm_jax.common.errors import UserError
from memoryllm_jax.common.exit_codes import ExitCode
from memoryllm_jax.common.options import Option
from memoryllm_jax.experiments import comparison, outcomes, packing, runner
from memoryllm_jax.experiments import protocol as protocol_lib
from memoryllm_jax.experiments.plan import Plan
from memoryllm_jax.experiments.protocol import Protocol
from memoryllm_jax.experiments.work import Selection, read_work


def main(
    protocol: Annotated[str, Option("file of the protocol, such as configs/protocols/small.py")],
    workdir: Annotated[str, Option("folder for the data, the runs and the report")],
    texts: Annotated[str, Option("folder of the texts; not needed when the data is prepared")] = "",
    only: Annotated[tuple[str, ...], Option("experiments, variants, sizes and vocabularies to run; empty: all")] = (),
    jobs: Annotated[int, Option("runs that are trained at the same time", least=1)] = 1,
    gflops: Annotated[float, Option("with --dry_run: 1e9 FLOP/s of a process, for the hours", least=1)] = 20.0,
    dry_run: Annotated[
        bool, Option("prepare the data, print the runs and the cost of those that are left, train nothing")
    ] = False,
    report: Annotated[bool, Option("train nothing; compare the runs that are finished")] = False,
) -> int:
    if report and (only or dry_run):
        raise UserError(f"expected --report alone, found --{'only' if only else 'dry_run'} beside it")
    plots.check_available()  # before hours of training
    opened = protocol_lib.load(protocol)
    if report:
        _report(opened, protocol, workdir)
        return 0
    selection = Selection(opened, only)
    runner.prepare(selection.protocol, workdir, texts, selection.vocabularies)
    runner.check_same_data(workdir, selection.vocabularies)
    plan = Plan(selection, workdir)
    if dry_run:
        print(plan.text(read_work(selection, workdir), jobs, gflops * 1e9))
        return 0
    code = runner.Runner(selection, workdir, jobs, plan.cost).run()
    if code != ExitCode.STOPPED and outcomes.finished(opened, workdir):
        _report(opened, protocol, workdir)
    return code


def _report(opened: Protocol, path: str, workdir: str) -> None:
    print(comparison.draw(opened, path, workdir))
    packing.pack(workdir)


if __name__ == "__main__":
    cli.run(main, computes=False)
