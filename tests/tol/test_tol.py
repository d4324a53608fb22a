"""From a checkpoint to a ToL file to text: lookups against the plain equations, serving, compression, edits, commands.

Everything a file gives back is held against tests/reference.py on the checkpoint's own parameters.
"""

import collections
import contextlib
import errno
import functools
import gc
import itertools
import json
import os
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from lab import free_port, with_devices

from memoryllm_jax import config, generate
from memoryllm_jax.checkpoint.trained import TrainedModel
from memoryllm_jax.common import legacy
from memoryllm_jax.common.errors import UserError
from memoryllm_jax.data import shards
from memoryllm_jax.inference import sampling
from memoryllm_jax.inference.decoder import Decoder, bucket
from memoryllm_jax.inference.rows import LiveRows
from memoryllm_jax.inference.sampling import Sampling
from memoryllm_jax.model import sharding
from memoryllm_jax.model.token_memory import TokenRows
from memoryllm_jax.tol import budget, build, codec, compress, edit, serving, verify
from memoryllm_jax.tol import rows as tol_rows
from memoryllm_jax.tol.__main__ import verify_command
from memoryllm_jax.tol.format import TolFile, TolWriter
from memoryllm_jax.tol.layout import Layout, Tier
from memoryllm_jax.tol.reader import RowReader
from memoryllm_jax.tol.rows import CachedRows, DeviceRows, HostTable
from memoryllm_jax.training import loop

CONTEXT, GREEDY = 64, Sampling(temperature=0)
MODELS = {
    "memory": ("memory", {}),
    "flex": ("flex-3", {"model.layers": 3, "checkpoint.every": 12}),
    "tied": ("memory", {"model.tie_embeddings": True, "model.norm": "layernorm"}),
    "base": ("base", {}),
    "other": ("memory", {"steps": 2, "data.path": "other"}),  # of the same shapes, with another tokenizer
}


class Lab:
    """Trained models and their ToL files, each made when it is first asked for."""

    def __init__(self, data_path, corpus, folder):
        self.data_path, self.corpus, self.folder = data_path, corpus, folder
        self.tol = functools.cache(self._tol)
        self.workdir = functools.cache(self._workdir)
        self.params = functools.cache(self._params)

    def _workdir(self, name):
        architecture, overrides = MODELS[name]
        c = config.default(architecture)
        c.steps, c.batch_size, c.seq_len = 24, 8, CONTEXT
        c.model.dim, c.model.layers, c.model.heads, c.model.dtype = 32, 2, 4, "float32"
        c.model.init_std = 0.1  # so that texts vary
        c.data.path, c.data.epochs = self.data_path, 9
        c.optimizer.peak_lr, c.optimizer.warmup_steps = 2e-2, 2
        c.eval.batches, c.log.every, c.log.tensorboard = 1, 100, False
        c.update_from_flattened_dict(overrides)
        if c.data.path == "other":
            c.data.path = str(self.folder / "data")
            text = self.folder / "other.jsonl"
            with open(self.corpus) as file:
                text.write_text("".join(file.readlines()[::2]))
            shards.prepare(str(text), "sentencepiece:train:512", c.data.path, validation_fraction=0.1)
        workdir = str(self.folder / name)
        assert loop.train(config.resolve(c), workdir, jax.devices()[:1]) == 0
        return workdir

    def _tol(self, name, **choices):
        path = str(self.folder / f"{name}{len(os.listdir(self.folder))}.safetensors")
        compress.precompute(self.workdir(name), path, compress.Options(**choices))
        return path

    def _params(self, name):
        """(parameters as they were trained, layers stacked; config)."""
        trained = TrainedModel(self.workdir(name))
        params, _ = trained.load(lambda _: True)
        stacked = {k: jax.tree.map(lambda *x: jnp.stack(x), *params[k]) for k in ("layers", "memory") if k in params}
        return params | stacked, trained.config

    def memory(self, name, change=lambda layer, p: p):
        """FFN-M of the whole vocabulary from the equations: [layers, V, D]. `change` alters a layer's parameters."""
        params, m = self.params(name)
        layers = [jax.tree.map(lambda a, i=i: a[i], params["memory"]) for i in range(m.layers)]
        layers = [change(i, p) for i, p in enumerate(layers)]
        x0 = params["embedding"]
        return np.stack([reference.swiglu(reference.norm(x0, p["norm"]["scale"], m), p["ffn"]) for p in layers])

    def model(self, name, *args, **kwargs):
        return contextlib.closing(serving.open_engine(self.workdir(name), *args, **kwargs))


@pytest.fixture(scope="session")
def lab(data_path, corpus, tmp_path_factory):
    return Lab(data_path, corpus, tmp_path_factory.mktemp("lab"))


@contextlib.contextmanager
def opened(path):
    tol = TolFile(path)
    yield tol
    tol.close()


def file_rows(tol, overlay=None):
    """{part name: [V, D]} of all tokens, as the file holds them."""
    ids = np.arange(tol.vocab_size, dtype=np.int32)
    reader = RowReader(tol)
    vectors = {name: np.asarray(x) for name, x in build.RowDecoder(tol)(*reader.read(ids)).items()}
    reader.close()
    return vectors


def step_logits(decoder, rows, tokens, first=1):
    """Logits after each of tokens[first - 1:]: a prefill of `first` tokens, then decode steps. [n, V]"""
    cache = decoder.empty_cache(decoder.shards, bucket(len(tokens), CONTEXT))
    batch = np.repeat(np.array(tokens, np.int32)[None], decoder.shards, 0)
    ids, index = np.unique(batch, return_inverse=True)
    index, rows = index.reshape(batch.shape).astype(np.int32), rows.fetch(ids.astype(np.int32))
    lengths = np.full(decoder.shards, first, np.int32)
    logits, cache = decoder.prefill(rows, index[:, :first], lengths, np.arange(decoder.shards, dtype=np.int32), cache)
    out = [np.asarray(logits[-1])]
    for position in range(first, len(tokens)):
        logits, cache = decoder.step(rows, index[:, position], np.full(decoder.shards, position, np.int32), cache)
        out.append(np.asarray(logits[-1]))
    return np.stack(out)


