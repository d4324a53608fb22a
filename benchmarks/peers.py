"""Training steps of base in other libraries, with the same shape, batch, AdamW and clipping.

Each is written as is usual with its library. In bfloat16 the parameters and the optimizer stay float32, as ours do, and
PyTorch's autocast computes in bfloat16. They need packages that the project does not:

    pip install torch==2.13.0 'transformers>=5,<6' litgpt keras-hub
    pip install 'huggingface-hub>=1.31,<3'    # after litgpt, which requires a version that transformers refuses

A peer is a function (shape: ModelConfig, windows: ids [B, T + 1], platform: cpu or gpu) -> (number of parameters,
step); step() trains one step and returns the loss before the update, in nats a token, as a number or a tensor of one.
"""

import os

import numpy as np

ON_GPU = ("llama", "llama-compile")  # the peers that run on a GPU; each takes the dtype of the shape there


def gpu_facts() -> dict:
    """Name and peak FLOP/s of PyTorch's GPU. Raises: RuntimeError if it has none."""
    import torch

    from memoryllm_jax.training import chips

    name = torch.cuda.get_device_name()
    return {"device": name, "peak_flops": chips.peak_flops(name)}


def gpu_peak_memory() -> int:
    """The most bytes of the GPU that tensors had at one time."""
    import torch

    return torch.cuda.max_memory_allocated()


def _torch_step(model, logits_of, windows, platform, dtype="float32", compiled=False):
    """The number of parameters and the training step of a PyTorch model; logits_of: ids [B, T] -> logits [B, T, V]."""
    import torch

    torch.set_num_threads(os.cpu_count())
    device = "cuda" if platform == "gpu" else "cpu"
    model = model.to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    ids = torch.tensor(windows.astype(np.int64), device=device)
    inputs, targets = ids[:, :-1], ids[:, 1:].reshape(-1)
    autocast = torch.autocast(device, torch.bfloat16, enabled=dtype == "bfloat16")

    def loss_of(inputs, targets):
        with autocast:
            return torch.nn.functional.cross_entropy(logits_of(inputs).flatten(0, 1), targets)

    loss_of = torch.compile(loss_of) if compiled else loss_of

    def step():
        loss = loss_of(inputs, targets)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    return sum(p.numel() for p in model.parameters()), step


def llama_model(shape, context: int, device: str, dtype: str):
    """A Llama of transformers with the shape of base and random parameters, and SDPA attention.

    Args:
      shape: the ModelConfig.
      context: largest number of positions.
      device, dtype: PyTorch's names, for the parameters.
    """
    import torch
    import transformers

    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=shape.dim,
        intermediate_size=shape.ffn_dim,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        vocab_size=shape.vocab_size,
        max_position_embeddings=context,
        tie_word_embeddings=False,
        attn_implementation="sdpa",
    )
    with torch.device(device):  # drawn there: a CPU takes half a minute for 1.7 billion parameters
        return transformers.LlamaForCausalLM(config).to(getattr(torch, dtype))


def llama(shape, windows, platform, compiled=False):
    """Hugging Face transformers, SDPA attention, fused AdamW; eager, or under torch.compile."""
    device = "cuda" if platform == "gpu" else "cpu"
    model = llama_model(shape, windows.shape[1] - 1, device, "float32")
    model.config.use_cache = False
    return _torch_step(model, lambda ids: model(input_ids=ids).logits, windows, platform, shape.dtype, compiled)


def litgpt(shape, windows, platform):
    """LitGPT's GPT, eager, fused AdamW."""
    import torch
    from litgpt import GPT, Config

    torch.manual_seed(0)
    config = Config(
        block_size=windows.shape[1] - 1,
        n_layer=shape.layers,
        n_embd=shape.dim,
        n_head=shape.heads,
        vocab_size=shape.vocab_size,
        padded_vocab_size=shape.vocab_size,
        intermediate_size=shape.ffn_dim,
        norm_class_name="RMSNorm",
        mlp_class_name="LLaMAMLP",
        rotary_percentage=1.0,
        parallel_residual=False,
        bias=False,
    )
    model = GPT(config)
    return _torch_step(model, model, windows, platform)


def keras_hub(shape, windows, platform, backend):
    """KerasHub's LlamaCausalLM by `train_on_batch`: compiled on jax, eager on torch."""
    os.environ |= {"KERAS_BACKEND": backend, "TF_CPP_MIN_LOG_LEVEL": "3"}
    import keras
    import keras_hub

    keras.utils.set_random_seed(0)
    if backend == "torch":
        import torch

        torch.set_num_threads(os.cpu_count())
    backbone = keras_hub.models.LlamaBackbone(
        vocabulary_size=shape.vocab_size,
        num_layers=shape.layers,
        num_query_heads=shape.heads,
        num_key_value_heads=shape.heads,
        hidden_dim=shape.dim,
        intermediate_dim=shape.ffn_dim,
        tie_word_embeddings=False,
        dtype="float32",
    )
    model = keras_hub.models.LlamaCausalLM(backbone=backbone, preprocessor=None)
    model.compile(
        optimizer=keras.optimizers.AdamW(
            1e-4, weight_decay=0.1, beta_1=0.9, beta_2=0.95, epsilon=1e-8, global_clipnorm=1.0
        ),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
    )
    inputs = {"token_ids": windows[:, :-1], "padding_mask": np.ones_like(windows[:, :-1])}
    return model.count_params(), lambda: float(model.train_on_batch(inputs, windows[:, 1:], return_dict=True)["loss"])


PEERS = {
    "llama": llama,
    "llama-compile": lambda *args: llama(*args, compiled=True),
    "litgpt": litgpt,
    "keras-hub-torch": lambda *args: keras_hub(*args, "torch"),
    "keras-hub-jax": lambda *args: keras_hub(*args, "jax"),
}
