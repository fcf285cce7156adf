"""Turns the decoder's image into pixels: resize, center crop and rounding on the device, so that only bytes are copied back."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Postprocess(nn.Module):
    """Bilinear resampling by tables, then [-1, 1] to 0..255: image float32 [B, 3, H, W] -> uint8 [B, H', W', 3].

    Output row y is the sum over a of row_weight[a, y] * (image row row_index[a, y]). Columns work the same way. An index is int64
    [2, n], a weight float32 [2, n]. Source: diffusers `resize_and_crop_tensor` and `VaeImageProcessor.postprocess`.
    """

    def forward(self, image: Tensor, row_index: Tensor, row_weight: Tensor, column_index: Tensor, column_weight: Tensor) -> Tensor:
        first, second = row_weight.unsqueeze(-1).unbind(0)
        rows = image.index_select(2, row_index[0]) * first + image.index_select(2, row_index[1]) * second
        left, right = column_weight.unbind(0)
        resized = rows.index_select(3, column_index[0]) * left + rows.index_select(3, column_index[1]) * right
        levels = ((resized * 0.5 + 0.5).clamp(0.0, 1.0) * 255.0).round()
        return levels.permute(0, 2, 3, 1).to(torch.uint8)