def written(model, prompts, tokens=12, settings=GREEDY, **more):
    """The new tokens of each prompt."""
    out = [[] for _ in prompts]
    for new in model.generate(prompts, tokens, settings, **more):
        for sequence, token in new:
            out[sequence].append(token)
    return out


def some_tokens(count, seed=0):
    return np.random.default_rng(seed).integers(3, 512, count).tolist()


class Table:
    """Rows from given arrays, [V, D] and [layers, V, D]."""

    on_device = False

    def __init__(self, x0, ffn):
        self.x0, self.ffn = x0, ffn

    def fetch(self, ids):
        return TokenRows(jnp.asarray(self.x0[ids])[None], [jnp.asarray(y[ids])[None] for y in self.ffn])


def relative(a, b, axis=None):
    return np.linalg.norm(np.float64(a) - b, axis=axis) / np.linalg.norm(np.float64(b), axis=axis)


@contextlib.contextmanager
def killed_after(monkeypatch, chunks):
    record = TolWriter.record

    def recorded(self, count):
        record(self, count)
        if count == chunks:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(TolWriter, "record", recorded)
        yield


# Exactness


@pytest.mark.parametrize("name", ["memory", "flex", "tied"])
def test_rows_are_the_live_memory_of_every_token(lab, name):
    expected, (params, m) = lab.memory(name), lab.params(name)
    with opened(lab.tol(name)) as tol:
        rows = file_rows(tol)
        assert tol.layout.codec() == "float32" and tol.layout.has_x0 == (name != "tied")
        assert set(rows) == {f"ffn.{layer}" for layer in range(m.layers)} | ({"x0"} if name != "tied" else set())
        for layer, y in enumerate(expected):
            assert relative(rows[f"ffn.{layer}"], y, axis=1).max() < 1e-6
    with opened(lab.tol(name, bits="16")) as tol:
        for part, half in file_rows(tol).items():
            exact = np.asarray(rows[part])
            # Half a unit in the last place of bfloat16, and what the order of float32 sums may add.
            bound = 2.0**-8 * np.abs(exact) + 1e-6 * np.abs(exact).max()
            assert (np.abs(half.astype(np.float32) - exact) <= bound).all()
            assert (np.abs(half.astype(np.float32) - exact) > 2.0**-10 * np.abs(exact)).any()
    if name != "tied":
        np.testing.assert_array_equal(rows["x0"], params["embedding"])


@pytest.mark.parametrize("name", ["memory", "flex", "tied"])
def test_logits_from_rows_of_a_file_are_those_of_the_equations(lab, name):
    params, m = lab.params(name)
    tokens = some_tokens(40)
    expected = np.asarray(reference.logits(params, np.array([tokens]), m))[0]
    for place, bits, bound in (("disk", "", 3e-5), ("device", "", 3e-5), ("host", "16", 0.05)):
        with lab.model(name, lab.tol(name, bits=bits), place, cache_bytes=64 << 10) as model:
            found = step_logits(model.decoder, model.rows, tokens, first=20)
        assert np.abs(found - expected[19:]).max() < bound * np.abs(expected).max(), (place, bits)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["memory", "flex", "base"])
def test_decode_steps_batches_and_meshes_agree_with_the_equations(lab, name):
    """With random weights, as the greedy text of a model that barely trained repeats one frequent token."""
    _, m = lab.params(name)
    prompts = [some_tokens(n, seed=n) for n in (5, 17, 40)]

    def on(*mesh):
        mesh = sharding.make_mesh(config.MeshConfig(*mesh), jax.devices()[: np.prod(mesh)])
        trained = TrainedModel(lab.workdir(name), mesh=mesh)
        weights, _ = trained.load(lambda _: True)
        rng = np.random.default_rng(0)
        weights = jax.tree.map(lambda x: jax.device_put(rng.normal(0, 0.3, x.shape).astype("f"), x.sharding), weights)
        return (Decoder(trained.config, weights, mesh), LiveRows(trained.config, weights, mesh)), weights

    def texts(decoder, rows, prompts):
        out = [[] for _ in prompts]
        for new in sampling.generate(decoder, rows, prompts, 12, GREEDY, 0, CONTEXT, 512):
            for sequence, token in new:
                out[sequence].append(token)
        return out

    one, params = on(1, 1, 1)
    stacked = {k: jax.tree.map(lambda *x: jnp.stack(x), *params[k]) for k in ("layers", "memory") if k in params}
    together = texts(*one, prompts)
    tokens = prompts[-1] + together[-1]
    expected = np.asarray(reference.logits(params | stacked, np.array([tokens]), m))[0]
    found = step_logits(*one, tokens, first=37)
    np.testing.assert_allclose(found, expected[36:], atol=3e-5 * np.abs(expected).max())
    assert found.argmax(-1)[3:-1].tolist() == expected.argmax(-1)[39:-1].tolist() == together[-1]
    assert len({token for text in together for token in text}) > 12  # not one token over and over
    assert together == [texts(*one, [p])[0] for p in prompts]
    if name == "flex":
        assert together == texts(*on(2, 2, 2)[0], prompts)


