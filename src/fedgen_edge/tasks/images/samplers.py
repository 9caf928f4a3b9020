"""From noise to pictures by diffusers' samplers, without noise on the way."""

from collections.abc import Callable
from typing import Any

from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from diffusers.schedulers.scheduling_dpmsolver_multistep import DPMSolverMultistepScheduler
from torch import Tensor


def ddim(config: Any) -> Any:
    """Song et al. 2021 (arXiv:2010.02502) with eta 0, on a schedule of noise."""
    return DDIMScheduler.from_config(config)


def dpm_solver(config: Any) -> Any:
    """DPM-Solver++(2M), Lu et al. 2022 (arXiv:2211.01095): second order, for 10 to 20 steps.

    Choice: steps of one length in the logarithm of signal over noise, as the paper of DPM-Solver
    has them (arXiv:2206.00927), each rounded to one that the network knows.
    Differs: it does not clip what it expects of a picture, which `ddim` does where its schedule
    says so.
    """
    return DPMSolverMultistepScheduler.from_config(
        config,
        solver_order=2,
        algorithm_type="dpmsolver++",
        use_lu_lambdas=True,
        variance_type=None,
    )


SAMPLERS: dict[str, Callable[[Any], Any]] = {"ddim": ddim, "dpm-solver": dpm_solver}


def denoise(
    sampler: str,
    noise_schedule: Any,
    steps: int,
    noisy: Tensor,
    predict: Callable[[Tensor, int], Tensor],
) -> Tensor:
    """What is left of noise, `[rows, ...]`, when all of it has been taken away.

    Args:
        sampler: one of SAMPLERS.
        noise_schedule: diffusers' schedule of noise.
        steps: how many; no more than the schedule has.
        noisy: noise of variance 1.
        predict: says of noisy pictures at a step what the schedule's `prediction_type` means.
    """
    scheduler = SAMPLERS[sampler](noise_schedule.config)
    scheduler.set_timesteps(min(steps, noise_schedule.config["num_train_timesteps"]))
    for step in scheduler.timesteps:
        noisy = scheduler.step(predict(noisy, round(float(step))), step, noisy, return_dict=False)[
            0
        ]
    return noisy
