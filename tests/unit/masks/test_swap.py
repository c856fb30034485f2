"""Masks that change places on a resident model: what it shows, what it remembers, what it
refuses.
"""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaForCausalLM

import megamask
from megamask.errors import ArgumentError, ArtifactError
from megamask.masks import swap as module_of_swap
from megamask.masks.bits import as_integers, masked_by_bits, pack_bits
from megamask.masks.file import save_masks
from megamask.sparsity.pattern import Pattern
from megamask.weights.fingerprint import fingerprints_model, model_linears
from tests.unit.masks.test_apply import tiny_model
from tests.unit.masks.test_held_models import (
    HELD,
    Holder,
    Linear8bitLt,
    compiled,
    expect_masked,
    parametrized,
    with_adapters,
)

P24 = Pattern(2, 4)
UP = "model.layers.0.mlp.up_proj"
TOKENS = torch.arange(12).view(2, 6)
Files = dict[str, Path]
REMEMBERED = module_of_swap._REMEMBERED


@pytest.fixture(scope="module")
def dense() -> LlamaForCausalLM:
    return tiny_model(num_hidden_layers=2).to(torch.bfloat16).eval()


@pytest.fixture(scope="module")
def files(dense: LlamaForCausalLM, tmp_path_factory: pytest.TempPathFactory) -> Files:
    """code: the first MLP stays dense. prose: the second MLP stays dense, and other masks."""
    folder, files = tmp_path_factory.mktemp("masks"), {}
    found = fingerprints_model(dense)
    for number, (name, left_out) in enumerate(
        [("code", "layers.0.mlp"), ("prose", "layers.1.mlp")]
    ):
        generator = torch.Generator().manual_seed(number)
        masks = {
            linear: P24.best(torch.rand(module.weight.shape, generator=generator))
            for linear, module in model_linears(dense).items()
            if left_out not in linear
        }
        files[name] = folder / name
        save_masks(
            files[name],
            masks,
            P24,
            fingerprint=found.exact,
            method="random",
            float16_fingerprints=found.float16,
        )
    return files


def bits(model: nn.Module) -> dict[str, Tensor]:
    return {name: as_integers(one.detach()).clone() for name, one in model.named_parameters()}


def same(model: nn.Module, other: nn.Module | dict[str, Tensor]) -> bool:
    """Whether both have the same bits, the sign of a zero too."""
    ours, theirs = bits(model), bits(other) if isinstance(other, nn.Module) else other
    return ours.keys() == theirs.keys() and all(torch.equal(ours[n], theirs[n]) for n in ours)


def applied(dense: LlamaForCausalLM, file: Path) -> LlamaForCausalLM:
    return megamask.apply_masks(copy.deepcopy(dense), file)


@pytest.mark.parametrize("keep", ["device", "cpu"])
def test_each_swap_shows_what_apply_masks_gives_and_none_the_dense_bits(
    dense: LlamaForCausalLM, files: Files, keep: Any
) -> None:
    model = copy.deepcopy(dense)
    expected = {name: applied(dense, file) for name, file in files.items()}
    assert not same(expected["code"], expected["prose"])
    with torch.no_grad():
        logits = {name: one(TOKENS).logits for name, one in expected.items()}
        assert not torch.equal(logits["code"], logits["prose"])
        for name in ("code", "prose", "code", "code", None, "prose", None, None):
            megamask.swap(model, name and files[name], keep=keep)
            assert same(model, expected[name] if name else dense), name
            if name:
                assert torch.equal(model(TOKENS).logits, logits[name])
    assert not any(module in REMEMBERED for module in model.modules())  # nothing is held for dense


def test_a_swap_ends_with_its_block_also_after_an_exception(
    dense: LlamaForCausalLM, files: Files
) -> None:
    model = copy.deepcopy(dense)
    code, prose = (applied(dense, files[name]) for name in ("code", "prose"))
    with megamask.swap(model, files["code"]) as shown:
        assert shown is model and same(model, code)
        with pytest.raises(KeyError), megamask.swap(model, files["prose"]):
            assert same(model, prose)
            raise KeyError
        assert same(model, code)
        with megamask.swap(model, None):
            assert same(model, dense)
            megamask.swap(model, files["prose"])  # a plain call within ends with the block too
        assert same(model, code)
    assert same(model, dense)
    first, second = (megamask.swap(model, files[name]) for name in ("code", "prose"))
    for _ in range(2):
        with first:  # although the second was made after it
            assert same(model, code)
        assert same(model, prose)
    with second:
        assert same(model, prose)
        with first:
            assert same(model, code)
        assert same(model, prose)
    assert same(model, code)  # what it showed before the second
    megamask.swap(model, None)
    held = megamask.swap(model, files["prose"])
    for _ in range(2):
        with held:
            assert same(model, prose)
        assert same(model, dense)


