"""What `simulators.py` gives `flower_peft.py` and `blaze_peft.py`; no library of ours is here.

A folder has `told.json` (what is trained, and how) and `blocks.safetensors` (each client's token
numbers, `[blocks, length]` by its number). They write the last global adapter to `adapter` in it,
as PEFT does, and `done.json`, the seconds that the rounds took.
"""

import json
from functools import cache
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model, set_peft_model_state_dict
from safetensors import safe_open
from transformers import AutoModelForCausalLM
from transformers.utils import logging

Leaves = dict[str, torch.Tensor]
Told = dict[str, Any]


@cache
def read(folder: str) -> Told:
    """What is trained, and how."""
    return json.loads((Path(folder) / "told.json").read_text())


def blocks(folder: str, client: int) -> torch.Tensor:
    """A client's examples, `[blocks, length]`."""
    with safe_open(Path(folder) / "blocks.safetensors", "pt") as file:
        return file.get_tensor(str(client)).long()


def model_of(folder: str) -> Any:
    """The backbone, and a fresh adapter on it."""
    told = read(folder)
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    torch.manual_seed(told["seed"])
    dtype = torch.bfloat16 if told["bf16"] else torch.float32
    backbone = AutoModelForCausalLM.from_pretrained(told["backbone"], dtype=dtype)
    shape = LoraConfig(
        r=told["rank"],
        lora_alpha=told["alpha"],
        target_modules=told["target_modules"],
        task_type="CAUSAL_LM",
    )
    return get_peft_model(backbone, shape)


kept = cache(model_of)
"""The same, loaded once in each process."""


def finish(folder: str, model: Any, adapter: Leaves, seconds: float) -> None:
    """Write what came out."""
    set_peft_model_state_dict(model, adapter)
    model.save_pretrained(Path(folder) / "adapter")
    (Path(folder) / "done.json").write_text(json.dumps({"rounds": seconds}))
