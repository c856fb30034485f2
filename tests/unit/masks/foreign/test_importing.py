"""Masks of other tools, written here by numpy and by transformers, become the same masks."""

from __future__ import annotations

import io
import json
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from megamask.errors import ArtifactError
from megamask.masks.file import load_masks, save_masks
from megamask.masks.foreign.importing import import_masks
from megamask.masks.verify import verify
from megamask.sparsity.pattern import Pattern
from megamask.weights.base_model import BaseModel
from megamask.weights.fingerprint import model_linears
from tests.unit.export.test_masked_folder import save_model

P24 = Pattern(2, 4)
Masks = dict[str, Tensor]
Given = tuple[Path, Masks]
Weights = dict[str, Tensor]


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> Given:
    """A base model and masks of all its linears."""
    hf = tmp_path_factory.mktemp("base") / "hf"
    linears = model_linears(save_model(hf))
    generator = torch.Generator().manual_seed(1)
    return hf, {
        name: P24.best(torch.rand(one.weight.shape, generator=generator))
        for name, one in linears.items()
    }


def write_npz(path: Path, masks: Masks, **other: Any) -> Path:
    arrays = {f"{name}.weight.mask": np.packbits(mask.numpy()) for name, mask in masks.items()}
    np.savez_compressed(path, **{**arrays, **other})
    return path


def write_patch(path: Path, masks: Masks, **other: Any) -> Path:
    arrays: dict[str, Any] = {"__meta__": np.array(json.dumps({"pattern": "2:4"}))}
    for name, mask in masks.items():
        arrays[f"{name}.weight"] = np.packbits(mask.flatten().numpy())
        arrays[f"{name}.weight.__shape__"] = np.array(mask.shape, dtype=np.int64)
    np.savez_compressed(path, **{**arrays, **other})
    return path


def write_pt(path: Path, masks: Masks) -> Path:
    torch.save({f"{name}.weight.mask": mask.float() for name, mask in masks.items()}, path)
    return path


def write_layers(folder: Path, masks: Masks, ending: str, dtype: torch.dtype) -> Path:
    folder.mkdir()
    (folder / ".gitkeep").touch()
    for name, mask in masks.items():
        torch.save(mask.to(dtype), folder / f"{name}{ending}")
    return folder


def write_bitmask(
    folder: Path, hf: Path, masks: Masks, change: Callable[[Weights], None] = lambda parts: None
) -> Path:
    """A folder of sparse-24-bitmask: bits of a row from the lowest place on."""

    def compress(weights: Weights) -> None:
        for name, mask in masks.items():
            weight = weights.pop(f"{name}.weight")
            places = torch.tensor([1, 2, 4, 8, 16, 32, 64, 128])
            bits = (mask.view(len(mask), -1, 8) * places).sum(-1).to(torch.uint8)
            weights[f"{name}.shape"] = torch.tensor(weight.shape).view(2, 1)
            weights[f"{name}.compressed"] = weight[mask].view(len(mask), -1)
            weights[f"{name}.bitmask"] = bits
        change(weights)

    write_pruned(folder, hf, compress)
    return set_config(folder, format="sparse-24-bitmask", sparsity_structure="2:4")


def set_config(folder: Path, more: dict[str, Any] | None = None, **sparsity: Any) -> Path:
    config = json.loads((folder / "config.json").read_text())
    own = {"quant_method": "compressed-tensors", "sparsity_config": sparsity, **(more or {})}
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": own}))
    return folder


def write_pruned(folder: Path, hf: Path, change: Callable[[Weights], None]) -> Path:
    shutil.copytree(hf, folder)
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def pruning(masks: Masks) -> Callable[[Weights], None]:
    def change(weights: Weights) -> None:
        for name, mask in masks.items():
            weights[f"{name}.weight"] *= mask

    return change


def content(folder: Path, hf: Path, masks: Masks) -> str:
    """The content digest of our own mask file."""
    path = folder / "own.safetensors"
    save_masks(path, masks, P24, fingerprint=BaseModel(hf).fingerprints().exact, method="learned")
    return load_masks(path).content_sha256


