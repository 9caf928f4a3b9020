"""A small matrix between two factors: computed with, and written as plain LoRA."""

from pathlib import Path

import torch
from peft import PeftModel
from test_mixed import linear
from test_peft_io import Make, adapted_logits, close, each_model, logits, random, write
from test_residual import IDS, SETTINGS, Small, stacked

from fedgen_edge.adapters import peft_io
from fedgen_edge.adapters.lora import Lora, inject, merge
from fedgen_edge.algorithms.fed_sb import begins
from fedgen_edge.config import Adapter
from fedgen_edge.seeds import generator
from fedgen_edge.types import CORE, Leaves


def cored(lora: Lora, key: int = 0) -> Leaves:
    """Both factors and what is between them, none of them zero or one."""
    rng = generator("cored", key)
    names = begins({k: torch.zeros(shape) for k, shape in lora.shapes().items()})
    return {k: torch.randn(v.shape, generator=rng) * 0.3 for k, v in names.items()}


def test_the_product_of_all_three_is_added() -> None:
    model = Small()
    lora = inject(model, SETTINGS)
    leaves = cored(lora)
    with torch.no_grad(), lora.bind(leaves):
        found = model(IDS)
    plain = Small()
    with torch.no_grad():
        for name, how in (("embed", "or,rs,sv->vo"), ("conv", "orxy,rs,sihw->oihw"),
                          ("head", "or,rs,si->oi")):  # fmt: skip
            kind = lora.layers[name].kind
            b, a = leaves[f"{name}.{kind.b}"], leaves[f"{name}.{kind.a}"]
            whole = torch.einsum(how, b, leaves[f"{name}.{CORE}"], a)
            getattr(plain, name).weight += 2.5 * whole
        torch.testing.assert_close(found, plain(IDS))
        merge(model, lora, leaves)
        torch.testing.assert_close(model(IDS), found)


def test_two_of_them_are_mixed_in_what_layers_put_out() -> None:
    lora = inject(model := Small(), SETTINGS)
    linear(model, lora, cored(lora, 0), cored(lora, 1))


def test_a_stack_is_each_client_alone() -> None:
    lora = inject(model := Small(), SETTINGS)
    stacked(model, lora, cored(lora, 0), cored(lora, 1))


@each_model
def test_peft_loads_it_as_plain_lora(make: Make, targets: tuple[str, ...], tmp_path: Path) -> None:
    settings = Adapter(rank=2, alpha=5.0, target_modules=targets)
    model = make()
    lora = inject(model, settings)
    own = random(lora)
    between = {k: torch.randn(v.shape, generator=generator(k))
               for k, v in begins(own).items() if k.endswith(CORE)}  # fmt: skip
    ours = adapted_logits(model, lora, {**own, **between})
    wide, rank = lora.join_residuals({**own, **between})
    assert rank == 2
    assert wide.keys() == own.keys()
    write(tmp_path / "anna", wide, lora, settings)
    theirs = PeftModel.from_pretrained(make(), str(tmp_path / "anna"))  # pyright: ignore[reportArgumentType]
    close(ours, logits(theirs))
    close(adapted_logits(model, lora, peft_io.read(tmp_path / "anna", lora)), ours)
    assert (ours - adapted_logits(model, lora, own)).abs().max() > 0.01
