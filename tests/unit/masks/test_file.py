"""Mask files: round trip, and one clear error for everything that can be wrong with one."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.numpy import load_file, save, save_file

import megamask
from megamask.errors import ArgumentError, ArtifactError
from megamask.masks.codec import pack
from megamask.masks.file import load_masks, save_masks
from megamask.masks.header import header_digest
from megamask.masks.times import seconds_of
from megamask.masks.verify import summary
from megamask.sparsity.pattern import Pattern
from megamask.sparsity.pattern_plan import PatternPlan

P24, P48 = Pattern(2, 4), Pattern(4, 8, 2)
Change = Callable[[dict[str, Any]], object]
SHAPES = {"model.layers.0.mlp.up_proj": (6, 16), "model.layers.0.mlp.down_proj": (3, 32)}


def random_masks(
    pattern: Pattern, seed: int = 0, shapes: dict[str, tuple[int, int]] = SHAPES
) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        name: pattern.best(torch.rand(shape, generator=generator)) for name, shape in shapes.items()
    }


@pytest.mark.parametrize(
    "pattern", [P24, Pattern(4, 8), Pattern(3, 7), Pattern(16, 32), P48], ids=str
)
def test_the_bytes_are_those_of_safetensors(pattern: Pattern, tmp_path: Path) -> None:
    """The file is written tensor by tensor, in another order than its own."""
    names = ["b.é", "a.x", 'c."quoted"\\']
    shapes = [(3, 5 * pattern.m), (24, 2 * pattern.m), (1, pattern.m)]
    masks = random_masks(pattern, shapes=dict(zip(names, shapes, strict=True)))
    path, data = tmp_path / "m.safetensors", {"text": 'a "b" \\ \n \x7f é', "numbers": [1, 2.5]}
    save_masks(path, masks, pattern, fingerprint="f", method="m", data=data)
    packed = {
        name: pack(pattern.index_of(mask).numpy(), pattern.num_candidates)
        for name, mask in masks.items()
    }
    with safe_open(path, framework="numpy") as handle:
        assert path.read_bytes() == save(packed, metadata=handle.metadata())
    assert all(torch.equal(load_masks(path)[name], mask) for name, mask in masks.items())
    assert load_masks(path).meta["data"] == data and load_masks(path).pattern == pattern
    # readers of before the patterns of pairs refuse them by the version
    assert load_masks(path).meta["format_version"] == (2 if pattern == P48 else 1)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    save_masks(
        tmp_path / "m.safetensors",
        random_masks(P24),
        P24,
        fingerprint="f" * 64,
        method="magnitude",
        data={"seed": 1},
    )
    return tmp_path / "m.safetensors"


def rewrite(
    path: Path, header: Change | None = None, tensors: Change | None = None, sign: bool = True
) -> None:
    with safe_open(path, framework="numpy") as handle:
        meta = json.loads(handle.metadata()["megamask"])
    data = load_file(path)
    (header or (lambda _: None))(meta)
    (tensors or (lambda _: None))(data)
    meta["sha256"] = header_digest(meta) if sign else meta["sha256"]
    save_file(data, path, metadata={"megamask": json.dumps(meta)})


@pytest.mark.parametrize(
    "pattern",
    [
        Pattern(1, 2),
        P24,
        Pattern(1, 4),
        Pattern(3, 4),
        Pattern(4, 8),
        Pattern(1, 16),
        Pattern(2, 16),
        Pattern(8, 16),
    ],
    ids=str,
)
def test_round_trip(tmp_path: Path, pattern: Pattern) -> None:
    masks = random_masks(pattern)
    save_masks(
        tmp_path / "sub" / "m.safetensors",
        masks,
        pattern,
        fingerprint="ab",
        method="wanda",
        data=[1],
        evaluation={"ppl": 2.5},
    )
    back = load_masks(tmp_path / "sub" / "m.safetensors")
    assert set(back) == set(masks) and len(back) == 2 and back.pattern == pattern
    assert (back.fingerprint, back.method, back.meta["data"], back.meta["evaluation"]) == (
        "ab",
        "wanda",
        [1],
        {"ppl": 2.5},
    )
    for name, mask in masks.items():
        assert (
            back[name].dtype == torch.bool
            and torch.equal(back[name], mask)
            and back.shape(name) == tuple(mask.shape)
        )
        assert torch.equal(back.index(name), pattern.index_of(mask))
    back.verify()


def test_the_public_names_are_lazy(path: Path) -> None:
    import subprocess
    import sys

    code = (
        "import sys, megamask; "
        "assert 'torch' not in sys.modules and megamask.__version__; "
        "megamask.load_masks"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
    assert megamask.verify(path).method == "magnitude"
    assert set(megamask.__all__) <= set(dir(megamask)) and megamask.save_masks is save_masks
    with pytest.raises(AttributeError, match="nothing_such"):
        megamask.nothing_such  # noqa: B018


def test_masks_that_break_the_pattern_are_not_saved(tmp_path: Path) -> None:
    masks = random_masks(P24)
    masks["model.layers.0.mlp.up_proj"][0, :4] = True
    with pytest.raises(ValueError, match="2:4"):
        save_masks(tmp_path / "m.safetensors", masks, P24, fingerprint="", method="x")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("cut", [4, 100, -8, -1])
def test_truncated_files_are_torn(path: Path, cut: int) -> None:
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(ArtifactError, match="is torn|of no known format"):
        load_masks(path)


def test_missing_or_other_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="is missing"):
        load_masks(tmp_path / "none.safetensors")
    save_file({"a": np.zeros(3)}, tmp_path / "weights.safetensors")
    with pytest.raises(ArtifactError, match="not a mask file"):
        load_masks(tmp_path / "weights.safetensors")
    (tmp_path / "folder").mkdir()
    with pytest.raises(ArtifactError, match="is not a mask file: it is a folder"):
        load_masks(tmp_path / "folder")


UP = "model.layers.0.mlp.up_proj"


@pytest.mark.parametrize(
    ("header", "message"),
    [
        (
            lambda meta: meta.update(format_version=5),
            "format version 5, this megamask reads 1 to 4",
        ),
        (lambda meta: meta.update(format_version=3), "has no coding"),
        (lambda meta: meta.update(format_version=4), "has no pattern"),
        (lambda meta: meta["tensors"][UP].update(pattern="2:4"), "a header of one pattern"),
        (lambda meta: meta["tensors"][UP].update(coding="uniform"), "a header without codings"),
        (lambda meta: meta.update(format_version=True), "format version True"),
        (lambda meta: meta.pop("format_version"), "broken header"),
        (lambda meta: meta.update(candidate_order="sorted"), "candidate_order 'sorted'"),
        (lambda meta: meta.update(axis="out_features"), "axis 'out_features'"),
        (lambda meta: meta.pop("fingerprint"), "has no fingerprint"),
        (lambda meta: meta.update(pattern="4:2"), "header that does not fit"),
        (lambda meta: meta.update(pattern="1:32"), "does not fit"),
        (lambda meta: meta["tensors"][UP].update(shape=[6]), "has the shape \\[6\\]"),
        (lambda meta: meta["tensors"][UP].update(shape=[60, 16]), f"{UP}: U64"),
        (lambda meta: meta["tensors"][UP].update(shape=[6, 15]), f"{UP}: U64"),
        (lambda meta: meta["tensors"][UP].pop("shape"), "has no tensors"),
        (lambda meta: meta["tensors"].pop(UP), UP),
    ],
)
def test_headers_that_do_not_fit_are_refused(path: Path, header: Change, message: str) -> None:
    rewrite(path, header)
    with pytest.raises(ArtifactError, match=message):
        load_masks(path)


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("key", ["coding", "mask_sha256"])
def test_what_only_coded_files_say_is_refused_elsewhere(path: Path, key: str, version: int) -> None:
    """The digest of the masks would come from a forged ``mask_sha256``, which nothing compares."""

    def forge(meta: dict[str, Any]) -> None:
        meta["format_version"] = version
        meta["tensors"][UP][key] = "0" * 64

    rewrite(path, forge)
    with pytest.raises(ArtifactError, match=f"has a {key} for .*, in a header without codings"):
        load_masks(path)


def test_a_changed_pattern_is_found_even_where_the_sizes_agree(path: Path) -> None:
    rewrite(path, lambda meta: meta.update(pattern="3:4"), sign=False)  # 1 word either way
    with pytest.raises(ArtifactError, match="corrupt header"):
        load_masks(path)


def test_extra_and_wrongly_typed_tensors_are_refused(path: Path) -> None:
    original = path.read_bytes()
    rewrite(path, tensors=lambda data: data.update(extra=np.zeros(1, dtype=np.uint64)))
    with pytest.raises(ArtifactError, match="extra"):
        load_masks(path)
    path.write_bytes(original)
    rewrite(path, tensors=lambda data: data.update({UP: data[UP].astype(np.int64)}))
    with pytest.raises(ArtifactError, match="I64"):
        load_masks(path)


def test_a_flipped_bit_is_found(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(bytes(data))
    masks = load_masks(path)
    with pytest.raises(ArtifactError, match="corrupt.*checksum"):
        masks.verify()


def test_digits_out_of_range_are_found_even_with_a_matching_checksum(path: Path) -> None:
    import hashlib

    broken = load_file(path)[UP]
    broken[-1] = np.uint64(2**64 - 1)
    digest = hashlib.sha256(broken.tobytes()).hexdigest()
    rewrite(
        path,
        lambda meta: meta["tensors"][UP].update(sha256=digest),
        lambda data: data.update({UP: broken}),
    )
    with pytest.raises(ArtifactError, match="digits out of range"):
        load_masks(path).verify()


def test_check_names_what_does_not_fit(path: Path) -> None:
    masks = load_masks(path)
    masks.check(
        plan=PatternPlan.uniform([*SHAPES], P24),
        shapes={**SHAPES, "another": (1, 4)},
        fingerprint="f" * 64,
    )
    cases: list[tuple[dict[str, Any], str]] = [
        (
            {"plan": PatternPlan.uniform([*SHAPES], Pattern(1, 4))},
            "holds 2:4 masks, wanted 1:4.*Set pattern=2:4",
        ),
        ({"shapes": {UP: (6, 16)}}, "down_proj, which is no linear"),
        ({"shapes": {**SHAPES, UP: (6, 32)}}, r"\(6, 16\), the model's linear \(6, 32\)"),
        ({"fingerprint": "0" * 64}, "another base model"),
    ]
    for arguments, message in cases:
        with pytest.raises(ArtifactError, match=message):
            masks.check(**arguments)


def test_a_header_does_not_steer_the_terminal(tmp_path: Path) -> None:
    path, pattern = tmp_path / "m.safetensors", Pattern(2, 4)
    mask = torch.tensor([[1, 1, 0, 0]], dtype=torch.bool)
    save_masks(path, {"a": mask}, pattern, fingerprint="f", method="\x1b[2Jgone", data="\x9b31m")
    text = summary(load_masks(path))
    assert "\x1b" not in text and "\x9b" not in text and "\\x1b[2Jgone" in text


def test_mask_sets_are_equal_by_identity(tmp_path: Path) -> None:
    """Their values are tensors, whose comparison is no truth value."""
    path, pattern = tmp_path / "a.safetensors", Pattern(2, 4)
    masks = {"a.proj": pattern.best(torch.arange(8.0).view(1, 8))}
    save_masks(path, masks, "2:4", fingerprint="a", method="magnitude")
    first, second = load_masks(path), load_masks(path)
    assert first == first and first != second and len({first, second, first}) == 2


def test_masks_forget_the_time_of_those_before_them(tmp_path: Path) -> None:
    path, mask_OI = tmp_path / "m.safetensors", Pattern(2, 4).best(torch.rand(4, 8))
    known: dict[str, Any] = {"fingerprint": "f", "method": "mine"}
    for seconds in (48.0, None, 0.0):
        save_masks(path, {"a": mask_OI}, "2:4", **known, seconds=seconds)
        assert seconds_of(load_masks(path)) == seconds
    wrongs: list[Any] = [-1, math.nan, math.inf, 10**400, "3", True]
    for wrong in wrongs:
        with pytest.raises(ArgumentError, match="save_masks: seconds"):
            save_masks(path, {"a": mask_OI}, "2:4", **known, seconds=wrong)
