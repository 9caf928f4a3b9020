import torch
from torch import Tensor

from fedgen_edge.image_metrics.networks import Inception, Mixed, resize_bilinear


def test_inception_has_the_published_number_of_weights() -> None:
    # torchvision's inception_v3 has 27,161,264 with 1,000 classes; 3,326,696 of them are the
    # auxiliary classifier's; eight more classes are 8 * (2,048 + 1)
    with torch.device("meta"):
        count = sum(p.numel() for p in Inception().parameters())
    assert count == 27_161_264 - 3_326_696 + 8 * 2049


def pooled(block: Mixed, picture: Tensor) -> Tensor:
    """The first channel of a block's last branch, made to hand on what is pooled."""
    weight = block.get_submodule("branch_pool.conv").weight
    assert isinstance(weight, Tensor)
    weight.data = torch.zeros_like(weight)
    weight.data[0, 0] = 1
    width = weight.shape[0]
    return block.eval()(picture.expand(1, weight.shape[1], -1, -1))[0, -width]


def test_averages_leave_the_edge_out_and_the_last_block_takes_the_maximum() -> None:
    # 1 everywhere has an average of 1 everywhere, in corners too; the norm divides by
    # sqrt(1 + 0.001)
    network, one = Inception(), 1 / 1.001**0.5
    flat, peak = torch.ones(1, 1, 5, 5), torch.zeros(1, 1, 5, 5)
    peak[..., 0, 0] = 1
    for name in ("Mixed_5b", "Mixed_6c", "Mixed_7b"):
        block = network.get_submodule(name)
        assert isinstance(block, Mixed)
        torch.testing.assert_close(pooled(block, flat), torch.full((5, 5), one))
        # a corner's window has four places, its neighbour's six, the next one's nine
        corner = pooled(block, peak)[:2, :2]
        expected = one / torch.tensor([[4.0, 6.0], [6.0, 9.0]])
        torch.testing.assert_close(corner, expected)
    found = pooled(network.Mixed_7c, peak)
    assert (found > 0).nonzero().tolist() == [[0, 0], [0, 1], [1, 0], [1, 1]]
    torch.testing.assert_close(found[:2, :2], torch.full((2, 2), one))


def test_pictures_are_stretched_from_their_first_pixel() -> None:
    # places 0, 1, 2, 3 of 4 come from 0, 0.5, 1, 1.5 of 2, and what is beyond the last is the last
    row = torch.tensor([[[0.0, 10.0], [100.0, 110.0]]])
    expected = torch.tensor([0.0, 5, 10, 10]) + torch.tensor([0.0, 50, 100, 100]).unsqueeze(1)
    torch.testing.assert_close(resize_bilinear(row, 4)[0], expected)
    nine = torch.arange(81.0).view(1, 9, 9)
    torch.testing.assert_close(resize_bilinear(nine, 3), nine[..., ::3, ::3])
