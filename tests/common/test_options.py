"""Options stated once in a signature, and the commands that are made of them."""

import dataclasses
import subprocess
import sys
from typing import Annotated

import pytest

from memoryllm_jax.common import options
from memoryllm_jax.common.errors import ArgumentError, UserError, require
from memoryllm_jax.common.options import Option

COMMAND = '''
"""Says what it was given."""
import dataclasses
from typing import Annotated
from memoryllm_jax.common import cli
from memoryllm_jax.common.errors import ArgumentError
from memoryllm_jax.common.options import Option

@dataclasses.dataclass(frozen=True)
class Inner:
    rate: Annotated[float, Option("a rate", least=0)] = 0.5
    share: Annotated[float, Option("a share")] = 0.5
    record: Annotated[str, Option("a file", writes=True)] = ""
    names: Annotated[tuple[str, ...], Option("some names")] = ("a",)
    widths: Annotated[tuple[int, ...] | None, Option("some widths", least=1)] = None

def main(
    inner: Inner,
    path: Annotated[str, Option("a path")],
    step: Annotated[int | None, Option("a step")] = None,
    if_: Annotated[bool, Option("a word of Python")] = False,
):
    if path == "bad":
        raise ArgumentError("path", "expected a good one, found bad")
    if path == "worse":
        raise ArgumentError("other", "expected what no flag says")
    print(inner, path, step, if_)

if __name__ == "__main__":
    cli.run(main)
'''


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    script = tmp_path_factory.mktemp("command") / "say.py"
    script.write_text(COMMAND)

    def run(*arguments):
        return subprocess.run([sys.executable, str(script), *arguments], capture_output=True, text=True)

    return run


def test_a_signature_makes_a_command(run):
    said = run("--path=p", "--names=b,c", "--widths=2,3", "--step=3", "--if")
    found = "Inner(rate=0.5, share=0.5, record='', names=('b', 'c'), widths=(2, 3))"
    assert said.stdout == f"{found} p 3 True\n" and said.returncode == 0
    helped = run("--help")
    assert helped.returncode == 0
    for text in ("Says what it was given.", "--path: a path", "--rate: a rate", "default: '0.5'"):
        assert text in helped.stdout


@pytest.mark.parametrize(
    "arguments, error",
    [
        ([], "error: --path: is missing (a path)"),
        (["--path=bad"], "error: --path: expected a good one, found bad"),
        (["--path=worse"], "error: other: expected what no flag says"),
        (["--path=p", "--rate=nan"], "error: --rate: expected a finite number, found nan"),
        (["--path=p", "--share=-inf"], "error: --share: expected a finite number, found -inf"),
        (["--path=p", "--record=/none/x"], "error: --record: expected a file in a folder that exists, found /none/x"),
        (["--path=p", "--record=/tmp"], "error: --record: expected a name for a file, found the folder /tmp"),
        (["--path=p", "--record=/dev/zero"], "error: --record: expected a file, found the device /dev/zero"),
        (["--path=p", "--widths=2,x"], "error: --widths: expected whole numbers separated by commas, found 2,x"),
        (["--path=p", "more"], "error: unexpected argument 'more'; options are written --name=value"),
    ],
)
def test_command_line_errors_are_one_sentence_with_the_flag(run, arguments, error):
    said = run(*arguments)
    assert (said.stderr, said.returncode) == (f"{error}\n", 1)


@dataclasses.dataclass(frozen=True)
class _Drawn:
    kind: Annotated[str, Option("what to draw", choices=("line", "bar"))] = "line"
    widths: Annotated[tuple[float, ...], Option("widths of lines", least=1)] = (4.0,)

    def __post_init__(self):
        options.check(self)


def test_the_library_names_the_argument_without_dashes():
    with pytest.raises(ArgumentError, match=r"^kind: expected one of line, bar, found 'pie'"):
        _Drawn("pie")
    with pytest.raises(ArgumentError, match=r"^widths: expected at least 1, found 0.5"):
        _Drawn(widths=(2.0, 0.5))
    with pytest.raises(ArgumentError, match=r"^cache: expected a size above zero such as 12KiB or 1.5GB, found '0MB'"):
        options.size("0MB", "cache")
    with pytest.raises(ArgumentError, match=r"^drop: expected layers from 0 to 3, such as 0,3, found '4'"):
        options.layers(["0", "4"], "drop", 4)
    assert (options.size("1.5KiB", "cache"), options.layers(["2", "0", "2"], "drop", 4)) == (1536, (0, 2))


def test_a_missing_extra_is_named():
    with pytest.raises(UserError, match=r"^pictures: needs no_such_package: pip install 'memoryllm_jax\[analyze\]'"):
        require("no_such_package.part", "analyze", "pictures")
