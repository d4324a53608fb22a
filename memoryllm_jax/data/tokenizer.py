"""Tokenizers by spec: `sentencepiece:FILE`, `llama3:FILE` (tiktoken ranks), `hf:FILE` (tokenizer.json)."""

import base64
import hashlib
import io
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

from memoryllm_jax.common import storage
from memoryllm_jax.common.errors import UserError, require

# Texts are tokenised in pieces of at most this many characters: tiktoken's regular expressions and
# SentencePiece's lattices fail on longer ones. Llama 3's own tokenizer cuts at the same length.
PIECE_CHARS = 400_000
RUN_CHARS = 25_000  # longest run of white space, or of other characters, that tiktoken takes

LLAMA3_PATTERN = "|".join(
    (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)",
        r"[^\r\n\p{L}\p{N}]?\p{L}+",
        r"\p{N}{1,3}",
        r" ?[^\s\p{L}\p{N}]+[\r\n]*",
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    )
)
LLAMA3_SPECIALS = {"<|begin_of_text|>": 0, "<|end_of_text|>": 1, "<|eot_id|>": 9}  # offsets from the last rank
LLAMA3_RESERVED = 256
HF_BOS = ("<|begin_of_text|>", "<s>", "<bos>", "[BOS]")
HF_EOS = ("<|end_of_text|>", "</s>", "<eos>", "<|endoftext|>", "[EOS]")


class Tokenizer:
    """Text to token ids and back.

    Args:
      kind: sentencepiece, llama3 or hf.
      content: bytes of the model file.
      origin: where it comes from, for error messages.
      special: (bos id, ids that end a text) where other files than the tokenizer's own name them.
    Attributes:
      kind, content.
      digest: SHA-256 of the content.
      vocab_size: number of ids.
      bos_id, eos_id: ids put before and after each document, or None.
      stop_ids: ids that end a text, eos among them.
      put_before: id that a tokenizer.json itself puts before a text, or None.
      special_tokens: {spelling: id} of special tokens that `encode` takes for plain text.
    Raises: UserError.
    """

    def __init__(self, kind: str, content: bytes, origin: str, special: tuple | None = None):
        if kind not in _LOADERS:
            raise UserError(f"tokenizer {kind}:{origin}: expected one of {', '.join(_LOADERS)} before the colon")
        self.kind, self.content = kind, content
        self.digest = hashlib.sha256(content).hexdigest()
        try:
            loaded = _LOADERS[kind](content)
        except UserError:
            raise
        except Exception as error:  # each library has its own way to reject a file
            raise UserError(f"tokenizer {origin}: expected a {kind} model, found a file it refuses: {error}") from error
        self.vocab_size, self.put_before = loaded.vocab_size, loaded.put_before
        self.bos_id, self.eos_id = loaded.bos_id, loaded.eos_id
        self.special_tokens = loaded.special_tokens
        self._encode_batch, self._decode = loaded.encode_batch, loaded.decode
        self.stop_ids = frozenset() if self.eos_id is None else frozenset({self.eos_id})
        self._special = None
        if special is not None:
            self.name_special(*special)

    def name_special(self, bos_id: int | None, ends: Sequence[int]) -> None:
        """Sets bos and the ids that end a text, eos first; `to_json` keeps them."""
        self.bos_id = bos_id
        self.eos_id = ends[0] if ends else None
        self.stop_ids = frozenset(ends)
        self._special = bos_id, tuple(ends)

    def encode_batch(self, texts: list[str], threads: int = 1) -> list[list[int]]:
        """Ids of each text, without bos and eos."""
        pieces = [list(_pieces(text)) for text in texts]
        ids_of_pieces = iter(self._encode_batch([piece for of_text in pieces for piece in of_text], threads))
        out = []
        for of_text in pieces:
            ids: list[int] = []
            for _ in of_text:
                ids += next(ids_of_pieces)
            out.append(ids)
        return out

    def encode(self, text: str) -> list[int]:
        return self.encode_batch([text])[0]

    def encode_special(self, text: str) -> list[int]:
        """Ids of a text in which the spelling of a special token becomes that token, as in transformers."""
        special = self.special_tokens
        if not special:
            return self.encode(text)
        # The longest spelling first, as one may begin with another.
        spellings = "|".join(sorted(map(re.escape, special), key=len, reverse=True))
        ids: list[int] = []
        for part in re.split(f"({spellings})", text):
            ids += [special[part]] if part in special else self.encode(part)
        return ids

    def token(self, name: str, label: str, vocab_size: int) -> int:
        """The id of `#ID`, or of a text that is one token.

        Args:
          label: what error messages begin with.
          vocab_size: of the model, which may have more ids than the tokenizer.
        Raises: UserError.
        """
        if name.startswith("#") and name[1:].isdecimal():
            if int(name[1:]) >= vocab_size:
                raise UserError(f"{label}: expected an id below {vocab_size}")
            return int(name[1:])
        ids = self.encode(name)
        if len(ids) != 1:
            pieces = ", ".join(f"#{i} {self.decode([i])!r}" for i in ids)
            raise UserError(f"{label}: expected one token, found {len(ids)} ({pieces}); name one as #ID")
        return ids[0]

    def decode(self, ids: Iterable[int]) -> str:
        return self._decode([int(i) for i in ids])

    def to_json(self) -> dict:
        """What a checkpoint holds of the tokenizer: all of it."""
        content = base64.b64encode(self.content).decode()
        tree = {"kind": self.kind, "digest": self.digest, "content": content}
        return tree if self._special is None else tree | {"special": self._special}

    @classmethod
    def from_json(cls, tree: dict) -> "Tokenizer":
        return cls(tree["kind"], base64.b64decode(tree["content"]), "of the checkpoint", tree.get("special"))


