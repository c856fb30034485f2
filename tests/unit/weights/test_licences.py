"""Which files are licences, of a folder of a model and beside a file of weights; tokenizers."""

from __future__ import annotations

from pathlib import Path

import pytest

from megamask.weights.licences import copy_licences, is_licence
from megamask.weights.side_files import add_tokenizer

LICENCES = ["LICENSE", "LICENCE.md", "license.txt", "NOTICE", "COPYING", "USE_POLICY.md"]
OF_A_MODEL = ["MODEL_LICENSE", "LICENSE-2.0", "Terms.html", "gemma-terms-of-use.txt", "EULA.pdf"]
NONE = ["drivers-license.jpg", "licenses.csv", "notice.docx", "license.json", "README.md"]
PRIVATE = ["license_key.txt", "eviction_notice.pdf", "my-terms.md"]


@pytest.mark.parametrize("name", [*LICENCES, *OF_A_MODEL, *NONE])
def test_names(name: str) -> None:
    assert is_licence(name) == (name not in NONE)
    assert is_licence(name, only_whole=True) == (name in LICENCES)


def test_what_is_copied(tmp_path: Path) -> None:
    secret, folder = tmp_path / "secret", tmp_path / "downloads"
    folder.mkdir()
    secret.write_text("private")
    for name in (*LICENCES[1:], *NONE, *PRIVATE):
        (folder / name).write_text(name)
    (folder / "LICENSE").symlink_to(secret)  # its content is somewhere else
    (folder / "COPYING.txt").symlink_to(folder / "COPYING")
    for place in ("gguf", "model"):
        (tmp_path / place).mkdir()
    expected = sorted([*LICENCES[1:], "COPYING.txt"])
    assert copy_licences(folder, tmp_path / "gguf", is_of_model=False) == expected
    assert sorted(path.name for path in (tmp_path / "gguf").iterdir()) == expected
    assert not {*copy_licences(folder, tmp_path / "model")} & {"LICENSE", *NONE}
    assert copy_licences(tmp_path / "none", tmp_path / "model") == []


def test_a_tokenizer_is_added_where_there_is_none(tmp_path: Path) -> None:
    theirs, one_file = tmp_path / "theirs", tmp_path / "spm.model"
    folders = [tmp_path / name for name in ("empty", "has", "single", "none")]
    for folder in (theirs, *folders):
        folder.mkdir()
    for name in ("tokenizer.json", "special_tokens_map.json", "model.safetensors", "config.json"):
        (theirs / name).write_text("theirs")
    (folders[1] / "tokenizer.json").write_text("own")
    one_file.write_text("spm")
    assert add_tokenizer(folders[0], theirs) and add_tokenizer(folders[1], theirs)
    assert {path.name for path in folders[0].iterdir()} == {
        "tokenizer.json",
        "special_tokens_map.json",
    }
    assert [path.read_text() for path in folders[1].iterdir()] == ["own"]
    assert add_tokenizer(folders[2], one_file) and (folders[2] / "tokenizer.model").exists()
    assert not add_tokenizer(folders[3], None) and not add_tokenizer(folders[3], tmp_path / "gone")
