"""A checkpoint from a stranger runs nothing: neither its index nor its other files."""

from __future__ import annotations

import io
import os
import pickle
import random
import shutil
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata
from torch.distributed.checkpoint.planner import SavePlan, WriteItemType

from megamask.errors import ArtifactError
from megamask.safe_checkpoint import COMMON, INDEX, OLD_CORE, check_common, read_index
from tests.fuzz.mutations import put, share_of

MUTATIONS = 2000


class Victim:
    """A class that a pickle changes."""


class Payload:
    """Unpickled, it makes the folder that it was given."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.target),)


@pytest.fixture(scope="session")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of two tensors, as PyTorch writes one."""
    folder = tmp_path_factory.mktemp("checkpoint") / "whole"
    tensors = {"a.mask_logits": torch.arange(12.0).view(3, 4), "b": torch.ones(2).bfloat16()}
    dcp.save(tensors, storage_writer=dcp.FileSystemWriter(folder), no_dist=True)
    torch.save({"steps": 3, "name": "x"}, folder / COMMON)
    return folder


@pytest.fixture
def folder(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "copy"))


def test_a_checkpoint_of_tensors_is_read(folder: Path) -> None:
    index = read_index(folder)
    assert set(index.state_dict_metadata) == {"a.mask_logits", "b"}
    check_common(folder)


def test_classes_of_old_megatron_core_are_those_of_torch(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Old versions made classes of their own from PyTorch's; no module of that name is imported."""
    name = OLD_CORE
    old: Any = types.ModuleType(name)
    for core, plain in (("MCoreMetadata", Metadata), ("MCoreSavePlan", SavePlan)):
        setattr(old, core, type(core, (plain,), {"__module__": name}))
    plain_index = pickle.loads((folder / INDEX).read_bytes())
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, name, old)
        index = old.MCoreMetadata(**vars(plain_index))
        index.mcore_data = {"b": {"nd_reformulated_orig_global_shape": (2,)}}
        index.all_local_plans = [old.MCoreSavePlan([])]
        (folder / INDEX).write_bytes(pickle.dumps(index))
    monkeypatch.setitem(sys.modules, name, None)  # an import would fail
    found = read_index(folder)
    assert type(found) is Metadata and set(found.state_dict_metadata) == {"a.mask_logits", "b"}
    assert type(vars(found)["all_local_plans"][0]) is SavePlan
    (folder / INDEX).write_bytes(f"c{name}\nMCoreOther\n.".encode())
    with pytest.raises(ArtifactError, match="MCoreOther, which no tensor needs"):
        read_index(folder)


@pytest.mark.parametrize("depth", ["whole file", "inside the metadata"])
def test_a_payload_in_the_index_never_runs(folder: Path, tmp_path: Path, depth: str) -> None:
    target = tmp_path / "made-by-the-payload"
    if depth == "whole file":
        (folder / INDEX).write_bytes(pickle.dumps(Payload(target)))
    else:
        index = pickle.loads((folder / INDEX).read_bytes())
        index.planner_data = Payload(target)
        (folder / INDEX).write_bytes(pickle.dumps(index))
    with pytest.raises(ArtifactError, match=r"posix\.mkdir, which no tensor needs"):
        read_index(folder)
    assert not target.exists()
    pickle.loads((folder / INDEX).read_bytes())  # the payload is real: a plain reader runs it
    assert target.is_dir()


def test_an_index_changes_no_class_of_the_process(folder: Path) -> None:
    """Admitted names are shared by the whole process: an index fills new objects alone."""
    layout = b"ctorch.serialization\n_get_layout\n"
    kind = b"ctorch.distributed.checkpoint.planner\nWriteItemType\n"
    of_a_class = b"cpathlib\nPosixPath\n"
    state, slots = b"(N(Vname\nV../secret\ndt", b"(Vname\nV../secret\nd"
    whole = (folder / INDEX).read_bytes()
    for payload in (
        of_a_class + state + b"b.",  # attributes of slots
        kind + slots + b"b.",
        kind + b"(I1\ntR" + slots + b"b.",  # the member of an enumeration
        layout + slots + b"b.",  # a function
        layout + b"(Vtorch.strided\ntR" + slots + b"b.",  # an object of torch
        of_a_class + state + b"b0" + whole,  # before a right index
    ):
        (folder / INDEX).write_bytes(payload)
        with pytest.raises(ArtifactError, match="it sets attributes of"):
            read_index(folder)
        assert Path("a/b").name == "b" and WriteItemType(1).name == "TENSOR"
        assert not hasattr(torch.serialization._get_layout, "name")
    with pytest.raises(ArtifactError, match="holds what no tensor needs"):
        (folder / INDEX).write_bytes(b"\x96" + (2**40).to_bytes(8, "little") + b".")
        read_index(folder)


