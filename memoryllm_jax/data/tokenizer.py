"""Tokenizers by spec: `sentencepiece:FILE`, `llama3:FILE` (tiktoken ranks), `hf:FILE` (tokenizer.json)."""

import base64
import contextlib
import hashlib
import io
import os
import re
import uuid
from collections.abc import Callable, Iterable, Sequence
from typing import Literal, NamedTuple

import msgspec

from memoryllm_jax.common import records, storage
from memoryllm_jax.common.errors import ArgumentError, UserError, one_line, require
from memoryllm_jax.data import long_texts

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
LLAMA3_SPECIALS = {"<|begin_of_text|>": 0, "<|end_of_text|>": 1, "<|eot_id|>": 9}  # {name: id - number of ranks}
LLAMA3_RESERVED = 256  # ids after the ranks that are reserved for special tokens
# Common spellings of bos and eos, for a tokenizer.json that does not name them; the first one found is used.
HF_BOS = ("<|begin_of_text|>", "<s>", "<bos>", "[BOS]")
HF_EOS = ("<|end_of_text|>", "</s>", "<eos>", "<|endoftext|>", "[EOS]")


# Whether spellings of special tokens in a document stay plain text, or become those tokens.
SpecialTokens = Literal["text", "parse"]
MAX_VOCAB = 2**24  # ids of a tokenizer.json; the largest vocabularies have 2^18


class Tokenizer:
    """Text to token ids and back.

    Args:
      kind: sentencepiece, llama3 or hf.
      content: bytes of the model file.
      origin: where the content comes from, for error messages.
      special: (bos id, ids that end a text), if they are named by another file than the model file; else None.
      special_tokens_in_text: what `encode` and `encode_batch` make of special tokens that a document spells.
    Attributes:
      kind, content, special_tokens_in_text: as given.
      digest: SHA-256 of the content.
      vocab_size: number of ids.
      bos_id, eos_id: ids before and after each document, or None.
      stop_ids: ids that end a text, eos among them.
      put_before: id that the post-processor of a tokenizer.json puts before each text, or None.
      special_tokens: {spelling: id} of special tokens.
    Raises: UserError if the tokenizer library refuses the content.
    """

    def __init__(
        self,
        kind: str,
        content: bytes,
        origin: str,
        special: tuple | None = None,
        special_tokens_in_text: SpecialTokens = "text",
    ):
        if kind not in _LOADERS:
            raise UserError(f"tokenizer {kind}:{origin}: expected one of {', '.join(_LOADERS)} before the colon")
        self.kind, self.content, self.special_tokens_in_text = kind, content, special_tokens_in_text
        self.digest = hashlib.sha256(content).hexdigest()
        try:
            loaded = _LOADERS[kind](content)
        except UserError:
            raise
        except Exception as error:  # each library raises errors of its own for a bad file
            raise UserError(f"tokenizer {origin}: expected a {kind} model, found a file it refuses: {error}") from error
        self.vocab_size, self.put_before = loaded.vocab_size, loaded.put_before
        self.bos_id, self.eos_id = loaded.bos_id, loaded.eos_id
        self.special_tokens = loaded.special_tokens
        self._encode_text, self._parse, self._decode = loaded.encode_batch, loaded.parse_batch, loaded.decode
        self._plain_encoder = loaded.plain_encoder
        self.stop_ids = frozenset() if self.eos_id is None else frozenset({self.eos_id})
        self._special = None
        if special is not None:
            self.name_special(*special)

    def name_special(self, bos_id: int | None, ends: Sequence[int]) -> None:
        """Sets bos and the ids that end a text (eos first). `to_json` saves them."""
        self.bos_id = bos_id
        self.eos_id = ends[0] if ends else None
        self.stop_ids = frozenset(ends)
        self._special = bos_id, tuple(ends)
        if self._plain_encoder is not None:
            self._encode_text = None  # it depends on which tokens are special

    def encode_batch(self, texts: list[str], threads: int = 1) -> list[list[int]]:
        """The ids of each document, without bos and eos, by the rule of `special_tokens_in_text`."""
        if self.special_tokens_in_text == "parse":
            return self._parse_batch(texts, threads)
        return long_texts.encode_batch(texts, self._plain, threads)

    def _plain(self, texts: list[str], threads: int) -> list[list[int]]:
        """The library's ids of short texts, in which spellings of special tokens stay text."""
        if self._encode_text is None:
            self._encode_text = self._plain_encoder({self.bos_id, *self.stop_ids} - {None})
        return self._encode_text(texts, threads)

    def _parse_batch(self, texts: list[str], threads: int = 1) -> list[list[int]]:
        """The ids of each text, in which spellings of special tokens become those tokens, as in transformers."""
        if self._parse is not None:
            return long_texts.encode_batch(texts, self._parse, threads)
        if not self.special_tokens:
            return long_texts.encode_batch(texts, self._plain, threads)
        # Longest first: a spelling may begin with another one, and the regular expression takes the first that matches.
        spellings = "|".join(sorted(map(re.escape, self.special_tokens), key=len, reverse=True))
        parts_of_texts = [re.split(f"({spellings})", text) for text in texts]
        plain = iter(
            long_texts.encode_batch([part for parts in parts_of_texts for part in parts[::2]], self._plain, threads)
        )
        out = []
        for parts in parts_of_texts:
            ids: list[int] = []
            for part in parts:
                ids += [self.special_tokens[part]] if part in self.special_tokens else next(plain)
            out.append(ids)
        return out

    def encode(self, text: str) -> list[int]:
        """The ids of a text, without bos and eos."""
        return self.encode_batch([text])[0]

    def encode_special(self, text: str) -> list[int]:
        """The ids of a text in which spellings of special tokens become those tokens, as in transformers."""
        return self._parse_batch([text])[0]

    def encode_prompt(self, text: str) -> list[int]:
        """The ids of a prompt. A tokenizer.json parses special tokens in it, as its models' chat formats need them."""
        return self.encode_special(text) if self.kind == "hf" else self.encode(text)

    def token(self, text: str, argument: str, vocab_size: int) -> int:
        """The id of one token.

        Args:
          text: #ID, or a text that is a single token.
          argument: name of the argument, or of the setting in a file, that the text comes from.
          vocab_size: number of ids of the model, which may be larger than that of the tokenizer.
        Raises: ArgumentError if the id is out of range, or the text is not a single token.
        """
        if text.startswith("#") and text[1:].isdecimal():
            is_long = len(text) > 20  # Python refuses to read thousands of digits
            if is_long or int(text[1:]) >= vocab_size:
                raise ArgumentError(argument, f"expected an id below {vocab_size}, found {text[:40]}")
            return int(text[1:])
        ids = self.encode_prompt(text)
        if len(ids) != 1:
            pieces = ", ".join(f"#{i} {self.decode([i])!r}" for i in ids) or "none"
            raise ArgumentError(argument, f"expected one token, found {text!r} = {pieces}; name one as #ID")
        return ids[0]

    def decode(self, ids: Iterable[int]) -> str:
        """The text of the ids."""
        return self._decode([int(i) for i in ids])

    def to_json(self) -> dict:
        """The whole tokenizer, for checkpoints."""
        content = base64.b64encode(self.content).decode()
        tree = {
            "kind": self.kind,
            "digest": self.digest,
            "content": content,
            "special_tokens_in_text": self.special_tokens_in_text,
        }
        return tree if self._special is None else tree | {"special": self._special}

    @classmethod
    def from_json(cls, tree: dict) -> "Tokenizer":
        """The tokenizer that `to_json` described. Raises: UserError."""
        return cls(
            tree["kind"],
            base64.b64decode(tree["content"]),
            "of the checkpoint",
            tree.get("special"),
            tree.get("special_tokens_in_text") or default_special_tokens(tree["kind"]),
        )


