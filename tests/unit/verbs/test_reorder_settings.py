"""Settings that ``reorder`` refuses before it reads weights or text: there are none here."""

from __future__ import annotations

from pathlib import Path

import pytest

from megamask.config import load_config
from megamask.errors import ConfigError, MegamaskError
from megamask.verbs import reorder
from megamask.verbs.own_arguments import ReorderArguments

TINY = Path(__file__).parents[3] / "configs" / "models" / "tiny-llama.json"


def refused(tmp_path: Path, *overrides: str) -> MegamaskError:
    (tmp_path / "config.json").write_text(TINY.read_text())
    places = [f"run_dir={tmp_path / 'run'}", f"model.hf={tmp_path}", "device=cpu"]
    with pytest.raises(MegamaskError) as caught:
        reorder.run(
            load_config(None, [*places, *overrides]), ReorderArguments(out=str(tmp_path / "out"))
        )
    return caught.value


def test_the_folder_of_the_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    error = refused(tmp_path, f"model.megatron={tmp_path / 'out'}")
    assert isinstance(error, ConfigError) and error.key == "OUT"
    assert error.allowed == "a folder other than model.megatron"
    assert refused(tmp_path, f"model.megatron={tmp_path / 'else'}").args != error.args


@pytest.mark.parametrize(
    ("linears", "width"),
    [("*o_proj", "head_dim = 8"), ("*down_proj", "intermediate_size = 128")],
)
def test_no_channels_that_could_move(linears: str, width: str, tmp_path: Path) -> None:
    """16 divides the stream (64) and the feed-forward part (128), no head (8); 6 divides none."""
    pattern = "8:16" if "head" in width else "2:6"
    error = refused(tmp_path, f"pattern={pattern}", f"model.include=['{linears}']")
    assert isinstance(error, ConfigError) and error.key == "pattern"
    assert error.allowed.endswith(f"read: {width}")
    other = refused(tmp_path, "pattern=8:16", "model.include=['*down_proj']")
    assert not isinstance(other, ConfigError) or other.key != "pattern"
