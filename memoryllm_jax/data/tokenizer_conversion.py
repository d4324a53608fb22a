"""Converts each kind of tokenizer to files that transformers loads without code of this package.

That is tokenizer.json, if the library tokenizers gives the same ids and texts with it as the tokenizer's own library on
COMPARED texts. Else a SentencePiece model stays as it is, in tokenizer.model.
"""

import itertools
import random
from typing import NamedTuple

from memoryllm_jax.common.errors import UserError, require
from memoryllm_jax.data import documents
from memoryllm_jax.data import tokenizer as tokenizer_lib
from memoryllm_jax.data.tokenizer import Tokenizer

COMPARED = 300  # texts on which a converted tokenizer is compared with the original

# Settings in another tokenizer_config.json that would change the ids, besides those that `to_files` sets
CHANGE_IDS = ("auto_map", "sp_model_kwargs")

_SPACE = "\u2581"  # what SentencePiece writes for a space
# Places where normalizers and dummy prefixes differ: white space of each kind at each place
_WHITE_SPACE = (
    "", " ", "  ", "\n", "\t", " \n ", "a", " a", "a ", "  a  b  ", "\n\na", "a\n", "\ta", "a\r\nb", "a\u00a0b",
    "a\u3000b", _SPACE, f"a{_SPACE}b", f"{_SPACE} a", "x\u200by", "\ufeffa", "a\0b", "\x7f",
)  # fmt: skip
# Letters that are composed of others or have several forms, other scripts, numbers, quotes
_WORDS = (
    "\u00e9", "e\u0301", "\ufb01", "\uff21\uff22", "\u00bd", "\u2126", "\uac00", "\u1112\u1161\u11ab",
    "\u0627\u0644\u0639", "\u0939\u093f\u0928\u094d\u0926\u0940", "\u0e44\u0e17\u0e22", "\u6f22\u5b57", "\U0001f642",
    "\U0001f468\u200d\U0001f469\u200d\U0001f467", "\U00020000", "\ue000", "\ufffd", "1234567", "3.14", "don't", "I'LL",
    "AaBb", "____", "==>", "\u2026", "\u201cq\u201d", "a" * 50,
)  # fmt: skip


class Converted(NamedTuple):
    """A tokenizer as files for transformers.

    Attributes:
      name: tokenizer.json or tokenizer.model.
      content: the file's content.
      settings: tree of tokenizer_config.json.
      note: a clause that says how exact the file is.
    """

    name: str
    content: bytes
    settings: dict
    note: str


def to_files(tokenizer: Tokenizer, context: int) -> Converted:
    """Converts a tokenizer. As in training, the converted one puts bos, if there is one, before a text.

    Args:
      tokenizer: of any kind.
      context: longest sequence of the model, in tokens.
    Raises: UserError if the conversion of a tokenizer that is no SentencePiece model is not exact.
    """
    tokenizers = require("tokenizers", "prepare", "tokenizer.json")
    settings = {"model_max_length": context, "clean_up_tokenization_spaces": False}
    if tokenizer.kind == "sentencepiece" and not _is_bpe(tokenizer.content):
        return _as_sentencepiece(tokenizer, settings, "it is not of type BPE")
    fast = _fast(tokenizer, tokenizers)
    for name, token_id in (("bos_token", tokenizer.bos_id), ("eos_token", tokenizer.eos_id)):
        if token_id is not None:
            settings[name] = fast.id_to_token(token_id)
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    if tokenizer.kind == "hf" and not _lacks_bos(tokenizer):
        return Converted("tokenizer.json", tokenizer.content, settings, "tokenizer.json is the training's")

    content = fast.to_str().encode()
    other = _texts_that_differ(tokenizer, tokenizers.Tokenizer.from_str(content.decode()))
    if not other:
        note = f"tokenizer.json gives the ids of the training's tokenizer on {COMPARED} texts"
        return Converted("tokenizer.json", content, settings, note)
    problem = f"tokenizer.json would give other ids or texts for {len(other)} of {COMPARED} texts, such as {other[0]!r}"
    if tokenizer.kind != "sentencepiece":
        raise UserError(f"tokenizer: expected a {tokenizer.kind} tokenizer that can be exported; {problem}")
    return _as_sentencepiece(tokenizer, settings, problem)


