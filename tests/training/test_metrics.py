"""The records of a run that resumes."""

import itertools
import json
import struct
import time

from lab import DESCRIPTION
from tensorboardX.proto.event_pb2 import Event, SessionLog

from memoryllm_jax.training.metrics import Writer


def shown_by_tensorboard(folder) -> list[tuple[str, int, float]]:
    """(tag, step, value) of the scalars in a folder. A session drops what is there from its first step on."""
    shown = []
    for path in sorted(folder.iterdir()):
        content = path.read_bytes()
        while content:  # records: length of the event, its checksum, the event, its checksum
            (length,) = struct.unpack("<Q", content[:8])
            event = Event.FromString(content[12 : 12 + length])
            content = content[16 + length :]
            if event.HasField("session_log") and event.session_log.status == SessionLog.START:
                shown = [entry for entry in shown if entry[1] < event.step]
            shown += [(value.tag, event.step, value.simple_value) for value in event.summary.value]
    return shown


def test_a_resumed_run_records_each_step_once(make_config, tmp_path, monkeypatch):
    seconds = itertools.count(1_000_000_000)  # TensorBoard names its files after the time in seconds
    monkeypatch.setattr(time, "time", lambda: next(seconds))
    config = make_config("memory", **{"log.tensorboard": True})

    def write(start, values):
        writer = Writer(config, DESCRIPTION, str(tmp_path), start, enabled=True)
        for step, kind, loss in values:
            writer.write(step, kind, {"loss": loss})
        writer.close()

    # The first run is killed after step 3. Its newest checkpoint is that of step 2.
    write(0, [(1, "train", 4.0), (2, "train", 3.0), (2, "validation", 3.5), (3, "train", 2.0)])
    write(2, [(2, "validation", 3.5), (3, "train", 2.0)])
    expected = [("train", 1, 4.0), ("train", 2, 3.0), ("validation", 2, 3.5), ("train", 3, 2.0)]
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [(line["kind"], line["step"], line["loss"]) for line in lines] == expected
    assert shown_by_tensorboard(tmp_path / "tensorboard") == [(f"{kind}/loss", *more) for kind, *more in expected]
