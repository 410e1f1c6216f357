"""A network as an estimator of the noise in z_t, whatever its own conventions."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn

from purifiers._published import PUBLISHED
from purifiers._schedule import VP, Time

Edit: TypeAlias = "Callable[[Denoiser, Tensor, Time, Tensor], Tensor]"
"""(denoiser, z, t, predicted noise) → another predicted noise."""


class Form(NamedTuple):
    """Channels from the first level to the last; z is seen in patch × patch patches; residual blocks per level."""

    widths: tuple[int, ...]
    patch: int = 2
    layers: int = 1


FORMS = {
    "tiny": Form((8, 8)),
    "small": Form((32, 64)),
    "compact": Form((64, 128)),
    "medium": Form((64, 128, 192), 1, 2),
    "latent-tiny": Form((8,), 1),
    "latent-small": Form((64,), 1),
    "latent-compact": Form((96,), 1),
    "latent-medium": Form((96, 192), 1, 2),
}
"""small is for 28×28 images, on patches at half the cost of pixels; compact for 32×32 without a GPU, medium with one;
those for latents see every site."""


def unet(shape: tuple[int, int, int], form: str, *, images: int = 1, embeds: bool = False) -> nn.Module:
    """A fresh UNet2DModel of one of ``FORMS``, or of ``PUBLISHED``, for z of ``shape`` (C, H, W).

    Args:
        images: how many images of z's channels it takes.
        embeds: whether it takes an embedding (B, ``embedding(form)``) beside the time's.
    """
    from diffusers import UNet2DModel  # heavy: only where networks are built

    if form in PUBLISHED:
        return PUBLISHED[form](shape)
    widths, patch, layers = FORMS[form]
    if shape[1] != shape[2]:
        raise ValueError(f"these networks are of square images, got {shape}")
    channels = patch * patch * shape[0]
    return UNet2DModel(
        sample_size=shape[1] // patch,
        in_channels=images * channels,
        out_channels=channels,
        block_out_channels=widths,
        layers_per_block=layers,
        down_block_types=("DownBlock2D",) * len(widths),
        up_block_types=("UpBlock2D",) * len(widths),
        norm_num_groups=8 if min(widths) > 8 else 4,
        add_attention=False,
        class_embed_type="identity" if embeds else None,
    )


def embedding(form: str) -> int:
    """The width of a network's embedding of the time."""
    return 4 * FORMS[form].widths[0]


class Embedding(nn.Sequential):
    """c (B, d) → what is added to a network's embedding of the time, (B, width); zeros until it is trained.

    A network that is fine-tuned from an unconditional one so starts out as that.
    """

    def __init__(self, d: int, width: int):
        super().__init__(nn.Linear(d, width), nn.SiLU(), nn.Linear(width, width))
        for parameter in self[-1].parameters():
            nn.init.zeros_(parameter)


class Canvas(nn.Sequential):
    """c (B, d) → an image (B, C, H, W), linear in c: for a network that is told of places and not of wholes."""

    def __init__(self, d: int, shape: tuple[int, int, int]):
        super().__init__(nn.Linear(d, math.prod(shape)), nn.Unflatten(1, shape))


def resize(z: Tensor, size: Sequence[int]) -> Tensor:
    """Bilinear interpolation to (height, width), as DiffPure's of ImageNet; differentiable, and nothing if it fits."""
    if tuple(z.shape[-2:]) == tuple(size):
        return z
    return nn.functional.interpolate(z, tuple(size), mode="bilinear", align_corners=False)


def root(v: Time) -> Time:
    """The square root of a number or of one per row; 0 of what rounding led below 0."""
    return v.clamp_min(0).sqrt() if isinstance(v, Tensor) else math.sqrt(max(v, 0.0))


