"""A training step of base, memory on every position, memory and flex-3 on distinct ids, and Hugging Face's Llama.

    python benchmarks/train_step.py --data=DIR --output=benchmarks/results/NAME.json

DIR is a folder that `prepare` wrote. All sides have one shape, one batch of real text, float32 on a CPU, AdamW and
clipping; Llama runs in transformers on PyTorch with SDPA attention and the fused optimizer. Each side is a process
that lives through the whole run, and they take turns, so that the ratios of one round saw the same machine.
"""

import importlib.metadata
import importlib.util
import json
import os
import platform
import statistics
import subprocess
import sys
import time

import numpy as np
from absl import app, flags, logging

SIDES = ("llama-pytorch", "base", "memory-plain", "memory", "flex-3")
FLAGS = flags.FLAGS
flags.DEFINE_string("data", None, "prepared data", required=True)
flags.DEFINE_string("output", None, "JSON file for the result")
flags.DEFINE_integer("dim", 512, "model width")
flags.DEFINE_integer("layers", 8, "layers")
flags.DEFINE_integer("heads", 8, "heads")
flags.DEFINE_integer("seq_len", 1024, "tokens a sequence")
flags.DEFINE_integer("batch_size", 8, "sequences")
flags.DEFINE_integer("rounds", 6, "timed steps of each side, after one that is not")
flags.DEFINE_list("sides", list(SIDES), "which to run")
flags.DEFINE_string("worker", None, "internal: the side this process is")


def windows(dataset):
    """[B, T + 1] ids from the middle of the training text."""
    B, T = FLAGS.batch_size, FLAGS.seq_len
    stream = dataset.train.read(dataset.train.tokens // 2, B * T + 1)
    return np.stack([stream[i * T : i * T + T + 1] for i in range(B)])


def llama_step(dataset):
    import torch
    import transformers

    from memoryllm_jax import config as config_lib

    torch.manual_seed(0)
    torch.set_num_threads(os.cpu_count())
    shape = config_lib.default("base")
    shape.model.dim = FLAGS.dim
    model = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            hidden_size=FLAGS.dim,
            intermediate_size=shape.model.ffn_dim,
            num_hidden_layers=FLAGS.layers,
            num_attention_heads=FLAGS.heads,
            vocab_size=dataset.vocab_size,
            max_position_embeddings=FLAGS.seq_len,
            tie_word_embeddings=False,
            attn_implementation="sdpa",
            use_cache=False,
        )
    ).float()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    ids = torch.tensor(windows(dataset).astype(np.int64))
    inputs, targets = ids[:, :-1], ids[:, 1:]

    def step():
        logits = model(input_ids=inputs).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.reshape(-1))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return step, {}


def our_step(side, dataset):
    import jax

    from memoryllm_jax import config as config_lib
    from memoryllm_jax import data, metrics, sharding, train
    from memoryllm_jax.step import Trainer

    c = config_lib.default(side.removesuffix("-plain"))
    c.model.dim, c.model.layers, c.model.heads = FLAGS.dim, FLAGS.layers, FLAGS.heads
    c.model.dtype, c.model.loss_chunk, c.model.unique_tokens = "float32", 512, not side.endswith("-plain")
    c.batch_size, c.seq_len, c.steps, c.optimizer.warmup_steps = FLAGS.batch_size, FLAGS.seq_len, 100, 1
    config = train.complete(config_lib.resolve(c), dataset)
    trainer = Trainer(config, sharding.make_mesh(config.mesh))
    state = trainer.init(jax.random.key(0))
    batches = data.TrainBatches(config, dataset, 1, [0])
    host = data.HostBatch({0: batches._shard(windows(dataset), np.ones((FLAGS.batch_size, FLAGS.seq_len)))})
    size = data.SizeAgreement(batches.sizes(), trainer.mesh).size(host.distinct)
    tokens = FLAGS.batch_size * FLAGS.seq_len

    def step():
        nonlocal state
        batch = data.place(host, size, trainer.batch_sharding, config.model)
        state, values = trainer.train(state, batch)
        return float(jax.device_get(values["loss"]))

    return step, {"gflop": metrics.train_flops(config, tokens, size) / 1e9, "rows": size, "distinct": host.distinct}


def worker(side):
    from memoryllm_jax import data

    dataset = data.Dataset(FLAGS.data)
    step, facts = llama_step(dataset) if side == "llama-pytorch" else our_step(side, dataset)
    step()
    print(json.dumps(facts), flush=True)
    for _ in sys.stdin:
        start = time.perf_counter()
        loss = step()
        print(json.dumps({"seconds": time.perf_counter() - start, "loss": loss}), flush=True)


def main(_):
    logging.set_verbosity(logging.WARNING)
    if FLAGS.worker:
        return worker(FLAGS.worker)
    from memoryllm_jax import data

    dataset = data.Dataset(FLAGS.data)
    workers, facts = {}, {}
    for side in FLAGS.sides:
        command = [sys.executable, *sys.argv, f"--worker={side}"]
        workers[side] = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        facts[side] = json.loads(workers[side].stdout.readline())
    seconds = {side: [] for side in FLAGS.sides}
    for _ in range(FLAGS.rounds):
        for side, process in workers.items():
            process.stdin.write("go\n")
            process.stdin.flush()
            seconds[side].append(json.loads(process.stdout.readline())["seconds"])
    for process in workers.values():
        process.stdin.close()
        process.wait()
    first, reference = FLAGS.sides[0], seconds[FLAGS.sides[0]]
    base = seconds.get("base", reference)

    def ratio(of, side):
        values = sorted(a / b for a, b in zip(of, seconds[side]))
        return {"median": statistics.median(values), "min": values[0], "max": values[-1]}

    results = {
        side: facts[side]
        | {
            "seconds": seconds[side],
            f"speed_over_{first}": ratio(reference, side),
            "speed_over_base": ratio(base, side),
        }
        for side in FLAGS.sides
    }
    packages = ("jax", "jaxlib", "flax", "optax", "torch", "transformers", "numpy")
    record = {
        "command": "python " + " ".join("--data=DIR" if a.startswith("--data") else a for a in sys.argv),
        "tokenizer": f"{dataset.vocab_size} ids, SHA-256 {dataset.tokenizer().digest[:16]}",
        "shape": {k: FLAGS[k].value for k in ("dim", "layers", "heads", "seq_len", "batch_size")},
        "machine": f"{os.cpu_count()} cores, {platform.processor() or platform.machine()}",
        "python": platform.python_version(),
        "versions": {p: importlib.metadata.version(p) for p in packages if importlib.util.find_spec(p)},
        "commit": subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True
        ).stdout.strip(),
        "results": results,
    }
    print(f"{'side':<15}{'s a step':>10}{'over ' + first:>22}{'over base':>12}{'GFLOP':>9}{'rows':>7}")
    for side, r in results.items():
        over, over_base = r[f"speed_over_{first}"]["median"], r["speed_over_base"]["median"]
        print(
            f"{side:<15}{statistics.median(r['seconds']):>10.2f}{over:>22.2f}{over_base:>12.2f}"
            f"{r.get('gflop', float('nan')):>9.0f}{r.get('rows', 0):>7}"
        )
    if FLAGS.output:
        with open(FLAGS.output, "w") as file:
            file.write(json.dumps(record, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    app.run(main)
