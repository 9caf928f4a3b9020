import json
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.unets.unet_2d import UNet2DModel
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from conftest import sentences
from fedgen_edge.config import Evaluation, Settings, from_table, to_table
from fedgen_edge.data import sources
from fedgen_edge.data.corpus import Texts
from fedgen_edge.errors import ConfigError, FedGenError
from fedgen_edge.runs import pretrain
from fedgen_edge.runs.build import build
from fedgen_edge.tasks.backbones import pretrained
from fedgen_edge.tasks.images.diffusers_io import WEIGHTS
from fedgen_edge.tasks.images.diffusion import Diffusion
from fedgen_edge.tasks.language import config_only

SETTINGS = from_table(
    {
        "task": "diffusion",
        "backbone": {"path": "not yet"},
        "adapter": {"rank": 4},
        "data": {"source": "digits", "public": 0.2, "unseen": ["8", "9"]},
        "partition": {"by": "iid"},
        "federation": {"clients": 3},
        "evaluation": {"sample_images": 0},
        "pretrain": {"size": "tiny", "rounds": 2, "steps": 3, "batch": 8},
    }
)


def made(settings: Settings, out: Path, events: int | None = None) -> Path:
    """A backbone, or what is left when its training is stopped after some events."""
    walk = pretrain.train(pretrain.begin(settings, out), out)
    for _ in islice(walk, events):
        pass
    walk.close()  # pyright: ignore[reportAttributeAccessIssue]
    return out


def test_pretraining_is_followed_without_bytes_as_nothing_is_sent(tmp_path: Path) -> None:
    out = tmp_path / "unet"
    lines = [event.line for event in pretrain.train(pretrain.begin(SETTINGS, out), out)]
    assert [line["round"] for line in lines] == [1, 2]
    assert all("bytes_up" not in line and "loss" in line for line in lines)


def test_a_backbone_is_made_once_and_a_run_takes_it(tmp_path: Path) -> None:
    out = made(SETTINGS, tmp_path / "unet")
    model = UNet2DModel.from_pretrained(out, use_safetensors=True)
    start = load_file(pretrain.derive_settings(SETTINGS).backbone.path + f"/{WEIGHTS}")
    weights = model.state_dict()  # pyright: ignore[reportAttributeAccessIssue]
    assert any(not torch.equal(weights[k], v) for k, v in start.items())
    with pytest.raises(ConfigError, match="is there already"):
        pretrain.begin(SETTINGS, out)
    path = replace(SETTINGS.backbone, path=str(out))
    experiment = build(replace(SETTINGS, backbone=path))
    # what the backbone has seen, no client holds
    public = sources.read(replace(SETTINGS.data, part="public"))
    assert sum(len(h.train + h.validation + h.test) for h in experiment.holdings) == 1797 - len(
        public.examples
    )


def test_stopped_and_gone_on_with_it_is_the_same_to_the_bit(tmp_path: Path) -> None:
    whole = made(SETTINGS, tmp_path / "whole")
    assert not made(SETTINGS, tmp_path / "stopped", 1).exists()
    stopped = made(SETTINGS, tmp_path / "stopped")
    one, two = load_file(whole / WEIGHTS), load_file(stopped / WEIGHTS)
    assert all(torch.equal(one[k], two[k]) for k in one)


def test_a_backbone_of_latents_is_made_and_taken_with_the_same_autoencoder(tmp_path: Path) -> None:
    coder = AutoencoderKL(in_channels=1, out_channels=1, block_out_channels=(8, 8),
                          down_block_types=("DownEncoderBlock2D",) * 2,
                          up_block_types=("UpDecoderBlock2D",) * 2, norm_num_groups=4)  # fmt: skip
    coder.save_pretrained(tmp_path / "vae")
    backbone = replace(SETTINGS.backbone, autoencoder=tmp_path / "vae")
    settings = replace(SETTINGS, backbone=backbone, data=replace(SETTINGS.data, limit=200))
    assert not made(settings, tmp_path / "unet", 1).exists()
    out = made(settings, tmp_path / "unet")
    told = UNet2DModel.from_pretrained(out, use_safetensors=True).config  # pyright: ignore
    # digits are 8 x 8, and a value of a latent's side stands for two of their pixels
    assert (told.in_channels, told.sample_size) == (4, 4)
    assert not DDPMScheduler.from_pretrained(out).config["clip_sample"]
    experiment = build(replace(settings, backbone=replace(backbone, path=str(out))))
    assert experiment.clients.shards[0].train["latent"].shape[1:] == (4, 4, 4)
    task = experiment.task
    assert isinstance(task, Diffusion)
    assert task.generate({}, [0], 0, Evaluation(sample_steps=2)).shape == (1, 1, 8, 8)
    with pytest.raises(ConfigError, match=r"makes 4 x 4 with 4 channels: .*backbone\.autoencoder"):
        build(replace(settings, backbone=replace(SETTINGS.backbone, path=str(out))))