def default_special_tokens(kind: str) -> SpecialTokens:
    """What version 0.1.0 made of special tokens that a document spells, by the kind or spec of the tokenizer."""
    return "parse" if kind.partition(":")[0] == "hf" else "text"


def load(spec: str, special_tokens_in_text: SpecialTokens = "text") -> Tokenizer:
    """Loads the tokenizer that `KIND:FILE` names.

    Args:
      special_tokens_in_text: whether special tokens that a document spells stay plain text ("text"), as they should in
        text of others, or become those tokens ("parse").
    Raises: UserError.
    """
    kind, _, path = spec.partition(":")
    if not path:
        raise UserError(f"tokenizer {spec!r}: expected KIND:FILE with KIND one of {', '.join(_LOADERS)}")
    content = storage.read_bytes(path, "a tokenizer")
    loaded = Tokenizer(kind, content, path, special_tokens_in_text=special_tokens_in_text)
    config_path = os.path.join(os.path.dirname(path), "tokenizer_config.json")
    if kind == "hf" and storage.exists(config_path):
        # A tokenizer.json does not say which of its tokens is eos.
        eos = _eos_token(config_path)
        ends = [loaded.token(eos, f"{config_path}: eos_token", loaded.vocab_size)] if eos else []
        loaded.name_special(loaded.put_before, ends)
    return loaded


class _AddedToken(records.Record):
    content: str


class _TokenizerConfig(records.Record):
    """What is read of a tokenizer_config.json."""

    eos_token: str | _AddedToken | None = None


