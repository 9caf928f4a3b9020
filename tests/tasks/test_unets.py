import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import StableDiffusionPipeline
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor

from fedgen_edge.adapters.lora import Lora
from fedgen_edge.adapters.peft_io import PIPELINE_WEIGHTS
from fedgen_edge.config import Evaluation, Settings, from_table
from fedgen_edge.data.corpus import Corpus, Images
from fedgen_edge.errors import ConfigError
from fedgen_edge.leaves import stack
from fedgen_edge.seeds import generator
from fedgen_edge.tasks.images import diffusion
from fedgen_edge.tasks.images.class_text import PROMPT
from fedgen_edge.tasks.images.diffusion import Diffusion
from fedgen_edge.types import Batch, Leaves
from support.unets import NAMES, WIDTH, conditional, pipeline, plain

CPU = torch.device("cpu")
LAYERS = ("to_q", "to_v", "to_out.0", "conv1", "conv2", "conv_shortcut", "proj_in", "conv_in")
NOISY = torch.randn(3, 4, 8, 8, generator=generator("noisy"))
STEP, LABEL = torch.tensor([3, 500, 999]), torch.tensor([0, 2, 1])
WORDS = torch.randn(3, 5, WIDTH, generator=generator("words"))


def settings(path: Path, layers: tuple[str, ...] = LAYERS, **data: Any) -> Settings:
    return from_table(
        {
            "task": "diffusion",
            "backbone": {"path": str(path)},
            "adapter": {"rank": 3, "alpha": 5.0, "target_modules": list(layers)},
            "data": {"source": "digits", "names": list(NAMES), **data},
        }
    )


def make(told: Settings) -> Diffusion:
    return diffusion.build(told, full=False, device=CPU)


def numbered(folder: Path, **told: Any) -> Path:
    """A bare network that knows three classes by their numbers."""
    conditional(num_class_embeds=3, **told).save_pretrained(folder)
    return folder


def some(task: Diffusion, key: int = 0) -> Leaves:
    rng = generator("some", key)
    return {k: torch.randn(v.shape, generator=rng) * 0.2 for k, v in task.init(rng).items()}


def corpus(shape: tuple[int, int, int], count: int = 6, names: tuple[str, ...] = NAMES) -> Corpus:
    rng = generator("pictures")
    pixels = torch.randint(256, (count, *shape), generator=rng, dtype=torch.uint8)
    return Corpus(
        Images(pixels, names), None, [names[i % len(names)] for i in range(count)], None, 0
    )


@torch.no_grad()
def said(task: Diffusion, own: Leaves) -> Tensor:
    assert isinstance(task.model.adapter, Lora)
    with task.model.adapter.bind(own):
        return task.module.predict(NOISY, STEP, LABEL)


@torch.no_grad()
def theirs(model: Any, words: Tensor, *, numbered: bool) -> Tensor:
    labels = {"class_labels": LABEL} if numbered else {}
    return model(NOISY, STEP, encoder_hidden_states=words, **labels).sample


def close(one: Tensor, two: Tensor) -> None:
    torch.testing.assert_close(one, two, atol=1e-5, rtol=1e-5)


# ---- what diffusers and PEFT load


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("embedded", [False, True])
def test_diffusers_and_peft_load_one_folder_and_say_what_this_says(
    embedded: bool, rslora: bool, tmp_path: Path
) -> None:
    layers = (*LAYERS, "class_embedding") if embedded else LAYERS
    told = settings(numbered(tmp_path / "unet"), layers)
    told = replace(told, adapter=replace(told.adapter, rslora=rslora))
    task = make(told)
    own = some(task)
    assert any("class_embedding" in k for k in own) == embedded
    task.model.save(tmp_path / "anna", own, told, {})
    ours, zeros = said(task, own), torch.zeros(3, 1, WIDTH)

    one = conditional(num_class_embeds=3)
    one.load_lora_adapter(str(tmp_path / "anna"), prefix="unet", weight_name=PIPELINE_WEIGHTS,
                          use_safetensors=True)  # fmt: skip
    close(theirs(one, zeros, numbered=True), ours)
    two = PeftModel.from_pretrained(conditional(num_class_embeds=3), str(tmp_path / "anna"))  # pyright: ignore
    close(theirs(two, zeros, numbered=True), ours)
    assert (said(task, {}) - ours).abs().max() > 0.01

    task.model.save_merged(tmp_path / "whole", own)
    whole = UNet2DConditionModel.from_pretrained(tmp_path / "whole", use_safetensors=True)
    close(theirs(whole, zeros, numbered=True), ours)


