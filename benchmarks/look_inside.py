"""Time and peak memory of analyses of one checkpoint, each in a process of its own.

    python benchmarks/look_inside.py --workdir=DIR --scratch=DIR --output=FILE.json \\
        --command=outliers --command='clusters --layers=0,12,23'

A run that is on record in --output is not repeated, so the same line goes on where it was stopped. `open` is a process
that only loads the checkpoint as they do.
"""

import json
import os
import shlex
import subprocess
import sys
import time

import common
from absl import flags

from memoryllm_jax.common import legacy
from memoryllm_jax.common.errors import UserError

FLAGS = flags.FLAGS
_OPEN = """
import sys
from memoryllm_jax.analysis.key_values import KeyValueModel
KeyValueModel(sys.argv[1], with_attention=False).params
"""


def measure(arguments):
    """{"wall_s", "cpu_s", "peak_mb"} of a process. Raises: UserError if it fails."""
    start = time.perf_counter()
    process = subprocess.Popen([sys.executable, *arguments])
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise UserError(f"{shlex.join(arguments)}: ended with {process.returncode}")
    wall = time.perf_counter() - start
    return {"wall_s": wall, "cpu_s": usage.ru_utime + usage.ru_stime, "peak_mb": usage.ru_maxrss * 1024 / 1e6}


def main():
    results = {}
    if os.path.exists(FLAGS.output):
        with open(FLAGS.output) as file:
            results = json.load(file)["results"]
    for line in ["open", *FLAGS.command]:
        name, *options = shlex.split(line)
        arguments = ["-c", _OPEN, FLAGS.workdir]
        if name != "open":
            arguments = ["-m", "memoryllm_jax.analyze", name, f"--workdir={FLAGS.workdir}"]
            arguments += [f"--output={FLAGS.scratch}", *options]
        if line not in results:
            results[line] = measure(arguments)
            common.write(FLAGS.output, results, {"units": "seconds; peak resident memory in units of 10^6 bytes"})
        print(line, json.dumps(results[line]), flush=True)
    return 0


if __name__ == "__main__":
    flags.DEFINE_string("workdir", None, "the model's checkpoints", required=True)
    flags.DEFINE_string("scratch", None, "folder for the pages", required=True)
    flags.DEFINE_string("output", None, "JSON file of the record", required=True)
    flags.DEFINE_multi_string("command", [], "an analysis, with its options")
    legacy.run(main)
