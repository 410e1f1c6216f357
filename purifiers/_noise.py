"""Noise as an explicit, keyed tape: the value of a draw depends on what it is for, never on when it is asked for.

A purifier never touches a global generator. It asks the tape it is handed for the noise of a named *site*, and the tape
answers with a counter-based generator: the same (seed, role, site, example id, draw, element) gives the same number in
any batch, in any order, on resumption and when a step is recomputed for its gradient.
"""

from __future__ import annotations

import copy
import hashlib
import math
from typing import NoReturn, Protocol, TypeAlias, runtime_checkable

import torch
from torch import Tensor

Site: TypeAlias = "str | int"

_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_MASK = 0xFFFFFFFF


def philox4x32(
    counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[int | Tensor, int | Tensor], rounds: int = 10
) -> list[Tensor]:
    """Encrypt a 128-bit counter with a 64-bit key: four 32-bit words, uniform and independent for distinct counters.

    One round maps (c0, c1, c2, c3) to (hi(M1 c2) ^ c1 ^ k0, lo(M1 c2), hi(M0 c0) ^ c3 ^ k1, lo(M0 c0)); the key moves
    by the Weyl constants in between. int64 holds the words: the product wraps modulo 2^64, which keeps both halves.
    A low half is cut out where it is used: until then what stands above it is carried along.

    Args:
        counter: four int64 tensors of one broadcastable shape, values in [0, 2^32).
        key: two integers in [0, 2^32), or int64 tensors of them that broadcast with the counter.

    Reference: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011 (Philox4x32-10).
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(rounds):
        p0, p1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1 = ((p1 >> 32) ^ c1).bitwise_xor_(k0).bitwise_and_(_MASK), p1
        c2, c3 = ((p0 >> 32) ^ c3).bitwise_xor_(k1).bitwise_and_(_MASK), p0
        k0, k1 = (k0 + _WEYL[0]) & _MASK, (k1 + _WEYL[1]) & _MASK
    return [c0, c1 & _MASK, c2, c3 & _MASK]


@runtime_checkable
class Noise(Protocol):
    """What a purifier may ask of its source of randomness."""

    def normal(self, *site: Site, like: Tensor) -> Tensor:
        """Standard normal noise of the shape, dtype and device of ``like``."""

    def uniform(self, *site: Site, like: Tensor) -> Tensor:
        """Noise uniform on [0, 1) of the shape, dtype and device of ``like``."""

    def fold(self, *site: Site) -> Noise:
        """The child source that stands for a part of the work, e.g. one round."""

    def draws(self, count: int) -> Noise:
        """Every row repeated ``count`` times in a row, each repetition an independent draw."""


class Tape:
    """Keyed noise for rows that each carry one example id and one draw number.

    Args:
        seed: the run's seed.
        role: what the numbers are for (attack, select, clean, verdict, random, null): roles are independent.
        ids: example ids, shape (B,), integers in [0, 2^63).
        draw: draw numbers, shape (B,); zeros if left out.
        path: sites folded in so far.
    """

    def __init__(self, seed: int, role: str, ids: Tensor, draw: Tensor | None = None, path: tuple[Site, ...] = ()):
        self.seed, self.role, self.path = seed, role, path
        self.ids = ids.to(torch.int64)
        self.draw = torch.zeros_like(self.ids) if draw is None else draw.to(torch.int64)
        if self.ids.ndim != 1 or self.draw.shape != self.ids.shape:
            raise ValueError(f"a tape needs one id and one draw per row, got {tuple(ids.shape)}")

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, rows: Tensor | slice) -> Tape:
        """The tape of a subset of the rows."""
        return Tape(self.seed, self.role, self.ids[rows], self.draw[rows], self.path)

    def fold(self, *site: Site) -> Tape:
        return Tape(self.seed, self.role, self.ids, self.draw, (*self.path, *site))

    def draws(self, count: int) -> Tape:
        number = torch.arange(count, device=self.ids.device).repeat(len(self))
        draw = self.draw.repeat_interleave(count) * count + number
        return Tape(self.seed, self.role, self.ids.repeat_interleave(count), draw, self.path)

    def to(self, device: torch.device | str) -> Tape:
        """The tape with its ids and draws on a device, so that no draw has to fetch them."""
        return Tape(self.seed, self.role, self.ids.to(device), self.draw.to(device), self.path)

    def joined(self, *others: Tape) -> Tape:
        """This tape's rows with those of others below, whatever their roles and sites: each keeps its own noise."""
        tapes = [self, *others]
        if all((t.seed, t.role, t.path) == (self.seed, self.role, self.path) for t in others):
            ids, draw = torch.cat([t.ids for t in tapes]), torch.cat([t.draw for t in tapes])
            return Tape(self.seed, self.role, ids, draw, self.path)
        return Joined(tapes)

    def normal(self, *site: Site, like: Tensor) -> Tensor:
        # Box-Muller on 24-bit uniforms in (0, 1], in float32 whatever the caller's precision: one draw for all
        words = self._words(("normal", *site), like)
        u = (words >> 8).add_(1).to(torch.float32).mul_(2.0**-24)
        radius = u[..., 0::2].log().mul_(-2).sqrt_()
        angle = 2 * math.pi * u[..., 1::2]
        return self._rows(torch.stack((radius * angle.cos(), radius * angle.sin()), -1), like)

    def uniform(self, *site: Site, like: Tensor) -> Tensor:
        words = self._words(("uniform", *site), like)
        below = 1 - torch.finfo(like.dtype).eps / 2  # the largest number below 1: half precision rounds up to 1
        return self._rows((words >> 8).to(torch.float32) * 2.0**-24, like).clamp_max(below)

    def _words(self, site: tuple[Site, ...], like: Tensor) -> Tensor:
        """Random words of shape (B, blocks, 4) for at least as many elements as a row of ``like`` has."""
        if len(like) != len(self):
            raise ValueError(
                f"the tape has {len(self)} rows, the tensor {len(like)}: hand over a tape of the same rows"
            )
        ids, draw = self.ids.to(like.device)[:, None], self.draw.to(like.device)[:, None]
        block = torch.arange(math.ceil(like[0].numel() / 4), device=like.device)[None]
        return torch.stack(philox4x32((block, draw, ids & _MASK, ids >> 32), self._key(site, like.device)), -1)

    def _key(self, site: tuple[Site, ...], device: torch.device) -> tuple[int | Tensor, int | Tensor]:
        return _digest((self.seed, self.role, *self.path, *site))

    def _rows(self, values: Tensor, like: Tensor) -> Tensor:
        return values.reshape(len(like), -1)[:, : like[0].numel()].reshape(like.shape).to(like.dtype)