def load(spec: str) -> Tokenizer:
    """The tokenizer of `KIND:FILE`. Raises: UserError."""
    kind, _, path = spec.partition(":")
    if not path:
        raise UserError(f"tokenizer {spec!r}: expected KIND:FILE with KIND one of {', '.join(_LOADERS)}")
    made = Tokenizer(kind, storage.read_bytes(path, "a tokenizer"), path)
    beside = os.path.join(os.path.dirname(path), "tokenizer_config.json")
    if kind == "hf" and storage.exists(beside):
        # A tokenizer.json does not say which of its tokens ends a text.
        eos = _eos_token(storage.read_json(beside, "settings of a tokenizer"), beside)
        ends = [made.token(eos, f"{beside}: eos_token", made.vocab_size)] if eos else []
        made.name_special(made.put_before, ends)
    return made


def _eos_token(config, where) -> str | None:
    """The text of eos in a tokenizer_config.json, which spells it as a string or as an object with its content."""
    eos = config.get("eos_token") if isinstance(config, dict) else config
    if isinstance(eos, dict):
        eos = eos.get("content")
    if not isinstance(eos, str | None):
        raise UserError(f"{where}: eos_token: expected a token, found {eos!r}")
    return eos


def token_texts(tokenizer: Tokenizer, ids: Iterable[int]) -> list[str]:
    """Each token as people read it: a leading space is ␣, and a token that is no text by itself is #ID."""
    # SentencePiece takes the space off the first token of a text, so each is decoded after an anchor.
    anchor = tokenizer.encode("a")[-1:]
    before = len(tokenizer.decode(anchor))
    out = []
    for i in ids:
        text = tokenizer.decode([*anchor, i])[before:] if i < tokenizer.vocab_size else ""
        shown = text.replace(" ", "␣").replace("\n", "\\n").replace("\t", "\\t")
        readable = shown.isprintable() and "\N{REPLACEMENT CHARACTER}" not in shown
        out.append(shown if shown and readable else f"#{i}")
    return out


def train_sentencepiece(texts: Iterator[str], vocab_size: int, threads: int) -> Tokenizer:
    """A reversible SentencePiece BPE model: white space is kept as it is, and unknown characters become bytes.

    Raises: UserError.
    """
    import sentencepiece

    model = io.BytesIO()
    # SentencePiece's trainer drops line breaks, and lines longer than 4,192 bytes.
    lines = (line + "\n" for text in texts for line in re.findall(r"[^\n]{1,1000}", text) if line.strip())
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=lines,
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            character_coverage=0.9999,
            byte_fallback=True,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            add_dummy_prefix=False,
            allow_whitespace_only_pieces=True,
            split_digits=True,
            user_defined_symbols=["\n", "\t"],
            num_threads=threads,
            minloglevel=2,
        )
    except RuntimeError as error:
        most = re.search(r"<= (\d+)", str(error))
        reason = f"this text allows at most {most[1]} ids" if most else " ".join(str(error).split())
        raise UserError(f"tokenizer sentencepiece:train:{vocab_size}: training failed: {reason}") from error
    return Tokenizer("sentencepiece", model.getvalue(), f"sentencepiece:train:{vocab_size}")


def _pieces(text: str) -> Iterator[str]:
    """The text in pieces that every tokenizer library takes, cut at line ends where there are any."""
    start = 0
    while start < len(text):
        end = min(start + PIECE_CHARS, len(text))
        if end < len(text):
            line_end = text.rfind("\n", start, end) + 1
            end = line_end if line_end > start else end
        yield from _cut_runs(text[start:end])
        start = end


