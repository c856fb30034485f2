"""What lies beside a model and is not pushed with it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megamask.publish.upload_folder import _leave_out, uploaded_files

MODEL = {
    *("model.safetensors", "model.safetensors.index.json", "config.json", "tokenizer.json"),
    *("generation_config.json", "tokenizer_config.json", "vocab.txt", "merges.txt", "LICENSE"),
    *("modeling_x.py", "README.md", "tokenizer.model", "chat_template.jinja"),
    *("additional_chat_templates/tool.jinja", "megamask_export.json", "preprocessor_config.json"),
}
OTHERS = {"trainer_state.json", "train.jsonl", "run.log", "notes.txt", "license_key.jpg"}


def test_what_is_no_part_of_a_model(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    known = {"_name_or_path": "/home/alice/secret/llama", "vocab_size": 7, "x": "/not/a/name"}
    for name in MODEL | OTHERS:
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(known) if "config" in name else name)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"name_or_path": "owner/model"}))
    _leave_out(tmp_path)
    left = {path.relative_to(tmp_path).as_posix() for path in uploaded_files(tmp_path)}
    assert left == MODEL
    assert all(name in caplog.text for name in OTHERS)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config == {**known, "_name_or_path": "llama"}
    tokenizer = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert tokenizer == {"name_or_path": "owner/model"}  # a name of the Hub is no place