def halved(masks: Masks) -> Callable[[Weights], None]:
    def change(weights: Weights) -> None:
        pruning(masks)(weights)
        weights.update({name: tensor.half() for name, tensor in weights.items()})

    return change


# kind -> how other tools write it, and the method in the header of the mask file
Write = Callable[[Path, Path, Masks], Path]
WRITERS: dict[str, tuple[str, Write]] = {
    "npz": ("maskllm", lambda to, hf, masks: write_npz(to / "mask_compressed.npz", masks)),
    "pt": ("maskllm", lambda to, hf, masks: write_pt(to / "mask.pt", masks)),
    "patch": ("patch", lambda to, hf, masks: write_patch(to / "mask.npz", masks)),
    "maskpro": (
        "maskpro",
        lambda to, hf, masks: write_layers(to / "learned_mask", masks, ".pt", torch.bool),
    ),
    "proxsparse": (
        "proxsparse",
        lambda to, hf, masks: write_layers(to / "proximal", masks, ".weight.pt", torch.bfloat16),
    ),
    "bitmask": (
        "compressed-tensors",
        lambda to, hf, masks: write_bitmask(to / "compressed", hf, masks),
    ),
    "dense of llm-compressor": (
        "compressed-tensors",
        lambda to, hf, masks: set_config(
            write_pruned(to / "pruned", hf, pruning(masks)), format="dense"
        ),
    ),
    "pruned": ("pruned", lambda to, hf, masks: write_pruned(to / "pruned", hf, pruning(masks))),
    "pruned float16": (
        "pruned",
        lambda to, hf, masks: write_pruned(to / "pruned", hf, halved(masks)),
    ),
}


@pytest.mark.parametrize("kind", WRITERS)
def test_masks_come_back(given: Given, tmp_path: Path, kind: str) -> None:
    hf, masks = given
    method, write = WRITERS[kind]
    out = tmp_path / "mask.safetensors"
    import_masks(write(tmp_path, hf, masks), out, BaseModel(hf), str(P24), {})
    found = verify(out, hf)
    assert found.content_sha256 == content(tmp_path, hf, masks)
    assert all(torch.equal(found[name], mask) for name, mask in masks.items())
    assert found.method == method


@pytest.mark.parametrize("kind", [kind for kind in WRITERS if kind != "pruned float16"])
def test_linears_without_a_mask_are_named(
    given: Given, tmp_path: Path, caplog: pytest.LogCaptureFixture, kind: str
) -> None:
    hf, masks = given
    first = dict([next(iter(masks.items()))])
    source = WRITERS[kind][1](tmp_path, hf, first)
    import_masks(source, tmp_path / "mask.safetensors", BaseModel(hf), str(P24), {})
    assert set(load_masks(tmp_path / "mask.safetensors")) == set(first)
    dense = f"{len(masks) - 1} linears have no mask and stay dense: {list(masks)[1]}, "
    assert dense in caplog.text


def test_a_dense_linear_of_patch_has_no_mask(given: Given, tmp_path: Path) -> None:
    hf, masks = given
    first, *others = masks
    source = write_patch(tmp_path / "mask.npz", masks | {first: torch.ones_like(masks[first])})
    import_masks(source, tmp_path / "mask.safetensors", BaseModel(hf), str(P24), {})
    assert list(load_masks(tmp_path / "mask.safetensors")) == others


def test_kept_zeros_of_a_bitmask_are_told(given: Given, tmp_path: Path) -> None:
    """A bitmask says which zeros of the base model are kept, where a zeroed folder does not."""
    _, masks = given
    name = next(iter(masks))

    def zero(weights: Weights) -> None:
        weights[f"{name}.weight"][0, :4] = 0

    hf = write_pruned(tmp_path / "base", given[0], zero)
    out = tmp_path / "mask.safetensors"
    import_masks(write_bitmask(tmp_path / "bits", hf, masks), out, BaseModel(hf), str(P24), {})
    assert torch.equal(load_masks(out)[name], masks[name])


