"""tokenizer.json for each kind of tokenizer, so that transformers loads it without code of ours."""

from memoryllm_jax.common.errors import UserError, require
from memoryllm_jax.data import tokenizer
from memoryllm_jax.data.tokenizer import Tokenizer

_SPACE = "\u2581"  # SentencePiece's sign for a space


def to_json(tokenizer: Tokenizer, context: int) -> tuple[bytes, dict]:
    """tokenizer.json, which encodes a text as `encode` does, after bos if there is one, and tokenizer_config.json.

    Args:
      context: tokens that the model takes.
    Raises: UserError for a SentencePiece model that is not BPE.
    """
    tokenizers = require("tokenizers", "prepare", "this tokenizer")
    content, special = tokenizer.content, []
    if tokenizer.kind == "hf":
        fast = tokenizers.Tokenizer.from_str(content.decode())
    else:
        make = {"sentencepiece": _sentencepiece, "llama3": _llama3}[tokenizer.kind]
        fast, special = make(content, tokenizers)
    fast.add_special_tokens([tokenizers.AddedToken(text, normalized=False, special=True) for text in special])
    lacks_bos = tokenizer.bos_id not in (None, tokenizer.put_before)
    if lacks_bos:
        bos = fast.id_to_token(tokenizer.bos_id)
        fast.post_processor = tokenizers.processors.TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A {bos}:1 $B:1", special_tokens=[(bos, tokenizer.bos_id)]
        )
    if tokenizer.kind != "hf" or lacks_bos:
        content = fast.to_str().encode()
    named = {"bos_token": tokenizer.bos_id, "eos_token": tokenizer.eos_id}
    return content, {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": context,
        "clean_up_tokenization_spaces": False,
        **{name: fast.id_to_token(i) for name, i in named.items() if i is not None},
    }


def _sentencepiece(content, tokenizers):
    """BPE. Its merges are all pairs of pieces that make a third, in the order of the third's score."""
    from sentencepiece import sentencepiece_model_pb2

    decoders, normalizers = tokenizers.decoders, tokenizers.normalizers
    proto = sentencepiece_model_pb2.ModelProto.FromString(content)
    kind, rules = proto.SentencePiece, proto.normalizer_spec
    if proto.trainer_spec.model_type != proto.trainer_spec.BPE:
        raise UserError("tokenizer: expected a SentencePiece model of type BPE, as others are not exported")

    def of_kind(*kinds):
        return [p.piece for p in proto.pieces if p.type in kinds]

    ids = {p.piece: i for i, p in enumerate(proto.pieces)}
    merged = set(of_kind(kind.NORMAL))
    merges = []
    for p in proto.pieces:
        halves = [(p.piece[:cut], p.piece[cut:]) for cut in range(1, len(p.piece))] if p.piece in merged else []
        merges += [(-p.score, -len(a), a, b) for a, b in halves if a in merged and b in merged]
    merges = [(a, b) for *_, a, b in sorted(merges)]  # of equal scores the left-most, in a run the longest, comes first
    (unknown,) = of_kind(kind.UNKNOWN)
    fast = tokenizers.Tokenizer(
        tokenizers.models.BPE(ids, merges, unk_token=unknown, fuse_unk=True, byte_fallback=bool(of_kind(kind.BYTE)))
    )
    steps = [normalizers.Precompiled(rules.precompiled_charsmap)] if rules.precompiled_charsmap else []
    if rules.remove_extra_whitespaces:
        steps += [normalizers.Strip(), normalizers.Replace(tokenizers.Regex(" +"), " ")]
    steps += [normalizers.Prepend(_SPACE)] if rules.add_dummy_prefix else []
    fast.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", _SPACE)])
    after = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    fast.decoder = decoders.Sequence(after + ([decoders.Strip(" ", 1, 0)] if rules.add_dummy_prefix else []))
    user = of_kind(kind.USER_DEFINED)
    fast.add_tokens([tokenizers.AddedToken(piece, normalized=True, special=False) for piece in user])
    return fast, of_kind(kind.CONTROL, kind.UNKNOWN)


def _llama3(content, tokenizers):
    """Byte-level BPE. tiktoken merges by the result's rank alone: every split of a token in two is a merge."""
    ranks, specials = tokenizer.llama3_tokens(content)
    shown = _characters_of_bytes()
    texts = {token: "".join(shown[byte] for byte in token) for token in ranks}
    merges = []
    for token in sorted(ranks, key=ranks.get):
        halves = [(token[:cut], token[cut:]) for cut in range(1, len(token))]
        there = [(ranks[a], ranks[b], texts[a], texts[b]) for a, b in halves if a in ranks and b in ranks]
        merges += [(a, b) for *_, a, b in sorted(there)]
    vocab = {texts[token]: rank for token, rank in ranks.items()}
    fast = tokenizers.Tokenizer(tokenizers.models.BPE(vocab, merges, ignore_merges=True))
    split = tokenizers.pre_tokenizers.Split(tokenizers.Regex(tokenizer.LLAMA3_PATTERN), "isolated")
    as_bytes = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    fast.pre_tokenizer = tokenizers.pre_tokenizers.Sequence([split, as_bytes])
    fast.decoder = tokenizers.decoders.ByteLevel()
    return fast, sorted(specials, key=specials.get)


def _characters_of_bytes():
    """The character that byte-level BPE writes for each byte (GPT-2's table)."""
    plain = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = (byte for byte in range(256) if byte not in plain)
    return {byte: chr(byte) for byte in plain} | {byte: chr(256 + n) for n, byte in enumerate(others)}