def _as_sentencepiece(tokenizer, settings, reason):
    """The SentencePiece model itself, with the class of transformers that gives it to the library sentencepiece."""
    proto = _proto(tokenizer.content)
    names = {"unk_token": _of_kind(proto, "UNKNOWN")[0]}
    for name, token_id in (("bos_token", tokenizer.bos_id), ("eos_token", tokenizer.eos_id)):
        if token_id is not None:
            names[name] = proto.pieces[token_id].piece
    others = [piece for piece in _of_kind(proto, "CONTROL") if piece not in names.values()]
    settings = settings | names | {"tokenizer_class": "SentencePieceBackend", "legacy": True}
    if others:
        settings["additional_special_tokens"] = others
    if tokenizer.bos_id is not None:
        settings["special_tokens_pattern"] = "bos"
    note = (
        f"tokenizer.model stays a SentencePiece model, as {reason}; transformers reads it with SentencePieceBackend, "
        "which gives the same ids, but decodes byte pieces as <0x0A>"
    )
    return Converted("tokenizer.model", tokenizer.content, settings, note)


def _lacks_bos(tokenizer):
    """Whether the tokenizer itself does not put before a text what the training does."""
    return tokenizer.bos_id is not None and tokenizer.bos_id != tokenizer.put_before


def _fast(tokenizer, tokenizers):
    """The tokenizers.Tokenizer of a tokenizer; it puts bos before a text."""
    special: list[str] = []
    if tokenizer.kind == "hf":
        fast = tokenizers.Tokenizer.from_str(tokenizer.content.decode())
    else:
        convert = {"sentencepiece": _sentencepiece, "llama3": _llama3}[tokenizer.kind]
        fast, special = convert(tokenizer.content, tokenizers)
    fast.add_special_tokens([tokenizers.AddedToken(text, normalized=False, special=True) for text in special])
    if _lacks_bos(tokenizer):
        bos = fast.id_to_token(tokenizer.bos_id)
        fast.post_processor = tokenizers.processors.TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A {bos}:1 $B:1", special_tokens=[(bos, tokenizer.bos_id)]
        )
    return fast


def _texts_that_differ(tokenizer, fast):
    """Those of `compared_texts` that give other ids, or whose ids give another text."""
    bos = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    unknown = fast.token_to_id(getattr(fast.model, "unk_token", None) or "")
    out = []
    texts = compared_texts(tokenizer)
    for text, found in zip(texts, fast.encode_batch(texts)):
        ids = tokenizer.encode_special(text)
        # An unknown token has no text, so each library writes one of its own.
        has_text = unknown not in ids
        if found.ids != bos + ids or (has_text and fast.decode(found.ids) != tokenizer.decode(ids)):
            out.append(text)
    return out


def compared_texts(tokenizer: Tokenizer) -> list[str]:
    """COMPARED texts, always the same for a tokenizer.

    White space, scripts and words that normalizers treat differently, parts of Python's documentation, the first ten
    user-defined symbols at several places, and sequences of random ids.
    """
    draw = random.Random(0)
    texts = [*_WHITE_SPACE, *_WORDS, *(f"a {word}b" for word in _WORDS)]
    for symbol in _user_defined(tokenizer)[:10]:
        texts += [symbol, f"a{symbol}b", f" {symbol} a", f"{symbol}{symbol}a"]
    long = [text for text, _ in itertools.islice(documents.read("embedded"), 60)]
    for _ in range(100):
        text = draw.choice(long)
        start = draw.randrange(len(text))
        texts.append(text[start : start + draw.randrange(1, 300)])
    special = set(tokenizer.special_tokens.values())
    while len(texts) < COMPARED:
        ids = [draw.randrange(tokenizer.vocab_size) for _ in range(draw.randrange(1, 12))]
        # Without special tokens, which `decode` of some libraries leaves out.
        texts.append(tokenizer.decode(i for i in ids if i not in special))
    return texts


def _user_defined(tokenizer):
    """The user-defined symbols of a SentencePiece model."""
    if tokenizer.kind != "sentencepiece":
        return []
    return _of_kind(_proto(tokenizer.content), "USER_DEFINED")


def _proto(content):
    """The ModelProto in a SentencePiece model file. Raises: UserError for a damaged piece, which the library reads."""
    from sentencepiece import sentencepiece_model_pb2

    proto = sentencepiece_model_pb2.ModelProto.FromString(content)
    for i, piece in enumerate(proto.pieces):
        if not isinstance(piece.piece, str):
            raise UserError(f"tokenizer: piece {i}: expected UTF-8, found {piece.piece[:100]!r}")
    return proto


