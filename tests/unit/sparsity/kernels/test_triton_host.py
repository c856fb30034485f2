"""How layers are cut into tiles."""

from __future__ import annotations

import importlib.util

import pytest

if importlib.util.find_spec("triton") is None:
    pytest.skip("triton is not installed", allow_module_level=True)

from megamask.sparsity.kernels.triton_host import THREADS, WIDTHS, Cut

# Groups of a row at 2:4: SmolLM2 144 and 384, LLaMA-2 7B 1,024 and 2,752, 13B 1,280 and 3,456,
# 70B 2,048 and 7,168; and rows that fill no tile.
GROUPS = (1, 37, 144, 384, 1024, 1280, 2048, 2752, 3456, 7168)


@pytest.mark.parametrize("several", [1, 4])
@pytest.mark.parametrize("groups", GROUPS)
def test_tiles_cover_every_group_once_and_little_more(groups: int, several: int) -> None:
    cut = Cut.of(4096, groups, several)
    assert cut.rows * cut.cols == THREADS * several
    across = -(-groups // cut.cols)
    assert across * cut.cols >= groups > (across - 1) * cut.cols
    down = -(-4096 // cut.rows)
    assert cut.programs(4096) * cut.tiles >= across * down
    best = min(-(-groups // width) * width for width in WIDTHS if width <= THREADS * several)
    assert across * cut.cols <= max(best, groups * 17 / 16)


def test_few_widths_serve_the_layers_of_all_llamas() -> None:
    llamas = GROUPS[4:]
    assert {Cut.of(4096, groups, 4).cols for groups in llamas} == {512, 256}


def test_a_small_layer_gives_each_tile_a_program() -> None:
    assert Cut.of(576, 144).tiles == 1 and Cut.of(1 << 20, 1024).tiles > 1
