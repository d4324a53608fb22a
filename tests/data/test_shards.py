"""Preparing text: every format gives the same tokens, a killed run goes on, bad input is named."""

import functools
import gzip
import json
import os
import signal
import subprocess
import sys
import time

import fsspec
import numpy as np
import pytest
from lab import read_all
from sides import write_tokenizer

from memoryllm_jax.common import storage
from memoryllm_jax.common.errors import UserError
from memoryllm_jax.data import input_file, shards
from memoryllm_jax.data.dataset import Dataset
from memoryllm_jax.data.shards import prepare


def texts_of(dataset, split, model):
    """The split's documents, decoded from its tokens."""
    ids = read_all(dataset, split)
    return [model.decode(part[1:]) for part in np.split(ids, np.flatnonzero(ids == model.eos_id) + 1)[:-1]]


def test_every_format_gives_the_same_tokens(corpus, data_path, tmp_path):
    """The same documents as C4's .json.gz (two gzip streams in one file), as zstd and as parquet."""
    zstandard, pyarrow = pytest.importorskip("zstandard"), pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")

    raw = open(corpus, "rb").read()
    texts = [json.loads(line)["text"] for line in raw.splitlines()]
    (tmp_path / "c4.json.gz").write_bytes(gzip.compress(raw[:1000]) + gzip.compress(raw[1000:]))
    (tmp_path / "a.jsonl.zst").write_bytes(zstandard.compress(raw))
    parquet.write_table(pyarrow.table({"text": texts}), tmp_path / "a.parquet")
    expected = Dataset(data_path)
    spec = f"sentencepiece:{data_path}/tokenizer.model"
    for name in ("c4.json.gz", "a.jsonl.zst", "a.parquet"):
        out = str(tmp_path / f"out-{name}")
        prepare(str(tmp_path / name), spec, out, validation_fraction=0.05)
        for split in ("train", "validation"):
            np.testing.assert_array_equal(read_all(Dataset(out), split), read_all(expected, split))


def test_a_txt_file_is_one_document_whose_end_is_held_out(corpus, data_path, tmp_path):
    with open(corpus) as file:
        text = json.loads(file.readline())["text"]
    (tmp_path / "a.txt").write_text(text)
    prepare(str(tmp_path / "a.txt"), f"sentencepiece:{data_path}/tokenizer.model", str(tmp_path / "out"))
    dataset = Dataset(str(tmp_path / "out"))
    both = np.concatenate([read_all(dataset), read_all(dataset, "validation")])
    assert dataset.tokenizer().decode(both[1:-1]) == text  # without bos and eos
    assert dataset.train.bytes + dataset.validation.bytes == len(text.encode())


def test_held_out_documents_are_not_trained_on(corpus, data_path):
    dataset = Dataset(data_path)
    model = dataset.tokenizer()
    train, held_out = texts_of(dataset, "train", model), texts_of(dataset, "validation", model)
    everything = [json.loads(line)["text"] for line in open(corpus)]
    assert sorted(train + held_out) == sorted(everything)
    assert held_out and not set(train) & set(held_out)


@pytest.mark.parametrize("split", ["train", "validation"])
def test_counts_of_a_split_are_exact(data_path, split):
    dataset = Dataset(data_path)
    model, counts = dataset.tokenizer(), getattr(dataset, split)
    texts = texts_of(dataset, split, model)
    assert counts.documents == len(texts)
    assert counts.bytes == sum(len(text.encode()) for text in texts)
    assert counts.tokens == sum(len(model.encode(text)) + 2 for text in texts)  # with bos and eos


def test_dataset_json_describes_tokenizer_and_ids(data_path):
    record = json.load(open(f"{data_path}/dataset.json"))
    assert record["tokenizer"]["digest"] == storage.sha256(f"{data_path}/tokenizer.model")
    assert (record["dtype"], record["vocab_size"]) == ("uint16", 512)


