"""Normal noise equal to that of `torch.randn` with a CPU `torch.Generator`, in numpy: the same seed gives the same image.

torch draws 32-bit words from a Mersenne Twister (mt19937). It turns them into normal values in one of two ways, which depend on the
number of values:

- 16 and more: Box-Muller in float32 over blocks of 16. Each value uses one uniform, from the low 24 bits of a word; in a block, the
  first 8 uniforms give the radii and the last 8 the angles. If the number of values is not a multiple of 16, the last 16 values are
  drawn again from 16 fresh words.
- fewer: Box-Muller in float64, one value after another, with 53-bit uniforms from two words each. It makes two normals at a time.
  The second is kept in the generator for the next draw of this kind; draws of the other kind in between do not change it.

torch's x86 kernels (AVX2 and later) compute the float32 logarithm, sine and cosine with the single precision polynomials of the
Cephes library and fused multiply-adds. This module evaluates the same polynomials with the same roundings, so on such a machine the
values are bit-identical (tests/runtime/test_noise.py). On other processors torch calls the C library's functions, and the values
agree to about 1e-6.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from sana_export.errors import UsageError
from sana_export.formats.arrays import Float32
from sana_export.numeric import shown

#: torch draws fewer values than this one at a time.
_VECTOR_SIZE = 16
#: Values that are transformed at a time, so that the intermediate arrays stay in the processor's cache.
_CHUNK = 1 << 15
#: The smallest and the largest seed that torch accepts.
_SEEDS = (-(2**63), 2**64 - 1)

# Minimax coefficients of Cephes' logf, sinf and cosf, highest power first.
_LOG = (
    7.0376836292e-2,
    -1.1514610310e-1,
    1.1676998740e-1,
    -1.2420140846e-1,
    1.4249322787e-1,
    -1.6668057665e-1,
    2.0000714765e-1,
    -2.4999993993e-1,
    3.3333331174e-1,
)
_SIN = (-1.9515295891e-4, 8.3321608736e-3, -1.6666654611e-1)
_COS = (2.443315711809948e-5, -1.388731625493765e-3, 4.166664568298827e-2)
#: ln 2 and pi/4 as sums of parts so short that their products with small integers are exact.
_LN2_HIGH, _LN2_LOW = 0.693359375, -2.12194440e-4
_QUARTER_PI = (0.78515625, 2.4187564849853515625e-4, 3.77489497744594108e-8)


class TorchGenerator:
    """The random stream of `torch.Generator("cpu").manual_seed(seed)`.

    `seed` is any integer from -2**63 to 2**64 - 1, as for torch; the stream depends on its low 32 bits only. Successive calls of
    `randn` continue the stream, as successive calls of `torch.randn(shape, generator=g)` do. Raises UsageError for another seed.
    """

    def __init__(self, seed: int) -> None:
        if not _SEEDS[0] <= seed <= _SEEDS[1]:
            raise UsageError("the seed is out of range", found=shown(seed), wanted="an integer from -2**63 to 2**64 - 1")
        # RandomState(int) initializes mt19937 as torch does, and numpy promises never to change its stream.
        self._words = np.random.RandomState(seed & 0xFFFFFFFF)
        self._kept: float | None = None

    def randn(self, shape: Sequence[int]) -> Float32:
        """Standard normal values, float32, equal to those of `torch.randn(shape, generator=g)`."""
        size = math.prod(shape)
        if size >= _VECTOR_SIZE:
            return self._draw(size).reshape(tuple(shape))
        return np.array([self._next() for _ in range(size)], dtype=np.float32).reshape(tuple(shape))

    def _draw(self, size: int) -> Float32:
        """`size` >= 16 values by Box-Muller in float32."""
        values = self._uniform(size)
        whole = size - size % _VECTOR_SIZE
        for start in range(0, whole, _CHUNK):
            chunk = slice(start, min(start + _CHUNK, whole))
            values[chunk] = _box_muller(values[chunk])
        if whole != size:
            values[-_VECTOR_SIZE:] = _box_muller(self._uniform(_VECTOR_SIZE))
        return values

    def _uniform(self, size: int) -> Float32:
        """`size` float32 uniforms in [0, 1), each from 24 bits."""
        words = self._words.randint(0, 2**32, size=size, dtype=np.uint32)
        return (words & np.uint32(0xFFFFFF)).astype(np.float32) * np.float32(2**-24)

    def _next(self) -> float:
        """One value by Box-Muller in float64. Every second value is the one kept from the call before."""
        if self._kept is not None:
            value, self._kept = self._kept, None
            return value
        high1, low1, high2, low2 = self._words.randint(0, 2**32, size=4, dtype=np.uint32).tolist()
        angle = 2 * math.pi * _uniform53(high1, low1)
        radius = math.sqrt(-2 * math.log1p(-_uniform53(high2, low2)))
        self._kept = radius * math.sin(angle)
        return radius * math.cos(angle)


def randn_batch(shape: Sequence[int], generators: TorchGenerator | Sequence[TorchGenerator]) -> Float32:
    """Noise of `shape` [B, ...] from one generator for all images, or from B generators, one for each image.

    Equal to diffusers' `randn_tensor` with the matching torch generators. As there, a list of one generator is the same as that
    generator. Raises UsageError if the number of generators is neither 1 nor B.
    """
    if isinstance(generators, TorchGenerator):
        return generators.randn(shape)
    if len(generators) == 1:
        return generators[0].randn(shape)
    if len(generators) != shape[0]:
        raise UsageError(
            "the number of seeds does not match the number of images",
            found=f"{len(generators)} seeds for {shape[0]} images",
            wanted=f"1 seed, or {shape[0]}",
        )
    return np.concatenate([generator.randn((1, *shape[1:])) for generator in generators])


def _uniform53(high: int, low: int) -> float:
    """A float64 uniform in [0, 1) from the low 53 bits of the 64-bit word `high`:`low`."""
    return float((high << 32 | low) & (2**53 - 1)) * 2.0**-53


def _box_muller(uniform: Float32) -> Float32:
    """Normals [16 * n] from uniforms [16 * n]: each block of 16 has 8 radii and 8 angles, which give 8 cosines and 8 sines."""
    blocks = uniform.reshape(-1, 2, 8)
    radius = np.sqrt(np.float32(-2) * _log(np.float32(1) - blocks[:, 0]))
    cosine, sine = _cos_sin(np.float32(2 * math.pi) * blocks[:, 1])
    return np.stack([radius * cosine, radius * sine], axis=1).reshape(-1)


def _fma(a: Float32, b: Float32 | float, c: Float32 | float) -> Float32:
    """a * b + c, rounded once to float32. Constants are rounded to float32 first.

    The product of two float32 values is exact in float64. The sum is rounded there before it is rounded to float32, which changes
    the result in about one case in 2**29.
    """
    product = a.astype(np.float64)
    product *= np.asarray(b, dtype=np.float32)
    product += np.asarray(c, dtype=np.float32)
    return product.astype(np.float32)


def _polynomial(x: Float32, coefficients: Sequence[float]) -> Float32:
    """The polynomial with `coefficients`, highest power first, at `x`."""
    y: Float32 = np.full_like(x, coefficients[0])
    for coefficient in coefficients[1:]:
        y = _fma(y, x, coefficient)
    return y


def _log(x: Float32) -> Float32:
    """The natural logarithm of `x` > 0: x = m * 2**e with m in [sqrt(1/2), sqrt(2)), and a polynomial for log(1 + r), r = m - 1."""
    mantissa, exponent = np.frexp(x)
    small = mantissa < np.float32(math.sqrt(0.5))
    r = np.where(small, mantissa + mantissa, mantissa) - np.float32(1)
    e = (exponent - small).astype(np.float32)
    square = r * r
    y = _fma(_polynomial(r, _LOG) * r, square, e * np.float32(_LN2_LOW))
    y = _fma(square, -0.5, y)
    return _fma(e, _LN2_HIGH, r + y)


def _cos_sin(x: Float32) -> tuple[Float32, Float32]:
    """Cosine and sine of `x` >= 0, from the two polynomials at the distance of `x` from the nearest multiple of pi/2."""
    octant = (x * np.float32(4 / math.pi)).astype(np.int32)
    octant = (octant + 1) & ~1
    multiple = octant.astype(np.float32)
    for part in _QUARTER_PI:
        x = _fma(multiple, -part, x)
    square = x * x
    near_cos = _fma(_polynomial(square, _COS) * square, square, square * np.float32(-0.5)) + np.float32(1)
    near_sin = _fma(_polynomial(square, _SIN) * square, x, x)
    swap = (octant & 2) != 0
    cosine, sine = np.where(swap, near_sin, near_cos), np.where(swap, near_cos, near_sin)
    return np.where((octant + 2) & 4, -cosine, cosine), np.where(octant & 4, -sine, sine)
