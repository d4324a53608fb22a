"""Converts each kind of tokenizer to tokenizer.json, which transformers loads without code of this package."""

from memoryllm_jax.common.errors import UserError, require
from memoryllm_jax.data import tokenizer as tokenizer_lib
from memoryllm_jax.data.tokenizer import Tokenizer

_SPACE = "\u2581"  # what SentencePiece writes for a space


def to_json(tokenizer: Tokenizer, context: int) -> tuple[bytes, dict]:
    """Converts a tokenizer.

    Args:
      context: longest sequence of the model, in tokens.
    Returns: (content of tokenizer.json, tree of tokenizer_config.json). The converted tokenizer gives bos, if there is
      one, and then the ids of `encode_special`.
    Raises: UserError for a SentencePiece model that is not BPE.
    """
    tokenizers = require("tokenizers", "prepare", "tokenizer.json")
    special: list[str] = []
    if tokenizer.kind == "hf":
        fast = tokenizers.Tokenizer.from_str(tokenizer.content.decode())
    else:
        convert = {"sentencepiece": _sentencepiece, "llama3": _llama3}[tokenizer.kind]
        fast, special = convert(tokenizer.content, tokenizers)
    fast.add_special_tokens([tokenizers.AddedToken(text, normalized=False, special=True) for text in special])
    lacks_bos = tokenizer.bos_id is not None and tokenizer.bos_id != tokenizer.put_before
    if lacks_bos:
        bos = fast.id_to_token(tokenizer.bos_id)
        fast.post_processor = tokenizers.processors.TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A {bos}:1 $B:1", special_tokens=[(bos, tokenizer.bos_id)]
        )
    # A tokenizer.json that needs no change stays the same to the byte.
    is_unchanged = tokenizer.kind == "hf" and not lacks_bos
    content = tokenizer.content if is_unchanged else fast.to_str().encode()
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": context,
        "clean_up_tokenization_spaces": False,
    }
    for name, token_id in (("bos_token", tokenizer.bos_id), ("eos_token", tokenizer.eos_id)):
        if token_id is not None:
            settings[name] = fast.id_to_token(token_id)
    return content, settings


def _sentencepiece(content, tokenizers):
    """Converts a SentencePiece model.

    Args:
      content: bytes of the model file.
      tokenizers: the module, which is optional.
    Returns: (tokenizers.Tokenizer, its special tokens). Raises: UserError if the model is not BPE.
    """
    from sentencepiece import sentencepiece_model_pb2

    proto = sentencepiece_model_pb2.ModelProto.FromString(content)
    if proto.trainer_spec.model_type != proto.trainer_spec.BPE:
        raise UserError("tokenizer: expected a SentencePiece model of type BPE, the only type that can be exported")
    kind = proto.SentencePiece

    def of_kind(*kinds):
        return [piece.piece for piece in proto.pieces if piece.type in kinds]

    ids = {piece.piece: i for i, piece in enumerate(proto.pieces)}
    merges = _sentencepiece_merges({p.piece: p.score for p in proto.pieces if p.type == kind.NORMAL})
    (unknown,) = of_kind(kind.UNKNOWN)
    fast = tokenizers.Tokenizer(
        tokenizers.models.BPE(ids, merges, unk_token=unknown, fuse_unk=True, byte_fallback=bool(of_kind(kind.BYTE)))
    )
    rules = proto.normalizer_spec
    fast.normalizer = _sentencepiece_normalizer(rules, tokenizers)
    decoders = tokenizers.decoders
    steps = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if rules.add_dummy_prefix:
        steps.append(decoders.Strip(" ", 1, 0))
    fast.decoder = decoders.Sequence(steps)
    user_defined = of_kind(kind.USER_DEFINED)
    fast.add_tokens([tokenizers.AddedToken(piece, normalized=True, special=False) for piece in user_defined])
    return fast, of_kind(kind.CONTROL, kind.UNKNOWN)


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
