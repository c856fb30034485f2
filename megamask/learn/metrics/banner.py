"""The lines that a learning run says when it starts."""

from __future__ import annotations

from megamask.config import Config
from megamask.learn.masked_model import MaskedModel
from megamask.learn.methods import find_method
from megamask.model.spec import has_transformer_engine
from megamask.parallel.cpu import emulates_bf16
from megamask.parallel.mesh import Mesh


def banner(config: Config, masked_model: MaskedModel, mesh: Mesh) -> list[str]:
    """What is learned on which model, where, and with which code."""
    linears = masked_model.linears.values()
    weights = sum(linear.weight.numel() for linear in linears) * mesh.tp / 1e6
    backend = next(iter(linears)).backend
    engine = "Transformer Engine" if has_transformer_engine(mesh.device) else "PyTorch"
    lines = [
        f"{masked_model.plan} masks for {len(linears)} linears, {weights:.0f} M weights; "
        f"prior {masked_model.prior_method}; {mesh.device}, TP {mesh.tp} x DP {mesh.dp}; "
        f"sampling by {backend}, norm and attention by {engine}"
    ]
    if line := find_method(config.learn.method).announcement(config):
        lines.append(line)
    if config.dtype == "bf16" and mesh.device.type == "cpu" and emulates_bf16():
        lines.append("bf16 is emulated on this CPU: dtype=fp32 is faster")
    return lines
