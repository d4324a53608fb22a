"""Compares what clients get from the server with what this package computes without one.

    python benchmarks/clients.py --workdir=DIR --task_data=FOLDER --scratch=DIR --output=FILE.json

Starts the server. The harness's own adapter of OpenAI's API (local-completions), which tokenizes by transformers, runs
lambada_local and piqa_local on it, and our adapter runs them without it. OpenAI's client streams greedy texts, several
at a time, which are compared with those of `generate`. In float32. Needs the extras `eval`, `hf` and `test`.
"""

import concurrent.futures
import contextlib
import json
import os
import re
import signal
import subprocess
import sys
from typing import Annotated

import agreement
import common
import openai
from lm_eval.models.openai_completions import LocalCompletionsAPI

from memoryllm_jax.checkpoint.description import config_of
from memoryllm_jax.common import cli
from memoryllm_jax.common.errors import UserError
from memoryllm_jax.common.options import Option
from memoryllm_jax.hf.export import export_model
from memoryllm_jax.inference.sampling import Sampling
from memoryllm_jax.inference.text import text_after
from memoryllm_jax.tol import serving

_AT_A_TIME = 8  # requests
_NEW_TOKENS = 32


@contextlib.contextmanager
def server(workdir: str, tol: str):
    """Starts the server. Yields its address. Raises: UserError if it ends, or does not end well."""
    command = [sys.executable, "-m", "memoryllm_jax.serve", f"--workdir={workdir}", "--port=0", "--name=model"]
    command += ["--dtype=float32", *([f"--tol={tol}"] if tol else [])]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            for line in process.stdout:
                print(f"server: {line}", end="", flush=True)
                found = re.search(r"http://\S+", line)
                if found:
                    break
            else:
                raise UserError(f"expected a server that starts, found exit code {process.wait()}")
            yield found[0]
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(60)
    if process.returncode:
        raise UserError(f"expected exit code 0 of the server after SIGTERM, found {process.returncode}")


def texts(client: openai.OpenAI, engine, prompts: list[str]) -> dict:
    """Counts the greedy texts that differ from those of `generate`; they are streamed, several at a time."""

    def stream(prompt):
        chunks = client.completions.create(
            model="model", prompt=prompt, max_tokens=_NEW_TOKENS, temperature=0, stream=True
        )
        return "".join(chunk.choices[0].text for chunk in chunks)

    with concurrent.futures.ThreadPoolExecutor(_AT_A_TIME) as pool:
        served = list(pool.map(stream, prompts))
    alone = []
    for prompt in prompts:
        ids = engine.prompt(prompt)
        steps = engine.generate([ids], _NEW_TOKENS, Sampling(0), stop_ids=engine.stop_ids([]))
        alone.append(text_after(engine.tokenizer, ids, [token for step in steps for _, token in step]))
    return {"texts": len(prompts), "that_differ": sum(a != b for a, b in zip(served, alone))}


def main(
    workdir: Annotated[str, Option("the model's checkpoints")],
    task_data: Annotated[str, Option("folder with lambada.jsonl and piqa.jsonl")],
    scratch: Annotated[str, Option("folder for the exported tokenizer and the samples")],
    tol: Annotated[str, Option("ToL file; without it rows are computed from the weights")] = "",
    limit: Annotated[int, Option("examples of each task", least=1)] = 200,
    output: Annotated[str, Option("JSON file for the result", writes=True)] = "",
) -> None:
    os.makedirs(scratch, exist_ok=True)
    folder = f"{scratch}/hf"
    if not os.path.exists(folder):
        export_model(workdir, folder)
    runs, context = agreement.Harness(task_data, limit), config_of(workdir).seq_len
    ours = runs.ours(f"{scratch}/ours.json", workdir, tol)
    with server(workdir, tol) as address:

        def adapter():
            return LocalCompletionsAPI(
                base_url=f"{address}/v1/completions",
                model="model",
                tokenizer=folder,
                tokenizer_backend="huggingface",
                max_length=context,
                add_bos_token=True,
                batch_size=4,
                num_concurrent=_AT_A_TIME,
            )

        served = runs.served(f"{scratch}/served.json", adapter)
        results = {task: agreement.compare(ours[task], served[task]) for task in agreement.TASKS}
        with open(f"{task_data}/lambada.jsonl", encoding="utf-8") as file:
            prompts = [json.loads(next(file))["query"] for _ in range(64)]
        with (
            openai.OpenAI(base_url=f"{address}/v1", api_key="none") as client,
            contextlib.closing(serving.open_engine(workdir, tol, dtype="float32")) as engine,
        ):
            results["openai client"] = texts(client, engine, prompts)
    print(json.dumps(results, indent=1), flush=True)
    common.write(output, results, {"pairs": "ours, by the server", "dtype": "float32", "device": "cpu"})


if __name__ == "__main__":
    cli.run(main)
