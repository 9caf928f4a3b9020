"""PEFT's folders: written here and read by PEFT, written by PEFT and read here, and refused."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from fedgen_edge import files
from fedgen_edge.adapters import peft_io
from fedgen_edge.adapters.lora import Lora, inject
from fedgen_edge.config import Adapter
from fedgen_edge.errors import AdapterError
from fedgen_edge.seeds import generator
from fedgen_edge.types import Leaves

IDS = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6], [5, 3, 5, 8, 9, 7, 9, 3]])
Make = Callable[[], nn.Module]


def filled(model: nn.Module) -> nn.Module:
    """The model with weights that are always the same."""
    rng = generator("weights")
    for weight in model.parameters():
        nn.init.normal_(weight, std=0.3, generator=rng)
    return model.eval()


def llama(width: int = 8) -> nn.Module:
    config = LlamaConfig(
        vocab_size=10,
        hidden_size=width,
        intermediate_size=12,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
    )
    return filled(LlamaForCausalLM(config))


def gpt2() -> nn.Module:
    config = GPT2Config(
        vocab_size=10, n_embd=8, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=1
    )
    return filled(GPT2LMHeadModel(config))


MODELS = [
    pytest.param(llama, ("q_proj", "v_proj"), id="llama-q-v"),
    pytest.param(llama, (r".*layers\.1\..*_proj",), id="llama-regex"),
    pytest.param(llama, ("all-linear",), id="llama-all"),
    pytest.param(gpt2, ("c_attn",), id="gpt2"),
    pytest.param(gpt2, ("all-linear",), id="gpt2-all"),
]
each_model = pytest.mark.parametrize(("make", "targets"), MODELS)


def random(lora: Lora) -> Leaves:
    rng = generator("factors")
    return {k: torch.randn(shape, generator=rng) * 0.3 for k, shape in lora.shapes().items()}


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    return model(IDS).logits


@torch.no_grad()
def adapted_logits(model: nn.Module, lora: Lora, own: Leaves) -> Tensor:
    with lora.bind(own):
        return model(IDS).logits


BACKBONE = {"base_model_name_or_path": "where it lies", "task_type": "CAUSAL_LM"}


def write(folder: Path, own: Leaves, lora: Lora, settings: Adapter) -> None:
    told = {"seed": 7, "client": "anna"}
    with files.replace_folder(folder) as draft:
        peft_io.write(draft, own, lora, settings, backbone=BACKBONE, provenance=told)


def close(ours: Tensor, theirs: Tensor) -> None:
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


# ---- there and back


@each_model
@pytest.mark.parametrize("rslora", [False, True])
def test_peft_loads_a_folder_written_here_and_gives_the_same_logits(
    make: Make, targets: tuple[str, ...], rslora: bool, tmp_path: Path
) -> None:
    settings = Adapter(rank=2, alpha=5.0, rslora=rslora, target_modules=targets)
    model = make()
    lora = inject(model, settings)
    own = random(lora)
    write(tmp_path / "anna", own, lora, settings)
    theirs = PeftModel.from_pretrained(make(), str(tmp_path / "anna"))  # pyright: ignore[reportArgumentType]
    ours = adapted_logits(model, lora, own)
    close(ours, logits(theirs))
    assert (ours - logits(make())).abs().max() > 0.01


@each_model
@pytest.mark.parametrize("rslora", [False, True])
def test_a_folder_written_by_peft_loads_here_and_gives_the_same_logits(
    make: Make, targets: tuple[str, ...], rslora: bool, tmp_path: Path
) -> None:
    theirs = by_peft(make, targets, tmp_path, lora_alpha=6, use_rslora=rslora)
    # Our scale is 16 / 2 = 8, theirs 6 / 2 = 3 or 6 / sqrt(2): the leaves are converted.
    model = make()
    lora = inject(model, Adapter(rank=2, alpha=16.0, target_modules=targets))
    close(adapted_logits(model, lora, peft_io.read(tmp_path, lora)), logits(theirs))


def by_peft(make: Make, targets: tuple[str, ...], folder: Path, **more: object) -> nn.Module:
    """A model with an adapter of PEFT's own, none of whose factors is zero; saved too."""
    plain = make()
    chosen = list(targets) if all(name.isidentifier() for name in targets) else targets[0]
    turned = isinstance(plain, GPT2LMHeadModel)
    config = LoraConfig(r=2, target_modules=chosen, fan_in_fan_out=turned, **more)  # pyright: ignore[reportArgumentType]
    model = get_peft_model(plain, config)  # pyright: ignore[reportArgumentType]
    rng = generator("peft")
    for name, weight in model.named_parameters():
        if "lora_" in name:
            nn.init.normal_(weight, std=0.3, generator=rng)
    model.save_pretrained(str(folder), save_embedding_layers=False)
    return model.eval()


