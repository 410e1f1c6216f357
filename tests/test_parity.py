"""Our attacks and samplers against published ones: the same start, the same path, the same verdict on every image.

With ``--parity FILE`` what was measured is written as a page; ``make parity`` renews results/parity.md.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler

from attacks import NORMS, VIEWS, Attack, Calls, Found, ThreatModel, Victim
from attacks._autopgd import AutoPGD as APGD
from attacks.pgd import PGD
from benchmark import checkpoints, data, registry
from purifiers import Tape
from purifiers.diffpure import DiffPure
from tests.conftest import images, undefended
from tests.test_sampler import VP_1000, FromGenerator, Wavy, chain, diffusers_scheduler

N, N_REAL, STEPS = 40, 12, 100
TOLERANCE = 1e-8
LOOSER = {("torchattacks APGD", "L2"): 1e-6}
"""torchattacks adds 1e-12 to a length in its second projection of a step, where the paper's code and ours don't: the
paths part by that much and 100 iterations make more of it. Without those 1e-12 the iterates agree to 1e-10."""
EPS = {"Linf": Fraction(4, 255), "L2": Fraction(1, 10)}
"""Radii at which 30 to 70 % of the images survive on the small network …"""
EPS_REAL = {"Linf": Fraction(3, 4) / 255, "L2": Fraction(1, 10)}
"""… and on cifar10-resnet18, which is trained plainly."""
PAGE = Path(__file__).resolve().parents[1] / "results" / "parity.md"


class Witness(torch.nn.Module):
    """A network that remembers every batch it was shown."""

    def __init__(self, net: torch.nn.Module):
        super().__init__()
        self.net, self.seen = net, []

    def forward(self, x):
        self.seen.append(x.detach().clone())
        return self.net(x)


class Once(torch.nn.Module):
    """The same function as a deterministic network, which isn't run again where it was asked before, bit for bit.

    Two paths that agree ask the same questions: this halves what the real network costs, and changes no answer.
    """

    def __init__(self, net: torch.nn.Module):
        super().__init__()
        self.net, self.known = net, {}

    def forward(self, x):
        return _Answer.apply(x, self)


class _Answer(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, once):
        ctx.once, ctx.x = once, x.detach()
        key = _digest(ctx.x)
        if key not in once.known:
            ctx.graph = _run(once.net, ctx.x)
            once.known[key] = ctx.graph[1].detach()
        return once.known[key].clone()

    @staticmethod
    def backward(ctx, cotangent):
        known, key = ctx.once.known, _digest(ctx.x, cotangent)
        if key not in known:
            leaf, logits = getattr(ctx, "graph", None) or _run(ctx.once.net, ctx.x)
            known[key] = torch.autograd.grad(logits, leaf, cotangent)[0].contiguous()
        return known[key].clone(), None


def _run(net: torch.nn.Module, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    with torch.enable_grad():
        leaf = x.clone().requires_grad_()
        return leaf, net(leaf)


def _digest(*tensors: torch.Tensor) -> bytes:
    return hashlib.sha256(b"".join(tensor.contiguous().numpy().tobytes() for tensor in tensors)).digest()


class Theirs(NamedTuple):
    """What a package's attack leaves: images that it didn't show to the network itself, and its verdict per image."""

    last: list[torch.Tensor]
    correct: torch.Tensor


def torchattacks_pgd(net, x, y, threat: ThreatModel, *, random_start: bool) -> Theirs:
    package = pytest.importorskip("torchattacks")
    # it divides the gradient of the batch's mean by its norm + 1e-10: to be ours, that is 1e-12 / B
    kind = {"Linf": package.PGD, "L2": partial(package.PGDL2, eps_for_division=1e-12 / len(x))}[threat.norm]
    alpha = 2.5 * threat.bound / STEPS
    x_adv = kind(net, eps=threat.bound, alpha=alpha, steps=STEPS, random_start=random_start)(x, y)
    return Theirs([x_adv], net.net(x_adv).argmax(1) == y)


def torchattacks_apgd(net, x, y, threat: ThreatModel, *, loss: str) -> Theirs:
    package = pytest.importorskip("torchattacks")
    attack = package.APGD(net, norm=threat.norm, eps=threat.bound, steps=STEPS, loss=loss)
    return Theirs([], attack.attack_single_run(x, y)[1])


def pyautoattack_apgd(net, x, y, threat: ThreatModel, *, loss: str) -> Theirs:
    from pyautoattack.autopgd_base import APGDAttack

    attack = APGDAttack(net, n_iter=STEPS, norm=threat.norm, eps=threat.bound, loss=loss, device=x.device)
    return _single_run(attack, x, y)


def pyautoattack_targeted(net, x, y, threat: ThreatModel, *, rank: int) -> Theirs:
    from pyautoattack.autopgd_base import APGDAttack_targeted

    attack = APGDAttack_targeted(net, n_iter=STEPS, norm=threat.norm, eps=threat.bound, device=x.device)
    attack.y_target = net.net(x).sort(dim=1).indices[:, -1 - rank]  # as its perturb does
    return _single_run(attack, x, y)


def _single_run(attack, x: torch.Tensor, y: torch.Tensor) -> Theirs:
    attack.init_hyperparam(x)
    _, correct, _, x_adv = attack.attack_single_run(x, y)
    assert torch.equal(attack.model.net(x_adv).argmax(1) == y, correct)
    return Theirs([], correct)


class Pair(NamedTuple):
    """An attack of ours and the package's that it has to be; ``theirs(net, x, y, threat)`` draws the common start."""

    what: str
    against: str
    ours: Attack
    theirs: Callable[..., Theirs]


