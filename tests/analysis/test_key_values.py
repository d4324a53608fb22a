import copy
import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from by_hand import key_value_model

from memoryllm_jax.common.errors import UserError


@pytest.fixture
def model(lab):
    return key_value_model(lab.workdir("memory"))


def test_tokens_are_named_as_pages_show_them_or_by_id(model):
    spaced = next(i for i, text in enumerate(model.texts) if text.startswith("␣") and len(text) > 2)
    assert model.tokens([model.texts[spaced], "#7"]).tolist() == [model.texts.index(model.texts[spaced]), 7]


@pytest.mark.parametrize(
    "name, message",
    [
        ("#512", "token: expected an id below 512, found #512"),
        ("two words", "token: expected one token, found 'two words'"),
    ],
)
def test_names_that_are_no_token_are_refused(model, name, message):
    with pytest.raises(UserError, match=message):
        model.tokens([name])


def test_logits_come_in_blocks_of_one_shape(model):
    x_ND = jnp.asarray(np.random.default_rng(0).normal(size=(10, 32)), jnp.float32)
    parts, blocks = zip(*model.logits(x_ND, unit=True))
    assert [part.stop - part.start for part in parts] == [7, 3]  # SMALL has 512 * 7 elements at a time
    (whole,) = [block for _, block in model.logits(x_ND[:7] * 1e-3, unit=True)]
    np.testing.assert_allclose(blocks[0], whole, rtol=1e-3, atol=1e-5)  # the size of vectors does not matter
    capped = copy.copy(model)
    capped.config = dataclasses.replace(model.config, logit_softcap=2.0)
    (_, found), _ = capped.logits(x_ND, unit=True)
    np.testing.assert_allclose(found, 2 * np.tanh(blocks[0] / 2), rtol=1e-5, atol=1e-6)


def test_chunks_are_filled_up_to_one_shape(model):
    chunks = list(model.chunks(model.every_id))
    assert len(chunks) == model.chunk_count(512) == 6 and {len(ids) for ids, _ in chunks} == {100}
    assert np.concatenate([ids[is_real] for ids, is_real in chunks]).tolist() == list(range(512))
