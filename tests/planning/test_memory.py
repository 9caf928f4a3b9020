"""What a plan says of memory: by arithmetic, and against the growth of a process that trains."""

import math
import os
import subprocess
import sys
from dataclasses import astuple, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from conftest import SHARED
from fedgen_edge.config import Backbone, Settings, from_table
from fedgen_edge.planning import memory
from fedgen_edge.planning.memory import (
    StepMemory,
    StepPlan,
    count_backbone_bytes,
    count_training_step,
    count_weight_bytes,
    estimate_client_bytes,
)
from fedgen_edge.tasks.language.config_only import load_config, make_config

LLAMA = {
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 258,
    "max_position_embeddings": 512,
}
KINDS: dict[str, dict[str, Any]] = {
    "llama": LLAMA,
    "gpt2": {"model_type": "gpt2", "n_embd": 32, "n_layer": 4, "n_head": 2, "vocab_size": 258},
    "experts": LLAMA | {"model_type": "mixtral", "num_local_experts": 4},
    "layers in turn": LLAMA
    | {
        "model_type": "gemma2",
        "head_dim": 8,
        "sliding_window": 8,
        "layer_types": ["sliding_attention", "full_attention"] * 4,
        "num_hidden_layers": 8,  # more than two turns and one more
    },
}


def settings(**more: Any) -> Settings:
    return from_table({"backbone": {"path": "tiny"}, "adapter": {"rank": 4}, **more})


SMALL = StepPlan(2, 32)


def step(told: Settings, work: StepPlan = SMALL) -> StepMemory:
    return count_training_step(told, load_config(told.backbone), work, torch.float32)


def test_a_backbones_bytes_are_its_weights_by_precision() -> None:
    # One matrix 128 x 64 = 8192 values, and 100 others that are never quantised.
    every, linear = {"w": (128, 64), "norm": (100,)}, {"w": (128, 64)}
    assert count_weight_bytes(every, linear, "float32") == 4 * 8292
    assert count_weight_bytes(every, linear, "bf16") == 2 * 8292
    # int8: a byte each, a float32 for each of 128 rows; and the matrix in bf16 while it is used
    assert count_weight_bytes(every, linear, "int8") == 200 + 8192 + 4 * 128 + 2 * 8192
    # int4: half a byte each, 8192 / 64 = 128 scales of a byte, and one float32 for those
    assert count_weight_bytes(every, linear, "int4") == 200 + 4096 + 128 + 4 + 2 * 8192


def test_what_is_quantised_is_every_linear_layer_but_the_head() -> None:
    config = make_config(LLAMA)
    # of a layer q and o are 32 x 32, k and v 16 x 32, and the MLP has three of 32 x 64
    linear = 4 * (2 * 32 * 32 + 2 * 16 * 32 + 3 * 32 * 64)
    rows = 4 * (32 + 32 + 16 + 16 + 64 + 64 + 32)
    rest = 2 * 258 * 32 + (2 * 4 + 1) * 32
    whole = linear + 4 * rows + 2 * rest + 2 * 32 * 64
    assert count_backbone_bytes(config, settings(), "int8") == whole
    assert count_backbone_bytes(config, settings(), "bf16") == 2 * (linear + rest)


def test_adapter_gradients_and_moments_are_whole_numbers_of_the_adapter() -> None:
    # Two layers, rank 4: 896 values as float32. It is there as received and as trained. Its
    # gradients stay as they were and as clipped, and AdamW has two moments and a step of a float
    # for each of eight leaves.
    values = 2 * (2 * 4 * 32 + 4 * 32 + 4 * 16)
    found = step(settings())
    assert found.adapter == 2 * 4 * values
    assert found.optimiser == 2 * 4 * values + 8 * 4
    assert found.gradients == pytest.approx(2 * 4 * values, rel=0.01)  # and some single numbers
    assert step(settings(training={"optimizer": "sgd"})).optimiser == 0
    ffa = step(settings(method={"name": "ffa-lora"}))
    assert ffa.optimiser == 2 * 4 * 2 * (4 * 32 + 4 * 16) + 4 * 4  # of B alone


def flat(of: StepMemory) -> list[float]:
    return [of.adapter, of.optimiser, of.gradients, of.peak, *astuple(of.cost)]


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("shape", KINDS.values(), ids=KINDS)
def test_a_deep_model_is_counted_with_few_layers_as_with_all(
    monkeypatch: pytest.MonkeyPatch, shape: dict[str, Any], checkpointing: bool
) -> None:
    config, work = make_config(shape), StepPlan(2, 32, checkpointing=checkpointing)
    short = count_training_step(settings(), config, work, torch.bfloat16)
    monkeypatch.setattr(memory, "COUNTED_PERIODS", 99)
    whole = count_training_step(settings(), config, work, torch.bfloat16)
    assert flat(short) == pytest.approx(flat(whole))


