"""A model's memory, which edits apply to: in a ToL file and computed from the weights, it is the same one."""

import contextlib

import numpy as np
import pytest
from lab import opened

from memoryllm_jax.checkpoint.trained import TrainedModel
from memoryllm_jax.common.errors import UserError
from memoryllm_jax.tol import serving
from memoryllm_jax.tol.memory import FileMemory, LiveMemory


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


def test_a_model_without_a_memory_has_no_edits(lab, tmp_path):
    found = "expected a model with FFN-M, whose rows are edited, found base"
    with contextlib.closing(TrainedModel(lab.workdir("base"))) as trained, pytest.raises(UserError, match=found):
        LiveMemory(trained)
    with pytest.raises(UserError, match="missing: "):
        serving.open_engine(lab.workdir("flex-3"), overlay=str(tmp_path / "missing"))
