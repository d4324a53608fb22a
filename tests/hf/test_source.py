"""What import keeps of a Hugging Face directory: files of known names, which lie in it."""

import pytest

from memoryllm_jax.common.errors import UserError
from memoryllm_jax.hf import source


@pytest.mark.parametrize(
    "part, problem",
    [
        (
            {"files": {"../victim": "text"}},
            "expected files among generation_config.json, .* in files, found '../victim'",
        ),
        ({"files": {"/tmp/victim": "text"}}, "found '/tmp/victim'"),
        ({"files": {"modeling_memoryllm.py": "import os"}}, "found 'modeling_memoryllm.py'"),
        ({"of_these_weights": {"model.safetensors": ""}}, "in of_these_weights, found 'model.safetensors'"),
        ({"files": {"LICENSE": None}}, "expected str, found null"),
        ({"dtypes": ["int8"]}, "dtypes"),
        ([], "expected object, found array"),
    ],
)
def test_a_description_decides_neither_where_export_writes_nor_what_code(part, problem):
    with pytest.raises(UserError, match=f"^DIR: source: .*{problem}"):
        source.of(part, "DIR")


def test_a_model_without_a_source_has_an_empty_one():
    assert source.of({}, "DIR") == source.Source()


def test_files_are_kept_to_the_byte_and_links_out_of_the_folder_are_refused(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "out").mkdir()
    (tmp_path / "model/NOTICE").write_bytes(b"\xa9 somebody\r\n")
    source.write_texts(str(tmp_path / "out"), source.texts(str(tmp_path / "model"), ("NOTICE", "LICENSE")))
    assert [(path.name, path.read_bytes()) for path in (tmp_path / "out").iterdir()] == [
        ("NOTICE", b"\xa9 somebody\r\n")
    ]
    (tmp_path / "secret").write_text("not for export")
    (tmp_path / "model/LICENSE").symlink_to(tmp_path / "secret")
    with pytest.raises(
        UserError, match=r"LICENSE: expected a file in .*, found 'LICENSE', a symbolic link to .*secret"
    ):
        source.texts(str(tmp_path / "model"), ("NOTICE", "LICENSE"))