def test_a_plain_unpickler_changes_the_class(monkeypatch: pytest.MonkeyPatch) -> None:
    """The wrong answer, on a class of this test."""
    module = types.ModuleType("megamask_victim")
    vars(module)["Victim"] = Victim
    monkeypatch.setitem(sys.modules, module.__name__, module)
    name = b"cmegamask_victim\nVictim\n"
    pickle.loads(name + b"(N(Vname\nV../secret\ndtb.")
    assert vars(Victim)["name"] == "../secret"


def test_a_payload_in_the_common_file_never_runs(folder: Path, tmp_path: Path) -> None:
    target = tmp_path / "made-by-the-payload"
    torch.save({"steps": Payload(target)}, folder / COMMON)
    with pytest.raises(ArtifactError, match=COMMON):
        check_common(folder)
    assert not target.exists()
    torch.load(folder / COMMON, weights_only=False)
    assert target.is_dir()


def test_objects_beside_tensors_are_refused(folder: Path) -> None:
    """PyTorch unpickles an entry of bytes without any restriction when it is loaded."""
    index = pickle.loads((folder / INDEX).read_bytes())
    index.state_dict_metadata["optimizer"] = BytesStorageMetadata()
    (folder / INDEX).write_bytes(pickle.dumps(index))
    with pytest.raises(ArtifactError, match="BytesStorageMetadata"):
        read_index(folder)


@pytest.mark.parametrize("name", ["../secret", "/etc/hostname", "link.distcp"])
def test_pieces_outside_the_folder_are_refused(folder: Path, name: str) -> None:
    (folder / "link.distcp").symlink_to("/etc/hostname")
    index = pickle.loads((folder / INDEX).read_bytes())
    for piece in index.storage_data.values():
        piece.relative_path = name
    (folder / INDEX).write_bytes(pickle.dumps(index))
    with pytest.raises(ArtifactError, match="outside the folder"):
        read_index(folder)


def test_a_cut_file_and_a_missing_index_are_named(folder: Path) -> None:
    data = next(folder.glob("*.distcp"))
    data.write_bytes(data.read_bytes()[:-1])
    with pytest.raises(ArtifactError, match="bytes, at least"):
        read_index(folder)
    (folder / INDEX).unlink()
    with pytest.raises(ArtifactError, match=r"is torn or no checkpoint \(\.metadata: No such file"):
        read_index(folder)


def test_mutated_indexes_are_read_or_refused(folder: Path) -> None:
    """Whatever bytes an index has: it is read as tensors, or it is one error of ours."""
    original, choose = (folder / INDEX).read_bytes(), random.Random(0)
    outcomes = {"read": 0, "refused": 0}
    for _ in range(share_of(MUTATIONS)):
        mutated = bytearray(original)
        for _ in range(choose.randint(1, 4)):
            place = choose.randrange(len(mutated))
            mutated[place] = choose.randrange(256)
        if choose.random() < 0.2:
            del mutated[choose.randrange(len(mutated)) :]
        put(folder / INDEX, bytes(mutated))
        try:
            assert isinstance(read_index(folder), Metadata)
            outcomes["read"] += 1
        except ArtifactError:
            outcomes["refused"] += 1
    assert outcomes["read"] > 5 and outcomes["refused"] > 50, outcomes


def test_a_plain_unpickler_admits_more() -> None:
    """The wrong answer: without the list, the very same bytes give the function."""
    assert pickle.loads(pickle.dumps(io.open)) is io.open
