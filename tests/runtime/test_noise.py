"""The generator without torch against `torch.randn` and diffusers' `randn_tensor`."""

from __future__ import annotations

import time

import numpy as np
import pytest
import torch
from diffusers.utils.torch_utils import randn_tensor

from sana_export.errors import UsageError
from sana_export.runtime.noise import TorchGenerator, randn_batch

#: Whether torch uses the x86 kernels whose roundings the module repeats. With others the values are only close.
BIT_IDENTICAL = torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512")

#: Successive draws: short and long ones in turn, with odd and even numbers of single values in between.
SHAPES = [
    *((1,), (16,), (), (3,), (17,), (15,), (31,), (1, 32, 4, 6), (5,), (0,)),
    *((2, 32, 32, 32), (1,), (1, 3, 33), (2, 2), (1, 32, 16, 24)),
]

SEEDS = [0, 1, 42, 1234567, 2**31, 2**32 - 1, 2**32, 2**32 + 7, 2**63, 2**64 - 1, -1, -42, -(2**63)]


def reference(seed: int) -> torch.Generator:
    return torch.Generator("cpu").manual_seed(seed)


def assert_same(ours: np.ndarray, theirs: torch.Tensor) -> None:
    assert ours.dtype == np.float32
    assert ours.shape == tuple(theirs.shape)
    if BIT_IDENTICAL:
        np.testing.assert_array_equal(ours, theirs.numpy())
    else:
        np.testing.assert_allclose(ours, theirs.numpy(), rtol=0, atol=1e-6)


@pytest.mark.parametrize("seed", SEEDS)
def test_successive_draws_equal_torch(seed: int) -> None:
    ours, theirs = TorchGenerator(seed), reference(seed)
    for shape in SHAPES:
        assert_same(ours.randn(shape), torch.randn(shape, generator=theirs))


@pytest.mark.parametrize("size", [*range(1, 70), 32767, 32768, 32769, 65551])
def test_every_size_equals_torch(size: int) -> None:
    ours, theirs = TorchGenerator(size), reference(size)
    for _ in range(2):
        assert_same(ours.randn((size,)), torch.randn(size, generator=theirs))


def test_four_million_values() -> None:
    size = 1 << 22
    ours, theirs = TorchGenerator(9).randn((size,)), torch.randn(size, generator=reference(9)).numpy()
    assert np.abs(ours - theirs).max() <= 1e-6
    if BIT_IDENTICAL:  # rounding twice in the emulated fused multiply-add may change a bit once in many millions
        assert np.count_nonzero(ours != theirs) <= 2


@pytest.mark.parametrize("seed", [2**64, -(2**63) - 1])
def test_a_seed_that_torch_refuses_is_refused(seed: int) -> None:
    with pytest.raises(ValueError, match="Overflow"):
        reference(seed)
    with pytest.raises(UsageError, match="the seed is out of range") as caught:
        TorchGenerator(seed)
    assert caught.value.found == str(seed)


@pytest.mark.parametrize("shape", [(3, 32, 4, 6), (3, 2, 2, 2), (3, 32, 16, 17)])
def test_one_seed_for_each_image(shape: tuple[int, ...]) -> None:
    seeds = (5, 6, 2**40 + 5)
    ours, theirs = [TorchGenerator(seed) for seed in seeds], [reference(seed) for seed in seeds]
    for _ in range(2):
        assert_same(randn_batch(shape, ours), randn_tensor(shape, generator=theirs))


@pytest.mark.parametrize("as_list", [False, True])
def test_one_seed_for_the_batch(as_list: bool) -> None:
    ours, theirs = TorchGenerator(11), reference(11)
    ours_given, theirs_given = ([ours], [theirs]) if as_list else (ours, theirs)
    for shape in ((3, 32, 4, 6), (2, 1, 2, 3)):
        assert_same(randn_batch(shape, ours_given), randn_tensor(shape, generator=theirs_given))


def test_number_of_seeds_must_match() -> None:
    with pytest.raises(UsageError, match="2 seeds for 3 images"):
        randn_batch((3, 32, 4, 4), [TorchGenerator(0), TorchGenerator(1)])


def test_a_large_draw_is_quick() -> None:
    generator, seconds = TorchGenerator(0), []
    for _ in range(5):
        start = time.perf_counter()
        generator.randn((1, 32, 128, 128))
        seconds.append(time.perf_counter() - start)
    assert min(seconds) < 0.1
