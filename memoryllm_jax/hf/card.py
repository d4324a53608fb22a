"""The model card of an exported model, filled from its run."""

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
    """Markdown that begins with the metadata that model hubs read.

    Args:
      dtype: of the exported weights.
    """
    has_memory = trained.config.memory_dim > 0
    lines = [
        "---",
        "library_name: transformers",
        "pipeline_tag: text-generation",
        "tags:",
        f"- {'memoryllm' if has_memory else 'llama'}",
        "- memoryllm_jax",
        "---",
        "",
        f"# {trained.config.architecture}",
        "",
    ]
    facts = _about_model(trained, dtype) | _about_training(trained) | _held_out_loss(trained)
    lines += [f"- {name}: {value}" for name, value in facts.items()]
    use = _USE.format(trust=", trust_remote_code=True" if has_memory else "")
    return "\n".join([*lines, "", use]) + (_TOL if has_memory else "")


def _about_model(trained, dtype):
    c, counts = trained.config, flops.parameters(trained.run)
    widths = f"FFN-C width {c.compute_dim}, FFN-M {c.memory_dim}" if c.memory_dim else f"FFN width {c.compute_dim}"
    return {
        "architecture": f"{c.architecture}, {c.layers} layers of width {c.dim}, {c.heads} heads "
        f"({c.key_heads} for keys and values), {widths}, {c.vocab_size:,} token ids",
        "parameters": f"{counts['total']:,}: {counts['active']:,} active, {counts['memory']:,} in the token memory, "
        f"{counts['embedding_and_head']:,} in embedding and head",
        "dtype": dtype,
        "context": f"{trained.context:,} tokens",
        "tokenizer": f"{trained.tokenizer.kind}, SHA-256 {trained.tokenizer.digest}",
        "data": f"digest {trained.description['data']['digest']}",
    }


def _about_training(trained):
    if not trained.step:  # imported
        return {}
    run = trained.run
    training = f"{trained.step:,} steps, {trained.step * run.batch_size * run.seq_len:,} tokens, seed {run.seed}"
    if run.start.workdir:
        training += f", from the model in {os.path.basename(run.start.workdir.rstrip('/'))}"
    optimizer = [f"{name} {value}" for name, value in config.flatten(run).items() if "optimizer." in name]
    return {"training": training, "optimizer": ", ".join(optimizer)}


def _held_out_loss(trained):
    """The validation loss of this very step, if the run recorded one."""
    path = os.path.join(trained.workdir, "metrics.jsonl")
    if not storage.exists(path):
        return {}
    lines = storage.read_bytes(path, "metrics").decode().splitlines(keepends=True)
    records = [json.loads(line) for line in lines if line.endswith("\n")]  # a killed run may have cut the last line
    found = [r for r in records if r.get("kind") == "validation" and r.get("step") == trained.step]
    if not found:
        return {}
    loss, bits = found[-1]["loss"], found[-1]["bits_per_byte"]
    return {"held-out text": f"{loss:.4f} nats a token, {bits:.4f} bits per byte"}
