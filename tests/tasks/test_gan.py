from dataclasses import replace
from itertools import combinations
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from torch.nn import functional as F
from torch.optim import AdamW

from conftest import corpus_for, trained, wrapped
from fedgen_edge.adapters.lora import Lora
from fedgen_edge.algorithms.share import share_all_but_last
from fedgen_edge.config import Evaluation, Settings, from_table
from fedgen_edge.errors import ConfigError
from fedgen_edge.seeds import generator, normal
from fedgen_edge.tasks.adapted import use_averages
from fedgen_edge.tasks.images import diffusion, gan
from fedgen_edge.tasks.images.gan import GanTask
from fedgen_edge.tasks.images.gan_networks import Gan
from fedgen_edge.types import AVERAGE, Batch, Leaves

CPU = torch.device("cpu")
SETTINGS = from_table(
    {
        "task": "gan",
        "backbone": {"path": "tiny"},
        "adapter": {"rank": 4, "alpha": 8},
        "data": {"source": "digits", "names": list("0123456789")},
        "gan": {"critic_steps": 2, "critic_rate": 3.0, "r1": 0.5, "average": 0.8},
    }
)


def make(settings: Settings = SETTINGS, *, full: bool = False) -> GanTask:
    return gan.build(settings, full=full, device=CPU)


def some(task: GanTask) -> Leaves:
    rng = generator("some")
    return {k: torch.randn(v.shape, generator=rng) * 0.2 for k, v in task.init(rng).items()}


def drawn(task: GanTask, count: int, key: int) -> Batch:
    held = task.examples(corpus_for(task, count, key), range(count))
    return task.draw(held, generator("draw", key))


def test_training_equals_a_plain_loop_with_peft_and_two_optimisers() -> None:
    task = make()
    start = task.init(generator(0))
    batches = [drawn(task, 4, key) for key in range(3)]
    found = trained(task, start, batches, 1e-3)

    plain = Gan.from_pretrained(task.model.folder)
    leaves = wrapped(plain, start, gan.TARGETS, r=4, lora_alpha=8)
    average = {k: v.detach().clone() for k, v in leaves.items() if k.startswith("generator.")}
    critic = AdamW([v for k, v in leaves.items() if k.startswith("critic.")], 3e-3, (0.0, 0.99))
    maker = AdamW([v for k, v in leaves.items() if k.startswith("generator.")], 1e-3, (0.0, 0.99))
    for batch in batches:
        label, real = batch["label"].long(), batch["image"].float() / 127.5 - 1
        for _ in range(2):
            made = plain.generator(batch["noise"], label).detach()
            real.requires_grad_()
            score = plain.critic(real, label)
            slope = torch.autograd.grad(score.sum(), real, create_graph=True)[0]
            loss = F.relu(1 - score).mean() + F.relu(1 + plain.critic(made, label)).mean()
            loss = loss + 0.25 * slope.square().flatten(1).sum(1).mean()
            critic.zero_grad()
            loss.backward()
            critic.step()
        maker.zero_grad()
        (-plain.critic(plain.generator(batch["noise"], label), label).mean()).backward()
        maker.step()
        for name, value in average.items():
            value.mul_(0.8).add_(0.2 * leaves[name].detach())
    assert set(found) == set(leaves) | {AVERAGE + name for name in average}
    for name, leaf in leaves.items():
        torch.testing.assert_close(found[name], leaf.detach(), atol=1e-4, rtol=0)
    for name, value in average.items():
        torch.testing.assert_close(found[AVERAGE + name], value, atol=1e-4, rtol=0)


def test_a_critic_that_is_zero_everywhere_pays_both_hinges_and_no_penalty() -> None:
    task = make(full=True)
    own = {k: torch.zeros_like(v) for k, v in task.init(generator(0)).items()}
    batch = drawn(task, 5, 0)
    # its scores are 0, so each hinge is 1
    assert float(task.loss(own, batch, "critic.").total.detach()) == pytest.approx(10)
    assert float(task.loss(own, batch, "generator.").total) == 0