def test_what_is_written_is_read_again_bit_for_bit(tmp_path: Path) -> None:
    told = settings(numbered(tmp_path / "unet"))
    task = make(told)
    own = some(task)
    task.model.save(tmp_path / "anna", own, told, {})
    found = task.model.load(tmp_path / "anna")
    assert all(torch.equal(found[k], v) for k, v in own.items())
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".")]


def test_a_network_that_diffusers_adapts_not_has_no_such_file(tmp_path: Path) -> None:
    plain(num_class_embeds=3).save_pretrained(tmp_path / "unet")
    told = settings(tmp_path / "unet", ("conv1",))
    task = make(told)
    task.model.save(tmp_path / "anna", some(task), told, {})
    assert not (tmp_path / "anna" / PIPELINE_WEIGHTS).exists()


def test_a_pipeline_loads_an_adapter_and_draws_what_this_draws(tmp_path: Path) -> None:
    pipe = pipeline(tmp_path / "pipe")
    told = settings(tmp_path / "pipe")
    task = make(told)
    own = some(task)
    task.model.save(tmp_path / "anna", own, told, {})
    other = StableDiffusionPipeline.from_pretrained(tmp_path / "pipe", safety_checker=None)
    other.load_lora_weights(str(tmp_path / "anna"))  # pyright: ignore
    words = other.encode_prompt([PROMPT.format(NAMES[i]) for i in LABEL], "cpu", 1, False)[0]  # pyright: ignore
    close(theirs(other.unet, words, numbered=False), said(task, own))  # pyright: ignore
    close(theirs(pipe.unet, words, numbered=False), said(task, {}))

    noise = torch.stack([torch.randn(4, 8, 8, generator=generator(7, "sample", i)) for i in (0, 1)])
    other.set_progress_bar_config(disable=True)  # pyright: ignore
    drawn = other(prompt=[PROMPT.format("ship")] * 2, latents=noise, num_inference_steps=4,
                  guidance_scale=0.0, output_type="pt").images  # fmt: skip # pyright: ignore
    made = task.generate(own, [1, 1], 7, Evaluation(sample_steps=4))
    assert made.shape == (2, 3, 16, 16)
    assert ((drawn * 255).round() - made).abs().max() <= 1


# ---- latents and words


def test_latents_are_made_once_by_the_pipelines_own_autoencoder(tmp_path: Path) -> None:
    pipe = pipeline(tmp_path / "pipe")
    task = make(settings(tmp_path / "pipe" / "unet"))
    held = task.examples(pictures := corpus((3, 16, 16)), range(6))
    assert "image" not in held
    assert isinstance(pictures.examples, Images)
    with torch.no_grad():
        values = pictures.examples.pixels.float() / 127.5 - 1
        mode = pipe.vae.encode(values).latent_dist.mode() * pipe.vae.config.scaling_factor  # pyright: ignore
    close(held["latent"], mode)
    drawn = task.draw(held, generator("draw"))
    noising = DDPMScheduler.from_config(pipe.scheduler.config)  # pyright: ignore
    noisy = noising.add_noise(mode, drawn["noise"], drawn["step"].long())
    words = pipe.encode_prompt([PROMPT.format(NAMES[i % 3]) for i in range(6)], "cpu", 1, False)[0]  # pyright: ignore
    with torch.no_grad():
        told = pipe.unet(noisy, drawn["step"], encoder_hidden_states=words).sample
    expected = (told - drawn["noise"]).square().mean((1, 2, 3)).sum()
    close(task.loss({}, drawn, "").total, expected)


def test_other_pixels_are_scaled_to_the_latents_and_back(tmp_path: Path) -> None:
    pipeline(tmp_path / "pipe")
    task = make(settings(tmp_path / "pipe", size=8))
    assert task.examples(corpus((3, 8, 8)), range(2))["latent"].shape == (2, 4, 8, 8)
    assert task.generate({}, [0], 0, Evaluation(sample_steps=1)).shape == (1, 3, 8, 8)


