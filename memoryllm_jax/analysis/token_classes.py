"""Classes of tokens by their text alone, with which clusters of coefficient vectors are compared."""

import unicodedata

import numpy as np

KINDS = ("special", "space", "punctuation", "digits", "capitalised", "lower case", "other script")


def kind(token: int, text: str) -> str:
    """The kind of a token, one of KINDS.

    Args:
      token: its id.
      text: its text as `tokenizer.token_texts` shows it, which is #ID for a token without text.
    """
    if text == f"#{token}":
        return "special"
    text = _without_space(text)
    letters = [c for c in text if c.isalpha()]  # in any script
    if not text:
        return "space"
    if any(c.isdigit() for c in text) and not letters:
        return "digits"
    if not letters:
        return "punctuation"
    if script(text) != "LATIN":
        return "other script"
    return "capitalised" if letters[0].isupper() else "lower case"


def script(text: str) -> str:
    """The script of a text's first letter, such as LATIN, as a stand-in for the language; NONE without letters."""
    for c in _without_space(text):
        if c.isalpha():
            # Python has no table of scripts, but names of letters begin with theirs: LATIN SMALL LETTER A.
            return unicodedata.name(c, "NONE").split()[0]
    return "NONE"


def _without_space(text: str) -> str:
    """The text without the signs that stand for white space in the texts of tokens."""
    for shown in ("␣", "\\n", "\\t"):
        text = text.replace(shown, "")
    return text


def classes(texts: list[str]) -> dict[str, np.ndarray]:
    """{name of a classification: the class of each token [V]}

    Args:
      texts: the text of every token id.
    """
    return {
        "kind": np.array([kind(token, text) for token, text in enumerate(texts)]),
        "leading space": np.array(["space" if text.startswith("␣") else "none" for text in texts]),
        "script": np.array([script(text) for text in texts]),
    }


def purity(labels: np.ndarray, classes: np.ndarray) -> float:
    """Share of tokens that belong to the commonest class of their cluster (Manning et al. 2008, section 16.3).

    Args:
      labels: cluster of each token [V].
      classes: class of each token [V].
    """
    in_commonest = 0
    for label in np.unique(labels):
        in_commonest += np.unique(classes[labels == label], return_counts=True)[1].max()
    return in_commonest / len(labels)
