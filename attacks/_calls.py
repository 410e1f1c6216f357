"""Evaluations of a defense, in network calls of one fixed row count, however many searches ask for them."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from greenlet import getcurrent, greenlet
from torch import Tensor, nn

from attacks._precision import Precision
from attacks._views import View


class Request(NamedTuple):
    """What is wanted of a defense at some images.

    Attributes:
        defense: called with (images, noise, view), or (images, noise) without one; gives logits.
        view: how the purifier is run, or None for as it stands.
        x: images, shape (B, C, H, W).
        noise: keyed noise, a row per image; None for none.
        draws: draws per image.
        loss: (logits, *columns) → a loss per row, or None if logits are enough.
        columns: what the loss needs of each image: tensors of B rows.
        gradient: whether the loss is differentiated.
        alone: whether no other request may share its calls, because view and loss know them as their own.
    """

    defense: nn.Module
    view: View | None
    x: Tensor
    noise: Any
    draws: int
    loss: Callable[..., Tensor] | None = None
    columns: tuple[Tensor, ...] = ()
    gradient: bool = False
    alone: bool = False


class Answer(NamedTuple):
    """What a request gets, a row per draw, the draws of one image side by side.

    Attributes:
        logits: shape (B · draws, K).
        losses: shape (B · draws,); empty without a loss.
        gradients: shape (B · draws, C, H, W); empty unless asked for.
    """

    logits: Tensor
    losses: Tensor
    gradients: Tensor


class Count(NamedTuple):
    """How many calls there were, with how many rows, and how many of those were asked for."""

    calls: int = 0
    rows: int = 0
    real: int = 0

    def __sub__(self, other: Count) -> Count:
        return Count(*(a - b for a, b in zip(self, other, strict=True)))


class Calls:
    """Answers requests one at a time, in calls of exactly ``rows`` rows, the last padded with its own last row.

    One fixed shape makes a row's result independent of its neighbours, so that batching changes no byte.

    Args:
        rows: rows of every call.
        precision: of gradients; all else is float32.
    """

    def __init__(self, rows: int, precision: Precision | None = None):
        self.rows, self.precision = rows, precision or Precision()
        self.count = Count()

    def ask(self, request: Request) -> Answer:
        """Answer now."""
        open_ = _Open(request, None)
        while open_.left:
            self._call([(open_, min(open_.left, self.rows))])
        return open_.answer()

    def _call(self, pieces: list[tuple[_Open, int]]) -> None:
        """One network call for so many further rows of each of some requests of one kind."""
        real = sum(count for _, count in pieces)
        taken = [of.take(count) for of, count in pieces[:-1]]
        last, count = pieces[-1]
        taken.append(last.take(count, padding=self.rows - real))
        request = pieces[0][0].request
        inputs = torch.cat([t.x for t in taken])
        noise = taken[0].noise
        if noise is not None and len(taken) > 1:
            noise = noise.joined(*(t.noise for t in taken[1:]))
        precision = self.precision if request.gradient else Precision()
        with torch.set_grad_enabled(request.gradient), precision.context(inputs.device.type):
            inputs = inputs.detach().to(precision.dtype or inputs.dtype).requires_grad_(request.gradient)
            defense = precision.defense(request.defense)
            logits = defense(inputs, noise) if request.view is None else defense(inputs, noise, request.view)
            logits = logits.to(inputs.dtype)
            losses = [
                of.request.loss(piece, *t.columns) if of.request.loss else piece.new_empty(0)
                for (of, _), t, piece in zip(pieces, taken, logits.split([len(t.x) for t in taken]), strict=True)
            ]
            gradients = inputs.new_empty(0)
            if request.gradient:
                gradients = slopes_of(torch.cat(losses), inputs)
        first = 0
        for (of, count), t, loss in zip(pieces, taken, losses, strict=True):
            rows = slice(first, first + count)
            slopes = gradients[rows] if request.gradient else gradients
            of.receive(logits.detach()[rows], loss.detach()[:count], slopes)
            first += len(t.x)
        self.count = Count(self.count.calls + 1, self.count.rows + self.rows, self.count.real + real)


def slopes_of(losses: Tensor, inputs: Tensor) -> Tensor:
    """The gradient of the summed losses, a row's of its own loss alone; zero where the graph is cut."""
    if not losses.requires_grad:
        return torch.zeros_like(inputs)
    (gradients,) = torch.autograd.grad(losses.sum(), inputs, allow_unused=True, materialize_grads=True)
    return gradients


