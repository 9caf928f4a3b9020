"""A frozen pair beside each trained one: computed with, written as a higher rank, read back."""

from pathlib import Path

import pytest
import torch
from peft import PeftModel
from test_peft_io import Make, adapted_logits, close, each_model, logits, random, write
from torch import Tensor, nn

from fedgen_edge.adapters import peft_io
from fedgen_edge.adapters.lora import Lora, inject, merge
from fedgen_edge.algorithms.merge_products import make_residuals
from fedgen_edge.config import Adapter
from fedgen_edge.leaves import row, stack
from fedgen_edge.seeds import generator
from fedgen_edge.types import RESIDUAL, Leaves

SETTINGS = Adapter(rank=2, alpha=5.0, target_modules=("embed", "conv", "head"))


class Small(nn.Module):
    """A layer of each kind, of different sizes."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(6, 16)
        self.conv = nn.Conv2d(1, 3, 3, padding=1)
        self.head = nn.Linear(48, 5)
        rng = generator("small")
        for weight in self.parameters():
            nn.init.normal_(weight, std=0.3, generator=rng)

    def forward(self, ids: Tensor) -> Tensor:
        """`[rows]` to `[rows, 5]`."""
        square = self.embed(ids).reshape(-1, 1, 4, 4)
        return self.head(self.conv(square).flatten(1))


def both(lora: Lora, cap: int, key: int = 0) -> Leaves:
    """Trained and frozen factors, none of them zero."""
    rng = generator("both", key)
    own = {k: torch.zeros(shape) for k, shape in lora.shapes().items()}
    return {k: torch.randn(v.shape, generator=rng) * 0.3
            for k, v in (own | make_residuals(own, cap)).items()}  # fmt: skip


IDS = torch.tensor([0, 5, 3, 1])


@pytest.mark.parametrize("cap", [1, 4])
def test_both_products_are_added(cap: int) -> None:
    model = Small()
    lora = inject(model, SETTINGS)
    leaves = both(lora, cap)
    # a convolution with one input and three outputs has no product above rank 3
    assert len(leaves[f"{RESIDUAL}conv.lora_A"]) == min(cap, 3)
    with torch.no_grad(), lora.bind(leaves):
        found = model(IDS)
    plain = Small()
    with torch.no_grad():
        for name, site in lora.layers.items():
            weight, kind = getattr(plain, name).weight, site.kind
            for start in ("", RESIDUAL):
                a, b = leaves[f"{start}{name}.{kind.a}"], leaves[f"{start}{name}.{kind.b}"]
                weight += 2.5 * kind.dense(a, b)
        torch.testing.assert_close(found, plain(IDS))


def test_a_stack_is_each_client_alone() -> None:
    lora = inject(model := Small(), SETTINGS)
    stacked(model, lora, both(lora, 4, 0), both(lora, 4, 1))


def stacked(model: Small, lora: Lora, *adapters: Leaves) -> None:
    """What a stack puts out is what each adapter does by itself."""
    ids = torch.stack([IDS, IDS.flip(0)])
    leaves = stack(adapters)
    with torch.no_grad():
        with lora.bind(leaves):
            together = model(ids.flatten()).reshape(2, 4, 5)
        for client in range(2):
            with lora.bind(row(leaves, client)):
                torch.testing.assert_close(together[client], model(ids[client]))


def test_merged_is_what_was_bound() -> None:
    model = Small()
    lora = inject(model, SETTINGS)
    leaves = both(lora, 3)
    with torch.no_grad(), lora.bind(leaves):
        bound = model(IDS)
    merge(model, lora, leaves)
    with torch.no_grad():
        torch.testing.assert_close(model(IDS), bound)


def test_widened_and_narrowed_are_the_same_products_at_one_rank() -> None:
    model = Small()
    lora = inject(model, SETTINGS)
    leaves = both(lora, 4)
    wide, rank = lora.join_residuals(leaves)
    assert rank == 6
    assert {k: v.shape for k, v in wide.items()} == {
        "embed.lora_embedding_A": (6, 6),
        "embed.lora_embedding_B": (16, 6),
        "conv.lora_A": (6, 1, 3, 3),
        "conv.lora_B": (3, 6, 1, 1),
        "head.lora_A": (6, 48),
        "head.lora_B": (5, 6),
    }
    again = lora.split_residuals(wide)
    for name, leaf in leaves.items():
        assert torch.equal(again[name][tuple(map(slice, leaf.shape))], leaf)
        assert again[name].count_nonzero() == leaf.count_nonzero()
    with torch.no_grad():
        with lora.bind(leaves):
            found = model(IDS)
        with lora.bind(again):
            torch.testing.assert_close(model(IDS), found)


@each_model
@pytest.mark.parametrize("rslora", [False, True])
def test_peft_loads_it_as_one_adapter_and_it_is_read_back(
    make: Make, targets: tuple[str, ...], rslora: bool, tmp_path: Path
) -> None:
    settings = Adapter(rank=2, alpha=5.0, rslora=rslora, target_modules=targets)
    model = make()
    lora = inject(model, settings)
    own = random(lora)
    frozen = {k: torch.randn(v.shape, generator=generator(k)) * 0.3
              for k, v in make_residuals(own, 3).items()}  # fmt: skip
    ours = adapted_logits(model, lora, {**own, **frozen})
    wide, rank = lora.join_residuals({**own, **frozen})
    write(tmp_path / "anna", wide, lora, peft_io.change_rank(settings, rank))
    theirs = PeftModel.from_pretrained(make(), str(tmp_path / "anna"))  # pyright: ignore[reportArgumentType]
    close(ours, logits(theirs))
    assert (ours - adapted_logits(model, lora, own)).abs().max() > 0.01
    close(adapted_logits(model, lora, peft_io.read(tmp_path / "anna", lora, any_rank=True)), ours)
    # as a start it would be of another rank than the one that was asked for
    with pytest.raises(peft_io.AdapterError, match=f"has rank {rank}, adapter.rank=2"):
        peft_io.read(tmp_path / "anna", lora)