def test_zeros_of_the_base_model(given: Given, tmp_path: Path) -> None:
    """A kept zero is told where the base model has just enough zeros, and refused with more."""
    _, masks = given
    name = next(iter(masks))
    mask = masks[name].clone()
    mask[0, :8] = torch.tensor([1, 1, 0, 0, 1, 1, 0, 0]).bool()

    def base_of(zeros: list[int]) -> Path:
        def change(weights: Weights) -> None:
            weights[f"{name}.weight"][0, zeros] = 0

        return write_pruned(tmp_path / f"base{len(zeros)}", given[0], change)

    def imported(hf: Path) -> Tensor:
        source = write_pruned(tmp_path / f"{hf.name}-pruned", hf, pruning({name: mask}))
        import_masks(source, tmp_path / "mask.safetensors", BaseModel(hf), str(P24), {})
        return load_masks(tmp_path / "mask.safetensors")[name]

    assert torch.equal(imported(base_of([0, 6])), mask)  # one is kept, the other is pruned
    with pytest.raises(ArtifactError, match=rf"1 groups of {name} .* row 0, group 0"):
        imported(base_of([0, 2, 6]))


def test_pairs_come_back_and_broken_pairs_do_not(given: Given, tmp_path: Path) -> None:
    """A pair of which the base model has one zero is kept; a pair of zeros fills its group."""
    pairs, name = Pattern(4, 8, 2), next(iter(given[1]))
    zeros, ones = [0.0, 0.0], [1.0, 1.0]

    def zero(weights: Weights) -> None:
        weights[f"{name}.weight"][0, [1, 4, 5]] = 0

    hf = write_pruned(tmp_path / "base", given[0], zero)
    mask = pairs.best(torch.rand(given[1][name].shape))
    for kept, problem in (
        ([*ones, *ones, *zeros, *zeros], ""),
        ([*ones, *zeros, *ones, *zeros], ""),
        ([*ones, *zeros, *zeros, *ones], ""),
        ([1, 0, 0, 1, 0, 0, *ones], "does not keep 2 of every 4 adjacent pairs"),
    ):
        mask[0, :8] = torch.tensor(kept).bool()
        source = write_pruned(tmp_path / f"pruned-{kept}", hf, pruning({name: mask}))
        if problem:
            with pytest.raises(ArtifactError, match=problem):
                import_masks(source, tmp_path / "mask.safetensors", BaseModel(hf), str(pairs), {})
            continue
        import_masks(source, tmp_path / "mask.safetensors", BaseModel(hf), str(pairs), {})
        assert torch.equal(load_masks(tmp_path / "mask.safetensors")[name], mask)


def zip_of(path: Path, member: str, data: bytes, method: int = zipfile.ZIP_DEFLATED) -> Path:
    with zipfile.ZipFile(path, "w", method) as archive:
        archive.writestr(member, data)
    return path


def npy(array: Any) -> bytes:
    stream = io.BytesIO()
    np.save(stream, array, allow_pickle=True)
    return stream.getvalue()


def test_archives_that_do_not_fit_are_refused(given: Given, tmp_path: Path) -> None:
    hf, masks = given
    name, mask = next(iter(masks.items()))
    packed, path = np.packbits(mask.numpy()), tmp_path / "m.npz"
    member = f"{name}.weight.mask.npy"
    whole = npy(packed)
    bomb = whole[:128] + bytes(2**26)
    cases: dict[str, Callable[[], Path]] = {
        f"holds a mask of {name} that": lambda: zip_of(path, member, npy(packed[:-1])),
        "uint8": lambda: zip_of(path, member, npy(packed.astype(np.float32))),
        "object": lambda: zip_of(path, member, npy(np.array([{}] * len(packed), object))),
        f"not {len(packed)}": lambda: zip_of(path, member, bomb),
        "no such compression": lambda: zip_of(path, member, whole, zipfile.ZIP_LZMA),
        "no linear of the model": lambda: write_npz(path, {"model.layers.7.x": mask}),
        "and not only masks": lambda: write_npz(path, masks, extra=np.ones(1)),
        "2 of every 4 weights of": lambda: write_npz(path, {name: ~mask | mask}),
        "is not MaskLLM's": lambda: path if path.write_bytes(b"%PDF-") else path,
        "is missing": lambda: tmp_path / "none.npz",
        "is not masks of another tool": lambda: Path(shutil.copy(path, tmp_path / "m.pdf")),
    }
    for said, write in cases.items():
        with pytest.raises(ArtifactError, match=said):
            import_masks(write(), tmp_path / "mask.safetensors", BaseModel(hf), str(P24), {})
    assert not (tmp_path / "mask.safetensors").exists()


