"""A model served from a ToL file: the same logits and texts as live, wherever rows are; damage; refusals."""

import collections
import gc
import os

import jax
import numpy as np
import pytest
import reference
from lab import GREEDY, opened, some_tokens, step_logits, written
from tol_files import damaged_copy

from memoryllm_jax.checkpoint.trained import TrainedModel
from memoryllm_jax.common.errors import UserError
from memoryllm_jax.inference.sampling import Sampling
from memoryllm_jax.tol import edit, serving
from memoryllm_jax.tol.edit_spec import Zero
from memoryllm_jax.tol.memory import FileMemory
from memoryllm_jax.tol.overlay import Overlay
from memoryllm_jax.tol.reader import RowReader
from memoryllm_jax.tol.rows import HostTable
from memoryllm_jax.tol.sources import Repair


@pytest.mark.parametrize("name", ["memory", "flex-3", "tied"])
def test_logits_from_rows_of_a_file_are_those_of_the_equations(lab, name):
    params, m = lab.params(name)
    tokens = some_tokens(24)
    expected = np.asarray(reference.logits(params, np.array([tokens]), m))[0]
    for place, bits, bound in (("disk", "", 3e-5), ("device", "", 3e-5), ("host", "16", 0.05)):
        with lab.model(name, lab.tol(name, bits=bits), place, cache=64 << 10) as model:
            found = step_logits(model.decoder, model.rows, tokens, first=20)
        assert np.abs(found - expected[19:]).max() < bound * np.abs(expected).max(), (place, bits)


def test_same_seed_same_text_wherever_rows_are(lab):
    settings = Sampling(0.9, top_k=40, top_p=0.95)
    prompts = [some_tokens(n, seed=n) for n in (3, 12, 9)]
    with lab.model("flex-3") as model:
        live = written(model, prompts, 18, settings, seed=7)
        assert live != written(model, prompts, 18, settings, seed=8)
        assert live != written(model, prompts, 18, GREEDY)
    plain, counted = lab.tol("flex-3"), lab.tol("flex-3", data=lab.data_path)
    row = 3 * 4 * 32  # bytes
    places = [(plain, "device", 1, 4), (plain, "host", 4, 1), (counted, "disk", 3, 4), (plain, "disk", 1, 1)]
    for path, place, cached, steps in places:
        with lab.model("flex-3", path, place, cache=cached * row) as model:
            assert written(model, prompts, 18, settings, seed=7, steps_per_call=steps) == live, (place, cached)
            stats = model.rows.stats()
            if place != "device":
                # A step's rows lie in the cache together, so there is room for those of all prompts.
                assert stats["cache_bytes"] == max(cached, len(prompts)) * row
                assert model.rows.misses > cached  # rows had to leave
                assert stats["bytes_per_token"] == model.rows.misses * row / stats["row_requests"]
    with lab.model("flex-3", counted, cache=512 * row) as model:  # began with all rows in the cache
        assert written(model, prompts, 18, settings, seed=7) == live and model.rows.stats()["hit_rate"] == 1


def test_same_text_from_eight_devices(lab):
    prompts = [some_tokens(n, seed=n) for n in (3, 12)]
    with lab.model("memory") as model:
        live = written(model, prompts)
    for place in ("disk", "device"):
        with lab.model("memory", lab.tol("memory"), place, devices=8) as model:
            assert written(model, prompts) == live


def times_open(path):
    """How many descriptors of this process are open on a file."""
    return [os.path.realpath(entry.path) for entry in os.scandir("/proc/self/fd")].count(os.path.realpath(path))


