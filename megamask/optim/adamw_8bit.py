"""AdamW with 8-bit moments: torchao's AdamW8bit (Dettmers et al., 2022, "8-bit Optimizers via
Block-wise Quantization"), an optional dependency.

It is made for CUDA. On one busy CPU core its code look-ups took about 140 ns a logit, Lion 2. It
compiles its update by torch.compile, which needs a C++ compiler on CPUs and Triton on CUDA.

A scale belongs to 256 consecutive logits of the local shard. Stochastic rounding draws from
PyTorch's generator, which is seeded here from (seed, step, parameter). A resume in the same layout
is therefore exact, but another layout learns other bits, unlike Lion.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import zlib
from collections.abc import Sequence
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch

from megamask.config.learn_tree import OptimizerSection
from megamask.errors import ConfigError
from megamask.optim.base import MaskOptimizer, UpdateRule

if TYPE_CHECKING:
    from megamask.parallel.masked_linear import MaskedLinear

BLOCK = 256  # consecutive logits that share one fp32 scale
_MOMENTS = ("exp_avg", "exp_avg_sq")


class AdamW8bit(MaskOptimizer):
    """torchao's AdamW8bit. A moment takes 1 byte a logit and 1/64 byte of scales. A layer of fewer
    than 4,096 logits, or of a number that 256 does not divide, keeps its moments in the dtype of
    its logits.
    """

    def __init__(
        self,
        section: OptimizerSection,
        linears: Sequence[MaskedLinear],
        seed: int,
        epsilon: float = 1e-8,
    ) -> None:
        super().__init__(section, linears, seed)
        from torchao.optim import AdamW8bit as TorchAdamW8bit

        self.torchao = TorchAdamW8bit(
            self.logits,
            lr=0.0,
            betas=section.decays,
            eps=epsilon,
            weight_decay=section.weight_decay,
            bf16_stochastic_round=True,
            block_size=BLOCK,
        )
        # The code tables of the moments, by whether a moment is signed.
        sample = torch.empty(BLOCK**2, device=self.logits[0].device if self.logits else "cpu")
        self.tables: dict[str, torch.Tensor] = {
            name: self.torchao._new_buffer(sample, signed=name == "exp_avg").qmap
            for name in _MOMENTS
        }
        for logits in self.logits:
            moments = {
                name: self.torchao._new_buffer(logits, signed=name == "exp_avg")
                for name in _MOMENTS
            }
            self.torchao.state[logits] = {"step": torch.tensor(0.0), **moments}

    @torch.no_grad()
    def step(self, step: int, rate: float, clip_factor: torch.Tensor) -> None:
        """Update one parameter after the other: then only one of them has a clipped gradient in the
        dtype of its logits beside ``main_grad``.
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
        return [
            part
            for logits in self.logits
            for name in _MOMENTS
            for part in _parts(self.torchao.state[logits][name])
        ]

    def moments(self) -> dict[str, list[torch.Tensor]]:
        """The codes of each moment, and the scale of each logit. Both together are exact in any
        layout: a moment that is not quantized here is the scale of the code of 1, because another
        layout may quantize it. They take 5 bytes a logit while a snapshot is written, 4 of them on
        the host.
        """
        found: dict[str, list[torch.Tensor]] = {}
        for name in _MOMENTS:
            states = [self.torchao.state[logits][name] for logits in self.logits]
            code_of_1 = int((self.tables[name] == 1).nonzero()[0])
            found[f"{name}.code"] = [
                one.codes
                if _is_quantized(one)
                else torch.full_like(one, code_of_1, dtype=torch.uint8)
                for one in states
            ]
            found[f"{name}.scale"] = [
                (_scale_of_each(one) if _is_quantized(one) else one.float()).cpu() for one in states
            ]
        return found

    @torch.no_grad()
    def load_moments(self, moments: dict[str, list[torch.Tensor]], steps: int) -> None:
        """Restore the moments. A block whose logits all have one scale, as in the layout of the
        snapshot, is exact. Other moments are quantized again, to within 1 % of the largest of a
        block.
        """
        for name in _MOMENTS:
            for logits, codes, scales in zip(
                self.logits, moments[f"{name}.code"], moments[f"{name}.scale"], strict=True
            ):
                state = self.torchao.state[logits][name]
                self.torchao.state[logits]["step"].fill_(steps)
                _load(state, codes, scales, self.tables[name])

    def steps_done(self) -> int:
        """The number of updates so far, for the bias correction."""
        return int(self.torchao.state[self.logits[0]]["step"]) if self.logits else 0


