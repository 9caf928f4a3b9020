"""Tiny random networks of diffusers', as folders, for tests."""

import json
from pathlib import Path
from typing import Any

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.unets.unet_2d import UNet2DModel
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import StableDiffusionPipeline
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

NAMES = ("frog", "ship", "cat")
WIDTH = 12


def conditional(**told: Any) -> UNet2DConditionModel:
    """Four channels of 8 x 8, conditioned by hidden states of width 12."""
    torch.manual_seed(1)
    return UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(16, 32),
        layers_per_block=1,
        norm_num_groups=8,
        attention_head_dim=4,
        cross_attention_dim=WIDTH,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        **told,
    ).eval()


def plain(**told: Any) -> UNet2DModel:
    """One channel of 8 x 8."""
    torch.manual_seed(1)
    return UNet2DModel(
        **{"sample_size": 8, "in_channels": 1, "out_channels": 1} | told,
        block_out_channels=(16, 32),
        layers_per_block=1,
        norm_num_groups=8,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    ).eval()


def tokenizer(folder: Path) -> CLIPTokenizer:
    """CLIP's over single letters: no merges."""
    letters = [chr(at) for at in range(ord("a"), ord("z") + 1)]
    words = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(parents=True)
    (folder / "vocab.json").write_text(json.dumps({word: at for at, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    return CLIPTokenizer.from_pretrained(folder, model_max_length=32)


def pipeline(folder: Path, **told: Any) -> StableDiffusionPipeline:
    """A whole pipeline for pictures of 16 x 16 in colour, written into the folder."""
    reader = tokenizer(folder.parent / "letters")
    torch.manual_seed(2)
    text = CLIPTextConfig(
        vocab_size=len(reader),
        hidden_size=WIDTH,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=32,
        bos_token_id=52,
        eos_token_id=53,
    )
    coder = AutoencoderKL(block_out_channels=(8, 8), down_block_types=("DownEncoderBlock2D",) * 2,
                          up_block_types=("UpDecoderBlock2D",) * 2, norm_num_groups=4)  # fmt: skip
    made = StableDiffusionPipeline(
        vae=coder.eval(),  # pyright: ignore[reportArgumentType]
        text_encoder=CLIPTextModel(text).eval(),
        tokenizer=reader,
        unet=conditional(**told),
        scheduler=DDIMScheduler(
            clip_sample=False, beta_schedule="scaled_linear", steps_offset=1, set_alpha_to_one=False
        ),
        safety_checker=None,  # pyright: ignore[reportArgumentType]
        feature_extractor=None,  # pyright: ignore[reportArgumentType]
        requires_safety_checker=False,
    )
    made.set_progress_bar_config(disable=True)
    made.save_pretrained(folder)
    return made
