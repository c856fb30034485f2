"""Sums of exponentials over a vocabulary that several ranks share: partition functions.

Shapes: T tokens, P ranks that share the vocabulary, K listed tokens of each rank.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class PartitionSums:
    """Partition function of a distribution over the vocabulary of all ranks, (T,).

    ``sum_T`` is the sum of exp((logit - top_T) / temperature). All ranks hold the same bits.
    """

    top_T: torch.Tensor
    sum_T: torch.Tensor
    temperature: float

    @staticmethod
    def of(tops_PT: torch.Tensor, sums_PT: torch.Tensor, temperature: float) -> PartitionSums:
        """From the largest logit of every rank, and its sum relative to that logit."""
        top_T = tops_PT.amax(0)
        sum_T = (sums_PT * ((tops_PT - top_T) / temperature).exp()).sum(0)
        return PartitionSums(top_T, sum_T, temperature)

    def share(self, logits_T: torch.Tensor) -> torch.Tensor:
        """The probabilities of tokens with these logits, (..., T)."""
        return ((logits_T - self.top_T) / self.temperature).exp() / self.sum_T

    def left(
        self,
        listed_PKT: torch.Tensor,
        named_PKT: torch.Tensor,
        tops_PT: torch.Tensor,
        tails_PT: torch.Tensor,
    ) -> torch.Tensor:
        """The probability of all tokens that are not named, (T,).

        These are the tokens of the lists that are not named, and the tails of all ranks.

        Args:
            listed_PKT: logits of the tokens in the lists of all ranks.
            named_PKT: which of these tokens are named.
            tops_PT: largest logit of each rank.
            tails_PT: sum over the tokens that are not in the rank's list, relative to its top.
        """
        listed_PT = self.share(listed_PKT).where(~named_PKT, 0).sum(1)
        return (listed_PT + tails_PT * self.share(tops_PT)).sum(0)

    def log_over(self, other: PartitionSums) -> torch.Tensor:
        """log(Z_self / Z_other), where Z is the whole sum of exp(logit / temperature), (T,)."""
        return (self.top_T - other.top_T) / self.temperature + (self.sum_T / other.sum_T).log()
