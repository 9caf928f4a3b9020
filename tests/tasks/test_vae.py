import math
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.distributions import Normal, kl_divergence
from torch.optim import AdamW

from conftest import corpus_for, trained, wrapped
from fedgen_edge.adapters.lora import Lora
from fedgen_edge.algorithms.share import share_all_but_last
from fedgen_edge.config import Evaluation, Settings, from_table
from fedgen_edge.data import sources
from fedgen_edge.data.batches import Budget, make_batches
from fedgen_edge.data.corpus import Corpus, Images
from fedgen_edge.errors import ConfigError
from fedgen_edge.federation.client import Recipe, local_update
from fedgen_edge.runs import build, provenance
from fedgen_edge.seeds import generator
from fedgen_edge.tasks.images import diffusers_io, diffusion, vae
from fedgen_edge.tasks.images.vae import Vae
from fedgen_edge.tasks.images.vae_network import Autoencoder
from fedgen_edge.types import Leaves

CPU = torch.device("cpu")
SETTINGS = from_table(
    {
        "task": "vae",
        "backbone": {"path": "tiny"},
        "adapter": {"rank": 4},
        "data": {"source": "digits", "names": list("0123456789")},
    }
)
SEEN = torch.rand(3, 1, 8, 8, generator=generator("seen")) * 2 - 1
LABEL, NOISE = torch.tensor([0, 4, 9]), torch.randn(3, 16, generator=generator("noise"))


def make(settings: Settings = SETTINGS, *, full: bool = False) -> Vae:
    return vae.build(settings, full=full, device=CPU)


def test_fedper_keeps_the_decoders_last_block_in_any_order_of_names() -> None:
    names = list(make().init(generator(0)))
    kept = set(names) - share_all_but_last(1)(sorted(names), None)
    assert kept
    assert kept == set(names) - share_all_but_last(1)(names, None)
    assert all(name.startswith("decoder.blocks.1.") for name in kept)


def at(folder: Path) -> Settings:
    return replace(SETTINGS, backbone=replace(SETTINGS.backbone, path=str(folder)))


def some(task: Vae) -> Leaves:
    rng = generator("some")
    return {k: torch.randn(v.shape, generator=rng) * 0.2 for k, v in task.init(rng).items()}


@torch.no_grad()
def told(model: torch.nn.Module) -> Tensor:
    """All that a network says of three pictures, in a row."""
    return torch.cat([part.flatten() for part in model(SEEN, LABEL, NOISE)])


LEVELS = torch.arange(256, dtype=torch.uint8)
# inside, at an edge, beyond it; sharper than a level, about one, wider than the whole range
SHAPES = [(m, s) for m in (0.0, 0.3, -1.0, 1.0, 1.4) for s in (-9.0, -7.0, -4.0, -1.0, 2.0)]


@pytest.mark.parametrize(("mean", "scale"), SHAPES)
def test_the_256_levels_share_the_whole_distribution(mean: float, scale: float) -> None:
    flat = torch.ones(256)
    found = vae.compute_bits(LEVELS, flat * mean, flat * scale)
    assert bool(found.isfinite().all())
    # float32 places an edge to 6e-8, where the sharpest sigmoid rises by 1,097 / 4 a unit
    assert float((2.0**-found).sum()) == pytest.approx(1, abs=5e-5)


@pytest.mark.parametrize(("mean", "scale"), SHAPES)
def test_bits_of_a_level_are_those_of_the_mass_between_its_edges(mean: float, scale: float) -> None:
    scale = max(scale, vae.MIN_LOG_SCALE)
    # level n reaches from (n - 1/2) / 127.5 - 1 to (n + 1/2) / 127.5 - 1, the outer ones beyond
    edges = (torch.arange(-0.5, 256, dtype=torch.float64) / 127.5 - 1 - mean) / math.exp(scale)
    edges[0], edges[-1] = -math.inf, math.inf
    mass = edges.sigmoid().diff()
    known = mass > 1e-9  # below it, float64 loses digits in the difference
    found = vae.compute_bits(LEVELS, torch.full((256,), mean), torch.full((256,), scale)).double()
    torch.testing.assert_close(found[known], -mass[known].log2(), rtol=2e-4, atol=2e-4)


def test_gradients_of_bits_are_finite_however_far_away() -> None:
    mean = torch.tensor([-30.0, 0.0, 30.0]).repeat_interleave(256).requires_grad_()
    scale = torch.tensor([-20.0]).repeat(768).requires_grad_()
    vae.compute_bits(LEVELS.repeat(3), mean, scale).sum().backward()
    assert mean.grad is not None
    assert bool(mean.grad.isfinite().all())