def test_other_settings_do_not_go_on_with_it(tmp_path: Path) -> None:
    made(SETTINGS, tmp_path / "unet", 1)
    other = replace(SETTINGS, pretrain=replace(SETTINGS.pretrain, lr=0.5))
    with pytest.raises(ConfigError, match="begun with other settings"):
        pretrain.begin(other, tmp_path / "unet")


def test_stopped_before_its_first_round_it_says_so(tmp_path: Path) -> None:
    made(SETTINGS, tmp_path / "unet", 0)
    (tmp_path / "unet.training" / "planned.toml").unlink()
    with pytest.raises(ConfigError, match="or never did: delete it"):
        pretrain.begin(SETTINGS, tmp_path / "unet")


@pytest.mark.parametrize(
    ("data", "said"),
    [
        ({"source": "docstrings", "unseen": ()}, "has text, which task='diffusion' does not learn"),
        ({"public": 0.0}, r"no public pictures with data\.public=0\.0"),
    ],
)
def test_where_there_are_no_public_pictures_nothing_is_written(
    data: dict[str, object], said: str, tmp_path: Path
) -> None:
    settings = replace(SETTINGS, data=replace(SETTINGS.data, **data))
    with pytest.raises(FedGenError, match=said):
        pretrain.begin(settings, tmp_path / "unet")
    assert not list(tmp_path.iterdir())


def of_text(folder: Path) -> Settings:
    """Forty texts of two kinds, of one of which nothing is public."""
    path = folder / "texts.jsonl"
    rows = [{"text": t, "kind": ["even", "odd"][i % 2]} for i, t in enumerate(sentences(40, 0))]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = {"source": "jsonl", "path": str(path), "label_field": "kind", "length": 16}
    return from_table(
        {
            "backbone": {"path": "tiny", "precision": "float32"},
            "data": {**data, "public": 0.5, "unseen": ["odd"]},
            "partition": {"by": "iid"},
            "federation": {"clients": 2},
            "evaluation": {"sample_tokens": 0},
            "pretrain": {"rounds": 2, "steps": 3, "batch": 2, "lr": 1e-2},
        }
    )


def test_text_is_trained_on_from_a_backbone_and_no_client_holds_it(tmp_path: Path) -> None:
    settings = of_text(tmp_path)
    out = made(settings, tmp_path / "moved")
    before = AutoModelForCausalLM.from_pretrained(build(settings).task.model.folder)
    after = AutoModelForCausalLM.from_pretrained(out)
    assert not torch.equal(before.lm_head.weight, after.lm_head.weight)
    experiment = build(replace(settings, backbone=replace(settings.backbone, path=str(out))))
    public = sources.read(replace(settings.data, part="public"))
    assert isinstance(public.examples, Texts)
    assert isinstance(experiment.corpus.examples, Texts)
    assert public.labels == ["even"] * 10  # half of twenty
    held = experiment.corpus.examples.texts
    assert len(held) == 30
    assert not {*held} & {*public.examples.texts}


def new(settings: Settings, folder: Path, **other: Any) -> Settings:
    """The same with a GPT-2 of two layers, 8 wide, that is made."""
    shape = {"model_type": "gpt2", "n_embd": 8, "n_layer": 2, "n_head": 2, "n_positions": 32}
    folder = folder / "-".join(["shape", *other])
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(shape | other))
    return replace(settings, pretrain=replace(settings.pretrain, config=str(folder)))