def _eos_token(path: str) -> str | None:
    """The text of eos in a tokenizer_config.json: a string, or the `content` of an object. Raises: UserError."""
    eos = records.read(_TokenizerConfig, path, "settings of a tokenizer").eos_token
    return eos.content if isinstance(eos, _AddedToken) else eos


def token_texts(tokenizer: Tokenizer, ids: Iterable[int]) -> list[str]:
    """Each token as text for people: spaces are shown as ␣, and a token that is no readable text by itself as #ID."""
    out = []
    ids = list(ids)
    for i, text in zip(ids, plain_token_texts(tokenizer, ids)):
        shown = text.replace(" ", "␣").replace("\n", "\\n").replace("\t", "\\t")
        readable = shown.isprintable() and "\N{REPLACEMENT CHARACTER}" not in shown
        out.append(shown if shown and readable else f"#{i}")
    return out


def plain_token_texts(tokenizer: Tokenizer, ids: Iterable[int]) -> list[str]:
    """The text of each token inside of a text, "" for one that has none, such as a special token."""
    # SentencePiece drops the space before the first token of a text, so each token is decoded after another one.
    anchor = tokenizer.encode("a")[-1:]
    before = len(tokenizer.decode(anchor))
    return [tokenizer.decode([*anchor, i])[before:] if i < tokenizer.vocab_size else "" for i in ids]


# Shares of a text's characters whose pieces are ids of their own; the rarest characters become bytes. The first suits
# thousands of ids; where a small vocabulary has no room for so many characters, the next is tried.
_COVERAGES = (0.9999, 0.999, 0.995, 0.99)


def train_sentencepiece(read_texts: Callable[[], Iterable[str]], vocab_size: int, threads: int) -> Tokenizer:
    """Trains a reversible SentencePiece BPE model: it keeps white space, and unknown characters become byte tokens.

    Args:
      read_texts: reads the training text, as documents; called again if the characters have to be fewer.
      vocab_size: number of ids.
    Raises: UserError if the training fails, such as for a text with too few different pieces.
    """
    for coverage in _COVERAGES:
        try:
            return _train_sentencepiece(read_texts(), vocab_size, threads, coverage)
        except RuntimeError as error:
            problem = error
            if "smaller than required_chars" not in str(error):
                break
            print(f"{vocab_size} ids have no room for the characters of {coverage:.2%} of the text", flush=True)
    most = re.search(r"<= (\d+)", str(problem))
    reason = f"this text allows at most {most[1]} ids" if most else one_line(problem)
    raise UserError(f"tokenizer sentencepiece:train:{vocab_size}: training failed: {reason}") from problem


def _train_sentencepiece(texts: Iterable[str], vocab_size: int, threads: int, coverage: float) -> Tokenizer:
    """As `train_sentencepiece`. Raises: RuntimeError of SentencePiece."""
    import sentencepiece

    model = io.BytesIO()
    # SentencePiece's trainer drops line breaks, and lines over 4,192 bytes. 1,000 characters have at most 4,000 bytes.
    lines = (line + "\n" for text in texts for line in re.findall(r"[^\n]{1,1000}", text) if line.strip())
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=lines,
        model_writer=model,
        model_type="bpe",
        vocab_size=vocab_size,
        character_coverage=coverage,
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
    return Tokenizer("sentencepiece", model.getvalue(), f"sentencepiece:train:{vocab_size}")


class _Loaded(NamedTuple):
    """A model file, as its library loaded it; fields as in `Tokenizer`."""

    vocab_size: int
    bos_id: int | None
    eos_id: int | None
    encode_batch: Callable[[list[str], int], list[list[int]]] | None  # (texts, threads) -> ids
    decode: Callable[[list[int]], str]
    put_before: int | None
    special_tokens: dict[str, int]
    parse_batch: Callable[[list[str], int], list[list[int]]] | None = (
        None  # as encode_batch, with special tokens parsed
    )
    # (ids that are special as well) -> encode_batch, for a library whose own call parses special tokens
    plain_encoder: Callable[[set[int]], Callable] | None = None


def _load_sentencepiece(content):
    import sentencepiece

    processor = sentencepiece.SentencePieceProcessor()
    # Not `model_proto=`, which takes an empty file for no argument and leaves the processor without a model.
    processor.LoadFromSerializedProto(content)
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
    """Reads a file of tiktoken ranks.

    Returns: ({token: its rank, which is its id}, {special token of Llama 3: id}). Raises: UserError.
    """
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
    missing = [byte for byte in range(256) if bytes([byte]) not in ranks]
    if missing:  # tiktoken panics at a text that has such a byte
        raise UserError(f"tokenizer: expected a token for each byte, found none for 0x{missing[0]:02x}")
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