class Search(NamedTuple):
    """A piece of work that asks for evaluations, and how many images it is about."""

    work: Callable[[], Any]
    images: int


class Batcher(Calls):
    """Continuous batching: several searches at a time share calls, and when one ends the next begins.

    Each search runs as a coroutine (greenlet) and pauses where it asks. A call is made when the rows that are waiting
    fill it; when they don't, searches go on until they wait, and further ones begin; only when nothing else can go on
    is a call padded. Which searches share a call changes no number, for a row doesn't see its neighbours.

    Args:
        rows, precision: as for ``Calls``.
    """

    def __init__(self, rows: int, precision: Precision | None = None):
        super().__init__(rows, precision)
        self.lanes: dict[greenlet, int] = {}

    def ask(self, request: Request) -> Answer:
        lane = getcurrent()
        if lane not in self.lanes:
            return super().ask(request)
        mode = torch.is_grad_enabled()
        answer = lane.parent.switch(request)
        torch.set_grad_enabled(mode)
        return answer

    def run(self, searches: Iterator[Search], capacity: int) -> Iterator[Any]:
        """Do all, and yield what each gives as it ends.

        Args:
            searches: begun in order, one by one.
            capacity: how many images may be under way; one search may exceed it alone.
        """
        ahead = next(searches, None)
        ready: deque[tuple[greenlet, Any]] = deque()
        waiting: list[_Open] = []
        mode = torch.is_grad_enabled()
        try:
            while True:
                while ahead and (not self.lanes or sum(self.lanes.values()) + ahead.images <= capacity):
                    lane = greenlet(ahead.work)
                    self.lanes[lane] = ahead.images
                    ready.append((lane, ()))
                    ahead = next(searches, None)
                if ready:
                    lane, given = ready.popleft()
                    with torch.set_grad_enabled(mode):  # a search may pause inside of a no_grad
                        result = lane.switch(*given)
                    if lane.dead:
                        del self.lanes[lane]
                        yield result
                    else:
                        waiting.append(_Open(result, lane))
                elif waiting:
                    self._call(self._next(waiting))
                    ready += [(of.lane, (of.answer(),)) for of in waiting if not of.left]
                    waiting = [of for of in waiting if of.left]
                else:
                    return
        finally:
            left, self.lanes = self.lanes, {}
            for lane in left:
                if lane:  # under way: it leaves by its own finally clauses
                    lane.throw()

    def _next(self, waiting: list[_Open]) -> list[tuple[_Open, int]]:
        """The rows of the next call: of the kind that has waited longest among those that fill it, else of the fullest.

        First come, first served.
        """
        kinds: dict[tuple, list[_Open]] = {}
        for of in waiting:
            kinds.setdefault(of.kind, []).append(of)
        lengths = [sum(of.left for of in kind) for kind in kinds.values()]
        full = next((i for i, length in enumerate(lengths) if length >= self.rows), lengths.index(max(lengths)))
        pieces, free = [], self.rows
        for of in list(kinds.values())[full]:
            count = min(of.left, free)
            if count:
                pieces.append((of, count))
            free -= count
        return pieces


class _Taken(NamedTuple):
    """Rows on their way into a call."""

    x: Tensor
    columns: list[Tensor]
    noise: Any


class _Open:
    """A request that is being answered."""

    def __init__(self, request: Request, lane: greenlet | None):
        self.request, self.lane, self.done = request, lane, 0
        self.noise = None if request.noise is None else request.noise.draws(request.draws)
        self.parts: list[tuple[Tensor, ...]] = []
        alone = id(self) if request.alone else None
        self.kind = (id(request.defense), id(request.view), request.gradient, alone)

    @property
    def left(self) -> int:
        return len(self.request.x) * self.request.draws - self.done

    def take(self, count: int, padding: int = 0) -> _Taken:
        """The next ``count`` rows, and the last of them again ``padding`` times."""
        last = self.done + count - 1
        rows = torch.arange(self.done, last + 1 + padding, device=self.request.x.device).clamp_max(last)
        self.done += count
        image = rows // self.request.draws
        noise = None if self.noise is None else self.noise[rows]
        return _Taken(self.request.x[image], [c[image] for c in self.request.columns], noise)

    def receive(self, *parts: Tensor) -> None:
        self.parts.append(tuple(part.to(self.request.x.dtype) for part in parts))

    def answer(self) -> Answer:
        return Answer(*(torch.cat(part) for part in zip(*self.parts, strict=True)))