def test_the_energy_score_is_the_formula() -> None:
    task = make()
    held = task.examples(corpus_for(task, 3, 0), range(3))
    own = some(task)
    expected = 0.0
    for i in range(3):
        number, label = held["number"][i : i + 1], held["label"][i : i + 1].long()
        with torch.no_grad(), task.model.adapter.bind(use_averages(own)):  # pyright: ignore
            y = [
                task.network(normal(number, rival, (16,)), label).flatten()
                for rival in range(gan.GENERATED_PER_IMAGE)
            ]
        x = (held["image"][i].float() / 127.5 - 1).flatten()
        near = sum(float((x - one).square().mean().sqrt()) for one in y) / len(y)
        pairs = [float((a - b).square().mean().sqrt()) for a, b in combinations(y, 2)]
        expected += near - sum(pairs) / len(pairs) / 2
    assert float(task.evaluate(own, held)["total"]) == pytest.approx(expected, rel=1e-5)


def test_pictures_are_made_by_the_moving_average() -> None:
    task = make()
    own = some(task)
    moved = {k: v + 1 if k.startswith("generator.") else v for k, v in own.items()}
    one, two = (task.generate(leaves, [1, 2], 0, Evaluation()) for leaves in (own, moved))
    assert torch.equal(one, two)
    moved = {k: v + 1 if k.startswith(AVERAGE) else v for k, v in own.items()}
    assert not torch.equal(one, task.generate(moved, [1, 2], 0, Evaluation()))


def test_peft_loads_an_adapter_and_gives_the_same_pictures(tmp_path: Path) -> None:
    task = make()
    own = some(task)
    task.model.save(tmp_path / "adapter", own, SETTINGS, {})
    noise, label = torch.randn(3, 16, generator=generator("n")), torch.tensor([0, 5, 9])
    loaded = PeftModel.from_pretrained(
        Gan.from_pretrained(task.model.folder), str(tmp_path / "adapter")
    )
    again = task.model.load(tmp_path / "adapter")
    assert isinstance(task.model.adapter, Lora)
    with torch.no_grad():
        theirs = loaded.get_base_model()(noise, label)
        critic = loaded.get_base_model().critic(theirs, label)
        with task.model.adapter.bind(use_averages(again)):
            ours = task.network(noise, label)
            told = task.network.critic(ours, label)
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)
    torch.testing.assert_close(told, critic, atol=1e-5, rtol=0)
    assert set(again) == set(own)

    task.model.save_merged(tmp_path / "merged", own)
    with torch.no_grad():
        merged = Gan.from_pretrained(tmp_path / "merged")(noise, label)
    torch.testing.assert_close(merged, theirs, atol=1e-5, rtol=0)


def test_a_whole_model_comes_back_as_it_was_served(tmp_path: Path) -> None:
    task = make(full=True)
    own = task.init(generator(0))
    own = {k: v + 0.5 if k.startswith(AVERAGE) else v for k, v in own.items()}
    task.model.save(tmp_path / "whole", own, SETTINGS, {})
    again = task.model.load(tmp_path / "whole")
    assert set(again) == set(own)
    for name, value in use_averages(own).items():
        assert torch.equal(again[name], value)


def test_fedper_keeps_the_last_block_of_each_network_with_its_average() -> None:
    names = list(make().init(generator(0)))
    kept = set(names) - share_all_but_last(1)(names, None)
    layers = {name.rsplit(".", 2)[0] for name in kept}
    assert layers == {"generator.blocks.1", "critic.blocks.1", "average.generator.blocks.1"}


def test_it_trains_and_is_judged_in_bf16() -> None:
    half = replace(SETTINGS, backbone=replace(SETTINGS.backbone, precision="bf16"))
    one, two = make(half), make()
    batch = drawn(two, 4, 0)
    for phase in (gan.CRITIC, gan.GENERATOR):
        near, exact = (task.loss(some(two), batch, phase).total.detach() for task in (one, two))
        torch.testing.assert_close(near, exact, rtol=0.1, atol=0.1)
    held = one.examples(corpus_for(one, 4, 0), range(4))
    assert bool(one.evaluate(some(two), held)["total"].isfinite())


def test_sides_that_cannot_be_halved_are_refused(tmp_path: Path) -> None:
    for shape in ((3, 28, 28), (3, 32, 16)):
        with pytest.raises(ConfigError, match=r"set data.size to a multiple of 8"):
            gan.fresh("small", shape, 10, tmp_path)


def test_another_networks_folder_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "unet"
    folder.mkdir()
    diffusion.fresh("tiny", (1, 8, 8), 10, folder)
    with pytest.raises(ConfigError, match="is no Gan"):
        make(from_table({"task": "gan", "backbone": {"path": str(folder)}}))
