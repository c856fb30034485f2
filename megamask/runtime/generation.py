"""The rate at which a loaded model generates text."""

from __future__ import annotations

import statistics
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from megamask.runtime.measure_speed import Device, in_turn
from megamask.runtime.sparse_kernels import bytes_of

MOST_ROUNDS = 3  # a generation takes seconds, and differs little from round to round


@dataclass(frozen=True)
class Generation:
    """The generation of answers to a batch of random prompts, by transformers' ``generate``.

    Attributes:
        prefill_ms: median milliseconds of the pass over the prompts, which makes the first tokens.
        decode_rate: tokens a second of all answers together after the first; None without such.
        rate: tokens a second, the pass over the prompts included.
        weight_bytes: of all parameters of the model.
        peak_bytes: the most bytes of tensors at once while it generates.
    """

    prefill_ms: float
    decode_rate: float | None
    rate: float
    weight_bytes: int
    peak_bytes: int

    def as_json(self) -> dict[str, Any]:
        """The values as ``speed.json`` holds them."""
        return asdict(self)


def random_prompts(vocab: int, batch: int, prompt: int, device: Device) -> Tensor:
    """Token ids (B, S), the same at each call."""
    made = torch.Generator().manual_seed(0)
    return torch.randint(vocab, (batch, prompt), generator=made).to(device.place)


@torch.no_grad()
def measure_generation(
    model: nn.Module, prompts: Tensor, generate: int, device: Device, rounds: int
) -> Generation:
    """Time the generation of ``generate`` tokens for each prompt, and of the first alone.

    Args:
        model: a transformers model on the device.
        prompts: token ids (B, S).
        generate: tokens of an answer, 1 or more.
        device: with the clock.
        rounds: how often both are timed, in turn, at most ``MOST_ROUNDS`` times.
    """
    from transformers import GenerationConfig

    def answers(count: int) -> Tensor:
        plan = GenerationConfig(
            max_new_tokens=count, min_new_tokens=count, do_sample=False, pad_token_id=0
        )
        everywhere = torch.ones_like(prompts)
        run: Any = model
        found: Tensor = run.generate(prompts, attention_mask=everywhere, generation_config=plan)
        return found

    batch, length = prompts.shape
    assert answers(generate).shape[1] == length + generate  # no token ends an answer early
    device.peak_bytes()
    sides = {"first": lambda: answers(1), "all": lambda: answers(generate)}
    seconds = {
        side: statistics.median(times)
        for side, times in in_turn(device.now, sides, min(rounds, MOST_ROUNDS), 0).items()
    }
    later = seconds["all"] - seconds["first"]
    return Generation(
        prefill_ms=seconds["first"] * 1e3,
        decode_rate=batch * (generate - 1) / later if generate > 1 and later > 0 else None,
        rate=batch * generate / seconds["all"],
        weight_bytes=sum(bytes_of(one) for one in model.parameters()),
        peak_bytes=device.peak_bytes(),
    )


@torch.no_grad()
def likely_tokens(model: Any, prompts: Tensor) -> Tensor:
    """The most likely next token at each place of the first prompt, (S,)."""
    found: Tensor = model(prompts[:1]).logits[0].argmax(-1)
    return found
