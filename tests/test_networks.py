# SPDX-License-Identifier: Apache-2.0
"""Registry, networks, their normalising wrapper, and generators."""

import pytest
import torch
from torch import nn

from python_models.networks import (
    GENERATORS,
    NETWORKS,
    Classifier,
    build_discriminator,
    build_generator,
    build_network,
    count_parameters,
    init_normal_,
)
from python_models.networks.generators import VectorGenerator
from python_models.networks.shufflenet import shuffle_channels
from python_models.networks.wide_resnet import WideResNet
from python_models.registry import Registry

# Parameters for 10, 100 and 200 classes (LeNet-5 on grey images, the others on colour ones), the
# length of the vector before the last layer, and the BatchNorm layers.
NETWORK_FACTS = {
    "lenet5": ((61_706, 69_356, 77_856), 84, 0),
    "lenet5_half": ((15_738, 19_608, 23_908), 42, 0),
    "lenet5_bn": ((61_990, 69_640, 78_140), 84, 3),
    "lenet5_half_bn": ((15_880, 19_750, 24_050), 42, 3),
    "resnet18": ((11_173_962, 11_220_132, 11_271_432), 512, 20),
    "resnet34": ((21_282_122, 21_328_292, 21_379_592), 512, 36),
    "resnet50": ((23_520_842, 23_705_252, 23_910_152), 2048, 53),
    "resnet8": ((78_042, 83_892, 90_392), 64, 9),
    "resnet14": ((175_258, 181_108, 187_608), 64, 15),
    "resnet20": ((272_474, 278_324, 284_824), 64, 21),
    "resnet56": ((855_770, 861_620, 868_120), 64, 57),
    "resnet110": ((1_730_714, 1_736_564, 1_743_064), 64, 111),
    "resnet116": ((1_827_930, 1_833_780, 1_840_280), 64, 117),
    "resnet110x2": ((6_899_610, 6_911_220, 6_924_120), 128, 112),
    "resnet8x4": ((1_210_410, 1_233_540, 1_259_240), 256, 10),
    "resnet32x4": ((7_410_730, 7_433_860, 7_459_560), 256, 34),
    "vgg8_bn": ((3_918_858, 3_965_028, 4_016_328), 512, 5),
    "vgg11_bn": ((9_231_114, 9_277_284, 9_328_584), 512, 8),
    "vgg13_bn": ((9_416_010, 9_462_180, 9_513_480), 512, 10),
    "vgg16_bn": ((14_728_266, 14_774_436, 14_825_736), 512, 13),
    "wrn16_1": ((175_066, 180_916, 187_416), 64, 13),
    "wrn16_2": ((691_674, 703_284, 716_184), 128, 13),
    "wrn16_4": ((2_748_890, 2_772_020, 2_797_720), 256, 13),
    "wrn40_1": ((563_930, 569_780, 576_280), 64, 37),
    "wrn40_2": ((2_243_546, 2_255_156, 2_268_056), 128, 37),
    "wrn40_4": ((8_949_210, 8_972_340, 8_998_040), 256, 37),
    "mobilenet_v2_half": ((697_546, 812_836, 940_936), 1280, 53),
    "shufflenet_v1": ((862_768, 949_258, 1_045_358), 960, 49),
    "shufflenet_v2": ((1_263_278, 1_355_528, 1_458_028), 1024, 56),
}
# torchvision's, for the 1,000 classes of ImageNet.
IMAGENET_FACTS = {
    "imagenet_resnet18": (11_689_512, 512, 20),
    "imagenet_resnet34": (21_797_672, 512, 36),
    "imagenet_resnet50": (25_557_032, 2048, 53),
    "imagenet_mobilenet_v2": (3_504_872, 1280, 52),
}


def channels_of(name: str) -> int:
    return 1 if name.startswith("lenet") else 3


def test_every_network_is_in_the_tables() -> None:
    assert set(NETWORKS) == set(NETWORK_FACTS) | set(IMAGENET_FACTS)


@pytest.mark.parametrize("name", NETWORK_FACTS)
def test_parameter_counts(name: str) -> None:
    with torch.device("meta"):
        counts = tuple(
            count_parameters(build_network(name, classes, channels_of(name)))
            for classes in (10, 100, 200)
        )
    assert counts == NETWORK_FACTS[name][0]


@pytest.mark.parametrize("name", NETWORK_FACTS)
def test_the_parts_of_a_network(name: str) -> None:
    """Logits are `classify` of `features`, the features are the mean of the map, and methods that
    match the statistics of the BatchNorm layers' inputs find them as they were: no later layer
    overwrites them in place.
    """
    _, feature_dim, batch_norms = NETWORK_FACTS[name]
    check_parts(build_network(name, 7, channels_of(name)), feature_dim, batch_norms, 32)


