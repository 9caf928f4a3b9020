from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers.models.unets.unet_2d import UNet2DModel
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
from peft import PeftModel
from torch import Tensor
from torch.nn.functional import mse_loss
from torch.optim import AdamW

from conftest import corpus_for, trained, wrapped
from fedgen_edge.adapters.lora import Lora
from fedgen_edge.config import Evaluation, Settings, from_table
from fedgen_edge.data.corpus import Corpus, Images
from fedgen_edge.errors import ConfigError
from fedgen_edge.seeds import generator
from fedgen_edge.tasks.images import common, diffusion
from fedgen_edge.tasks.images.diffusion import Diffusion
from fedgen_edge.types import Leaves

CPU = torch.device("cpu")
SETTINGS = from_table(
    {
        "task": "diffusion",
        "backbone": {"path": "tiny"},
        "adapter": {"rank": 4},
        "data": {"source": "digits", "names": list("0123456789")},
    }
)


def make(settings: Settings = SETTINGS, *, full: bool = False) -> Diffusion:
    return diffusion.build(settings, full=full, device=CPU)


def some(task: Diffusion) -> Leaves:
    rng = generator("some")
    return {k: torch.randn(v.shape, generator=rng) * 0.2 for k, v in task.init(rng).items()}


NOISY = torch.randn(3, 1, 8, 8, generator=generator("noisy"))
STEP, LABEL = torch.tensor([3, 500, 999]), torch.tensor([0, 4, 9])


@torch.no_grad()
def told(model: torch.nn.Module) -> Tensor:
    return model(NOISY, STEP, class_labels=LABEL).sample


def test_the_error_is_that_of_diffusers_own_noising() -> None:
    task = make()
    held = task.examples(corpus_for(task, 3, 0), range(3))
    drawn = task.draw(held, generator("draw"))
    picture = held["image"].float() / 127.5 - 1
    noisy = DDPMScheduler().add_noise(picture, drawn["noise"], drawn["step"].long())
    with torch.no_grad():
        model = UNet2DModel.from_pretrained(task.model.folder)
        said = model(noisy, drawn["step"], class_labels=held["label"].long()).sample  # pyright: ignore
    expected = (said - drawn["noise"]).square().mean((1, 2, 3)).sum()
    torch.testing.assert_close(task.loss({}, drawn, "").total, expected, rtol=1e-5, atol=1e-6)


def test_a_network_of_velocities_is_judged_by_diffusers_own_velocity(tmp_path: Path) -> None:
    make().model.save_merged(tmp_path, {})
    noising = DDPMScheduler(prediction_type="v_prediction")
    noising.save_config(tmp_path)
    task = make(replace(SETTINGS, backbone=replace(SETTINGS.backbone, path=str(tmp_path))))
    held = task.examples(corpus_for(task, 3, 0), range(3))
    drawn = task.draw(held, generator("draw"))
    picture, step = held["image"].float() / 127.5 - 1, drawn["step"].long()
    noisy = noising.add_noise(picture, drawn["noise"], step)  # pyright: ignore
    with torch.no_grad():
        said = task.module.model(noisy, step, class_labels=held["label"].long()).sample
    wanted = noising.get_velocity(picture, drawn["noise"], step)  # pyright: ignore
    expected = (said - wanted).square().mean((1, 2, 3)).sum()
    torch.testing.assert_close(task.loss({}, drawn, "").total, expected, rtol=1e-5, atol=1e-6)


def test_training_equals_a_plain_loop_with_peft_and_diffusers() -> None:
    task = make()
    start = task.init(generator(0))
    batches = [
        task.draw(task.examples(corpus_for(task, 4, key), range(4)), generator("draw", key))
        for key in range(3)
    ]
    found = trained(task, start, batches, 1e-3)

    plain = UNet2DModel.from_pretrained(task.model.folder)
    leaves = wrapped(plain, start, diffusion.TARGETS, r=4, lora_alpha=16)
    optimiser = AdamW(leaves.values(), 1e-3, (0.0, 0.99))
    for batch in batches:
        picture, step = batch["image"].float() / 127.5 - 1, batch["step"].long()
        noisy = DDPMScheduler().add_noise(picture, batch["noise"], step)
        said = plain(noisy, step, class_labels=batch["label"].long()).sample  # pyright: ignore
        optimiser.zero_grad()
        mse_loss(said, batch["noise"]).backward()
        optimiser.step()
    assert set(found) == set(leaves)
    for name, leaf in leaves.items():
        torch.testing.assert_close(found[name], leaf.detach(), atol=1e-4, rtol=0)


def test_held_out_noise_goes_by_the_picture_and_covers_every_amount() -> None:
    task = make()
    held = task.examples(corpus_for(task, 200, 0), range(200))
    drawn = [task._make_noise(held, level) for level in range(diffusion.NOISE_LEVELS)]
    few = task._make_noise({k: v[7:9] for k, v in held.items()}, 1)
    assert torch.equal(few["noise"], drawn[1]["noise"][7:9])
    # 800 steps spread over 1,000: no tenth of them is far from 80
    counts = torch.cat([d["step"] for d in drawn]).float().histc(10, 0, 1000)
    assert counts.min() > 70
    noise = torch.stack([d["noise"] for d in drawn])
    # 51,200 standard normal numbers: mean 0 +- 4 / 226, variance 1 +- 4 * sqrt(2) / 226
    assert abs(float(noise.mean())) < 0.018
    assert abs(float(noise.var()) - 1) < 0.025


