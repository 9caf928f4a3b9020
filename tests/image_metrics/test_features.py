import shlex
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from conftest import SHARED
from fedgen_edge.config import Data
from fedgen_edge.data.corpus import Images
from fedgen_edge.data.images import CIFAR10
from fedgen_edge.data.sources import read
from fedgen_edge.errors import ConfigError, DataError, MissingExtraError
from fedgen_edge.image_metrics.distances import collapse, floor, frechet, kernel_distance, moments
from fedgen_edge.image_metrics.features import CONVERT_COMMAND, FEATURES, Extractor, make_extractor
from fedgen_edge.image_metrics.networks import Inception, ResNet
from fedgen_edge.seeds import generator

CPU = torch.device("cpu")


def some(count: int, *shape: int) -> Tensor:
    rng = generator("pictures", *shape)
    return torch.randint(256, (count, *shape), generator=rng, dtype=torch.uint8)


def drawn(network: nn.Module) -> dict[str, Tensor]:
    """Random weights under which numbers stay of one size, norms included."""
    rng, found = generator("weights"), {}
    for name, value in network.state_dict().items():
        noise = torch.randn(value.shape, generator=rng)
        if name.endswith("running_var") or value.ndim < 2:
            found[name] = 1 + 0.2 * noise.clamp(-3, 3)
        else:
            found[name] = noise * (2 / value[0].numel()) ** 0.5
    return {k: v.contiguous() for k, v in found.items() if not k.endswith("num_batches_tracked")}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights of two networks."""
    root = tmp_path_factory.mktemp("weights")
    for name, network in (("resnet20", ResNet(3)), ("inception", Inception())):
        save_file(drawn(network), root / f"{name}.safetensors")
    return root


def cifar_eyes(name: str) -> Extractor:
    path = SHARED / "cifar_features" / f"{name}.safetensors"
    if not path.is_file():
        pytest.skip("the data folder beside the repository is not here: no CIFAR-10 classifiers")
    return make_extractor(name, path, CPU)


@pytest.fixture(scope="module")
def cifar(tmp_path_factory: pytest.TempPathFactory) -> tuple[Tensor, Tensor]:
    """500 test pictures and 1,000 training ones, with the numbers of their classes."""
    if not (SHARED / "cifar10").is_dir():
        pytest.skip("the data folder beside the repository is not here: no CIFAR-10")
    root = tmp_path_factory.mktemp("cifar")
    for name in ("small_train.npz", "small_test.npz"):
        (root / name).symlink_to(SHARED / "cifar10" / name)
    corpus = read(Data(source="cifar10", path=str(root)))
    assert isinstance(corpus.examples, Images)
    assert corpus.labels is not None
    return corpus.examples.pixels, torch.tensor([CIFAR10.index(name) for name in corpus.labels])


@pytest.fixture(scope="module")
def seen(cifar: tuple[Tensor, Tensor]) -> Tensor:
    return cifar_eyes("resnet20").extract(cifar[0])


# ---- pixels


def test_pixels_are_means_of_tiles_from_minus_one_to_one() -> None:
    # a 16 x 16 picture in tiles of 2 x 2; the first holds 0, 255, 255 and 0: their mean is 0
    picture = torch.full((1, 3, 16, 16), 255, dtype=torch.uint8)
    picture[0, 1, 0, 0] = picture[0, 1, 1, 1] = 0
    eyes = make_extractor("pixels", None, CPU)
    found = eyes.extract(picture)
    assert found.shape == (1, 3 * 64)
    assert found[0, 64] == 0
    assert found.sum() == 3 * 64 - 1
    assert (eyes.distance_name, eyes.dimension) == ("FD-pixels", None)


def test_small_pictures_are_seen_as_they_are() -> None:
    picture = some(5, 1, 4, 8)
    found = make_extractor("pixels", None, CPU).extract(picture)
    torch.testing.assert_close(found, picture.flatten(1) / 127.5 - 1)


# ---- the classifiers of CIFAR-10


@pytest.mark.parametrize(("name", "published"), [("resnet20", 0.9173), ("resnet56", 0.9339)])
def test_the_classifiers_are_as_right_as_published(
    name: str, published: float, cifar: tuple[Tensor, Tensor]
) -> None:
    # of 500 pictures: a deviation of sqrt(p (1 - p) / 500), below 0.013
    head = load_file(SHARED / "cifar_features" / f"{name}.safetensors")
    features = cifar_eyes(name).extract(cifar[0][:500])
    told = (features @ head["linear.weight"].mT + head["linear.bias"]).argmax(1)
    assert float((told == cifar[1][:500]).float().mean()) == pytest.approx(published, abs=0.03)


def test_grey_and_scaled_pictures_are_those_in_colour(made: Path) -> None:
    eyes = make_extractor("resnet20", made / "resnet20.safetensors", CPU)
    grey = some(2, 1, 32, 32)
    torch.testing.assert_close(eyes.extract(grey), eyes.extract(grey.expand(-1, 3, -1, -1)))
    # one colour is one colour at any size
    plain = torch.full((1, 3, 32, 32), 90, dtype=torch.uint8)
    for side in (8, 100):
        scaled = torch.full((1, 3, side, side), 90, dtype=torch.uint8)
        torch.testing.assert_close(eyes.extract(scaled), eyes.extract(plain), rtol=1e-5, atol=1e-5)
    with pytest.raises(DataError, match=r"4 channels: judge with image_metrics\.features='pixels'"):
        eyes.extract(some(1, 4, 32, 32))


def test_a_picture_is_seen_alone_whatever_is_beside_it(made: Path) -> None:
    state = torch.get_rng_state()
    eyes = make_extractor("resnet20", made / "resnet20.safetensors", CPU)
    assert torch.equal(torch.get_rng_state(), state)
    pictures = some(130, 3, 32, 32)
    together, alone = (
        eyes.extract(pictures),
        torch.cat([eyes.extract(x) for x in pictures.split(1)]),
    )
    assert together.shape == (130, eyes.dimension)
    assert not together.requires_grad
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-5)


# ---- distances on real pictures


def test_distances_rise_with_noise(cifar: tuple[Tensor, Tensor], seen: Tensor) -> None:
    pictures = cifar[0][:500].float()
    noise = torch.randn(pictures.shape, generator=generator("noise"))
    real, found = seen[500:], [seen[:500]]
    for share in (10, 40):
        spoilt = (pictures + share * noise).clamp(0, 255).round().to(torch.uint8)
        found.append(cifar_eyes("resnet20").extract(spoilt))
    distances = [frechet(moments(real), moments(own)) for own in found]
    kernels = [kernel_distance(real, own, 0) for own in found]
    assert distances == sorted(distances)
    assert [k.value for k in kernels] == sorted(k.value for k in kernels)
    # what is clean cannot be told from real pictures; what is noisy can
    assert kernels[0].low < 0 < kernels[-1].low


def test_missing_classes_show(cifar: tuple[Tensor, Tensor], seen: Tensor) -> None:
    real, labels, test = seen[500:], cifar[1][500:], seen[:500]
    whole = moments(real)
    parts = [test[cifar[1][:500] < few] for few in (10, 8, 5, 2)]
    distances = [frechet(whole, moments(part)) for part in parts]
    assert distances == sorted(distances)
    asked = cifar[1][:500]
    all_kinds, half = (
        collapse(real, labels, test[asked < few], asked[asked < few], 10) for few in (10, 5)
    )
    assert half.coverage < 0.7 * all_kinds.coverage
    assert sum(half.shares[5:]) < 0.1
    assert sum(all_kinds.shares[5:]) == pytest.approx(0.5, abs=0.05)
    assert all(0.7 < one < 1.5 for one in all_kinds.diversity)


def test_real_pictures_are_farther_from_real_ones_where_they_are_few(seen: Tensor) -> None:
    # the bias falls about as 1 / n: a fifth of the pictures, some five times the distance
    means = []
    for count in (300, 1500):
        orders = [torch.randperm(1500, generator=generator("order", seed)) for seed in range(6)]
        means.append(sum(floor(seen[order[:count]], 0) for order in orders) / 6)
    assert 3 < means[0] / means[1] < 8


# ---- the network of the FID


def test_torch_fidelity_sees_the_same(made: Path, tmp_path: Path) -> None:
    pytest.importorskip("torch_fidelity", exc_type=ImportError)
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    torch.save(load_file(made / "inception.safetensors"), tmp_path / "theirs.pth")
    theirs = FeatureExtractorInceptionV3("theirs", ["2048"], str(tmp_path / "theirs.pth"))
    ours = make_extractor("inception", made / "inception.safetensors", CPU)
    pictures = some(4, 3, 32, 40)
    torch.testing.assert_close(ours.extract(pictures), theirs(pictures)[0], rtol=1e-4, atol=1e-5)


def test_inception_sees_2048_numbers_of_any_picture(made: Path) -> None:
    eyes = make_extractor("inception", made / "inception.safetensors", CPU)
    found = eyes.extract(some(2, 1, 8, 8))
    assert (eyes.distance_name, found.shape) == ("FID", (2, eyes.dimension))
    assert float((found[0] - found[1]).abs().max()) > 1e-3


# ---- EfficientNet-Lite0


def test_lite0_needs_its_library(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "efficientnet_lite_pytorch", None)
    line = r"'lite0' needs the extra lite0: .*efficientnet-lite-pytorch"
    with pytest.raises(MissingExtraError, match=line):
        make_extractor("lite0", made / "resnet20.safetensors", CPU)


def test_lite0_sees_1280_numbers(tmp_path: Path) -> None:
    library = pytest.importorskip("efficientnet_lite_pytorch")
    network = library.EfficientNet.from_name("efficientnet-lite0")
    save_file(drawn(network), tmp_path / "lite0.safetensors")
    eyes = make_extractor("lite0", tmp_path / "lite0.safetensors", CPU)
    assert eyes.extract(some(2, 3, 32, 32)).shape == (2, 1280)


# ---- what a user can get wrong


@pytest.mark.parametrize("name", [name for name, kind in FEATURES.items() if kind.weights])
def test_weights_must_be_given(name: str) -> None:
    if name == "lite0":
        pytest.importorskip("efficientnet_lite_pytorch")
    said = rf"image_metrics\.weights is missing: image_metrics\.features='{name}' needs .+\.p?th of"
    with pytest.raises(ConfigError, match=said):
        make_extractor(name, None, CPU)


def test_wrong_words_and_weights_that_are_not_needed_are_refused(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"image_metrics\.features='clip' is unknown: pixels, resnet20"
    ):
        make_extractor("clip", None, CPU)
    with pytest.raises(ConfigError, match=r"image_metrics\.features='pixels' has none, leave"):
        make_extractor("pixels", tmp_path, CPU)


@pytest.mark.parametrize("new", [True, False])
def test_a_pickle_is_refused_unread(tmp_path: Path, new: bool) -> None:
    path = tmp_path / "weights.pth"
    torch.save({"a": torch.ones(1)}, path, _use_new_zipfile_serialization=new)
    with pytest.raises(ConfigError, match="is a pickle, which is not read: convert it by python"):
        make_extractor("resnet20", path, CPU)


def test_the_conversion_that_is_told_makes_weights_that_are_read(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = load_file(made / "resnet20.safetensors")
    source, target = tmp_path / "in.th", tmp_path / "out.safetensors"
    torch.save({"state_dict": {f"module.{k}": v for k, v in held.items()}, "best": 1.0}, source)
    python, flag, program, *_ = shlex.split(CONVERT_COMMAND)
    assert (python, flag) == ("python", "-c")
    monkeypatch.setattr(sys, "argv", ["-c", str(source), str(target)])
    exec(program, {})
    pictures = some(1, 3, 32, 32)
    eyes = [make_extractor("resnet20", p, CPU) for p in (target, made / "resnet20.safetensors")]
    assert torch.equal(eyes[0].extract(pictures), eyes[1].extract(pictures))


def test_safetensors_that_begin_like_a_pickle_are_read(made: Path, tmp_path: Path) -> None:
    # a file begins with its header's length; of these lengths one has 0x80 as its last byte
    path, starts = tmp_path / "weights.safetensors", set()
    held = load_file(made / "resnet20.safetensors")
    for length in range(0, 256, 8):
        save_file(held, path, metadata={"note": "x" * length})
        with path.open("rb") as file:
            starts |= {start := file.read(1)}
        if start == b"\x80":
            make_extractor("resnet20", path, CPU)
    assert b"\x80" in starts


def test_what_is_no_file_or_no_safetensors_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "cut.safetensors"
    with pytest.raises(
        ConfigError, match=r"image_metrics\.weights='.*cut\.safetensors' is no file"
    ):
        make_extractor("resnet20", path, CPU)
    path.write_bytes(bytes(100))
    with pytest.raises(
        ConfigError, match=r"image_metrics\.weights='.*cut\.safetensors' is damaged"
    ):
        make_extractor("resnet20", path, CPU)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            {"linear.bias": None},
            "image_metrics.weights lacks linear.bias: it is not of image_metrics.features",
        ),
        ({"layer1.3.conv1.weight": torch.ones(1)}, "image_metrics.weights also has layer1.3.conv1"),
        ({"conv1.weight": torch.ones(16, 3, 3, 1)}, r"conv1.weight is \[16, 3, 3, 1\], not"),
        (
            {"bn1.bias": torch.full((16,), torch.nan)},
            "image_metrics.weights: bn1.bias is not finite",
        ),
    ],
)
def test_weights_of_another_network_are_refused(
    made: Path, tmp_path: Path, change: dict[str, Tensor | None], said: str
) -> None:
    held = {**load_file(made / "resnet20.safetensors"), **change}
    save_file({k: v for k, v in held.items() if v is not None}, tmp_path / "other.safetensors")
    with pytest.raises(ConfigError, match=said):
        make_extractor("resnet20", tmp_path / "other.safetensors", CPU)