def test_folders_that_do_not_fit_are_refused(given: Given, tmp_path: Path) -> None:
    hf, masks = given
    name = next(iter(masks))

    def updated(weights: Weights) -> None:
        pruning(masks)(weights)
        weights[f"{name}.weight"][masks[name]] *= 2

    def other_norm(weights: Weights) -> None:
        pruning(masks)(weights)
        weights["model.norm.weight"] += 1

    def too_few(weights: Weights) -> None:
        weights[f"{name}.weight"][0, :4] = 0

    cases = {
        f"weights of {name} that are neither zero nor": updated,
        "another model.norm.weight than the base model": other_norm,
        f"does not keep 2 of every 4 weights of {name}": too_few,
        "prunes no linear": lambda weights: None,
    }
    for number, (said, change) in enumerate(cases.items()):
        source = write_pruned(tmp_path / str(number), hf, change)
        with pytest.raises(ArtifactError, match=said):
            import_masks(source, tmp_path / "mask.safetensors", BaseModel(hf), str(P24), {})
    save_model(tmp_path / "another", seed=5)
    source = write_pruned(tmp_path / "pruned", hf, pruning(masks))
    with pytest.raises(ArtifactError, match="neither zero nor the base model's"):
        import_masks(
            source, tmp_path / "mask.safetensors", BaseModel(tmp_path / "another"), str(P24), {}
        )
    assert not (tmp_path / "mask.safetensors").exists()


class Runs:
    """An object whose pickle asks for a call."""

    def __reduce__(self) -> Any:
        return print, ("code of a stranger",)


