"""The tape: a published generator, and values that depend on what a draw is for and on nothing else."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from purifiers import Fresh, Noise, Tape
from purifiers._noise import Sealed, philox4x32

KINDS = ("normal", "uniform")

# Random123's kat_vectors, "philox4x32 10": counter, key, result.
KNOWN_ANSWERS = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]


def words(text: str) -> list[int]:
    return [int(word, 16) for word in text.split()]


def draw(kind: str, tape: Tape, *site, shape=(3, 2, 2), dtype=torch.float32) -> torch.Tensor:
    return getattr(tape, kind)(*site, like=torch.empty(len(tape), *shape, dtype=dtype))


def tape(ids=(5, 7, 11), seed=3, role="clean", **more) -> Tape:
    return Tape(seed, role, torch.tensor(ids), **more)


@pytest.mark.parametrize("counter, key, expected", KNOWN_ANSWERS)
def test_philox_known_answers(counter, key, expected):
    got = philox4x32(tuple(torch.tensor([w]) for w in words(counter)), tuple(words(key)))
    assert [int(w) for w in got] == words(expected)


@given(st.lists(st.integers(0, 2**32 - 1), min_size=6, max_size=6))
def test_philox_agrees_with_unbounded_integers(numbers):
    """int64 tensors that wrap give what Python's integers give."""
    c, (k0, k1) = list(numbers[:4]), numbers[4:]
    for _ in range(10):
        p0, p1 = c[0] * 0xD2511F53, c[2] * 0xCD9E8D57
        c = [(p1 >> 32) ^ c[1] ^ k0, p1 % 2**32, (p0 >> 32) ^ c[3] ^ k1, p0 % 2**32]
        k0, k1 = (k0 + 0x9E3779B9) % 2**32, (k1 + 0xBB67AE85) % 2**32
    got = philox4x32(tuple(torch.tensor([w]) for w in numbers[:4]), (numbers[4], numbers[5]))
    assert [int(w) for w in got] == c