def test_a_model_that_shows_a_mask_is_not_pruned_for_good(
    dense: LlamaForCausalLM, files: Files
) -> None:
    model = copy.deepcopy(dense)
    with megamask.swap(model, files["code"]):
        with pytest.raises(ArtifactError, match="whose next switch would undo this"):
            megamask.apply_masks(model, files["code"])
        assert same(model, applied(dense, files["code"]))
    megamask.apply_masks(model, files["code"])
    assert same(model, applied(dense, files["code"]))


def test_masks_by_name(dense: LlamaForCausalLM, files: Files) -> None:
    model = copy.deepcopy(dense)
    given = {**files, "plain": dict(megamask.load_masks(files["code"]))}
    masks = megamask.Masks(model, given)
    assert same(model, dense)  # nothing changes before the first use
    with masks.use("code"):
        masks.use("prose")
        assert same(model, applied(dense, files["prose"]))
        again = megamask.Masks(model, {"code": megamask.load_masks(files["code"])})
        with again.use("code"), masks.use(None):
            assert same(model, dense)
        assert same(model, applied(dense, files["prose"]))
        with torch.inference_mode():
            masks.use("plain")
        assert same(model, applied(dense, files["code"]))
    assert same(model, dense)
    with torch.inference_mode():
        masks.use("code")
    masks.use("prose")
    masks.use(None)
    assert same(model, dense)
    wrong: Any
    for wrong in ("poems", 3, ["code"]):
        with pytest.raises(ArgumentError, match=r"'code', 'prose', 'plain' or None \(dense\)"):
            masks.use(wrong)
    for wrong in (megamask.load_masks(files["code"]), given["plain"], {}, files["code"], None):
        with pytest.raises(ArgumentError, match=r"Masks: masks is .*from names to masks"):
            megamask.Masks(model, wrong)


@pytest.mark.parametrize("wrap", HELD)
def test_a_swap_finds_the_linears_however_the_model_is_held(
    dense: LlamaForCausalLM, files: Files, wrap: str
) -> None:
    model = HELD[wrap](copy.deepcopy(dense))
    base = copy.deepcopy(dense).half() if "fp16" in wrap else dense
    before = bits(model)
    megamask.swap(model, files["code"])
    assert not same(model, before)
    megamask.swap(model, files["prose"])
    expect_masked(model, files["prose"], base)
    megamask.swap(model, None)
    assert same(model, before)


def test_wrappers_and_parts_share_what_is_remembered(dense: LlamaForCausalLM, files: Files) -> None:
    model = copy.deepcopy(dense)
    megamask.swap(model, files["code"])
    megamask.swap(compiled(model), files["prose"])
    assert same(model, applied(dense, files["prose"]))
    megamask.swap(with_adapters(model), files["code"])
    expect_masked(megamask.swap(model.model, files["prose"]).__enter__(), files["prose"], dense)
    whole = Holder(text=model)
    megamask.swap(whole, None)
    expected = {name: one for name, one in bits(dense).items() if "_proj" in name}
    ours = {name.replace(".base_layer", ""): one for name, one in bits(model).items()}
    assert all(torch.equal(ours[name], one) for name, one in expected.items())


def test_transposed_weights(dense: LlamaForCausalLM) -> None:
    sizes = {"n_embd": 32, "n_layer": 1, "n_head": 4, "vocab_size": 50, "n_positions": 16}
    model = GPT2LMHeadModel(GPT2Config(**sizes))
    base = copy.deepcopy(model)
    plain = {
        name: P24.best(linear.weight.abs().t()) for name, linear in model_linears(model).items()
    }
    with megamask.swap(model, plain):
        assert same(model, megamask.apply_masks(copy.deepcopy(base), plain)) and len(plain) == 4
    assert same(model, base)


def one_weight(model: Any) -> None:
    model.get_submodule(UP).weight.data[3, 5] += 1


def smallest_bit(model: Any) -> None:
    model.get_submodule(UP).weight.data.view(torch.int16)[-1, -1] ^= 1


def two_rows(model: Any) -> None:
    weight = model.get_submodule(UP).weight.data
    weight[[0, 1]] = weight[[1, 0]]


def two_columns(model: Any) -> None:
    weight = model.get_submodule(UP).weight.data
    weight[:, [0, 1]] = weight[:, [1, 0]]


def half(model: Any) -> None:
    model.half()


def train(model: Any) -> None:
    model(TOKENS, labels=TOKENS).loss.backward()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.sub_(parameter.grad)


def replace(model: Any) -> None:
    linear = model.get_submodule(UP)
    linear.weight = nn.Parameter(torch.randn_like(linear.weight))


