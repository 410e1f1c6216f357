"""From recorded predictions to accuracies, intervals and comparisons."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from scipy import stats as scipy_stats


class Interval(NamedTuple):
    """An estimate with its 95 % confidence interval, fractions."""

    mean: float
    low: float
    high: float


class Comparison(NamedTuple):
    """A paired difference A - B with its 95 % interval and the p-value of a sign-flip permutation test."""

    difference: float
    low: float
    high: float
    p: float


def mean_rule(correct: np.ndarray) -> np.ndarray:
    """Share of correct draws per image; ``correct`` is boolean, shape (n, M)."""
    return correct.mean(1)


def majority_rule(predicted: np.ndarray, label: np.ndarray) -> np.ndarray:
    """1 where the true class has strictly more votes than any other; a tie is wrong.

    Draws that weren't finite (-1) vote together for a class of their own.
    """
    classes = np.arange(-1, max(predicted.max(), label.max()) + 1)
    votes = (predicted[:, :, None] == classes).sum(1)
    own = (np.arange(len(label)), label + 1)
    mine = votes[own].copy()
    votes[own] = 0
    return (mine > votes.max(1)).astype(float)


def worst_rule(correct: np.ndarray) -> np.ndarray:
    """1 where every draw is correct."""
    return correct.all(1).astype(float)


def accuracy(shares: np.ndarray, draws: int, confidence: float = 0.95) -> Interval:
    """Mean accuracy over images whose correctness is a share of ``draws`` draws, with a Wilson interval.

    m = mean of p_i; n_eff = n · m' (1 - m') / var' clipped to [n, n · draws], where m' and var' are of the p_i with one
    image all right and one all wrong added (n_eff = n where all p_i are equal); Wilson's interval at (m, n_eff). Draws
    of one image aren't independent images: n_eff counts what they are worth. Without the two added images the interval
    covers 86 to 89 % where m is within 0.03 of 0 or 1 and n = 64; with them at least 92 %. It covers the choice of
    images and draws, not of training seeds.

    Raises:
        ValueError: without any image.
    """
    n = len(shares)
    if n == 0:
        raise ValueError("an accuracy needs at least one image, got none")
    m = float(np.mean(shares))
    steadied = np.concatenate((shares, (0.0, 1.0)))
    worth = steadied.mean() * (1 - steadied.mean()) / np.var(steadied, ddof=1)
    n_eff = float(np.clip(n * worth, n, n * draws)) if np.ptp(shares) else n
    z = float(scipy_stats.norm.ppf(0.5 + confidence / 2))
    centre = (m + z * z / (2 * n_eff)) / (1 + z * z / n_eff)
    half = z / (1 + z * z / n_eff) * np.sqrt(m * (1 - m) / n_eff + z * z / (4 * n_eff * n_eff))
    return Interval(m, max(0.0, min(centre - half, m)), min(1.0, max(centre + half, m)))


def compare(a: np.ndarray, b: np.ndarray, *, one_sided: bool = False, flips: int = 10_000, seed: int = 0) -> Comparison:
    """The paired difference of two defenses, attacks or views on the same images.

    d_i = p_A,i - p_B,i; the interval is mean ± 1.96 s' / sqrt(n), where s' is the standard deviation of the d_i with
    one image more that favours A by m and one that favours B by it, m the largest |d_i|, at least 1/2, and 1 where none
    differs. Where few images differ, as under a deterministic defense, a bootstrap covers 46 to 90 %, for it knows no
    image that it didn't see; with the two it is 91 % and more, and an interval may hold 0 where p is small. p is the
    share of random sign flips of d that give a mean at least as far from zero (the observed one counted in), one-sided
    at least as high, or a bound on the share of all flips if that is less (``_beyond``).

    Raises:
        ValueError: if the images aren't the same in number.
    """
    if a.shape != b.shape or not len(a):
        raise ValueError(f"a paired comparison needs the same images, got {len(a)} and {len(b)}")
    d = np.asarray(a, float) - np.asarray(b, float)
    most = max(float(np.abs(d).max()), 0.5) if d.any() else 1.0
    half = scipy_stats.norm.ppf(0.975) * np.std((*d, most, -most), ddof=1) / np.sqrt(len(d))
    mean, rng = float(d.mean()), np.random.default_rng(seed)
    flipped = _portions(flips, len(d), lambda size: (d * rng.choice((-1.0, 1.0), (size, len(d)))).mean(1))
    as_far = flipped >= mean - 1e-12 if one_sided else np.abs(flipped) >= abs(mean) - 1e-12
    p = (1 + int(as_far.sum())) / (1 + flips)
    p = min(p, float(_beyond(d[None], one_sided=one_sided)[0]))
    return Comparison(mean, max(-1.0, mean - half), min(1.0, mean + half), p)


def sign_flips(d: np.ndarray, *, flips: int = 10_000) -> np.ndarray:
    """One-sided p-values of many paired differences, shape (k, n) to (k,): that d is positive, by random signs.

    p = the share of sign flips of d that give a mean at least as high, the observed one counted in; all rows take the
    same signs. ``compare`` tells of one difference more.
    """
    flipped = d @ _signs(d.shape[1], flips)
    counted = (1 + (flipped >= d.sum(1, keepdims=True) - 1e-9).sum(1)) / (1 + flips)
    return np.minimum(counted, _beyond(d, one_sided=True))


def pairwise(scores: np.ndarray, *, flips: int = 10_000) -> np.ndarray:
    """Two-sided p-values for all pairs of k scores of the same images, (k, n) to (k, k), corrected for all pairs.

    T = |Σ d_i| / ‖d‖ of a pair; p is the share of random signs, one per image for all pairs, under which the largest T
    of any pair is as high. So it holds of a pair that was chosen for its scores, e.g. the best and another.

    Reference: Westfall and Young 1993, the single-step maximum.
    """
    k = len(scores)
    first, second = np.triu_indices(k, 1)
    highest = np.zeros(flips)
    d = scores[first] - scores[second]
    norm = np.linalg.norm(d, axis=1, keepdims=True)
    d = np.divide(d, norm, out=np.zeros_like(d), where=norm > 0)
    for portion in np.array_split(d, max(1, len(d) // 64)):
        if len(portion):
            highest = np.maximum(highest, np.abs(portion @ _signs(d.shape[1], flips)).max(0))
    t = np.abs(d.sum(1))
    counted = (1 + (highest >= t[:, None] - 1e-9).sum(1)) / (1 + flips)
    p = np.ones((k, k))
    p[first, second] = p[second, first] = np.minimum(counted, len(d) * _beyond(d))
    return p


def ranks(scores: np.ndarray) -> list[int]:
    """The place of each of k among them, by scores of the same images, shape (k, n): what ties shares a place.

    From the top: the highest mean leads a group of all that follow it, down to the first that ``pairwise`` tells from
    it at 5 %; that one leads the next group.
    """
    order, apart = np.argsort(-scores.mean(1), kind="stable"), pairwise(scores) < 0.05
    places, leader = [1] * len(scores), 0
    for at, k in enumerate(order):
        if apart[order[leader], k]:
            leader = at
        places[k] = leader + 1
    return places


def _beyond(d: np.ndarray, *, one_sided: bool = False) -> np.ndarray:
    """A bound on the share of all sign flips of each row that lie as far from zero: exp(-(Σ d)² / 2 Σ d²) a side.

    Random flips can't count what happens less often than once among them (Hoeffding 1963).
    """
    square = (d * d).sum(1)
    up = np.maximum(d.sum(1), 0) if one_sided else np.abs(d.sum(1))
    exponent = np.divide(up * up, 2 * square, out=np.zeros_like(square), where=square > 0)
    return np.minimum(1.0, (1 if one_sided else 2) * np.exp(-exponent))


@lru_cache(4)
def _signs(n: int, flips: int) -> np.ndarray:
    return np.random.default_rng(0).choice((-1.0, 1.0), (n, flips))


def detectable(
    a: np.ndarray, b: np.ndarray, *, tests: int = 1, one_sided: bool = False, power: float = 0.8
) -> float | None:
    """The true difference that a paired test at 5 % would notice in four of five cases.

    (z_{1-level} + z_power) sd(p_A - p_B) / sqrt(n), with level = 0.05 shared among the tests, and halved between two
    sides. A difference below it may exist unseen. None where all images differ alike: their spread can't be told.
    """
    d = np.asarray(a, float) - np.asarray(b, float)
    if len(d) < 2 or np.ptp(d) == 0:
        return None
    level = 0.05 / tests / (1 if one_sided else 2)
    z = scipy_stats.norm.ppf(1 - level) + scipy_stats.norm.ppf(power)
    return float(z * d.std(ddof=1) / np.sqrt(len(d)))


def holm(p: Sequence[float]) -> list[float]:
    """Holm's correction for m tests: the k-th smallest p-value times m - k + 1, never falling, at most 1."""
    adjusted, highest = [0.0] * len(p), 0.0
    for rank, i in enumerate(np.argsort(p, kind="stable")):
        highest = max(highest, min(1.0, p[i] * (len(p) - rank)))
        adjusted[i] = highest
    return adjusted


def _portions(total: int, width: int, draw: Callable[[int], np.ndarray]) -> np.ndarray:
    """``total`` of what ``draw`` gives, in portions so that memory stays small."""
    portion = max(1, 2_000_000 // width)
    sizes = [min(portion, total - first) for first in range(0, total, portion)]
    return np.concatenate([draw(size) for size in sizes])