def test_an_adapter_of_the_embedding_goes_there_and_back(tmp_path: Path) -> None:
    settings = Adapter(rank=2, alpha=5.0, target_modules=("embed_tokens", "q_proj"))
    model = llama()
    lora = inject(model, settings)
    own = random(lora)
    write(tmp_path / "anna", own, lora, settings)
    theirs = PeftModel.from_pretrained(llama(), str(tmp_path / "anna"))  # pyright: ignore[reportArgumentType]
    close(adapted_logits(model, lora, own), logits(theirs))
    assert_same(peft_io.read(tmp_path / "anna", lora), own)


def assert_same(found: Leaves, wanted: Leaves) -> None:
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[k], v) for k, v in wanted.items())


@each_model
def test_what_is_written_is_read_bit_for_bit(
    make: Make, targets: tuple[str, ...], tmp_path: Path
) -> None:
    settings = Adapter(rank=2, alpha=5.0, rslora=True, target_modules=targets)
    lora = inject(make(), settings)
    own = random(lora)
    write(tmp_path / "anna", own, lora, settings)
    assert_same(peft_io.read(tmp_path / "anna", lora), own)


def test_the_other_scale_is_in_b_alone(tmp_path: Path) -> None:
    # Written at alpha = 6 and read at alpha = 2, same rank: B is multiplied by 6 / 2 = 3.
    lora = inject(llama(), Adapter(rank=2, alpha=6.0, target_modules=("q_proj",)))
    own = random(lora)
    write(tmp_path / "anna", own, lora, Adapter(rank=2, alpha=6.0))
    other = inject(llama(), Adapter(rank=2, alpha=2.0, target_modules=("q_proj",)))
    found = peft_io.read(tmp_path / "anna", other)
    for name, leaf in own.items():
        torch.testing.assert_close(found[name], leaf * (3.0 if name.endswith("_B") else 1.0))


def test_a_half_precision_adapter_is_read_in_float32(tmp_path: Path) -> None:
    lora, own = written(tmp_path)
    save_file({peft_io.to_peft(k): v.bfloat16() for k, v in own.items()}, weights_of(tmp_path))
    found = peft_io.read(tmp_path / "anna", lora)
    assert_same(found, {k: v.bfloat16().float() for k, v in own.items()})


# ---- the folder


def written(root: Path) -> tuple[Lora, Leaves]:
    """A good folder at `root / "anna"`."""
    settings = Adapter(rank=2, alpha=16.0, target_modules=("q_proj", "v_proj"))
    lora = inject(llama(), settings)
    own = random(lora)
    write(root / "anna", own, lora, settings)
    return lora, own


def weights_of(root: Path) -> Path:
    return root / "anna" / "adapter_model.safetensors"


