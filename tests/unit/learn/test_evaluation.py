"""The evaluation of hard masks while learning: the numbers of a model folded at once, in the memory
of one masked weight.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from megamask.learn.evaluation import hard_mask_perplexity
from megamask.learn.masked_model import MaskedModel
from megamask.model.perplexity import perplexity
from megamask.parallel import masked_linear
from megamask.parallel.mesh import Mesh
from tests.unit.learn.one_rank import VOCAB, tiny_config, tiny_masked_model

WINDOWS = {
    "code": torch.randint(VOCAB, (3, 16), generator=torch.Generator().manual_seed(5)),
    "prose": torch.randint(VOCAB, (2, 16), generator=torch.Generator().manual_seed(6)),
}


def folded_at_once(masked_model: MaskedModel, mesh: Mesh) -> dict[str, float]:
    """Perplexities of the model with the masked weights of all linears beside the weights."""
    linears = masked_model.linears.values()
    for linear in linears:
        linear.fold(linear.hard_mask())
    masked_model.model.eval()
    found = {
        domain: perplexity(masked_model.model, mesh, tokens, 2)
        for domain, tokens in WINDOWS.items()
    }
    for linear in linears:
        linear.fold(None)
    return found


@pytest.mark.parametrize("method", ["subset", "categorical"])
@pytest.mark.parametrize("block", [masked_linear.BLOCK, 1000])
def test_one_linear_at_a_time_gives_the_same_bits(
    method: str, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(masked_linear, "BLOCK", block)  # 1000: several blocks, the last shorter
    with tiny_masked_model(tiny_config({"method": method})) as (mesh, masked_model):
        linears: list[Any] = list(masked_model.linears.values())
        expected = folded_at_once(masked_model, mesh)
        seen = []
        hooks = [
            linear.register_forward_pre_hook(
                lambda one, _: seen.append(sum(each.folded_weight is not None for each in linears))
            )
            for linear in linears
        ]
        batches: list[int] = []
        found = hard_mask_perplexity(
            masked_model, mesh, WINDOWS, 2, lambda: batches.append(len(seen))
        )
        assert found == expected
        # A sign of life after each of the batches: two of code, one of prose.
        assert batches == [len(linears), 2 * len(linears), 3 * len(linears)]
        # The hooks ran before those that fold: no other linear holds a masked weight.
        assert set(seen) == {0} and len(seen) == 3 * len(linears)
        for hook in hooks:
            hook.remove()
        dense = perplexity(masked_model.model, mesh, WINDOWS["code"], 2)
        assert all(linear.folded_weight is None for linear in linears)
        assert dense != expected["code"]


def test_an_evaluation_that_fails_leaves_no_masked_weight() -> None:
    with tiny_masked_model(tiny_config()) as (mesh, masked_model):
        wrong = {"code": torch.full((1, 16), VOCAB + 9)}  # tokens that the model does not have
        with pytest.raises((IndexError, AssertionError)):
            hard_mask_perplexity(masked_model, mesh, wrong, 1)
        linear: Any = masked_model.linears["decoder.layers.1.mlp.linear_fc2"]
        with pytest.raises(RuntimeError, match="stop"):  # in the middle of a pass
            broken = {"code": WINDOWS["code"]}
            linear.register_forward_hook(lambda *_: (_ for _ in ()).throw(RuntimeError("stop")))
            hard_mask_perplexity(masked_model, mesh, broken, 1)
        assert all(one.folded_weight is None for one in masked_model.linears.values())
