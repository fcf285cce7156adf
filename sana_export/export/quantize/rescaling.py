"""Factors that move the range of a layer's inputs into its weights, or the other way, before either is quantized.

x W = (x / f) (f W) for a factor f of each input. Where another operator can divide by f, the change is exact. With activations in
8 bits it is SmoothQuant (arXiv 2211.10438), with weights alone in 4 bits it is AWQ (arXiv 2306.00978).
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from sana_export.formats.arrays import Float32

#: Gives the numbers that quantized weights [in, out] stand for.
QuantizeWeight = Callable[[Float32], Float32]
#: Gives the numbers that quantized inputs [R, in] stand for, from them and the largest magnitude of each input [in].
QuantizeRows = Callable[[Float32, Float32], Float32]

_STEPS = tuple(step / 10 for step in range(1, 11))
#: The exponents (a, b) that are tried: f = size of the input ^ a / largest weight of the input ^ b.
MIGRATIONS = ((0.0, 0.0), *((step, 0.0) for step in _STEPS), *((step, round(1 - step, 1)) for step in _STEPS[:-1]))
#: The largest exponent a with quantized inputs. Factors that make all inputs equally large leave no room for larger ones: on
#: `tiny`, other prompts than the calibration's saturated 0.3% of what cross-attention's last layer reads.
MOST_MIGRATION = 0.5
#: The range of rescaled inputs is so many times what was seen, for the same reason.
HEADROOM = 1.25
#: The limits of a factor, after their geometric mean is 1.
LEAST, MOST = 1 / 256, 256.0
#: What the choice is made on: so many rows and output channels at most, at equal distances.
_ROWS, _OUTPUTS = 256, 1024


def rescaling(
    weight: Float32,
    maximum: Float32,
    rows: Float32,
    quantize_weight: QuantizeWeight,
    quantize_rows: QuantizeRows | None = None,
) -> Float32:
    """The factors [in] for a layer with the weight [in, out]: divide its inputs by them, multiply its weights by them.

    `maximum` [in] is the largest magnitude of each input, `rows` [R, in] a sample. The two functions quantize weights and inputs
    (None: inputs are not). Of `MIGRATIONS`, the one with the least squared error of the outputs for `rows` is chosen. Each error is
    divided by the mean square of its channel: what reads a large channel multiplies it by small weights. The size of an input is
    its maximum, or without `quantize_rows` its root mean square. The first migration, all ones, wins a tie. Inputs that are always
    zero get 1.
    """
    some = np.ascontiguousarray(rows[:: -(-len(rows) // _ROWS)])
    columns = np.ascontiguousarray(weight[:, :: -(-weight.shape[1] // _OUTPUTS)])
    wanted = some @ columns
    squares = np.square(wanted).sum(axis=0, dtype=np.float64)
    sizes = maximum if quantize_rows is not None else np.sqrt(np.square(rows).mean(axis=0))
    largest = np.abs(weight).max(axis=1)
    best, least = np.ones(len(weight), np.float32), np.inf
    for migration in MIGRATIONS:
        if quantize_rows is not None and migration[0] > MOST_MIGRATION:
            continue
        factors = _factors(sizes, largest, *migration)
        inputs = some / factors
        if quantize_rows is not None:
            inputs = quantize_rows(inputs, maximum / factors)
        found = inputs @ quantize_weight(columns * factors[:, None])
        errors = np.square(found - wanted).sum(axis=0, dtype=np.float64)
        error = float((errors[squares > 0] / squares[squares > 0]).sum())
        if error < least:
            best, least = factors, error
    return best


def _factors(sizes: Float32, largest: Float32, up: float, down: float) -> Float32:
    """sizes ^ up / largest ^ down, with a geometric mean of 1 over the inputs in use, and within the limits."""
    used = (sizes > 0) & (largest > 0)
    logs = up * np.log(sizes, where=used, out=np.zeros(len(sizes))) - down * np.log(largest, where=used, out=np.zeros(len(sizes)))
    mean = logs[used].mean() if used.any() else 0.0
    return np.where(used, np.exp(logs - mean).clip(LEAST, MOST), 1.0).astype(np.float32)
