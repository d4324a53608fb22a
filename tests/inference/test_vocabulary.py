"""Token ids in chunks of one shape."""

import numpy as np

from memoryllm_jax.inference import vocabulary


def test_chunks_have_one_shape_and_hold_every_id_once():
    ids = np.array([5, 3, 9, 1, 7])
    chunks = list(vocabulary.chunks(ids, 2))
    assert [chunk.ids.tolist() for chunk in chunks] == [[5, 3], [9, 1], [7, 7]]
    assert [(chunk.start, chunk.stop, chunk.count) for chunk in chunks] == [(0, 2, 2), (2, 4, 2), (4, 5, 1)]
    assert np.concatenate([chunk.real_ids for chunk in chunks]).tolist() == ids.tolist()
    assert all(chunk.ids.dtype == np.int32 for chunk in chunks)