def test_a_killed_prepare_goes_on(corpus, data_path, tmp_path):
    """SIGKILL when some files are done: the second run keeps their file shards and ends with the same dataset.json."""
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
    time.sleep(1)  # until the workers of the killed run have ended too
    assert start("killed").wait() == 0 and start("whole").wait() == 0
    for name, at in kept.items():
        assert (tmp_path / "killed" / name).stat().st_mtime_ns == at
    first, second = (json.load(open(tmp_path / name / "dataset.json")) for name in ("killed", "whole"))
    assert first == second
    Dataset(str(tmp_path / "killed")).verify()
    assert not list(tmp_path.glob("killed/*.part"))


def files_of(folder):
    """{name: content} of what a run leaves for others to read."""
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.suffix in (".json", ".bin", ".model", ".part")}


@pytest.fixture
def halves(corpus, data_path, tmp_path):
    """A function that prepares two files into out/. An earlier run finished one, and found a bad line in the other."""
    lines = open(corpus).read().splitlines(keepends=True)
    (tmp_path / "a.jsonl").write_text("".join(lines[:40]))
    second = "".join(lines[40:])
    (tmp_path / "b.jsonl").write_text("x" * len(second))

    def go_on(output=f"{tmp_path}/out"):
        spec = f"sentencepiece:{data_path}/tokenizer.model"
        return prepare(f"{tmp_path}/?.jsonl", spec, output, validation_fraction=0.05, workers=1)

    with pytest.raises(UserError, match=r"b.jsonl: line 1: invalid JSON"):
        go_on()
    (tmp_path / "b.jsonl").write_text(second)
    return go_on


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def replace(path, old, new):
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


@pytest.mark.parametrize(
    "name, change, message",
    [
        ("tokenizer.model", flip, "tokenizer.model: the tokenizer does not match the data: expected SHA-256"),
        ("tokenizer.model", os.remove, "tokenizer.model: expected a file: No such file"),
        ("train-00000.bin", flip, "train-00000.bin: changed since it was finished: expected SHA-256 .* found"),
        ("train-00000.bin", os.remove, "train-00000.bin: expected a file: No such file"),
        (
            ".done/00000.json",
            lambda p: replace(p, '"bytes": ', '"bytes": 1'),
            "found another: it was damaged or edited",
        ),
        (".done/00000.json", lambda p: replace(p, "train-00000", "../../train"), "it was damaged or edited"),
        (".done/00000.json", lambda p: p.write_bytes(p.read_bytes()[:50]), "expected a record .*invalid JSON"),
        (".done/00000.json", lambda p: p.write_text("[" * 10**5), "nested too deeply|expected object"),
        (".plan.json", lambda p: replace(p, '"text_key": "', '"text_key": "x'), "was begun with another text_key"),
        (".plan.json", lambda p: replace(p, '"format": 1', '"format": null'), "format: expected int, found null"),
        (".plan.json", lambda p: replace(p, '"sources": [', '"sources": [['), "invalid JSON|sources"),
        ("../a.jsonl", lambda p: p.write_text("{}"), r"a.jsonl: expected \d+ bytes, as when .* begun, found 2"),
    ],
)
def test_what_changed_since_a_run_began_is_refused(halves, tmp_path, name, change, message):
    change(tmp_path / "out" / name)
    before = files_of(tmp_path / "out")
    with pytest.raises(UserError, match=message):
        halves()
    assert files_of(tmp_path / "out") == before


def test_data_of_version_0_1_0_is_finished(halves, tmp_path, capsys):
    """Its plan lacks the tokenizer, and its dataset.json what became of special tokens."""
    record = halves()
    for name, inner, field in ((".plan.json", None, "model"), ("dataset.json", "tokenizer", "special_tokens_in_text")):
        path = tmp_path / "out" / name
        tree = json.loads(path.read_text())
        del (tree[inner] if inner else tree)[field]
        tree.pop("special_tokens_in_text", None)
        path.write_text(json.dumps(tree))
    assert halves().splits == record.splits
    assert "already prepared" in capsys.readouterr().out


