"""What a run writes is what plain PEFT reads: checked before anything is written, and after."""

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import EvaConfig, LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    Glm4MoeConfig,
    Glm4MoeForCausalLM,
    PreTrainedTokenizerFast,
)

from fedgen_edge.adapters import peft_check, peft_io
from fedgen_edge.adapters.lora import Lora
from fedgen_edge.config import Settings, from_table
from fedgen_edge.errors import AdapterError, ConfigError
from fedgen_edge.runs.build import Experiment
from fedgen_edge.runs.run import create, proceed
from fedgen_edge.seeds import generator
from fedgen_edge.tasks.adapted import AdaptedModel
from fedgen_edge.tasks.backbones import pretrained
from fedgen_edge.tasks.language.task import Language
from fedgen_edge.tasks.task import TASKS, TrainableTask
from fedgen_edge.types import Leaves

ATTENTION = ("k_proj", "o_proj", "q_proj", "v_proj")
IDS = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6]])


@pytest.fixture(scope="module")
def moe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random mixture of experts: a dense layer, and one with a shared expert."""
    folder = tmp_path_factory.mktemp("moe")
    tokenizer = PreTrainedTokenizerFast.from_pretrained(pretrained._make_tiny())
    config = Glm4MoeConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        moe_intermediate_size=32,
        n_routed_experts=4,
        num_experts_per_tok=2,
        n_shared_experts=1,
        first_k_dense_replace=1,
        n_group=1,
        topk_group=1,
        bos_token_id=0,
        eos_token_id=1,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        Glm4MoeForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def settings(path: str, targets: tuple[str, ...] = (), **more: object) -> Settings:
    return from_table(
        {
            "backbone": {"path": path, "precision": "float32"},
            "adapter": {"rank": 4, "target_modules": targets},
            **more,
        }
    )


def texts(folder: Path) -> dict[str, Any]:
    """The settings of one client that holds some."""
    path = folder / "texts.jsonl"
    path.write_text("".join(f'{{"text": "line {n}"}}\n' for n in range(40)))
    return {"data": {"source": "jsonl", "path": str(path)}, "partition": {"by": "pooled"}}


def built(told: Settings) -> TrainableTask:
    return TASKS[told.task](told, full=False, device=torch.device("cpu"))


def language(told: Settings) -> Language:
    task = built(told)
    assert isinstance(task, Language)
    return task


def noisy(task: TrainableTask) -> Leaves:
    assert isinstance(task.model.adapter, Lora)
    return peft_check.draw_noisy(task.model.adapter, generator("noisy"))


@torch.no_grad()
def distance_to_peft(task: Language, folder: Path) -> tuple[float, float]:
    """Between our logits and those of PEFT, each model loaded anew; and how far an adapter goes."""
    own = noisy(task)
    task.model.save(folder, own, settings("tiny"), {})
    plain = AutoModelForCausalLM.from_pretrained(task.loaded.folder, dtype=torch.float32)
    before: Tensor = plain(IDS).logits
    with task.model.adapter.bind(own):  # pyright: ignore[reportAttributeAccessIssue]
        ours = task.loaded.model(IDS).logits
    theirs = PeftModel.from_pretrained(plain, str(folder))(IDS).logits
    return float((ours - theirs).abs().max()), float((ours - before).abs().max())


@pytest.mark.filterwarnings("ignore:Found missing adapter keys")
@pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys")
def test_an_adapter_that_peft_reads_otherwise_is_refused_with_layers_that_work(
    moe: Path, tmp_path: Path
) -> None:
    told = settings(str(moe))
    off, moved = distance_to_peft(language(told), tmp_path / "all")
    assert off > moved / 10
    with pytest.raises(
        ConfigError, match=r"^adapter\.target_modules=\[.*PEFT would read"
    ) as caught:
        built(told).model.check_peft(told)
    assert "\n" not in str(caught.value)
    assert f"adapter.target_modules={list(ATTENTION)} works" in str(caught.value)
    told = settings(str(moe), ATTENTION)
    off, moved = distance_to_peft(language(told), tmp_path / "attention")
    assert off < 1e-5 < moved / 100
    language(told).model.check_peft(told)


def test_a_run_of_layers_that_peft_reads_otherwise_writes_nothing(
    moe: Path, tmp_path: Path
) -> None:
    told = settings(str(moe), **texts(tmp_path))
    with pytest.raises(ConfigError, match="PEFT would read another adapter"):
        create(told, tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("targets", [(), ("all-linear",), ("embed_tokens", "q_proj")])
@pytest.mark.parametrize("precision", ["float32", "bf16"])
def test_the_check_leaves_the_model_bit_for_bit_as_it_was(
    targets: tuple[str, ...], precision: str
) -> None:
    told = from_table(
        {
            "backbone": {"path": "tiny", "precision": precision},
            "adapter": {"target_modules": targets},
        }
    )
    task = language(told)
    model = task.loaded.model
    before = (
        {**model.state_dict()},
        [*model.named_modules()],
        model.config.to_dict(),
        {*vars(model)},
    )
    drawn = torch.random.get_rng_state()
    task.model.check_peft(told)
    after = {**model.state_dict()}, [*model.named_modules()], model.config.to_dict(), {*vars(model)}
    assert before[0].keys() == after[0].keys()
    assert all(before[0][k] is v or torch.equal(before[0][k], v) for k, v in after[0].items())
    assert before[1:] == after[1:]
    assert torch.equal(drawn, torch.random.get_rng_state())


@pytest.mark.parametrize("name", ["language", "diffusion", "vae", "gan"])
def test_peft_reads_every_tasks_adapters_and_not_those_of_another(
    name: str, tmp_path: Path
) -> None:
    told = settings("tiny", task=name)
    task = built(told)
    task.model.check_peft(told)
    own = noisy(task)
    task.model.save(tmp_path / "anna", own, told, {})
    task.model.check_written(tmp_path / "anna", own)
    weights = tmp_path / "anna" / "adapter_model.safetensors"
    tensors = load_file(weights)
    # one factor of one layer, a tenth larger
    save_file({**tensors, (k := min(tensors)): tensors[k] * 1.1}, weights)
    with pytest.raises(AdapterError, match="anna: PEFT reads another adapter"):
        task.model.check_written(tmp_path / "anna", own)


def test_an_initial_adapter_of_another_backbone_is_refused(moe: Path, tmp_path: Path) -> None:
    task = language(settings(str(moe), ATTENTION))
    origin = {"backbone_sha256": task.model.sha256}
    task.model.save(tmp_path / "anna", noisy(task), settings(str(moe), ATTENTION), origin)
    first = {"rank": 4, "target_modules": ATTENTION, "initial": str(tmp_path / "anna")}
    same = from_table({"backbone": {"path": str(moe), "precision": "float32"}, "adapter": first})
    assert language(same).model.initial is not None
    other = from_table({"backbone": {"path": "tiny", "precision": "float32"}, "adapter": first})
    with pytest.raises(AdapterError, match="anna was trained on another backbone, of SHA-256"):
        built(other)


def test_a_run_compares_a_noisy_adapter_before_it_and_its_own_after_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compare, compared = peft_check.compare, []

    def watch(folder: Path, *rest: Any) -> str | None:
        moved = any(float(v.norm()) for k, v in rest[2].items() if k.endswith("_B"))
        compared.append((folder.name, moved, fault := compare(folder, *rest)))
        return fault

    monkeypatch.setattr(peft_check, "compare", watch)
    short = {
        "federation": {"rounds": 1},
        "training": {"steps": 1},
        "personal": {"epochs": 0},
    }
    for _ in proceed(
        create(settings("tiny", **texts(tmp_path), **short), tmp_path / "run"), tmp_path / "run"
    ):
        pass
    assert compared == [("adapter", True, None), ("global", True, None)]


def test_layers_that_are_named_in_full_are_suggested_in_full(moe: Path) -> None:
    names = ("model.layers.0.mlp.down_proj", "model.layers.1.self_attn.q_proj")
    task = built(settings(str(moe), names))
    with pytest.raises(ConfigError, match=r"'model.layers.1.self_attn.q_proj'\] works"):
        task.model.check_peft(settings(str(moe), names))


def test_an_adapter_that_was_trained_away_is_written_all_the_same(tmp_path: Path) -> None:
    told = settings("tiny")
    task = built(told)
    leaves = {k: torch.full(v, 1e30) for k, v in task.model.leaf_shapes().items()}
    task.model.save(tmp_path / "adapter", leaves, told, {})
    task.model.check_written(tmp_path / "adapter", leaves)  # its logits are not finite


def test_an_adapter_that_peft_initialised_by_eva_is_read_as_peft_reads_it(tmp_path: Path) -> None:
    task = language(settings("tiny", ("q_proj", "v_proj")))
    config = LoraConfig(
        r=4,
        lora_alpha=8,
        target_modules=["q_proj", "v_proj"],
        init_lora_weights="eva",
        eva_config=EvaConfig(),
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT would rather have the factors on no device
        wrapped = get_peft_model(AutoModelForCausalLM.from_pretrained(task.model.folder), config)
    for name, weight in wrapped.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.1, generator=generator("eva"))
    wrapped.save_pretrained(str(tmp_path / "eva"))
    assert isinstance(task.model.adapter, Lora)
    leaves = peft_io.read(tmp_path / "eva", task.model.adapter)
    plain = AutoModelForCausalLM.from_pretrained(task.model.folder)
    theirs = PeftModel.from_pretrained(plain, str(tmp_path / "eva"))
    with torch.no_grad(), task.model.adapter.bind(leaves):
        torch.testing.assert_close(task.model.network(IDS).logits, theirs(IDS).logits)


@pytest.mark.parametrize(
    "error",
    [ConfigError("no"), RuntimeError("can't allocate memory"), MemoryError(), KeyboardInterrupt()],
    ids=lambda error: type(error).__name__,
)
def test_a_run_that_is_not_begun_lets_its_workers_go(
    error: BaseException, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    closed: list[Experiment] = []

    def refuse(*_: object) -> None:
        raise error

    def close(experiment: Experiment) -> None:
        closed.append(experiment)

    monkeypatch.setattr(AdaptedModel, "check_peft", refuse)
    monkeypatch.setattr(Experiment, "close", close)
    with pytest.raises(type(error)):
        create(settings("tiny", **texts(tmp_path)), tmp_path / "run")
    assert len(closed) == 1
    assert not (tmp_path / "run").exists()
