"""Preparing text, reading it back, and what is refused on the way."""

import gzip
import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from memoryllm_jax.common import storage
from memoryllm_jax.common.errors import UserError
from memoryllm_jax.data import documents, tokenizer
from memoryllm_jax.data.dataset import Dataset
from memoryllm_jax.data.shards import prepare
from memoryllm_jax.training.batches import TrainBatches, ValidationBatches


def read_all(dataset, split="train"):
    tokens = getattr(dataset, split)
    return tokens.read(0, tokens.tokens)


def texts_of(dataset, split, model):
    """The split's documents, decoded from its tokens."""
    ids = read_all(dataset, split)
    return [model.decode(part[1:]) for part in np.split(ids, np.flatnonzero(ids == model.eos_id) + 1)[:-1]]


def test_every_format_gives_the_same_tokens(corpus, data_path, tmp_path):
    """C4's shape, jsonl, zstd and parquet hold the same documents; .txt holds one."""
    zstandard, pyarrow = pytest.importorskip("zstandard"), pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")

    raw = open(corpus, "rb").read()
    texts = [json.loads(line)["text"] for line in raw.splitlines()]
    (tmp_path / "c4.json.gz").write_bytes(gzip.compress(raw[:1000]) + gzip.compress(raw[1000:]))
    (tmp_path / "a.jsonl.zst").write_bytes(zstandard.compress(raw))
    parquet.write_table(pyarrow.table({"text": texts}), tmp_path / "a.parquet")
    (tmp_path / "a.txt").write_text(texts[0])
    expected = Dataset(data_path)
    spec = f"sentencepiece:{data_path}/tokenizer.model"
    for name in ("c4.json.gz", "a.jsonl.zst", "a.parquet"):
        out = str(tmp_path / f"out-{name}")
        prepare(str(tmp_path / name), spec, out, validation_fraction=0.05)
        for split in ("train", "validation"):
            np.testing.assert_array_equal(read_all(Dataset(out), split), read_all(expected, split))
    prepare(str(tmp_path / "a.txt"), spec, str(tmp_path / "out-txt"))
    text = Dataset(str(tmp_path / "out-txt"))
    model = text.tokenizer()
    both = np.concatenate([read_all(text), read_all(text, "validation")])
    assert model.decode(both[1:-1]) == texts[0]
    assert text.train.bytes + text.validation.bytes == len(texts[0].encode())


def test_any_path_fsspec_reads(corpus, data_path):
    fsspec = pytest.importorskip("fsspec")
    for part in (0, 1):
        with fsspec.open(f"memory://bucket/part-{part}.jsonl", "wb") as file:
            file.write(b"".join(open(corpus, "rb").readlines()[part::2]))
    assert documents.expand("memory://bucket/*.jsonl") == [f"memory:///bucket/part-{part}.jsonl" for part in (0, 1)]
    read = [text for path in documents.expand("memory://bucket/*.jsonl") for text, _ in documents.read(path)]
    assert sorted(read) == sorted(text for text, _ in documents.read(corpus))


def test_held_out_documents_are_not_trained_on_and_counts_are_exact(corpus, data_path):
    dataset = Dataset(data_path)
    model = dataset.tokenizer()
    train, held_out = texts_of(dataset, "train", model), texts_of(dataset, "validation", model)
    everything = [json.loads(line)["text"] for line in open(corpus)]
    assert sorted(train + held_out) == sorted(everything) and not set(train) & set(held_out) and held_out
    for tokens, texts in ((dataset.train, train), (dataset.validation, held_out)):
        assert tokens.documents == len(texts)
        assert tokens.bytes == sum(len(text.encode()) for text in texts)
        assert tokens.tokens == sum(len(model.encode(text)) + 2 for text in texts)
    record = json.load(open(f"{data_path}/dataset.json"))
    assert record["tokenizer"]["digest"] == storage.sha256(f"{data_path}/tokenizer.model")
    assert (record["dtype"], record["vocab_size"]) == ("uint16", 512)