def test_files_of_other_models_are_refused(lab, tmp_path):
    path = lab.tol("flex-3")
    for tol, name, more, found in [
        (path, "flex-3", {"step": 8}, r"\(its step 16\): parameters \w{12} in the file, \w{12} in the model"),
        (lab.tol("memory"), "other", {}, "tokenizer .* in the file"),
        (lab.tol("memory"), "flex-3", {}, "architecture memory in the file, flex-3 in the model"),
        (lab.tol("memory"), "base", {}, "architecture memory in the file, base in the model"),
    ]:
        before = times_open(tol)  # other tests of this process may have left the file open
        with pytest.raises(UserError, match=found) as error:
            serving.open_engine(lab.workdir(name), tol, **more)
        assert str(error.value).startswith(tol) and times_open(tol) == before
    overlay_path = str(tmp_path / "o")
    with opened(path) as tol, opened(lab.tol("memory")) as other:
        overlay = Overlay(FileMemory(other))
        edit.Editor(overlay).add(Zero(token=40))
        overlay.save(overlay_path)
        with pytest.raises(UserError, match="made for other rows than those of"):
            Overlay.open(overlay_path, FileMemory(tol))
    for arguments, found in [
        ({"overlay": overlay_path}, "made for other rows than those of .*step 16: expected rows_digest"),
        ({"tol": path, "rows": "tape"}, "rows: expected one of device, host, disk, found 'tape'"),
    ]:
        with pytest.raises(UserError, match=found):
            serving.open_engine(lab.workdir("flex-3"), **arguments)


@pytest.mark.parametrize(
    "options, found", [({"rows": "host"}, "rows: expected a ToL"), ({"cache": "1MB"}, "cache: exp")]
)
def test_options_of_rows_need_a_file(lab, options, found):
    with pytest.raises(UserError, match=found):
        serving.EngineOptions(lab.workdir("memory"), **options).open()


@pytest.mark.parametrize("size", ["0", "0MiB", "many"])
def test_cache_without_a_size_is_refused(lab, size):
    with pytest.raises(UserError, match="cache: expected a size above zero"):
        serving.EngineOptions(lab.workdir("memory"), lab.tol("memory"), cache=size).open()


def test_damaged_row_is_made_again(lab, tmp_path, capfd):
    prompts = [some_tokens(9)]
    token = prompts[0][4]
    whole = lab.tol("flex-3", bits="4,1:8", rank="0.5")
    path = damaged_copy(whole, token, tmp_path / "damaged.safetensors")
    with lab.model("flex-3", whole) as model:
        expected = written(model, prompts)
    with lab.model("flex-3", path) as model:
        capfd.readouterr()
        assert written(model, prompts) == expected
        assert model.rows.stats()["rows_repaired"] == 1
        assert f"damaged rows, token {token} first" in capfd.readouterr().err


@pytest.mark.parametrize("choices", [{}, {"bits": "4,1:8", "rank": "0.5"}])
def test_repaired_row_is_that_of_the_whole_file(lab, tmp_path, choices):
    token, whole = np.array([77]), lab.tol("flex-3", **choices)
    path = damaged_copy(whole, 77, tmp_path / "damaged.safetensors")
    with opened(whole) as tol, opened(path) as damaged:
        row, _ = RowReader(tol).read(token)
        repair = Repair(TrainedModel(lab.workdir("flex-3")), damaged)
        for table in (RowReader(damaged, repair=repair), HostTable(damaged, repair)):
            # A sum taken in another order may move an integer by one step, hardly more than one of them.
            assert (table.read(token)[0] != row).sum() <= (2 if choices else row.size // 2)
        # Weights of another checkpoint make other rows: they must not be used.
        other = Repair(TrainedModel(lab.workdir("flex-3"), 8), damaged)
        with pytest.raises(UserError, match=f"{path}: token 77: .* other weights"):
            RowReader(damaged, repair=other).read(token)


def test_weights_that_rows_replace_are_never_on_the_device(lab):
    params, m = lab.params("flex-3")
    path = lab.tol("flex-3")
    matrices = {x.shape[1:] for x in jax.tree.leaves(params["memory"]["ffn"])}
    watched = matrices | {(m.layers, *shape) for shape in matrices} | {params["embedding"].shape}

    def alive():
        gc.collect()
        return collections.Counter(x.shape for x in jax.live_arrays() if x.shape in watched)

    gc.collect()
    gc.freeze()  # `alive` then searches what this test makes, not the millions of objects that others have left
    before = alive()
    with lab.model("flex-3") as model:
        assert sum((alive() - before).values()) == 3 * m.layers + 2  # FFN-M, input and output embedding
        live_bytes = model.weights_bytes
        del model
    replaced = sum(x.nbytes for x in jax.tree.leaves([params["memory"], params["embedding"]]))
    for place in serving.PLACES:
        with lab.model("flex-3", path, place, cache=1 << 10) as model:
            written(model, [[5, 6]], 3)
            assert alive() - before == {params["head"].shape: 1}, place
            assert model.weights_bytes == live_bytes - replaced
            del model
