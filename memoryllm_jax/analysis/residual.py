"""What a layer's memories make of the residual stream: how many take part, how they add up, and what the layer changes.

Geva et al. 2021, arXiv 2012.14913, section 5. r_l is the residual that the layer's memories are added to, X_l + Attn_l;
y_l what they add (of flex, FFN-C and FFN-M together); o_l = r_l + y_l; o_L the last. top(x) is the likeliest token that
the output head, its final norm applied, makes of x.
"""

import jax
import jax.numpy as jnp
import numpy as np

from memoryllm_jax.analysis import values
from memoryllm_jax.analysis.corpus import Corpus, states
from memoryllm_jax.analysis.key_values import Inside, key_coefficients
from memoryllm_jax.analysis.vocabulary import chunk_count, chunks, every_id
from memoryllm_jax.common import plots
from memoryllm_jax.common.errors import UserError
from memoryllm_jax.common.legacy import at_least
from memoryllm_jax.common.progress import Progress
from memoryllm_jax.inference.decoder import bucket

_SHORT = 5  # tokens: a prefix with fewer is short, as in the paper


def _example_states(inside: Inside, corpus: Corpus, examples: np.ndarray, label: str):
    """Yields (labels of a batch's examples, their States in order of the layers, filled up to few sizes)."""
    progress = Progress(label, corpus.batches, "batch")
    for number, (tokens_BT, labels, real) in enumerate(corpus, 1):
        at = np.flatnonzero(real & np.isin(labels, examples))
        if len(at):
            rows = np.pad(at, (0, bucket(len(at), len(labels)) - len(at)), "edge")
            yield labels[at], [jax.tree.map(lambda x, rows=rows: x[rows], s) for s in states(inside, tokens_BT)]
        progress.update(number)
    progress.close()


def _open(inside, page, data, split, length, limit, examples, seed):
    at_least({"examples": examples})
    corpus = Corpus(inside, data, split, length, limit)
    labels = corpus.examples(examples, seed)
    page.facts |= corpus.facts() | {"examples": f"{len(labels):,} prefixes drawn at random, seed {seed}"}
    return corpus, labels


def active(
    inside: Inside,
    page,
    ffn: str = "",
    mass: float = 0.9,
    examples: int = 4000,
    data: str = "",
    split: str = "validation",
    length: int = 64,
    limit: int = 1 << 16,
    seed: int = 0,
) -> dict:
    """Share of a layer's memories that are active.

    Geva et al. 2021, section 5.1 and figure 7, count coefficients above zero, as ReLU makes the others zero. SwiGLU
    makes none zero, and its coefficients have two signs, so that threshold does not carry over. In its place: memory i
    adds c_i v_i, of size |c_i| |v_i|; active are the fewest memories that hold `mass` (90%) of the sum of these sizes.
    Scaling a key up and its value down changes nothing of the model, nor does it change this measure, as it would |c_i|
    > 0.1. If all memories added the same, 90% would be active. For FFN-C and base's FFN: over prefixes drawn at random
    from the text; for FFN-M: over every token of the vocabulary, each counted once.
    """
    ffn = inside.ffn_name(ffn)
    if not 0 < mass < 1:
        raise UserError(f"--mass: expected a share between 0 and 1, found {mass}")
    L, F = inside.config.layers, inside.width(ffn)
    norms = [jnp.linalg.norm(inside.values(ffn, layer), axis=1) for layer in range(L)]
    counts: list[list] = [[] for _ in range(L)]
    if ffn == "memory":
        page.facts["data"] = f"the whole vocabulary, {inside.config.vocab_size:,} tokens"
        progress = Progress("active", L * chunk_count(inside.config.vocab_size), "chunk")
        for layer in range(L):
            for ids_C, real_C in chunks(every_id(inside)):
                count_C = active_count(inside.token_coefficients(layer, ids_C), norms[layer], mass)
                counts[layer].append(np.asarray(count_C)[real_C])
                progress.update(progress.done + 1)
        progress.close()
    else:
        for at, layers in _example_states(
            inside, *_open(inside, page, data, split, length, limit, examples, seed), "active"
        ):
            for layer, state in enumerate(layers):
                c_NF = key_coefficients(state.queries[ffn], inside.layer(ffn, layer))
                counts[layer].append(np.asarray(active_count(c_NF, norms[layer], mass))[: len(at)])
    shares = [100 * np.concatenate(of) / F for of in counts]
    series = {
        "mean": [float(s.mean()) for s in shares],
        "lowest tenth of queries": [float(np.quantile(s, 0.1)) for s in shares],
        "highest tenth": [float(np.quantile(s, 0.9)) for s in shares],
    }
    page.figure(
        "share",
        plots.by_layer(series, "active memories, %"),
        f"Fewest of {inside.label(ffn)}'s {F} memories with {mass:.0%} of all |c| |v|; {len(shares[0]):,} queries.",
    )
    with page.csv("layers", ["layer", *series]) as write:
        write(zip(range(L), *series.values()))
    page.table(["layer", *(f"{name}, %" for name in series)], list(zip(range(L), *series.values())))
    return {"ffn": ffn, "mass": mass, "queries": len(shares[0]), "width": F, "percent_active": series}


