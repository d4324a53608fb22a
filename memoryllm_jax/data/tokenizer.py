"""Tokenizers by spec: `sentencepiece:FILE`, `llama3:FILE` (tiktoken ranks), `hf:FILE` (tokenizer.json)."""

import base64
import hashlib
import importlib
import io
import os
import re
from collections.abc import Iterable, Iterator, Sequence

from memoryllm_jax.common import storage
from memoryllm_jax.common.errors import UserError

# Texts are tokenised in pieces of at most this many characters: tiktoken's regular expressions and
# SentencePiece's lattices do not take more at once. Llama 3's own tokenizer cuts at the same length.
PIECE_CHARS = 400_000
RUN_CHARS = 25_000  # longest run of spaces or of non-spaces that tiktoken takes

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

    Attributes:
      kind: sentencepiece, llama3 or hf.  content: the model file's bytes.  digest: their SHA-256.
      vocab_size: number of ids.  bos_id, eos_id: ids put before and after each document, or None.  stop_ids: those that
        end a text, eos among them.  put_before: id that a tokenizer.json itself puts before a text, or None.
      special_tokens: ids by spelling of those that `encode` takes for text when a text spells them.

    Args:
      special: (bos_id, ids that end a text) where other files than the tokenizer's own name them.
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

        self.vocab_size, self.put_before, self.bos_id, self.eos_id, *functions, self.special_tokens = loaded
        self._encode_batch, self._decode = functions
        self.stop_ids, self._special = frozenset({self.eos_id} - {None}), None
        if special is not None:
            self.name_special(*special)

    def name_special(self, bos_id: int | None, ends: Sequence[int]) -> None:
        """Takes bos, and ids that end a text, eos first, from elsewhere; `to_json` keeps them."""
        self.bos_id, self.eos_id, self.stop_ids = bos_id, next(iter(ends), None), frozenset(ends)
        self._special = bos_id, tuple(ends)

    def encode_batch(self, texts: list[str], threads: int = 1) -> list[list[int]]:
        """Ids of each text, without bos and eos."""
        pieces = [list(_pieces(text)) for text in texts]
        flat = iter(self._encode_batch([p for ps in pieces for p in ps], threads))
        return [[i for _ in ps for i in next(flat)] for ps in pieces]

    def encode(self, text: str) -> list[int]:
        return self.encode_batch([text])[0]

    def encode_special(self, text: str) -> list[int]:
        """Ids of a text in which the spelling of a special token is that token, as transformers takes it."""
        special = self.special_tokens
        if not special:
            return self.encode(text)
        parts = re.split(f"({'|'.join(sorted(map(re.escape, special), key=len, reverse=True))})", text)
        return [i for part in parts for i in ([special[part]] if part in special else self.encode(part))]

    def token(self, name: str, label: str, vocab_size: int) -> int:
        """The id of `#ID` or of a text that is one token. Raises: UserError that begins with `label`."""
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
        content = base64.b64encode(self.content).decode()
        special = {} if self._special is None else {"special": self._special}
        return {"kind": self.kind, "digest": self.digest, "content": content, **special}

    @classmethod
    def from_json(cls, tree: dict) -> "Tokenizer":
        return cls(tree["kind"], base64.b64decode(tree["content"]), "of the checkpoint", tree.get("special"))


def load(spec: str) -> Tokenizer:
    """The tokenizer of `KIND:FILE`. Raises: UserError."""
    kind, _, path = spec.partition(":")
    if not path:
        raise UserError(f"tokenizer {spec!r}: expected KIND:FILE with KIND one of {', '.join(_LOADERS)}")
    content = storage.read_bytes(path, "a tokenizer")
    made = Tokenizer(kind, content, path)
    beside = os.path.join(os.path.dirname(path), "tokenizer_config.json")
    if kind == "hf" and storage.exists(beside):
        eos = _eos_token(storage.read_json(beside, "settings of a tokenizer"), beside)
        ends = [made.token(eos, f"{beside}: eos_token", made.vocab_size)] if eos else []
        made.name_special(made.put_before, ends)
    return made


def _eos_token(config, where):
    eos = config.get("eos_token") if isinstance(config, dict) else config
    eos = eos.get("content") if isinstance(eos, dict) else eos
    if not isinstance(eos, str | None):
        raise UserError(f"{where}: eos_token: expected a token, found {eos!r}")
    return eos


