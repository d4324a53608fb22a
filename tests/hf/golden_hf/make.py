"""Makes the golden directories: python tests/hf/golden_hf/make.py, with PyTorch and transformers installed.

Logits of base are computed by transformers' Llama, those of memory and flex by tests/reference.py.
"""

import os
import shutil
import sys
import tempfile

import numpy as np
import torch
import transformers

from memoryllm_jax import hf

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.dirname(os.path.dirname(HERE)))  # tests/
from sides import IDS, LLAMA3_ROPE, golden_by_the_equations, their_logits, write_tokenizer  # noqa: E402

SHAPE = {
    "vocab_size": 64,
    "hidden_size": 16,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
}


def keep(name, logits_of):
    """Saves the logits of IDS and the greedy continuation of their first sequence; removes files that no test reads."""
    text = IDS[:1]
    for _ in range(8):
        text = np.append(text, logits_of(text)[:, -1:].argmax(-1), 1)
    np.save(f"{HERE}/{name}/logits.npy", logits_of(IDS))
    np.save(f"{HERE}/{name}/text.npy", text[0, IDS.shape[1] :])
    for file in os.listdir(f"{HERE}/{name}"):
        if file in ("generation_config.json", "README.md", "tokenizer_config.json") or file.endswith(".py"):
            os.remove(f"{HERE}/{name}/{file}")


def main():
    torch.manual_seed(0)
    for name in ("base", "memory", "flex"):
        shutil.rmtree(f"{HERE}/{name}", ignore_errors=True)
    rope = {"rope_theta": 1e4} | LLAMA3_ROPE
    llama = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SHAPE, rope_parameters=rope))
    llama.save_pretrained(f"{HERE}/base")
    write_tokenizer(f"{HERE}/base")
    keep("base", lambda ids: their_logits(llama, ids))
    for name, beta, width, memory in (("memory", 0.0, 0, 40), ("flex", 3.0, 16, 24)):
        with tempfile.TemporaryDirectory() as scratch:
            code = transformers.dynamic_module_utils
            module = os.path.dirname(hf.__file__)
            auto = code.get_class_from_dynamic_module("modeling_memoryllm.MemoryLLMConfig", module)
            config = auto(**SHAPE | {"intermediate_size": width, "memory_size": memory, "beta": beta})
            kind = code.get_class_from_dynamic_module("modeling_memoryllm.MemoryLLMForCausalLM", module)
            model = kind(config)
            model.save_pretrained(scratch)
            write_tokenizer(scratch)
            shutil.copytree(scratch, f"{HERE}/{name}")
        keep(name, lambda ids, name=name: golden_by_the_equations(name, ids))


if __name__ == "__main__":
    main()