@contextlib.contextmanager
def _panics_as_errors():
    """Turns a panic of tokenizers, which contradictions in a tokenizer.json lead to, into a UserError."""
    try:
        yield
    except BaseException as error:
        # pyo3 exports no name for PanicException, which it derives from BaseException.
        if type(error).__name__ != "PanicException":
            raise
        raise UserError(
            f"tokenizer: expected a valid tokenizer.json, found one that tokenizers fails on: {error}"
        ) from error


def _load_hf(content):
    tokenizers = require("tokenizers", "prepare", "this tokenizer")
    with _panics_as_errors():
        tokenizer = tokenizers.Tokenizer.from_str(content.decode("utf-8"))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    vocab_size = max(tokenizer.get_vocab().values(), default=-1) + 1
    if not 0 < vocab_size <= MAX_VOCAB:
        raise UserError(f"tokenizer: expected from 1 to {MAX_VOCAB:,} ids in tokenizer.json, found {vocab_size:,}")

    def first_known(names):
        ids = map(tokenizer.token_to_id, names)
        return next((i for i in ids if i is not None), None)

    # The only way to find out whether the file's post-processor puts bos before a text is to run it.
    with _panics_as_errors():
        begun = tokenizer.encode("x", add_special_tokens=True).ids
        plain = tokenizer.encode("x", add_special_tokens=False).ids
    put_before = begun[0] if begun[:1] != plain[:1] else None
    if put_before is not None and put_before >= vocab_size:
        raise UserError(
            f"tokenizer: expected ids below {vocab_size} in tokenizer.json's post_processor, found {put_before}"
        )

    special = {token.content: i for i, token in tokenizer.get_added_tokens_decoder().items() if token.special}

    @_panics_as_errors()
    def decode(ids):
        return tokenizer.decode(ids, skip_special_tokens=True)

    return _Loaded(
        vocab_size=vocab_size,
        bos_id=first_known(HF_BOS) if put_before is None else put_before,
        eos_id=first_known(HF_EOS),
        encode_batch=None,
        decode=decode,
        put_before=put_before,
        special_tokens=special,
        parse_batch=_hf_encoder(tokenizer),
        plain_encoder=lambda others: _hf_plain_encoder(tokenizer, {*special.values(), *others}),
    )


def _hf_encoder(tokenizer) -> Callable[[list[str], int], list[list[int]]]:
    @_panics_as_errors()
    def encode_batch(texts, threads):
        return [found.ids for found in tokenizer.encode_batch_fast(texts, add_special_tokens=False)]

    return encode_batch


def _hf_plain_encoder(tokenizer, special: set[int]) -> Callable[[list[str], int], list[list[int]]]:
    """An encoder that never gives the special ids, whatever a text spells.

    `encode_special_tokens` of tokenizers is not enough: a Unigram or WordLevel model then finds the spelling in its
    vocabulary. So a copy of the tokenizer has names for these ids that no text can hold.
    """
    tree = msgspec.json.decode(tokenizer.to_str())
    tree |= {"post_processor": None, "truncation": None, "padding": None}  # they would name missing tokens
    model = tree["model"]
    # Merges of such a token need its name.
    merged = {"".join(merge if isinstance(merge, list) else merge.split(" ", 1)) for merge in model.get("merges", ())}
    names = {}
    for i in special:
        name = tokenizer.id_to_token(i)
        if name is not None and name not in merged:
            names[name] = f"\0{uuid.uuid4()}"
    for token in tree["added_tokens"]:
        token["content"] = names.get(token["content"], token["content"])
    if isinstance(model["vocab"], list):  # Unigram: pairs of a piece and its score
        model["vocab"] = [[names.get(piece, piece), score] for piece, score in model["vocab"]]
    else:
        model["vocab"] = {names.get(piece, piece): i for piece, i in model["vocab"].items()}
    if model.get("unk_token") in names:
        model["unk_token"] = names[model["unk_token"]]
    plain = type(tokenizer).from_str(msgspec.json.encode(tree).decode())
    plain.encode_special_tokens = True
    encode = _hf_encoder(plain)
    left = {i for i in special if tokenizer.id_to_token(i) in merged}

    def encode_batch(texts, threads):
        ids_of_texts = encode(texts, threads)
        for ids in ids_of_texts if left else ():
            if not left.isdisjoint(ids):
                spelled = tokenizer.id_to_token(next(i for i in ids if i in left))
                raise UserError(
                    f"tokenizer: expected that {spelled!r} in a document can stay text, found merges that make it a "
                    "special token; special_tokens_in_text=parse accepts it"
                )
        return ids_of_texts

    return encode_batch


_LOADERS = {"sentencepiece": _load_sentencepiece, "llama3": _load_llama3, "hf": _load_hf}
