"""PEFT's own folders: plain LoRA gives what PEFT gives, every other kind is refused by its name."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import IA3Config, LoraConfig, PeftModel, PromptTuningConfig, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_peft_io import adapted_logits, close, llama, logits, written
from torch import nn

from fedgen_edge.adapters import peft_io
from fedgen_edge.adapters.lora import Lora, inject
from fedgen_edge.config import Adapter
from fedgen_edge.errors import AdapterError

TARGETS = ("q_proj", "v_proj")
pytestmark = pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers` to `True`")


def peft_folder(folder: Path, config: Any) -> Path:
    """An adapter of PEFT's on the small Llama, none of whose factors is zero."""
    model = get_peft_model(llama(), config)  # pyright: ignore[reportArgumentType]
    for name, weight in model.named_parameters():
        if "lora_B" in name or "lora_embedding_A" in name:
            nn.init.normal_(weight, std=0.3)
    model.save_pretrained(str(folder))
    return folder


def injected(targets: tuple[str, ...] = TARGETS) -> tuple[nn.Module, Lora]:
    model = llama()
    return model, inject(model, Adapter(rank=2, target_modules=targets))


def logits_by_peft(folder: Path) -> torch.Tensor:
    return logits(PeftModel.from_pretrained(llama(), str(folder)).eval())  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("initial", [True, False, "gaussian", "orthogonal"])
def test_whatever_plain_lora_began_from_it_gives_what_peft_gives(
    initial: Any, tmp_path: Path
) -> None:
    config = LoraConfig(r=2, target_modules=[*TARGETS], init_lora_weights=initial)
    folder = peft_folder(tmp_path / "anna", config)
    model, lora = injected()
    close(adapted_logits(model, lora, peft_io.read(folder, lora)), logits_by_peft(folder))


KINDS: list[tuple[Callable[[], Any], str]] = [
    (lambda: LoraConfig(r=2, target_modules=[*TARGETS], init_lora_weights="pissa"),
     "init_lora_weights='pissa'"),
    (lambda: LoraConfig(r=2, target_modules=[*TARGETS], init_lora_weights="olora"),
     "init_lora_weights='olora'"),
    (lambda: LoraConfig(r=2, target_modules=[*TARGETS], use_dora=True), "use_dora=True"),
    (lambda: LoraConfig(r=2, target_modules=[*TARGETS], lora_bias=True), "lora_bias=True"),
    (lambda: LoraConfig(r=2, target_modules=[*TARGETS], modules_to_save=["lm_head"]),
     r"modules_to_save=\['lm_head'\]"),
    (lambda: LoraConfig(r=2, target_modules=[*TARGETS], trainable_token_indices=[1]),
     r"trainable_token_indices=\[1\]"),
    (lambda: IA3Config(target_modules=["q_proj"], feedforward_modules=[]), "peft_type='IA3'"),
    (lambda: PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2),
     "peft_type='PROMPT_TUNING'"),
]  # fmt: skip


@pytest.mark.filterwarnings("ignore:`lora_bias=True` was passed")
@pytest.mark.filterwarnings("ignore:Adapter .default.")
@pytest.mark.parametrize(("config", "name"), KINDS, ids=[name for _, name in KINDS])
def test_every_other_kind_is_refused_by_its_name(
    config: Callable[[], Any], name: str, tmp_path: Path
) -> None:
    folder = peft_folder(tmp_path / "anna", config())
    with pytest.raises(AdapterError, match=rf"anna is not plain LoRA \({name}\)") as caught:
        peft_io.read(folder, injected()[1])
    assert "\n" not in str(caught.value)


def test_a_kind_that_is_not_known_yet_is_refused_by_its_name(tmp_path: Path) -> None:
    lora, _ = written(tmp_path)
    change_config(tmp_path / "anna", future={"of": 1})
    with pytest.raises(AdapterError, match=r"not plain LoRA \(future=\{'of': 1\}\)"):
        peft_io.read(tmp_path / "anna", lora)


def change_config(folder: Path, **change: object) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))


# ---- an embedding or head, of which PEFT writes the frozen matrix too


@pytest.mark.parametrize("layer", ["embed_tokens", "lm_head"])
def test_peft_folders_of_an_embedding_or_head_give_what_peft_gives(
    layer: str, tmp_path: Path
) -> None:
    targets = (layer, "q_proj")
    folder = peft_folder(tmp_path / "anna", LoraConfig(r=2, target_modules=[*targets]))
    assert any("base_layer" in name for name in load_file(folder / peft_io.WEIGHTS))
    model, lora = injected(targets)
    close(adapted_logits(model, lora, peft_io.read(folder, lora)), logits_by_peft(folder))


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda frozen: frozen * 1.5, "holds another model.embed_tokens than backbone.path"),
        (lambda frozen: frozen[:-1], "has another layer, model.embed_tokens"),
    ],
)
def test_a_frozen_matrix_of_another_backbone_is_refused(
    change: Callable[[torch.Tensor], torch.Tensor], complaint: str, tmp_path: Path
) -> None:
    folder = peft_folder(tmp_path / "anna", LoraConfig(r=2, target_modules=["embed_tokens"]))
    tensors = load_file(folder / peft_io.WEIGHTS)
    name = "base_model.model.model.embed_tokens.base_layer.weight"
    save_file({**tensors, name: change(tensors[name])}, folder / peft_io.WEIGHTS)
    with pytest.raises(AdapterError, match=f"anna {complaint}"):
        peft_io.read(folder, injected(("embed_tokens",))[1])


