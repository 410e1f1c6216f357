"""The contract of every purifier, and the defense it makes with a classifier."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple, TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor, nn

from purifiers._noise import Fresh, Noise, Sealed

Images: TypeAlias = Float[Tensor, "B C H W"]
Logits: TypeAlias = Float[Tensor, "B K"]
State: TypeAlias = Any
Context: TypeAlias = Any
Apply: TypeAlias = Callable[..., Any]
Purify: TypeAlias = Callable[[nn.Module, Tensor, "Noise | None"], Tensor]


class Batch(NamedTuple):
    """Training images in [0, 1] and their labels; the share of the training that is done."""

    x: Tensor
    y: Tensor
    progress: float = 1.0


class SDE(NamedTuple):
    """dz = drift(z, t) dτ + diffusion(t) dW as t falls: what a purifier's steps integrate by Euler-Maruyama.

    Step k leads from times[k] to times[k + 1], and dW = sqrt(times[k] - times[k + 1]) · noise.normal("reverse", k).

    Attributes:
        drift: (z, t) → the drift, of the shape of the state z.
        diffusion: t → the diffusion coefficient.
        times: steps + 1 times, strictly decreasing.
    """

    drift: Callable[[Tensor, float], Tensor]
    diffusion: Callable[[float], float | Tensor]
    times: list[float]


def plain(stage: Callable[..., Any], *inputs: Any) -> Any:
    """Run a stage of a purification as it stands; an attacker may pass a way that recomputes it instead."""
    return stage(*inputs)


def call(purifier: nn.Module, x: Tensor, noise: Noise | None) -> Tensor:
    """Purify as the purifier itself does; a foreign module takes images alone."""
    return purifier(x, noise) if isinstance(purifier, Purifier) else purifier(x)


class Purifier(nn.Module):
    """g: images → images, as a fold of small stages that an attacker can differentiate one by one.

    ``g = finish ∘ step_{steps-1} ∘ … ∘ step_0 ∘ start``, repeated ``rounds`` times. Positional parameters of a
    subclass are its networks (its *parts*), keyword-only parameters its options, with the paper's values as defaults.

    Args:
        rounds: how often the whole purification is repeated, each time with noise of its own.

    Raises:
        ValueError: if ``rounds`` is below 1.
    """

    stochastic: bool = True
    """Whether two draws on the same input differ. Declared here, verified by a contract test."""
    surrogates: ClassVar[tuple[str, ...]] = ()
    """Gradients besides the exact one that an attacker may choose, the strongest known first, e.g. ("soft", "ste")."""
    through: str = "exact"
    """Which gradient the stages have: the exact one, or, in a stand-in for an attacker, one of ``surrogates``."""
    differentiable: bool = True
    """Whether the exact gradient says anything. A purifier that rounds is constant between its jumps: an attacker takes
    one of its surrogates, or the identity."""
    encodes: bool = False
    """Whether ``start`` encodes: its state is a code, and an attack may aim at the encoder alone."""
    dial: ClassVar[str | None] = None
    """The option that sets the strength, for comparisons at matched clean accuracy."""
    as_trained: ClassVar[tuple[str, ...]] = ()
    """Options that say how the networks were trained: with those of a card no other value makes sense."""
    unset_at_zero: ClassVar[tuple[str, ...]] = ()
    """Options that are a quantity but at 0, where the purifier chooses, or takes all there is: no point of a curve."""
    given: ClassVar[tuple[str, ...]] = ()
    """Parts that ``objectives`` leaves alone: another purifier's, or set by ``settle``."""
    steps: int = 0
    """How many times ``step`` is called in a round; 0 for one-shot purifiers."""

    def __init__(self, *, rounds: int = 1):
        super().__init__()
        if rounds < 1:
            raise ValueError(f"rounds must be at least 1, got {rounds}")
        self.rounds = rounds

    def start(self, x: Images, noise: Noise) -> tuple[State, Context]:
        """Enter: the first state, and the differentiable tensors kept over all steps."""
        raise TypeError(f"{type(self).__name__} defines no start")

    def step(self, k: int, state: State, context: Context, noise: Noise) -> State:
        """Advance from state k to state k + 1, for k = 0 … steps-1."""
        raise TypeError(f"{type(self).__name__} has steps = {self.steps} but defines no step")

    def finish(self, state: State, context: Context) -> Images:
        """Leave: images in [0, 1]."""
        raise TypeError(f"{type(self).__name__} defines no finish")

    def forward(self, x: Images, noise: Noise | None = None, apply: Apply = plain) -> Images:
        """Purify.

        Args:
            x: images in [0, 1], shape (B, C, H, W).
            noise: a tape with one row per image; without it every call draws fresh from torch's generator.
            apply: how a stage is run; the gradient views pass one that recomputes instead of storing.
        """
        noise = Sealed(Fresh() if noise is None else noise)
        for r in range(self.rounds):
            tape = noise.fold("round", r)
            state, context = apply(self.start, x, tape)
            for k in range(self.steps):
                state = apply(self.step, k, state, context, tape)
            x = apply(self.finish, state, context)
        return x

    def diffused(self, k: int, x: Images, noise: Noise) -> State | None:
        """The state that stands for x itself after k steps, under the same noise; None if there is no such path."""
        return None

    def codes(self, state: State) -> Tensor | None:
        """The discrete codes of a state that ``start`` gave, integers of shape (B, …); None without a codebook.

        ``start`` then gives latents before they are quantised, so that an attack on the encoder has a gradient.
        """
        return None

    def sample(self, like: Images, noise: Noise) -> Images | None:
        """Images that the purifier's own model draws from its prior; None without a model of images.

        Args:
            like: lends its shape (B, C, H, W), type and device, and nothing else.
            noise: a tape with one row per image.
        """
        return None

    def sde(self) -> SDE | None:
        """The stochastic differential equation that the steps integrate; None if they do something else."""
        return None

    def surrogate(self, name: str) -> Purifier:
        """This purifier with ``through`` set: its backward pass may stand in for the exact one.

        Raises:
            ValueError: for a name that isn't in ``surrogates``.
        """
        if name not in self.surrogates:
            raise ValueError(f"{type(self).__name__} has no surrogate {name!r}; it offers {self.surrogates or 'none'}")
        twin = copy.copy(self)
        twin.through = name
        return twin

    @property
    def nfe(self) -> int:
        """Network evaluations per image for one purification."""
        return self.rounds * max(self.steps, 1)

    def objectives(self, batch: Batch, noise: Noise) -> dict[str, Tensor]:
        """The scalar losses to train with, keyed by the part that each moves: one optimiser per key.

        Several parts that share a loss are joined by "+". Empty if there is nothing to train.
        A subclass may add keyword-only weights of its terms; a training recipe sets them.
        """
        return {}

    @classmethod
    def parts(cls, shape: tuple[int, int, int], size: str = "tiny") -> dict[str, nn.Module]:
        """Fresh networks for images of ``shape`` (C, H, W), keyed by the constructor's positional parameters."""
        return {}

    @classmethod
    def critics(cls, shape: tuple[int, int, int], size: str = "tiny") -> dict[str, nn.Module]:
        """Fresh networks that only training needs, keyed by the argument of ``objectives`` that takes them.

        A recipe names those it wants. Each has a loss of its own under its key, listed after those of the parts.
        """
        return {}

    def settle(self, x: Images) -> None:
        """Set what has a closed form, or a library's fit, from many training images; called before training."""


