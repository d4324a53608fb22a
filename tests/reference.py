"""An independent implementation of the architectures, written from the equations and without the package's code.

It has no scan over layers, no distinct ids and no chunks. Parameters are trees as a training state holds them, with a
leading axis for the layers. The config m is a ModelConfig.
"""

import jax
import jax.numpy as jnp
import numpy as np


def norm(x, scale, m):
    if m.norm == "layernorm":
        x = x - x.mean(-1, keepdims=True)
    return scale * x / jnp.sqrt((x * x).mean(-1, keepdims=True) + m.norm_eps)


def swiglu(x, p):
    return (jax.nn.silu(x @ p["gate"]) * (x @ p["up"])) @ p["down"]


def frequencies(K, m):
    """RoPE's frequencies theta^(-2i/K), [K/2], scaled as `rope_scaling` says.

    `llama3` divides frequencies with long wavelengths by the factor, keeps those with short ones, and interpolates
    between the two.
    """
    longest = m.rope_original_context / m.rope_low_freq_factor
    shortest = m.rope_original_context / m.rope_high_freq_factor
    out = []
    for i in range(K // 2):
        f = m.rope_theta ** (-2 * i / K)
        wavelength = 2 * np.pi / f
        if m.rope_scaling == "linear" or (m.rope_scaling == "llama3" and wavelength > longest):
            f = f / m.rope_factor
        elif m.rope_scaling == "llama3" and wavelength > shortest:
            turns = m.rope_original_context / wavelength
            share = (turns - m.rope_low_freq_factor) / (m.rope_high_freq_factor - m.rope_low_freq_factor)
            f = share * f + (1 - share) * f / m.rope_factor
        out.append(f)
    return np.array(out)


def rotate(x, m):
    """RoPE on x [B, T, H, K]: each pair (x_i, x_{i+K/2}), as a complex number, is rotated by position * frequency."""
    T, K = x.shape[1], x.shape[-1]
    angle = np.outer(np.arange(T), frequencies(K, m))
    z = (x[..., : K // 2] + 1j * x[..., K // 2 :]) * np.exp(1j * angle)[:, None]
    return jnp.concatenate([z.real, z.imag], -1)


def attention(x, p, m, table_rows=None):
    """Causal attention of x [B, T, D]. `table_rows` are added to the values in value-b, and replace them in bov-b."""
    q = jnp.einsum("btd,dhk->bthk", x, p["q"])
    k = jnp.einsum("btd,dhk->bthk", x, p["k"])
    v = jnp.einsum("btd,dhk->bthk", x, p["v"]) if "v" in p else 0
    if table_rows is not None:
        v = v + table_rows.reshape(k.shape)
    if m.qk_norm:  # each head by itself, with one scale for all heads
        q, k = norm(q, p["q_norm"]["scale"], m), norm(k, p["k_norm"]["scale"], m)
    q, k = rotate(q, m), rotate(k, m)
    key_head = np.arange(m.heads) * m.key_heads // m.heads  # query head h uses key-value head h // group size
    k, v = k[:, :, key_head], v[:, :, key_head]
    scores = jnp.einsum("bqhk,bshk->bhqs", q, k) / np.sqrt(m.head_dim)
    T = x.shape[1]
    scores = jnp.where(np.tril(np.ones((T, T), bool)), scores, -jnp.inf)
    return jnp.einsum("bhqs,bshk,hkd->bqd", jax.nn.softmax(scores, -1), v, p["out"])


def of_layer(tree, layer, first):
    """A layer's parameters from a tree that is stacked over the layers, those from `first` on where layer >= first."""
    return jax.tree.map(lambda a: a[layer if layer < first else layer - first], tree)


def bigram_rows(tokens, V):
    """The rows that the tokens [B, T] read in bigram-b, by a hash of each token and the one before."""
    tokens = jnp.asarray(tokens, jnp.uint32)
    hashed = 36313 * tokens[:, 1:] ^ 27191 * tokens[:, :-1]
    return jnp.pad((hashed % (V - 1)).astype(jnp.int32), [(0, 0), (1, 0)], constant_values=V - 1)


def memory_rows(params, layer, tokens, m):
    """A layer's rows of the token memory [..., P] for tokens of any shape; None without a row."""
    first = m.layers * 2 // 3 if m.token_memory == "bov" else 0  # the first layer with a token memory
    if layer < first or m.token_memory == "none" or (m.token_memory == "ffn" and m.beta == 8):
        return None
    if m.token_memory == "bigram":
        tokens = bigram_rows(tokens, m.vocab_size)
    if m.rows == "frozen":
        std = {"per_layer": 1, "bov": m.init_std * m.dim**0.5}.get(m.token_memory, m.init_std)
        widths = {"per_layer": m.table_dim, "value": m.key_heads * m.head_dim, "bov": m.key_heads * m.head_dim}
        width = widths.get(m.token_memory, m.dim)
        key = jax.random.fold_in(jax.random.key(20260602, impl="threefry2x32"), layer)
        drawn = jax.vmap(lambda t: jax.random.normal(jax.random.fold_in(key, t), (width,)))(tokens.reshape(-1))
        return std * drawn.reshape(*tokens.shape, width)
    if m.rows == "permuted":
        tokens = np.random.RandomState(20260602).permutation(m.vocab_size)[tokens]
    if m.rows == "shared":
        tokens = np.zeros_like(tokens)
    memory = of_layer(params["memory"], layer, first)
    if m.token_memory == "ffn":
        return swiglu(norm(params["embedding"][tokens], memory["norm"]["scale"], m), memory["ffn"])
    rows = memory["table"][tokens]
    if m.token_memory == "per_layer":
        return norm(rows, memory["norm"]["scale"], m)
    return memory["scale"] * rows if m.token_memory == "bov" else rows


def logits(params, tokens, m, added=None):
    """Logits [B, T, V] after each of the tokens [B, T].

    Args:
      added: a list that gets what the parts of each layer add to the residual stream: {part: [B, T, D]}.
    """
    x = params["embedding"][tokens]
    first = m.layers * 2 // 3 if m.token_memory == "bov" else 0  # the first layer with a token memory
    for layer in range(m.layers):
        p = of_layer(params["layers" if layer < first or not first else "upper_layers"], layer, first)
        rows = memory_rows(params, layer, tokens, m)
        of_values = rows if m.token_memory in ("value", "bov") else None
        parts = {"attention": attention(norm(x, p["attention_norm"]["scale"], m), p["attention"], m, of_values)}
        compute_input = x + parts["attention"] if m.compute_input == "after_attention" else x
        if "ffn" in p:
            parts["ffn"] = swiglu(norm(compute_input, p["ffn_norm"]["scale"], m), p["ffn"])
        if m.token_memory == "per_layer":
            gate = p["row_gate"]
            openness = jax.nn.gelu(norm(x + sum(parts.values()), p["row_gate_norm"]["scale"], m) @ gate["gate"])
            parts["row_gate"] = (openness * rows) @ gate["out"]
        if m.token_memory in ("ffn", "rows", "bigram") and rows is not None:
            parts["memory"] = rows
        x = x + sum(parts.values())
        if added is not None:
            added.append(parts)
    head = params["embedding"] if m.tie_embeddings else params["head"]
    z = norm(x, params["final_norm"]["scale"], m) @ head.T
    return m.logit_softcap * jnp.tanh(z / m.logit_softcap) if m.logit_softcap else z


def from_llama(tensors, m):
    """Parameters as `logits` takes them, from tensors with Llama's names. The package's table of names is not used."""
    tensors = {name.removesuffix(".weight"): np.asarray(tensor) for name, tensor in tensors.items()}
    layers, memory = [], []
    for layer in range(m.layers):
        w = {name.split(".", 3)[3]: t for name, t in tensors.items() if name.startswith(f"model.layers.{layer}.")}
        heads = {part: w[f"self_attn.{part}_proj"].T.reshape(m.dim, -1, m.head_dim) for part in "qkv"}
        heads["out"] = w["self_attn.o_proj"].T.reshape(m.heads, m.head_dim, m.dim)
        if m.qk_norm:
            heads |= {name: {"scale": w[f"self_attn.{name}"]} for name in ("q_norm", "k_norm")}
        layers.append({"attention": heads, "attention_norm": {"scale": w["input_layernorm"]}})
        if "mlp.gate_proj" in w:
            layers[-1] |= {"ffn": _ffn(w, "mlp"), "ffn_norm": {"scale": w["post_attention_layernorm"]}}
        if "memory.gate_proj" in w:
            memory.append({"ffn": _ffn(w, "memory"), "norm": {"scale": w["memory.norm"]}})
    out = {
        "layers": _stack(layers),
        "embedding": tensors["model.embed_tokens"],
        "final_norm": {"scale": tensors["model.norm"]},
    }
    if memory:
        out["memory"] = _stack(memory)
    if not m.tie_embeddings:
        out["head"] = tensors["lm_head"]
    return out


def _ffn(tensors, where):
    return {name: tensors[f"{where}.{name}_proj"].T for name in ("gate", "up", "down")}


def _stack(layers):
    return jax.tree.map(lambda *x: np.stack(x), *layers)


def loss(params, windows, config):
    """Mean over all positions of negative log-likelihood + z_loss * log-partition^2."""
    z = logits(params, windows[:, :-1], config.model)
    lse = jax.nn.logsumexp(z, -1)
    nll = lse - jnp.take_along_axis(z, windows[:, 1:, None], -1)[..., 0]
    return (nll + config.optimizer.z_loss * lse**2).mean()
