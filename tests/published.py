"""Small networks in the layouts of published checkpoints, written anew, to hold conversions against."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d, interpolate, silu


def waves(t: Tensor, width: int, *, last: int) -> tuple[Tensor, Tensor]:
    """The sine and the cosine of t at frequencies from 1 to 1/10000, the lowest reached at index ``last``."""
    frequencies = torch.exp(-math.log(10_000) * torch.arange(width // 2) / last)
    angles = t.float()[:, None] * frequencies
    return angles.sin(), angles.cos()


def resampled(x: Tensor, change: str) -> Tensor:
    return {"": lambda v: v, "down": lambda v: avg_pool2d(v, 2), "up": lambda v: interpolate(v, scale_factor=2.0)}[
        change
    ](x)


# --- score_sde: DDPM++


class NIN(nn.Module):
    """A layer that acts on channels alone, its matrix stored as (inputs, outputs)."""

    def __init__(self, channels: int):
        super().__init__()
        self.W = nn.Parameter(torch.randn(channels, channels) / channels**0.5)
        self.b = nn.Parameter(torch.randn(channels))

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("bchw,cd->bdhw", x, self.W) + self.b[:, None, None]


class SongBlock(nn.Module):
    """(s(x) + h(x, e)) / sqrt(2), at another resolution if ``change`` says so."""

    def __init__(self, a: int, b: int, embedded: int, change: str = ""):
        super().__init__()
        self.GroupNorm_0 = nn.GroupNorm(min(a // 4, 32), a, 1e-6)
        self.Conv_0 = nn.Conv2d(a, b, 3, padding=1)
        self.Dense_0 = nn.Linear(embedded, b)
        self.GroupNorm_1 = nn.GroupNorm(min(b // 4, 32), b, 1e-6)
        self.Conv_1 = nn.Conv2d(b, b, 3, padding=1)
        if a != b or change:
            self.Conv_2 = nn.Conv2d(a, b, 1)
        self.change = change

    def forward(self, x: Tensor, e: Tensor) -> Tensor:
        h = self.Conv_0(resampled(silu(self.GroupNorm_0(x)), self.change)) + self.Dense_0(silu(e))[..., None, None]
        h = self.Conv_1(silu(self.GroupNorm_1(h)))
        x = resampled(x, self.change)
        return ((self.Conv_2(x) if hasattr(self, "Conv_2") else x) + h) / 2**0.5


class SongAttention(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.GroupNorm_0 = nn.GroupNorm(min(channels // 4, 32), channels, 1e-6)
        self.NIN_0, self.NIN_1, self.NIN_2, self.NIN_3 = (NIN(channels) for _ in range(4))

    def forward(self, x: Tensor, e: Tensor) -> Tensor:
        h = self.GroupNorm_0(x)
        q, k, v = (layer(h).flatten(2) for layer in (self.NIN_0, self.NIN_1, self.NIN_2))
        weights = (torch.einsum("bci,bcj->bij", q, k) / x.shape[1] ** 0.5).softmax(-1)
        return (x + self.NIN_3(torch.einsum("bij,bcj->bci", weights, v).reshape(x.shape))) / 2**0.5


class Song(nn.Module):
    """DDPM++ with the modules in one list, by the order of their use; attention at the second level."""

    def __init__(self, widths: tuple[int, ...], layers: int):
        super().__init__()
        first, e = widths[0], 4 * widths[0]
        found: list[nn.Module] = [nn.Linear(first, e), nn.Linear(e, e), nn.Conv2d(3, first, 3, padding=1)]
        self.plan, kept, a = ["", "", "keep"], [first], first
        for level, b in enumerate(widths):
            for _ in range(layers):
                found += [SongBlock(a, b, e)] + [SongAttention(b)] * (level == 1)
                self.plan += ["", "keep"] if level == 1 else ["keep"]
                a = b
                kept.append(a)
            if level < len(widths) - 1:
                found.append(SongBlock(a, a, e, "down"))
                self.plan.append("keep")
                kept.append(a)
        found += [SongBlock(a, a, e), SongAttention(a), SongBlock(a, a, e)]
        self.plan += ["", "", ""]
        for level in reversed(range(len(widths))):
            for _ in range(layers + 1):
                found.append(SongBlock(a + kept.pop(), widths[level], e))
                self.plan.append("join")
                a = widths[level]
            if level == 1:
                found.append(SongAttention(a))
                self.plan.append("")
            if level:
                found.append(SongBlock(a, a, e, "up"))
                self.plan.append("")
        found += [nn.GroupNorm(32, a, 1e-6), nn.Conv2d(a, 3, 3, padding=1)]
        self.register_buffer("sigmas", torch.ones(3))
        self.all_modules = nn.ModuleList(found)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        m = list(self.all_modules)
        e = m[1](silu(m[0](torch.cat(waves(t, m[0].in_features, last=m[0].in_features // 2 - 1), 1))))
        h, kept = m[2](x), []
        kept.append(h)
        for module, what in zip(m[3:-2], self.plan[3:], strict=True):
            h = module(torch.cat((h, kept.pop()), 1) if what == "join" else h, e)
            if what == "keep":
                kept.append(h)
        return m[-1](silu(m[-2](h)))


def song_checkpoint(net: Song) -> dict:
    """As its training leaves it: the trained weights under names, their averages in a list."""
    trained = {f"module.{key}": torch.full_like(value, torch.nan) for key, value in net.state_dict().items()}
    averages = {"decay": 0.9999, "num_updates": 10, "shadow_params": [p.detach().clone() for p in net.parameters()]}
    return {"optimizer": {"state": {}, "param_groups": []}, "model": trained, "ema": averages, "step": 10}


# --- guided-diffusion: ADM


class AdmBlock(nn.Module):
    def __init__(self, a: int, b: int, embedded: int, change: str = ""):
        super().__init__()
        self.in_layers = nn.Sequential(nn.GroupNorm(32, a), nn.SiLU(), nn.Conv2d(a, b, 3, padding=1))
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(embedded, 2 * b))
        self.out_layers = nn.Sequential(nn.GroupNorm(32, b), nn.SiLU(), nn.Dropout(), nn.Conv2d(b, b, 3, padding=1))
        self.skip_connection = nn.Conv2d(a, b, 1) if a != b else nn.Identity()
        self.change = change

    def forward(self, x: Tensor, e: Tensor) -> Tensor:
        h = self.in_layers[2](resampled(self.in_layers[:2](x), self.change))
        scale, shift = self.emb_layers(e)[..., None, None].chunk(2, 1)
        h = self.out_layers[1:](self.out_layers[0](h) * (1 + scale) + shift)
        return self.skip_connection(resampled(x, self.change)) + h


class AdmAttention(nn.Module):
    def __init__(self, channels: int, head: int):
        super().__init__()
        self.norm = nn.GroupNorm(32, channels)
        self.qkv = nn.Conv1d(channels, 3 * channels, 1)
        self.proj_out = nn.Conv1d(channels, channels, 1)
        self.head = head

    def forward(self, x: Tensor, e: Tensor) -> Tensor:
        flat = x.flatten(2)
        heads = self.qkv(self.norm(flat)).unflatten(1, (-1, 3, self.head))  # by head, then kind, then channel
        q, k, v = heads.unbind(2)
        weights = (torch.einsum("bnci,bncj->bnij", q, k) / self.head**0.5).softmax(-1)
        h = torch.einsum("bnij,bncj->bnci", weights, v).flatten(1, 2)
        return (flat + self.proj_out(h)).reshape(x.shape)


class Steps(nn.Sequential):
    def forward(self, x: Tensor, e: Tensor) -> Tensor:  # type: ignore[override]
        for module in self:
            x = module(x) if isinstance(module, nn.Conv2d) else module(x, e)
        return x


class Adm(nn.Module):
    """ADM without classes: blocks change the resolution, and the time scales and shifts."""

    def __init__(self, widths: tuple[int, ...], layers: int, attended: tuple[int, ...], head: int):
        super().__init__()
        first, e = widths[0], 4 * widths[0]
        self.time_embed = nn.Sequential(nn.Linear(first, e), nn.SiLU(), nn.Linear(e, e))
        down: list[nn.Module] = [Steps(nn.Conv2d(3, first, 3, padding=1))]
        up: list[nn.Module] = []
        kept, a = [first], first

        def attention(level: int, channels: int) -> list[nn.Module]:
            return [AdmAttention(channels, head)] if level in attended else []

        for level, b in enumerate(widths):
            for _ in range(layers):
                down.append(Steps(AdmBlock(a, b, e), *attention(level, b)))
                a = b
                kept.append(a)
            if level < len(widths) - 1:
                down.append(Steps(AdmBlock(a, a, e, "down")))
                kept.append(a)
        self.input_blocks = nn.ModuleList(down)
        self.middle_block = Steps(AdmBlock(a, a, e), AdmAttention(a, head), AdmBlock(a, a, e))
        for level in reversed(range(len(widths))):
            for i in range(layers + 1):
                b = widths[level]
                last = [AdmBlock(b, b, e, "up")] if level and i == layers else []
                up.append(Steps(AdmBlock(a + kept.pop(), b, e), *attention(level, b), *last))
                a = b
        self.output_blocks = nn.ModuleList(up)
        self.out = nn.Sequential(nn.GroupNorm(32, a), nn.SiLU(), nn.Conv2d(a, 6, 3, padding=1))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        width = self.time_embed[0].in_features
        e = self.time_embed(torch.cat(waves(t, width, last=width // 2)[::-1], 1))
        kept: list[Tensor] = []
        for block in self.input_blocks:
            x = block(x, e)
            kept.append(x)
        x = self.middle_block(x, e)
        for block in self.output_blocks:
            x = block(torch.cat((x, kept.pop()), 1), e)
        return self.out(x)