def test_killed_prepare_goes_on(corpus, data_path, tmp_path):
    """SIGKILL between two shards; the second run keeps the first's and ends as if nothing had happened."""
    lines = open(corpus).read().splitlines()
    for i in range(6):
        (tmp_path / f"in{i}.jsonl").write_text("\n".join(lines[i::6] * 20))
    command = [sys.executable, "-m", "memoryllm_jax.prepare", f"--input={tmp_path}/in*.jsonl", "--workers=2"]
    command.append(f"--tokenizer=sentencepiece:{data_path}/tokenizer.model")

    def start(name):
        return subprocess.Popen([*command, f"--output={tmp_path}/{name}"], stdout=subprocess.DEVNULL)

    process, done = start("killed"), tmp_path / "killed" / ".done"
    deadline = time.time() + 60
    while not (done.exists() and any(p.suffix == ".json" for p in done.iterdir())):
        assert process.poll() is None and time.time() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "killed" / "dataset.json").exists()
    finished = {p.stem: p.stat().st_mtime_ns for p in done.iterdir() if p.suffix == ".json"}
    assert 0 < len(finished) < 6
    kept = {p.name: p.stat().st_mtime_ns for p in done.parent.glob("train-*.bin") if p.stem[6:] in finished}
    time.sleep(1)  # until the killed run's workers have noticed
    assert start("killed").wait() == 0 and start("whole").wait() == 0
    for name, at in kept.items():
        assert (tmp_path / "killed" / name).stat().st_mtime_ns == at
    first, second = (json.load(open(tmp_path / name / "dataset.json")) for name in ("killed", "whole"))
    assert first == second
    Dataset(str(tmp_path / "killed")).verify()
    assert not list(tmp_path.glob("killed/*.part"))


CUT_OFF = gzip.compress(b'{"text": "abc"}\n' * 100, mtime=0)[:-20]  # the time would be in the tests' names


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("a.json.gz", CUT_OFF, "a.json.gz: the compressed file is cut off"),
        ("a.json.gz", b"\x1f\x8b plain text", "a.json.gz: damaged compressed data"),
        ("a.jsonl", b'{"text": "a"}\n{"text": \n', "a.jsonl: line 2: invalid JSON"),
        ("a.jsonl", b'{"text": "a"}\n\n{"txt": "b"}\n', "a.jsonl: line 3: expected text under 'text', found NoneType"),
        (
            "a.jsonl",
            b'{"text": "a"}\n{"text": "\xff"}\n',
            "a.jsonl: line 2: expected UTF-8, found byte 0xff at offset 10",
        ),
        ("a.jsonl", b'{"text": "\\ud800"}\n', "a.jsonl: line 1: expected Unicode text, found half a surrogate"),
        ("a.txt", b"abc\xff", "a.txt: expected UTF-8, found byte 0xff at offset 3"),
        ("a.jsonl", b"", "a.jsonl: the file is empty"),
        ("a.jsonl", b"\n\n", "a.jsonl: expected documents, found none"),
        ("a.parquet", b"PAR1 not really", "a.parquet: damaged parquet"),
        ("a.csv", b"text", "a.csv: expected a name ending in .json"),
    ],
)
def test_bad_input_is_named_and_leaves_no_shard(name, content, message, data_path, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError) as error:
        prepare(str(tmp_path / name), f"sentencepiece:{data_path}/tokenizer.model", str(tmp_path / "out"))
    assert message in str(error.value)
    assert not list(tmp_path.glob("out/*.bin*")) and not (tmp_path / "out" / "dataset.json").exists()


def test_other_mistakes_in_preparing(corpus, data_path, tmp_path):
    spec = f"sentencepiece:{data_path}/tokenizer.model"
    with pytest.raises(UserError, match="expected at least one file, found none"):
        prepare(f"{tmp_path}/*.json.gz", spec, str(tmp_path / "o"))
    with pytest.raises(UserError, match="was begun with another tokenizer"):
        prepare(corpus, spec, data_path, validation_fraction=0.05)
    with pytest.raises(UserError, match="expected a sentencepiece model, found a file it refuses"):
        prepare(corpus, f"sentencepiece:{corpus}", str(tmp_path / "o"))
    with pytest.raises(UserError, match="No such file or directory"):
        prepare(corpus, "llama3:/none/tokenizer.model", str(tmp_path / "o"))
    with pytest.raises(UserError, match="expected one of sentencepiece, llama3, hf"):
        prepare(corpus, f"bpe:{corpus}", str(tmp_path / "o"))
    with pytest.raises(UserError, match="cannot be written"):
        prepare(corpus, spec, f"{corpus}/out")
    assert os.listdir(tmp_path / "o") == [".lock"]
    with pytest.raises(UserError, match="this text allows at most"):
        prepare(corpus, "sentencepiece:train:200000", str(tmp_path / "o"))


def test_files_of_the_user_are_never_removed_or_trained_on_and_held_out(corpus, data_path, tmp_path):
    own = tmp_path / "tokenizer.model"
    own.write_bytes(open(f"{data_path}/tokenizer.model", "rb").read())
    with pytest.raises(UserError, match=r"holds a tokenizer.model that `prepare` did not write"):
        prepare(corpus, f"sentencepiece:{own}", str(tmp_path))
    assert own.exists()
    lines = open(corpus).read().splitlines(keepends=True)
    (tmp_path / "a.jsonl").write_text("".join(lines[:40]))
    (tmp_path / "b.jsonl").write_text("".join(lines[40:]))
    both = f"{tmp_path}/*.jsonl,{tmp_path}/a.jsonl"
    prepare(both, f"sentencepiece:{own}", f"{tmp_path}/out", validation_pattern=f"{tmp_path}/b.jsonl")
    dataset = Dataset(f"{tmp_path}/out")
    assert (dataset.train.documents, dataset.validation.documents) == (40, 40)


