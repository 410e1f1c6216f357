"""The networks of published models, built of diffusers' blocks: U-Nets that predict the noise, and an autoencoder."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from torch import nn


def ddpm(shape: tuple[int, int, int], widths: Sequence[int] = (128, 256, 256, 256), layers: int = 2) -> nn.Module:
    """DDPM of CIFAR-10, attention at the second level, 35.7 million parameters.

    Reference: Ho et al. 2020 (arXiv 2006.11239), appendix B.
    """
    from diffusers import UNet2DModel

    return UNet2DModel(
        sample_size=shape[-1],
        in_channels=shape[0],
        out_channels=shape[0],
        block_out_channels=tuple(widths),
        layers_per_block=layers,
        down_block_types=_at("DownBlock2D", "AttnDownBlock2D", [1], len(widths)),
        up_block_types=_at("UpBlock2D", "AttnUpBlock2D", [1], len(widths))[::-1],
        attention_head_dim=None,
        downsample_padding=0,
        flip_sin_to_cos=False,
        freq_shift=1,
        norm_eps=1e-6,
    )


def ddpmpp(shape: tuple[int, int, int], widths: Sequence[int] = (128, 256, 256, 256), layers: int = 8) -> nn.Module:
    """DDPM++, deep: residual blocks of BigGAN that also change the resolution, sums divided by sqrt(2).

    Attention at the second level, on the way up once after all its blocks. 106.6 million parameters with 8 blocks per
    level, 61.8 with 4.

    Reference: Song et al. 2021 (arXiv 2011.13456), section 4.4 and appendix H.
    """
    from diffusers import UNet2DModel
    from diffusers.models.attention_processor import Attention
    from diffusers.models.resnet import ResnetBlock2D

    net = UNet2DModel(
        sample_size=shape[-1],
        in_channels=shape[0],
        out_channels=shape[0],
        block_out_channels=tuple(widths),
        layers_per_block=layers,
        down_block_types=_at("ResnetDownsampleBlock2D", "AttnDownBlock2D", [1], len(widths)),
        up_block_types=_at("ResnetUpsampleBlock2D", "AttnUpBlock2D", [1], len(widths))[::-1],
        downsample_type="resnet",
        upsample_type="resnet",
        attention_head_dim=None,
        flip_sin_to_cos=False,
        freq_shift=1,
        norm_eps=1e-6,
    )
    for module in net.modules():
        if isinstance(module, ResnetBlock2D):
            module.output_scale_factor = math.sqrt(2)
            if (module.up or module.down) and module.conv_shortcut is None:
                module.conv_shortcut = nn.Conv2d(module.in_channels, module.out_channels, 1)
        elif isinstance(module, Attention):
            module.rescale_output_factor = math.sqrt(2)
    for block in net.up_blocks:
        for i in range(len(getattr(block, "attentions", ())) - 1):
            block.attentions[i] = nn.Identity()
    return net


def adm(
    shape: tuple[int, int, int],
    widths: Sequence[int] = (256, 256, 512, 512, 1024, 1024),
    layers: int = 2,
    attended: Sequence[int] = (3, 4, 5),
    head: int = 64,
) -> nn.Module:
    """ADM, the network of guided diffusion, without classes: of 256×256 images 553 million parameters.

    It gives the noise and, in as many channels again, a variance that is not used here. Images of another size are
    resized to 256×256.

    Args:
        shape: of the images, whose channels it takes.
        widths: channels from the first level to the last; each halves the resolution.
        layers: residual blocks per level.
        attended: the levels with attention.
        head: channels of an attention head.

    Reference: Dhariwal and Nichol 2021 (arXiv 2105.05233), section 3.
    """
    from diffusers import UNet2DModel

    return UNet2DModel(
        sample_size=256,
        in_channels=shape[0],
        out_channels=2 * shape[0],
        block_out_channels=tuple(widths),
        layers_per_block=layers,
        down_block_types=_at("ResnetDownsampleBlock2D", "AttnDownBlock2D", attended, len(widths)),
        up_block_types=_at("ResnetUpsampleBlock2D", "AttnUpBlock2D", attended, len(widths))[::-1],
        downsample_type="resnet",
        upsample_type="resnet",
        resnet_time_scale_shift="scale_shift",
        attention_head_dim=head,
        attn_norm_num_groups=32,
        norm_eps=1e-5,
        flip_sin_to_cos=True,
        freq_shift=0,
    )


def stable_diffusion(shape: tuple[int, int, int]) -> nn.Module:
    """The autoencoder of Stable Diffusion, which takes 8×8 pixels for a site of 4 numbers; 83.7 million parameters.

    Reference: Rombach et al. 2022 (arXiv 2112.10752), appendix G.
    """
    from diffusers import AutoencoderKL

    widths = (128, 256, 512, 512)
    return AutoencoderKL(
        in_channels=shape[0],
        out_channels=shape[0],
        block_out_channels=widths,
        down_block_types=("DownEncoderBlock2D",) * len(widths),
        up_block_types=("UpDecoderBlock2D",) * len(widths),
        latent_channels=4,
        layers_per_block=2,
    )


def _at(plain: str, special: str, levels: Sequence[int], n: int) -> tuple[str, ...]:
    return tuple(special if i in levels else plain for i in range(n))


PUBLISHED: dict[str, Callable[[tuple[int, int, int]], nn.Module]] = {
    "ddpm": ddpm,
    "ddpmpp": ddpmpp,
    "adm": adm,
    "stable-diffusion": stable_diffusion,
}
"""By the size that a card names."""