def test_a_url_holds_the_same_files_as_a_disk(halves, tmp_path):
    """Also where an earlier run was interrupted, on both."""
    halves()
    expected = files_of(tmp_path / "out")
    second = (tmp_path / "b.jsonl").read_text()
    (tmp_path / "b.jsonl").write_text("x" * len(second))
    with pytest.raises(UserError, match="invalid JSON"):
        halves("memory://prepared")
    (tmp_path / "b.jsonl").write_text(second)
    halves("memory://prepared")
    fs = fsspec.filesystem("memory")
    fs.get("/prepared/", f"{tmp_path}/copy/", recursive=True)
    assert files_of(tmp_path / "copy") == expected and len(expected) == 7
    assert not storage.names("memory://prepared/.done")
    fs.rm("/prepared", recursive=True)


def test_a_run_that_lost_its_url_to_another_removes_nothing(corpus, data_path, monkeypatch):
    fs = fsspec.filesystem("memory")

    def take_over(*args):
        fs.pipe_file("/taken/.lock", b"another run")
        raise UserError("of the first run")

    monkeypatch.setattr(shards, "_train_tokenizer", take_over)
    with pytest.raises(UserError, match=r"another run has taken over \(another run\)"):
        prepare(corpus, "sentencepiece:train:512", "memory://taken", workers=1)
    assert storage.names("memory://taken") == {".lock", ".plan.json"}
    fs.rm("/taken", recursive=True)


def test_a_dask_cluster_that_loses_a_worker_writes_the_same_bytes(corpus, data_path, tmp_path):
    """Two worker processes, of which one is killed while both write; and a folder that workers do not see."""
    distributed = pytest.importorskip("distributed", reason="needs the extra dask")
    lines = open(corpus).read().splitlines()
    for i in range(6):
        (tmp_path / f"in{i}.jsonl").write_text("\n".join(lines[i::6] * 20))
    spec, out = f"sentencepiece:{data_path}/tokenizer.model", tmp_path / "out"
    command = [sys.executable, "-m", "memoryllm_jax.prepare", f"--input={tmp_path}/in*.jsonl", f"--tokenizer={spec}"]
    with distributed.LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None) as cluster:
        command += [f"--scheduler={cluster.scheduler_address}", f"--output={out}"]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        deadline = time.time() + 60
        while len(list(out.glob("*.part"))) < 4:
            assert process.poll() is None and time.time() < deadline
            time.sleep(0.01)
        os.kill(cluster.workers[0].pid, signal.SIGKILL)
        printed = process.communicate(timeout=60)[0]
    assert process.returncode == 0, printed
    prepare(f"{tmp_path}/in*.jsonl", spec, str(tmp_path / "one"), workers=1)
    assert files_of(out) == files_of(tmp_path / "one")


def test_a_worker_that_does_not_see_the_folder_says_so(corpus, data_path, tmp_path):
    """In a working folder on another machine, or with a plan that is not the one of this run."""
    task = input_file.Task(0, str(tmp_path), "0" * 64, 1, "stop", 0)
    with pytest.raises(UserError, match=r"expected the plan of this run, which all workers see, found none"):
        input_file.tokenize_file(task, print)
    prepare(corpus, f"sentencepiece:{data_path}/tokenizer.model", str(tmp_path / "out"), workers=1)
    with pytest.raises(UserError, match=r"expected the plan of this run, .* found the plan of another run"):
        input_file.tokenize_file(task._replace(output=str(tmp_path / "out")), print)