def train_sentencepiece(texts: Iterator[str], vocab_size: int, threads: int) -> Tokenizer:
    """A reversible SentencePiece BPE model: white space is kept as it is, and unknown characters become bytes."""
    import sentencepiece

    model = io.BytesIO()
    # Without this SentencePiece drops every line break, and lines longer than 4,192 bytes.
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
    """The text in pieces that every tokenizer takes, cut at line ends where there are any."""
    start = 0
    while start < len(text):
        end = min(start + PIECE_CHARS, len(text))
        if end < len(text):
            end = text.rfind("\n", start, end) + 1 or end
            end = end if end > start else min(start + PIECE_CHARS, len(text))
        piece = text[start:end]
        start = end
        if len(piece) > RUN_CHARS and re.search(rf"\S{{{RUN_CHARS + 1}}}|\s{{{RUN_CHARS + 1}}}", piece):
            cut = 0
            for run in re.finditer(rf"\S{{{RUN_CHARS}}}|\s{{{RUN_CHARS}}}", piece):
                yield piece[cut : run.end()]
                cut = run.end()
            piece = piece[cut:]
        if piece:
            yield piece


def need(package: str):
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise UserError(f"this tokenizer needs {package}: pip install 'memoryllm_jax[prepare]'") from error


def _load_sentencepiece(content):
    import sentencepiece

    processor = sentencepiece.SentencePieceProcessor(model_proto=content)
    bos, eos = (i if i >= 0 else None for i in (processor.bos_id(), processor.eos_id()))

    def encode_batch(texts, threads):
        return processor.encode(texts, num_threads=threads)

    size = processor.vocab_size()
    spelled = {processor.id_to_piece(i): i for i in range(size) if processor.is_control(i) or processor.is_unknown(i)}
    return size, None, bos, eos, encode_batch, processor.decode, spelled


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
    tiktoken = need("tiktoken")
    ranks, specials = llama3_tokens(content)
    encoding = tiktoken.Encoding("llama3", pat_str=LLAMA3_PATTERN, mergeable_ranks=ranks, special_tokens=specials)

    def encode_batch(texts, threads):
        return encoding.encode_ordinary_batch(texts, num_threads=threads)

    bos, eos = specials["<|begin_of_text|>"], specials["<|end_of_text|>"]
    return len(ranks) + LLAMA3_RESERVED, None, bos, eos, encode_batch, encoding.decode, specials


def _load_hf(content):
    tokenizer = need("tokenizers").Tokenizer.from_str(content.decode("utf-8"))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    bos, eos = (
        next((i for i in map(tokenizer.token_to_id, names) if i is not None), None) for names in (HF_BOS, HF_EOS)
    )
    begun, plain = (tokenizer.encode("x", add_special_tokens=put).ids for put in (True, False))
    put_before = begun[0] if begun[:1] != plain[:1] else None

    def encode_batch(texts, threads):
        return [e.ids for e in tokenizer.encode_batch_fast(texts, add_special_tokens=False)]

    def decode(ids):
        return tokenizer.decode(ids, skip_special_tokens=True)

    size, bos = max(tokenizer.get_vocab().values()) + 1, bos if put_before is None else put_before
    return size, put_before, bos, eos, encode_batch, decode, {}  # encode_batch finds special tokens itself


_LOADERS = {"sentencepiece": _load_sentencepiece, "llama3": _load_llama3, "hf": _load_hf}


def token_texts(tokenizer, ids) -> list[str]:
    """The text of each of the ids as people read it: a leading space is ␣, and what is no text by itself is #ID."""
    anchor = tokenizer.encode("a")[-1:]  # SentencePiece takes the space off a text's first token
    before = len(tokenizer.decode(anchor))
    out = []
    for i in ids:
        text = tokenizer.decode([*anchor, i])[before:] if i < tokenizer.vocab_size else ""
        shown = text.replace(" ", "␣").replace("\n", "\\n").replace("\t", "\\t")
        out.append(shown if shown and shown.isprintable() and "\N{REPLACEMENT CHARACTER}" not in shown else f"#{i}")
    return out