def test_peft_loads_an_adapter_and_gives_the_same_output(tmp_path: Path) -> None:
    task = make()
    own = some(task)
    task.model.save(tmp_path / "anna", own, SETTINGS, {})
    theirs = PeftModel.from_pretrained(
        UNet2DModel.from_pretrained(task.model.folder),  # pyright: ignore[reportArgumentType]
        str(tmp_path / "anna"),
    )
    assert isinstance(task.model.adapter, Lora)
    with task.model.adapter.bind(own):
        ours = told(task.module.model)
    torch.testing.assert_close(ours, told(theirs), atol=1e-5, rtol=1e-5)
    assert (ours - told(make().module.model)).abs().max() > 0.01


def test_merged_equals_unmerged_and_diffusers_loads_it(tmp_path: Path) -> None:
    task = make()
    own = some(task)
    assert isinstance(task.model.adapter, Lora)
    with task.model.adapter.bind(own):
        ours = told(task.module.model)
    task.model.save_merged(tmp_path / "whole", own)
    plain = UNet2DModel.from_pretrained(tmp_path / "whole", use_safetensors=True)
    torch.testing.assert_close(told(plain), ours, atol=1e-5, rtol=1e-5)  # pyright: ignore
    again = replace(SETTINGS, backbone=replace(SETTINGS.backbone, path=str(tmp_path / "whole")))
    torch.testing.assert_close(told(make(again).module.model), ours, atol=1e-5, rtol=1e-5)


def test_a_whole_model_is_saved_and_found_again(tmp_path: Path) -> None:
    task = make(full=True)
    own = {k: v + 0.01 for k, v in task.init(generator(0)).items()}
    task.model.save(tmp_path / "anna", own, SETTINGS, {})
    found = task.model.load(tmp_path / "anna")
    assert all(torch.equal(found[k], v) for k, v in own.items())
    assert set(found) == set(own)


def test_samples_are_fixed_by_their_seed_and_by_the_class() -> None:
    task = make()
    own = some(task)
    one = task.generate(own, [3, 3, 4], 0, Evaluation(sample_steps=3))
    assert one.shape == (3, 1, 8, 8)
    assert torch.equal(one[:2], task.generate(own, [3, 3], 0, Evaluation(sample_steps=3)))
    assert not torch.equal(one, task.generate(own, [3, 3, 4], 1, Evaluation(sample_steps=3)))
    assert not torch.equal(one[2], task.generate(own, [3, 3, 3], 0, Evaluation(sample_steps=3))[2])


def test_the_report_gets_a_row_a_class() -> None:
    plan = Evaluation(sample_images=2, sample_steps=1)
    (sample,) = make().samples({}, plan, 0)
    assert sample.prompt == "0, 1, 2, 3, 4, 5, 6, 7, 8, 9"
    assert sample.image is not None
    assert sample.image.shape == (1, 10 * 10 - 2, 2 * 10 - 2)
    with pytest.raises(ConfigError, match="'frog' is no class of pictures"):
        next(make().samples({}, replace(plan, prompts=("frog",)), 0))
    assert not list(make().samples({}, replace(plan, sample_images=0), 0))


def test_a_grid_is_laid_out_row_by_row() -> None:
    # Pictures of one pixel, 1 to 3, in two columns: two pixels of white between them.
    sheet = common.make_grid(torch.tensor([1, 2, 3], dtype=torch.uint8).view(3, 1, 1, 1), 2)
    assert sheet.shape == (1, 4, 4)
    assert (sheet[0, 0, 0], sheet[0, 0, 3], sheet[0, 3, 0]) == (1, 2, 3)
    assert (sheet == 255).sum() == 13


def test_a_network_that_predicts_something_else_is_refused(tmp_path: Path) -> None:
    task = make()
    task.model.save_merged(tmp_path / "whole", {})
    DDPMScheduler(prediction_type="sample").save_config(tmp_path / "whole")
    with pytest.raises(ConfigError, match="predicts 'sample': take one that predicts epsilon"):
        make(replace(SETTINGS, backbone=replace(SETTINGS.backbone, path=str(tmp_path / "whole"))))


def other(shape: tuple[int, ...], classes: int) -> Corpus:
    names = tuple(map(str, range(classes)))
    return Corpus(Images(torch.zeros(1, *shape, dtype=torch.uint8), names), None, ["0"], None, 0)


@pytest.mark.parametrize(
    ("corpus", "said"),
    [
        (other((3, 8, 8), 10), "are 8 x 8 with 3 channels, and backbone.path makes 8 x 8 with 1"),
        (other((1, 16, 8), 10), "are 8 x 16 with 1"),
        (other((1, 8, 8), 11), "have 11 classes, and backbone.path knows 10"),
    ],
)
def test_pictures_of_another_kind_are_refused(corpus: Corpus, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        make().examples(corpus, [0])


@pytest.mark.parametrize("kept", ["config.json", "diffusion_pytorch_model.safetensors"])
def test_a_folder_that_is_no_unet_is_refused(tmp_path: Path, kept: str) -> None:
    whole = tmp_path / "whole"
    task = make()
    task.model.save_merged(whole, {})
    for path in whole.iterdir():
        if path.name != kept:
            path.unlink()
    with pytest.raises(ConfigError, match=r"backbone\.path"):
        make(replace(SETTINGS, backbone=replace(SETTINGS.backbone, path=str(whole))))
