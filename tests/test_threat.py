"""Threat models: every projection, step and draw obeys ball and box, without a tolerance where it is enforced."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy import stats

from attacks import L2, NORMS, Linf
from attacks._threat import Flow
from purifiers import Tape
from tests.conftest import SHAPE, images

RADII = {
    "Linf": ["8/255", "16/255", "4/255", "1/10", "1/3", "0", "1"],
    "L2": ["1/2", "3/2", "1/10", "128/255", "3", "0"],
}
BALLS = [*RADII]
CASES = [(norm, eps) for norm in BALLS for eps in RADII[norm]]
AWKWARD = [0.0, 1.0, 1e-9, 1e-30, 16 / 255, 8 / 255, 0.1, 0.5, 1 - 16 / 255, 0.9999999]

every_ball = pytest.mark.parametrize("norm, eps", CASES, ids=lambda v: str(v).replace("/", ":"))
every_norm = pytest.mark.parametrize("norm", BALLS)
pixels = st.one_of(st.sampled_from(AWKWARD).map(lambda v: float(np.float32(v))), st.floats(0, 1, width=32))
anything = st.one_of(pixels, st.floats(-2, 3, width=32))


def batch(elements):
    return hnp.arrays(np.float32, (2, 1, 3, 3), elements=elements).map(torch.from_numpy)


def inside_box(x: torch.Tensor) -> bool:
    return bool((x >= 0).all() and (x <= 1).all())


def tape(n: int) -> Tape:
    return Tape(0, "random", torch.arange(n))


def test_every_norm_has_radii_here():
    assert {*RADII, "StAdv"} == set(NORMS)


@pytest.mark.parametrize("base", [Linf, L2])
@pytest.mark.parametrize("tiny", [1e-9, 1e-12, 1e-30, 0.0])
def test_enforcement_takes_few_moves_beside_tiny_pixels(base, tiny):
    """An ulp of a pixel near 0 is no step at all: counted in those, enforcement once took minutes."""

    class Counted(base):
        moves = 0

        def _shrink(self, x_adv, x):
            self.moves += 1
            assert self.moves <= 20
            return super()._shrink(x_adv, x)

    for eps in ("16/255", "8/255", "1/10"):
        threat = Counted(Fraction(eps))
        x = torch.full((2, 1, 4, 4), float(Fraction(eps)), dtype=torch.float32)
        x += torch.linspace(-8, 8, 16).view(4, 4) * 2**-28
        enforced = threat.enforce(torch.full_like(x, tiny), x)
        assert (threat.distance(enforced, x) <= threat.bound).all()


@every_ball
@given(x=batch(pixels), x_adv=batch(anything))
@settings(max_examples=30)
def test_projection_laws(norm, eps, x, x_adv):
    threat = NORMS[norm](Fraction(eps))
    projected = threat.project(x_adv, x)
    assert inside_box(projected)
    assert (threat.distance(projected, x) <= threat.bound + 1e-6).all()
    assert torch.allclose(threat.project(projected, x), projected, rtol=0, atol=1e-6)
    assert torch.allclose(threat.project(x, x), x, rtol=0, atol=0)


@every_ball
@given(x=batch(pixels), x_adv=batch(anything))
@settings(max_examples=30)
def test_enforcement_needs_no_tolerance(norm, eps, x, x_adv):
    threat = NORMS[norm](Fraction(eps))
    enforced = threat.enforce(x_adv, x)
    assert enforced.dtype == torch.float32 and inside_box(enforced)
    assert (threat.distance(enforced, x) <= threat.bound).all()
    assert torch.allclose(enforced, threat.project(x_adv, x), rtol=0, atol=1e-6)
    again = threat.enforce(enforced, x)
    assert (threat.distance(again, x) <= threat.bound).all()
    assert torch.allclose(again, enforced, rtol=0, atol=1e-6)


@every_ball
def test_enforcement_on_whole_images_at_full_radius(norm, eps):
    """Every pixel pushed out of the ball, black, white and binary images: all back inside, and no radius given away."""
    threat, x = NORMS[norm](Fraction(eps)), images(16, (1, 28, 28), torch.float32)
    x[0], x[1], x[2] = 0, 1, x[2].round()
    far = x + 2 * (tape(16).uniform("far", like=x) - 0.5).sign()
    enforced = threat.enforce(far, x)
    assert (threat.distance(enforced, x) <= threat.bound).all() and inside_box(enforced)
    farthest = threat.distance(threat.project(far, x), x)
    assert torch.allclose(threat.distance(enforced, x), farthest, rtol=0, atol=1e-6)


def test_a_plain_float32_clamp_leaves_the_exact_ball():
    """The fault that enforcement mends is real."""
    threat, x = Linf(Fraction(8, 255)), images(16, (1, 28, 28), torch.float32)
    assert (threat.distance(threat.project(x + 1, x), x) > threat.bound).any()


@every_ball
def test_the_bound_is_the_largest_float_within_the_exact_radius(norm, eps):
    threat = NORMS[norm](Fraction(eps))
    assert Fraction(threat.bound) <= Fraction(eps) < Fraction(math.nextafter(threat.bound, 9))


@every_ball
@given(x=batch(pixels), inner=batch(pixels), share=st.floats(0, 0.999))
@settings(max_examples=30)
def test_points_inside_stay(norm, eps, x, inner, share):
    threat = NORMS[norm](Fraction(eps))
    distance = threat.distance(inner, x).clamp_min(1e-30).view(-1, 1, 1, 1)
    scale = (share * threat.bound / distance).clamp_max(share)
    inner = (x + scale * (inner - x)).float()
    assert torch.allclose(threat.project(inner, x), inner, rtol=0, atol=1e-6)


def test_linf_projection_is_the_nearest_point():
    x, x_adv = images(4), 3 * images(4, SHAPE) - 1
    eps = Fraction(1, 10)
    expected = torch.tensor(np.clip(x_adv.numpy(), np.maximum(x.numpy() - 0.1, 0), np.minimum(x.numpy() + 0.1, 1)))
    assert torch.allclose(Linf(eps).project(x_adv, x), expected, rtol=0, atol=1e-15)


def test_l2_projection_is_radial():
    x = torch.full((3, *SHAPE), 0.5, dtype=torch.float64)
    delta = images(3) - 0.5
    projected = L2(Fraction(1, 2)).project(x + delta, x) - x
    expected = 0.5 * delta / delta.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
    assert torch.allclose(projected, expected, rtol=0, atol=1e-12)


@every_norm
@pytest.mark.parametrize("size", [0.25, torch.tensor([0.1, 0.2, 0.4], dtype=torch.float64).view(-1, 1, 1, 1)], ids=str)
def test_a_step_has_the_requested_length_and_is_the_steepest(norm, size):
    threat = NORMS[norm](Fraction(1, 2))
    gradient = images(3) - 0.5
    step = threat.step(gradient, size)
    zero = torch.zeros_like(step)
    lengths = torch.as_tensor(size, dtype=torch.float64).flatten().expand(3)
    assert torch.allclose(threat.distance(step, zero), lengths, rtol=1e-12)
    dual = {"Linf": gradient.abs().flatten(1).sum(1), "L2": gradient.flatten(1).norm(dim=1)}[norm]
    assert torch.allclose((gradient * step).flatten(1).sum(1), lengths * dual, rtol=1e-12)


@every_norm
def test_a_zero_gradient_gives_no_step_and_no_nan(norm):
    zero = torch.zeros(2, *SHAPE)
    assert torch.equal(NORMS[norm](Fraction(1, 2)).step(zero, 0.1), zero)


@every_norm
def test_distance_is_per_image_and_in_float64(norm):
    x = torch.zeros(3, 1, 2, 2)
    x_adv = torch.tensor([0.0, 0.25, 1.0]).view(3, 1, 1, 1).expand_as(x)
    distance = NORMS[norm](Fraction(1)).distance(x_adv, x)
    assert distance.dtype == torch.float64
    assert distance.tolist() == [0.0, *((0.25, 1.0) if norm == "Linf" else (0.5, 2.0))]


@every_ball
def test_random_starts_and_controls_lie_in_the_threat_model(norm, eps):
    threat, x = NORMS[norm](Fraction(eps)), images(64, (1, 28, 28), torch.float32)
    x[:8] = x[:8].round()
    start, control = threat.random(x, tape(64)), threat.control(x, tape(64))
    assert inside_box(start) and (threat.distance(start, x) <= threat.bound + 1e-6).all()
    assert inside_box(control) and (threat.distance(control, x) <= threat.bound).all()
    if threat.bound:
        assert not torch.equal(start[1:], start[:-1]) and not torch.equal(control[1:], control[:-1])


@pytest.mark.parametrize("norm, eps", [("Linf", "16/255"), ("Linf", "1/10"), ("L2", "1/2"), ("L2", "3/2")])
def test_a_control_has_the_full_radius(norm, eps):
    threat, x = NORMS[norm](Fraction(eps)), torch.full((32, 1, 28, 28), 0.5)
    delta = threat.control(x, tape(32)) - x
    assert torch.allclose(threat.distance(delta, 0 * delta), torch.tensor(threat.bound).double(), rtol=0, atol=1e-5)
    assert abs(float(delta.mean())) < 4 * float(delta.std()) / delta.numel() ** 0.5
    if norm == "Linf":
        assert torch.allclose(delta.abs(), torch.tensor(threat.bound).float(), rtol=0, atol=1e-6)


@pytest.mark.parametrize("norm", ["Linf", "L2"])
def test_random_starts_are_uniform_in_the_ball(norm):
    threat = NORMS[norm](Fraction(1, 10))
    x = torch.full((4000, 1, 2, 2), 0.5, dtype=torch.float64)
    radius = threat.distance(threat.random(x, tape(4000)), x) / threat.bound
    assert stats.kstest(radius**4, "uniform").pvalue > 1e-3


def test_radii_that_make_no_sense():
    with pytest.raises(ValueError, match="write 8/255, not 8"):
        Linf(Fraction(8))
    with pytest.raises(ValueError, match="write 0.05"):
        Flow(Fraction(8))
    assert L2(Fraction(3)).bound == 3.0
    for threat in NORMS.values():
        with pytest.raises(ValueError, match="negative"):
            threat(Fraction(-1, 255))


# Flows


def flow_of(code: torch.Tensor, x: torch.Tensor, eps: str = "1") -> torch.Tensor:
    return Flow(Fraction(eps)).render(code, x)


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 6, 10)])
def test_a_flow_of_whole_pixels_moves_pixels(shape):
    """Half a side is the unit: 2 / W to the right takes each pixel's value from its right neighbour."""
    x = images(3, shape)
    still = Flow(Fraction(1)).origin(x)
    assert torch.allclose(flow_of(still, x), x, rtol=0, atol=1e-12)
    right, down = still.clone(), still.clone()
    right[:, 0], down[:, 1] = 2 / shape[2], 2 / shape[1]
    assert torch.allclose(flow_of(right, x)[..., :-1], x[..., 1:], rtol=0, atol=1e-12)
    assert torch.allclose(
        flow_of(right, x)[..., -1], x[..., -1], rtol=0, atol=1e-12
    )  # beyond the border, its last pixel
    assert torch.allclose(flow_of(down, x)[..., :-1, :], x[..., 1:, :], rtol=0, atol=1e-12)
    half = still.clone()
    half[:, 0] = 1 / shape[2]
    assert torch.allclose(flow_of(half, x)[..., :-1], (x[..., 1:] + x[..., :-1]) / 2, rtol=0, atol=1e-12)