def _cut_runs(piece: str) -> Iterator[str]:
    # tiktoken's regular expressions overflow their stack on a longer run.
    if len(piece) > RUN_CHARS and re.search(rf"\S{{{RUN_CHARS + 1}}}|\s{{{RUN_CHARS + 1}}}", piece):
        cut = 0
        for run in re.finditer(rf"\S{{{RUN_CHARS}}}|\s{{{RUN_CHARS}}}", piece):
            yield piece[cut : run.end()]
            cut = run.end()
        piece = piece[cut:]
    if piece:
        yield piece


class _Loaded(NamedTuple):
    """What a tokenizer library says of a model file; fields as of `Tokenizer`."""

    vocab_size: int
    bos_id: int | None
    eos_id: int | None
    encode_batch: Callable[[list[str], int], list[list[int]]]  # (texts, threads) -> ids
    decode: Callable[[list[int]], str]
    put_before: int | None
    special_tokens: dict[str, int]


def _load_sentencepiece(content):
    import sentencepiece

    processor = sentencepiece.SentencePieceProcessor(model_proto=content)
    size = processor.vocab_size()
    return _Loaded(
        vocab_size=size,
        bos_id=processor.bos_id() if processor.bos_id() >= 0 else None,
        eos_id=processor.eos_id() if processor.eos_id() >= 0 else None,
        encode_batch=lambda texts, threads: processor.encode(texts, num_threads=threads),
        decode=processor.decode,
        put_before=None,
        special_tokens={
            processor.id_to_piece(i): i for i in range(size) if processor.is_control(i) or processor.is_unknown(i)
        },
    )


def llama3_tokens(content: bytes) -> tuple[dict[bytes, int], dict[str, int]]:
    """Ids of the tokens in a file of tiktoken ranks, and of Llama 3's special tokens. Raises: UserError."""
    ranks = {}
    for number, line in enumerate(content.splitlines(), 1):
        try:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except ValueError as error:
            raise UserError(
                f"tokenizer: line {number}: expected a base64 token and its rank, found {line[:40]!r}"
            ) from error
    if sorted(ranks.values()) != list(range(len(ranks))) or len(ranks) < 256:
        raise UserError(f"tokenizer: expected ranks 0 to {len(ranks) - 1}, each once, as in Llama 3's tokenizer.model")
    n = len(ranks)
    specials = {name: n + offset for name, offset in LLAMA3_SPECIALS.items()}
    taken = set(specials.values())
    return ranks, specials | {f"<|reserved_{i}|>": i for i in range(n, n + LLAMA3_RESERVED) if i not in taken}


def _load_llama3(content):
    tiktoken = require("tiktoken", "prepare", "this tokenizer")
    ranks, specials = llama3_tokens(content)
    encoding = tiktoken.Encoding("llama3", pat_str=LLAMA3_PATTERN, mergeable_ranks=ranks, special_tokens=specials)
    return _Loaded(
        vocab_size=len(ranks) + LLAMA3_RESERVED,
        bos_id=specials["<|begin_of_text|>"],
        eos_id=specials["<|end_of_text|>"],
        encode_batch=lambda texts, threads: encoding.encode_ordinary_batch(texts, num_threads=threads),
        decode=encoding.decode,
        put_before=None,
        special_tokens=specials,
    )


def _load_hf(content):
    tokenizers = require("tokenizers", "prepare", "this tokenizer")
    tokenizer = tokenizers.Tokenizer.from_str(content.decode("utf-8"))
    tokenizer.no_truncation()
    tokenizer.no_padding()

    def first_known(names):
        ids = map(tokenizer.token_to_id, names)
        return next((i for i in ids if i is not None), None)

    # Whether the file's own post-processor puts bos before a text shows only in what it does.
    begun = tokenizer.encode("x", add_special_tokens=True).ids
    plain = tokenizer.encode("x", add_special_tokens=False).ids
    put_before = begun[0] if begun[:1] != plain[:1] else None
    return _Loaded(
        vocab_size=max(tokenizer.get_vocab().values()) + 1,
        bos_id=first_known(HF_BOS) if put_before is None else put_before,
        eos_id=first_known(HF_EOS),
        encode_batch=lambda texts, threads: [
            found.ids for found in tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        ],
        decode=lambda ids: tokenizer.decode(ids, skip_special_tokens=True),
        put_before=put_before,
        special_tokens={},  # encode_batch finds special tokens itself
    )


_LOADERS = {"sentencepiece": _load_sentencepiece, "llama3": _load_llama3, "hf": _load_hf}
