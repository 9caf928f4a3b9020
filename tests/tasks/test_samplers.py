from collections.abc import Callable

import pytest
import torch
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
from torch import Tensor

from fedgen_edge.tasks.images.samplers import SAMPLERS, denoise

NOISING = DDPMScheduler(clip_sample=False)
KEPT = NOISING.alphas_cumprod
NORMAL = torch.linspace(-2, 2, 9)
GAUSSIANS = [(1.0, 0.1), (1.0, 0.5), (-0.5, 1.0)]


def exact(mean: float, deviation: float) -> Callable[[Tensor, int], Tensor]:
    # x = sqrt(a) picture + sqrt(1 - a) noise, both normal: the noise to expect at x is
    # cov(noise, x) / var(x) = sqrt(1 - a) / (a deviation^2 + 1 - a) times x less its mean.
    def ask(x: Tensor, step: int) -> Tensor:
        a = KEPT[step]
        return (1 - a).sqrt() * (x - a.sqrt() * mean) / (a * deviation**2 + 1 - a)

    return ask


def apart(sampler: str, steps: int, mean: float, deviation: float) -> float:
    """Most by which normal numbers miss mean + deviation * themselves, where the flow takes them.

    The flow of a Gaussian is linear: what lies z deviations from the mean stays there.
    """
    a = KEPT[-1]
    start = a.sqrt() * mean + (a * deviation**2 + 1 - a).sqrt() * NORMAL
    made = denoise(sampler, NOISING, steps, start, exact(mean, deviation))
    return float((made - (mean + deviation * NORMAL)).abs().max())


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize(("mean", "deviation"), GAUSSIANS)
def test_a_gaussian_is_reached_with_its_mean_and_deviation(
    sampler: str, mean: float, deviation: float
) -> None:
    # Twice the error of the deviation, at the numbers -2 and 2, and that of the mean.
    assert apart(sampler, 100, mean, deviation) < 0.04


@pytest.mark.parametrize(("mean", "deviation"), GAUSSIANS)
def test_dpm_solver_is_nearer_with_ten_steps(mean: float, deviation: float) -> None:
    few = {sampler: apart(sampler, 10, mean, deviation) for sampler in SAMPLERS}
    assert few["dpm-solver"] < few["ddim"] / 3


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_no_more_steps_are_taken_than_there_are(sampler: str) -> None:
    asked: list[int] = []

    def ask(x: Tensor, step: int) -> Tensor:
        asked.append(step)
        return torch.zeros_like(x)

    denoise(sampler, DDPMScheduler(num_train_timesteps=10), 50, NORMAL, ask)
    assert len(asked) == 10
    assert {*asked} <= {*range(10)}