@jax.jit
def active_count(c_NF, norms_F, mass):
    """The fewest memories whose |c_i| |v_i| sum to `mass` of all, [N]."""
    size_NF = -jnp.sort(-jnp.abs(c_NF.astype(jnp.float32)) * norms_F, axis=1)
    held_NF = jnp.cumsum(size_NF, 1)
    return (held_NF < mass * held_NF[:, -1:]).sum(1) + 1


def _likeliest(inside, x_ND, unit, of=None):
    """(top token, probability of the tokens `of`) [N] of vectors."""
    tops, p = [], []
    for part, logits in inside.logits(x_ND, unit):
        tops.append(np.asarray(logits.argmax(-1)))
        if of is not None:
            own = logits[jnp.arange(len(logits)), of[part]]
            p.append(np.asarray(jnp.exp(own - jax.nn.logsumexp(logits, axis=-1))))
    return np.concatenate(tops), np.concatenate(p) if p else None


def compose(
    inside: Inside,
    page,
    examples: int = 4000,
    data: str = "",
    split: str = "validation",
    length: int = 64,
    limit: int = 1 << 16,
    seed: int = 0,
) -> dict:
    """How often a layer's top prediction differs from that of every single one of its memories.

    Geva et al. 2021, section 5.1 and figure 8: top(y_l) against top(v_i) of all memories i. Here memory i adds c_i v_i
    and c_i may be negative, so it is top(v_i) or top(-v_i) by the sign of c_i; of flex, the memories are those of FFN-C
    and FFN-M together. Of the rest, where some memory has the layer's prediction: how many predictions are stop words
    (scikit-learn's English list), and how many prefixes have fewer than 5 tokens; both also over all examples.
    """
    corpus, labels = _open(inside, page, data, split, length, limit, examples, seed)
    L, kinds = inside.config.layers, [ffn for ffn in ("memory", "compute") if inside.width(ffn)]
    stop_V = stop_words(inside.texts)
    progress = Progress("values", L, "layer")
    tops = []
    for layer in range(L):
        tops.append({kind: values.both_tops(inside, kind, layer) for kind in kinds})
        progress.update(layer + 1)
    progress.close()
    found, shorts = [[] for _ in range(L)], []
    for at, layers in _example_states(inside, corpus, labels, "compose"):
        short = at % corpus.length + 1 < _SHORT
        for layer, state in enumerate(layers):
            top_y, _ = _likeliest(inside, state.output_ND - state.residual_ND, True)
            c = {kind: np.asarray(key_coefficients(state.queries[kind], inside.layer(kind, layer))) for kind in kinds}
            single = np.any([_predicts(c[kind], tops[layer][kind], top_y) for kind in kinds], 0)
            found[layer].append(np.stack([~single, stop_V[top_y]])[:, : len(at)])
        shorts.append(short)
    rows = []
    for layer in range(L):
        (composed, stop), short = np.concatenate(found[layer], 1), np.concatenate(shorts)
        share = lambda x, of: 100 * float(x[of].mean()) if of.any() else np.nan  # noqa: E731
        rows.append(
            {
                "layer": layer,
                "composed": share(composed, np.ones_like(composed)),
                "stop words of the rest": share(stop, ~composed),
                "short prefixes of the rest": share(short, ~composed),
                "stop words of all": share(stop, np.ones_like(composed)),
                "short prefixes of all": share(short, np.ones_like(composed)),
            }
        )
    pick = lambda name: [row[name] for row in rows]  # noqa: E731
    page.figure(
        "composed",
        plots.by_layer({"composed": pick("composed")}, "examples, %"),
        f"Share of {len(labels):,} examples in which the layer's top token is that of none of its memories.",
    )
    page.figure(
        "rest",
        plots.by_layer({name: pick(name) for name in list(rows[0])[2:]}, "share, %"),
        "Stop words and prefixes of fewer than 5 tokens, among the rest and among all examples.",
    )
    with page.csv("layers", list(rows[0])) as write:
        write(row.values() for row in rows)
    page.table(["layer", *(f"{name}, %" for name in list(rows[0])[1:])], [list(row.values()) for row in rows])
    return {"examples": len(labels), "percent_by_layer": rows}


