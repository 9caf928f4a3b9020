"""A mixture of two adapters, computed with, and written as one folder that PEFT loads."""

from pathlib import Path

import pytest
import torch
from peft import PeftModel
from test_peft_io import Make, adapted_logits, close, each_model, llama, logits, random, write
from test_residual import IDS, SETTINGS, Small, both

from fedgen_edge.adapters import peft_io
from fedgen_edge.adapters.lora import Lora, inject
from fedgen_edge.algorithms.merge_products import make_residuals
from fedgen_edge.algorithms.personal_models import mix_adapters
from fedgen_edge.config import Adapter
from fedgen_edge.leaves import scale
from fedgen_edge.types import RESIDUAL, Leaves


def pair_of(own: Leaves, cap: int) -> tuple[Leaves, Leaves]:
    """Two adapters with the same frozen pair, if any."""
    frozen = (
        {k: torch.ones_like(v) * 0.1 for k, v in make_residuals(own, cap).items()} if cap else {}
    )
    other = {k: v.flip(0) * 1.5 for k, v in own.items()}
    return {**own, **frozen}, {**other, **frozen}


@pytest.mark.parametrize("cap", [0, 2])
def test_layers_put_out_a_share_of_each(cap: int) -> None:
    lora = inject(model := Small(), SETTINGS)
    own = {k: v for k, v in both(lora, 2).items() if not k.startswith(RESIDUAL)}
    linear(model, lora, *pair_of(own, cap))


def linear(model: Small, lora: Lora, whole: Leaves, another: Leaves) -> None:
    """A mixture puts out its shares of what each adapter does by itself.

    One layer after the other is adapted, so that the output is linear in its products.
    """
    for name in ("embed", "conv", "head"):
        one, other = (
            {k: v for k, v in leaves.items() if f"{name}." in k} for leaves in (whole, another)
        )
        found = []
        for leaves in (one, other, mix_adapters(one, other, 0.3)):
            with torch.no_grad(), lora.bind(leaves):
                found.append(model(IDS))
        torch.testing.assert_close(found[2], 0.3 * found[0] + 0.7 * found[1], atol=1e-5, rtol=1e-5)
        assert (found[0] - found[1]).abs().max() > 0.1


@each_model
@pytest.mark.parametrize("cap", [0, 3])
def test_peft_loads_a_mixture_and_it_is_read_back(
    make: Make, targets: tuple[str, ...], cap: int, tmp_path: Path
) -> None:
    check(make, targets, cap, tmp_path)


def test_peft_loads_a_mixture_of_embeddings(tmp_path: Path) -> None:
    check(llama, ("embed_tokens", "q_proj"), 0, tmp_path)


def check(make: Make, targets: tuple[str, ...], cap: int, folder: Path) -> None:
    settings = Adapter(rank=2, alpha=5.0, target_modules=targets)
    model = make()
    lora = inject(model, settings)
    one, other = pair_of(random(lora), cap)
    leaves = mix_adapters(one, other, 0.25)
    wide, rank = lora.join_residuals(leaves)
    assert rank == 4 + cap
    write(folder / "anna", wide, lora, peft_io.change_rank(settings, rank))
    ours = adapted_logits(model, lora, leaves)
    theirs = PeftModel.from_pretrained(make(), str(folder / "anna"))  # pyright: ignore[reportArgumentType]
    close(ours, logits(theirs))
    close(adapted_logits(model, lora, peft_io.read(folder / "anna", lora, any_rank=True)), ours)
    # it is neither of the two, nor what means of factors would be
    means = {k: v + w for (k, v), w in zip(
        scale(one, 0.25).items(), scale(other, 0.75).values(), strict=True)}  # fmt: skip
    for leaf in (one, other, means):
        assert (ours - adapted_logits(model, lora, leaf)).abs().max() > 1e-3