def test_same_seed_same_text_wherever_rows_are(lab):
    settings = Sampling(0.9, top_k=40, top_p=0.95)
    prompts = [some_tokens(n, seed=n) for n in (3, 20, 9)]
    with lab.model("flex") as model:
        live = written(model, prompts, 24, settings, seed=7)
        assert live != written(model, prompts, 24, settings, seed=8)
        assert live != written(model, prompts, 24, GREEDY)
    plain, counted = lab.tol("flex"), lab.tol("flex", data=lab.data_path)
    row = 4 * 4 * 32  # bytes
    for path, place, cached in [
        (plain, "device", 1),
        (plain, "host", 4),
        (counted, "disk", 3),
        (plain, "disk", 1),
    ]:
        with lab.model("flex", path, place, cache_bytes=cached * row) as model:
            assert written(model, prompts, 24, settings, seed=7) == live, (place, cached)
            stats = model.rows.stats()
            if place != "device":
                assert stats["cache_bytes"] == cached * row and model.rows.misses > cached  # rows had to leave
                assert stats["bytes_per_token"] == model.rows.misses * row / stats["row_requests"]
            if path == counted:
                assert stats["misses_hinted"] > 0
    with lab.model("flex", counted, cache_bytes=512 * row) as model:  # began with all rows in the cache
        assert written(model, prompts, 24, settings, seed=7) == live and model.rows.stats()["hit_rate"] == 1


def test_model_in_bfloat16_takes_the_file_of_its_checkpoint(lab):
    with lab.model("flex", lab.tol("flex", bits="16"), dtype="bfloat16") as model:
        assert len(written(model, [[5, 6]], 2)[0]) == 2 and model.config.dtype == "bfloat16"


# Sampling


def draws(logits, count, settings, vocab, seed=0):
    logits = jnp.tile(jnp.asarray(logits, jnp.float32), (count, 1))
    sequences = np.arange(count, dtype=np.int32)
    return np.asarray(sampling.draw(logits, np.uint32(seed), sequences, sequences % 7, settings, vocab))


def test_draws_follow_the_softmax_within_their_limits():
    rng = np.random.default_rng(0)
    logits, count, vocab = rng.normal(0, 1.5, 12), 6000, 9
    logits[9:] = 20.0  # ids past the vocabulary, though likeliest
    p = np.exp(logits[:vocab] / 0.7)
    order = np.argsort(-p)
    nucleus = order[: int(np.searchsorted(np.cumsum(p[order]) / p.sum(), 0.8)) + 1]
    assert 2 < len(nucleus) < 8
    for limits, kept in (({}, order), ({"top_k": 4}, order[:4]), ({"top_p": 0.8}, nucleus)):
        seen = np.bincount(draws(logits, count, Sampling(0.7, **limits), vocab), minlength=12)
        assert set(np.nonzero(seen)[0]) == set(kept), limits
        expected = count * p[kept] / p[kept].sum()
        assert (np.square(seen[kept] - expected) / expected).sum() < 30  # chi-square of at most 8 degrees
    many = jnp.asarray(rng.normal(0, 1, (64, 12)), jnp.float32)
    at = np.arange(64, dtype=np.int32)
    greedy = np.asarray(many[:, :vocab].argmax(1))
    for settings in (GREEDY, Sampling(2.0, top_k=1), Sampling(2.0, top_p=1e-6)):
        np.testing.assert_array_equal(sampling.draw(many, np.uint32(0), at, at, settings, vocab), greedy)
    again = [draws(logits, 64, Sampling(0.7), vocab, seed).tolist() for seed in (1, 1, 2)]
    assert again[0] == again[1] != again[2]


def test_texts_end_at_stop_tokens_the_context_and_max_tokens(lab):
    prompts = [some_tokens(5), some_tokens(50, seed=1), some_tokens(CONTEXT - 1, seed=2)]
    settings = Sampling(1.0)
    with lab.model("memory") as model:
        full = written(model, prompts, 1000, settings)
        assert [len(p) + len(t) for p, t in zip(prompts, full)] == [CONTEXT] * 3
        assert written(model, prompts, 6, settings) == [t[:6] for t in full]
        assert written(model, prompts, 1, settings) == [t[:1] for t in full]
        stop = full[0][8]
        stopped = written(model, prompts, 1000, settings, stop_ids={stop})
        assert stopped == [list(itertools.takewhile(lambda t: t != stop, text)) for text in full]
        assert len(stopped[0]) <= 8 and len(stopped[1]) > 0
        assert model.stop_ids(["#7"]) == {7, model.tokenizer.eos_id}


# Refusals


def test_files_of_other_models_are_refused(lab, tmp_path):
    path = lab.tol("flex")
    for tol, name, more, found in [
        (path, "flex", {"step": 12}, r"\(its step 24\): parameters \w{12} in the file, \w{12} in the model"),
        (lab.tol("memory"), "other", {}, "tokenizer .* in the file"),
        (lab.tol("memory"), "flex", {}, "layers 2 in the file, 3 in the model; architecture memory .* flex-3"),
        (lab.tol("memory"), "base", {}, "architecture memory in the file, base in the model"),
    ]:
        with pytest.raises(UserError, match=found) as error:
            serving.open_engine(lab.workdir(name), tol, **more)
        assert str(error.value).startswith(tol)
    with pytest.raises(UserError, match="expected a memory or flex model, found base"):
        compress.precompute(lab.workdir("base"), str(tmp_path / "t"), compress.Options())
    lab.workdir("other")
    with pytest.raises(UserError, match=r"--data=.*: made with another tokenizer"):
        compress.precompute(lab.workdir("flex"), str(tmp_path / "t"), compress.Options(data=str(lab.folder / "data")))
    with opened(path) as tol, opened(lab.tol("memory")) as other:
        overlay = edit.Overlay(other, [])
        edit.Editor(other, overlay).add("zero", "#40")
        overlay.save(str(tmp_path / "o"))
        with pytest.raises(UserError, match="made for other rows than those of"):
            edit.Overlay.open(str(tmp_path / "o"), tol)


