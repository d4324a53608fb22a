"""The commit of a checkout, and the versions of packages."""

import subprocess

import jax
import numpy as np
import pytest

from memoryllm_jax.common import provenance


@pytest.fixture
def commit(monkeypatch, tmp_path):
    """`provenance.commit` of a package in tmp_path, without what it remembers."""
    monkeypatch.delenv("GIT_COMMIT", raising=False)
    monkeypatch.setattr(provenance, "_ROOT", str(tmp_path))
    return provenance.commit.__wrapped__


def test_a_commit_is_dirty_if_a_file_differs(commit, tmp_path, monkeypatch):
    def git(*arguments):
        identity = ["-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false"]
        return subprocess.check_output(["git", "-C", tmp_path, *identity, *arguments], text=True).strip()

    assert commit() == ""  # not a checkout
    git("init", "--quiet")
    assert commit() == ""  # nothing is committed
    (tmp_path / "file").write_text("a")
    git("add", "file")
    git("commit", "--quiet", "--message=a")
    git("tag", "v1", "--message=a")
    clean = commit()
    assert len(clean) >= 7 and git("rev-parse", "HEAD").startswith(clean)  # and not the tag
    (tmp_path / "file").write_text("b")
    assert commit() == f"{clean}-dirty"
    monkeypatch.setenv("GIT_COMMIT", "abc")
    assert commit() == "abc"


def test_versions_are_those_of_the_packages_that_are_imported():
    found = provenance.versions()
    assert (found["jax"], found["numpy"]) == (jax.__version__, np.__version__) and "memoryllm_jax" in found