class AdamW8bitRule(UpdateRule):
    """AdamW with two 8-bit moments and an fp32 scale per 256 logits of each."""

    name = "adamw8bit"
    has_epsilon = True
    has_short_means = True

    def check(self, device: str) -> None:
        """Check for torchao and the compiler that it needs.

        Raises:
            ConfigError: torchao, Triton (on CUDA) or a C++ compiler (on CPUs) is missing.
        """
        if importlib.util.find_spec("torchao") is None:
            install = "pip install -c constraints.txt -e '.[eight-bit]'"
            fix = f"Install torchao: {install}. Or use lion8bit."
            raise self._missing("an optimizer that is installed", fix)
        if device == "cuda" and importlib.util.find_spec("triton") is None:
            fix = "Install triton. Or use lion8bit, which needs no compiler."
            raise self._missing("an optimizer that can be compiled", fix)
        compiler = os.environ.get("CXX", "g++")
        if device == "cpu" and not (shutil.which(compiler) or shutil.which("clang++")):
            fix = (
                "Install a C++ compiler or name it in the environment variable CXX. "
                "Or use lion8bit, which needs none."
            )
            raise self._missing(
                f"an optimizer that can be compiled, but {compiler} is not there", fix
            )

    def try_out(self, device: torch.device, logits_dtype: torch.dtype) -> None:
        """A step on one quantized layer."""
        logits = torch.nn.Parameter(torch.zeros(BLOCK, 4, 4, dtype=logits_dtype, device=device))
        logits.main_grad = torch.ones_like(logits, dtype=torch.float32)  # type: ignore[attr-defined]
        linear: Any = SimpleNamespace(mask_logits=logits, parameter_id=0)
        section = OptimizerSection.model_validate({"kind": self.name, "betas": [0.9, 0.95]})
        optimizer = AdamW8bit(section, [linear], seed=0)
        optimizer.step(0, 1e-3, torch.tensor(1.0, device=device))
        if not bool(logits.detach().float().abs().gt(0).all()):
            raise RuntimeError("the compiled step left logits as they were")

    def _missing(self, allowed: str, fix: str) -> ConfigError:
        return ConfigError("learn.optimizer.kind", self.name, allowed, fix)

    def moment_bytes(self, logits_dtype: str, logits_per_group: int) -> float:
        """Two moments of 1 byte and a share of a scale. Tables of 256 entries do not count: they do
        not grow with the logits.
        """
        return 2 * (1 + 4 / BLOCK)

    def saved_bytes(self, logits_dtype: str, logits_per_group: int) -> float:
        """Two moments of a code and an fp32 scale for each logit."""
        return 10.0

    def copied_bytes(self) -> float:
        """The fp32 scales."""
        return 8.0

    def build(
        self,
        section: OptimizerSection,
        linears: Sequence[MaskedLinear],
        seed: int,
        *,
        use_kernels: bool,
        logits_dtype: str,
        epsilon: float,
    ) -> MaskOptimizer:
        """torchao's optimizer, for logits of either dtype."""
        return AdamW8bit(section, linears, seed, epsilon)


def _is_quantized(moment: Any) -> bool:
    """Whether torchao stores this moment in 8 bits."""
    return hasattr(moment, "codes")


def _parts(moment: Any) -> list[torch.Tensor]:
    """The tensors that store a moment."""
    return [moment.codes, moment.scale, moment.qmap] if _is_quantized(moment) else [moment]


def _scale_of_each(moment: Any) -> torch.Tensor:
    """The fp32 scale of each logit, in the shape of the logits, in memory of its own: where a block
    is whole rows, an expanded scale has that shape as it is, and could not be read back.
    """
    of_blocks = moment.scale[:, None].expand(-1, moment.block_size)
    whole: torch.Tensor = of_blocks.reshape(moment.codes.shape).contiguous()
    return whole


def _load(state: Any, codes: torch.Tensor, scales: torch.Tensor, table: torch.Tensor) -> None:
    """Fill a moment from the codes and, on the host, the scale of each logit."""
    if _is_quantized(state):
        blocks = scales.reshape(-1, state.block_size)
        if bool((blocks == blocks[:, :1]).all()):
            state.codes.copy_(codes)
            state.scale.copy_(blocks[:, 0])
            return
    state.copy_(table[codes.int()] * scales.to(table.device))