def test_an_error_in_one_file_ends_all_workers(corpus, data_path, tmp_path):
    """The other worker has far more to report than a pipe holds; nobody reads it any more."""
    (tmp_path / "a.jsonl").write_text("broken\n")
    (tmp_path / "b.jsonl").write_bytes(open(corpus, "rb").read() * 10)
    command = [sys.executable, "-m", "memoryllm_jax.prepare", f"--input={tmp_path}/*.jsonl", "--workers=2"]
    command += [f"--tokenizer=sentencepiece:{data_path}/tokenizer.model", f"--output={tmp_path}/out"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert result.returncode == 1 and "a.jsonl: line 1: invalid JSON" in result.stderr
    assert "Traceback" not in result.stderr and not list(tmp_path.glob("out/*.part"))


@pytest.fixture
def copied(data_path, tmp_path):
    """A copy of the prepared data to damage."""
    path = tmp_path / "copy"
    path.mkdir()
    for name in os.listdir(data_path):
        (path / name).write_bytes(open(f"{data_path}/{name}", "rb").read())
    return path


def test_damaged_data_is_named(copied):
    shard = next(copied.glob("train-*.bin"))
    whole = shard.read_bytes()
    shard.write_bytes(whole[:100] + b"\x01" + whole[101:])
    dataset = Dataset(str(copied))
    with pytest.raises(UserError, match=rf"{shard.name}: checksum differs"):
        dataset.verify()
    shard.write_bytes(whole[:200] + (600).to_bytes(2, "little") + whole[202:])
    with pytest.raises(UserError, match=rf"{shard.name}: token 100: expected an id below 512, found 600"):
        Dataset(str(copied)).train.read(0, 1000)
    shard.write_bytes(whole[:-2])
    with pytest.raises(UserError, match=rf"{shard.name}: expected {len(whole)} bytes, found {len(whole) - 2}"):
        Dataset(str(copied))
    shard.write_bytes(whole)
    other = tokenizer.train_sentencepiece(iter(["Another text that gives another model. " * 99]), 300, 1)
    (copied / "tokenizer.model").write_bytes(other.content)
    with pytest.raises(UserError, match="the tokenizer does not match the data"):
        Dataset(str(copied)).tokenizer()
    with pytest.raises(UserError, match="expected a folder that `prepare` finished"):
        Dataset(str(copied.parent))


def global_batch(batches, step):
    """(inputs [B, T], targets [B, T]) of all shards, whatever ids and index they are stored as."""
    shards = batches[step]
    inputs = [ids[index].reshape(-1) for ids, index, *_ in shards.values()]
    return np.concatenate(inputs), np.concatenate([t.reshape(-1) for _, _, t, _ in shards.values()])


def test_global_batches_do_not_depend_on_hosts_and_windows_cover_the_data(make_config):
    config = make_config("memory", steps=200, **{"data.epochs": 2})
    dataset = Dataset(config.data.path)
    one = TrainBatches(config, dataset, 1, [0])
    stream = read_all(dataset)
    for step in (0, 7, 199):
        inputs, targets = global_batch(one, step)
        for shards, hosts in ((2, 1), (4, 2), (8, 4)):
            share = shards // hosts
            parts = [
                global_batch(TrainBatches(config, dataset, shards, range(h * share, (h + 1) * share)), step)
                for h in range(hosts)
            ]
            np.testing.assert_array_equal(np.concatenate([p[0] for p in parts]), inputs)
            np.testing.assert_array_equal(np.concatenate([p[1] for p in parts]), targets)
    # One epoch takes every window once, shuffled; the next epoch in another order.
    T, B = config.seq_len, config.batch_size
    steps = one.windows // B
    rows = np.concatenate([global_batch(one, s)[0].reshape(B, T) for s in range(steps)])
    expected = stream[: one.windows * T].reshape(-1, T)
    assert len({r.tobytes() for r in rows} - {r.tobytes() for r in expected}) == 0
    unique = {r.tobytes() for r in expected}
    assert len({r.tobytes() for r in rows}) >= len(unique) - B and not np.array_equal(rows, expected[: len(rows)])


def test_reading_goes_on_from_any_step_and_errors_reach_the_reader(make_config, copied):
    config = make_config("memory", steps=50, **{"data.path": str(copied)})
    dataset = Dataset(str(copied))
    batches = TrainBatches(config, dataset, 2, [0, 1])
    reader = batches.iterate(30)
    for step in range(30, 50):
        for (ids, index, *_), (ids2, index2, *_) in zip(next(reader).values(), batches[step].values()):
            np.testing.assert_array_equal(ids[index], ids2[index2])
    with pytest.raises(StopIteration):
        next(reader)
    shard = next(copied.glob("train-*.bin"))
    shard.write_bytes(b"\xff" * shard.stat().st_size)
    with pytest.raises(UserError, match="expected an id below 512, found 65535"):
        next(TrainBatches(config, Dataset(str(copied)), 2, [0, 1]).iterate(0))


def test_end_of_data_is_refused_before_training(make_config):
    config = make_config("memory", steps=100_000)
    with pytest.raises(UserError, match=r"config.data.epochs: 100000 steps of 8 sequences need .* set it to \d+"):
        TrainBatches(config, Dataset(config.data.path), 1, [0])


def test_validation_scores_every_token_once(make_config):
    config = make_config("memory", **{"eval.batches": 0})
    dataset = Dataset(config.data.path)
    batches = ValidationBatches(config, dataset, 2, [0, 1])
    scored = []
    for step in range(len(batches)):
        for _, _, targets, weights in batches[step].values():
            scored.append(targets[weights == 1])
    np.testing.assert_array_equal(np.concatenate(scored), read_all(dataset, "validation")[1:])


TEXT = "Tabs\tand  two spaces,\n\n  an é, 漢字 and \U0001f600; 12345 it's I'LL \r\n end.   \n"


def test_trained_sentencepiece_is_reversible(data_path):
    model = tokenizer.load(f"sentencepiece:{data_path}/tokenizer.model")
    assert model.vocab_size == 512 and model.decode(model.encode(TEXT)) == TEXT
    assert tokenizer.Tokenizer.from_json(model.to_json()).encode(TEXT) == model.encode(TEXT)


def test_llama3_and_hf_tokenizers_agree(tmp_path):
    """A byte-level vocabulary in Llama 3's file format and in tokenizer.json gives the same ids and specials."""
    pytest.importorskip("tiktoken")
    tokenizers = pytest.importorskip("tokenizers")
    import base64

    merges = [(b"t", b"h"), (b"th", b"e"), (b" ", b"the"), (b"i", b"n"), (b"a", b"n"), (b"an", b"d"), (b"\n", b"\n")]
    ranks = [bytes([b]) for b in range(256)] + [a + b for a, b in merges]
    lines = b"".join(base64.b64encode(token) + b" %d\n" % rank for rank, token in enumerate(ranks))
    (tmp_path / "llama3.model").write_bytes(lines)
    llama = tokenizer.load(f"llama3:{tmp_path}/llama3.model")
    assert llama.vocab_size == len(ranks) + 256
    assert (llama.bos_id, llama.eos_id) == (len(ranks), len(ranks) + 1)

    alphabet = _bytes_to_unicode()
    spell = lambda token: "".join(alphabet[b] for b in token)  # noqa: E731
    model = tokenizers.models.BPE({spell(t): i for i, t in enumerate(ranks)}, [(spell(a), spell(b)) for a, b in merges])
    hf = tokenizers.Tokenizer(model)
    pattern = tokenizers.Regex(tokenizer.LLAMA3_PATTERN)
    hf.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(
        [
            tokenizers.pre_tokenizers.Split(pattern, "isolated"),
            tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    hf.decoder = tokenizers.decoders.ByteLevel()
    hf.add_special_tokens(["<|begin_of_text|>", "<|end_of_text|>"])
    hf.save(str(tmp_path / "tokenizer.json"))
    ours = tokenizer.load(f"hf:{tmp_path}/tokenizer.json")
    text = TEXT + " the and in the\n\nthe thin man " * 5
    assert ours.encode(text) == llama.encode(text) and len(set(ours.encode(text)) & set(range(256, 263))) == 7
    assert (ours.bos_id, ours.eos_id) == (llama.bos_id, llama.eos_id)
    assert llama.decode(llama.encode(text)) == ours.decode(ours.encode(text)) == text
    long = "a" * 30_000 + " " * 30_000 + "b" * 500_000
    assert llama.decode(llama.encode(long)) == long


def _bytes_to_unicode():
    """The byte-level alphabet: printable bytes stand for themselves, the others for characters from 256 on."""
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = iter(range(256, 512))
    return {b: chr(b) if b in printable else chr(next(others)) for b in range(256)}


def test_documents_read_the_embedded_corpus():
    texts = [text for text, _ in documents.read("embedded")]
    assert len(texts) > 300 and sum(map(len, texts)) > 5_000_000
