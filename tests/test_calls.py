"""Calls of one row count, whoever asks: searches that share them learn what they would have learnt alone."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from attacks import Batcher, Calls, Victim
from attacks._calls import Count, Request, Search
from attacks._gradient import ce, margin
from attacks._views import Exact
from attacks.encoder import Encoder
from purifiers import Defense, Tape
from tests.conftest import CASES, classifier, images, smooth

every_purifier = pytest.mark.parametrize("case", CASES)
VIEW = Exact(1)
SIZES = (3, 14, 1)


def tape(of: range, role: str = "attack") -> Tape:
    return Tape(0, role, torch.tensor(list(of)))


def searches(defense: Defense, calls: Calls) -> list[Search]:
    """Searches of several sizes, which ask different things of different draws, each what follows from the last."""
    found, first = [], 0
    for number, size in enumerate(SIZES):
        rows = range(first, first + size)

        def work(number=number, rows=rows):
            x, y = images(40)[list(rows)], torch.tensor(list(rows)) % 10
            victim = Victim(defense, VIEW, tape(rows), calls, stochastic=True)
            seen = []
            for k in range(2 + number):
                loss = ce if k % 2 else margin
                found = victim.evaluate(x, y, loss, "it", k, eot=1 + number, gradient=bool((k + number) % 2))
                seen += list(found)
                if found.gradient.numel():
                    x = (x + 0.02 * found.gradient.sign()).clamp(0, 1)
            return number, [*seen, victim.logits(x, "end", eot=2)], (victim.forwards, victim.backwards)

        found.append(Search(work, size))
        first += size
    return found


@every_purifier
def test_searches_that_share_calls_learn_what_they_learn_alone(case, make):
    defense = Defense(smooth(make(case)), classifier())
    alone = Calls(32)
    expected = {number: rest for number, *rest in (search.work() for search in searches(defense, alone))}
    batcher = Batcher(32)
    found = list(batcher.run(iter(searches(defense, batcher)), capacity=17))
    assert sorted(number for number, *_ in found) == [0, 1, 2]
    for number, seen, cost in found:
        assert cost == expected[number][1]
        for got, want in zip(seen, expected[number][0], strict=True):
            assert got.dtype == want.dtype and torch.allclose(got, want, rtol=0, atol=1e-11)
    assert batcher.count.real == alone.count.real and batcher.count.calls < alone.count.calls


class Counting(torch.nn.Module):
    """A linear model that notes how many rows it is called with."""

    def __init__(self):
        super().__init__()
        self.rows: list[int] = []

    def forward(self, x, noise=None, view=None):
        self.rows.append(len(x))
        return x.flatten(1)[:, :10]


def test_calls_have_one_size_and_rows_keep_their_order():
    model = Counting()
    for n, draws in ((3, 1), (7, 5), (70, 1)):
        answer = Calls(32).ask(Request(model, None, images(n), tape(range(n)), draws))
        assert torch.equal(answer.logits, images(n).flatten(1)[:, :10].repeat_interleave(draws, 0))
        assert answer.losses.numel() == answer.gradients.numel() == 0
    assert model.rows == [32] * (1 + 2 + 3)


def test_the_batch_stays_full_until_nothing_is_left():
    """Ten searches of three images, five draws each: 15 rows at a time fill no call, together they do."""
    model, batcher = Counting(), Batcher(32)

    def work(k: int) -> int:
        victim = Victim(model, VIEW, tape(range(3)), batcher, stochastic=True)
        for step in range(4):
            victim.evaluate(images(3), torch.arange(3), ce, step, eot=5)
        return k

    found = list(batcher.run((Search(partial(work, k), 3) for k in range(10)), capacity=12))
    assert sorted(found) == list(range(10)) and found[:4] == [0, 1, 2, 3], "who came first is served first"
    assert batcher.count == Count(calls=len(model.rows), rows=32 * len(model.rows), real=10 * 4 * 15)
    assert set(model.rows) == {32}
    assert batcher.count.real / batcher.count.rows > 0.9


def test_no_more_images_are_under_way_than_were_allowed():
    batcher, most, now = Batcher(32), 0, 0

    def work():
        nonlocal most, now
        now += 3
        most = max(most, now)
        Victim(Counting(), VIEW, tape(range(3)), batcher, stochastic=True).logits(images(3), eot=1)
        now -= 3

    assert len(list(batcher.run((Search(work, 3) for _ in range(7)), capacity=6))) == 7
    assert most == 6
    assert len(list(batcher.run(iter([Search(work, 3)]), capacity=1))) == 1, "one search may exceed the capacity alone"


def test_a_search_that_fails_ends_all_and_nothing_is_left_waiting():
    batcher, ended = Batcher(32), []

    def work(k: int) -> None:
        try:
            victim = Victim(Counting(), VIEW, tape(range(3)), batcher, stochastic=True)
            for step in range(5):
                victim.logits(images(3), step, eot=1)
                if k == 1 and step == 2:
                    raise ZeroDivisionError
        finally:
            ended.append(k)

    with pytest.raises(ZeroDivisionError):
        list(batcher.run((Search(partial(work, k), 3) for k in range(3)), capacity=9))
    assert sorted(ended) == [0, 1, 2] and not batcher.lanes
    assert batcher.ask(Request(Counting(), None, images(3), tape(range(3)), 1)).logits.shape == (3, 10)


def test_a_search_may_cut_gradients_without_cutting_those_of_its_neighbours():
    batcher, modes = Batcher(32), []

    def cutting():
        with torch.no_grad():
            victim = Victim(Counting(), VIEW, tape(range(3)), batcher, stochastic=True)
            for step in range(3):
                found = victim.evaluate(images(3), torch.arange(3), ce, step, eot=1)
                modes.append(("cut", torch.is_grad_enabled(), bool(found.gradient.any())))

    def whole():
        victim = Victim(Counting(), VIEW, tape(range(3)), batcher, stochastic=True)
        for step in range(3):
            found = victim.evaluate(images(3), torch.arange(3), ce, step, eot=1)
            modes.append(("whole", torch.is_grad_enabled(), bool(found.gradient.any())))

    list(batcher.run(iter([Search(cutting, 3), Search(whole, 3)]), capacity=9))
    assert sorted(modes) == [("cut", False, True)] * 3 + [("whole", True, True)] * 3


def test_a_search_with_a_view_of_its_own_shares_no_call(make):
    """The encoder attack looks inside: what it sees of a call must be its own rows."""
    from attacks import NORMS

    defense = Defense(make(("vae", {})), classifier())
    threat = NORMS["Linf"](0.1)

    def work(calls: Calls, rows: range):
        x, y = images(40)[list(rows)], torch.tensor(list(rows)) % 10
        victim = Victim(defense, VIEW, tape(rows), calls, stochastic=True)
        return rows, Encoder(steps=3, eot=2).perturb(x, y, victim, threat).candidates

    groups = (range(0, 5), range(5, 16), range(16, 17))
    batcher = Batcher(32)
    for rows, candidates in batcher.run((Search(partial(work, batcher, g), len(g)) for g in groups), capacity=40):
        assert torch.allclose(candidates, work(Calls(32), rows)[1], rtol=0, atol=1e-12)


# --- tapes below one another


def test_joined_tapes_are_each_what_they_were():
    like = torch.zeros(9, 1, 5, 3)
    tapes = [
        Tape(0, "attack", torch.arange(4)).fold("pgd", 3),
        Tape(0, "attack", torch.arange(2, 5)).fold("pgd", 4),
        Tape(1, "select", torch.tensor([2, 7])).draws(1),
    ]
    joined = tapes[0].joined(*tapes[1:])
    assert len(joined) == 9
    pieces = like.split([4, 3, 2])

    def apart(change, kind="normal"):
        return torch.cat([getattr(change(t), kind)("site", 1, like=p) for t, p in zip(tapes, pieces, strict=True)])

    assert torch.equal(joined.normal("site", 1, like=like), apart(lambda t: t))
    assert torch.equal(joined.uniform("site", 1, like=like), apart(lambda t: t, "uniform"))
    assert torch.equal(joined.fold("round", 0).normal("site", 1, like=like), apart(lambda t: t.fold("round", 0)))
    assert torch.equal(joined.to("cpu").normal("site", 1, like=like), apart(lambda t: t))
    order = torch.tensor([8, 0, 5, 5])
    assert torch.equal(joined[order].normal("site", 1, like=like[order]), joined.normal("site", 1, like=like)[order])
    twice = joined.fold("copies", 2).draws(2)
    expected = torch.cat(
        [
            t.fold("copies", 2).draws(2).normal("site", 1, like=p.repeat_interleave(2, 0))
            for t, p in zip(tapes, pieces, strict=True)
        ]
    )
    assert torch.equal(twice.normal("site", 1, like=like.repeat_interleave(2, 0)), expected)


def test_tapes_of_one_site_join_to_a_plain_tape():
    one, other = (Tape(0, "attack", torch.arange(k, k + 3)).fold("pgd", 1) for k in (0, 3))
    assert type(one.joined(other)) is Tape
    like = torch.zeros(6, 4)
    assert torch.equal(
        one.joined(other).normal(0, like=like), Tape(0, "attack", torch.arange(6)).fold("pgd", 1).normal(0, like=like)
    )


# --- the loop and the device


class NoHost(torch.utils._python_dispatch.TorchDispatchMode):
    """Refuses what makes a host wait for its device: a value or a shape that depends on numbers."""

    WAITS = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "is_nonzero", "equal", "item")

    def __torch_dispatch__(self, function, types, arguments=(), named=None):
        name = function.overloadpacket.__name__
        assert name not in self.WAITS, f"{name} waits for the device"
        return function(*arguments, **(named or {}))


@pytest.mark.parametrize("case", [case for case in CASES if case[0] != "file"])
def test_nothing_in_the_loop_waits_for_the_device(case, make):
    defense = Defense(smooth(make(case)), classifier())
    noise = tape(range(3))
    with NoHost():
        for keep in (0, None):
            x = images(3).requires_grad_()
            loss = ce(defense(x, noise, Exact(keep)), torch.arange(3)).sum()
            torch.autograd.grad(loss, x)


def test_the_guard_sees_a_wait():
    with pytest.raises(AssertionError, match="waits for the device"), NoHost():
        float(images(1).sum())


def test_attention_is_fused(monkeypatch):
    """A U-Net with attention asks torch's own kernel, which is the fused one where there is one."""
    from diffusers import UNet2DModel

    asked, kernel = [], torch.nn.functional.scaled_dot_product_attention

    def watched(*arguments, **named):
        asked.append(arguments[0].shape)
        return kernel(*arguments, **named)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", watched)
    net = UNet2DModel(
        sample_size=8, in_channels=1, out_channels=1, block_out_channels=(8,), layers_per_block=1, norm_num_groups=4,
        down_block_types=("AttnDownBlock2D",), up_block_types=("AttnUpBlock2D",),
    )  # fmt: skip
    net(torch.zeros(2, 1, 8, 8), 3)
    assert asked
