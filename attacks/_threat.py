"""Threat models as objects: what a perturbation may be, and how to move within it."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from fractions import Fraction
from typing import Any, ClassVar

import torch
from torch import Tensor, nn


class ThreatModel(ABC):
    """A ball around x, intersected with images in [0, 1].

    An attack searches among *codes*, which ``render`` turns into images. A pixel ball's codes are the images
    themselves; another threat model may search among fields of displacements.

    Args:
        eps: the radius, exact.

    Raises:
        ValueError: if the radius is negative.
    """

    norm: ClassVar[str]
    unit: ClassVar[str]

    def __init__(self, eps: Fraction):
        if eps < 0:
            raise ValueError(f"eps must not be negative, got {eps}")
        self.eps = Fraction(eps)

    @property
    def bound(self) -> float:
        """The largest float64 that isn't above the exact radius."""
        bound = float(self.eps)
        return bound if Fraction(bound) <= self.eps else math.nextafter(bound, 0)

    def widest(self, shape: tuple[int, ...]) -> float:
        """No two codes of images of a shape (C, H, W) are further apart; within a larger radius all is allowed."""
        return 1.0

    def origin(self, x: Tensor) -> Tensor:
        """The code of x itself."""
        return x.clone()

    def render(self, code: Tensor, x: Tensor) -> Tensor:
        """The images that codes stand for, shape (B, C, H, W)."""
        return code

    def pullback(self, gradient: Tensor, code: Tensor, x: Tensor) -> Tensor:
        """The gradient of a loss with respect to the code, from its gradient with respect to the image."""
        return gradient

    @abstractmethod
    def distance(self, x_adv: Tensor, x: Tensor) -> Tensor:
        """The distance of a code per image in float64, shape (B,)."""

    @abstractmethod
    def project(self, x_adv: Tensor, x: Tensor) -> Tensor:
        """A code back into the ball and, if it is an image, into [0, 1], up to rounding."""

    @abstractmethod
    def step(self, gradient: Tensor, size: float | Tensor) -> Tensor:
        """The steepest ascent of length ``size``; a tensor of sizes is one per image, shape (B, 1, 1, 1)."""

    @abstractmethod
    def random(self, x: Tensor, noise: Any) -> Tensor:
        """The code of a random start in the ball."""

    @abstractmethod
    def extreme(self, x: Tensor, noise: Any) -> Tensor:
        """The code of a random perturbation of full radius, then clipped to [0, 1], which in L2 shortens it."""

    def control(self, x: Tensor, noise: Any) -> Tensor:
        """Images under ``extreme``, the control that an attack must beat."""
        return self.render(self.extreme(x, noise), x)

    @abstractmethod
    def _shrink(self, x_adv: Tensor, x: Tensor) -> Tensor:
        """Move the elements that rounding left outside towards x, by as little as the dtype can."""

    def enforce(self, x_adv: Tensor, x: Tensor) -> Tensor:
        """Project so that ``distance(x_adv, x) <= bound`` holds without a tolerance."""
        x_adv = self.project(x_adv, x)
        while (self.distance(x_adv, x) > self.bound).any():
            x_adv = self._shrink(x_adv, x)
        return x_adv


class Linf(ThreatModel):
    """max_i |x_adv_i - x_i| <= eps, in [0, 1] pixel units."""

    norm, unit = "Linf", "pixel range"

    def __init__(self, eps: Fraction):
        super().__init__(eps)
        if self.eps > 1:
            raise ValueError(f"eps {eps} is above 1, but Linf radii are in [0, 1] pixel units: write 8/255, not 8")

    def distance(self, x_adv: Tensor, x: Tensor) -> Tensor:
        return (x_adv.double() - x.double()).abs().flatten(1).amax(1)

    def project(self, x_adv: Tensor, x: Tensor) -> Tensor:
        return torch.minimum(torch.maximum(x_adv, x - self.bound), x + self.bound).clamp(0, 1)

    def step(self, gradient: Tensor, size: float | Tensor) -> Tensor:
        return size * gradient.sign()

    def random(self, x: Tensor, noise: Any) -> Tensor:
        return (x + self.bound * (2 * noise.uniform("start", like=x) - 1)).clamp(0, 1)

    def extreme(self, x: Tensor, noise: Any) -> Tensor:
        return self.enforce(x + self.bound * random_signs(noise, "control", like=x), x)

    def _shrink(self, x_adv: Tensor, x: Tensor) -> Tensor:
        outside = (x_adv.double() - x.double()).abs() > self.bound
        return torch.where(outside, _nearer(x_adv, x), x_adv)


