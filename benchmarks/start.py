"""Time from the start of `generate` to its first text and to its end, whole commands in fresh processes.

    python benchmarks/start.py --workdir=DIR --hf=HF_DIR --before=CHECKOUT --output=FILE

Sides: this tree with an empty and with a full compile cache, the tree of --before, and transformers' generate of the
model in --hf, which is the one in --workdir as `export --import` read it. All read the model from the same disk, and
generate --max_tokens tokens from a short prompt, or as many ids, in float32. The sides take turns, --rounds times; a
first round, which fills the disk's cache and the compile cache, is not counted. The transformers side loads no
tokenizer. The tree of --before must be able to read the checkpoint: an older one refuses fields of the config that it
lacks.
"""

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated

import common
from workers import last_line

from memoryllm_jax.common import cli
from memoryllm_jax.common.errors import UserError
from memoryllm_jax.common.options import Option

PROMPT = "Once upon a time"
HERE = str(Path(__file__).parent.parent)
_TRANSFORMERS = """
import sys
import torch
from transformers import AutoModelForCausalLM

class First:  # writes when the first token is there
    def __init__(self):
        self.calls = 0
    def put(self, value):
        self.calls += 1
        if self.calls == 2:  # the first call is the prompt
            print("first", flush=True)
    def end(self):
        pass

model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32)
ids = torch.tensor([[1, 9038, 2501, 263, 931]]) % model.config.vocab_size
count = int(sys.argv[2])
model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, min_new_tokens=count, streamer=First())
"""


def main(
    workdir: Annotated[str, Option("checkpoints of a model")],
    hf: Annotated[str, Option("Hugging Face directory of the same model; without it, transformers is left out")] = "",
    before: Annotated[str, Option("folder with another checkout of this repository, to compare with")] = "",
    max_tokens: Annotated[int, Option("new tokens", least=1)] = 32,
    rounds: Annotated[int, Option("measurements of each side", least=1)] = 5,
    output: Annotated[str, Option("JSON file for the result", writes=True)] = "",
) -> None:
    generate = [sys.executable, "-m", "memoryllm_jax.generate", f"--workdir={workdir}", f"--prompt={PROMPT}"]
    generate.append(f"--max_tokens={max_tokens}")
    commands = {"empty cache": (generate, HERE), "full cache": (generate, HERE)}
    if before:
        commands["before"] = (generate, before)
    if hf:
        commands["transformers"] = ([sys.executable, "-c", _TRANSFORMERS, hf, str(max_tokens)], "")
    measured = {side: [] for side in commands}
    with tempfile.TemporaryDirectory() as scratch:
        for number in range(rounds + 1):
            for side, (command, path) in commands.items():
                home = f"{scratch}/full" if side == "full cache" else f"{scratch}/{side}{number}"
                found = measure(command, path, home, len(PROMPT) if side != "transformers" else 0)
                if number:
                    measured[side].append(found)
                    print(
                        f"{side:>14}: " + ", ".join(f"{name} {value:.2f}" for name, value in found.items()), flush=True
                    )
    results = {
        side: {name: common.spread([one[name] for one in found]) for name in found[0]}
        for side, found in measured.items()
    }
    for side in commands:
        if side != "full cache":
            firsts = [[one["first_text_s"] for one in measured[name]] for name in (side, "full cache")]
            results[side]["first_text_over_full_cache"] = common.ratio(*firsts)
    common.write(output, results, {"max_tokens": max_tokens, "rounds": rounds})


def measure(command: list[str], path: str, home: str, shown: int) -> dict[str, float]:
    """Runs a command to its end.

    Args:
      path: the checkout that Python imports the package from.
      home: folder for the compile cache.
      shown: characters that it writes before the first text.
    Returns: seconds to the first text and to the end, processor seconds, and peak memory in GB.
    Raises: UserError if the command fails or writes no text.
    """
    env = {name: value for name, value in os.environ.items() if name != "JAX_COMPILATION_CACHE_DIR"}
    env |= {"PYTHONPATH": path, "XDG_CACHE_HOME": home}
    start = time.perf_counter()
    errors = tempfile.TemporaryFile("w+")
    process = subprocess.Popen(command, env=env, cwd=path or HERE, stdout=subprocess.PIPE, stderr=errors)
    written, first = b"", None
    while piece := os.read(process.stdout.fileno(), 1 << 16):
        written += piece
        if first is None and len(written) > shown:
            first = time.perf_counter() - start
    _, status, used = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode or first is None:
        errors.seek(0)
        raise UserError(
            f"{path or 'transformers'}: expected exit code 0 and a text, found {process.returncode}: "
            f"{last_line(errors.read())}"
        )
    return {
        "first_text_s": first,
        "end_s": time.perf_counter() - start,
        "processor_s": used.ru_utime + used.ru_stime,
        "peak_gb": used.ru_maxrss * 1024 / 1e9,
    }


if __name__ == "__main__":
    cli.run(main, computes=False)