CUT_OFF = gzip.compress(b'{"text": "abc"}\n' * 100, mtime=0)[
    :-20
]  # the content is part of the test's name, so it must not change


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("a.json.gz", CUT_OFF, "a.json.gz: the compressed file is cut off"),
        ("a.json.gz", b"\x1f\x8b plain text", "a.json.gz: damaged compressed data"),
        ("a.jsonl", b'{"text": "a"}\n{"text": \n', "a.jsonl: line 2: invalid JSON"),
        ("a.jsonl", b'{"text": "a"}\n\n{"txt": "b"}\n', "a.jsonl: line 3: expected text under 'text', found none"),
        (
            "a.jsonl",
            b'{"text": "a"}\n{"text": "\xff"}\n',
            "a.jsonl: line 2: expected UTF-8, found byte 0xff at offset 10",
        ),
        ("a.jsonl", b'{"text": "\\ud800"}\n', "a.jsonl: line 1: expected Unicode text, found half a surrogate"),
        ("a.txt", b"abc\xff", "a.txt: expected UTF-8, found byte 0xff at offset 3"),
        ("a.jsonl", b"\n\n", "expected documents to train on, found none"),
        ("a.json", b' [\n{"text": "a"}]', "a.json: expected one JSON object a line, found a JSON array"),
        ("a.parquet", b"PAR1 not really", "a.parquet: damaged parquet"),
        ("a.csv", b"text", "a.csv: expected a name ending in .json"),
    ],
)
def test_bad_input_is_named_and_leaves_no_shard(name, content, message, data_path, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError) as error:
        prepare(str(tmp_path / name), f"sentencepiece:{data_path}/tokenizer.model", str(tmp_path / "out"))
    assert message in str(error.value)
    assert os.listdir(tmp_path) == [name]


@pytest.mark.parametrize(
    "spec, message",
    [
        ("sentencepiece:{corpus}", "expected a sentencepiece model, found a file it refuses"),
        ("llama3:/none/tokenizer.model", "No such file or directory"),
        ("bpe:{corpus}", "expected one of sentencepiece, llama3, hf"),
        ("sentencepiece:train:200000", "this text allows at most"),
        ("sentencepiece:train:4²", r"tokenizer: expected a vocabulary size at the end of .*, found '4²'"),
    ],
)
def test_a_bad_tokenizer_is_refused_and_leaves_nothing(corpus, tmp_path, spec, message):
    with pytest.raises(UserError, match=message):
        prepare(corpus, spec.format(corpus=corpus), str(tmp_path / "out"))
    assert os.listdir(tmp_path) == []


def test_bad_records_are_skipped_and_counted(corpus, data_path, tmp_path):
    """Stopping is the default and names the option. Files without documents count as zero documents."""
    bad = [b'{"text": null}', b'{"content": "x"}', b'{"text": "half \\ud83d"}', b"{", b"[]"]
    lines = open(corpus, "rb").read().splitlines()
    (tmp_path / "a.jsonl").write_bytes(b"\n".join(lines[:40]))
    (tmp_path / "b.jsonl").write_bytes(b"\n".join(lines[40:] + bad))
    (tmp_path / "c.jsonl").write_bytes(b"")
    (tmp_path / "d.jsonl.gz").write_bytes(gzip.compress(b""))
    run = functools.partial(
        prepare,
        f"{tmp_path}/*.jsonl*",
        f"sentencepiece:{data_path}/tokenizer.model",
        f"{tmp_path}/out",
        validation_fraction=0.05,
        workers=1,
    )
    with pytest.raises(UserError, match=r"b.jsonl: line 41: expected text .* found null \(on_bad_record=skip leaves"):
        run()
    record = run(on_bad_record="skip")
    assert record.skipped_records == {
        "no text": 2,
        "half a surrogate pair": 1,
        "invalid JSON": 1,
        "not an object": 1,
    }
    assert record.splits.train.documents + record.splits.validation.documents == len(lines)
    assert json.load(open(f"{tmp_path}/out/dataset.json"))["skipped_records"] == record.skipped_records
    with pytest.raises(UserError, match="expected no skipped records, found 5"):
        run()


