"""One solver step: guidance, then the update of the latents. Both are linear in their inputs."""

from __future__ import annotations

from torch import Tensor, nn


class Sampler(nn.Module):
    """One step of any solver with a linear update, which a row of coefficients defines (contract.COEFFICIENTS).

    All inputs are float32: noise_pred [K, B, C, h, w]; latents, the x0 of earlier steps (contract.HISTORY) and noise [B, C, h, w];
    coefficients [8]; weights [K]. Guidance is the sum over branches of prediction times weight. Returns next_latents and x0, both
    [B, C, h, w].
    """

    def forward(
        self,
        noise_pred: Tensor,
        latents: Tensor,
        previous_x0: Tensor,
        previous_x0_2: Tensor,
        previous_x0_3: Tensor,
        noise: Tensor,
        coefficients: Tensor,
        weights: Tensor,
    ) -> tuple[Tensor, Tensor]:
        x0_latents, x0_noise_pred, keep, update, first, second, third, fresh = coefficients.unbind(0)
        guided = (noise_pred * weights.reshape(-1, 1, 1, 1, 1)).sum(0)
        x0 = x0_latents * latents + x0_noise_pred * guided
        past = first * previous_x0 + second * previous_x0_2 + third * previous_x0_3
        next_latents = keep * latents + update * x0 + past + fresh * noise
        return next_latents, x0
