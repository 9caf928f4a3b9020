import io

import numpy as np
import pytest
import torch
from PIL import Image

from fedgen_edge.tasks.images.common import encode_png, make_grid


@pytest.mark.parametrize(
    ("size", "times"), [((8, 8), 64), ((38, 28), 14), ((28, 298), 2), ((600, 900), 1)]
)
@pytest.mark.parametrize("channels", [1, 3])
def test_a_small_picture_is_enlarged_as_pillow_does_to_the_nearest_value(
    size: tuple[int, int], times: int, channels: int
) -> None:
    # 512 / 8 = 64; 512 / 38 is above 13; 512 / 298 above 1
    rng = torch.Generator().manual_seed(0)
    width, height = size
    picture = torch.randint(0, 256, (channels, height, width), generator=rng, dtype=torch.uint8)
    shown = Image.open(io.BytesIO(encode_png(picture)))
    assert shown.size == (width * times, height * times)
    small = Image.fromarray(picture.permute(1, 2, 0).squeeze(-1).numpy())
    assert np.array_equal(shown, small.resize(shown.size, Image.Resampling.NEAREST))


def test_a_grid_of_digits_can_be_seen() -> None:
    # three columns of 8 pixels with 2 between them are 28, enlarged 19 times
    sheet = make_grid(torch.zeros(8, 1, 8, 8, dtype=torch.uint8), 3)
    assert sheet.shape == (1, 28, 28)
    assert Image.open(io.BytesIO(encode_png(sheet))).size == (532, 532)