def descended(task: Diffusion, adapter: Leaves, batch: Batch) -> tuple[Tensor, Leaves]:
    """The loss, and its slope along each leaf."""
    own = {k: v.clone().requires_grad_() for k, v in adapter.items()}
    total = task.loss(own, batch, "").total
    slopes = torch.autograd.grad(total.sum(), list(own.values()))
    return total.detach(), dict(zip(own, slopes, strict=True))


@pytest.mark.parametrize("words", [False, True])
def test_a_stack_of_clients_is_each_client(words: bool, tmp_path: Path) -> None:
    path = tmp_path / "unet"
    shape = (3, 16, 16) if words else (4, 8, 8)
    if words:
        pipeline(tmp_path / "pipe")
        path = tmp_path / "pipe"
    else:
        numbered(path)
    task = make(settings(path, (*LAYERS, "to_k")))
    batches: list[Batch] = [
        task.draw(task.examples(corpus(shape), rows), generator("draw", *rows))
        for rows in ([0, 1], [3, 5])
    ]
    adapters = [some(task, 0), some(task, 1)]
    both, slopes = descended(task, stack(adapters), stack(batches))
    for i, (adapter, batch) in enumerate(zip(adapters, batches, strict=True)):
        alone, own = descended(task, adapter, batch)
        close(both[i], alone)
        for name, slope in own.items():
            torch.testing.assert_close(slopes[name][i], slope, atol=1e-4, rtol=1e-4)
    held = [task.examples(corpus(shape), rows) for rows in ([0, 1], [3, 5])]
    judged = task.evaluate(stack(adapters), stack(held))["total"]
    apart = [task.evaluate(a, h)["total"] for a, h in zip(adapters, held, strict=True)]
    torch.testing.assert_close(judged, torch.stack(apart), atol=1e-5, rtol=1e-5)


def test_the_noise_is_the_first_half_of_a_network_that_learns_its_variance(tmp_path: Path) -> None:
    model = plain(out_channels=2, num_class_embeds=3)
    model.save_pretrained(tmp_path)
    task = make(settings(tmp_path, ("conv1",)))
    with torch.no_grad():
        whole = model(NOISY[:, :1], STEP, class_labels=LABEL).sample
        close(task.module.predict(NOISY[:, :1], STEP, LABEL), whole[:, :1])
    assert task.generate({}, [0, 1], 0, Evaluation(sample_steps=2)).shape == (2, 1, 8, 8)


def test_an_unconditional_network_takes_pictures_of_one_class(tmp_path: Path) -> None:
    plain().save_pretrained(tmp_path)
    task = make(settings(tmp_path, ("conv1",)))
    held = task.examples(corpus((1, 8, 8), names=("frog",)), range(2))
    assert task.loss({}, task.draw(held, generator(0)), "").total > 0
    with pytest.raises(ConfigError, match=r"3 classes.* knows 1: keep fewer by data\.names"):
        task.examples(corpus((1, 8, 8)), range(2))


def test_a_backbone_is_all_three_networks_of_its_pipeline(tmp_path: Path) -> None:
    pipeline(tmp_path / "pipe")
    before = make(settings(tmp_path / "pipe")).model.sha256
    path = tmp_path / "pipe" / "text_encoder" / "model.safetensors"
    changed = {k: v + 0.1 if v.is_floating_point() else v for k, v in load_file(path).items()}
    save_file(changed, path, metadata={"format": "pt"})
    after = make(settings(tmp_path / "pipe")).model.sha256
    kept = [one == two for one, two in zip(before.split("+"), after.split("+"), strict=True)]
    assert kept == [True, True, False]


# ---- what is refused