@pytest.mark.parametrize("name", IMAGENET_FACTS)
def test_imagenet_networks(name: str) -> None:
    """Networks of torchvision have their parts too, and torchvision's weights files fit them."""
    models = pytest.importorskip("torchvision.models")
    count, feature_dim, batch_norms = IMAGENET_FACTS[name]
    network = build_network(name, 1000)
    assert count_parameters(network) == count
    original = getattr(models, name.removeprefix("imagenet_"))(num_classes=1000).eval()
    network.load_state_dict(original.state_dict())
    images = torch.rand(2, 3, 64, 64)
    assert torch.equal(network.eval()(images), original(images))
    wrapped = Classifier(network, (0.5,), (0.5,))
    assert set(wrapped.state_dict()) == {f"network.{key}" for key in original.state_dict()}
    wrapped.load_state_dict(wrapped.state_dict())
    check_parts(network, feature_dim, batch_norms, 64)
    with pytest.raises(ValueError, match="in_channels=1 must be 3"):
        build_network(name, 10, 1)


def check_parts(network: nn.Module, feature_dim: int, batch_norms: int, size: int) -> None:
    network.eval()
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []
    for layer in network.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.register_forward_pre_hook(lambda _, x: seen.append((x[0], x[0].clone())))
    channels = next(m.in_channels for m in network.modules() if isinstance(m, nn.Conv2d))
    images = torch.rand(2, channels, size, size, requires_grad=True)
    logits = network(images)
    assert len(seen) == batch_norms
    assert all(torch.equal(after, before) for after, before in seen)
    (gradient,) = torch.autograd.grad(logits.sum(), images)
    assert gradient.abs().sum() > 0
    with torch.no_grad():
        feature_map = network.feature_map(images)
        features = network.features(images)
        assert torch.equal(logits, network.classify(features))
    assert network.feature_dim == network.map_channels == feature_dim
    assert feature_map.shape[:2] == features.shape == (2, feature_dim)
    torch.testing.assert_close(feature_map.mean(dim=(2, 3)), features)


@pytest.mark.parametrize(
    "name", ["resnet8x4", "wrn16_1", "vgg8_bn", "mobilenet_v2_half", "shufflenet_v1"]
)
def test_convolutional_networks_take_other_sizes(name: str) -> None:
    assert build_network(name, 5).eval()(torch.rand(1, 3, 64, 48)).shape == (1, 5)


@pytest.mark.parametrize(("size", "map_size"), [(32, 4), (64, 4), (63, 7)])
def test_vgg_pools_once_more_where_images_have_64_pixels(size: int, map_size: int) -> None:
    feature_map = build_network("vgg8_bn", 5).eval().feature_map(torch.rand(1, 3, size, size))
    assert feature_map.shape == (1, 512, map_size, map_size)


def test_shuffling_interleaves_the_groups() -> None:
    x = torch.arange(6.0).view(1, 6, 1, 1).expand(2, 6, 3, 4)
    shuffled = shuffle_channels(x.contiguous(memory_format=torch.channels_last), 3)
    assert shuffled[1, :, 2, 1].tolist() == [0, 2, 4, 1, 3, 5]
    assert torch.equal(shuffle_channels(shuffled, 2), x)


def test_lenet_says_which_size_it_takes() -> None:
    with pytest.raises(ValueError, match=r"\[b, c, 32, 32\], got \[2, 1, 28, 28\]"):
        build_network("lenet5", 10, 1)(torch.rand(2, 1, 28, 28))


def test_wide_resnet_shortcut_starts_from_the_activated_input_only_where_channels_change() -> None:
    torch.manual_seed(0)
    network = WideResNet(16, 2, 10).eval()
    x = torch.randn(1, 16, 8, 8)
    changing, keeping = network.layer1[0], network.layer1[1]
    nn.init.zeros_(changing.conv2.weight)
    nn.init.zeros_(keeping.conv2.weight)
    activated = torch.relu(changing.bn1(x))
    torch.testing.assert_close(changing(x), changing.shortcut(activated))
    y = torch.randn(1, 32, 8, 8)
    torch.testing.assert_close(keeping(y), y)


