"""Format version 3: every coding is exact, as small as promised, and wrong bytes or other weights
never give a wrong mask.
"""

from __future__ import annotations

import hashlib
import json
import math
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from transformers import LlamaForCausalLM

import megamask
from megamask.config import load_config
from megamask.errors import ArgumentError, ArtifactError, MegamaskError
from megamask.masks import codings, radix, ranked, ranked_numba
from megamask.masks.container import write_words
from megamask.masks.file import load_masks
from megamask.masks.header import header_digest
from megamask.sparsity.pattern import MAX_GROUP, Pattern
from megamask.verbs import extract, inspect
from megamask.verbs.own_arguments import ExtractArguments, InspectArguments
from megamask.weights.fingerprint import fingerprint_model, fingerprints_model, model_linears
from tests.unit.masks.test_apply import tiny_model

PATTERNS = [Pattern(n, m) for m in range(2, MAX_GROUP + 1) for n in (1, m // 2, m - 1) if n]
WITH_MODEL = [Pattern(*pair) for pair in ((1, 2), (1, 4), (2, 4), (3, 4), (4, 8), (1, 16), (2, 5))]
PINNED = Path(__file__).parent / "given-weights-v3.safetensors"
P24 = Pattern(2, 4)
UNIFORM_DIGEST = "21facefc68f83c92d28656ef6b7a846c51989a88a45f1d7b4bb1a609fc00d0c3"


def indices(pattern: Pattern, count: int, seed: int = 0) -> Any:
    generator = random.Random(seed)
    found = [generator.randrange(pattern.num_candidates) for _ in range(count)]
    return np.array(found, dtype=np.uint64)


@pytest.mark.parametrize("base", sorted({one.num_candidates for one in PATTERNS} | {70, 495}))
def test_uniform_is_exact_and_close_to_the_entropy(base: int) -> None:
    """The bound of 0.3 % is of the format; a word per 24 digits, version 1, breaks it at 2:4."""
    used = radix.layout(base)
    assert used.bits <= 1.003 * math.log2(base)
    assert used.radix**used.per_field <= 2**used.field_bits
    assert base**used.digits <= used.radix << used.low_bits
    generator = random.Random(base)
    step = used.digits * used.per_field
    for count in (1, step, step + 1, 3 * step + used.digits - 1):
        for index in ([generator.randrange(base) for _ in range(count)], [base - 1] * count):
            words = radix.pack(np.array(index, dtype=np.uint64), base)
            assert words.shape == (radix.num_words(count, base),)
            assert radix.unpack(words, count, base).tolist() == index
    assert 1.003 * math.log2(6) < 64 / 24


def test_all_layouts_are_close_to_the_entropy() -> None:
    bases = {math.comb(m, n) for m in range(2, 33) for n in range(1, m)}
    assert max(radix.layout(base).bits / math.log2(base) for base in bases) < 1.003


@pytest.mark.parametrize("base", [5, 6, 70, math.comb(16, 8), math.comb(32, 16)])
def test_uniform_words_are_those_of_plain_arithmetic(base: int) -> None:
    """Independent reference: fields and low bits as Python integers, lowest bit first."""
    used, count = radix.layout(base), 1000
    index = np.random.default_rng(0).integers(base, size=count)
    high = low = field = 0
    for numbers, at in enumerate(range(0, count, used.digits)):
        number = sum(
            int(one) * base**place for place, one in enumerate(index[at : at + used.digits])
        )
        low |= (number % 2**used.low_bits) << (numbers * used.low_bits)
        field += (number >> used.low_bits) * used.radix ** (numbers % used.per_field)
        if (numbers + 1) % used.per_field == 0 or at + used.digits >= count:
            high |= field << (numbers // used.per_field * used.field_bits)
            field = 0
    size, rest = used.sizes(count)
    expected = high.to_bytes(8 * size, "little") + low.to_bytes(8 * rest, "little")
    assert radix.pack(index.astype(np.uint64), base).tobytes() == expected


@pytest.mark.parametrize("base", [5, 6, 70, math.comb(16, 8), math.comb(64, 32)])
def test_uniform_words_that_pack_never_writes_are_refused(base: int) -> None:
    """Each other word either is refused or is what ``pack`` writes for other indices."""
    count = 3 * radix.layout(base).digits + 1
    words = radix.pack(np.zeros(count, dtype=np.uint64), base)
    with pytest.raises(ValueError, match="words"):
        radix.unpack(words[:-1], count, base)
    choose, refused = np.random.default_rng(0), 0
    for _ in range(200):
        other = words ^ (np.uint64(1) << choose.integers(64, size=len(words), dtype=np.uint64))
        try:
            index = radix.unpack(other, count, base)
        except ValueError:
            refused += 1
        else:
            assert np.array_equal(radix.pack(index, base), other)
    assert refused


def noisy(pattern: Pattern, rows: int, groups: int, seed: int = 0) -> tuple[Any, torch.Tensor]:
    """A weight in bf16, and indices of a mask that mostly keeps the largest."""
    generator = torch.Generator().manual_seed(seed)
    shape = (rows, groups * pattern.m)
    weight = torch.randn(shape, generator=generator).to(torch.bfloat16)
    weight[0] = 1.0  # ties alone
    noise = torch.randn(shape, generator=generator) * 0.3
    mask = pattern.best(weight.float().abs().log() + noise)
    return pattern.index_of(mask).numpy().reshape(-1).astype(np.uint64), weight


@pytest.mark.parametrize("pattern", WITH_MODEL, ids=str)
def test_given_weights_is_exact_and_smaller(pattern: Pattern) -> None:
    index, weight = noisy(pattern, 96, 64)
    keys = ranked.keys_of(weight)
    words = ranked.encode(index, keys, pattern)
    assert np.array_equal(ranked.decode(words, keys, pattern), index)
    assert len(words) < 0.85 * radix.num_words(len(index), pattern.num_candidates)
    for copy in (weight.float(), weight.double()):
        assert np.array_equal(ranked.keys_of(copy), keys)
    short = index[: 2 * 64]
    assert np.array_equal(
        ranked.decode(ranked.encode(short, keys[:2], pattern), keys[:2], pattern), short
    )


@pytest.mark.parametrize("pattern", WITH_MODEL, ids=str)
def test_order_and_contexts_are_those_of_plain_sorting(pattern: Pattern) -> None:
    """Independent reference: numpy's stable sort, so that equal magnitudes keep their order."""
    keys = ranked.keys_of(noisy(pattern, 8, 21)[1])  # no multiple of the groups of a block
    context, order = ranked._contexts(keys, pattern)
    groups = keys.reshape(-1, pattern.m).astype(np.int64)
    expected = np.argsort(-groups, axis=1, kind="stable")
    if pattern.m == 4:  # four positions of two bits each
        order = order[:, None] >> np.array([0, 2, 4, 6]) & 3
    assert np.array_equal(order, expected)
    padded = np.take_along_axis(groups, expected, 1)
    padded = np.concatenate([padded[:, :1], padded, padded[:, -1:]], 1)
    gaps = np.minimum(padded[:, :-1] - padded[:, 1:], 255)
    n = pattern.n
    side = [np.searchsorted(ranked.SIDE, gaps[:, at], side="right") for at in (n - 1, n + 1)]
    middle = np.searchsorted(ranked.MIDDLE, gaps[:, n], side="right")
    level = np.searchsorted(ranked.LEVEL, padded[:, n] - groups.sum() // groups.size, side="right")
    assert np.array_equal(context, ((middle * 4 + side[0]) * 4 + side[1]) * 6 + level)


@pytest.mark.parametrize("symbols", [2, 6, 70])
def test_frequencies_are_those_of_plain_integers(symbols: int) -> None:
    """Independent reference: Python's integers, for counts up to the largest that int32 holds."""
    children = 96
    parents, starts = np.zeros((2, symbols), np.int64), np.zeros((192, symbols + 1), np.uint16)
    choose = np.random.default_rng(symbols)
    counts = (2.0 ** choose.uniform(-1, 31, (192, symbols))).astype(np.int32)
    counts[0], counts[1, 1:] = 2**31 - 1, 0
    ranked_numba._refresh.py_func(counts, parents, starts, children)
    for row, given in enumerate(counts.tolist()):
        family = counts[row // children * children :][:children].astype(object)
        parent = (family.sum(0) + 1).tolist()
        parent[0] += symbols - 1
        prior = [one * 24 * 256 // sum(parent) + 1 for one in parent]
        share = [one * 256 + add for one, add in zip(given, prior, strict=True)]
        sizes = [1 + one * (2**14 - symbols) // sum(share) for one in share]
        expected = [sum(sizes[:at]) for at in range(symbols)] + [2**14]
        assert starts[row].tolist() == expected


def test_given_weights_words_never_decode_to_what_they_do_not_encode() -> None:
    """Any words decode to the indices that encode to them, or are refused."""
    index, weight = noisy(P24, 16, 16)
    keys = ranked.keys_of(weight)
    words, choose, refused = ranked.encode(index, keys, P24), np.random.default_rng(0), 0
    for number in range(300):
        other = words.copy()
        if number % 3:
            other[choose.integers(len(words))] ^= np.uint64(1) << choose.integers(
                64, dtype=np.uint64
            )
        else:
            other = choose.integers(2**63, size=choose.integers(1, 40)).astype(np.uint64)
        try:
            found = ranked.decode(other, keys, P24)
        except ValueError:
            refused += 1
        else:
            assert np.array_equal(ranked.encode(found, keys, P24), other)
    assert refused > 250


def test_patterns_without_a_model_are_uniform() -> None:
    pattern = Pattern(8, 16)
    index, weight = noisy(pattern, 4, 8)
    assert codings.encode(index, pattern, weight)[0] == codings.UNIFORM
    index, weight = noisy(P24, 2, 4)
    assert codings.encode(np.full(8, 5, np.uint64), P24, weight)[0] == codings.UNIFORM  # no gain


def test_pairs_are_uniform(tmp_path: Path) -> None:
    pattern, path = Pattern.parse("4:8:pair"), tmp_path / "m.safetensors"
    mask = pattern.mask_of(torch.arange(24).view(4, 6) % pattern.num_candidates)
    known = {"fingerprint": "f", "method": "mine", "coding": codings.UNIFORM}
    megamask.save_masks(path, {"a": mask}, pattern, **known)
    assert load_masks(path).pattern == pattern and torch.equal(load_masks(path)["a"], mask)
    assert not ranked.has_model(pattern)


def larger(seed: int = 0) -> LlamaForCausalLM:
    """A model of so many groups that ``given-weights`` is the smaller coding of its linears."""
    return tiny_model(seed, hidden_size=64, intermediate_size=192).to(torch.bfloat16)


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    return larger()


def learned_like(model: LlamaForCausalLM) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {
        name: P24.best(
            one.weight.float().abs().log() + torch.randn(one.weight.shape, generator=generator) / 3
        )
        for name, one in model_linears(model).items()
    }


def save(path: Path, model: LlamaForCausalLM, coding: str) -> dict[str, torch.Tensor]:
    masks, found = learned_like(model), fingerprints_model(model)
    megamask.save_masks(
        path,
        masks,
        P24,
        fingerprint=found.exact,
        method="learned",
        coding=coding,
        model=model if coding == codings.GIVEN_WEIGHTS else None,
        float16_fingerprints=found.float16,
    )
    return masks


@pytest.mark.parametrize("coding", codings.CODINGS)
def test_every_coding_reads_the_same_masks(
    tmp_path: Path, model: LlamaForCausalLM, coding: str
) -> None:
    path, plain = tmp_path / "m.safetensors", tmp_path / "plain.safetensors"
    expected = save(path, model, coding)
    save(plain, model, "words")
    model.save_pretrained(tmp_path / "hf")
    for base in (model, str(tmp_path / "hf"), larger().float()):
        masks = load_masks(path, model=base)
        masks.verify()
        assert all(torch.equal(masks[name], mask) for name, mask in expected.items())
        assert masks.content_sha256 == load_masks(plain).content_sha256
    assert load_masks(path).meta["format_version"] == (1 if coding == "words" else 3)
    assert megamask.verify(path, tmp_path / "hf").method == "learned"
    with safe_open(path, framework="numpy") as handle:  # an ordinary safetensors file
        assert set(handle.keys()) == set(expected)
    before = path.read_bytes()
    save(path, model, coding)
    assert path.read_bytes() == before


def test_given_weights_refuses_what_is_not_its_model(
    tmp_path: Path, model: LlamaForCausalLM
) -> None:
    path = tmp_path / "m.safetensors"
    expected = save(path, model, codings.GIVEN_WEIGHTS)
    name = next(iter(expected))
    lacking = load_masks(path)
    lacking.check_whole()
    with pytest.raises(ArtifactError, match="weights of their base model.*--coding uniform"):
        lacking[name]
    with pytest.raises(ArtifactError, match="another base model than this Llama.*unpruned"):
        load_masks(path, model=larger(seed=7))
    with pytest.raises(ArgumentError, match="load_masks: model is 3: a loaded model or the path"):
        load_masks(path, model=3)
    with pytest.raises(ArgumentError, match="save_masks: model is None: the base model"):
        save_args = {"fingerprint": "f", "method": "m", "coding": codings.GIVEN_WEIGHTS}
        megamask.save_masks(path, expected, P24, **save_args)
    # A change of one weight, which the fingerprint does not see, and the decoder must.
    changed = larger()
    changed.load_state_dict(model.state_dict())
    weight = model_linears(changed)[name].weight
    with torch.no_grad():
        weight[1, 4:8] = torch.tensor([4.0, 3.0, 2.0, 1.0])
        weight[1, 8:12] = torch.tensor([1.0, 2.0, 3.0, 4.0])
    assert fingerprint_model(changed) == fingerprint_model(model), "a change that is not sampled"
    with pytest.raises(ArtifactError, match=f"mask of {name} does not fit the weights"):
        load_masks(path, model=changed)[name]


def test_masks_of_both_codings_are_applied_and_swapped(
    tmp_path: Path, model: LlamaForCausalLM
) -> None:
    path = tmp_path / "m.safetensors"
    expected = save(path, model, codings.GIVEN_WEIGHTS)
    state = {name: one.clone() for name, one in model.state_dict().items()}
    with megamask.swap(model, path):
        for name, mask in expected.items():
            weight = state[f"{name}.weight"]
            assert torch.equal(model_linears(model)[name].weight, weight.masked_fill(~mask, 0.0))
        shown = megamask.Masks(model, {"a": path})  # while the model shows a mask
        shown.use(None)
    live = tiny_copy(state)
    own = load_masks(path, model=live)  # of a model that shows masks when they are read
    with megamask.swap(live, own):
        shown = megamask.Masks(live, {"a": own})
        shown.use("a")
        for name, mask in expected.items():
            weight = state[f"{name}.weight"].masked_fill(~mask, 0.0)
            assert torch.equal(model_linears(live)[name].weight, weight)
        shown.use(None)
    assert all(torch.equal(one, state[name]) for name, one in live.state_dict().items())
    bound = load_masks(path, model=tiny_copy(state))
    other = tiny_copy(state)
    for _ in range(2):  # masks that know their weights fit a pruned model too
        megamask.apply_masks(other, bound)
    fresh = megamask.apply_masks(tiny_copy(state), path)
    for name, one in fresh.state_dict().items():
        assert torch.equal(one, other.state_dict()[name])
    with pytest.raises(ArtifactError, match="another base model"):
        megamask.apply_masks(fresh, path)  # pruned weights do not tell the mask


def tiny_copy(state: dict[str, torch.Tensor]) -> LlamaForCausalLM:
    model = larger()
    model.load_state_dict(state)
    return model


@pytest.mark.parametrize("coding", codings.CODED)
def test_damaged_files_give_the_mask_or_an_error(
    tmp_path: Path, model: LlamaForCausalLM, coding: str
) -> None:
    path = tmp_path / "m.safetensors"
    expected, choose, refused = save(path, model, coding), random.Random(0), 0
    whole, linears = path.read_bytes(), model_linears(model)
    for _ in range(80):
        data = bytearray(whole)
        for _ in range(choose.randint(1, 3)):
            data[choose.randrange(len(data))] = choose.randrange(256)
        path.write_bytes(data)
        try:
            masks = load_masks(path).with_weights(lambda name: linears[name].weight)
            found = {name: masks[name] for name in masks}
        except ArtifactError:
            refused += 1
        else:
            assert found.keys() == expected.keys()
            assert all(torch.equal(found[name], mask) for name, mask in expected.items())
    assert refused > 50


def test_words_of_another_mask_with_their_own_checksum_are_found(
    tmp_path: Path, model: LlamaForCausalLM
) -> None:
    """The checksum of the decoded mask is compared, beside that of the words."""
    path = tmp_path / "m.safetensors"
    save(path, model, codings.GIVEN_WEIGHTS)
    masks = load_masks(path, model=model)
    name, *rest = masks
    weight = model_linears(model)[name].weight
    other = P24.index_of(P24.best(weight.abs())).numpy().reshape(-1).astype(np.uint64)
    words = {one: masks._words(one) for one in rest}
    words[name] = ranked.encode(other, ranked.keys_of(weight), P24)
    meta = json.loads(json.dumps(masks.meta))
    meta["tensors"][name]["sha256"] = hashlib.sha256(words[name].tobytes()).hexdigest()
    meta["sha256"] = header_digest(meta)
    write_words(
        path, {one: len(part) for one, part in words.items()}, words.items(),
        lambda digests: json.dumps(meta),
    )  # fmt: skip
    with pytest.raises(ArtifactError, match="does not fit.*checksum of the mask"):
        load_masks(path, model=model)[name]


def pinned_masks() -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Weights and masks from integers alone, so that no generator of random numbers matters."""
    weights, masks = {}, {}
    for number, shape in enumerate([(64, 64), (40, 128)]):
        count = shape[0] * shape[1]
        mixed = (torch.arange(count, dtype=torch.int64) * (48271 + number)) % 65521
        weights[f"layer.{number}"] = ((mixed % 511) - 255).view(shape) / 256
        score = weights[f"layer.{number}"].abs() + ((mixed // 511) % 8).view(shape) / 32
        masks[f"layer.{number}"] = P24.best(score)
    return weights, masks


def test_the_format_is_that_of_the_pinned_file() -> None:
    """A file that this format version once wrote, read to the same masks, and written again to the
    same words.
    """
    weights, expected = pinned_masks()
    masks = load_masks(PINNED).with_weights(weights.__getitem__)
    assert masks.meta["format_version"] == 3 and masks.pattern == P24
    assert [codings.coding_of(masks.meta["tensors"][name]) for name in masks] == [
        codings.GIVEN_WEIGHTS,
        codings.GIVEN_WEIGHTS,
    ]
    for name, mask in expected.items():
        assert torch.equal(masks[name], mask)
        index = P24.index_of(mask).numpy().reshape(-1).astype(np.uint64)
        coding, words = codings.encode(index, P24, weights[name])
        assert coding == codings.GIVEN_WEIGHTS and np.array_equal(words, masks._words(name))
    uniform = radix.pack(index, P24.num_candidates)
    assert hashlib.sha256(uniform.tobytes()).hexdigest() == UNIFORM_DIGEST


def test_extract_converts_between_codings(tmp_path: Path, model: LlamaForCausalLM) -> None:
    plain, small, back = (tmp_path / f"{name}.safetensors" for name in ("plain", "small", "back"))
    save(plain, model, codings.WORDS)
    model.save_pretrained(tmp_path / "hf")
    there = load_config(None, [f"run_dir={tmp_path}", f"model.hf={tmp_path / 'hf'}"])
    given = {"snapshot": str(plain), "file": str(small), "coding": codings.GIVEN_WEIGHTS}
    extract.run(there, ExtractArguments(**given))
    inspect.run(there, InspectArguments(mask=str(small)))
    extract.run(there, ExtractArguments(snapshot=str(small), file=str(back)))
    assert back.read_bytes() == plain.read_bytes()
    assert not list(tmp_path.glob("*.margins"))  # the masks have none
    assert load_masks(small).lacks_weights and load_masks(small).size < load_masks(plain).size
    nowhere = load_config(None, [f"run_dir={tmp_path / 'none'}"])
    other = str(tmp_path / "other.safetensors")
    for changes, problem in (
        ({"snapshot": str(small), "coding": codings.UNIFORM}, "which are not given.*model.hf"),
        ({"coding": codings.GIVEN_WEIGHTS}, "config.json"),
    ):
        with pytest.raises(MegamaskError, match=problem):
            extract.run(nowhere, ExtractArguments(**{**given, "file": other, **changes}))
    larger(seed=3).save_pretrained(tmp_path / "hf")
    with pytest.raises(ArtifactError, match="another base model"):
        extract.run(there, ExtractArguments(snapshot=str(small), file=other))
    assert not Path(other).exists()