def test_checkpointing_takes_less_memory_and_more_work() -> None:
    config, told = make_config(LLAMA), settings()
    plain, again = (
        count_training_step(told, config, StepPlan(8, 128, checkpointing=c), torch.float32)
        for c in (False, True)
    )
    assert again.peak < 0.6 * plain.peak
    # a frozen product is done forwards and, for its input, backwards; then once more forwards
    assert 1.3 < again.cost.flops / plain.cost.flops < 1.5


def test_a_stack_takes_as_many_adapters_and_activations() -> None:
    one, three = step(settings(), StepPlan(2, 32, 1)), step(settings(), StepPlan(2, 32, 3))
    assert three.adapter == 3 * one.adapter
    assert three.cost.flops == pytest.approx(3 * one.cost.flops, rel=0.01)
    assert three.activations == pytest.approx(3 * one.activations, rel=0.05)


def test_flops_are_those_of_the_products() -> None:
    # 64 tokens. Forwards each frozen matrix takes 2 * 64 flops a value; backwards too, for its
    # input's gradient, but for the first layer's q, k, v, below which nothing is trained but
    # through A. The head, 258 x 32, is met twice, and attention's two products are of 32 x 32 x 8
    # a head: twice forwards, five times backwards on a processor.
    told = settings(adapter={"rank": 1})
    found = step(told).cost.flops
    layer = 2 * 32 * 32 + 2 * 16 * 32 + 3 * 32 * 64
    frozen = 2 * 64 * (2 * (2 * layer) - (32 * 32 + 2 * 16 * 32) + 2 * 258 * 32)
    attention = (6 + 5) * 2 * (2 * 4 * 32 * 32 * 8)
    lora = 2 * 64 * 2 * (32 + 32 + 32 + 16) * 3
    assert found == pytest.approx(frozen + attention + lora, rel=0.02)


def test_bytes_of_a_client_grow_with_its_rank_alone() -> None:
    config, told = make_config(LLAMA), settings()
    small, large = (estimate_client_bytes(told, config, "int4", rank) for rank in (1, 9))
    values = 4 * (32 + 32 + 32 + 16)
    # eight more ranks: in AdamW's step the adapter twice, gradients twice and moments twice, or
    # more of them where that is not the peak
    assert large - small >= 8 * 4 * values * 4
    assert estimate_client_bytes(told, config, "int4", 4) == estimate_client_bytes(
        told, config, "int4"
    )


MEASURE = Path(__file__).with_name("grown.py")
REAL = {
    "tiny": ("tiny", 16, 512, 0, False),
    "tiny, a stack, checkpointing": ("tiny", 6, 512, 4, True),
    "stories260K": ("stories260K", 8, 512, 0, False),
    "gpt2, a stack": ("gpt2", 2, 512, 4, False),
}


@pytest.mark.parametrize("case", REAL.values(), ids=REAL)
def test_a_process_that_trains_grows_by_what_is_said(
    case: tuple[str, int, int, int, bool],
) -> None:
    name, rows, length, clients, checkpointing = case
    path = {"gpt2": KINDS["gpt2"], "stories260K": str(SHARED / name)}.get(name, name)
    if name == "stories260K" and not Path(str(path)).is_dir():
        pytest.skip("the data folder beside the repository is not here: no stories260K")
    work = StepPlan(rows, length, clients, checkpointing)
    shape = path if isinstance(path, dict) else None
    config = make_config(shape) if shape else load_config(Backbone(path=str(path)))
    told = replace(settings(), backbone=Backbone(path=str(path)))
    said = count_training_step(told, config, work, torch.float32).peak
    assert said > 5e7  # small beside it is what a process grows by for other reasons
    assert _grown(config, work) == pytest.approx(said, rel=0.1)


def _grown(config: Any, work: StepPlan) -> int:
    """Bytes by which a fresh process grew while it trained."""
    given = config.to_json_string(use_diff=False)
    told = [sys.executable, str(MEASURE), *map(str, (work.rows, work.length, work.clients))]
    # memory that is freed is given back at once, or a peak would be of holes too
    where = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    done = subprocess.run(
        [*told, str(int(work.checkpointing))],
        input=given, text=True, capture_output=True, check=True,
        env={**os.environ, **where, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    return int(done.stdout)


def test_sums_of_a_step_are_its_peak() -> None:
    found = step(settings())
    parts = (found.adapter, found.optimiser, found.gradients, found.activations)
    assert math.fsum(parts) == found.peak


def test_experts_are_counted_in_float32_as_in_bf16() -> None:
    # the same products, of numbers of four bytes for two
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "vocab_size": 50}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "num_local_experts": 4}
    config = make_config({"model_type": "mixtral", **shape, **heads})
    wide, narrow = (
        count_training_step(Settings(), config, StepPlan(1, 8), dtype)
        for dtype in (torch.float32, torch.bfloat16)
    )
    assert wide.cost.flops == narrow.cost.flops > 0
    bytes_of = [count_backbone_bytes(config, Settings(), p) for p in ("float32", "bf16")]
    assert bytes_of[0] == 2 * bytes_of[1]
