"""How layers are cut into tiles."""

from __future__ import annotations

import importlib.util

import pytest

if importlib.util.find_spec("triton") is None:
    pytest.skip("triton is not installed", allow_module_level=True)

from megamask.sparsity.kernels.triton_host import MANY_GROUPS, THREADS, WIDTHS, Cut

# Groups of a row at 2:4: SmolLM2 144 and 384, LLaMA-2 7B 1,024 and 2,752, 13B 1,280 and 3,456,
# 70B 2,048 and 7,168; and rows that fill no tile.
GROUPS = (1, 37, 144, 384, 1024, 1280, 2048, 2752, 3456, 7168)


BIG, SMALL = MANY_GROUPS, 576  # rows: a layer with many groups at any width, and one with few


@pytest.mark.parametrize(("rows", "several", "held"), [(BIG, 1, 1), (BIG, 4, 4), (SMALL, 4, 1)])
@pytest.mark.parametrize("groups", GROUPS)
def test_tiles_cover_every_group_once_and_little_more(
    groups: int, rows: int, several: int, held: int
) -> None:
    """A thread holds several groups at once where the layer is big, and one where it is small."""
    cut = Cut.of(rows, groups, several)
    assert cut.rows * cut.cols == THREADS * held
    assert cut.tiles * held == (4 if rows == BIG else 1)
    across = -(-groups // cut.cols)
    assert across * cut.cols >= groups > (across - 1) * cut.cols
    down = -(-rows // cut.rows)
    assert cut.programs(rows) * cut.tiles >= across * down
    best = min(-(-groups // width) * width for width in WIDTHS if width <= THREADS * held)
    assert across * cut.cols <= max(best, groups * 17 / 16)


def test_few_widths_serve_the_layers_of_all_llamas() -> None:
    llamas = GROUPS[4:]
    assert {Cut.of(4096, groups, 4).cols for groups in llamas} == {512, 256}


def test_a_small_layer_gives_each_tile_a_program() -> None:
    """SmolLM2's 576 x 576 has as many programs as with kernels of one group a thread."""
    assert Cut.of(576, 144).tiles == 1 and Cut.of(1 << 20, 1024).tiles > 1
    assert Cut.of(576, 144, 4) == Cut.of(576, 144, 1) and Cut.of(576, 144, 4).programs(576) == 720
    assert Cut.of(1 << 20, 1024, 4).programs(1 << 20) == 1 << 21