def test_bad_prompts_and_caches_are_refused(lab, monkeypatch):
    path = lab.tol("memory")
    with lab.model("memory", path) as model:
        for prompts, found in [
            ([[5], some_tokens(CONTEXT)], f"prompt: expected fewer than {CONTEXT} tokens.*found {CONTEXT} in prompt 2"),
            ([[]], "prompt: expected at least one token, found none in prompt 1"),
        ]:
            with pytest.raises(UserError, match=found):
                written(model, prompts)
        with pytest.raises(UserError, match="stop=several words: expected one token"):
            model.stop_ids(["several words"])
    with pytest.raises(UserError, match="prompt 2: expected some text, found an empty prompt"):
        generate.read_prompts(["a", " "], "")
    for text in ("0", "0MiB", "many"):
        with pytest.raises(UserError, match="--cache: expected a size above zero"):
            legacy.size(text, "cache")
    row = 3 * 32 * 4
    for cache in (0, row - 1):
        with pytest.raises(UserError, match=f"--cache: expected at least one row of .*, {row} bytes, found {cache}"):
            serving.open_engine(lab.workdir("memory"), path, cache_bytes=cache)
    monkeypatch.setattr(tol_rows, "host_memory", lambda: 100 * row)
    with lab.model("memory", path, cache_bytes=100 * row):
        pass
    with pytest.raises(UserError, match=r"--cache: needs .* bytes, found 38,400 bytes of memory"):
        serving.open_engine(lab.workdir("memory"), path, cache_bytes=101 * row)
    for place, what in (("host", "rows in host memory"), ("device", "rows on the device")):
        with pytest.raises(UserError, match=f"{path}: {what}: needs 196,608 bytes, found 38,400"):
            serving.open_engine(lab.workdir("memory"), path, place, cache_bytes=row)
    with pytest.raises(UserError, match="rows: expected one of device, host, disk, found 'tape'"):
        serving.open_engine(lab.workdir("memory"), path, "tape")


def test_bad_precompute_options_are_refused_and_leave_nothing(lab, tmp_path, monkeypatch):
    out = str(tmp_path / "t.safetensors")
    for choices, found in [
        ({"bits": "9"}, "--bits: expected one of 32, 16, 8, .*, found '9'"),
        ({"bits": "4,7:8"}, "--bits: expected a layer from 0 to 1, found '7'"),
        ({"drop_layers": ("99",)}, "--drop_layers: expected a layer from 0 to 1, found '99'"),
        ({"rank": "1.5"}, "--rank: expected a share up to 1.0 .*found '1.5'"),
        ({"rank": "0"}, "--rank: expected"),
        ({"total_size": "20KB"}, "a budget is measured on text"),
        ({"total_size": "20KB", "bits": "4", "data": lab.data_path}, "expected one of them, without --bits"),
    ]:
        with pytest.raises(UserError, match=found):
            compress.precompute(lab.workdir("memory"), out, compress.Options(**choices))
    for name in ("tied", "memory"):
        with pytest.raises(UserError, match="--drop_layers: expected at least one layer to stay"):
            compress.precompute(lab.workdir(name), out, compress.Options(drop_layers=("0", "1")))
    real = os.statvfs
    with monkeypatch.context() as patch:
        full = collections.namedtuple("Free", "f_bavail f_frsize")(40, 4096)
        patch.setattr(os, "statvfs", lambda path: full if str(path).startswith(out) else real(path))
        with pytest.raises(UserError, match=r"needs 2\d\d,\d\d\d bytes, found room for 163,840 on its disk"):
            compress.precompute(lab.workdir("memory"), out, compress.Options())
    assert os.listdir(tmp_path) == []


# Damage


def damaged_copy(path, token, copy):
    """A copy of a file with one bit flipped, of a token's row or of a tensor beside the rows."""
    shutil.copy(path, copy)
    with opened(str(copy)) as tol:
        at = tol.tensors[token].start if token in tol.tensors else int(tol.start_of_row[tol.row_of_token[token]]) + 5
    with open(copy, "r+b") as file:
        file.seek(at)
        byte = file.read(1)[0]
        file.seek(at)
        file.write(bytes([byte ^ 64]))
    return str(copy)


