"""The keyed generator against the published known answers (Random123's kat_vectors) and against a
second implementation.
"""

from __future__ import annotations

import numba
import numpy as np
import pytest
import torch

from megamask.sparsity.kernels import numba_math
from megamask.sparsity.noise import NoiseKey, parameter_ids, philox, uniform, words
from tests.unit.sparsity.categorical.reference import group_words, philox4x32

ONES = 0xFFFFFFFF
KNOWN_ANSWERS = [  # counter, key, words
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((ONES,) * 4, (ONES,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@numba.njit  # type: ignore[misc, untyped-decorator]
def _kernel_words(counter, key):  # type: ignore[no-untyped-def]
    return numba_math.mix(
        counter[0], np.uint64(0), counter[1], counter[2], counter[3], key[0], key[1]
    )


@pytest.mark.parametrize(("counter", "key", "answer"), KNOWN_ANSWERS)
def test_known_answers(
    counter: tuple[int, ...], key: tuple[int, int], answer: tuple[int, ...]
) -> None:
    assert (
        tuple(int(word) for word in philox(tuple(torch.tensor(c) for c in counter), key)) == answer
    )
    kernel = _kernel_words(np.array(counter, np.uint64), np.array(key, np.uint64))
    assert tuple(int(word) for word in kernel) == answer
    assert philox4x32(counter, key) == answer
    assert (
        tuple(
            int(word)
            for word in philox(tuple(torch.tensor(c) for c in counter[::-1]), (key[0], key[1] ^ 1))
        )
        != answer
    )


def test_every_part_of_the_key_and_the_counter_is_used_where_the_layout_says() -> None:
    groups = torch.tensor([[0, 1, 5], [ONES, ONES + 1, 3 * 2**32 + 7]])  # ids beyond 32 bits too
    key = NoiseKey(seed=11, step=22, micro_batch=33, parameter=44)
    expected = [[group_words(key, int(group), 6) for group in row] for row in groups]
    assert torch.equal(words(key, groups, 6), torch.tensor(expected).permute(2, 0, 1))
    for other in (
        NoiseKey(12, 22, 33, 44),
        NoiseKey(11, 23, 33, 44),
        NoiseKey(11, 22, 34, 44),
        NoiseKey(11, 22, 33, 45),
    ):
        assert (words(other, groups, 6) != words(key, groups, 6)).all()


def test_fewer_words_are_the_first_of_more() -> None:
    key, groups = NoiseKey(1, 2), torch.arange(10)
    assert torch.equal(words(key, groups, 3), words(key, groups, 70)[:3])


def test_uniforms_are_exact_and_never_0_or_1() -> None:
    word = torch.tensor([0, 511, 512, ONES, 2**31])
    u = uniform(word)
    assert u.dtype == torch.float32
    assert u.double().tolist() == [
        (w // 512 + 0.5) / 2**23 for w in word.tolist()
    ]  # 24 significant bits fit fp32: no rounding
    assert float(u.min()) > 0
    assert float(u.max()) < 1
    assert torch.isfinite(-torch.log(-torch.log(u))).all()


def test_uniforms_are_uniform() -> None:
    u = uniform(words(NoiseKey(5, 6), torch.arange(50_000), 4)).double().flatten()
    # Mean 1/2 and variance 1/12 of 2e5 samples: standard errors 6.5e-4 and 1.7e-4. Five of each.
    assert abs(float(u.mean()) - 0.5) < 5 * 6.5e-4
    assert abs(float(u.var()) - 1 / 12) < 5 * 1.7e-4


def test_parameter_ids_differ_and_do_not_depend_on_order() -> None:
    names = [f"decoder.layers.{layer}.mlp.linear_fc{i}" for layer in range(50) for i in (1, 2)]
    ids = parameter_ids(names)
    assert len(set(ids.values())) == len(names)
    assert parameter_ids(names[::-1]) == ids
    assert parameter_ids(names[:10]) == {name: ids[name] for name in names[:10]}
