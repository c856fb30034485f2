"""Shards know the global numbers of their groups: every shard's ids are that part of the whole
layer's.
"""

from __future__ import annotations

import pytest
import torch

from megamask.sparsity.shard import Placement, RowBlock

ROWS, GROUPS = 16, 8
WHOLE = torch.arange(ROWS * GROUPS).view(ROWS, GROUPS)


def test_whole_layer() -> None:
    assert torch.equal(Placement.whole(ROWS, GROUPS).group_ids(GROUPS), WHOLE)


@pytest.mark.parametrize("size", [1, 2, 4, 8])
def test_column_and_row_shards(size: int) -> None:
    rows, groups = ROWS // size, GROUPS // size
    for rank in range(size):
        column = Placement.shard(rows, GROUPS, axis=0, rank=rank, size=size)
        assert torch.equal(column.group_ids(GROUPS), WHOLE[rank * rows : (rank + 1) * rows])
        row = Placement.shard(ROWS, groups, axis=1, rank=rank, size=size)
        assert torch.equal(row.group_ids(groups), WHOLE[:, rank * groups : (rank + 1) * groups])


@pytest.mark.parametrize("size", [1, 2, 4, 8])
def test_gated_shards_hold_their_gate_rows_and_their_up_rows(size: int) -> None:
    part = ROWS // 2 // size
    for rank in range(size):
        gate, up = WHOLE[: ROWS // 2], WHOLE[ROWS // 2 :]
        mine = slice(rank * part, (rank + 1) * part)
        shard = Placement.shard(ROWS // size, GROUPS, axis=0, rank=rank, size=size, stride=2)
        assert torch.equal(shard.group_ids(GROUPS), torch.cat([gate[mine], up[mine]]))
        if size > 1:  # forgetting that fc1 is two stacked parts gives other ids
            plain = Placement.shard(ROWS // size, GROUPS, axis=0, rank=rank, size=size)
            assert not torch.equal(plain.group_ids(GROUPS), shard.group_ids(GROUPS))


def test_ids_beyond_32_bits() -> None:
    last_row = Placement((RowBlock(0, 1, 2**20 - 1),), first_group=2**13 - 2, groups_in_row=2**13)
    assert last_row.group_ids(2).tolist() == [[2**33 - 2, 2**33 - 1]]
