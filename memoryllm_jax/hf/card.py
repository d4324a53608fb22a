"""The model card (README.md) of an exported model, filled in from its checkpoint and its training run."""

import os

from memoryllm_jax.checkpoint.trained import TrainedModel
from memoryllm_jax.common import fields, storage
from memoryllm_jax.model import flops
from memoryllm_jax.training import metrics

_USE = """\
```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained(DIR{no_code})
model = AutoModelForCausalLM.from_pretrained(DIR{trust})
inputs = tokenizer("Once upon a time", return_tensors="pt", return_token_type_ids=False)
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=50)[0]))
```
"""
_TOL = """
Each FFN-M reads only the token's embedding, so its outputs can be looked up by token id:
`python -m memoryllm_jax.precompute` writes them into FILE, and
`from_pretrained(DIR, trust_remote_code=True, tol="FILE")` then loads no FFN-M weights.
"""


def text(trained: TrainedModel, dtype: str) -> str:
    """The model card as Markdown, with the metadata that model hubs read in its front matter.

    Args:
      trained: the exported model.
      dtype: name of the exported weights' dtype.
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
    code = {"trust": "", "no_code": ""}
    if has_memory:  # without the second, transformers asks whether to run the model's code for the tokenizer
        code = {"trust": ", trust_remote_code=True", "no_code": ", trust_remote_code=False"}
    use = _USE.format(**code)
    return "\n".join([*lines, "", use]) + (_TOL if has_memory else "")


def _about_model(trained, dtype):
    c = trained.config
    counts = flops.parameters(trained.run)
    if c.memory_dim:
        widths = f"FFN-C width {c.compute_dim}, FFN-M width {c.memory_dim}"
    else:
        widths = f"FFN width {c.compute_dim}"
    return {
        "architecture": f"{c.architecture}, {c.layers} layers of width {c.dim}, {c.heads} heads "
        f"({c.key_heads} for keys and values), {widths}, {c.vocab_size:,} token ids",
        "parameters": f"{counts['total']:,}: {counts['active']:,} active, {counts['memory']:,} in the token memory, "
        f"{counts['embedding_and_head']:,} in embedding and head",
        "dtype": dtype,
        "context": f"{trained.context:,} tokens",
        "tokenizer": f"{trained.tokenizer.kind}, SHA-256 {trained.tokenizer.digest}",
        "data": f"digest {trained.description.data.digest}",
    }


def _about_training(trained):
    if trained.step == 0:  # an imported model, whose training is unknown
        return {}
    run = trained.run
    training = f"{trained.step:,} steps, {trained.step * run.batch_size * run.seq_len:,} tokens, seed {run.seed}"
    if run.start.workdir:
        training += f", from the model in {os.path.basename(run.start.workdir.rstrip('/'))}"
    optimizer = [f"{name} {value}" for name, value in fields.flatten(run).items() if "optimizer." in name]
    return {"training": training, "optimizer": ", ".join(optimizer)}


def _held_out_loss(trained):
    """The validation loss of the checkpoint's step; {} if the run recorded none at that step."""
    path = os.path.join(trained.workdir, "metrics.jsonl")
    if not storage.exists(path):
        return {}
    # A run validates a step again when it resumes from it: the last record counts.
    found = [r for r in metrics.records(path) if isinstance(r, metrics.ValidationRecord) and r.step == trained.step]
    if not found:
        return {}
    return {"held-out text": f"{found[-1].loss:.4f} nats a token, {found[-1].bits_per_byte:.4f} bits per byte"}
