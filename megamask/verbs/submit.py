"""The verb submit: start a verb as a job under Slurm, or under torchrun in the background."""

from __future__ import annotations

import subprocess
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from megamask import storage
from megamask.config import Config
from megamask.errors import ArtifactError, ConfigError
from megamask.launch import slurm
from megamask.launch.job_script import Job
from megamask.launch.launch_folder import Launch, fill, launches, next_folder, withdraw
from megamask.liveness import start_of
from megamask.prepare.layout import Layout
from megamask.prepare.run_inputs import LearnInputs
from megamask.process.holder import Holder, utc_now
from megamask.process.lock import writer_of
from megamask.terminal import tell
from megamask.verbs.dispatch import artefacts
from megamask.verbs.own_arguments import SubmitArguments
from megamask.verbs.table import VERBS


def run(config: Config, arguments: SubmitArguments) -> None:
    """Check the run, write ``run_dir/launch/NNN`` and start the job; with ``--dry-run`` print the
    job's script alone.

    Raises:
        ConfigError: settings that cannot work, or a run that fits no GPU.
        ArtifactError: the run is in use or in the queue, an input is missing, or Slurm refused.
    """
    verb, run_dir = arguments.verb, Path(config.run_dir)
    launcher = config.launch.launcher
    if launcher == "auto":
        launcher = "slurm" if slurm.has_slurm() else "torchrun"
    job = Job(config, verb, next_folder(run_dir), Path.cwd())
    refuse_in_use(config, verb)
    check(job, launcher)
    if launcher == "slurm":
        name, script = "submit.sbatch", job.slurm_script()
    else:
        name, script = "run.sh", job.torchrun_script()
    if arguments.dry_run:
        how = "sbatch" if launcher == "slurm" else "bash"
        tell(f"{script}\n# not started: {how} {job.folder / name}")
        return
    with storage.atomic_dir(job.folder) as temporary:
        fill(temporary, config, name, script)
    launch = Launch(job.folder, verb, None, None, utc_now())
    if launcher == "slurm":
        try:
            launch = replace(launch, job=slurm.submit(job.folder / name))
        except (slurm.JobRefusedError, ConfigError):
            withdraw(job.folder)
            raise
    else:
        launch = replace(launch, process=_start(job, name))
    launch.write()
    what = f"Slurm job {launch.job}" if launch.job else f"process {launch.process.pid}"  # type: ignore[union-attr]
    tell(f"{verb} of {run_dir} is {what}; its log is {job.log}")
    tell(f"megamask status {run_dir} shows how it does, megamask stop {run_dir} saves and ends it.")


def refuse_in_use(config: Config, verb: str) -> None:
    """Refuse a verb that runs on this run folder already, or waits in the queue.

    Raises:
        ArtifactError: naming the process or the job.
    """
    run_dir = Path(config.run_dir)
    for path in artefacts(VERBS[verb].writes, config, []):
        if holder := writer_of(path):
            fix = f"Wait for its end, or end it: megamask stop {run_dir}."
            raise ArtifactError(path, f"is being written by {holder}", fix)
    for launch in launches(run_dir):
        if launch.verb != verb:
            continue
        if launch.is_running():
            problem = f"is in use by {launch.process}"
        elif launch.job and (queued := slurm.find_job(launch.job)):
            problem = f"waits for {queued}"
        else:
            continue
        fix = f"Wait for its end, or end it: megamask stop {run_dir}."
        raise ArtifactError(run_dir, problem, fix)


@dataclass(frozen=True)
class PlannedInputs(LearnInputs):
    """The inputs of a learning run on processes that are not started yet.

    Attributes:
        dp: number of replicas.
    """

    dp: int = 1

    @cached_property
    def layout(self) -> Layout:
        """The layout of the job. Raises as ``Layout``."""
        return Layout.planned(self.config, self.dp)


def check(job: Job, launcher: str) -> None:
    """Refuse a job that would end at once.

    Raises:
        MegamaskError: see the classes; for learn, everything that learn itself would refuse.
    """
    config, launch = job.config, job.config.launch
    if launcher == "torchrun" and launch.nodes > 1:
        fix = "Start launch/learn.sh on each node, or set launch.nodes=1."
        raise ConfigError("launch.nodes", launch.nodes, "1, for torchrun starts here alone", fix)
    if launcher == "torchrun" and launch.container:
        fix = "Start the container yourself, or leave launch.container out."
        raise ConfigError("launch.container", launch.container, "needs Slurm", fix)
    if job.world % config.parallel.tp:
        key = "launch.processes_per_node"
        allowed = f"launch.nodes x {key} is a multiple of parallel.tp={config.parallel.tp}"
        raise ConfigError(key, job.processes_per_node, allowed, "Correct one of them.")
    if job.verb != "learn":
        return
    from megamask.evaluate.dense_budget import with_dense_budget  # torch
    from megamask.learn.preflight import check_early
    from megamask.plan.fit import check_fits
    from megamask.plan.hardware import GPUS
    from megamask.plan.plan_tables import headline
    from megamask.plan.workload import Workload

    config = with_dense_budget(config)
    there = config
    if launcher == "slurm" and config.device == "auto":  # the job asks for GPUs, wherever it starts
        there = config.model_copy(update={"device": "cuda"})
    inputs = PlannedInputs(there, job.world // config.parallel.tp)
    check_early(inputs)
    work = Workload(config, inputs.arch, inputs.dp).check()
    tell(headline(work, config.model.hf or config.run_dir))
    if config.device != "cpu":
        largest = max(GPUS.values(), key=lambda one: one.capacity)
        check_fits(work.config, inputs.arch, largest, inputs.dp)


def _start(job: Job, name: str) -> Holder:
    """Start torchrun in the background, in a session of its own, so that no terminal ends it."""
    with job.log.open("ab") as log:
        process = subprocess.Popen(
            ["bash", str(job.folder / name)],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    here = Holder.this_process(f"torchrun, megamask {job.verb}")
    return replace(here, pid=process.pid, start=start_of(process.pid))
