"""Backbones and toy tasks that tests share."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Generator, Tensor
from torch.optim import AdamW

from fedgen_edge.algorithms.methods import METHODS
from fedgen_edge.config import Settings
from fedgen_edge.data.batches import Shard
from fedgen_edge.data.corpus import Corpus, Images, Texts
from fedgen_edge.federation.client import Recipe, local_update
from fedgen_edge.leaves import add
from fedgen_edge.seeds import generator
from fedgen_edge.tasks.task import TrainableTask
from fedgen_edge.types import Batch, Leaves, PerClient, Phase, Statistics, settle_nothing

LONG = {"test_recipes.py", "test_faults.py"}
"""Files that take minutes, which begin first, so that other cores have enough left to do."""
SHARED = Path(__file__).parents[2] / "shared" / "data"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Bring the long ones to the front."""
    items.sort(key=lambda item: item.path.name not in LONG)


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """The tiny backbone is made here, not in the user's cache."""
    pytest.MonkeyPatch().setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """Tiny models gain nothing from more, and tests side by side lose a great deal."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session", params=["stories260K", "tiny"])
def backbone(request: pytest.FixtureRequest) -> str:
    """A small pretrained backbone where the data folder is, and a random one."""
    if request.param == "tiny":
        return "tiny"
    if not (SHARED / "stories260K").is_dir():
        pytest.skip("the data folder beside the repository is not here: no stories260K")
    return str(SHARED / "stories260K")


def corpus_for(task: TrainableTask, count: int, client: int) -> Corpus:
    """Different examples of one client, of what the task learns."""
    if task.measure.material == "text":
        texts = sentences(count, client)
        return Corpus(Texts(texts, [1] * count), None, None, None, 0)
    rng = generator("pictures", client)
    pixels = torch.randint(256, (count, 1, 8, 8), generator=rng, dtype=torch.uint8)
    names = tuple("0123456789")
    return Corpus(Images(pixels, names), None, [names[i % 10] for i in range(count)], None, 0)


@dataclass(frozen=True)
class Line:
    """Loss (w - x)^2 / 2 of each number x, under one leaf w: gradients by hand."""

    @property
    def phases(self) -> tuple[Phase, ...]:
        return (Phase(),)

    def init(self, rng: Generator) -> Leaves:
        del rng
        return {"w": torch.zeros(())}

    def draw(self, examples: Batch, rng: Generator) -> Batch:
        del rng
        return examples

    def loss(self, adapter: Leaves, batch: Batch, phase: str) -> PerClient:
        del phase
        error = (adapter["w"].unsqueeze(-1) - batch["x"]).square() / 2
        return PerClient((error * batch["mask"]).sum(-1), batch["mask"].sum(-1).float())

    settle = staticmethod(settle_nothing)

    def evaluate(self, adapter: Leaves, examples: Batch) -> Statistics:
        with torch.no_grad():
            loss = self.loss(adapter, examples, "")
        return {"total": loss.total, "count": loss.count}

    def summary(self, statistics: Statistics) -> dict[str, Tensor]:
        return {"loss": statistics["total"] / statistics["count"]}


def suited(name: str) -> dict[str, Any]:
    """The part `training` of settings with which a method works; nothing for any."""
    plain = {"optimizer": "sgd", "lr": 0.05, "clip": 0.0}
    return plain if METHODS[name].find_conflict(Settings()) else {}


def numbers(*values: float) -> Batch:
    """Examples of a Line."""
    return {"x": torch.tensor(values), "mask": torch.ones(len(values), dtype=torch.bool)}


def line_shard(name: str, *values: float) -> Shard:
    """A client that holds these numbers, for everything."""
    return Shard(name, numbers(*values), numbers(*values), numbers(*values))


def sentences(count: int, client: int) -> list[str]:
    """Different short texts of one client."""
    words = ["dog", "cat", "sun", "red", "ball", "tree", "boat", "moon", "bird", "fish"]
    return [
        f"One day {words[client % 10]} number {i} saw a {words[(3 * i + client) % 10]} and a "
        f"{words[(7 * i + 1) % 10]}. They went {'up' if i % 2 else 'down'}."
        for i in range(count)
    ]


def wrapped(plain: torch.nn.Module, start: Leaves, targets: Sequence[str], **how: int) -> Leaves:
    """Have PEFT adapt a network, from the same start; its trained parameters by our names."""
    adapted = get_peft_model(plain, LoraConfig(target_modules=list(targets), **how))
    leaves = {
        name.removeprefix("base_model.model.").replace(".default", "").removesuffix(".weight"): p
        for name, p in adapted.named_parameters()
        if p.requires_grad
    }
    with torch.no_grad():
        for name, leaf in leaves.items():
            leaf.copy_(start[name])
    return leaves


def trained(task: TrainableTask, start: Leaves, batches: Sequence[Batch], rate: float) -> Leaves:
    """The leaves after a local update by AdamW with the moments that a GAN wants."""
    ends = {"epoch": torch.tensor(0), "last": torch.tensor(False)}
    recipe = Recipe(partial(AdamW, lr=rate, betas=(0.0, 0.99)))
    delta, _ = local_update(task, start, {}, [{**b, **ends} for b in batches], recipe)
    return add(start, delta)