def test_special_tokens_in_documents_stay_text_unless_parsed(tmp_path):
    """dataset.json says which; a run that goes on with the other rule is refused."""
    write_tokenizer(tmp_path)
    (tmp_path / "a.jsonl").write_text('{"text": "A <s>B</s>"}\n' * 9)
    (tmp_path / "b.jsonl").write_text('{"text": "B"}\n')
    run = functools.partial(
        prepare,
        f"{tmp_path}/a.jsonl",
        f"hf:{tmp_path}/tokenizer.json",
        validation_pattern=f"{tmp_path}/b.jsonl",
        workers=1,
    )
    for rule, inside in (("text", 0), ("parse", 9)):
        run(output=f"{tmp_path}/{rule}", special_tokens_in_text=rule)
        dataset = Dataset(f"{tmp_path}/{rule}")
        ids = read_all(dataset)
        assert ((ids == 62).sum(), (ids == 63).sum()) == (9 + inside, 9 + inside)
        assert dataset.tokenizer().special_tokens_in_text == rule
    with pytest.raises(UserError, match="begun with another special_tokens_in_text"):
        run(output=f"{tmp_path}/parse")


def test_input_without_files_is_refused(data_path, tmp_path):
    with pytest.raises(UserError, match="expected at least one file, found none"):
        prepare(f"{tmp_path}/*.json.gz", f"sentencepiece:{data_path}/tokenizer.model", str(tmp_path / "out"))


def test_a_folder_that_cannot_be_written_is_refused(corpus, data_path):
    with pytest.raises(UserError, match="cannot be written"):
        prepare(corpus, f"sentencepiece:{data_path}/tokenizer.model", f"{corpus}/out")


def test_a_folder_begun_with_another_tokenizer_is_refused(corpus, data_path):
    with pytest.raises(UserError, match="was begun with another tokenizer"):
        prepare(corpus, f"sentencepiece:{data_path}/tokenizer.model", data_path, validation_fraction=0.05)


def test_a_tokenizer_of_the_user_is_not_overwritten(corpus, data_path, tmp_path):
    own = tmp_path / "tokenizer.model"
    own.write_bytes(open(f"{data_path}/tokenizer.model", "rb").read())
    with pytest.raises(UserError, match=r"holds a tokenizer.model that `prepare` did not write"):
        prepare(corpus, f"sentencepiece:{own}", str(tmp_path))
    assert own.exists()


def test_a_file_that_is_held_out_is_not_trained_on(corpus, data_path, tmp_path):
    lines = open(corpus).read().splitlines(keepends=True)
    (tmp_path / "a.jsonl").write_text("".join(lines[:40]))
    (tmp_path / "b.jsonl").write_text("".join(lines[40:]))
    both = f"{tmp_path}/*.jsonl,{tmp_path}/a.jsonl"
    spec = f"sentencepiece:{data_path}/tokenizer.model"
    prepare(both, spec, f"{tmp_path}/out", validation_pattern=f"{tmp_path}/b.jsonl")
    dataset = Dataset(f"{tmp_path}/out")
    assert (dataset.train.documents, dataset.validation.documents) == (40, 40)


def test_an_error_in_one_file_ends_all_workers(corpus, data_path, tmp_path):
    """The other worker sends more progress reports than a pipe holds, and the parent no longer reads them."""
    (tmp_path / "a.jsonl").write_text("broken\n")
    (tmp_path / "b.jsonl").write_bytes(open(corpus, "rb").read() * 10)
    command = [sys.executable, "-m", "memoryllm_jax.prepare", f"--input={tmp_path}/*.jsonl", "--workers=2"]
    command += [f"--tokenizer=sentencepiece:{data_path}/tokenizer.model", f"--output={tmp_path}/out"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert result.returncode == 1 and "a.jsonl: line 1: invalid JSON" in result.stderr
    assert "Traceback" not in result.stderr and not list(tmp_path.glob("out/*.part"))
