"""Descriptions of checkpoints: damage and wrong types are named, and so are the fields in which two runs differ."""

import json
import subprocess
import sys

import msgspec
import pytest
from lab import DESCRIPTION

from memoryllm_jax.checkpoint import description
from memoryllm_jax.common.errors import ArgumentError, UserError
from memoryllm_jax.data.dataset import Dataset


@pytest.fixture
def written(make_config, data_path, tmp_path):
    """write(change): writes the description of a run as step 1 of a folder, and returns the folder.

    Args:
      change: changes the tree before it is written.
    """

    def write(change=lambda tree: None, checked=False):
        dataset = Dataset(data_path)
        tree = description.to_json(description.describe(make_config("memory"), dataset.digest, dataset.tokenizer()))
        if not checked:
            del tree["checksum"]
        change(tree)
        (tmp_path / "1/description").mkdir(parents=True, exist_ok=True)
        (tmp_path / "1/description/metadata").write_text(json.dumps(tree))
        return str(tmp_path)

    return write


def test_a_description_is_read_as_it_was_written(written, make_config):
    found = description.read(written(checked=True), 1)
    assert found.run() == make_config("memory") and found.open_tokenizer().vocab_size == 512
    assert description.config_of(written()) == make_config("memory")


def test_texts_that_are_not_utf8_are_kept(written):
    """An old licence, whose bytes import keeps as surrogates."""
    files = {"LICENSE": b"\xa9 caf\xe9".decode(errors="surrogateescape")}
    folder = written(lambda tree: tree["source"].update(files=files), checked=False)
    assert description.read(folder, 1).source["files"] == files
    with pytest.raises(UserError, match=r"metadata: data.digest: expected str, found int$"):
        description.read(written(lambda tree: tree.update(source=files, data={"digest": 3})), 1)


def test_damage_is_found_by_the_checksum(written):
    def change(tree):
        tree["config"]["model"]["rope_theta"] = 18_000.0

    with pytest.raises(UserError, match=r"1/description/metadata: is damaged: expected the checksum [0-9a-f]{64}"):
        description.read(written(change, checked=True), 1)
    assert description.read(written(change), 1).run().model.rope_theta == 18_000  # version 0.1.0 wrote no checksum


def set_field(*path, value):
    def change(tree):
        *parents, last = path
        for name in parents:
            tree = tree[name]
        tree[last] = value

    return change


@pytest.mark.parametrize(
    "change, message",
    [
        (
            set_field("config", "model", "layers", value=5_000_000),
            "config.model.layers: expected .* at most 10,000, found",
        ),
        (set_field("config", "model", "layers", value="4"), "config.model.layers: expected int, found '4'"),
        (set_field("config", "model", value=[]), r"config.model: expected a group of fields, found \[\]"),
        (set_field("config", value=None), "config: expected object, found null"),
        (
            set_field("config", "model", "dim", value=10**4000),
            r"config.model.dim: expected a number of at most 64 bits, found 10+\.\.\.$",
        ),
        (set_field("data", "digest", value=3), "data.digest: expected str, found int"),
        (set_field("tokenizer", "content", value="AAAA"), "tokenizer: expected a tokenizer of SHA-256 .*, found"),
        (set_field("tokenizer", "special", value=[2.5, []]), r"tokenizer.special.*: expected int.*, found float"),
        (set_field("source", value=[1]), "source: expected object, found array"),
        (set_field("data", value=json.loads("[" * 900 + "]" * 900)), "data: expected object, found array|too deeply"),
    ],
)
def test_wrong_types_and_sizes_are_one_sentence(written, change, message):
    with pytest.raises(UserError, match=message) as error:
        description.read(written(change), 1)
    text = str(error.value)
    assert "1/description/metadata: " in text and "\n" not in text and len(text) < 400


def test_a_checkpoint_of_another_run_is_refused_with_its_fields(written):
    saved = description.read(written(), 1)
    described = description.read(written(set_field("config", "mesh", "fsdp", value=2)), 1)
    description.check_matches(saved, described, "w/1")  # config.RESUMABLE_FIELDS may differ
    described.config["seed"] = 3
    other = msgspec.structs.replace(described, data=DESCRIPTION.data)
    with pytest.raises(UserError) as error:
        description.check_matches(saved, other, "w/1")
    assert str(error.value) == (
        "w/1 is of another run: seed: 0 in the checkpoint, 3 in this run; "
        f"data: {saved.data.digest!r} in the checkpoint, '0' in this run; use another workdir or the same settings"
    )


def test_workdirs_that_orbax_cannot_write_to_are_refused():
    with pytest.raises(ArgumentError, match=r"^workdir: expected a folder on a disk or gs://BUCKET/FOLDER, found s3"):
        description.folder("s3://b/w")
    with pytest.raises(ArgumentError, match=r"^workdir: expected a path without \* \? \[ \], as Orbax takes them"):
        description.folder("runs/lr[1e-3]")
    assert description.folder("gs://b/w/") == "gs://b/w"


def test_a_config_that_starts_from_a_model_reads_it_without_jax(written):
    """`train` parses its flags first, and neither waits for JAX nor prints Orbax's log."""
    program = (
        "import runpy, sys; c = runpy.run_path('configs/start.py')['get_config'](sys.argv[1]); "
        "print(c.model.dim, {'jax', 'orbax'} & set(sys.modules))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, f"memory@{written()}"], capture_output=True, text=True, timeout=100
    )
    assert (done.stdout, done.stderr) == ("32 set()\n", "")