class L2(ThreatModel):
    """‖x_adv - x‖_2 <= eps over all elements of an image, in [0, 1] pixel units."""

    norm, unit = "L2", "pixel range"

    def widest(self, shape: tuple[int, ...]) -> float:
        return math.sqrt(math.prod(shape))

    def distance(self, x_adv: Tensor, x: Tensor) -> Tensor:
        return (x_adv.double() - x.double()).flatten(1).norm(dim=1)

    def project(self, x_adv: Tensor, x: Tensor) -> Tensor:
        delta = x_adv - x
        # x lies in the box, so clamping moves every element towards x and stays in the ball
        return (x + _direction(delta) * _length(delta).clamp_max(self.bound)).clamp(0, 1)

    def step(self, gradient: Tensor, size: float | Tensor) -> Tensor:
        return size * _direction(gradient)

    def random(self, x: Tensor, noise: Any) -> Tensor:
        delta = self.step(noise.normal("start", like=x), 1.0)
        radius = noise.uniform("radius", like=x[:, :1, :1, :1]) ** (1 / x[0].numel())
        return self.project(x + self.bound * radius * delta, x)

    def extreme(self, x: Tensor, noise: Any) -> Tensor:
        return self.enforce(x + self.step(noise.normal("control", like=x), self.bound), x)

    def _shrink(self, x_adv: Tensor, x: Tensor) -> Tensor:
        outside = (self.distance(x_adv, x) > self.bound).view(-1, 1, 1, 1)
        return torch.where(outside, _nearer(x_adv, x), x_adv)


class Flow(ThreatModel):
    """Pixels move: x_adv(p) = x(p + f(p)), bilinearly, where max_p |f(p)| <= eps in either direction.

    The code is the flow f, shape (B, 2, H, W), horizontal first, in units of half an image's side: 0.05 is 0.7 pixels
    of 28. Beyond the border the image goes on with its last pixel.

    Reference: Xiao et al. 2018 (arXiv 1801.02612); as a ball of radius 0.05: Nie et al. 2022 (arXiv 2205.07460).
    """

    norm, unit = "StAdv", "half an image's side"

    def __init__(self, eps: Fraction):
        super().__init__(eps)
        if self.eps > 1:
            raise ValueError(f"eps {eps} is above 1, but flows are in units of half an image's side: write 0.05")

    def origin(self, x: Tensor) -> Tensor:
        return x.new_zeros(len(x), 2, *x.shape[-2:])

    def render(self, code: Tensor, x: Tensor) -> Tensor:
        identity = torch.eye(2, 3, dtype=x.dtype, device=x.device).expand(len(x), 2, 3)
        grid = nn.functional.affine_grid(identity, list(x.shape), align_corners=False) + code.movedim(1, -1)
        moved = nn.functional.grid_sample(x, grid, mode="bilinear", padding_mode="border", align_corners=False)
        return moved.clamp(0, 1)

    def pullback(self, gradient: Tensor, code: Tensor, x: Tensor) -> Tensor:
        with torch.enable_grad():
            code = code.detach().requires_grad_()
            (gradient,) = torch.autograd.grad(self.render(code, x), code, gradient)
        return gradient

    def distance(self, x_adv: Tensor, x: Tensor) -> Tensor:
        return x_adv.double().abs().flatten(1).amax(1)

    def project(self, x_adv: Tensor, x: Tensor) -> Tensor:
        return x_adv.clamp(-self.bound, self.bound)

    def step(self, gradient: Tensor, size: float | Tensor) -> Tensor:
        return size * gradient.sign()

    def random(self, x: Tensor, noise: Any) -> Tensor:
        return self.bound * (2 * noise.uniform("start", like=self.origin(x)) - 1)

    def extreme(self, x: Tensor, noise: Any) -> Tensor:
        return self.enforce(self.bound * random_signs(noise, "control", like=self.origin(x)), x)

    def _shrink(self, x_adv: Tensor, x: Tensor) -> Tensor:
        return torch.where(x_adv.double().abs() > self.bound, _nearer(x_adv, torch.zeros_like(x_adv)), x_adv)


def random_signs(noise: Any, *site: str | int, like: Tensor) -> Tensor:
    """Random signs of the shape, dtype and device of ``like``."""
    return torch.where(noise.uniform(*site, like=like) < 0.5, -1.0, 1.0).to(like)


def _length(delta: Tensor) -> Tensor:
    return delta.square().flatten(1).sum(1).sqrt().view(-1, 1, 1, 1)


def _direction(delta: Tensor) -> Tensor:
    """delta / ‖delta‖_2 in the reference's arithmetic: where a loss stands still, last bits choose the best point."""
    return delta / (_length(delta) + 1e-12)


def _nearer(x_adv: Tensor, x: Tensor) -> Tensor:
    """One ulp towards x, of the larger of the two: beside a tiny x_adv its own ulp would be no step at all."""
    ulp = torch.finfo(x.dtype).eps * torch.maximum(x_adv.abs(), x.abs())
    return torch.where((x - x_adv).abs() <= ulp, x, x_adv + ulp * (x - x_adv).sign())


NORMS: dict[str, type[ThreatModel]] = {"Linf": Linf, "L2": L2, "StAdv": Flow}