def test_text_has_a_new_model_of_a_configuration(tmp_path: Path) -> None:
    settings = new(of_text(tmp_path), tmp_path)
    start = AutoModelForCausalLM.from_pretrained(pretrain.derive_settings(settings).backbone.path)
    # 258 tokens of the tokenizer and 32 places; a layer: 12 d^2 + 13 d; the last norm: 2 d
    assert start.num_parameters() == (258 + 32) * 8 + 2 * (12 * 8 * 8 + 13 * 8) + 2 * 8
    assert (start.config.bos_token_id, start.config.eos_token_id) == (0, 1)
    out = made(settings, tmp_path / "gpt2")
    after = AutoModelForCausalLM.from_pretrained(out)
    assert not torch.equal(start.lm_head.weight, after.lm_head.weight)
    settings = replace(settings, backbone=replace(settings.backbone, path=str(out)))
    assert {name.rpartition(".")[2] for name in build(settings).task.model.leaf_shapes()} == {
        "lora_A",
        "lora_B",
    }


def test_a_new_model_is_the_same_on_every_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings, found = new(of_text(tmp_path), tmp_path), []
    tokenizer = replace(settings.backbone, path=str(pretrained.find_folder(settings.backbone)))
    for cache in ("one", "two"):
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / cache))
        folder = config_only.fresh(str(tmp_path / "shape"), tokenizer)
        found.append((folder.name, pretrained.hash_weights([folder / "model.safetensors"])))
    assert found[0] == found[1]


def test_a_new_model_needs_a_configuration_and_a_tokenizer(tmp_path: Path) -> None:
    settings = of_text(tmp_path)
    (tmp_path / "empty").mkdir()
    empty = replace(settings.backbone, path=str(tmp_path / "empty"))
    for wrong, said in (
        (replace(settings, pretrain=replace(settings.pretrain, config="gpt5")),
         "pretrain.config='gpt5' is no model that is known"),
        (replace(settings, pretrain=replace(settings.pretrain, config="shapes/none.json")),
         "pretrain.config='shapes/none.json': .* No such file"),
        (replace(SETTINGS, pretrain=replace(SETTINGS.pretrain, config="gpt2")),
         "pretrain.config='gpt2' is of a language model"),
        (replace(new(settings, tmp_path), backbone=empty), "its tokenizer cannot be used"),
        (new(settings, tmp_path, n_head=3), r"pretrain.config: no gpt2 has this shape .*: correct"),
        (new(settings, tmp_path, activation_function="none"), "pretrain.config: no gpt2 has"),
    ):  # fmt: skip
        with pytest.raises(ConfigError, match=said):
            pretrain.begin(wrong, tmp_path / "gpt2")
    assert not [*tmp_path.glob("gpt2*")]


def test_no_memory_left_is_not_blamed_on_the_shape(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = new(of_text(tmp_path), tmp_path)
    tokenizer = replace(settings.backbone, path=str(pretrained.find_folder(settings.backbone)))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))  # the model is not there yet
    monkeypatch.setattr(AutoModelForCausalLM, "from_config", lambda *_, **__: torch.empty(2**48))
    with pytest.raises(RuntimeError, match="can't allocate memory"):
        config_only.fresh(str(settings.pretrain.config), tokenizer)


def test_public_text_is_asked_for_with_its_share_and_its_labels(tmp_path: Path) -> None:
    settings = of_text(tmp_path)
    with pytest.raises(ConfigError, match=r"data\.public=0\.0 leaves no public text"):
        sources.read(replace(settings.data, part="public", public=0.0))
    with pytest.raises(ConfigError, match=r"data\.unseen names 'prime': labels are even, odd"):
        sources.read(replace(settings.data, unseen=("prime",)))


def test_a_backbone_is_made_on_one_machine_whatever_the_clients_are(tmp_path: Path) -> None:
    usual = pretrain.derive_settings(SETTINGS)
    clients = {
        "devices": {"fails": [0.9]},
        "uplink": {"dtype": "int4"},
        "adapter": {"rank": 4, "ranks": [2, 4]},
    }
    other = from_table({**to_table(SETTINGS), **clients})
    assert pretrain.derive_settings(other) == usual


def test_public_text_takes_no_client_s_all(tmp_path: Path) -> None:
    path = tmp_path / "texts.jsonl"
    rows = [{"text": t, "who": "few" if i < 2 else "many"} for i, t in enumerate(sentences(40, 0))]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = from_table(
        {"data": {"source": "jsonl", "path": str(path), "client_field": "who", "public": 0.9}}
    ).data
    with pytest.raises(ConfigError, match=r"data\.public=0\.9 leaves 1 of the clients, 'few'"):
        sources.read(data)
    assert len(sources.read(replace(data, part="public", limit=3)).examples) == 3