class Defense(nn.Module):
    """f∘g: purify, then classify; the thing that is attacked. Parameters are frozen and modes set to eval.

    Args:
        purifier: g; any module images → images. One that isn't a ``Purifier`` may draw from torch's global
            generator, which evaluations seed: its runs are marked ``noise: global``.
        classifier: f; any module images in [0, 1] → logits.
        copies: purified copies per image whose outputs are combined; part of the defense, not of the verdict.
        combine: what is averaged over the copies: "logits", "probabilities" (their log is returned), or "vote"
            (log of the share of votes plus 1/(2 copies) of the mean probability, less than a vote: a tie goes by it,
            and it alone has a gradient). If any copy's logits aren't finite, the whole row counts as wrong.

    Raises:
        ValueError: if ``copies`` is below 1 or ``combine`` is none of the three.
    """

    COMBINE = ("logits", "probabilities", "vote")

    def __init__(self, purifier: nn.Module, classifier: nn.Module, *, copies: int = 1, combine: str = "logits"):
        super().__init__()
        if copies < 1:
            raise ValueError(f"copies must be at least 1, got {copies}")
        if combine not in self.COMBINE:
            raise ValueError(f"combine must be one of {', '.join(self.COMBINE)}, got {combine!r}")
        self.purifier, self.classifier, self.copies, self.combine = purifier, classifier, copies, combine
        self.requires_grad_(False).eval()

    @property
    def stochastic(self) -> bool:
        return bool(getattr(self.purifier, "stochastic", False) or getattr(self.classifier, "stochastic", False))

    @property
    def nfe(self) -> int:
        """Network evaluations of the purifier per image and draw."""
        return self.copies * int(getattr(self.purifier, "nfe", 1))

    def forward(self, x: Images, noise: Noise | None = None, purify: Purify = call) -> Logits:
        """Logits of the purified images.

        Args:
            x: images in [0, 1], shape (B, C, H, W).
            noise: a tape with one row per image; without it every call draws fresh.
            purify: how the purifier is called; an attacker's view passes one with another gradient.
        """
        if self.copies == 1:
            return self.classifier(purify(self.purifier, x, noise))
        noise = None if noise is None else noise.fold("copies", self.copies).draws(self.copies)
        logits = self.classifier(purify(self.purifier, x.repeat_interleave(self.copies, 0), noise))
        logits = logits.unflatten(0, (-1, self.copies))
        if self.combine == "logits":
            return logits.mean(1)
        finite = logits.isfinite().all(-1).all(1, keepdim=True)
        if self.combine == "probabilities":
            shares = logits.log_softmax(-1).logsumexp(1) - torch.tensor(float(self.copies), dtype=x.dtype).log()
            return shares.where(finite, torch.nan)
        votes = nn.functional.one_hot(logits.argmax(-1), logits.shape[-1]).to(x.dtype).mean(1)
        votes = votes + logits.softmax(-1).mean(1) / (2 * self.copies)  # less than a vote: a tie goes by it
        return votes.clamp_min(torch.finfo(x.dtype).tiny).log().where(finite, torch.nan)

    def bind(self, noise: Noise) -> Bound:
        """The defense with its noise decided: a module x → logits, for tools that know nothing of tapes."""
        return Bound(self, noise)


class Bound(nn.Module):
    """A defense under one tape."""

    def __init__(self, defense: Defense, noise: Noise):
        super().__init__()
        self.defense, self.noise = defense, noise

    def forward(self, x: Images) -> Logits:
        return self.defense(x, self.noise)
