"""What calibration measures of a linear: streaming statistics of its inputs over the calibration
tokens, and sums over the gradients of the samples.

Shapes: T tokens, O out_features, I in_features.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from megamask.errors import ConfigError


class InputStats:
    """Sums over calibration tokens, in fp32 on ``device``.

    The sums are public, so that ranks that saw different tokens can add their sums.

    Args:
        in_features: I, the number of input features of the unsharded linear.
        hessian: also accumulate the I x I matrix that SparseGPT needs. Without it the sums take I
            floats.
        device: the device of the sums.
    """

    def __init__(self, in_features: int, hessian: bool, device: torch.device | str = "cpu") -> None:
        self.in_features = in_features
        self.tokens = 0
        self.is_stand_in = False  # whether nothing is known of the inputs
        self.sum_square_I = torch.zeros(in_features, device=device)
        self.sum_outer_II = (
            torch.zeros(in_features, in_features, device=device) if hessian else None
        )

    @torch.no_grad()
    def add(self, x_TI: torch.Tensor) -> None:
        """Add the inputs of T more tokens, (..., I), any float dtype.

        Raises:
            ValueError: the last axis is not I.
        """
        if x_TI.shape[-1] != self.in_features:
            raise ValueError(
                f"inputs of shape {tuple(x_TI.shape)} "
                f"for a linear with {self.in_features} in_features"
            )
        is_bf16 = x_TI.dtype == torch.bfloat16
        given_TI = x_TI.reshape(-1, self.in_features)
        x_TI = given_TI.to(self.sum_square_I)
        self.tokens += x_TI.shape[0]
        if self.sum_outer_II is None:
            is_copy = x_TI is not given_TI  # squares may take the place of a copy alone
            self.sum_square_I += (x_TI.square_() if is_copy else x_TI.square()).sum(0)
        else:
            with _bf16_factors(is_bf16):
                self.sum_outer_II.addmm_(x_TI.t(), x_TI)
            self.sum_square_I.copy_(self.sum_outer_II.diagonal())

    @torch.no_grad()
    def assume_alike(self) -> None:
        """Stand for uncorrelated inputs of mean square 1, where nothing is known of the inputs. A
        criterion then goes by the weights alone, Wanda and SparseGPT by their magnitude.
        """
        self.is_stand_in = True
        self.tokens = 1
        self.sum_square_I.fill_(1)
        if self.sum_outer_II is not None:
            self.sum_outer_II.zero_().fill_diagonal_(1)

    @property
    def mean_square_I(self) -> torch.Tensor:
        """Mean over tokens of x_j^2, (I,): the |X_j|_2^2 of Wanda over the number of tokens.

        Raises:
            ConfigError: no tokens were added, or the inputs were not finite.
        """
        if self.tokens == 0:
            raise ConfigError(
                "calibration.samples",
                self.tokens,
                "at least one calibration token",
                "Give the calibration some text.",
            )
        mean_I = self.sum_square_I / self.tokens
        broken = int((~mean_I.isfinite()).sum())
        if broken:
            raise ConfigError(
                "calibration",
                f"{broken} of {self.in_features} input features",
                "activations must be finite on the calibration text, these overflow or are NaN",
                "Check the model's weights for NaN or inf.",
            )
        return mean_I

    @property
    def hessian_II(self) -> torch.Tensor:
        """Mean over tokens of x x^T, (I, I), a new tensor.

        The Hessian of the layer-wise squared error is twice this matrix. The factor changes no mask
        and no updated weight, because the damping is relative to the diagonal.

        Raises:
            ConfigError: no tokens were added, or the inputs were not finite.
            ValueError: the statistics were made without ``hessian=True``.
        """
        if self.sum_outer_II is None:
            raise ValueError("these statistics were collected without the Hessian")
        _ = self.mean_square_I  # a value that is not finite shows on the diagonal
        return self.sum_outer_II / self.tokens


@dataclass(frozen=True)
class GradientStats:
    """Gradients of the dense model's loss at the weights of a linear, or at some rows of it.

    Attributes:
        sum_square_OI: sum over samples of the squared gradient of the sample's mean loss, fp32.
        samples: number of samples.
    """

    sum_square_OI: torch.Tensor
    samples: int

    @property
    def norm_OI(self) -> torch.Tensor:
        """The norm of every weight's gradient over the samples, (O, I).

        Raises:
            ConfigError: a gradient was not finite.
        """
        norm_OI = self.sum_square_OI.sqrt()
        broken = int((~norm_OI.isfinite()).sum())
        if broken:
            raise ConfigError(
                "calibration",
                f"{broken} of {norm_OI.numel()} gradients",
                "gradients must be finite on the calibration text, these overflow or are NaN",
                "Check the model's weights for NaN or inf.",
            )
        return norm_OI


@dataclass(frozen=True)
class Statistics:
    """What calibration measured of a linear.

    Attributes:
        inputs: sums over its inputs; None where no criterion needs them.
        gradients: sums over the gradients at its weights; None where no criterion needs them.
    """

    inputs: InputStats | None = None
    gradients: GradientStats | None = None

    @property
    def of_inputs(self) -> InputStats:
        """``inputs``, of a criterion that needs them.

        Raises:
            ValueError: they were not collected.
        """
        if self.inputs is None:
            raise ValueError("no statistics of the inputs were collected")
        return self.inputs

    @property
    def of_gradients(self) -> GradientStats:
        """``gradients``, of a criterion that needs them.

        Raises:
            ValueError: they were not collected.
        """
        if self.gradients is None:
            raise ValueError("no gradients were collected")
        return self.gradients


@contextmanager
def _bf16_factors(allowed: bool) -> Iterator[None]:
    """Let fp32 matrix products round their factors to bf16 inside the block, when ``allowed``.

    Factors that are bf16 already lose nothing, and the sums stay fp32; the product is 3 times as
    fast.
    """
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium" if allowed else before)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
