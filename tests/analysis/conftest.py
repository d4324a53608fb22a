"""Models to analyse, a function that runs an analysis, and the model's equations in NumPy to compare with."""

import functools
import json
from typing import NamedTuple

import by_hand
import jax
import numpy as np
import pytest
import reference
from by_hand import FIRES, LENGTH, one_token_keys

from memoryllm_jax import analyze
from memoryllm_jax.analysis import run as analysis_run
from memoryllm_jax.analysis.corpus import CorpusOptions, ExampleOptions
from memoryllm_jax.analysis.key_values import KeyValueModel


@pytest.fixture
def run(tmp_path):
    """run("values", model, **options) returns the results in the analysis's JSON. Its files are in tmp_path / "out"."""

    def call(command, model, **options):
        output = tmp_path / "out"
        analysis_run.run(analyze.ANALYSES[command], [model], str(output), **options)
        return json.loads((output / f"{command}.json").read_text())["results"]

    return call


@pytest.fixture(scope="session")
def make_model(lab):
    """make_model("base", change) returns a model with small random weights, some of which `change` has set."""
    return lambda architecture, change=lambda params: None: by_hand.changed(lab.workdir(architecture), change)


@pytest.fixture(scope="session")
def token_keys(make_model):
    """A memory model with two keys, 1:3 and 1:4, that fire on one token alone."""
    return make_model("memory", lambda params: one_token_keys(params, "memory"))


class PrefixKeys(NamedTuple):
    """A base model with two keys, 1:3 and 1:4, that fire on one frequent token of the text alone.

    fires: the token.
    triggers: labels of the prefixes that end in it.
    follows: the token after the first of these prefixes, which the values of both keys say.
    """

    model: KeyValueModel
    text: CorpusOptions
    fires: int
    triggers: np.ndarray
    follows: int


@pytest.fixture(scope="session")
def prefix_keys(make_model, data_path):
    text = CorpusOptions(data_path, "train", LENGTH, limit=1 << 11)
    corpus = text.open(make_model("base"))
    tokens = np.concatenate([corpus.prefix(label) for label in range(LENGTH - 1, corpus.positions, LENGTH)])
    counts = np.bincount(tokens, minlength=512)
    # Tokens that occur twice in a row are not chosen: without the last token, the key would still fire.
    counts[tokens[1:][tokens[1:] == tokens[:-1]]] = 0
    fires = int(counts.argmax())
    triggers = np.flatnonzero(tokens == fires)
    follows = int(tokens[triggers[0] + 1])
    assert triggers[0] % LENGTH < LENGTH - 1  # so that tokens[triggers[0] + 1] is of the same window

    def change(params):
        one_token_keys(params, "layers")
        # `fires` takes the place of FIRES.
        params["embedding"][[FIRES, fires]] = params["embedding"][[fires, FIRES]]
        down = params["layers"]["ffn"]["down"]
        down[0] = 0
        down[1, 3] = params["head"][follows]
        down[1, 4] = -params["head"][follows]  # key 4 has c < 0, so its value is read with a minus

    return PrefixKeys(make_model("base", change), text, fires, triggers, follows)


@pytest.fixture(scope="session")
def two_kinds(make_model):
    """(a model whose tokens' embeddings point in two directions, whether each token's is the first)

    Tokens whose text begins with a space have the first direction.
    """
    is_spaced = np.array([text.startswith("␣") for text in make_model("memory").texts])

    def change(params):
        params["embedding"][:] *= 0.1
        params["embedding"][is_spaced, 0] += 4
        params["embedding"][~is_spaced, 1] += 4

    return make_model("memory", change), is_spaced


class InNumpy:
    """A trained model, with its equations in NumPy, evaluated on all tokens or on a few windows of text."""

    def __init__(self, model: KeyValueModel, data_path: str):
        self.model, self.config = model, model.config
        self.p = jax.tree.map(np.asarray, model.params)
        self.text = ExampleOptions(data_path, "train", LENGTH, limit=7 * LENGTH, examples=7 * LENGTH)
        self.windows = np.concatenate([tokens_BT for tokens_BT, *_ in self.text.open(model)])[:7]

    def norm(self, x, scale):
        """The model's norm, by the independent reference."""
        return np.asarray(reference.norm(x, scale, self.config))

    def says(self, x):
        """The logits of vectors of the residual stream."""
        z = self.norm(x, self.p["final_norm"]["scale"]) @ self.p["head"].T
        cap = self.config.logit_softcap
        return cap * np.tanh(z / cap) if cap else z

    def says_unit(self, x):
        """The logits of vectors that are first brought to root mean square 1."""
        return self.says(x / np.sqrt((x * x).mean(-1, keepdims=True)))

    def c(self, q, ffn):
        """The coefficients of queries."""
        return np.asarray(jax.nn.silu(q @ ffn["gate"]) * (q @ ffn["up"]))

    def ffn(self, kind, layer):
        """The weights of FFN-M ("memory"), or of FFN-C and base's FFN ("compute")."""
        return self.p["memory" if kind == "memory" else "layers"][layer]["ffn"]

    def asked(self, kind, layer):
        """Queries [N, D]: those of every token to FFN-M, or those of all positions of the windows to FFN-C."""
        if kind == "memory":
            return self.norm(self.p["embedding"], self.p["memory"][layer]["norm"]["scale"])
        return self.states[0][layer]["compute"]

    @functools.cached_property
    def states(self):
        """What `forward` returns for the windows of text."""
        return self.forward(self.windows)

    def forward(self, tokens_BT):
        """(queries, residuals, outputs), each with an entry for each layer; all positions are in one axis."""
        m = self.config
        queries, residuals, outputs = [], [], []
        x = x0 = self.p["embedding"][tokens_BT]
        for layer in range(m.layers):
            at = self.p["layers"][layer]
            asked = {}  # the queries of the layer's FFNs
            y = 0  # what the FFNs add
            r = x + np.asarray(reference.attention(self.norm(x, at["attention_norm"]["scale"]), at["attention"], m))
            if m.compute_dim:
                source = r if m.compute_input == "after_attention" else x
                asked["compute"] = self.norm(source, at["ffn_norm"]["scale"]).reshape(-1, m.dim)
            if m.memory_dim:
                asked["memory"] = self.norm(x0, self.p["memory"][layer]["norm"]["scale"]).reshape(-1, m.dim)
            for kind, q in asked.items():
                y = y + (self.c(q, self.ffn(kind, layer)) @ self.ffn(kind, layer)["down"]).reshape(x.shape)
            x = r + y
            queries.append(asked)
            residuals.append(r.reshape(-1, m.dim))
            outputs.append(x.reshape(-1, m.dim))
        return queries, residuals, outputs


@pytest.fixture(scope="session")
def in_numpy(lab, data_path):
    """in_numpy("flex-3") returns an InNumpy, which is made once."""

    def change(params):
        """Makes one value so small that the final norm's epsilon would hide what it says."""
        for group in ("layers", "memory"):
            if "ffn" in params.get(group, {}):
                params[group]["ffn"]["down"][1, 5] *= 1e-4

    @functools.cache
    def make(architecture):
        return InNumpy(by_hand.changed(lab.workdir(architecture), change, keep_weights=True), data_path)

    return make
