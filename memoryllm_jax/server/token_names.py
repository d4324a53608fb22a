"""The texts of single tokens, as lists of log-probabilities name them."""

from memoryllm_jax.data.tokenizer import Tokenizer, plain_token_texts


class TokenNames:
    """A name for each token id: its text, a special token's spelling, or token_id:ID for part of a character.

    Args:
      tokenizer: the model's tokenizer.
    """

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._special = {id: spelling for spelling, id in tokenizer.special_tokens.items()}
        self._known: dict[int, str] = {}  # at most one for each id of the vocabulary

    def name(self, id: int) -> str:
        """The name of a token."""
        if id not in self._known:
            (text,) = plain_token_texts(self._tokenizer, [id])
            is_readable = text and "\N{REPLACEMENT CHARACTER}" not in text
            self._known[id] = text if is_readable else self._special.get(id, number(id))
        return self._known[id]

    def utf8(self, id: int) -> list[int] | None:
        """The bytes of a token's text; None if it is no text by itself."""
        name = self.name(id)
        return None if name == number(id) else list(name.encode())

    def by_name(self, alternatives: tuple[tuple[int, float], ...]) -> dict[str, float]:
        """{name: log-probability}, in the order given. Of two tokens with the same text, the later one has its id."""
        out: dict[str, float] = {}
        for id, log_prob in alternatives:
            name = self.name(id)
            out[number(id) if name in out else name] = log_prob
        return out


def number(id: int) -> str:
    """The name of a token without a text."""
    return f"token_id:{id}"