def test_damaged_row_is_made_again_or_named(lab, tmp_path, capfd):
    prompts = [some_tokens(9)]
    token = prompts[0][4]
    for choices in ({}, {"bits": "4,1:8", "rank": "0.5"}):
        whole = lab.tol("flex", **choices)
        path = damaged_copy(whole, token, tmp_path / "damaged.safetensors")
        with lab.model("flex", whole) as model:
            expected = written(model, prompts)
        with lab.model("flex", path) as model:
            capfd.readouterr()
            assert written(model, prompts) == expected
            assert model.rows.stats()["rows_repaired"] == 1
            assert f"damaged rows, token {token} first" in capfd.readouterr().err
            with opened(whole) as tol:
                row = RowReader(tol).read(np.array([token]))[0]
                # A sum taken in another order may move an integer by one step, hardly more than one of them.
                repaired = np.stack(build.Repair(model.trained, tol)(np.array([token])))
                assert (repaired != row).sum() <= (2 if choices else row.size // 2)
    with opened(path) as tol:
        reader = RowReader(tol)
        with pytest.raises(UserError, match=f"{path}: token {token}: the checksum of its row differs"):
            reader.read(np.array([3, token, 8]))
        with pytest.raises(UserError, match=f"{path}: token {token}: "):
            HostTable(tol)
        assert verify.damaged(tol) == [token]
        with pytest.raises(UserError, match=rf"{path}: the checksums of 1 of 512 rows differ: tokens #{token}$"):
            verify_command(tol)
    for place in ("host", "device"):
        with lab.model("flex", path, place) as model:
            assert written(model, prompts) == expected
    other = damaged_copy(whole, "basis.ffn.2", tmp_path / "basis.safetensors")
    with opened(other) as tol, pytest.raises(UserError, match=rf"{other}: basis\.ffn\.2: its checksum differs"):
        verify_command(tol)
    # Weights of another checkpoint make other rows: they must not be used.
    with opened(path) as tol, pytest.raises(UserError, match=f"{path}: token {token}: .* other weights"):
        build.Repair(TrainedModel(lab.workdir("flex"), 12), tol)(np.array([token]))


def test_disk_that_fails_names_token_and_file(lab, monkeypatch):
    path = lab.tol("flex")
    real = os.preadv
    with lab.model("flex", path, cache_bytes=1 << 10) as model:
        start = int(model._tol.start_of_row[model._tol.row_of_token[77]])

        def preadv(fd, views, at):
            if at <= start < at + sum(map(len, views)):
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            return real(fd, views, at)

        monkeypatch.setattr(os, "preadv", preadv)
        assert len(written(model, [[5, 6]], 2)[0]) == 2
        with pytest.raises(UserError, match=f"{path}: token 77: its row cannot be read: Input/output error"):
            written(model, [[5, 77, 200]])


def test_short_reads_are_gone_on_with(lab, monkeypatch):
    """A kernel may give fewer bytes than asked for, also in the middle of a row of several read at once."""
    real = os.preadv
    with opened(lab.tol("flex")) as tol:
        expected = file_rows(tol)
        monkeypatch.setattr(os, "preadv", lambda fd, views, at: real(fd, [views[0][: max(1, len(views[0]) // 3)]], at))
        jax.tree.map(np.testing.assert_array_equal, file_rows(tol), expected)


@pytest.mark.parametrize("reads", ["device", "host"])
def test_many_short_rows_are_loaded(lab, tmp_path, reads):
    """More rows in a run than one system call takes buffers (1,024 on Linux)."""
    source = build.LiveSource(TrainedModel(lab.workdir("tied")))
    vocab = 20_000
    layout = Layout(8, 1, False, (Tier(vocab, (codec.Part("ffn.0", (codec.Band(8, 8),)),)),))
    table = np.random.default_rng(0).normal(size=(vocab, 8)).astype(np.float32)
    source.vocab_size, source.dim, source.layers = vocab, 8, 1
    source.vectors = lambda ids: {"ffn.0": jnp.asarray(table)[ids]}
    path = str(tmp_path / "t.safetensors")
    build.build(source, layout, path, np.arange(vocab))
    with opened(path) as tol:
        if reads == "host":
            rows = CachedRows(HostTable(tol), source.mesh, 1 << 10, jnp.zeros((vocab, 8)))
        else:
            rows = DeviceRows(tol, source.mesh, jnp.zeros((vocab, 8)))
        ids = np.array([3, 19_999], np.int32)
        assert relative(rows.fetch(ids).ffn_LSUD[0][0], table[ids]) < 0.01


# Edits


def edited(tol, workdir, *operations):
    overlay = edit.Overlay(tol, [])
    editor = edit.Editor(tol, overlay, workdir)
    for operation, spec in operations:
        editor.add(operation, spec)
    return overlay


def rows_of(tol, overlay=None):
    """[V, layers, D]"""
    return edit.read_rows(tol, np.arange(tol.vocab_size, dtype=np.int32), overlay)


def test_swap_shows_in_rows_and_logits_and_is_undone(lab, tmp_path):
    path, overlay_path = lab.tol("flex"), str(tmp_path / "swap")
    with opened(path) as tol:
        text = next(t for t in ("a", "the", ".") if len(tol.tokenizer().encode(t)) == 1)
        a, b = tol.tokenizer().encode(text)[0], 300
        overlay = edited(tol, "", ("swap", f"{text},#{b}"))
        overlay.save(overlay_path)
        before, after = rows_of(tol), rows_of(tol, edit.Overlay.open(overlay_path, tol))
        permuted = np.arange(512)
        permuted[[a, b]] = b, a
        np.testing.assert_array_equal(after, before[permuted])
        assert (after != before).any()
        editor = edit.Editor(tol, overlay)
        assert editor.undo(1)[0].startswith("swap #") and overlay.edits == []
        with pytest.raises(UserError, match="--undo=1: expected from 1 to 0"):
            editor.undo(1)
        np.testing.assert_array_equal(rows_of(tol, overlay), before)
    params, _ = lab.params("flex")
    tokens = [a, 17, b, 30]
    table = Table(np.asarray(params["embedding"]), lab.memory("flex")[:, permuted])
    for place in serving.PLACES:
        with lab.model("flex", path, place, cache_bytes=1 << 10, overlay=overlay_path) as model:
            expected = step_logits(model.decoder, table, tokens)
            found = step_logits(model.decoder, model.rows, tokens)
            np.testing.assert_allclose(found, expected, atol=2e-5 * np.abs(expected).max())
    with lab.model("flex", path) as model:
        assert np.abs(step_logits(model.decoder, model.rows, tokens) - expected)[0].max() > 1e-3
    with pytest.raises(UserError, match="overlay: expected a ToL file too"):
        serving.open_engine(lab.workdir("flex"), overlay=overlay_path)


def test_zero_replace_and_blend_apply_in_order(lab):
    with opened(lab.tol("flex")) as tol:
        expected = rows_of(tol).copy()
        operations = [("zero", "#9"), ("replace", "#11,#12"), ("blend", "#13,#14,0.25"), ("swap", "#13,#9")]
        found = rows_of(tol, edited(tol, "", *operations))
        expected[9] = 0
        expected[11] = expected[12]
        expected[13] = 0.75 * expected[13] + 0.25 * expected[14]
        expected[[9, 13]] = expected[[13, 9]]
        np.testing.assert_allclose(found, expected, atol=1e-7)
        for operation, spec, message in [
            ("zero", "several tokens here", "token 'several tokens here': expected one token, found [0-9]+ .*#ID"),
            ("zero", "#9999999", "token #9999999: expected an id below 512"),
            ("swap", "#9,#9", "--swap=#9,#9: expected two different tokens"),
            ("swap", "#9", "--swap=#9: expected 2 values .* found 1"),
            ("blend", "#9,#8,2", "--blend: expected a share from 0 to 1, found '2'"),
            ("suppress", "1:2", "--suppress: .* give --workdir"),
            ("suppress", "x", "--suppress=x: expected LAYER:KEY"),
        ]:
            with pytest.raises(UserError, match=message):
                edited(tol, "", (operation, spec))
        for spec in ("3:1", "1:56"):
            with pytest.raises(UserError, match="expected a layer below 3 and a key below 56"):
                edited(tol, lab.workdir("flex"), ("suppress", spec))


def without(keys):
    """For `Lab.memory`: the values of (layer, key) pairs set to zero."""

    def change(layer, p):
        down = p["ffn"]["down"]
        for at, key in keys:
            down = down.at[key].set(0) if at == layer else down
        return p | {"ffn": p["ffn"] | {"down": down}}

    return change


@pytest.mark.parametrize("keys", [[(1, 5)], [(1, 5), (0, 7)]])
def test_suppressed_keys_are_values_set_to_zero(lab, keys):
    expected = lab.memory("flex", without(keys)).swapaxes(0, 1)
    assert relative(lab.memory("flex").swapaxes(0, 1), expected) > 1e-3
    with opened(lab.tol("flex")) as tol:
        operations = [("suppress", f"{layer}:{key}") for layer, key in keys]
        found = rows_of(tol, edited(tol, lab.workdir("flex"), *operations))
        assert relative(found, expected) < 2e-6
        with pytest.raises(UserError, match="--suppress=1:5: this key is suppressed already"):
            edited(tol, lab.workdir("flex"), *operations, ("suppress", "1:5"))


def test_suppressed_key_is_also_gone_from_rows_that_were_swapped(lab):
    expected = lab.memory("flex", without([(1, 5)])).swapaxes(0, 1).copy()
    expected[[9, 300]] = expected[[300, 9]]
    with opened(lab.tol("flex")) as tol:
        for operations in ([("suppress", "1:5"), ("swap", "#9,#300")], [("swap", "#9,#300"), ("suppress", "1:5")]):
            found = rows_of(tol, edited(tol, lab.workdir("flex"), *operations))
            assert relative(found, expected) < 2e-6, operations


def test_applied_edits_make_a_file_that_differs_in_those_tokens(lab, tmp_path):
    path = str(tmp_path / "edited.safetensors")
    with opened(lab.tol("flex")) as tol:
        overlay = edited(tol, "", ("swap", "#40,#41"), ("zero", "#500"))
        mesh = sharding.make_mesh(config.MeshConfig(1, 1, 1), jax.devices()[:1])
        edit.apply(tol, overlay, mesh, path)
        with opened(path) as after:
            np.testing.assert_array_equal(rows_of(after), rows_of(tol, overlay))
            result = verify.compare(build.FileSource(tol, mesh), build.FileSource(after, mesh))
            assert result.changed == 3 and {token for token, _, _ in result.most(10)} == {40, 41, 500}
            assert result.by_part["x0"] == 0
            overlay.save(str(tmp_path / "o"))
            with pytest.raises(UserError, match="made for other rows"):
                edit.Overlay.open(str(tmp_path / "o"), after)
    damaged = damaged_copy(lab.tol("flex"), 40, tmp_path / "damaged")
    with opened(damaged) as tol, pytest.raises(UserError, match="token 40: the checksum of its row differs"):
        edit.apply(tol, edit.Overlay.open(str(tmp_path / "o"), tol), mesh, str(tmp_path / "other"))
    assert sorted(os.listdir(tmp_path)) == ["damaged", "edited.safetensors", "o"]
    with lab.model("flex", path) as model:  # the model it was made for still takes it
        assert len(written(model, [[40]])[0]) == 12


# Compression


def errors_of(lab, path, name="flex"):
    """{part: error over norm}, and the rows."""
    with opened(path) as tol:
        rows = file_rows(tol)
    exact = {f"ffn.{layer}": y for layer, y in enumerate(lab.memory(name))}
    return {part: relative(rows[part], y) for part, y in exact.items() if part in rows}, rows


def test_uniform_compression_errs_as_little_as_it_should(lab):
    for bits, low, high in (("8", 1e-4, 0.01), ("4", 0.01, 0.15), ("4,1:8", 1e-4, 0.15)):
        found, rows = errors_of(lab, lab.tol("flex", bits=bits))
        assert all(low < error < high for error in found.values()), (bits, found)
        assert relative(rows["x0"], lab.params("flex")[0]["embedding"]) < 0.01  # at least 8 bits
    assert found["ffn.1"] < 0.01 < min(found["ffn.0"], found["ffn.2"])


def test_low_rank_keeps_the_largest_singular_values(lab):
    found, _ = errors_of(lab, lab.tol("flex", bits="32", rank="0.5,2:1.0"))
    with opened(lab.tol("flex", bits="32", rank="0.5,2:1.0")) as tol:
        assert tol.layout.rotated == {"ffn.0": 16, "ffn.1": 16}
    for layer in (0, 1):
        values = np.linalg.svd(lab.memory("flex")[layer].astype(np.float64), compute_uv=False)
        tail = np.sqrt(np.square(values[16:]).sum() / np.square(values).sum())
        assert tail > 1e-3 and found[f"ffn.{layer}"] == pytest.approx(tail, rel=0.01)
    assert found["ffn.2"] < 1e-6


def test_dropped_layers_are_zero(lab):
    path = lab.tol("flex", drop_layers=("1",))
    found, rows = errors_of(lab, path)
    assert set(rows) == {"x0", "ffn.0", "ffn.2"} and max(found.values()) < 1e-6
    with opened(path) as tol:
        all_rows = rows_of(tol)
        assert json.loads(tol.metadata["dropped_layers"]) == [1] and not all_rows[:, 1].any()
    params, _ = lab.params("flex")
    tokens = some_tokens(8)
    table = Table(np.asarray(params["embedding"]), lab.memory("flex") * np.array([1, 0, 1])[:, None, None])
    with lab.model("flex", path, cache_bytes=1 << 10) as model:
        expected = step_logits(model.decoder, table, tokens)
        found = step_logits(model.decoder, model.rows, tokens)
        np.testing.assert_allclose(found, expected, atol=2e-5 * np.abs(expected).max())


@pytest.fixture(scope="session")
def measured(lab):
    """name -> (source, scorer, full rows of the scored text's tokens)."""

    @functools.cache
    def measure(name):
        trained = TrainedModel(lab.workdir(name))
        source, scorer = build.LiveSource(trained), budget.scorer(trained, lab.data_path, tokens=2048)
        return source, scorer, budget.full_vectors(source, scorer.ids)

    return measure


def file_loss(path, scorer):
    with opened(path) as tol:
        rows = file_rows(tol)
        return scorer.nats({name: jnp.asarray(x, jnp.float32)[scorer.ids] for name, x in rows.items()})


def test_loss_of_full_rows_is_that_of_the_equations(lab, measured):
    _, scorer, vectors = measured("flex")
    params, m = lab.params("flex")
    total = 0.0
    for index, targets, weights in scorer._batches:
        logits = np.asarray(reference.logits(params, scorer.ids[index], m), np.float64)
        lse = np.log(np.exp(logits).sum(-1))
        total += ((lse - np.take_along_axis(logits, targets[..., None], -1)[..., 0]) * weights).sum()
    assert scorer.nats(vectors) == pytest.approx(total / scorer.tokens, rel=1e-5)


@pytest.mark.slow
def test_budgets_are_kept_and_beat_every_uniform_setting(lab, measured, tmp_path):
    source, scorer, vectors = measured("flex")
    uniform = []
    tier = np.zeros(len(scorer.ids), np.int32)
    for bits, rank, dropped in [
        *((bits, "1.0", ()) for bits in (4, 3, 2)),
        (4, "0.5", ()),
        (8, "1.0", ("0",)),
    ]:
        layout = compress.uniform(source, compress.Options(str(bits), rank, dropped))
        gram = build.grams(source, layout, list(layout.rotated), np.ones(512))
        bases = {part: jnp.asarray(build.basis_of(g)[1][: layout.rotated[part]]) for part, g in gram.items()}
        stored = budget.as_stored(layout, vectors, tier, bases)
        uniform.append((layout.total_bytes, scorer.nats(stored), bits, rank, dropped))
    full, losses = scorer.nats(vectors), []
    for per_token in (30, 100):
        total = (per_token + 34 * source.has_x0) * 512
        out = str(tmp_path / f"{per_token}.safetensors")
        compress.write(source, compress.Options(total_size=str(total), data=lab.data_path), out, scorer)
        with opened(out) as tol:
            assert 0 < tol.layout.total_bytes <= total and verify.damaged(tol) == []
        losses.append(file_loss(out, scorer))
        peers = [(loss, *rest) for size, loss, *rest in uniform if size <= total]
        # An error that happens to lower the loss below that of full rows is no merit of a setting.
        assert losses[-1] <= max(min(peers)[0], full) + 1e-5, (total, losses[-1], min(peers))
    assert losses[1] <= losses[0] + 1e-3 and losses[1] < full + 0.02
    with pytest.raises(UserError, match=r"the budget: expected .* found 100"):
        compress.write(source, compress.Options(total_size="100", data=lab.data_path), out, scorer)


def test_budget_is_measured_on_eight_devices_at_long_context(lab):
    mesh = sharding.make_mesh(config.MeshConfig(1, -1, 1))
    trained = TrainedModel(lab.workdir("tied"), mesh=mesh)
    trained.context = 1024
    scorer = budget.scorer(trained, lab.data_path, tokens=4096)
    vectors = budget.full_vectors(build.LiveSource(trained), scorer.ids)
    assert 0 < scorer.nats(vectors) < 8


def test_compress_of_a_file_equals_precompute_with_the_same_options(lab, tmp_path):
    choices = {"bits": "4,2:16", "drop_layers": ("1",)}
    with opened(lab.tol("flex", data=lab.data_path)) as tol:  # order, counts and successors come along
        mesh = sharding.make_mesh(config.MeshConfig(1, 1, 1), jax.devices()[:1])
        compress.write(build.FileSource(tol, mesh), compress.Options(**choices), str(tmp_path / "t"))
    with opened(str(tmp_path / "t")) as tol, opened(lab.tol("flex", data=lab.data_path, **choices)) as direct:
        assert tol.layout == direct.layout and tol.metadata == direct.metadata
        assert relative(rows_of(tol), rows_of(direct)) < 1e-4


# Resuming


def build_on(lab, devices, out, name="flex", **choices):
    mesh = sharding.make_mesh(config.MeshConfig(1, -1, 1), jax.devices()[:devices])
    source = build.LiveSource(TrainedModel(lab.workdir(name), mesh=mesh))
    return compress.write(source, compress.Options(**choices), str(out))


def content(path):
    with open(path, "rb") as file:
        return file.read()


@pytest.fixture
def small_chunks(monkeypatch):
    monkeypatch.setattr(build, "_CHUNK_ROWS", 16)


def test_killed_precompute_goes_on(lab, tmp_path, monkeypatch, small_chunks, capfd):
    out = tmp_path / "t.safetensors"
    choices = compress.Options(bits="8", rank="0.5", data=lab.data_path)
    compress.precompute(lab.workdir("flex"), str(tmp_path / "whole"), choices)
    with killed_after(monkeypatch, 2):
        compress.precompute(lab.workdir("flex"), str(out), choices)
    assert not out.exists() and (tmp_path / "t.safetensors.part").exists()
    capfd.readouterr()
    compress.precompute(lab.workdir("flex"), str(out), choices)
    assert "going on from chunk 2 of 4" in capfd.readouterr().out
    assert content(out) == content(tmp_path / "whole")
    assert sorted(os.listdir(tmp_path)) == ["t.safetensors", "whole"]


def test_killed_on_two_devices_is_finished_by_eight(lab, tmp_path, monkeypatch, small_chunks):
    out = tmp_path / "t.safetensors"
    with killed_after(monkeypatch, 2):
        build_on(lab, 2, out)
    build_on(lab, 8, out)
    with opened(str(out)) as tol:
        assert verify.damaged(tol) == []
        assert relative(rows_of(tol), lab.memory("flex").swapaxes(0, 1)) < 1e-6


def test_killed_with_other_counts_gives_each_token_its_row(lab, tmp_path, monkeypatch, small_chunks):
    out = tmp_path / "t.safetensors"
    source = build.LiveSource(TrainedModel(lab.workdir("flex")))
    layout = compress.uniform(source, compress.Options())
    counts = np.arange(512)
    with killed_after(monkeypatch, 2):
        build.build(source, layout, str(out), np.arange(512)[::-1], counts)
    build.build(source, layout, str(out), np.arange(512), 511 - counts)
    with opened(str(out)) as tol:
        assert verify.damaged(tol) == []
        assert relative(rows_of(tol), lab.memory("flex").swapaxes(0, 1)) < 1e-6


# Memory


def test_weights_that_rows_replace_are_never_on_the_device(lab):
    params, m = lab.params("flex")
    path = lab.tol("flex")
    matrices = {x.shape[1:] for x in jax.tree.leaves(params["memory"]["ffn"])}
    watched = matrices | {(m.layers, *shape) for shape in matrices} | {params["embedding"].shape}

    def alive():
        gc.collect()
        return collections.Counter(x.shape for x in jax.live_arrays() if x.shape in watched)

    before = alive()
    with lab.model("flex") as model:
        assert sum((alive() - before).values()) == 3 * m.layers + 2  # FFN-M, input and output embedding
        del model
    for place in serving.PLACES:
        with lab.model("flex", path, place, cache_bytes=1 << 10) as model:
            written(model, [[5, 6]], 3)
            assert alive() - before == {params["head"].shape: 1}, place
            del model


# Commands


def command(name, *arguments, **env):
    arguments = [sys.executable, "-m", f"memoryllm_jax.{name}", *arguments]
    return subprocess.run(arguments, capture_output=True, text=True, timeout=120, env=os.environ | env)


def test_commands(lab, tmp_path):
    workdir, out = f"--workdir={lab.workdir('flex')}", str(tmp_path / "t.safetensors")
    made = command("precompute", workdir, f"--output={out}", "--bits=8", f"--data={lab.data_path}")
    assert made.returncode == 0, made.stderr
    assert made.stdout.strip().splitlines()[-1].startswith(f"{out}: int8, 512 rows, ")
    looked = command("tol", "inspect", out, "--token=#40", f"--json={tmp_path}/record.json")
    assert looked.returncode == 0, looked.stderr
    for words in ("int8", "flex-3 at step 24", "3 layers of width 32, 512 tokens", "order of frequency", "#40 "):
        assert words in looked.stdout
    assert json.load(open(tmp_path / "record.json"))["metadata"]["codec"] == "int8"
    options_ = [workdir, f"--tol={out}", "--prompt=The file", "--max_tokens=8", "--stats", "--cache=1KiB"]
    text = command("generate", *options_, "--temperature=0", f"--output={tmp_path}/texts.json")
    assert text.returncode == 0, text.stderr
    result = json.load(open(tmp_path / "texts.json"))["results"][0]
    assert text.stdout == "The file" + result["text"] + "\n" and len(result["tokens"]) == 8
    for name in ("hit_rate", "bytes_per_token", "fetch_ms_p50", "fetch_ms_p99"):
        assert name in text.stderr
    with lab.model("flex", out) as model:
        assert written(model, [model.prompt("The file")], 8) == [result["tokens"]]
    failed = command("generate", *options_, "--rows=tape")
    assert failed.returncode == 1 and failed.stdout == ""
    assert failed.stderr.splitlines() == ["error: --rows: expected one of device, host, disk, found 'tape'"]


def test_two_processes_write_the_file_of_one_with_two_devices(lab, tmp_path):
    port = free_port()
    line = [sys.executable, "-m", "memoryllm_jax.precompute", f"--workdir={lab.workdir('flex')}"]
    line += [f"--output={tmp_path}/both", "--bits=8", "--rank=0.5", f"--data={lab.data_path}"]
    line += ["--multihost", f"--coordinator=127.0.0.1:{port}", "--num_processes=2"]
    env = with_devices(1)
    processes = []
    for i in range(2):
        log = open(tmp_path / f"log{i}", "w")
        processes.append(subprocess.Popen([*line, f"--process_id={i}"], stdout=log, stderr=log, env=env))
    build_on(lab, 2, tmp_path / "one", bits="8", rank="0.5", data=lab.data_path)
    assert [p.wait(100) for p in processes] == [0, 0], (tmp_path / "log0").read_text() + (tmp_path / "log1").read_text()
    assert content(tmp_path / "both") == content(tmp_path / "one")
    assert sorted(os.listdir(tmp_path)) == ["both", "log0", "log1", "one"]
