"""Which tokens are targets when lm-evaluation-harness asks, against plain passes of the model."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import pytest
import torch

from megamask.data.tokenizer import TextTokenizer
from megamask.evaluate.loglikelihood import transformers_score
from tests.unit.evaluate.test_loglikelihood import LONGEST, SAME, scorer, tiny_llama
from tests.unit.learn.one_rank import VOCAB

NEEDS = "needs the extra eval: pip install -c constraints.txt -e '.[eval]'"
pytestmark = [pytest.mark.nightly, pytest.mark.skipif(find_spec("lm_eval") is None, reason=NEEDS)]
BOS = 1
# Shorter than the positions, as long, and longer by a part of a window and by whole windows.
TEXTS = [
    "".join(chr(97 + 7 * at % 26) for at in range(length))
    for length in (1, 5, LONGEST, LONGEST + 5, 3 * LONGEST)
]


def asked(*arguments: str) -> Any:
    from lm_eval.api.instance import Instance

    return Instance("loglikelihood", doc={}, arguments=arguments, idx=0)


def made(model: Any, begin: list[int]) -> Any:
    """The model as the harness calls it. A letter is a token."""
    from megamask.evaluate.harness import HarnessModel

    tokenizer = TextTokenizer(
        name="letters",
        vocab_size=VOCAB,
        eod=2,
        bos=BOS,
        fingerprint="",
        encode_batch=lambda texts: [[ord(one) for one in text] for text in texts],
    )
    return HarnessModel(scorer(transformers_score(model)), tokenizer, begin)


@torch.no_grad()
def plainly(model: Any, text: str) -> float:
    """The log-likelihood of the letters, and of nothing else, after a BOS."""
    stream, total = [BOS, *map(ord, text)], 0.0
    for target in range(1, len(stream)):
        # Targets come in windows; the inputs of a window end before its last target.
        end = min(-(-target // LONGEST) * LONGEST, len(text))
        first = max(end - LONGEST, 0)
        logits_SV = model(torch.tensor([stream[first:end]])).logits[0].double()
        total += float(logits_SV[target - 1 - first].log_softmax(-1)[stream[target]])
    return total


@pytest.mark.parametrize("begin", [[BOS], []])
def test_the_token_before_a_text_is_never_a_target(begin: list[int]) -> None:
    model = tiny_llama()
    ours = made(model, begin)
    found = ours.loglikelihood_rolling([asked(text) for text in [*TEXTS, ""]])
    assert found == pytest.approx([*(plainly(model, text) for text in TEXTS), 0.0], abs=SAME * 5)
    with torch.no_grad():
        twice = float(model(torch.tensor([[BOS]])).logits[0, 0].log_softmax(-1)[BOS])
    assert abs(twice) > SAME * 50  # a BOS among the targets would be seen

    # Without a context, and with white space for a context, the BOS alone comes before the answer.
    pairs = [asked("", TEXTS[1]), asked(" ", TEXTS[1])]
    expected = [plainly(model, TEXTS[1]), plainly(model, f" {TEXTS[1]}")]
    assert [one for one, _ in ours.loglikelihood(pairs)] == pytest.approx(expected, abs=SAME)