@pytest.mark.parametrize("depth", [4, 17, 38])
def test_wide_resnet_refuses_impossible_depths(depth: int) -> None:
    with pytest.raises(ValueError, match=f"depth={depth} must be 6n \\+ 4"):
        WideResNet(depth, 1, 10)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("lenet", 10), "unknown network 'lenet': did you mean 'lenet5'"),
        (("LeNet5", 10), "did you mean 'lenet5'"),
        (("wrn-40-2", 10), "did you mean 'wrn40_2'"),
        (("xyz", 10), "unknown network 'xyz': available: .*resnet18, "),
        (("resnet18", 0), "num_classes=0 must be at least 1"),
        (("resnet18", 10, 0), "in_channels=0 must be at least 1"),
    ],
)
def test_build_network_errors(arguments: tuple[object, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_network(*arguments)  # type: ignore[arg-type]


def test_registry_keeps_order_and_refuses_duplicates() -> None:
    registry: Registry[int] = Registry("thing")
    assert registry.register("b")(1) == 1
    registry.register("a")(2)
    assert (registry.names(), list(registry), len(registry)) == (["b", "a"], ["b", "a"], 2)
    assert "a" in registry
    assert "c" not in registry
    with pytest.raises(ValueError, match="thing 'a' is already registered"):
        registry.register("a")
    with pytest.raises(ValueError, match="unknown nothing 'a': available: none"):
        Registry[int]("nothing").get("a")


class Recorder(nn.Module):
    """Returns the spatial mean and keeps its input."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        self.images = images
        return images.mean(dim=(2, 3))


def test_classifier_normalises() -> None:
    mean, std = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)
    classifier = Classifier(Recorder(), mean, std)
    images = torch.rand(4, 3, 8, 8)
    expected = (images - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
    classifier(images)
    torch.testing.assert_close(classifier.network.images, expected)
    assert classifier.normalise(images.to(memory_format=torch.channels_last)).is_contiguous(
        memory_format=torch.channels_last
    )


def test_classifier_with_one_value_for_all_channels_and_none_at_all() -> None:
    images = torch.rand(2, 3, 4, 4)
    torch.testing.assert_close(
        Classifier(Recorder(), (0.5,), (0.5,)).normalise(images), images * 2 - 1
    )
    assert Classifier(Recorder(), (0.0,), (1.0,)).normalise(images) is images


def test_classifier_saves_the_network_alone_and_moves_as_a_whole() -> None:
    network = build_network("lenet5", 10, 1)
    classifier = Classifier(network, (0.5,), (0.5,))
    assert set(classifier.state_dict()) == {f"network.{key}" for key in network.state_dict()}
    assert classifier.double()(torch.rand(1, 1, 32, 32).double()).dtype == torch.float64


def test_classifier_splits_like_its_network() -> None:
    classifier = Classifier(build_network("lenet5", 10, 1), (0.5,), (0.5,))
    images = torch.rand(2, 1, 32, 32)
    features = classifier.features(images)
    assert features.shape == (2, classifier.feature_dim)
    assert torch.equal(classifier.classify(features), classifier(images))
    assert classifier.map_channels == classifier.feature_dim
    assert torch.equal(classifier.feature_map(images)[:, :, 0, 0], features)


def test_denormalising_undoes_normalising() -> None:
    images = torch.rand(2, 3, 4, 4)
    for mean, std in (((0.5, 0.4, 0.3), (0.2, 0.25, 0.3)), ((0.3,), (0.2,)), ((0.0,), (1.0,))):
        classifier = Classifier(Recorder(), mean, std)
        torch.testing.assert_close(classifier.denormalise(classifier.normalise(images)), images)


@pytest.mark.parametrize(
    ("mean", "std", "message"),
    [
        ((0.5,), (0.5, 0.5), "got 1 and 2 values"),
        ((), (), "got 0 and 0 values"),
        ((0.5,), (0.0,), "must be positive"),
        ((0.5,), (float("nan"),), "must be positive"),
    ],
)
def test_classifier_refuses_bad_statistics(
    mean: tuple[float, ...], std: tuple[float, ...], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        Classifier(Recorder(), mean, std)


def test_classifier_refuses_bad_images() -> None:
    classifier = Classifier(Recorder(), (0.5,) * 3, (0.5,) * 3)
    with pytest.raises(ValueError, match=r"\[b, 3, h, w\], got \[2, 1, 8, 8\]"):
        classifier(torch.rand(2, 1, 8, 8))
    with pytest.raises(ValueError, match=r"got \[3, 8, 8\]"):
        classifier(torch.rand(3, 8, 8))
    with pytest.raises(TypeError, match=r"in \[0, 1\], got torch.uint8"):
        classifier(torch.zeros(2, 3, 8, 8, dtype=torch.uint8))


@pytest.mark.parametrize(
    ("name", "latent_dim", "count"),
    [
        ("generator_small", 256, 2_328_899),
        ("generator_large", 512, 8_776_259),
        ("generator_large", 256, 4_581_955),
        ("generator_large", 100, 2_026_051),
        ("generator_dafl", 1000, 8_423_939),
        ("generator_imagenet", 256, 592_451),
    ],
)
def test_generator_parameter_counts(name: str, latent_dim: int, count: int) -> None:
    with torch.device("meta"):
        assert count_parameters(build_generator(name, latent_dim)) == count


def test_the_grey_generator_of_dafl_has_1_049_985_parameters() -> None:
    assert count_parameters(build_generator("generator_dafl", 100, channels=1)) == 1_049_985


def test_the_patch_discriminator() -> None:
    """531,328 parameters; each logit sees 10 pixels: its gradient is zero elsewhere."""
    discriminator = build_discriminator()
    assert count_parameters(discriminator) == 531_328
    images = torch.rand(2, 3, 32, 32, requires_grad=True)
    logits = discriminator.eval()(images)
    assert logits.shape == (2, 1, 8, 8)
    (gradient,) = torch.autograd.grad(logits[0, 0, 4, 4], images)
    rows = gradient[0].abs().sum(dim=(0, 2)).nonzero().flatten()
    assert rows.tolist() == list(range(13, 23))
    assert build_discriminator("discriminator_patch", 1)(torch.rand(2, 1, 16, 16)).shape[2:] == (
        4,
        4,
    )
    with pytest.raises(ValueError, match="unknown discriminator 'patch': "):
        build_discriminator("patch")
    with pytest.raises(ValueError, match="channels=0 must be at least 1"):
        build_discriminator(channels=0)


@pytest.mark.parametrize("name", GENERATORS)
@pytest.mark.parametrize(("size", "channels"), [(32, 3), (16, 1)])
def test_generators_make_images(name: str, size: int, channels: int) -> None:
    generator = build_generator(name, 10, size, channels)
    latents = generator.sample_latents(3)
    assert latents.shape == (3, *generator.latent_shape)
    images = generator(latents)
    assert images.shape == (3, *generator.image_shape) == (3, channels, size, size)
    if generator.output_is_normalised:
        torch.testing.assert_close(
            images.mean(dim=(0, 2, 3)), torch.zeros(channels), atol=1e-4, rtol=0
        )
        torch.testing.assert_close(
            images.var(dim=(0, 2, 3)), torch.ones(channels), atol=1e-2, rtol=0
        )
    else:
        assert 0 <= images.min() < images.max() <= 1


def test_only_the_generator_of_dafl_makes_normalised_images() -> None:
    normalised = [name for name in GENERATORS if build_generator(name, 4).output_is_normalised]
    assert normalised == ["generator_dafl"]


def test_the_generator_for_imagenet_takes_maps_of_a_sixteenth() -> None:
    generator = build_generator("generator_imagenet", 4, 48)
    assert generator.latent_shape == (4, 3, 3)
    assert build_generator("generator_imagenet", 4, 40).latent_shape == (4, 3, 3)


@pytest.mark.parametrize("name", GENERATORS)
@pytest.mark.parametrize("size", [1, 30, 49])
def test_generators_of_other_sizes_cut_the_centre_of_the_next_multiple(
    name: str, size: int
) -> None:
    """Of the same weights, the smaller image is the larger one without its rim, whose sides differ
    by one pixel at most; nothing is resized.
    """
    multiple = 16 if name == "generator_imagenet" else 4
    large = -(-size // multiple) * multiple
    generator, whole = (build_generator(name, 5, s).eval() for s in (size, large))
    generator.load_state_dict(whole.state_dict())
    latents = generator.sample_latents(2)
    images = generator(latents)
    assert images.shape == (2, *generator.image_shape) == (2, 3, size, size)
    rim = large - size
    before, after = rim // 2, rim - rim // 2
    kept = slice(before, large - after)
    assert torch.equal(images, whole(latents)[..., kept, kept])


def test_latents_repeat_with_their_source_of_randomness() -> None:
    generator = VectorGenerator(16, width=4)
    first, second = (
        generator.sample_latents(1000, torch.Generator().manual_seed(3)) for _ in range(2)
    )
    assert torch.equal(first, second)
    assert abs(float(first.mean())) < 0.05
    assert abs(float(first.std()) - 1) < 0.05


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("generator_smal", 10), "unknown generator 'generator_smal': did you mean"),
        (("generator_small", 10, 0), "image_size=0 must be at least 1"),
        (("generator_small", 0), "latent_dim=0 must be at least 1"),
        (("generator_small", 10, 32, 0), "channels=0 must be at least 1"),
    ],
)
def test_build_generator_errors(arguments: tuple[object, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_generator(*arguments)  # type: ignore[arg-type]


def test_init_normal_redraws_weights_and_keeps_running_statistics() -> None:
    torch.manual_seed(0)
    generator = build_generator("generator_small", 64)
    generator(torch.randn(8, 64))
    before = {key: value.clone() for key, value in generator.state_dict().items()}
    init_normal_(generator)
    for key, value in generator.state_dict().items():
        if "running" in key or "num_batches" in key:
            assert torch.equal(value, before[key]), key
        elif key.endswith("bias"):
            assert not value.any(), key
        else:
            is_scale = value.dim() == 1
            assert abs(float(value.mean()) - is_scale) < 0.01, key
            assert abs(float(value.std()) - 0.02) < 0.005, key