CHANGES = [
    one_weight,
    smallest_bit,
    two_rows,
    two_columns,
    half,
    train,
    replace,
]


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("state", ["prose", None])
def test_weights_that_somebody_else_changed_are_refused(
    dense: LlamaForCausalLM, files: Files, change: Callable[[Any], None], state: str | None
) -> None:
    model = copy.deepcopy(dense)
    masks = megamask.Masks(model, files)
    masks.use(state)
    change(model)
    after = bits(model)
    ways: list[Callable[[], object]] = [lambda: masks.use("prose")]
    if state:  # a fresh swap of dense weights has nothing to compare with but the fingerprint
        ways += [lambda: masks.use(None), lambda: megamask.swap(model, files["code"])]
    for way in ways:
        with pytest.raises(
            ArtifactError, match=r"another (weight in .*_proj|base model)"
        ) as refused:
            way()
        # training also changed linears without a mask, which only the fingerprint covers
        assert change is train or "another weight in" in str(refused.value)
        assert same(model, after)
    block = megamask.swap(copy.deepcopy(dense), files["prose"])
    with pytest.raises(ArtifactError, match="another weight in"), block as held:
        change(held)


def test_weights_that_were_changed_between_two_swaps_are_not_those_of_older_masks(
    dense: LlamaForCausalLM, files: Files
) -> None:
    """The linear shows what the last swap left there, but of other dense weights than the masks
    were checked against.
    """
    model = copy.deepcopy(dense)
    masks = megamask.Masks(model, files)
    one_weight(model)
    with megamask.swap(model, files["prose"], check_fingerprint=False):
        with pytest.raises(ArtifactError, match=f"another weight in {UP}"):
            masks.use("prose")
        megamask.Masks(model, files, check_fingerprint=False).use("code")


def test_changes_elsewhere_are_nobodys_business(dense: LlamaForCausalLM, files: Files) -> None:
    model = copy.deepcopy(dense)
    with megamask.swap(model, files["prose"]):
        with torch.no_grad():
            model.lm_head.weight.add_(1)
            model.model.norm.weight.mul_(2)
            model.model.layers[1].mlp.up_proj.weight.mul_(2)  # has no mask in this file
        model.get_submodule(UP).weight = nn.Parameter(model.get_submodule(UP).weight.clone())
        model.requires_grad_(False)
    expected = {name: one for name, one in bits(dense).items() if name == f"{UP}.weight"}
    assert torch.equal(bits(model)[f"{UP}.weight"], expected[f"{UP}.weight"])


def corrupt(files: Files, folder: Path, dense: LlamaForCausalLM) -> Path:
    data = bytearray(files["prose"].read_bytes())
    data[-1] ^= 1
    (folder / "m").write_bytes(bytes(data))
    return folder / "m"


def of_another_base(files: Files, folder: Path, dense: LlamaForCausalLM) -> Path:
    masks = dict(megamask.load_masks(files["prose"]))
    save_masks(folder / "m", masks, P24, fingerprint="f" * 64, method="magnitude")
    return folder / "m"


def of_updated_weights(files: Files, folder: Path, dense: LlamaForCausalLM) -> Path:
    masks, found = dict(megamask.load_masks(files["prose"])), fingerprints_model(dense).exact
    save_masks(folder / "m", masks, P24, fingerprint=found, method="mine", updated_weights=True)
    return folder / "m"


BAD: list[tuple[Callable[..., Any], str]] = [
    (corrupt, "corrupt"),
    (of_another_base, "another base model"),
    (of_updated_weights, "weights that mine updated"),
    (lambda files, folder, dense: folder / "none", "does not exist|missing|no such"),
    (lambda files, folder, dense: {UP: torch.ones(4, 4)}, "shape"),
    (lambda files, folder, dense: {"model.other": torch.ones(4, 4)}, "no linear of the model"),
]


@pytest.mark.parametrize(("bad", "message"), BAD)
def test_masks_that_do_not_fit_leave_the_model_as_it_was(
    dense: LlamaForCausalLM,
    files: Files,
    tmp_path: Path,
    bad: Callable[..., Any],
    message: str,
) -> None:
    model, wrong = copy.deepcopy(dense), bad(files, tmp_path, dense)
    for state in (None, "code"):
        megamask.swap(model, state and files[state])
        before = bits(model)
        with pytest.raises(ArtifactError, match=f"(?i){message}"):
            megamask.swap(model, wrong)
        with pytest.raises(ArtifactError, match=f"(?i){message}"):
            megamask.Masks(model, {**files, "wrong": wrong})
        assert same(model, before)
    megamask.swap(model, None)
    assert same(model, dense)


