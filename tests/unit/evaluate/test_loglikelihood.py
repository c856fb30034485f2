"""Log-likelihoods of continuations against one plain pass for each pair, without the harness."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from megamask.errors import ArtifactError, ConfigError
from megamask.evaluate.loglikelihood import Pair, Scorer, megatron_score, transformers_score
from megamask.model.language_model import LanguageModel
from megamask.parallel.mesh import Mesh
from tests.unit.learn.one_rank import VOCAB, tiny_config, tiny_masked_model

LONGEST = 24
SAME = 1e-4  # fp32 sums of up to 24 losses of about 6 in another order


def pairs() -> list[Pair]:
    """Pairs of many lengths: empty contexts' prefix alone, and contexts that are too long."""
    choose = random.Random(3)
    shapes = [(1, 1), (5, 3), (2, 9), (LONGEST, 4), (40, 1), (1, LONGEST), (3, 0), (7, 2)]
    return [
        ([choose.randrange(VOCAB) for _ in range(a)], [choose.randrange(VOCAB) for _ in range(b)])
        for a, b in shapes
    ]


def plainly(logits_of: Any, pair: Pair) -> tuple[float, bool]:
    """One pair alone: the sum of log-probabilities, and whether every target is the largest."""
    context, continuation = pair
    ids = (context + continuation)[-(LONGEST + 1) :]
    logits_SV = logits_of(torch.tensor([ids[:-1]]))[0].float()
    found = [
        (float(logits_SV[at - 1].log_softmax(-1)[ids[at]]), int(logits_SV[at - 1].argmax()))
        for at in range(len(ids) - len(continuation), len(ids))
    ]
    greedy = all(top == one for (_, top), one in zip(found, continuation, strict=True))
    return sum(one for one, _ in found), greedy


@pytest.fixture(scope="module")
def model() -> Iterator[LanguageModel]:
    config = tiny_config().model_copy(update={"dtype": "fp32"})
    with tiny_masked_model(config) as (_, masked_model):
        for linear in masked_model.linears.values():
            linear.fold(linear.hard_mask())
        yield masked_model.model.eval()


def scorer(score: Any, micro_batch: int = 3, multiple: int = 1) -> Scorer:
    where = Path("weights"), score, torch.device("cpu")
    return Scorer("dense", *where, LONGEST, micro_batch, multiple)


@torch.no_grad()
def test_batches_score_as_each_pair_alone(model: LanguageModel) -> None:
    def logits_of(tokens_BS: torch.Tensor) -> torch.Tensor:
        return model.full_logits(tokens_BS, VOCAB)

    asked = pairs()
    context = asked[1][0]
    best = [int(logits_of(torch.tensor([context]))[0, -1].argmax())]
    asked.append((context, best))
    expected = [plainly(logits_of, pair) for pair in asked]
    assert [greedy for _, greedy in expected][-1] and not expected[1][1]
    for micro_batch, multiple in ((3, 1), (len(asked), 4), (1, 1)):
        found = scorer(megatron_score(model), micro_batch, multiple)(asked)
        assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]
        for (one, _), (other, _) in zip(found, expected, strict=True):
            assert one == pytest.approx(other, abs=SAME)
    assert found[6] == (0.0, True)  # nothing to say
    # Of a context that is too long the first tokens go, and not the last.
    first_kept = (asked[4][0][:LONGEST], asked[4][1])
    wrong = scorer(megatron_score(model))([first_kept])[0][0]
    assert wrong != pytest.approx(found[4][0], abs=10 * SAME)
    same = (asked[4][0][-LONGEST:], asked[4][1])
    assert scorer(megatron_score(model))([same])[0][0] == pytest.approx(found[4][0], abs=SAME)


def tiny_llama() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    shape: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
    shape |= {"num_attention_heads": 2, "num_key_value_heads": 2, "vocab_size": VOCAB}
    return LlamaForCausalLM(LlamaConfig(**shape)).eval()


@torch.no_grad()
def test_a_model_of_transformers_is_scored_by_the_same_rule() -> None:
    model = tiny_llama()
    found = scorer(transformers_score(model))(pairs())
    for (one, is_greedy), pair in zip(found, pairs(), strict=True):
        likelihood, greedy = plainly(lambda tokens: model(tokens).logits, pair)
        assert one == pytest.approx(likelihood, abs=SAME) and is_greedy == greedy


def test_an_answer_that_the_model_cannot_read_is_refused(model: LanguageModel) -> None:
    with pytest.raises(ConfigError, match=r"a continuation of 25 tokens.*at most 24 tokens"):
        scorer(megatron_score(model))([([1], [2] * 25)])


@pytest.mark.parametrize("rank", [0, 1])
def test_every_replica_refuses_the_answer_that_another_would_score(rank: int) -> None:
    """The long pair is the first of the order, so replica 0 scores it. A replica that went on
    would call ``score`` and then wait in the all-reduce.
    """
    score: Any = None
    mesh = Mesh(torch.device("cpu"), rank=rank, world=2, tp=1, tp_rank=0, dp=2, dp_rank=rank)
    with pytest.raises(ConfigError, match="a continuation of 25 tokens"):
        replace(scorer(score, 1), mesh=mesh)([([1], [2]), ([1], [2] * 25)])


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_outputs_that_are_not_finite_are_no_accuracy(number: float) -> None:
    model = tiny_llama()
    with torch.no_grad():
        model.lm_head.weight[3] = number
    with pytest.raises(ArtifactError, match=r"^weights: give outputs .* on the tasks \(row dense"):
        scorer(transformers_score(model))([([1], [2, 4])])