def test_tensors_of_other_tools_that_do_not_fit_are_refused(
    given: Given, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hf, masks = given
    name, mask = next(iter(masks.items()))
    path = tmp_path / "mask.pt"

    def saved(held: Any) -> Path:
        torch.save(held, path)
        return path

    def layer(held: Any, ending: str = ".pt", folder: str = "layers") -> Path:
        (tmp_path / folder).mkdir(exist_ok=True)
        torch.save(held, tmp_path / folder / f"{name}{ending}")
        return tmp_path / folder

    key, dense = f"{name}.weight.mask", torch.ones(mask.shape)
    cases: dict[str, Callable[[], Path]] = {
        "asks for more than tensors": lambda: saved({key: Runs()}),
        "not tensors by name": lambda: saved([mask]),
        "than a plain tensor at": lambda: saved({key: 1}),
        "and not only masks": lambda: saved({key: mask.float(), "step": dense}),
        "no linear of the model": lambda: saved({"model.x.weight.mask": dense}),
        r"of shape \(4,\)": lambda: saved({key: torch.ones(4)}),
        "other numbers than 0 and 1": lambda: saved({key: mask * 0.5}),
        "2 of every 4 weights of": lambda: saved({key: dense}),
        "torn or not a PyTorch file": lambda: path if path.write_bytes(b"PK\x03\x04x") else path,
        "that is not opened|asks for more": lambda: layer(Runs()),
        "not a plain tensor": lambda: layer([mask]),
        f"mask of {name} of shape": lambda: layer(mask[:4]),
        f"has a mask of {name}.weight, which is no linear": lambda: (
            layer(mask, ".weight.pt", "mixed"),
            layer(mask, ".pt", "mixed"),
        )[1],
    }
    out = tmp_path / "mask.safetensors"
    for said, write in cases.items():
        with pytest.raises(ArtifactError, match=said):
            import_masks(write(), out, BaseModel(hf), str(P24), {})
    assert not out.exists() and "stranger" not in capsys.readouterr().out


def test_archives_of_patch_that_do_not_fit_are_refused(given: Given, tmp_path: Path) -> None:
    hf, masks = given
    name, mask = next(iter(masks.items()))
    path, shape = tmp_path / "mask.npz", f"{name}.weight.__shape__"
    tiles = mask.clone()
    tiles[:, :4] = True
    objects = np.array([{}, {}], object)
    cases: dict[str, dict[str, Any]] = {
        "dense beside groups of 2:4": {"masks": {name: tiles}},
        "2 of every 4 weights of": {"masks": {name: ~mask & (mask.cumsum(1) < 9)}},
        "lacks or adds 'x.weight.__shape__'": {"x.weight": np.ones(1, np.uint8)},
        "each NAME.weight needs": {"x": np.ones(1, np.uint8), "x.__shape__": np.ones(2, int)},
        r"has shape \(4, 4\)": {shape: np.array([4, 4])},
        f"a shape of {name} that does not fit": {shape: np.array([4])},
        "float64": {shape: np.array([4.0, 4.0])},
        "object": {shape: objects},
        f"a mask of {name} that": {f"{name}.weight": np.zeros(3, np.uint8)},
    }
    for said, other in cases.items():
        given_masks = other.pop("masks", {name: mask})
        with pytest.raises(ArtifactError, match=said):
            source = write_patch(path, given_masks, **other)
            import_masks(source, tmp_path / "mask.safetensors", BaseModel(hf), str(P24), {})
    assert not (tmp_path / "mask.safetensors").exists()


def test_compressed_folders_that_do_not_fit_are_refused(given: Given, tmp_path: Path) -> None:
    hf, masks = given
    name, mask = next(iter(masks.items()))

    def set_part(part: str, change: Callable[[Tensor], Tensor]) -> Callable[[Weights], None]:
        def changed(weights: Weights) -> None:
            weights[f"{name}.{part}"] = change(weights[f"{name}.{part}"])

        return changed

    cases: dict[str, Callable[[Weights], Any]] = {
        "weights of .* neither zero nor the base model's": set_part("compressed", lambda x: 2 * x),
        "misses tensors": lambda weights: weights.pop(f"{name}.shape"),
        "holds int8": set_part("compressed", lambda x: x.to(torch.int8)),
        r"holds uint8 .* as .*bitmask, not": set_part("bitmask", lambda x: x[:, :1].contiguous()),
        "half of the weights of each row": set_part("bitmask", lambda x: x | 1 | 2 | 4),
        "wrongly shaped|as .*compressed, not": set_part("shape", lambda x: x // 2),
        "unknown tensors": lambda weights: weights.update({"x.weight_scale": torch.ones(1)}),
        "another model.norm.weight": lambda weights: weights["model.norm.weight"].add_(1),
    }
    out = tmp_path / "mask.safetensors"
    for number, (said, change) in enumerate(cases.items()):
        source = write_bitmask(tmp_path / str(number), hf, masks, change)
        with pytest.raises(ArtifactError, match=said):
            import_masks(source, out, BaseModel(hf), str(P24), {})
    source = write_bitmask(tmp_path / "whole", hf, masks)
    configs: dict[str, dict[str, Any]] = {
        "in the format 'sparse-bitmask'": {"format": "sparse-bitmask"},
        "is quantized": {"format": "sparse-24-bitmask", "more": {"config_groups": {"0": {}}}},
    }
    for said, config in configs.items():
        with pytest.raises(ArtifactError, match=said):
            import_masks(set_config(source, **config), out, BaseModel(hf), str(P24), {})
    with pytest.raises(ArtifactError, match="does not keep 4 of every 8"):
        broken = {name: mask.clone()}
        broken[name][0, :8] = torch.tensor([1, 1, 1, 0, 1, 1, 1, 0]).bool()
        import_masks(
            write_npz(tmp_path / "m.npz", broken), out, BaseModel(hf), str(Pattern(4, 8)), {}
        )
    assert not out.exists()