class Denoiser:
    """Predicts the noise n in z_t = sqrt(alpha_bar) z_0 + sigma n, with sigma = sqrt(1 - alpha_bar).

    A net trained on discrete indices is fed index i and paired with the table's alpha_bar_i; one trained in continuous
    time is fed 999 t and paired with alpha_bar(t): the two schedules are never mixed. A net whose inputs are patches
    (p² C channels) works at 1/p of the resolution. ``given`` and ``edited`` make twins that know more.

    Args:
        net: (z, label) → predicted noise; a diffusers model or any module returning a tensor or an object with
            ``sample``. Extra output channels (a learned variance) are dropped.
        schedule: the schedule that the net was trained on.
        labels: "index" or "continuous".
        images: how many images of z's channels the net takes: 2 if a condition stands beside z.

    Raises:
        ValueError: if ``labels`` is neither, or the net takes another number of images.
    """

    def __init__(self, net: nn.Module, schedule: VP, labels: str = "index", images: int = 1):
        if labels not in ("index", "continuous"):
            raise ValueError(f'labels must be "index" or "continuous", got {labels!r}')
        config = getattr(net, "config", None)
        takes, gives = (getattr(config, f"{side}_channels", None) for side in ("in", "out"))
        if takes and gives and gives * images not in (takes, 2 * takes):  # twice as many with a learned variance
            raise ValueError(
                f"the network takes {takes} channels, which aren't {images} image(s) of the {gives} it gives"
            )
        self.net, self.schedule, self.labels, self.images = net, schedule, labels, images
        self.beside: Tensor | None = None
        self.shifts = False
        self.embedded: Tensor | None = None
        self.edit: Edit | None = None

    def given(self, *, beside: Tensor | None = None, shifts: bool = False, embedded: Tensor | None = None) -> Denoiser:
        """This denoiser under a condition; what is left out is zeros where the net asks for it.

        Args:
            beside: an image concatenated to z, of its shape, for a net with ``images=2``.
            shifts: that image is added to z, too, before the net sees it.
            embedded: vectors (B, d) added to the net's embedding of the time, where it takes such.
        """
        twin = copy.copy(self)
        twin.beside, twin.shifts, twin.embedded = beside, shifts, embedded
        return twin

    def edited(self, edit: Edit) -> Denoiser:
        """This denoiser with another prediction in place of its own: how structure enters a reverse chain."""
        twin, first = copy.copy(self), self.edit
        twin.edit = edit if first is None else lambda denoiser, z, t, n: edit(denoiser, z, t, first(denoiser, z, t, n))
        return twin

    def exaggerated(self, weight: float) -> Denoiser:
        """n_off + weight (n_on - n_off): the condition as trained (1, this denoiser), left off (0), or more of it.

        Reference: Ho and Salimans 2022 (arXiv 2207.12598), eq. 6, with weight = 1 + w.
        """
        off = self.given()
        if weight == 1:
            return self
        if weight == 0:
            return off

        def edit(denoiser: Denoiser, z: Tensor, t: Time, n: Tensor) -> Tensor:
            without = off.noise(z, t)
            return without + weight * (n - without)

        return self.edited(edit)

    def alpha_bar(self, t: Time) -> Time:
        """The alpha_bar that belongs to the net's label at time t; 1 at t = 0."""
        if not isinstance(t, Tensor) and t <= 0:
            return 1.0
        return self.schedule.discrete(t) if self.labels == "index" else self.schedule.alpha_bar(t)

    def noise(self, z: Tensor, t: Time) -> Tensor:
        """The predicted noise at one time for all rows or one per row."""
        patch = self._patch(z.shape[1])
        shown = z + self.beside if self.shifts and self.beside is not None else z
        fed = nn.functional.pixel_unshuffle(shown, patch)
        if self.images > 1:
            beside = torch.zeros_like(z) if self.beside is None else self.beside
            fed = torch.cat((fed, nn.functional.pixel_unshuffle(beside, patch)), 1)
        out = self.net(fed, self._label(z, t), **self._embedding(z))
        out = out if isinstance(out, Tensor) else out.sample
        n = nn.functional.pixel_shuffle(out[:, : z.shape[1] * patch * patch], patch)
        return n if self.edit is None else self.edit(self, z, t, n)

    def clean(self, z: Tensor, t: Time, n: Tensor) -> Tensor:
        """The z_0 that a predicted noise means: (z - sigma n) / sqrt(alpha_bar)."""
        a = self.alpha_bar(t)
        return (z - root(1 - a) * n) / root(a)

    def dirt(self, z: Tensor, t: Time, z_0: Tensor) -> Tensor:
        """The noise that a predicted z_0 means: (z - sqrt(alpha_bar) z_0) / sigma."""
        a = self.alpha_bar(t)
        return (z - root(a) * z_0) / root(1 - a)

    def fit(self, z: Tensor) -> Tensor:
        """z at the net's own resolution, where it states one: 224×224 images become 256×256 for a 256×256 net."""
        side = getattr(getattr(self.net, "config", None), "sample_size", None)
        if side is None:
            return z
        height, width = (side, side) if isinstance(side, int) else side
        patch = self._patch(z.shape[1])
        return resize(z, (height * patch, width * patch))

    def score(self, z: Tensor, t: Time) -> Tensor:
        """grad log p_t(z) = -n / sigma."""
        return -self.noise(z, t) / root(1 - self.alpha_bar(t))

    def _label(self, z: Tensor, t: Time) -> Tensor:
        if isinstance(t, Tensor):
            return self.schedule.indices(t).flatten() if self.labels == "index" else (self.schedule.n - 1) * t.flatten()
        if self.labels == "index":
            return torch.full((len(z),), max(self.schedule.index(t), 0), device=z.device)
        return torch.full((len(z),), (self.schedule.n - 1) * t, device=z.device, dtype=z.dtype)

    def _embedding(self, z: Tensor) -> dict[str, Tensor]:
        """What a net that takes an embedding beside the time is handed: diffusers' class_labels."""
        config: Any = getattr(self.net, "config", None)
        if getattr(config, "class_embed_type", None) != "identity":
            return {}
        if self.embedded is not None:
            return {"class_labels": self.embedded}
        return {"class_labels": z.new_zeros(len(z), 4 * config.block_out_channels[0])}

    def _patch(self, channels: int) -> int:
        """The side p of the patches that the net sees: it takes images · p² · channels."""
        inputs = getattr(getattr(self.net, "config", None), "in_channels", channels * self.images)
        patch = math.isqrt(inputs // (channels * self.images))
        if inputs != channels * self.images * patch * patch:
            raise ValueError(
                f"the network takes {inputs} channels, which aren't {self.images} image(s) of {channels} in patches: "
                "was it trained with a condition, or without?"
            )
        return patch
