"""The part of a weight that stays in 16 bits: two thin matrices beside the quantized one (SVDQuant, arXiv 2411.05007)."""

from __future__ import annotations

import numpy as np

from sana_export.formats.arrays import Float32

#: Columns that the iteration keeps beside the wanted ones, and its rounds.
_MORE, _ROUNDS = 16, 12
_SEED = 0


def low_rank_branch(weight: Float32, rows: Float32 | None, rank: int) -> tuple[Float32, Float32]:
    """`down` [in, rank] and `up` [rank, out] whose product is near to `weight` [in, out]; what remains is to be quantized.

    Rounding errors are not correlated, so an error of an input's weights matters as much as the mean square of that input in
    `rows` [R, in]: down @ up is the best approximation with errors weighed by them (None: all the same). It is found by subspace
    iteration from a fixed start (arXiv 0909.4061). Its columns are ordered by their singular values, the two factors share these
    equally, and the largest entry of each row of `up` is positive, so the result is the same everywhere up to rounding.
    """
    rank = min(rank, *weight.shape)
    scale = np.ones(len(weight), np.float32) if rows is None else _scales(rows)
    left, values, right = _leading(weight * scale[:, None], rank)
    signs = np.sign(right[np.arange(rank), np.abs(right).argmax(axis=1)])
    root = np.sqrt(values) * signs
    return ((left * root) / scale[:, None]).astype(np.float32), (right * root[:, None]).astype(np.float32)


def _scales(rows: Float32) -> Float32:
    """The root mean square of each input, with a floor that keeps the division by it sane."""
    squares = np.square(rows, dtype=np.float64).mean(axis=0)
    floor = 1e-6 * squares.mean() or 1.0
    return np.sqrt(np.maximum(squares, floor)).astype(np.float32)


def _leading(matrix: Float32, rank: int) -> tuple[Float32, Float32, Float32]:
    """The `rank` leading singular vectors and values of a matrix: [m, rank], [rank], [rank, n]."""
    width = min(rank + _MORE, *matrix.shape)
    basis = np.random.default_rng(_SEED).standard_normal((matrix.shape[1], width)).astype(np.float32)
    for _ in range(_ROUNDS):
        basis, _ = np.linalg.qr(matrix @ basis)
        basis, _ = np.linalg.qr(matrix.T @ basis)
    thin, values, right = np.linalg.svd(matrix @ basis, full_matrices=False)
    return thin[:, :rank], values[:rank], (right @ basis.T)[:rank]
