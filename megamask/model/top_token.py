"""The most likely next token, over a vocabulary that several ranks share.

Shapes: T tokens, V real rows of the vocabulary on this rank, P ranks that share the vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from megamask.model.vocabulary import Objective, VocabularyShard, from_ranks

LARGEST_EXACT = 2**24  # integers up to this number are exact in fp32


@dataclass(frozen=True)
class WithTopToken:
    """An objective that also returns the id of the largest logit, (T,) int64, as its last number.

    Of equal logits the lowest id wins, at every tensor parallel size.
    """

    objective: Objective
    shard: VocabularyShard

    def __call__(
        self, logits_TV: torch.Tensor, tokens: slice, gradient: bool
    ) -> tuple[torch.Tensor, ...]:
        """The numbers of the objective and the ids, of a chunk of tokens."""
        top_T = top_tokens(logits_TV, self.shard)
        return (*self.objective(logits_TV, tokens, gradient), top_T)


def top_tokens(logits_TV: torch.Tensor, shard: VocabularyShard) -> torch.Tensor:
    """The token ids of the largest logits, (T,) int64, the same on all ranks; one collective."""
    assert shard.first + shard.real <= LARGEST_EXACT
    if logits_TV.shape[1]:
        largest_T, place_T = logits_TV.max(1)  # the first of equal logits
    else:
        largest_T = logits_TV.new_full((len(logits_TV),), -torch.inf)
        place_T = torch.zeros(len(logits_TV), dtype=torch.int64, device=logits_TV.device)
    own = [largest_T.float(), (place_T + shard.first).float()]
    largest_PT, ids_PT = from_ranks(own, shard).unbind(1)
    winner_T = largest_PT.argmax(0)  # the first of equal logits, and ranks have ascending ids
    return ids_PT.gather(0, winner_T[None])[0].long()
