"""The model card, filled from the run."""

import json
import os

from memoryllm_jax import config
from memoryllm_jax.checkpoint.trained import TrainedModel
from memoryllm_jax.common import storage
from memoryllm_jax.model import flops

_USE = """\
```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained(DIR)
model = AutoModelForCausalLM.from_pretrained(DIR{trust})
inputs = tokenizer("Once upon a time", return_tensors="pt", return_token_type_ids=False)
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=50)[0]))
```
"""
_TOL = """
Every FFN-M reads the token's embedding alone, so its outputs can be looked up: `python -m memoryllm_jax.precompute`
writes them into a file, and `from_pretrained(DIR, trust_remote_code=True, tol="FILE")` then loads no FFN-M weights.
"""


def text(trained: TrainedModel, dtype: str) -> str:
    """Markdown with the metadata that model hubs read."""
    run = config.from_saved(trained.description["config"])
    c, counts = trained.config, flops.parameters(run)
    tags = ["llama" if not c.memory_dim else "memoryllm", "memoryllm_jax"]
    head = ["---", "library_name: transformers", "pipeline_tag: text-generation", "tags:", *(f"- {t}" for t in tags)]
    widths = f"FFN width {c.compute_dim}" if not c.memory_dim else f"FFN-C width {c.compute_dim}, FFN-M {c.memory_dim}"
    facts = {
        "architecture": f"{c.architecture}, {c.layers} layers of width {c.dim}, {c.heads} heads "
        f"({c.key_heads} for keys and values), {widths}, {c.vocab_size:,} token ids",
        "parameters": f"{counts['total']:,}: {counts['active']:,} active, {counts['memory']:,} in the token memory, "
        f"{counts['embedding_and_head']:,} in embedding and head",
        "dtype": dtype,
        "context": f"{trained.context:,} tokens",
        "tokenizer": f"{trained.tokenizer.kind}, SHA-256 {trained.tokenizer.digest}",
        "data": f"digest {trained.description['data']['digest']}",
    }
    if trained.step:
        facts["training"] = (
            f"{trained.step:,} steps, {trained.step * run.batch_size * run.seq_len:,} tokens, seed {run.seed}"
        )
        if run.start.workdir:
            facts["training"] += f", from the model in {os.path.basename(run.start.workdir.rstrip('/'))}"
        facts["optimizer"] = ", ".join(f"{k} {v}" for k, v in config.flatten(run).items() if "optimizer." in k)
    facts |= _validation(trained)
    lines = [*head, "---", "", f"# {c.architecture}", ""]
    lines += [f"- {name}: {value}" for name, value in facts.items()]
    trust = ", trust_remote_code=True" if c.memory_dim else ""
    return "\n".join([*lines, "", _USE.format(trust=trust)]) + (_TOL if c.memory_dim else "")


def _validation(trained):
    """The held-out loss of this very step, from the run's records."""
    path = os.path.join(trained.workdir, "metrics.jsonl")
    if not storage.exists(path):
        return {}
    lines = storage.read_bytes(path, "metrics").decode().splitlines(keepends=True)
    records = [json.loads(line) for line in lines if line.endswith("\n")]  # a run that was killed may have cut the last
    found = [r for r in records if r.get("kind") == "validation" and r.get("step") == trained.step]
    if not found:
        return {}
    r = found[-1]
    return {"held-out text": f"{r['loss']:.4f} nats a token, {r['bits_per_byte']:.4f} bits per byte"}
