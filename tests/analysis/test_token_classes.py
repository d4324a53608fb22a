import numpy as np
import pytest

from memoryllm_jax.analysis import token_classes


def test_kinds_and_scripts():
    kinds = [token_classes.kind(7, text) for text in ("#7", "␣", "␣,", "12", "␣The", "ing", "да")]
    assert kinds == list(token_classes.KINDS)
    assert token_classes.kind(7, ";\\n\\t") == "punctuation" and token_classes.script("\\tж") == "CYRILLIC"


def test_purity():
    assert token_classes.purity(np.array([0, 0, 0, 1, 1]), np.array(list("aabcc"))) == pytest.approx(4 / 5)