def test_the_latents_bits_are_the_divergence_that_torch_computes() -> None:
    rng = generator("latent")
    mean, spread = torch.randn(5, 16, generator=rng), torch.randn(5, 16, generator=rng)
    exact = kl_divergence(Normal(mean, (spread / 2).exp()), Normal(0.0, 1.0)).sum(-1)
    torch.testing.assert_close(vae.compute_divergence(mean, spread), exact / math.log(2))
    assert torch.equal(vae.compute_divergence(torch.zeros(1, 4), torch.zeros(1, 4)), torch.zeros(1))


def test_the_loss_is_the_lower_bound_and_counts_values() -> None:
    task = make()
    held = task.examples(corpus_for(task, 3, 0), range(3))
    drawn = task.draw(held, generator("draw"))
    model = Autoencoder.from_pretrained(task.model.folder)
    assert isinstance(model, Autoencoder)
    with torch.no_grad():
        mean, spread = model.encode(held["image"] / 127.5 - 1, held["label"])
        latent = Normal(mean, (spread / 2).exp())
        middle, scale = model.decode(mean + latent.scale * drawn["noise"], held["label"])
    price = kl_divergence(latent, Normal(0.0, 1.0)).sum() / math.log(2)
    loss = task.loss({}, drawn, "")
    expected = vae.compute_bits(held["image"], middle, scale).sum() + price
    torch.testing.assert_close(loss.total, expected, rtol=1e-5, atol=1e-3)
    assert float(loss.count) == 3 * 1 * 8 * 8


def test_held_out_noise_goes_by_the_picture() -> None:
    task = make()
    held = task.examples(corpus_for(task, 70, 0), range(70))
    whole, own = task.evaluate({}, held), some(task)
    turned = task.evaluate({}, {k: v.flip(0) for k, v in held.items()})
    torch.testing.assert_close(turned, whole, rtol=1e-5, atol=0)
    assert float(whole["count"]) == 70 * 64
    assert not torch.equal(task.evaluate(own, held)["total"], whole["total"])


def test_a_few_dozen_steps_lower_bits_per_dimension() -> None:
    task = make(full=True)
    corpus = sources.read(SETTINGS.data)
    held = task.examples(corpus, range(0, 1700, 7))
    start = task.init(generator(0))
    train = task.examples(corpus, range(1, 1700, 7))
    order = make_batches(train, Budget(32, steps=40), "order")
    drawn = (task.draw(batch, generator("draw", i)) for i, batch in enumerate(order))
    delta, _ = local_update(task, start, {}, drawn, Recipe(partial(AdamW, lr=2e-3), 1.0))
    after = {k: v + delta[k] for k, v in start.items()}
    bits = [float(task.summary(task.evaluate(own, held))["loss"]) for own in (start, after)]
    # 256 levels alike would be 8 bits; half of the values are black, which even a wide logistic
    # distribution, cut off there, gives a quarter and more
    assert bits[1] < 0.9 * bits[0] < 0.9 * 8


def test_fedper_keeps_the_decoders_last_block() -> None:
    names = list(make().init(generator(0)))
    kept = set(names) - share_all_but_last(1)(names, None)
    assert kept == {n for n in names if n.startswith("decoder.blocks.1.")}
    assert len(kept) == 2 * 3


def test_peft_loads_an_adapter_and_gives_the_same_output(tmp_path: Path) -> None:
    task = make()
    own = some(task)
    task.model.save(tmp_path / "anna", own, SETTINGS, {})
    theirs = PeftModel.from_pretrained(
        Autoencoder.from_pretrained(task.model.folder),  # pyright: ignore[reportArgumentType]
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
    plain = Autoencoder.from_pretrained(tmp_path / "whole", use_safetensors=True)
    assert isinstance(plain, Autoencoder)
    torch.testing.assert_close(told(plain), ours, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(
        told(make(at(tmp_path / "whole")).module.model), ours, atol=1e-5, rtol=1e-5
    )


def test_a_whole_model_is_saved_and_found_again(tmp_path: Path) -> None:
    task = make(full=True)
    own = {k: v + 0.01 for k, v in task.init(generator(0)).items()}
    task.model.save(tmp_path / "anna", own, SETTINGS, {})
    found = task.model.load(tmp_path / "anna")
    assert set(found) == set(own)
    assert all(torch.equal(found[k], v) for k, v in own.items())


def test_an_untrained_network_is_equal_wherever_it_is_made(tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        vae.fresh("tiny", (3, 7, 5), 4, tmp_path / name)
    for file in ("config.json", diffusers_io.WEIGHTS):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()
    # sides that cannot be halved come back as they were: 7 x 5 by way of 4 x 3
    task = make(at(tmp_path / "one"))
    assert task.shape == (3, 7, 5)
    assert task.generate({}, [0, 3], 0, Evaluation()).shape == (2, 3, 7, 5)


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 32, 32)])
def test_the_small_one_is_at_most_eight_megabytes(
    shape: tuple[int, int, int], tmp_path: Path
) -> None:
    vae.fresh("small", shape, 10, tmp_path)
    assert (tmp_path / diffusers_io.WEIGHTS).stat().st_size < 8e6


