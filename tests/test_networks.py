# SPDX-License-Identifier: Apache-2.0
"""Registry, networks, their normalising wrapper, and generators."""

import pytest
import torch
from torch import nn

from python_models.networks import (
    GENERATORS,
    NETWORKS,
    Classifier,
    Generator,
    build_generator,
    build_network,
    count_parameters,
    init_normal_,
)
from python_models.networks.wide_resnet import WideResNet
from python_models.registry import Registry

# Parameters for 10, 100 and 200 classes; LeNet-5 on grey images, the others on colour ones.
PARAMETERS = {
    "lenet5": (61_706, 69_356, 77_856),
    "lenet5_half": (15_738, 19_608, 23_908),
    "lenet5_bn": (61_990, 69_640, 78_140),
    "lenet5_half_bn": (15_880, 19_750, 24_050),
    "resnet18": (11_173_962, 11_220_132, 11_271_432),
    "resnet34": (21_282_122, 21_328_292, 21_379_592),
    "wrn16_1": (175_066, 180_916, 187_416),
    "wrn16_2": (691_674, 703_284, 716_184),
    "wrn40_1": (563_930, 569_780, 576_280),
    "wrn40_2": (2_243_546, 2_255_156, 2_268_056),
}
FEATURE_DIMS = {
    "lenet5": 84,
    "lenet5_half": 42,
    "lenet5_bn": 84,
    "lenet5_half_bn": 42,
    "resnet18": 512,
    "resnet34": 512,
    "wrn16_1": 64,
    "wrn16_2": 128,
    "wrn40_1": 64,
    "wrn40_2": 128,
}
BATCH_NORM = {
    "lenet5": 0,
    "lenet5_half": 0,
    "lenet5_bn": 3,
    "lenet5_half_bn": 3,
    "resnet18": 20,
    "resnet34": 36,
    "wrn16_1": 13,
    "wrn16_2": 13,
    "wrn40_1": 37,
    "wrn40_2": 37,
}


def channels_of(name: str) -> int:
    return 1 if name.startswith("lenet") else 3


def test_every_network_is_in_the_tables() -> None:
    assert set(NETWORKS) == set(PARAMETERS) == set(FEATURE_DIMS) == set(BATCH_NORM)


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameter_counts(name: str) -> None:
    with torch.device("meta"):
        counts = tuple(
            count_parameters(build_network(name, classes, channels_of(name)))
            for classes in (10, 100, 200)
        )
    assert counts == PARAMETERS[name]


@pytest.mark.parametrize("name", PARAMETERS)
def test_forward_is_classify_of_features(name: str) -> None:
    torch.manual_seed(0)
    network = build_network(name, 7, channels_of(name)).eval()
    images = torch.rand(2, channels_of(name), 32, 32, requires_grad=True)
    features = network.features(images)
    assert features.shape == (2, FEATURE_DIMS[name])
    assert network.feature_dim == FEATURE_DIMS[name]
    logits = network(images)
    assert logits.shape == (2, 7)
    assert torch.equal(logits, network.classify(features))
    (gradient,) = torch.autograd.grad(logits.sum(), images)
    assert gradient.abs().sum() > 0


@pytest.mark.parametrize("name", [name for name, layers in BATCH_NORM.items() if layers])
def test_batch_norm_inputs_survive_the_forward_pass(name: str) -> None:
    """Methods match the statistics of these inputs, so nothing may overwrite them in place."""
    torch.manual_seed(0)
    network = build_network(name, 10, channels_of(name)).eval()
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []
    for layer in network.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.register_forward_pre_hook(lambda _, x: seen.append((x[0], x[0].clone())))
    network(torch.rand(2, channels_of(name), 32, 32))
    assert len(seen) == BATCH_NORM[name]
    assert all(torch.equal(after, before) for after, before in seen)


@pytest.mark.parametrize("name", ["resnet18", "wrn16_1"])
def test_convolutional_networks_take_other_sizes(name: str) -> None:
    assert build_network(name, 5).eval()(torch.rand(1, 3, 64, 48)).shape == (1, 5)


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
        (("xyz", 10), "unknown network 'xyz': available: lenet5, "),
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
    with pytest.raises(TypeError, match="Recorder does not offer its penultimate vector"):
        Classifier(Recorder(), (0.5,), (0.5,)).features(images)


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
    ],
)
def test_generator_parameter_counts(name: str, latent_dim: int, count: int) -> None:
    with torch.device("meta"):
        assert count_parameters(build_generator(name, latent_dim)) == count


@pytest.mark.parametrize("name", GENERATORS)
@pytest.mark.parametrize(("size", "channels"), [(32, 3), (28, 1)])
def test_generators_make_images(name: str, size: int, channels: int) -> None:
    generator = build_generator(name, 10, size, channels)
    images = generator(generator.sample_latents(3))
    assert images.shape == (3, *generator.image_shape) == (3, channels, size, size)
    if generator.output_is_normalised:
        variance, mean = torch.var_mean(images, dim=(0, 2, 3), correction=0)
        torch.testing.assert_close(mean, torch.zeros(channels), atol=1e-4, rtol=0)
        torch.testing.assert_close(variance, torch.ones(channels), atol=1e-2, rtol=0)
    else:
        assert 0 <= images.min() < images.max() <= 1


def test_latents_repeat_with_their_source_of_randomness() -> None:
    generator = Generator(16, width=4)
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
        (("generator_small", 10, 30), "image_size=30 must be a positive multiple of 4"),
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
