"""AdamW with 8-bit moments: torchao's AdamW8bit (Dettmers et al., 2022, block-wise quantization),
an optional dependency.

Made for CUDA: on a CPU its code lookups took about 140 ns a logit where Lion took 2 (one busy
core). It compiles its update (torch.compile), so it needs a C++ compiler on CPUs and Triton on
CUDA. Its scales belong to 256 consecutive logits of the local shard and its stochastic rounding
draws from PyTorch's generator, which is seeded here from (seed, step, parameter): a resume in the
same layout is exact, but unlike Lion it does not learn the same bits in another layout.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import zlib
from collections.abc import Sequence
from typing import Any

import torch

from megamask.config.tree import OptimizerSection
from megamask.errors import ConfigError
from megamask.optim.base import MaskOptimizer
from megamask.parallel.masked_linear import MaskedLinear

KEY, NAME = "learn.optimizer.kind", "adamw8bit"
_MOMENTS = ("exp_avg", "exp_avg_sq")


def check_available(device: str) -> None:
    """Check that AdamW8bit can run on ``device`` ("cpu" or "cuda").

    Raises:
        ConfigError: torchao or the compiler that it needs is missing.
    """
    if importlib.util.find_spec("torchao") is None:
        fix = "Install torchao: pip install 'megamask[eight-bit]'. Or use lion8bit."
        raise ConfigError(KEY, NAME, "an optimizer that is installed", fix)
    if device == "cuda" and importlib.util.find_spec("triton") is None:
        raise ConfigError(
            KEY,
            NAME,
            "an optimizer that can be compiled",
            "Install triton. Or use lion8bit, which needs no compiler.",
        )
    compiler = os.environ.get("CXX", "g++")
    if device == "cpu" and not (shutil.which(compiler) or shutil.which("clang++")):
        fix = "Install a C++ compiler or name it in the environment variable CXX. Or use lion8bit, which needs none."
        raise ConfigError(
            KEY, NAME, f"an optimizer that can be compiled, but {compiler} is not there", fix
        )


class AdamW8bit(MaskOptimizer):
    """1 byte a moment and 1/64 byte of scales. A layer of few logits, or not a multiple of 256,
    keeps them in the dtype of its logits.
    """

    def __init__(
        self, section: OptimizerSection, linears: Sequence[MaskedLinear], seed: int
    ) -> None:
        super().__init__(section, linears, seed)
        from torchao.optim import AdamW8bit as TorchAdamW8bit

        decay = section.weight_decay
        self.torchao = TorchAdamW8bit(
            self.logits,
            lr=0.0,
            betas=section.betas,
            eps=section.eps,
            weight_decay=decay,
            bf16_stochastic_round=True,
        )
        for logits in self.logits:
            moments = {
                name: self.torchao._new_buffer(logits, signed=name == "exp_avg")
                for name in _MOMENTS
            }
            self.torchao.state[logits] = {"step": torch.tensor(0.0), **moments}

    @torch.no_grad()
    def step(self, step: int, rate: float, clip_factor: torch.Tensor) -> None:
        """One parameter at a time, so that only one has a clipped gradient of its own dtype beside
        ``main_grad``.
        """
        self.torchao.param_groups[0]["lr"].fill_(rate)
        devices = [clip_factor.device] if clip_factor.device.type == "cuda" else []
        with torch.random.fork_rng(devices):
            for linear, logits in zip(self.linears, self.logits, strict=True):
                torch.manual_seed(zlib.crc32(f"{self.seed} {step} {linear.parameter_id}".encode()))
                grad: torch.Tensor = logits.main_grad  # type: ignore[attr-defined]
                logits.grad = grad.mul_(clip_factor).to(logits.dtype)
                self.torchao.step()
                logits.grad = None

    def state_tensors(self) -> list[torch.Tensor]:
        """Codes, scales and code tables of the moments."""
        whole = [self.torchao.state[logits][name] for logits in self.logits for name in _MOMENTS]
        return [
            part
            for one in whole
            for part in (_parts(one).values() if _is_quantized(one) else [one])
        ]

    def moments(self) -> dict[str, list[torch.Tensor]]:
        """Per moment its codes, and every logit's scale: together exact in any layout, at 5 bytes a
        logit while a snapshot is written.
        """
        found: dict[str, list[torch.Tensor]] = {}
        for name in _MOMENTS:
            states = [self.torchao.state[logits][name] for logits in self.logits]
            found[f"{name}.code"] = [one.codes if _is_quantized(one) else one for one in states]
            found[f"{name}.scale"] = [
                _scale_of_each(one) if _is_quantized(one) else torch.ones_like(one)
                for one in states
            ]
        return found

    @torch.no_grad()
    def load_moments(self, moments: dict[str, list[torch.Tensor]], steps: int) -> None:
        """Exact where every block comes back with one scale, as in the layout that saved it; else
        quantized again, to within 1 % of it.
        """
        for name in _MOMENTS:
            for logits, codes, scales in zip(
                self.logits, moments[f"{name}.code"], moments[f"{name}.scale"], strict=True
            ):
                state = self.torchao.state[logits][name]
                self.torchao.state[logits]["step"].fill_(steps)
                _load(state, codes, scales)

    def steps_done(self) -> int:
        """Updates so far, for the bias correction."""
        return int(self.torchao.state[self.logits[0]]["step"]) if self.logits else 0


def _is_quantized(moment: Any) -> bool:
    return hasattr(moment, "codes")


def _parts(moment: Any) -> dict[str, torch.Tensor]:
    return {"codes": moment.codes, "scale": moment.scale, "qmap": moment.qmap}


def _scale_of_each(moment: Any) -> torch.Tensor:
    """Each element's scale, fp32, in the shape of the logits."""
    whole: torch.Tensor = (
        moment.scale[:, None].expand(-1, moment.block_size).reshape(moment.codes.shape)
    )
    return whole


def _load(state: Any, codes: torch.Tensor, scales: torch.Tensor) -> None:
    """Fill a moment from codes and each element's scale."""
    if not _is_quantized(state):
        state.copy_(codes)
        return
    blocks = scales.reshape(-1, state.block_size)
    if bool((blocks == blocks[:, :1]).all()):
        state.codes.copy_(codes)
        state.scale.copy_(blocks[:, 0])
    else:
        state.copy_(state.qmap[codes.int()] * scales)
