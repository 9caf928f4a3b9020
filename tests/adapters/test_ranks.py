"""Adapters of several ranks: what is cut off, what is filled, and one scale for all."""

import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from test_peft_io import Make, adapted_logits, close, each_model, logits, random, write
from test_residual import SETTINGS, Small

from fedgen_edge.adapters import peft_io
from fedgen_edge.adapters.lora import inject
from fedgen_edge.adapters.ranks import (
    get_rank_axis,
    get_rank_shapes,
    mask_rank,
    pad_ranks,
    truncate_rank,
)
from fedgen_edge.config import Adapter
from fedgen_edge.leaves import shapes


def test_the_first_terms_are_kept_whatever_the_layer() -> None:
    leaves = random(inject(Small(), SETTINGS))
    few = truncate_rank(leaves, 1)
    assert shapes(few) == {
        "embed.lora_embedding_A": (1, 6),
        "embed.lora_embedding_B": (16, 1),
        "conv.lora_A": (1, 1, 3, 3),
        "conv.lora_B": (3, 1, 1, 1),
        "head.lora_A": (1, 48),
        "head.lora_B": (5, 1),
    }
    assert get_rank_shapes(shapes(leaves), 1) == shapes(few)
    for name, leaf in leaves.items():
        assert torch.equal(few[name], leaf[:1] if get_rank_axis(name) == 0 else leaf[:, :1])
        assert torch.equal(
            mask_rank(leaves, 1)[name].narrow(get_rank_axis(name) or 0, 0, 1), few[name]
        )
        assert mask_rank(leaves, 1)[name].count_nonzero() == few[name].count_nonzero()


def test_a_rank_is_found_by_name_where_another_side_has_the_same_size() -> None:
    # published code for FLoRA takes the first dimension that equals the rank
    square = {"q.lora_A": torch.ones(2, 2), "q.lora_B": torch.ones(2, 2)}
    assert shapes(truncate_rank(square, 1)) == {"q.lora_A": (1, 2), "q.lora_B": (2, 1)}


def test_what_is_padded_was_truncated_and_without_a_rank_nothing_is_done() -> None:
    leaves = random(inject(Small(), SETTINGS))
    for name, leaf in pad_ranks(truncate_rank(leaves, 1), shapes(leaves)).items():
        assert torch.equal(leaf, mask_rank(leaves, 1)[name])
    for found in (
        truncate_rank(leaves, None),
        mask_rank(leaves, None),
        mask_rank(leaves, 2),
        mask_rank(leaves, 9),
    ):
        assert all(torch.equal(found[k], v) for k, v in leaves.items())
    assert get_rank_shapes(shapes(leaves), None) == shapes(leaves)
    other = {"norm.weight": torch.ones(4), "residual.q.lora_A": torch.ones(4, 4)}
    assert all(torch.equal(v, other[k]) for k, v in mask_rank(other, 1).items())
    # what is not known is left alone
    assert pad_ranks(truncate_rank(leaves, 1), {}).keys() == leaves.keys()


@each_model
@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("rank", [1, 3])
def test_peft_computes_with_a_clients_folder_what_the_client_did(
    make: Make, targets: tuple[str, ...], rslora: bool, rank: int, tmp_path: Path
) -> None:
    # published code keeps alpha whatever the rank is, so that scales were 4, 2 and 1 in one mean
    settings = Adapter(rank=4, ranks=(1, 3), alpha=5.0, rslora=rslora, target_modules=targets)
    model = make()
    lora = inject(model, settings)
    own = mask_rank(random(lora), rank)
    kept, found = lora.join_residuals(truncate_rank(own, rank))
    assert found == rank
    write(tmp_path / "anna", kept, lora, peft_io.change_rank(settings, rank))
    told = json.loads((tmp_path / "anna" / "adapter_config.json").read_text())
    assert told["r"] == rank
    # readers that know no rsLoRA take alpha / rank, which is 5 / sqrt(4) or 5 / 4
    assert told["lora_alpha"] / rank == pytest.approx(5 / 2 if rslora else 5 / 4)
    assert told["use_rslora"] is False
    theirs = PeftModel.from_pretrained(make(), str(tmp_path / "anna"))  # pyright: ignore[reportArgumentType]
    ours = adapted_logits(model, lora, own)
    close(ours, logits(theirs))
    assert (ours - adapted_logits(model, lora, random(lora))).abs().max() > 0.01
    back = peft_io.read(tmp_path / "anna", lora, any_rank=True)
    assert shapes(back) == shapes(own)
    close(adapted_logits(model, lora, back), ours)
    with pytest.raises(peft_io.AdapterError, match=f"has rank {rank}, adapter.rank=4"):
        peft_io.read(tmp_path / "anna", lora)