def _of_kind(proto, *kinds):
    """The texts of a ModelProto's pieces of these kinds, such as CONTROL."""
    wanted = {getattr(proto.SentencePiece, kind) for kind in kinds}
    return [piece.piece for piece in proto.pieces if piece.type in wanted]


def _is_bpe(content):
    spec = _proto(content).trainer_spec
    return spec.model_type == spec.BPE


def _sentencepiece(content, tokenizers):
    """Converts a SentencePiece model of type BPE.

    Args:
      content: bytes of the model file.
      tokenizers: the module, which is optional.
    Returns: (tokenizers.Tokenizer, its special tokens).
    """
    proto = _proto(content)
    ids = {piece.piece: i for i, piece in enumerate(proto.pieces)}
    merges = _sentencepiece_merges({p.piece: p.score for p in proto.pieces if p.type == p.NORMAL})
    (unknown,) = _of_kind(proto, "UNKNOWN")
    has_bytes = bool(_of_kind(proto, "BYTE"))
    fast = tokenizers.Tokenizer(
        tokenizers.models.BPE(ids, merges, unk_token=unknown, fuse_unk=True, byte_fallback=has_bytes)
    )
    rules = proto.normalizer_spec
    fast.normalizer = _sentencepiece_normalizer(rules, tokenizers)
    decoders = tokenizers.decoders
    steps = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if rules.add_dummy_prefix:
        steps.append(decoders.Strip(" ", 1, 0))
    fast.decoder = decoders.Sequence(steps)
    symbols = _of_kind(proto, "USER_DEFINED")
    fast.add_tokens([tokenizers.AddedToken(symbol, normalized=True, special=False) for symbol in symbols])
    return fast, _of_kind(proto, "CONTROL", "UNKNOWN")


def _sentencepiece_merges(scores):
    """The list of merges that BPE needs: all pairs of pieces that join to another piece, in order of its score.

    SentencePiece stores no list of merges. Among pairs of equal score it merges the left-most one first; in a run of
    one character, that is the pair with the longest first half.
    """
    merges = []
    for piece, score in scores.items():
        for cut in range(1, len(piece)):
            first, second = piece[:cut], piece[cut:]
            if first in scores and second in scores:
                merges.append((-score, -len(first), first, second))
    return [(first, second) for *_, first, second in sorted(merges)]


def _sentencepiece_normalizer(rules, tokenizers):
    """The normalizer that applies the rules of SentencePiece's NormalizerSpec."""
    normalizers = tokenizers.normalizers
    steps = []
    if rules.precompiled_charsmap:
        steps.append(normalizers.Precompiled(rules.precompiled_charsmap))
    if rules.remove_extra_whitespaces:
        steps += [normalizers.Strip(), normalizers.Replace(tokenizers.Regex(" +"), " ")]
    if rules.add_dummy_prefix:
        steps.append(normalizers.Prepend(_SPACE))
    return normalizers.Sequence([*steps, normalizers.Replace(" ", _SPACE)])


def _llama3(content, tokenizers):
    """Converts a file of Llama 3's ranks to byte-level BPE. Returns: (tokenizers.Tokenizer, its special tokens)."""
    ranks, specials = tokenizer_lib.llama3_tokens(content)
    characters = _characters_of_bytes()
    texts = {token: "".join(characters[byte] for byte in token) for token in ranks}
    merges = []
    for token in sorted(ranks, key=ranks.get):
        # tiktoken merges any two neighbours that join to a token, in order of that token's rank.
        pairs = []
        for cut in range(1, len(token)):
            first, second = token[:cut], token[cut:]
            if first in ranks and second in ranks:
                pairs.append((ranks[first], ranks[second], texts[first], texts[second]))
        merges += [(first, second) for *_, first, second in sorted(pairs)]
    vocab = {texts[token]: rank for token, rank in ranks.items()}
    fast = tokenizers.Tokenizer(tokenizers.models.BPE(vocab, merges, ignore_merges=True))
    split = tokenizers.pre_tokenizers.Split(tokenizers.Regex(tokenizer_lib.LLAMA3_PATTERN), "isolated")
    as_bytes = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    fast.pre_tokenizer = tokenizers.pre_tokenizers.Sequence([split, as_bytes])
    fast.decoder = tokenizers.decoders.ByteLevel()
    return fast, sorted(specials, key=specials.get)


def _characters_of_bytes():
    """{byte: the printable character that stands for it in byte-level BPE}, as in GPT-2."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(others)}