PAIRS = [
    Pair("PGD-CE from x", "torchattacks PGD", PGD(steps=STEPS, eot=1, random_start=False),
         partial(torchattacks_pgd, random_start=False)),
    Pair("PGD-CE", "torchattacks PGD", PGD(steps=STEPS, eot=1), partial(torchattacks_pgd, random_start=True)),
    *(Pair(f"APGD-{loss.upper()}", "torchattacks APGD", APGD(steps=STEPS, eot=1, loss=loss),
           partial(torchattacks_apgd, loss=loss)) for loss in ("ce", "dlr")),
    *(Pair(f"APGD-{loss.upper()}", "pyautoattack APGDAttack", APGD(steps=STEPS, eot=1, loss=loss),
           partial(pyautoattack_apgd, loss=loss)) for loss in ("ce", "dlr")),
    *(Pair(f"APGD-DLR-TARGETED, class {rank}", "pyautoattack APGDAttack_targeted", APGD(steps=STEPS, eot=1, rank=rank),
           partial(pyautoattack_targeted, rank=rank)) for rank in (1, 2)),
]  # fmt: skip


class Row(NamedTuple):
    """A row of the page by what identifies it, and what is compared there."""

    section: str
    what: str
    against: str
    case: tuple

    @property
    def id(self) -> str:
        return f"{self.what}-{self.against}".replace(" ", "_")


def attack_row(section: str, pair: Pair, norm: str, eps: Fraction) -> Row:
    radius = f"{float(255 * eps):g}/255" if norm == "Linf" else f"{float(eps):g}"
    against = pair.against + ("L2" if norm == "L2" and pair.against.endswith(" PGD") else "")
    return Row(section, f"{pair.what}, {norm} {radius}", against, (pair, norm, eps))


SMALL = [attack_row("A small network", pair, norm, eps) for norm, eps in EPS.items() for pair in PAIRS]
AGAINST = {"PGD-CE": "torchattacks PGD", "APGD-CE": "pyautoattack APGDAttack", "APGD-DLR": "pyautoattack APGDAttack",
           "APGD-DLR-TARGETED, class 1": "pyautoattack APGDAttack_targeted"}  # fmt: skip
CHOSEN = [pair for pair in PAIRS if AGAINST.get(pair.what) == pair.against]
REAL = [
    *(attack_row("cifar10-resnet18", pair, "Linf", Fraction(8, 255)) for pair in CHOSEN),
    *(attack_row("cifar10-resnet18", pair, "Linf", EPS_REAL["Linf"]) for pair in CHOSEN),
    *(attack_row("cifar10-resnet18", pair, "L2", EPS_REAL["L2"]) for pair in CHOSEN if pair.what == "APGD-CE"),
]  # fmt: skip
CHAINS = [
    Row("Samplers", f"eta rule, eta {eta:g}, {steps} steps", f"diffusers {kind.__name__}", (kind, eta, steps))
    for kind, eta in ((DDIMScheduler, 0.0), (DDIMScheduler, 1.0), (DDPMScheduler, 1.0))
    for steps in (20, 200)
]
SDES = [
    Row("Samplers", f"Euler-Maruyama, {labels} labels, {steps} steps", "torchsde sdeint, euler", (labels, steps))
    for labels in ("index", "continuous")
    for steps in (20, 100)
]
ODES = [
    Row("Samplers", f"probability flow, {labels} labels, {steps} steps", "torchdiffeq odeint, euler", (labels, steps))
    for labels in ("index", "continuous")
    for steps in (20, 100)
]


