"""The command `export`: what its options do. tests/hf has the files and weights that it writes."""

import os
import subprocess
import sys

import pytest
from lab import GOLDEN
from safetensors.numpy import load_file

from memoryllm_jax import export
from memoryllm_jax.checkpoint.trained import TrainedModel
from memoryllm_jax.common.errors import ArgumentError, UserError


def test_import_from_the_command_line(tmp_path):
    workdir = str(tmp_path / "work")
    line = [sys.executable, "-m", "memoryllm_jax.export", f"--import={GOLDEN}/base", f"--workdir={workdir}"]
    done = subprocess.run(line, capture_output=True, text=True, timeout=120, env=os.environ)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"{workdir}: base, ")
    assert TrainedModel(workdir).config.architecture == "base"


def test_shard_size_is_the_largest_size_of_a_file(tmp_path, capsys):
    workdir, output = str(tmp_path / "work"), str(tmp_path / "out")
    export.main(workdir, import_=f"{GOLDEN}/base")
    export.main(workdir, output, shard_size="8KiB")
    assert f"{output}: " in capsys.readouterr().out
    sizes = []
    for file in (tmp_path / "out").glob("*.safetensors"):
        sizes.append(sum(tensor.nbytes for tensor in load_file(file).values()))
    assert len(sizes) > 1 and max(sizes) == 8192


@pytest.mark.parametrize("chosen, found", [({"output": "o", "import_": "i"}, "both"), ({}, "neither")])
def test_either_import_or_output(tmp_path, chosen, found):
    with pytest.raises(
        UserError, match=f"expected --output=HF_DIR to write, or --import=HF_DIR to read, found {found}"
    ):
        export.main(str(tmp_path / "work"), **chosen)


def test_a_shard_size_that_is_no_size_writes_nothing(tmp_path):
    with pytest.raises(ArgumentError, match=r"shard_size: expected a size above zero such as .*, found '5 parsecs'"):
        export.main(str(tmp_path / "work"), str(tmp_path / "out"), shard_size="5 parsecs")
    assert os.listdir(tmp_path) == []
