"""Writes each test's outcome to a file as soon as it is known, so that a run that is cut short leaves a record.

The file is named by the environment variable DEVICE_TESTS_RECORD: JSON, {test: {"outcome", "seconds", "message", and
what the test recorded with `record_property`}}.
"""

import json
import os
import pathlib

OUTCOMES = {}


def pytest_runtest_logreport(report):
    path = os.environ.get("DEVICE_TESTS_RECORD")
    if not path or (report.when != "call" and report.passed):
        return
    OUTCOMES[report.nodeid.rpartition("::")[2]] = {
        "outcome": report.outcome,
        "seconds": report.duration,
        "message": str(report.longrepr)[-600:] if report.longrepr else "",
        **dict(report.user_properties),
    }
    part = pathlib.Path(f"{path}.part")
    part.write_text(json.dumps(OUTCOMES, indent=1))
    part.rename(path)