def over(rows: list[Row]):
    return pytest.mark.parametrize("row", rows, ids=[row.id for row in rows])


@pytest.fixture(scope="module")
def net() -> torch.nn.Module:
    """A small convolutional network in float64: random weights, steep first layers, ten classes equally likely."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        layers = torch.nn.Conv2d(1, 8, 3, 1, 1), torch.nn.Conv2d(8, 16, 3, 2, 1), torch.nn.Linear(256, 10)
    with torch.no_grad():
        for layer, scale in zip(layers, (3.0, 3.0, 0.3), strict=True):
            layer.weight *= scale
        a, b, c = layers
        net = torch.nn.Sequential(a, torch.nn.SiLU(), b, torch.nn.SiLU(), torch.nn.Flatten(), c).double()
        c.bias -= net(images(200)).mean(0)
    return net.requires_grad_(False).eval()


@pytest.fixture(scope="module")
def real() -> tuple[torch.nn.Module, torch.Tensor, torch.Tensor]:
    """cifar10-resnet18 in float64, and the first images of the data set in $CIFAR10 that it classifies correctly."""
    if "CIFAR10" not in os.environ:
        pytest.skip("CIFAR10 isn't set; it holds a data set, e.g. parquet:test.parquet,only=exact,family=cifar10")
    dataset = data.load(os.environ["CIFAR10"], 2 * N_REAL).first(2 * N_REAL)
    net = checkpoints.build("classifiers", "cifar10-resnet18", checkpoints.Need(dataset.form)).module
    net = net.double().eval().requires_grad_(False).to(memory_format=torch.channels_last)
    x, y = dataset.images(slice(None)).double(), dataset.labels
    correct = net(x).argmax(1) == y
    assert correct.sum() >= N_REAL
    return Once(net).eval(), x[correct][:N_REAL], y[correct][:N_REAL]


class Comparison(NamedTuple):
    """The largest difference of two paths, and what became of the images.

    Attributes:
        difference: max over iterates and pixels of |ours - theirs|.
        correct: the package's verdict per image, shape (B,).
        equal: whether all of our verdicts are the package's.
        found: what our attack returned.
        state: our attack's last state.
    """

    difference: float
    correct: torch.Tensor
    equal: bool
    found: Found
    state: dict[str, torch.Tensor]


def compare(pair: Pair, norm: str, eps: Fraction, net: torch.nn.Module, x: torch.Tensor, y: torch.Tensor) -> Comparison:
    """Run the package's attack from a start of its own, then ours from the same."""
    threat = NORMS[norm](eps)
    theirs, ours = Witness(net).eval(), Witness(net).eval()  # torchattacks puts the mode back that it found
    with torch.random.fork_rng():
        torch.manual_seed(5)
        last, correct = pair.theirs(theirs, x, y, threat)

    threat.random = lambda x, noise: theirs.seen[0].clone()
    victim = Victim(
        undefended(ours), VIEWS["exact"](), Tape(0, "attack", torch.arange(len(x))), Calls(len(x)), stochastic=False
    )
    state: dict[str, torch.Tensor] = {}
    found = pair.ours.perturb(x, y, victim, threat, watch=lambda k, now: state.update(now))
    (x_adv,) = found.candidates
    assert not any(module.training for module in net.modules())

    targeted = "target" in state
    assert not targeted or torch.equal(ours.seen[0], x)  # where it asks for the classes to aim at
    paths = torch.stack(ours.seen[targeted:] + [x_adv] * len(last)), torch.stack(theirs.seen + last)
    assert len(paths[0]) == len(paths[1]) == STEPS + 1
    verdicts = [net(x_adv).argmax(1) == y, *([] if last else [found.broken_at < 0])]
    return Comparison(
        float((paths[0] - paths[1]).abs().max()),
        correct,
        all(torch.equal(verdict, correct) for verdict in verdicts),
        found,
        state,
    )


def record(parity, row: Row, made: Comparison) -> None:
    pair, norm, _ = row.case
    tolerance = LOOSER.get((pair.against, norm), TOLERANCE)
    assert made.difference < tolerance
    assert made.equal
    parity(
        *row[:3], n=len(made.correct), iterations=STEPS, difference=made.difference, tolerance=tolerance,
        correct=int(made.correct.sum()),
    )  # fmt: skip