def test_weights_that_are_pruned_already_are_not_the_dense_ones(
    dense: LlamaForCausalLM, files: Files
) -> None:
    """``apply_masks`` accepts them, because it has nothing to remember."""
    model = applied(dense, files["code"])
    with pytest.raises(ArtifactError, match=r"another base model.*unpruned"):
        megamask.swap(model, files["code"])
    megamask.apply_masks(model, files["code"])
    shown = copy.deepcopy(dense)
    megamask.swap(shown, files["code"])
    with pytest.raises(ArtifactError, match="another base model"):
        megamask.swap(copy.deepcopy(shown), files["prose"])  # the copy remembers nothing
    two = Holder(actor=shown, ref=copy.deepcopy(dense))
    with pytest.raises(ArtifactError, match=r"several parts.*'actor\.model\.' and 'ref\."):
        megamask.swap(two, files["prose"])


@pytest.mark.parametrize(
    ("change", "state", "message"),
    [
        (Linear8bitLt, "prose", "has 1 of the linears no more"),
        (lambda linear: linear.to("meta"), None, f"{UP}.*on the meta device"),
        (lambda linear: linear.to(torch.float8_e4m3fn), None, f"{UP}.*quantized"),
        (parametrized, None, f"{UP}.*remove_parametrizations"),
    ],
)
def test_linears_that_can_be_written_no_more_are_named(
    dense: LlamaForCausalLM,
    files: Files,
    change: Callable[[Any], Any],
    state: str | None,
    message: str,
) -> None:
    model = copy.deepcopy(dense)
    masks = megamask.Masks(model, {"prose": files["prose"]})
    masks.use("prose")
    layer, before = model.model.layers[0].mlp, bits(model.model.layers[1])
    layer.up_proj = change(layer.up_proj)
    with pytest.raises(ArtifactError, match=message):
        masks.use(state)
    assert same(model.model.layers[1], before)


def test_a_failure_half_way_is_undone(
    dense: LlamaForCausalLM, files: Files, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = copy.deepcopy(dense)
    masks = megamask.Masks(model, files)
    for state in (None, "code"):
        masks.use(state)
        before, calls = bits(model), 0

        def fail_at_third(*arguments: Any) -> Tensor:
            nonlocal calls
            calls += 1
            if calls == 3:
                raise torch.OutOfMemoryError
            return masked_by_bits(*arguments)

        with monkeypatch.context() as patch, pytest.raises(torch.OutOfMemoryError):
            patch.setattr(module_of_swap, "masked_by_bits", fail_at_third)
            masks.use("prose")
        assert calls >= 3 and same(model, before)
    masks.use("prose")
    assert same(model, applied(dense, files["prose"]))
    masks.use(None)
    assert same(model, dense)


def bytes_of_tensors() -> int:
    """Bytes of all tensors that Python knows, each storage once."""
    gc.collect()
    storages = {
        one.untyped_storage().data_ptr(): one.untyped_storage().nbytes()
        for one in gc.get_objects()
        if isinstance(one, Tensor) and one.device.type != "meta"
    }
    return sum(storages.values())


def test_memory_is_the_weights_once_and_a_bit_per_weight_of_each_mask(
    dense: LlamaForCausalLM, files: Files
) -> None:
    gc.collect()
    gc.freeze()  # objects of before are not looked at
    try:
        model = copy.deepcopy(dense)
        before = bytes_of_tensors()
        names = {f"{name} {number}": file for name, file in files.items() for number in range(3)}
        masks = megamask.Masks(model, names)
        weights = {name: one.weight for name, one in model_linears(model).items()}
        sizes = {
            name: [weights[linear].numel() for linear in megamask.load_masks(file)]
            for name, file in names.items()
        }
        packed = sum(size // 8 for one in sizes.values() for size in one)
        assert bytes_of_tensors() - before == packed
        for name in (*names, *names):
            masks.use(name)
            assert bytes_of_tensors() - before == packed + 2 * sum(sizes[name])  # bf16
        masks.use(None)
        assert bytes_of_tensors() - before == packed
        masks.use("code 0")
        count = len(REMEMBERED)
        del model, masks, weights
        gc.collect()
        assert len(REMEMBERED) == count - 11  # what is remembered ends with its model
    finally:
        gc.unfreeze()


@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (8, 8), (7, 33), (64, 2)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_bits_hold_every_mask(shape: tuple[int, int], dtype: torch.dtype) -> None:
    for kind in (torch.zeros, torch.ones, torch.rand):
        mask, weight = kind(*shape) > 0.5, torch.randn(shape).to(dtype)
        weight[0, 0] = float("nan")
        packed = pack_bits(mask)
        assert packed.dtype == torch.uint8 and packed.numel() == -(-mask.numel() // 8)
        for ours, weight_OI in ((mask, weight), (mask.t(), weight.t())):
            shown = masked_by_bits(weight_OI, pack_bits(ours))
            assert torch.equal(as_integers(shown), as_integers(weight_OI.masked_fill(~ours, 0.0)))