def test_samples_are_fixed_by_their_seed_and_by_the_class() -> None:
    task = make()
    own = some(task)
    one = task.generate(own, [3, 3, 4], 0, Evaluation())
    assert one.shape == (3, 1, 8, 8)
    assert torch.equal(one[:2], task.generate(own, [3, 3], 0, Evaluation()))
    assert not torch.equal(one, task.generate(own, [3, 3, 4], 1, Evaluation()))
    assert not torch.equal(one[2], task.generate(own, [3, 3, 3], 0, Evaluation())[2])


def test_the_report_gets_a_row_a_class() -> None:
    (sample,) = make().samples({}, Evaluation(sample_images=2), 0)
    assert sample.prompt == "0, 1, 2, 3, 4, 5, 6, 7, 8, 9"
    assert sample.image is not None
    assert sample.image.shape == (1, 10 * 10 - 2, 2 * 10 - 2)


def test_a_client_is_said_to_hold_values() -> None:
    data = replace(SETTINGS.data, limit=60)
    plan = replace(SETTINGS.partition, by="iid")
    settings = replace(SETTINGS, data=data, partition=plan)
    made = build.build(replace(settings, federation=replace(settings.federation, clients=2)))
    assert made.task.measure.items == "values"
    for row in provenance.holdings(made):
        assert row["items"] == 64 * row["train"]


def test_pictures_of_another_size_are_refused() -> None:
    held = Images(torch.zeros(1, 1, 16, 8, dtype=torch.uint8), tuple("0123456789"))
    with pytest.raises(ConfigError, match=r"are 8 x 16 with 1 .* makes 8 x 8"):
        make().examples(Corpus(held, None, ["0"], None, 0), [0])


def test_another_architecture_is_refused_both_ways(tmp_path: Path) -> None:
    diffusion.fresh("tiny", (1, 8, 8), 10, tmp_path)
    with pytest.raises(ConfigError, match=r"is no Autoencoder \(it holds UNet2DModel\): take"):
        make(at(tmp_path))
    with pytest.raises(
        ConfigError, match=r"is no UNet2DModel or .* \(it holds Autoencoder\): take"
    ):
        diffusion.build(at(make().model.folder), full=False, device=CPU)


def test_pickles_and_half_a_network_are_refused_in_one_line(tmp_path: Path) -> None:
    vae.fresh("tiny", (1, 8, 8), 10, tmp_path)
    weights = load_file(tmp_path / diffusers_io.WEIGHTS)
    del weights["decoder.conv_out.bias"]
    save_file(weights, tmp_path / diffusers_io.WEIGHTS)
    with pytest.raises(ConfigError, match=r"^backbone\.path=.* is no Autoencoder[^\n]*$"):
        make(at(tmp_path))
    (tmp_path / diffusers_io.WEIGHTS).rename(tmp_path / "diffusion_pytorch_model.bin")
    with pytest.raises(ConfigError, match=r"no safetensors weights \(pickles are not read\)"):
        make(at(tmp_path))


def test_training_equals_a_plain_loop_with_peft_and_torchs_distributions() -> None:
    task = make()
    start = task.init(generator(0))
    batches = [
        task.draw(task.examples(corpus_for(task, 4, key), range(4)), generator("draw", key))
        for key in range(3)
    ]
    found = trained(task, start, batches, 1e-3)

    plain = Autoencoder.from_pretrained(task.model.folder)
    leaves = wrapped(plain, start, vae.TARGETS, r=4, lora_alpha=16)
    optimiser = AdamW(leaves.values(), 1e-3, (0.0, 0.99))
    for batch in batches:
        picture = batch["image"].float() / 127.5 - 1
        middle, spread, mean, scale = plain(picture, batch["label"].long(), batch["noise"])
        apart = kl_divergence(Normal(middle, (spread / 2).exp()), Normal(0.0, 1.0)).sum()
        bits = vae.compute_bits(batch["image"], mean, scale).sum() + apart / math.log(2)
        optimiser.zero_grad()
        (bits / picture.numel()).backward()
        optimiser.step()
    assert set(found) == set(leaves)
    for name, leaf in leaves.items():
        torch.testing.assert_close(found[name], leaf.detach(), atol=1e-4, rtol=0)
