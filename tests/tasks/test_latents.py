import io
import itertools
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.autoencoders.autoencoder_tiny import AutoencoderTiny
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from conftest import SHARED
from fedgen_edge.errors import ConfigError
from fedgen_edge.seeds import generator
from fedgen_edge.tasks.images import common, diffusers_io, latents, taef2
from fedgen_edge.tasks.images.latents import resize

CPU = torch.device("cpu")
PIXELS = torch.randint(256, (3, 3, 16, 16), generator=generator("pixels"), dtype=torch.uint8)
VALUES = PIXELS.float() / 127.5 - 1


def kl(**told: float) -> AutoencoderKL:
    """Sixteen channels, four pixels a side for each value of a latent's."""
    torch.manual_seed(0)
    return AutoencoderKL(
        block_out_channels=(8, 8, 8),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        norm_num_groups=4,
        latent_channels=4,
        **told,  # pyright: ignore[reportArgumentType]
    ).eval()


def cifar(count: int) -> Tensor:
    """The first test pictures of CIFAR-10, uint8."""
    for folder in ("cifar10", "taef2"):
        if not (SHARED / folder).is_dir():
            pytest.skip(f"the data folder beside the repository is not here: no {folder}")
    held = np.load(SHARED / "cifar10" / "test.npz", allow_pickle=False)
    blob, ends = held["webp"].tobytes(), held["offsets"][: count + 1]
    files = (io.BytesIO(blob[low:high]) for low, high in itertools.pairwise(ends))
    pixels = np.stack([np.asarray(Image.open(file).convert("RGB")) for file in files])
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous()


def decibels(one: Tensor, two: Tensor) -> float:
    """Peak signal-to-noise ratio of values from -1 to 1, the mean over pictures."""
    error = ((one - two) / 2).square().mean((1, 2, 3))
    return float((-10 * error.log10()).mean())


def test_taef2_gives_cifar_back_at_64_pixels_and_at_32() -> None:
    pixels = cifar(16)
    coder = latents.load(SHARED / "taef2", CPU)
    shape = coder.get_latent_shape((3, 32, 32))
    assert shape == (32, 8, 8)
    found = coder.encode(pixels, shape)
    big = resize(common.to_values(pixels), (64, 64))
    assert decibels(coder.decode(found, (3, 64, 64)), big) > 29
    assert decibels(coder.decode(found, (3, 32, 32)), common.to_values(pixels)) > 29
    # 1,024 numbers a channel, far from independent: near 0 and 1 is all that they can show
    assert abs(float(found.mean())) < 0.1
    assert abs(float(found.std()) - 1) < 0.1
    assert float(found.mean((0, 2, 3)).abs().max()) < 0.6


@pytest.mark.parametrize(("shift", "scale"), [(None, 0.18215), (0.1159, 0.3611)])
def test_a_diffusers_autoencoder_is_shifted_and_scaled_as_its_pipelines_do(
    shift: float | None, scale: float, tmp_path: Path
) -> None:
    own = kl(scaling_factor=scale, **{} if shift is None else {"shift_factor": shift})
    own.save_pretrained(tmp_path)
    coder = latents.load(tmp_path, CPU)
    shape = coder.get_latent_shape((3, 16, 16))
    assert shape == (4, 4, 4)
    with torch.no_grad():
        mode = own.encode(VALUES).latent_dist.mode()  # pyright: ignore
        expected = (mode - (shift or 0)) * scale
        picture = own.decode(expected / scale + (shift or 0)).sample  # pyright: ignore
    found = coder.encode(PIXELS, shape)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(coder.decode(found, (3, 16, 16)), picture.clamp(-1, 1))


def test_the_tiny_kind_of_diffusers_is_taken_too(tmp_path: Path) -> None:
    torch.manual_seed(0)
    shape = {"encoder_block_out_channels": (8, 8), "decoder_block_out_channels": (8, 8)}
    blocks = {"num_encoder_blocks": (1, 1), "num_decoder_blocks": (1, 1)}
    own = AutoencoderTiny(**shape, **blocks).eval()
    own.save_pretrained(tmp_path)
    coder = latents.load(tmp_path, CPU)
    with torch.no_grad():
        expected = own.encode(VALUES).latents  # pyright: ignore
    torch.testing.assert_close(coder.encode(PIXELS, coder.get_latent_shape((3, 16, 16))), expected)


def test_each_picture_has_its_own_latent_whoever_stands_beside_it(tmp_path: Path) -> None:
    kl().save_pretrained(tmp_path)
    coder = latents.load(tmp_path, CPU)
    shape = coder.get_latent_shape((3, 16, 16))
    both = coder.encode(PIXELS, shape)
    torch.testing.assert_close(coder.encode(PIXELS[1:2], shape), both[1:2])
    assert coder.encode(PIXELS[:0], shape).shape == (0, 4, 4, 4)


def test_pictures_shrink_to_means_and_come_back_from_it() -> None:
    # A checkerboard of 2 x 2 pixels shrinks to its own squares' values.
    board = torch.tensor([[-1.0, 1.0], [1.0, -1.0]]).view(1, 1, 2, 2)
    wide = board.repeat_interleave(2, 2).repeat_interleave(2, 3)
    assert torch.equal(resize(wide, (2, 2)), board)
    assert resize(board, (4, 4)).abs().max() <= 1


def pickle_alone(folder: Path) -> None:
    kl().save_config(folder)
    (folder / "diffusion_pytorch_model.bin").write_bytes(b"\x80\x04.")


def of_another_shape(folder: Path) -> None:
    kl().save_pretrained(folder)
    path = folder / "config.json"
    told = json.loads(path.read_text()) | {"latent_channels": 8}
    path.write_text(json.dumps(told))


def of_fewer_weights(folder: Path) -> None:
    kl().save_pretrained(folder)
    weights = {k: v for k, v in kl().state_dict().items() if "conv_out" not in k}
    save_file(weights, folder / diffusers_io.WEIGHTS, metadata={"format": "pt"})


def of_another_name(folder: Path) -> None:
    kl().save_pretrained(folder)
    (folder / "config.json").write_text('{"_class_name": "VQModel"}')


def swapped(folder: Path) -> None:
    for name in taef2.FILES:
        save_file(taef2.make_encoder().state_dict(), folder / name)


def half(folder: Path) -> None:
    save_file(taef2.make_encoder().state_dict(), folder / taef2.FILES[0])


def cut_short(folder: Path) -> None:
    kl().save_pretrained(folder)
    path = folder / diffusers_io.WEIGHTS
    path.write_bytes(path.read_bytes()[:1000])


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (pickle_alone, "holds no safetensors weights"),
        (of_another_shape, "is no autoencoder here"),
        (of_fewer_weights, "weights are missing or unknown"),
        (of_another_name, "names 'VQModel', not AutoencoderKL or AutoencoderTiny"),
        (swapped, r"taef2_decoder\.safetensors: .*Missing key"),
        (half, r"taef2_decoder\.safetensors"),
        (cut_short, "is no autoencoder here"),
    ],
)
def test_a_folder_that_is_no_autoencoder_is_refused_in_one_line(
    spoil: object, said: str, tmp_path: Path
) -> None:
    assert callable(spoil)
    spoil(tmp_path)
    with pytest.raises(ConfigError, match=said) as caught:
        latents.load(tmp_path, CPU)
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith("backbone.autoencoder=")