@pytest.mark.parametrize("kind", KINDS)
@given(order=st.permutations(range(6)), size=st.integers(1, 6))
def test_a_row_is_the_same_in_any_batch_and_order(kind, order, size):
    whole = tape(range(100, 106))
    rows = torch.tensor(order[:size])
    expected = draw(kind, whole, "site")[rows]
    assert torch.equal(draw(kind, whole[rows], "site"), expected)
    assert torch.equal(draw(kind, tape([100 + i for i in order[:size]]), "site"), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_values_do_not_depend_on_what_was_drawn_before(kind):
    a, b = tape(), tape()
    draw(kind, a, "first")
    assert torch.equal(draw(kind, a, "second"), draw(kind, b, "second"))
    assert torch.equal(draw(kind, a, "second"), draw(kind, b, "second"))


@pytest.mark.parametrize("kind", KINDS)
def test_an_element_is_the_same_in_any_shape(kind):
    long = draw(kind, tape(), "site", shape=(37,))
    assert torch.equal(draw(kind, tape(), "site", shape=(1, 3, 4)).flatten(1), long[:, :12])
    assert torch.equal(draw(kind, tape(), "site", shape=(5,)), long[:, :5])


@pytest.mark.parametrize("kind", KINDS)
def test_everything_in_the_key_matters(kind):
    one = tape([5])
    tapes = [
        one,
        tape([5], seed=4),
        tape([5], role="verdict"),
        tape([6]),
        tape([5 + 2**32]),
        tape([5], draw=torch.tensor([1])),
        one.fold("round"),
        one.fold("round", 0),
        one.fold("round", 1),
    ]
    values = [draw(kind, t, "a") for t in tapes] + [draw(kind, one, *site) for site in (("b",), ("a", 0), ("a", "0"))]
    for first, second in itertools.combinations(values, 2):
        assert (first != second).float().mean() > 0.9


def test_normal_and_uniform_of_one_site_are_unrelated():
    t = tape(range(4000))
    normal, uniform = draw("normal", t, "a", shape=(8,)), draw("uniform", t, "a", shape=(8,))
    assert abs(stats.spearmanr(normal.flatten(), uniform.flatten()).statistic) < 4 / 32_000**0.5


def test_folding_is_joining_paths():
    assert torch.equal(draw("normal", tape().fold("a").fold(1), "b"), draw("normal", tape().fold("a", 1), "b"))


@pytest.mark.parametrize("first, second", [(1, 4), (2, 3), (5, 2)])
def test_nested_draws_are_distinct_and_those_of_one_call(first, second):
    nested, flat = tape().draws(first).draws(second), tape().draws(first * second)
    assert len(nested) == 3 * first * second
    values = draw("normal", nested, "site")
    assert torch.equal(values, draw("normal", flat, "site"))
    assert len(values.flatten(1).unique(dim=0)) == len(nested)


def test_the_first_draw_is_the_row_itself_and_repetitions_are_adjacent():
    repeated = draw("normal", tape().draws(4), "site").unflatten(0, (3, 4))
    assert torch.equal(repeated[:, 0], draw("normal", tape(), "site"))
    assert tape().draws(2).ids.tolist() == [5, 5, 7, 7, 11, 11]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_every_precision_sees_the_cast_of_one_float32_draw(kind, dtype):
    assert torch.equal(draw(kind, tape(), "site", dtype=dtype), draw(kind, tape(), "site").to(dtype))


def test_distributions():
    t = tape(range(2000))
    normal, uniform = draw("normal", t, "s", shape=(50,)).double(), draw("uniform", t, "s", shape=(50,)).double()
    assert stats.kstest(normal.flatten(), "norm").pvalue > 1e-3
    assert stats.kstest(uniform.flatten(), "uniform").pvalue > 1e-3
    n = normal.numel()
    for power, moment, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        assert abs(float((normal**power).mean()) - moment) < 4 * (variance / n) ** 0.5
    assert normal.isfinite().all() and 0 <= uniform.min() and uniform.max() < 1


@pytest.mark.parametrize("kind", KINDS)
def test_neighbours_are_uncorrelated(kind):
    """Rows, draws, elements and steps that follow one another share nothing."""
    t = tape(range(500)).draws(4)
    steps = torch.stack([draw(kind, t, "reverse", k, shape=(24,)) for k in range(3)]).double()
    steps = (steps - steps.mean()) / steps.std()
    cube = steps.view(3, 500, 4, 24)
    for axis in range(4):
        a, b = cube.narrow(axis, 0, cube.shape[axis] - 1), cube.narrow(axis, 1, cube.shape[axis] - 1)
        assert abs(float((a * b).mean())) < 4 / a.numel() ** 0.5


def test_rows_must_match():
    with pytest.raises(ValueError, match="3 rows, the tensor 4"):
        tape().normal("site", like=torch.empty(4, 2))
    with pytest.raises(ValueError, match="one id and one draw per row"):
        Tape(0, "clean", torch.arange(3), torch.arange(2))


def test_the_tape_leaves_the_global_generator_alone_and_ignores_it():
    before = torch.get_rng_state()
    values = draw("normal", tape(), "site")
    assert torch.equal(torch.get_rng_state(), before)
    with torch.random.fork_rng():
        torch.manual_seed(999)
        assert torch.equal(draw("normal", tape(), "site"), values)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64], ids=str)
def test_uniform_noise_is_below_one_in_every_precision(dtype):
    """An index floor(n u) would else lie outside, one draw in some hundreds."""
    u = Tape(0, "attack", torch.arange(4)).uniform("site", like=torch.empty(4, 4096, dtype=dtype))
    assert u.min() >= 0 and u.max() < 1 and u.max() > 0.99


def test_fresh_noise_follows_the_global_generator():
    like = torch.empty(4, 3)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        a, b = Fresh().normal("a", like=like), Fresh().fold("x").draws(2).normal("a", like=like)
        torch.manual_seed(0)
        assert torch.equal(a, Fresh().normal("other", like=like)) and not torch.equal(a, b)
    assert isinstance(Fresh(), Noise) and isinstance(tape(), Noise)


def test_a_purifier_learns_neither_who_asks_nor_for_which_image():
    """Else it could answer the verdict otherwise than the attack."""
    sealed, like = Sealed(Sealed(tape())), torch.empty(len(tape()), 3)
    assert isinstance(sealed, Noise)
    assert torch.equal(
        sealed.fold("round", 0).draws(1).normal("a", like=like), tape().fold("round", 0).draws(1).normal("a", like=like)
    )
    for name in ("role", "ids", "seed", "draw"):
        assert hasattr(tape(), name)
        for source in (sealed, sealed.fold("round", 0), sealed.draws(1)):
            with pytest.raises(AttributeError, match=f"has no '{name}': it offers normal, uniform"):
                getattr(source, name)