@pytest.mark.parametrize(
    ("network", "match"),
    [
        (conditional, "conditioned by text, and no text_encoder is beside it"),
        (lambda: conditional(num_class_embeds=3, out_channels=5), "makes 5 channels of 4"),
        (
            lambda: conditional(class_embed_type="timestep"),
            "conditioned by class_embed_type='timestep'",
        ),
        (
            lambda: conditional(encoder_hid_dim=7, encoder_hid_dim_type="text_proj"),
            "conditioned by encoder_hid_dim=7",
        ),
        (lambda: plain(sample_size=None), "does not say its sample_size"),
    ],
)
def test_a_network_that_a_class_cannot_condition_is_refused(
    network: Any, match: str, tmp_path: Path
) -> None:
    network().save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=match):
        make(settings(tmp_path))


def test_weights_of_another_network_are_refused_in_one_line(tmp_path: Path) -> None:
    numbered(tmp_path)
    name = "diffusion_pytorch_model.safetensors"
    plain(num_class_embeds=3).save_pretrained(tmp_path / "other")
    (tmp_path / "other" / name).replace(tmp_path / name)
    with pytest.raises(ConfigError, match="is no UNet2DConditionModel") as caught:
        make(settings(tmp_path))
    assert "\n" not in str(caught.value)


def test_another_kind_of_network_and_a_pickle_are_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"_class_name": "AutoencoderKL"}')
    with pytest.raises(
        ConfigError, match=r"is no UNet2DModel or UNet2DConditionModel \(it holds Auto"
    ):
        make(settings(tmp_path))
    (tmp_path / "config.json").write_text('{"_class_name": "UNet2DModel"}')
    (tmp_path / "diffusion_pytorch_model.bin").write_bytes(b"\x80\x04.")
    with pytest.raises(ConfigError, match="pickles are not read"):
        make(settings(tmp_path))


def test_latents_of_another_autoencoder_are_refused(tmp_path: Path) -> None:
    pipeline(tmp_path / "pipe")
    plain(num_class_embeds=3).save_pretrained(tmp_path / "unet")
    told = settings(tmp_path / "unet", ("conv1",))
    backbone = replace(told.backbone, autoencoder=tmp_path / "pipe" / "vae")
    with pytest.raises(ConfigError, match="on 1 channels, and the autoencoder's latents have 4"):
        make(replace(told, backbone=backbone))


def test_latents_of_a_codebook_do_not_pass_for_pictures(tmp_path: Path) -> None:
    plain(num_class_embeds=3).save_pretrained(tmp_path / "unet")
    (tmp_path / "vqvae").mkdir()
    (tmp_path / "model_index.json").write_text("{}")
    with pytest.raises(ConfigError, match="works on the latents of its vqvae"):
        make(settings(tmp_path))


def test_a_text_encoder_needs_names_and_to_be_clips(tmp_path: Path) -> None:
    pipeline(tmp_path / "pipe")
    with pytest.raises(ConfigError, match="nothing to read"):
        make(settings(tmp_path / "pipe", names=[]))
    encoder = tmp_path / "pipe" / "text_encoder" / "model.safetensors"
    save_file({"weight": torch.zeros(1)}, encoder, metadata={"format": "pt"})
    with pytest.raises(ConfigError, match=r"are not CLIP's, in safetensors \(it lacks \d+ weights"):
        make(settings(tmp_path / "pipe"))
    encoder.unlink()
    with pytest.raises(ConfigError, match="are not CLIP's, in safetensors"):
        make(settings(tmp_path / "pipe"))


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"hidden_size": "wide"}, "expected int, got str"),
        ({"num_attention_heads": 0}, "are not CLIP's"),
        ({"num_hidden_layers": 0}, r"it does not use \d+ weights"),
    ],
)
def test_a_text_encoder_is_the_one_of_its_configuration(
    values: dict[str, Any], words: str, tmp_path: Path
) -> None:
    pipeline(tmp_path / "pipe")
    file = tmp_path / "pipe" / "text_encoder" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | values))
    with pytest.raises(ConfigError, match=words):
        make(settings(tmp_path / "pipe"))


@pytest.mark.parametrize("values", [{"block_out_channels": []}, {"norm_num_groups": 0}])
def test_an_impossible_network_is_one_line(values: dict[str, Any], tmp_path: Path) -> None:
    numbered(tmp_path)
    file = tmp_path / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | values))
    with pytest.raises(ConfigError, match="is no UNet2DConditionModel"):
        make(settings(tmp_path))