@pytest.mark.parametrize("eps", ["1/20", "1/10", "0", "1"])
@given(code=hnp.arrays(np.float32, (2, 2, 3, 3), elements=st.floats(-3, 3, width=32)).map(torch.from_numpy),
       x=batch(pixels))  # fmt: skip
@settings(max_examples=30)
def test_an_enforced_flow_needs_no_tolerance_and_gives_an_image(eps, code, x):
    threat = Flow(Fraction(eps))
    enforced = threat.enforce(code, x)
    assert (threat.distance(enforced, x) <= threat.bound).all()
    assert torch.allclose(enforced, code.clamp(-threat.bound, threat.bound), rtol=0, atol=1e-6)
    image = threat.render(enforced, x)
    assert image.shape == x.shape and inside_box(image)
    assert image.min() >= x.min() - 1e-6 and image.max() <= x.max() + 1e-6  # bilinear: no new extremes


def test_the_gradient_of_a_flow_is_that_of_the_loss_of_its_image():
    x, threat = images(2, (1, 6, 6)), Flow(Fraction(1, 2))
    code = 0.3 * (tape(2).uniform("code", like=threat.origin(x)) - 0.5)
    w = images(2, (1, 6, 6)) - 0.5
    gradient = threat.pullback(w, code, x)
    direction, h = tape(2).normal("d", like=code), 1e-6
    ends = [(w * threat.render(code + s * h * direction, x)).sum() for s in (1, -1)]
    assert float((gradient * direction).sum()) == pytest.approx(float(ends[0] - ends[1]) / (2 * h), rel=1e-5)


def test_random_flows_lie_in_the_ball_and_controls_at_its_rim():
    threat, x = Flow(Fraction(1, 20)), images(64, (1, 28, 28), torch.float32)
    start, extreme = threat.random(x, tape(64)), threat.extreme(x, tape(64))
    assert (threat.distance(start, x) <= threat.bound + 1e-6).all() and start.std() > 0.02
    assert (threat.distance(extreme, x) <= threat.bound).all()
    assert torch.allclose(extreme.abs(), torch.tensor(0.05), rtol=0, atol=1e-6)
    assert inside_box(threat.control(x, tape(64))) and not torch.equal(threat.control(x, tape(64)), x)
