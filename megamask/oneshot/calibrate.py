"""The hidden states of the calibration samples, and the statistics of the inputs of each linear.

Shapes: N samples, S sequence (the slice of a rank under sequence parallel), B micro-batch,
H hidden, T tokens, I in_features.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress

import torch
import torch.distributed as dist

from megamask.model.language_model import LanguageModel, positions
from megamask.oneshot.stats import InputStats
from megamask.parallel.masked_linear import MaskedLinear
from megamask.parallel.mesh import Mesh


class HiddenStates:
    """The inputs of the next decoder layer, for all samples of this data-parallel replica.

    All hidden states stay in memory on ``mesh.device``: N / dp * S * H values in the model's dtype,
    where S is a slice of the samples' length under sequence parallel.

    Args:
        model: the model whose embedding makes the first hidden states.
        tokens_NS: the samples, equal on all ranks; micro-batches are dealt to the replicas in turn.
        micro_batch: number of samples that run through a layer together.
        mesh: process groups and device of this rank.
    """

    def __init__(
        self, model: LanguageModel, tokens_NS: torch.Tensor, micro_batch: int, mesh: Mesh
    ) -> None:
        own = torch.split(tokens_NS, micro_batch)[mesh.dp_rank :: mesh.dp]
        batches = [tokens_BS.to(mesh.device) for tokens_BS in own]
        self._batches_SBH: list[torch.Tensor] = [
            model.embedding(tokens_BS, positions(tokens_BS)) for tokens_BS in batches
        ]
        self._rotary = model.rotary_angles(tokens_NS.shape[1])

    def feed(self, layer: torch.nn.Module, linears: Collection[MaskedLinear]) -> None:
        """Run ``layer`` on all samples for the hooks of its ``linears``; the hidden states do not
        change. A forward pass ends when all of them have their inputs: nobody reads the output.
        """
        waiting: set[MaskedLinear] = set()

        def has_input(linear: MaskedLinear, _: tuple[torch.Tensor, ...]) -> None:
            waiting.discard(linear)
            if not waiting:
                raise _AllHaveInputs

        with _pre_hooks((linear, has_input) for linear in linears):  # after the hooks that count
            for hidden_SBH in self._batches_SBH:
                waiting.update(linears)
                with suppress(_AllHaveInputs):
                    self._output(layer, hidden_SBH)

    def advance(self, layer: torch.nn.Module) -> None:
        """Replace the hidden states by the outputs of ``layer``."""
        for index, hidden_SBH in enumerate(self._batches_SBH):
            self._batches_SBH[index] = self._output(layer, hidden_SBH)

    @property
    def batches(self) -> list[torch.Tensor]:
        """The hidden states of now, (S, B, H) for each micro-batch of this replica."""
        return list(self._batches_SBH)

    def output(self, layer: torch.nn.Module, number: int) -> torch.Tensor:
        """The output of ``layer`` for micro-batch ``number``, differentiable by its weights; the
        hidden states do not change.
        """
        hidden_SBH = self._batches_SBH[number]
        if torch.is_grad_enabled():  # a recomputed part asks its input for a gradient
            hidden_SBH = hidden_SBH.detach().requires_grad_()
        return self._output(layer, hidden_SBH)

    def _output(self, layer: torch.nn.Module, hidden_SBH: torch.Tensor) -> torch.Tensor:
        output_SBH: torch.Tensor = layer(
            hidden_SBH, attention_mask=None, rotary_pos_emb=self._rotary
        )[0]
        return output_SBH


class _AllHaveInputs(Exception):  # noqa: N818 - ends a forward pass, and is no error
    """Every linear that is counted has seen its input."""


@contextmanager
def _pre_hooks(hooks: Iterable[tuple[MaskedLinear, Callable[..., None]]]) -> Iterator[None]:
    """Call ``hook(linear, inputs)`` before each linear of ``hooks`` computes inside the block."""
    with ExitStack() as stack:
        for linear, hook in hooks:
            handle = linear.register_forward_pre_hook(hook)  # type: ignore[attr-defined]
            stack.callback(handle.remove)
        yield


@contextmanager
def input_stats(
    linears: Mapping[str, MaskedLinear], hessian: bool, mesh: Mesh, sequence_parallel: bool
) -> Iterator[dict[str, InputStats]]:
    """Collect statistics of the inputs of ``linears`` while the block runs.

    Yields name -> statistics, which are complete after the block. They cover the whole input, all
    in_features and all tokens, and are equal on all ranks: the ranks of a replica divide its tokens
    among them, and the sums of all ranks are added at the end. The tokens of an expert are those
    that were routed to it; an expert without any gets the statistics of inputs that are all alike
    (``is_stand_in``). All ranks must enter and leave the block.
    """
    stats = {
        name: InputStats(whole_in_features(linear, mesh), hessian, mesh.device)
        for name, linear in linears.items()
    }
    hooks = (
        (linear, _counting(linear, stats[name], mesh, sequence_parallel))
        for name, linear in linears.items()
    )
    with _pre_hooks(hooks):
        yield stats
    for sums in stats.values():
        _add_over_ranks(sums, mesh)
    for name, sums in stats.items():
        if linears[name].is_expert and sums.tokens == 0:
            sums.assume_alike()


def whole_in_features(linear: MaskedLinear, mesh: Mesh) -> int:
    """I of the unsharded linear."""
    return linear.weight.shape[1] * (mesh.tp if linear.shard_axis == 1 else 1)


def _counting(
    linear: MaskedLinear, stats: InputStats, mesh: Mesh, sequence_parallel: bool
) -> Callable[..., None]:
    """A hook that adds this rank's share of the tokens to ``stats``.

    All ranks of a replica see the same tokens, except in front of a column-parallel linear under
    sequence parallel, where each rank sees its own slice.
    """

    def count(_: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        x_TI = inputs[0].flatten(0, -2)
        if linear.shard_axis == 1:
            parts = mesh.gather_over_tp(x_TI)
            x_TI = torch.cat(parts, dim=-1) if len(parts) > 1 else x_TI
        elif sequence_parallel and not linear.is_expert:
            stats.add(x_TI)
            return
        stats.add(x_TI.tensor_split(mesh.tp)[mesh.tp_rank])

    return count


def _add_over_ranks(stats: InputStats, mesh: Mesh) -> None:
    if mesh.world == 1:
        return
    tokens = torch.tensor(stats.tokens, device=mesh.device)
    for total in (tokens, stats.sum_square_I, stats.sum_outer_II):
        if total is not None:
            dist.all_reduce(total)
    stats.tokens = int(tokens)
