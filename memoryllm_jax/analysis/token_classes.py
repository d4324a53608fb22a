"""What can be told of a token from its text alone: the classes that clusters are held against."""

import unicodedata

import numpy as np

KINDS = ("special", "space", "punctuation", "digits", "capitalised", "lower case", "other script")


def kind(token: int, text: str) -> str:
    """One of KINDS, of a token and its text as `inside.token_texts` shows it: #ID is none by itself."""
    if text == f"#{token}":
        return "special"
    text = _without_space(text)
    letters = [c for c in text if c.isalpha()]
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
    """Unicode's script of the first letter, a stand-in for the language; NONE without letters."""
    letter = next((c for c in _without_space(text) if c.isalpha()), "")
    return unicodedata.name(letter, "NONE").split()[0] if letter else "NONE"


def _without_space(text: str) -> str:
    for shown in ("␣", "\\n", "\\t"):
        text = text.replace(shown, "")
    return text


def classes(texts: list[str]) -> dict[str, np.ndarray]:
    """{classification: a class of each token}"""
    return {
        "kind": np.array([kind(token, text) for token, text in enumerate(texts)]),
        "leading space": np.array(["space" if text.startswith("␣") else "none" for text in texts]),
        "script": np.array([script(text) for text in texts]),
    }


def purity(labels, classes) -> float:
    """Share of tokens that are of the commonest class of their cluster (Manning et al. 2008, section 16.3)."""
    total = 0
    for label in np.unique(labels):
        total += np.unique(classes[labels == label], return_counts=True)[1].max()
    return total / len(labels)
