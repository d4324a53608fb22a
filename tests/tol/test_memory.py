"""A model's memory, which edits apply to: in a ToL file and computed from the weights, it is the same one."""

import contextlib

import numpy as np
import pytest
from lab import opened, write_untrained

from memoryllm_jax.checkpoint.trained import TrainedModel
from memoryllm_jax.common.errors import UserError
from memoryllm_jax.tol import serving
from memoryllm_jax.tol.edit import Editor
from memoryllm_jax.tol.edit_spec import Zero
from memoryllm_jax.tol.edited_rows import EditedRows
from memoryllm_jax.tol.memory import FileMemory, LiveMemory
from memoryllm_jax.tol.overlay import Overlay


@pytest.mark.parametrize("name, dtype", [("flex-3", ""), ("flex-3", "bfloat16"), ("tied", "")])
def test_live_rows_are_the_memory_of_the_file(lab, name, dtype):
    ids = np.array([7, 300, *range(20)], np.int32)
    with opened(lab.tol(name)) as tol, contextlib.closing(FileMemory(tol, TrainedModel(lab.workdir(name)))) as stored:
        with lab.model(name, dtype=dtype) as engine:
            live = serving.memory_of(engine)
            assert live.rows_digest == stored.rows_digest, "of loaded parameters, as of those that are read"
            assert (live.layers, live.dim, live.vocab_size) == (stored.layers, stored.dim, stored.vocab_size)
            assert live.token("#17", "token") == live.token(17, "token") == stored.token(17, "token") == 17
            if not dtype:
                largest = np.abs(stored.rows(ids)).max()
                np.testing.assert_allclose(live.rows(ids), stored.rows(ids), atol=largest * 2**-7)
                np.testing.assert_array_equal(live.rows(ids[1:2]), live.rows(ids)[1:2])
                for found, expected in zip(live.key(1, 5), stored.key(1, 5)):
                    np.testing.assert_array_equal(found, expected)
        with lab.model(name, lab.tol(name)) as engine:
            assert serving.memory_of(engine).rows_digest == stored.rows_digest


def test_rows_of_a_table_are_edited_without_keys(make_config, tmp_path):
    """Such as those of an adapter."""
    workdir = write_untrained(make_config("rows-3"), str(tmp_path / "run"))
    with contextlib.closing(serving.open_engine(workdir)) as engine:
        memory = serving.memory_of(engine)
        row_LD = np.stack([np.asarray(y_1UD)[0, 0] for y_1UD in engine.rows.fetch(np.array([7])).rows_LSUP])
        np.testing.assert_array_equal(memory.rows(np.array([7]))[0], row_LD)
        overlay = Overlay(memory)
        Editor(overlay).add(Zero(token=7))
        edited = EditedRows(engine.rows, overlay, engine.trained.mesh).fetch(np.array([7, 8])).rows_LSUP
        assert all(not np.any(y_1UD[0, 0]) and np.any(y_1UD[0, 1]) for y_1UD in edited)
        with pytest.raises(UserError, match=r"suppress: expected a model with FFN-M, which has keys, found rows-3"):
            memory.key(0, 0)


def test_a_model_without_a_memory_has_no_edits(lab, tmp_path):
    found = "expected a model that adds a row for each token to the residual stream, found base"
    with contextlib.closing(TrainedModel(lab.workdir("base"))) as trained, pytest.raises(UserError, match=found):
        LiveMemory(trained)
    with pytest.raises(UserError, match="missing: "):
        serving.open_engine(lab.workdir("flex-3"), overlay=str(tmp_path / "missing"))
