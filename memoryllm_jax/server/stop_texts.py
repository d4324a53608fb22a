"""Cuts a text that grows token by token before the first of its stop texts."""

from memoryllm_jax.inference.text import Streamer


class StopTexts:
    """Holds characters back while they could begin a stop text, and ends the text before one.

    The result does not depend on how the text came in parts: the stop text that is complete first ends it; of several
    that are complete with the same character, the longest.

    Args:
      stops: the stop texts, none of them empty.
    """

    def __init__(self, stops: tuple[str, ...]):
        self._stops = stops
        self._held = ""

    def add(self, text: str) -> tuple[str, bool]:
        """Takes the next characters.

        Returns: (characters that can be shown now, whether a stop text ended the text).
        """
        if not self._stops or not text:
            return text, False
        text = self._held + text
        # (end, start) of the first occurrence of each; an earlier one would have ended the text before.
        found = [(start + len(stop), start) for stop in self._stops if (start := text.find(stop)) >= 0]
        if found:
            self._held = ""
            return text[: min(found)[1]], True
        begun = max(_begun(text, stop) for stop in self._stops)
        self._held = text[len(text) - begun :]
        return text[: len(text) - begun], False

    def end(self) -> str:
        """The characters that are still held back, when no more come."""
        held, self._held = self._held, ""
        return held


def _begun(text: str, stop: str) -> int:
    """The number of characters at the end of the text that could be the beginning of a stop text."""
    for length in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0


class GrowingText:
    """The text of a sequence's new tokens: whole characters only, cut before a stop text.

    Args:
      tokenizer: the model's tokenizer.
      before: token ids that the text follows, which are no part of it.
      stops: as of `StopTexts`.
    """

    def __init__(self, tokenizer, before: list[int], stops: tuple[str, ...]):
        self._streamer = Streamer(tokenizer, before)
        self._stops = StopTexts(stops)

    def add(self, token: int) -> tuple[str, bool]:
        """Takes the next token. Returns: (characters that can be shown now, whether a stop text ended the text)."""
        return self._stops.add(self._streamer.add(token))

    def end(self) -> tuple[str, bool]:
        """As `add`, for the characters that were held back, when no more tokens come."""
        text, is_stopped = self._stops.add(self._streamer.end())
        return text + self._stops.end(), is_stopped