def test_the_folder_says_where_it_came_from(tmp_path: Path) -> None:
    written(tmp_path)
    told = json.loads((tmp_path / "anna" / "provenance.json").read_text())
    assert told == {"seed": 7, "client": "anna"}
    config = json.loads((tmp_path / "anna" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "where it lies"
    assert (config["r"], config["lora_alpha"]) == (2, 16)
    assert not list(tmp_path.rglob("*.bin"))


def test_a_written_folder_leaves_no_draft_behind(tmp_path: Path) -> None:
    written(tmp_path)
    written(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["anna"]


def test_a_write_that_fails_leaves_the_old_adapter_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lora, own = written(tmp_path)

    def full_disk(*_: object, **__: object) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(peft_io, "save_file", full_disk)
    with pytest.raises(OSError, match="no space left"):
        write(tmp_path / "anna", {k: v + 1 for k, v in own.items()}, lora, Adapter(rank=2))
    assert [path.name for path in tmp_path.iterdir()] == ["anna"]
    assert_same(peft_io.read(tmp_path / "anna", lora), own)


# ---- refusals


def refused(folder: Path, lora: Lora, said: str) -> None:
    with pytest.raises(AdapterError, match=said) as caught:
        peft_io.read(folder, lora)
    assert "\n" not in str(caught.value)
    assert folder.name in str(caught.value)


def test_no_folder_is_refused(tmp_path: Path) -> None:
    lora, _ = written(tmp_path)
    refused(tmp_path / "berta", lora, "berta is no PEFT folder: it has no adapter_config.json")


def test_a_pickle_alone_is_refused(tmp_path: Path) -> None:
    lora, _ = written(tmp_path)
    weights_of(tmp_path).rename(tmp_path / "anna" / "adapter_model.bin")
    refused(tmp_path / "anna", lora, "has no adapter_model.safetensors: pickles are not read")


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"rank": 3}, "the adapter has rank 2, adapter.rank=3: make them equal"),
        ({"target_modules": ("q_proj",)}, "has another layer, .*v_proj.*target_modules"),
        ({"target_modules": ("q_proj", "v_proj", "o_proj")}, "lacks .*o_proj.*target_modules"),
    ],
)
def test_an_adapter_of_other_settings_is_refused(
    settings: dict[str, object], said: str, tmp_path: Path
) -> None:
    written(tmp_path)
    own = {"rank": 2, "target_modules": ("q_proj", "v_proj"), **settings}
    refused(tmp_path / "anna", inject(llama(), Adapter(**own)), said)  # pyright: ignore[reportArgumentType]


def test_an_adapter_of_another_backbone_is_refused(tmp_path: Path) -> None:
    written(tmp_path)
    wider = inject(llama(width=16), Adapter(rank=2, target_modules=("q_proj", "v_proj")))
    refused(tmp_path / "anna", wider, r"q_proj.lora_A is \[2, 8\], this backbone needs \[2, 16\]")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_number_that_is_not_finite_is_refused(value: float, tmp_path: Path) -> None:
    lora, _ = written(tmp_path)
    tensors = load_file(weights_of(tmp_path))
    next(iter(tensors.values()))[0, 0] = value
    save_file(tensors, weights_of(tmp_path))
    refused(tmp_path / "anna", lora, "is not finite")


@pytest.mark.parametrize("share", [0.0, 0.001, 0.3, 0.99])
def test_a_truncated_file_is_refused(share: float, tmp_path: Path) -> None:
    lora, _ = written(tmp_path)
    content = weights_of(tmp_path).read_bytes()
    weights_of(tmp_path).write_bytes(content[: int(share * len(content))])
    refused(tmp_path / "anna", lora, "adapter_model.safetensors is damaged")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"use_dora": True}, "not plain LoRA .*use_dora"),
        ({"bias": "all"}, "not plain LoRA .*bias"),
        ({"rank_pattern": {"q_proj": 4}}, "not plain LoRA .*rank_pattern"),
        ({"alpha_pattern": {"q_proj": 4}}, "not plain LoRA .*alpha_pattern"),
        ({"modules_to_save": ["lm_head"]}, "not plain LoRA"),
        ({"peft_type": "IA3"}, "not plain LoRA"),
        ({"r": 0}, "not plain LoRA"),
        ({"r": "two"}, "adapter_config.json|has rank"),
        ({"lora_alpha": "much"}, "adapter_config.json"),
    ],
)
def test_what_is_not_plain_lora_is_refused(
    change: dict[str, object], said: str, tmp_path: Path
) -> None:
    lora, _ = written(tmp_path)
    path = tmp_path / "anna" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    refused(tmp_path / "anna", lora, said)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"7", b"{}", b"\xff\xfe"])
def test_a_configuration_that_is_none_is_refused(content: bytes, tmp_path: Path) -> None:
    lora, _ = written(tmp_path)
    (tmp_path / "anna" / "adapter_config.json").write_bytes(content)
    refused(tmp_path / "anna", lora, "adapter_config.json cannot be read")
