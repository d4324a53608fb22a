"""The records of a run that resumes."""

import itertools
import json
import struct
import types

from lab import DESCRIPTION
from tensorboardX import event_file_writer
from tensorboardX.proto.event_pb2 import Event, SessionLog

from memoryllm_jax.training.metrics import Writer


def shown_by_tensorboard(folder) -> list[tuple[str, int, float | str]]:
    """(tag, step, value) of the scalars and texts in a folder. A session drops what is there from its first step on."""
    shown = []
    for path in sorted(folder.iterdir()):
        content = path.read_bytes()
        while content:  # records: length of the event, its checksum, the event, its checksum
            (length,) = struct.unpack("<Q", content[:8])
            event = Event.FromString(content[12 : 12 + length])
            content = content[16 + length :]
            if event.HasField("session_log") and event.session_log.status == SessionLog.START:
                shown = [entry for entry in shown if entry[1] < event.step]
            for value in event.summary.value:
                texts = value.tensor.string_val
                shown.append((value.tag, event.step, texts[0].decode() if texts else value.simple_value))
    return shown


def test_tensorboard_shows_the_numbers_of_nested_values(make_config, tmp_path):
    writer = Writer(make_config("memory", **{"log.tensorboard": True}), DESCRIPTION, str(tmp_path), 0, enabled=True)
    writer.write(1, "norms", {"added": {"ffn": [1.0, 2.0]}, "share": 0.5})
    writer.close()
    expected = [("norms/added/ffn/00", 1, 1.0), ("norms/added/ffn/01", 1, 2.0), ("norms/share", 1, 0.5)]
    assert shown_by_tensorboard(tmp_path / "tensorboard") == expected


def test_a_resumed_run_records_each_step_once(make_config, tmp_path, monkeypatch):
    seconds = itertools.count(1_000_000_000)  # TensorBoard names its files after the time in seconds
    monkeypatch.setattr(event_file_writer, "time", types.SimpleNamespace(time=lambda: next(seconds)))
    config = make_config("memory", **{"log.tensorboard": True})

    def write(start, values):
        writer = Writer(config, DESCRIPTION, str(tmp_path), start, enabled=True)
        for step, kind, value in values:
            writer.write(step, kind, {"text" if kind == "sample" else "loss": value})
        writer.close()

    # The first run is killed after step 3. Its newest checkpoint is that of step 2, whose validation is made again.
    of_two = [(2, "train", 3.0), (2, "validation", 3.5), (2, "tasks", 0.5), (2, "sample", "def\n f")]
    write(0, [(1, "train", 4.0), *of_two, (3, "train", 2.0)])
    write(2, [(2, "validation", 3.5), (3, "train", 2.0)])
    expected = [("train", 1, 4.0), *((kind, step, value) for step, kind, value in of_two), ("train", 3, 2.0)]
    expected.insert(4, expected.pop(2))
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [(line["kind"], line["step"], line.get("loss", line.get("text"))) for line in lines] == expected
    expected[3] = ("sample/text_summary", 2, "    def\n     f")
    shown = [(tag.removesuffix("/loss"), *more) for tag, *more in shown_by_tensorboard(tmp_path / "tensorboard")]
    assert shown == expected