class Joined(Tape):
    """Rows of several tapes in one, each row with the key of the tape that it is from.

    Args:
        tapes: of any seeds, roles and sites.
    """

    def __init__(self, tapes: list[Tape]):
        super().__init__(
            tapes[0].seed, tapes[0].role, torch.cat([t.ids for t in tapes]), torch.cat([t.draw for t in tapes])
        )
        self.heads = [(t.seed, t.role, *t.path) for t in tapes]
        lengths = torch.tensor([len(t) for t in tapes], device=self.ids.device)
        self.of = torch.arange(len(tapes), device=self.ids.device).repeat_interleave(lengths)

    def __getitem__(self, rows: Tensor | slice) -> Joined:
        return self._with(ids=self.ids[rows], draw=self.draw[rows], of=self.of[rows])

    def fold(self, *site: Site) -> Joined:
        return self._with(path=(*self.path, *site))

    def draws(self, count: int) -> Joined:
        repeated = super().draws(count)
        return self._with(ids=repeated.ids, draw=repeated.draw, of=self.of.repeat_interleave(count))

    def to(self, device: torch.device | str) -> Joined:
        return self._with(ids=self.ids.to(device), draw=self.draw.to(device), of=self.of.to(device))

    def joined(self, *others: Tape) -> Tape:
        raise TypeError("rows are joined once, by the tapes that they are from")

    def _with(self, **changed: object) -> Joined:
        twin = copy.copy(self)
        twin.__dict__.update(changed)
        return twin

    def _key(self, site: tuple[Site, ...], device: torch.device) -> tuple[Tensor, Tensor]:
        keys = torch.tensor([_digest((*head, *self.path, *site)) for head in self.heads])
        k0, k1 = keys.to(device, non_blocking=True)[self.of.to(device)].unbind(1)
        return k0[:, None], k1[:, None]


def _digest(name: tuple) -> tuple[int, int]:
    """The key of what noise is for."""
    digest = hashlib.blake2b(repr(name).encode(), digest_size=8).digest()
    return int.from_bytes(digest[:4], "little"), int.from_bytes(digest[4:], "little")


class Sealed:
    """What a purifier is handed of a tape: the methods of ``Noise`` and nothing else.

    Who asks (an attack, the verdict) and for which image it can't read, so that it says the same to all of them.

    Args:
        noise: the source; another one's seal isn't sealed again.
    """

    def __init__(self, noise: Noise):
        self.__noise: Noise = noise.__noise if isinstance(noise, Sealed) else noise

    def normal(self, *site: Site, like: Tensor) -> Tensor:
        return self.__noise.normal(*site, like=like)

    def uniform(self, *site: Site, like: Tensor) -> Tensor:
        return self.__noise.uniform(*site, like=like)

    def fold(self, *site: Site) -> Sealed:
        return Sealed(self.__noise.fold(*site))

    def draws(self, count: int) -> Sealed:
        return Sealed(self.__noise.draws(count))

    def __getattr__(self, name: str) -> NoReturn:
        raise AttributeError(
            f"a purifier's noise has no {name!r}: it offers normal, uniform, fold and draws; who asks, and for which "
            "image, it doesn't tell"
        )


class Fresh:
    """Noise from torch's own generator: what ``purifier(x)`` uses when nobody hands it a tape."""

    def normal(self, *site: Site, like: Tensor) -> Tensor:
        return torch.randn_like(like)

    def uniform(self, *site: Site, like: Tensor) -> Tensor:
        return torch.rand_like(like)

    def fold(self, *site: Site) -> Fresh:
        return self

    def draws(self, count: int) -> Fresh:
        return self
