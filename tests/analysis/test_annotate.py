import numpy as np
import pytest

from memoryllm_jax.analysis import annotate


def embed(ids):
    """A mean embedding in two dimensions; 6 is the sum of the first trigger below."""
    return np.array([1.0, sum(ids) - 6])


def test_proxies_of_prefixes():
    shared, overlap, cosine = annotate.measures([[1, 2, 3], [9, 2, 3], [2, 2, 3]], embed, None)
    assert shared == 1 and overlap == pytest.approx((3 / 7 + 3 / 6 + 3 / 6) / 3)
    pairs = [1 / 65**0.5, 1 / 2**0.5, (1 + 8) / 130**0.5]
    assert cosine == pytest.approx(np.mean(pairs))


def test_proxies_of_tokens():
    shared, overlap, _ = annotate.measures([[0], [1], [2]], embed, ["ab", "AB", ","])
    assert shared == pytest.approx(1 / 3) and overlap == pytest.approx(1 / 3)


def test_one_trigger_has_no_pairs():
    shared, overlap, similarity = annotate.measures([[5]], embed, None)
    assert shared == 1 and np.isnan(overlap) and np.isnan(similarity)