@over(SMALL)
def test_iterates_and_verdicts_are_the_packages(row, net, parity, default_float64):
    pair, norm, eps = row.case
    x = images(N)
    made = compare(pair, norm, eps, net, x, net(x).argmax(1))
    record(parity, row, made)
    assert 0.3 <= made.correct.double().mean() <= 0.7  # else agreement says nothing
    if isinstance(pair.ours, APGD):
        assert (made.found.forwards, made.found.backwards) == (STEPS + 1 + bool(pair.ours.rank), STEPS + 1)
        # every image came through a halving and a return to its best
        assert (made.state["size"] < 2 * NORMS[norm](eps).bound).all()


@pytest.mark.slow
@over(REAL)
def test_on_a_real_network_too(row, real, parity, default_float64):
    pair, norm, eps = row.case
    made = compare(pair, norm, eps, *real)
    record(parity, row, made)
    if eps == EPS_REAL[norm]:
        assert 0.3 <= made.correct.double().mean() <= 0.7


@over(CHAINS)
def test_the_eta_rule_is_diffusers_over_a_whole_chain(row, parity):
    kind, eta, steps = row.case
    ours = chain(steps, eta, FromGenerator(0))
    scheduler = diffusers_scheduler(
        kind, steps, **{"variance_type": "fixed_small"} if kind is DDPMScheduler else {"set_alpha_to_one": True}
    )
    if kind is DDPMScheduler:
        scheduler.timesteps += 200 // steps - 1  # leading spacing starts at 0, ours at the last index of each stride
    options = {} if kind is DDPMScheduler else {"eta": eta}
    generator, theirs = torch.Generator().manual_seed(0), [ours[0]]
    for i in range(199, -1, -200 // steps):
        noise = Wavy()(theirs[-1], torch.full((2,), i))
        theirs.append(scheduler.step(noise, i, theirs[-1], generator=generator, **options).prev_sample)
    along(parity, row, ours, theirs)


class ReverseSDE(torch.nn.Module):
    """dz = (½ β z + β s(z, t)) dτ + sqrt(β) dw with τ = 1 - t, as torchsde takes it: rows of numbers.

    Written from the paper's formulas and not from our rules: β(t) = 0.1 + 19.9 t, s = -n / sqrt(1 - alpha_bar).

    Reference: Song et al. 2021 (arXiv 2011.13456), eq. 6 and 32.
    """

    noise_type, sde_type = "diagonal", "ito"

    def __init__(self, labels: str, shape: torch.Size):
        super().__init__()
        self.labels, self.shape = labels, shape

    def beta(self, t):
        return 0.1 + 19.9 * t

    def score(self, t, z):
        if self.labels == "continuous":
            label, alpha_bar = 999 * t.expand(len(z)), (-0.5 * 19.9 * t**2 - 0.1 * t).exp()
        else:
            i = int((1000 * t).round()) - 1
            label, alpha_bar = torch.full((len(z),), i), torch.tensor(VP_1000.table[i], dtype=z.dtype)
        return -Wavy()(z.view(len(z), *self.shape), label).flatten(1) / (1 - alpha_bar).sqrt()

    def f(self, tau, z):
        return self.beta(1 - tau) * (z / 2 + self.score(1 - tau, z))

    def g(self, tau, z):
        return self.beta(1 - tau).sqrt().expand_as(z)

    def flow(self, t, z):
        """dz / dt of the probability flow, eq. 13."""
        return -self.beta(t) / 2 * (z + self.score(t, z))


class Increments:
    """A Brownian motion over the steps of a chain, whose increments are sqrt(Δ) ξ_k with our tape's ξ_k."""

    levy_area_approximation = "none"

    def __init__(self, times: list[float], tape: Tape, like: torch.Tensor):
        self.times, self.tape, self.like, self.shape = times, tape, like, like.flatten(1).shape

    def __call__(self, tau, tau_next):
        k = min(range(len(self.times)), key=lambda k: abs(1 - self.times[k] - float(tau)))
        return (tau_next - tau).sqrt() * self.tape.normal("reverse", k, like=self.like).flatten(1)


def diffpure(rule: str, labels: str, steps: int, tape: Tape) -> tuple[list[torch.Tensor], list[float]]:
    """All states of DiffPure from t_star = 0.1, and their times."""
    purifier = DiffPure(Wavy(), t_star=0.1, steps=steps, rule=rule, labels=labels)
    z, context = purifier.start(images(len(tape)), tape)
    states = [z]
    for k in range(steps):
        states.append(purifier.step(k, states[-1], context, tape))
    return states, purifier.times


@over(SDES)
def test_euler_maruyama_is_torchsdes(row, parity):
    torchsde = pytest.importorskip("torchsde")
    labels, steps = row.case
    tape = Tape(0, "clean", torch.arange(4))
    ours, times = diffpure("sde", labels, steps, tape)
    theirs = torchsde.sdeint(
        ReverseSDE(labels, ours[0].shape[1:]), ours[0].flatten(1), [1 - t for t in times],
        bm=Increments(times, tape, ours[0]), method="euler", dt=0.1 / steps,
    )  # fmt: skip
    along(parity, row, ours, [z.view_as(ours[0]) for z in theirs])


@over(ODES)
def test_the_probability_flow_is_torchdiffeqs(row, parity):
    torchdiffeq = pytest.importorskip("torchdiffeq")
    labels, steps = row.case
    ours, times = diffpure("ode", labels, steps, Tape(0, "clean", torch.arange(4)))
    sde = ReverseSDE(labels, ours[0].shape[1:])
    grid = torch.tensor(times, dtype=torch.float64)
    theirs = torchdiffeq.odeint(sde.flow, ours[0].flatten(1), grid, method="euler")
    along(parity, row, ours, [z.view_as(ours[0]) for z in theirs])


def along(parity, row: Row, ours: list[torch.Tensor], theirs: list[torch.Tensor]) -> None:
    """Two chains agree in every state, and moved."""
    assert len(ours) == len(theirs)
    difference = float((torch.stack(ours) - torch.stack(theirs)).abs().max())
    assert difference < TOLERANCE
    assert (ours[-1] - ours[0]).abs().mean() > 0.1
    parity(*row[:3], n=len(ours[0]), iterations=len(ours) - 1, difference=difference, tolerance=TOLERANCE)


def test_the_page_has_every_row(pytestconfig):
    """What identifies a row stands in results/parity.md, section by section, in the tests' order; no digit is read."""
    if pytestconfig.getoption("parity"):
        pytest.skip("the page is being written")
    found, section = [], ""
    for line in PAGE.read_text().splitlines():
        if line.startswith("## "):
            section = line[3:]
        elif line.startswith("| ") and not line.startswith(("| ours |", "| --- |")):
            found.append((section, *line.split(" | ")[:2]))
    expected = [(row.section, f"| {row.what}", row.against) for row in [*SMALL, *REAL, *CHAINS, *SDES, *ODES]]
    assert found == expected, "renew the page: make parity CIFAR10=parquet:test.parquet,only=exact,family=cifar10"


def test_the_wrong_momentum_would_be_noticed(net, default_float64):
    """Losing x_k - x_{k-1} before it is used, as one published tool does, leaves the package's path."""

    class Forgetful(APGD):
        def step(self, k, state, x, y, victim, threat):
            return super().step(k, state | {"x_old": state["x"]}, x, y, victim, threat)

    threat, x = NORMS["Linf"](EPS["Linf"]), images(N)
    y, x_init = net(x).argmax(1), threat.random(x, Tape(5, "attack", torch.arange(N)))
    paths = []
    for attack in (APGD(steps=5, eot=1), Forgetful(steps=5, eot=1)):
        witness = Witness(net)
        victim = Victim(
            undefended(witness), VIEWS["exact"](), Tape(0, "attack", torch.arange(N)), Calls(N), stochastic=False
        )
        state = attack.start(x, y, victim, threat, x_init=x_init)
        for k in range(5):
            state = attack.step(k, state, x, y, victim, threat)
        paths.append(torch.stack(witness.seen))
    assert (paths[0] - paths[1]).abs().amax((1, 2, 3, 4)).max() > 1e-4


@pytest.mark.parametrize("steps", [10, 20, 37, 50, 100])
def test_checkpoints_are_the_papers(steps):
    """p_0 = 0, p_1 = 0.22, p_{j+1} = p_j + max(p_j - p_{j-1} - 0.03, 0.06), in whole iterations as in the reference."""
    window, shorter, least = max(int(0.22 * steps), 1), max(int(0.03 * steps), 1), max(int(0.06 * steps), 1)
    expected, counter = {}, 0
    for k in range(steps):
        counter += 1
        if counter == window:
            expected[k], counter, window = window, 0, max(window - shorter, least)
    assert APGD(steps=steps, eot=1)._windows() == expected


def test_eot_on_a_deterministic_network_changes_nothing(net, default_float64):
    x = images(8)
    y, threat = net(x).argmax(1), NORMS["Linf"](EPS["Linf"])
    found = [
        registry.load("attacks", "apgd")(steps=20, eot=eot).perturb(
            x, y,
            Victim(undefended(net), VIEWS["exact"](), Tape(0, "attack", torch.arange(8)), Calls(32), stochastic=True),
            threat,
        ).candidates
        for eot in (1, 2)
    ]  # fmt: skip
    assert torch.allclose(*found, rtol=0, atol=1e-12)
