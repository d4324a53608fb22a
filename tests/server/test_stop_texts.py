import itertools
import random

from fake_slots import Bytes

from memoryllm_jax.server.stop_texts import GrowingText, StopTexts


def by_characters(text: str, stops: tuple[str, ...]) -> tuple[str, bool]:
    """The text before the stop text that is complete first, by looking after each character."""
    for end in range(len(text) + 1):
        starts = [end - len(stop) for stop in stops if text[:end].endswith(stop)]
        if starts:
            return text[: min(starts)], True
    return text, False


def test_text_is_cut_before_the_stop_text_that_is_complete_first_however_it_comes_in_parts():
    rng = random.Random(0)
    possible = ["".join(letters) for n in (1, 2, 3, 4) for letters in itertools.product("ab", repeat=n)]
    for _ in range(3000):
        stops = tuple(rng.sample(possible, rng.randint(1, 3)))
        text = "".join(rng.choices("abc", (4, 4, 1), k=rng.randint(0, 12)))
        parts, rest = [], text
        while rest:
            size = rng.randint(0, 5)
            parts, rest = [*parts, rest[:size]], rest[size:]
        cutter, shown, is_stopped = StopTexts(stops), "", False
        for number, part in enumerate(parts, 1):
            piece, is_stopped = cutter.add(part)
            shown += piece
            if is_stopped:
                break
            # What is held back, and no more than that, could begin a stop text.
            come = "".join(parts[:number])
            held = come[len(shown) :]
            begun = [k for k in range(len(come)) if any(stop.startswith(come[k:]) for stop in stops)]
            assert come == shown + held and len(come) - len(held) == min(begun, default=len(come))
        if not is_stopped:
            shown += cutter.end()
        assert (shown, is_stopped) == by_characters(text, stops), (stops, parts)


def test_characters_of_several_tokens_are_whole_where_a_stop_text_has_them():
    text = GrowingText(Bytes(), list("ß".encode()), ("é€",))
    shown = [text.add(byte) for byte in "naïé!é€".encode()]
    assert [piece for piece, _ in shown if piece] == ["n", "a", "ï", "é!"] and shown[-1] == ("", True)
    unfinished = GrowingText(Bytes(), [], ("é€",))
    assert [unfinished.add(byte) for byte in "é€".encode()[:3]] == [("", False)] * 3
    assert unfinished.end() == ("é\N{REPLACEMENT CHARACTER}", False)
