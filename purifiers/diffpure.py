"""DiffPure: diffuse the image to t_star, then run the reverse process back to an image."""

from __future__ import annotations

from functools import partial

from torch import Tensor, nn

from purifiers import _objectives, _sampler
from purifiers._base import SDE, Batch
from purifiers._critics import Levels
from purifiers._denoiser import unet
from purifiers._diffusion import Diffusion
from purifiers._noise import Noise


class DiffPure(Diffusion):
    """z = sqrt(alpha_bar(t_star)) (2x - 1) + sigma n, then ``steps`` reverse steps; g(x) = clamp((z_0 + 1) / 2).

    Images of another size than the net's are resized to it and, purified, back, inside the gradient. By options it is
    each of the published variants:

    - the paper's SDE: rule=sde,steps=100 at its t_star of 0.1, dt = 1e-3; its ODE: rule=ode; with a random t_star:
      spread=0.015;
    - DDPM's ancestral sampling: rule=eta; DDIM: rule=eta,eta=0;
    - gradual noise of Lee and Kim 2023 (arXiv 2303.09051): t_star=0.03+0.03+0.03+0.03+0.05+0.05+0.125+0.125, of which
      they visit every index; steps here are equally many in each chain;
    - the one step of Carlini et al. 2023 (arXiv 2206.10550), denoised smoothing: rule=eta,steps=1.

    Args:
        unet: predicts the noise; a diffusers UNet2DModel, on pixels or on patches.
        t_star, steps, rule, eta, labels, spread, rounds: as ``Diffusion``.

    Raises:
        ValueError: as ``Diffusion``.

    Reference: Nie et al. 2022 (arXiv 2205.07460), section 3.2.
    """

    def sde(self) -> SDE | None:
        if self.rule is not _sampler.euler_maruyama or self.spread or len(self.chains) != 1:
            return None
        drift, diffusion = _sampler.reverse_drift, _sampler.diffusion
        return SDE(partial(drift, self.denoiser), partial(diffusion, self.denoiser), self.times)

    def objectives(
        self,
        batch: Batch,
        noise: Noise,
        *,
        focus: float = 0.0,
        focus_below: float = 1.0,
        schedule: Levels | None = None,
    ) -> dict[str, Tensor]:
        """E ‖n - n_theta‖², over indices or, with ``schedule``, the likelihood bound over its learned noise levels.

        Args:
            focus, focus_below: as ``_objectives.eps``.
            schedule: a schedule that trains along; see ``critics``.
        """
        z = self.denoiser.fit(2 * batch.x - 1)
        if schedule is None:
            return {"unet": _objectives.eps(self.denoiser, z, noise, focus=focus, focus_below=focus_below)}
        bound, spread = _objectives.vlb(self.denoiser, z, noise, schedule)
        return {"unet": bound, "schedule": spread}

    @classmethod
    def parts(cls, shape: tuple[int, int, int], size: str = "tiny") -> dict[str, nn.Module]:
        return {"unet": unet(shape, size)}

    @classmethod
    def critics(cls, shape: tuple[int, int, int], size: str = "tiny") -> dict[str, nn.Module]:
        return {"schedule": Levels()}
