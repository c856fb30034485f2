"""The verb learn: learn the masks of the frozen model; resumes from the last snapshot."""

from __future__ import annotations

import logging
import signal
from contextlib import nullcontext

import psutil
import torch

from megamask.config import Config
from megamask.errors import ConfigError
from megamask.evaluate.dense_budget import with_dense_budget
from megamask.learn.kernel_check import require_update, with_proven_kernels
from megamask.learn.loop import Run
from megamask.learn.metrics.sinks import require_login
from megamask.learn.preflight import check_early
from megamask.parallel.mesh import Mesh, start
from megamask.plan.fit import check_free
from megamask.plan.saving import grace_warning, host_warning, saving_of
from megamask.plan.workload import Workload
from megamask.prepare.run_inputs import LearnInputs
from megamask.process.signals import Interrupted, StopRequest, stop_on_signal

log = logging.getLogger(__name__)


def run(config: Config, stop: StopRequest | None = None) -> int:
    """Learn masks and write them to ``run_paths(config).mask("learned")``; resumes by default.

    Args:
        config: the settings.
        stop: the request to save and leave; None catches the signals here.

    Returns:
        EXIT_OK, also when ``megamask stop`` asked to save and leave; EXIT_INTERRUPTED when a signal
        asked.

    Raises:
        Interrupted: a signal came before there was anything to save.
        MegamaskError: anything the user can mend, before the first step where possible.
    """
    config = with_dense_budget(config)
    inputs = LearnInputs(config)
    check_early(inputs)
    catching = stop_on_signal() if stop is None else nullcontext(stop)
    with catching as request, start(config, request) as mesh:
        if mesh.any(bool(request)):
            raise Interrupted(request.received or signal.SIGTERM.name)
        require_update(config, mesh)
        _require_login(config, mesh)
        proven = with_proven_kernels(config, inputs.plan.distinct, mesh)
        if proven != config:
            inputs = LearnInputs(proven)
        _check_free(inputs, mesh)  # plain PyTorch needs more memory than kernels
        _warn_of_snapshots(inputs, mesh)
        # The replicas are never made equal: they begin with the same logits, or average the
        # gradients of different masks.
        mesh.require_same("inputs", inputs.facts)
        return Run(inputs, mesh).learn(request)


def _require_login(config: Config, mesh: Mesh) -> None:
    """Refuse wandb online without a login, on all ranks together."""
    failure = None
    try:
        if mesh.is_main:
            require_login(config)
    except ConfigError as error:
        failure = error
    mesh.leave_together(failure, "log in to wandb")


def _warn_of_snapshots(inputs: LearnInputs, mesh: Mesh) -> None:
    """Say before the first step if a signal may leave too little time for a snapshot, or the host
    of GPUs too little memory. Rank 0 is on the busiest node.
    """
    saving = saving_of(Workload(inputs.config, inputs.arch, mesh.dp))
    warnings = [grace_warning(inputs.config, saving)]
    if mesh.device.type == "cuda":
        warnings.append(host_warning(saving, float(psutil.virtual_memory().available)))
    for warning in warnings:
        if mesh.is_main and warning:
            log.warning("%s", warning)


def _check_free(inputs: LearnInputs, mesh: Mesh) -> None:
    """Refuse a run that does not fit the free memory of a CUDA device, before anything is loaded.

    Raises:
        ConfigError: naming the nearest settings that fit.
    """
    if mesh.device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(mesh.device)
        title = torch.cuda.get_device_name(mesh.device)
        check_free(inputs.config, inputs.arch, mesh.dp, free, title)
