"""What the runs of a comparison came to, in one file without models, by which another machine goes on with it.

    tar -xf runs.tar.xz -C DIR

makes these runs done in the workdir DIR.
"""

import glob
import io
import os
import tarfile

from memoryllm_jax.common import storage
from memoryllm_jax.experiments import outcomes, scoring

FILE = "runs.tar.xz"
# metrics.jsonl has the FLOPs of a token.
_ENDED = {outcomes.RESULT, outcomes.DIVERGED, scoring.FILE}  # a run that has none of them is still trained
_KEPT = (outcomes.DESCRIPTION, outcomes.RESULT, outcomes.DIVERGED, "metrics.jsonl", scoring.FILE, scoring.PERMUTED_FILE)


def pack(workdir: str) -> None:
    """Packs descriptions, metrics, results and scores of the runs that have ended into WORKDIR/runs.tar.xz.

    The same runs give the same bytes.
    """
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:xz") as archive:
        for folder in sorted(glob.glob("runs/*", root_dir=workdir)):
            found = [name for name in _KEPT if storage.exists(os.path.join(workdir, folder, name))]
            if _ENDED.isdisjoint(found):
                continue
            for name in found:
                content = storage.read_bytes(os.path.join(workdir, folder, name), "a file of a run")
                member = tarfile.TarInfo(f"{folder}/{name}")
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
    storage.write_bytes(os.path.join(workdir, FILE), buffer.getvalue())