# ---- numbers and JSON that are none


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("lora_alpha", "16"),
        ("lora_alpha", None),
        ("lora_alpha", [16]),
        ("lora_alpha", True),
        ("lora_alpha", float("nan")),
        ("lora_alpha", 10**400),
        ("r", "2"),
        ("r", 2.5),
        ("r", 10**400),
    ],
)
def test_a_rank_or_alpha_that_is_no_number_is_one_line(
    name: str, value: object, tmp_path: Path
) -> None:
    lora, _ = written(tmp_path)
    change_config(tmp_path / "anna", **{name: value})
    with pytest.raises(AdapterError, match=rf"adapter_config.json cannot be read \({name}="):
        peft_io.read(tmp_path / "anna", lora, any_rank=True)


def read_both(folder: Path, lora: Lora) -> None:
    """As an initial adapter is read."""
    peft_io.check_origin(folder, "abc")
    peft_io.read(folder, lora)


@pytest.mark.parametrize("file", ["adapter_config.json", "provenance.json"])
def test_json_that_is_nested_too_deep_is_one_line(file: str, tmp_path: Path) -> None:
    lora, _ = written(tmp_path)
    (tmp_path / "anna" / file).write_text('{"a": ' + "[" * 100_000)
    with pytest.raises(AdapterError, match=f"{file} cannot be read") as caught:
        read_both(tmp_path / "anna", lora)
    assert "\n" not in str(caught.value)


# ---- where it came from


def test_an_adapter_of_another_backbone_is_refused_by_its_provenance(tmp_path: Path) -> None:
    written(tmp_path)
    origin = tmp_path / "anna" / "provenance.json"
    origin.write_text(json.dumps({"backbone_sha256": "a" * 64}))
    peft_io.check_origin(tmp_path / "anna", "a" * 64)
    with pytest.raises(AdapterError, match=r"another backbone, of SHA-256 aaaaaaaaaaaaaaaa\.\.\. "):
        peft_io.check_origin(tmp_path / "anna", "b" * 64)
    origin.write_text(json.dumps({"backbone_sha256": ["a" * 64]}))
    with pytest.raises(AdapterError, match="another backbone"):
        peft_io.check_origin(tmp_path / "anna", "a" * 64)
    # PEFT's own folders have none
    origin.unlink()
    peft_io.check_origin(tmp_path / "anna", "b" * 64)


# ---- what is written


def test_rslora_is_written_as_an_alpha_that_every_reader_takes(tmp_path: Path) -> None:
    # 5 / sqrt(4) = 2.5 is the scale, and so is 10 / 4
    settings = Adapter(rank=4, alpha=5.0, rslora=True, target_modules=TARGETS)
    lora = inject(llama(), settings)
    leaves = {k: torch.ones(shape) for k, shape in lora.shapes().items()}
    peft_io.write(tmp_path, leaves, lora, settings, backbone={}, provenance={})
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (config["use_rslora"], config["lora_alpha"], config["r"]) == (False, 10, 4)
    peft_io.write_pipeline_weights(tmp_path, "unet", leaves, lora, settings)
    with safe_open(tmp_path / peft_io.PIPELINE_WEIGHTS, "pt") as file:
        told = json.loads(file.metadata()["lora_adapter_metadata"])
    assert (told["unet.use_rslora"], told["unet.lora_alpha"]) == (False, 10)


WRITE = """
import sys
from pathlib import Path
import torch
from fedgen_edge.adapters import peft_io
from fedgen_edge.adapters.lora import inject
from fedgen_edge.config import Adapter
names = [f"layer_{n}" for n in range(9)]
model = torch.nn.ModuleDict({n: torch.nn.Linear(3, 3) for n in names})
settings = Adapter(rank=2, target_modules=tuple(names))
lora = inject(model, settings)
leaves = {k: torch.ones(shape) for k, shape in lora.shapes().items()}
peft_io.write(Path(sys.argv[1]), leaves, lora, settings, backbone={}, provenance={"b": 1, "a": 2})
peft_io.write_pipeline_weights(Path(sys.argv[1]), "unet", leaves, lora, settings)
"""


def test_equal_adapters_are_equal_bytes_in_every_process(tmp_path: Path) -> None:
    contents = []
    for seed in ("1", "2"):
        folder = tmp_path / seed
        folder.mkdir()
        environment = {**os.environ, "PYTHONHASHSEED": seed}
        subprocess.run([sys.executable, "-c", WRITE, str(folder)], check=True, env=environment)
        contents.append({path.name: path.read_bytes() for path in folder.iterdir()})
    assert len(contents[0]) == 4
    assert contents[0] == contents[1]


def test_a_written_file_has_the_mode_that_the_umask_gives(tmp_path: Path) -> None:
    for mask, mode in ((0o022, 0o644), (0o077, 0o600)):
        before = os.umask(mask)
        try:
            written(tmp_path)
        finally:
            os.umask(before)
        modes = {p.name: p.stat().st_mode & 0o777 for p in (tmp_path / "anna").iterdir()}
        assert modes == dict.fromkeys(modes, mode)