def _predicts(c_NF, tops_2F, top_N) -> np.ndarray:
    """Whether one memory's own top token is the layer's, [N]."""
    positive = (tops_2F[0] == top_N[:, None]) & (c_NF > 0)
    return (positive | ((tops_2F[1] == top_N[:, None]) & (c_NF < 0))).any(1)


def stop_words(texts: list[str]) -> np.ndarray:
    """Whether each token is an English stop word by scikit-learn's list. Raises: UserError."""
    try:
        from sklearn.feature_extraction.text import ENGLISH_STOP_WORDS
    except ImportError as error:
        raise UserError("this analysis needs scikit-learn: pip install 'memoryllm_jax[analyze]'") from error
    return np.array([text.strip("␣").lower() in ENGLISH_STOP_WORDS for text in texts])


def residual(
    inside: Inside,
    page,
    examples: int = 4000,
    data: str = "",
    split: str = "validation",
    length: int = 64,
    limit: int = 1 << 16,
    seed: int = 0,
) -> dict:
    """How early the residual holds the final prediction, and what each layer's update does to the top prediction.

    Geva et al. 2021, section 5.2. Figure 9: how often top(r_l) = top(o_L). Figure 10: the probability of the token
    top(o_L) under r_l. Figure 11, by top(o_l): residual, if it is top(r_l) and not top(y_l); agreement, if it is both;
    FFN, if it is top(y_l) alone; composition, if it is neither. The final norm is applied to all, and y_l brought to
    root mean square 1 before it. Attention of the same layer is part of r_l, in memory and flex as in base.
    """
    corpus, labels = _open(inside, page, data, split, length, limit, examples, seed)
    L = inside.config.layers
    found: list[list] = [[] for _ in range(L)]
    for at, layers in _example_states(inside, corpus, labels, "residual"):
        last, _ = _likeliest(inside, layers[-1].output_ND, False)
        for layer, state in enumerate(layers):
            top_r, p = _likeliest(inside, state.residual_ND, False, last)
            top_y, _ = _likeliest(inside, state.output_ND - state.residual_ND, True)
            top_o = last if layer == L - 1 else _likeliest(inside, state.output_ND, False)[0]
            is_r, is_y = top_o == top_r, top_o == top_y
            cases = is_r & ~is_y, is_r & is_y, is_y & ~is_r, ~(is_r | is_y)
            found[layer].append(np.stack([top_r == last, p, *cases])[:, : len(at)])
    means = 100 * np.array([np.concatenate(of, 1).mean(1) for of in found])
    names = ["settled", "probability", "residual", "agreement", "FFN", "composition"]
    by = {name: means[:, k].tolist() for k, name in enumerate(names)}
    series = {"top(r) is the final token": by["settled"], "mean probability of that token": by["probability"]}
    page.figure(
        "settled",
        plots.by_layer(series, "share or probability, %"),
        f"How far the residual before each layer's memories holds the final prediction; {len(labels):,} examples.",
    )
    figure, ax = plots.new_figure()
    left = np.zeros(L)
    for name in names[2:]:
        ax.bar(range(L), by[name], bottom=left, label=name)
        left += by[name]
    ax.set_xlabel("layer")
    ax.set_ylabel("examples, %")
    ax.xaxis.get_major_locator().set_params(integer=True)
    plots.legend(ax)
    page.figure("wins", figure, "Where the layer's top prediction comes from.")
    with page.csv("layers", ["layer", *names]) as write:
        write(zip(range(L), *by.values()))
    page.table(["layer", *(f"{name}, %" for name in names)], list(zip(range(L), *by.values())))
    return {"examples": len(labels), "percent": by}
