"""Sample images from noise with diffusers' deterministic samplers."""

from collections.abc import Callable
from typing import Any

from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from diffusers.schedulers.scheduling_dpmsolver_multistep import DPMSolverMultistepScheduler
from torch import Tensor


def ddim(config: Any) -> Any:
    """DDIM with eta 0 (Song et al. 2021, arXiv:2010.02502) on a noise schedule."""
    return DDIMScheduler.from_config(config)


def dpm_solver(config: Any) -> Any:
    """DPM-Solver++(2M), Lu et al. 2022 (arXiv:2211.01095): second order, for 10 to 20 steps.

    Choice: steps of equal length in log signal-to-noise ratio, as in the DPM-Solver paper
    (arXiv:2206.00927), each rounded to a step of the network.
    Differs: it does not clip the predicted image, which `ddim` does if its schedule says so.
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
    """The denoised sample, `[rows, ...]`.

    Args:
        sampler: one of SAMPLERS.
        noise_schedule: the noise schedule from diffusers.
        steps: the number of steps, limited to the schedule's.
        noisy: noise of variance 1.
        predict: predicts, for noisy images at a step, what the schedule's `prediction_type` names.
    """
    scheduler = SAMPLERS[sampler](noise_schedule.config)
    scheduler.set_timesteps(min(steps, noise_schedule.config["num_train_timesteps"]))
    for step in scheduler.timesteps:
        noisy = scheduler.step(predict(noisy, round(float(step))), step, noisy, return_dict=False)[
            0
        ]
    return noisy
