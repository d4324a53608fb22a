"""An independent implementation of the architectures, straight from the equations: no scan, unique ids or chunks."""

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
    """RoPE's frequencies theta^(-2i/K), [K/2], changed as `rope_scaling` says: llama3 lowers only the slow ones."""
    out = []
    for i in range(K // 2):
        f = m.rope_theta ** (-2 * i / K)
        wavelength = 2 * np.pi / f
        longest, shortest = (m.rope_original_context / x for x in (m.rope_low_freq_factor, m.rope_high_freq_factor))
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
    q, k, v = (jnp.einsum("btd,dhk->bthk", x, p[name]) for name in "qkv")
    v = v if table_rows is None else v + table_rows.reshape(v.shape)
    q, k = rotate(q, m), rotate(k, m)
    k, v = (
        x[:, :, np.arange(m.heads) * x.shape[2] // m.heads] for x in (k, v)
    )  # query head h uses key-value head h // group size
    scores = jnp.einsum("bqhk,bshk->bhqs", q, k) / np.sqrt(m.head_dim)
    T = x.shape[1]
    scores = jnp.where(np.tril(np.ones((T, T), bool)), scores, -jnp.inf)
    return jnp.einsum("bhqs,bshk,hkd->bqd", jax.nn.softmax(scores, -1), v, p["out"])


def logits(params, tokens, m):
    """Logits [B, T, V] of token ids [B, T]."""
    x0 = x = params["embedding"][tokens]
    for layer in range(m.layers):
        p = jax.tree.map(lambda a, layer=layer: a[layer], params["layers"])
        q = jax.tree.map(lambda a, layer=layer: a[layer], params["memory"]) if "memory" in params else {}
        rows = q["table"][tokens] if "table" in q else None
        values = rows if m.token_memory == "value" else None
        update = attention(norm(x, p["attention_norm"]["scale"], m), p["attention"], m, values)
        compute_input = x + update if m.compute_input == "after_attention" else x
        if "ffn" in p:
            update = update + swiglu(norm(compute_input, p["ffn_norm"]["scale"], m), p["ffn"])
        if m.token_memory == "per_layer":
            gate = p["row_gate"]
            let = jax.nn.gelu(norm(x + update, p["row_gate_norm"]["scale"], m) @ gate["gate"])
            update = update + (let * norm(rows, q["norm"]["scale"], m)) @ gate["out"]
        if "ffn" in q:
            update = update + swiglu(norm(x0, q["norm"]["scale"], m), q["ffn"])
        x = x + update
    head = params["embedding"] if m.tie_embeddings else params["head"]
    return norm(x, params["final_norm"]["scale"], m) @ head.T


def from_llama(tensors, m):
    """Parameters for `logits` from tensors with Llama's names, independent of the package's own table of names."""
    tensors = {name.removesuffix(".weight"): np.asarray(tensor) for name, tensor in tensors.items()}
    layers, memory = [], []
    for layer in range(m.layers):
        w = {name.split(".", 3)[3]: t for name, t in tensors.items() if name.startswith(f"model.layers.{layer}.")}
        heads = {part: w[f"self_attn.{part}_proj"].T.reshape(m.dim, -1, m.head_dim) for part in "qkv"}
        heads["out"] = w["self_attn.o_proj"].T.reshape(m.heads, m.head_dim, m.dim)
        layers.append({"attention": heads, "attention_norm": {"scale": w["input_layernorm"]}})
        ffns = {where: {p: w.get(f"{where}.{p}_proj") for p in ("gate", "up", "down")} for where in ("mlp", "memory")}
        mlp, token = ({p: t.T for p, t in ffn.items() if t is not None} for ffn in ffns.values())
        if mlp:
            layers[-1] |= {"ffn": mlp, "ffn_norm": {"scale": w["post_attention_layernorm"]}}
        if token:
            memory.append({"ffn": token, "norm": {"scale": w["memory.norm"]}})
    stacked = {"layers": layers, "memory": memory} if memory else {"layers": layers}
    out = {name: jax.tree.map(lambda *x: np.stack(x), *trees) for name, trees in stacked.items()}
    out |= {"embedding": tensors["model.embed_tokens"], "final_norm": {"scale": tensors["model.norm"]}}
    return out | ({} if m.tie_embeddings else {"head": tensors["lm_head"]})


def loss(params, windows, config):
    """Mean over all positions of negative log-likelihood + z_loss * log-partition^2."""
    z = logits(params, windows[:, :-1], config.model)
    lse = jax.nn.logsumexp(z, -1)
    nll = lse - jnp.take_along_axis(z, windows[:, 1:, None], -1)[..., 0]
    return (nll + config.optimizer.z_loss * lse**2).mean()
