"""The two loops of `bench.step`, each as it runs in a process of its own."""

from __future__ import annotations

from dataclasses import dataclass

from bench.case_worker import Job
from bench.original import original_train_on
from bench.ours import tidali_train_on
from bench.peer_training import Training, in_memory
from tidali.config import AmpChoice, CompileChoice, DeviceChoice, Stem
from tidali.hardware.device import plan_device, set_numerics


@dataclass(frozen=True, kw_only=True)
class StepJob(Job):
    """What a loop is told."""

    stem: Stem
    device: DeviceChoice
    amp: AmpChoice
    compile: CompileChoice


def original(job: StepJob) -> Training:
    """The study's loop, in a process that tidali has set nothing in."""
    device = plan_device(job.device, "off", "off").device
    return Training(original_train_on(job.classes, job.stem, device), in_memory(job, device, channels_last=False), device)


def tidali(job: StepJob) -> Training:
    """tidali's, without averaged weights: the study's loop has none."""
    set_numerics()
    plan = plan_device(job.device, job.amp, job.compile)
    train_on = tidali_train_on(job.classes, plan, job.stem, averaged=False)
    return Training(train_on, in_memory(job, plan.device, channels_last=True), plan.device)
