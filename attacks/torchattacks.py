"""Attacks of the package torchattacks, by name."""

from __future__ import annotations

import inspect
import re
from typing import Any

import torch
from torch import Tensor, nn

from attacks._base import Attack, AttackError, State
from attacks._gradient import Victim
from attacks._package import Model, contained, forked, seed_of
from attacks._threat import ThreatModel


class TorchAttacks(Attack):
    """Any attack of torchattacks, e.g. ``torchattacks:PGD,steps=50``, inside this benchmark's threat model.

    The options are the attack's own with its own defaults, but for radius and seed, which are the run's; an iteration
    count follows the budget unless it is told. Every call of a stochastic defense is one fresh draw, so only the
    package's EOT attacks average draws. The images it returns are projected into the threat model (an attack that
    looks for a small perturbation without a bound, such as CW, is thereby held to the radius). Its cost is counted on a
    small model that it can't break.

    Raises:
        ValueError: for an attack that the package doesn't have, or that can't be run here, with the reason.

    Reference: Kim 2020 (arXiv 2010.01950).
    """

    argument = "NAME"
    shown = ("steps", "queries", "eot")
    BLACK_BOX, MINIMAL = ("Square", "SPSA"), ("CW", "DeepFool", "EADEN", "FAB")
    """Those that only look, and those that seek the smallest perturbation and not the strongest within a radius."""
    REFUSED = {
        "AutoAttack": "it runs APGD and FAB with 10 iterations instead of 100, so its result is not AutoAttack's; "
        "use --attack autoattack",
        "MultiAttack": "it is made of other attack objects; give them as a list of specs",
        "Attack": "it is the base class of the others",
        "VANILA": "it returns the image as it is; use --attack identity",
    }
    GIVEN = ("eps", "max_epsilon", "norm", "seed", "n_classes", "verbose")
    """Parameters that are the run's and not the attack's."""
    RENAMED = {
        "eot_iter": "eot", "n_queries": "queries",
        "max_iterations": "steps", "num_iter_set": "steps", "nb_iter": "steps",
    }  # fmt: skip
    """Parameters under the names that they have in this benchmark."""
    name = ""
    taken: dict[str, str] = {}
    """All parameters of the package's constructor, and what they are called here."""

    def __init__(self, **own: Any):
        if not self.name:
            raise ValueError("torchattacks needs the name of one of its attacks, e.g. torchattacks:PGD")
        self.own = own
        self.cost = self._counted()

    @classmethod
    def of(cls, argument: str) -> type[TorchAttacks]:
        """The component that runs the package's attack of that name."""
        package = _package()
        known = {k.lower(): k for k, v in vars(package).items() if inspect.isclass(v)}
        name = known.get(argument.lower(), argument)
        if name in cls.REFUSED:
            raise ValueError(f"torchattacks:{name} isn't run: {cls.REFUSED[name]}")
        attack = getattr(package, name, None)
        if not inspect.isclass(attack) or not issubclass(attack, package.attack.Attack):
            usable = sorted(n for n, a in vars(package).items() if inspect.isclass(a) and n not in cls.REFUSED)
            raise ValueError(f"torchattacks has no attack {argument!r}; it has {', '.join(usable)}")
        stated = re.search(r"Distance Measure\s*:\s*(.*)", inspect.getdoc(attack) or "")
        norms = tuple(n for n in ("Linf", "L2") if stated and n in stated[1])
        if not norms:
            measure = stated[1] if stated else "none that it states"
            raise ValueError(f"torchattacks:{name} searches under {measure}; here a radius is in Linf or L2")
        parameters = list(inspect.signature(attack.__init__).parameters.values())[2:]  # self, model
        if needed := [p.name for p in parameters if p.default is p.empty]:
            raise ValueError(f"torchattacks:{name} needs {', '.join(needed)}, which a spec can't give")
        options = [
            p.replace(kind=p.KEYWORD_ONLY, name=cls.RENAMED.get(p.name, p.name), annotation=_kind(p.default))
            for p in parameters
            if p.name not in cls.GIVEN and not isinstance(p.default, (list, tuple, dict))
        ]
        taken = {p.name: cls.RENAMED.get(p.name, p.name) for p in parameters}

        def __init__(self: TorchAttacks, **own: Any) -> None:
            TorchAttacks.__init__(self, **own)

        __init__.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
            [inspect.Parameter("self", inspect.Parameter.POSITIONAL_OR_KEYWORD), *options]
        )
        members = {
            "__init__": __init__, "name": name, "norms": norms, "taken": taken,
            "__doc__": _documented(attack, taken),
            "black_box": name in cls.BLACK_BOX, "restricted": name in cls.MINIMAL,
        }  # fmt: skip
        return type(f"TorchAttacks{name}", (cls,), members)

    def display(self, stochastic: bool) -> str:
        shown = {"steps": "{} it", "queries": "{} queries", "eot": "EOT {}"}
        effort = [text.format(self.own[key]) for key, text in shown.items() if key in self.own]
        return f"{self.name} ({', '.join([*effort, 'torchattacks'])})"

    def package(self, stochastic: bool) -> str | None:
        return "torchattacks"

    def length(self, stochastic: bool) -> int:
        return 1

    def evaluations(self, stochastic: bool) -> int:
        return self.cost[0]

    def gradients(self, stochastic: bool) -> int:
        return self.cost[1]

    def distinct(self, stochastic: bool) -> int:
        return 0

    def start(self, x: Tensor, y: Tensor, victim: Victim, threat: ThreatModel) -> State:
        return {"x_adv": threat.origin(x), "broken_at": torch.full((len(x),), -1, device=x.device)}

    def step(self, k: int, state: State, x: Tensor, y: Tensor, victim: Victim, threat: ThreatModel) -> State:
        model = Model(victim, x.device)
        classes = victim.defense(x[:1], victim.tape[:1], victim.view).shape[1] if "n_classes" in self.taken else 0
        with contained(victim, x.device):
            try:
                x_adv = self._made(model, threat.norm, threat.bound, seed_of(victim), classes)(x.clone(), y.clone())
            except Exception as error:  # whatever the package raises
                raise AttackError(f"{self._spec()}: {type(error).__name__}: {error}") from error
        model.charge(len(x))
        return state | {"x_adv": threat.project(x_adv.detach().to(x), x)}

    def finish(self, state: State) -> Tensor:
        return state["x_adv"][None]

    def _made(self, model: nn.Module, norm: str, bound: float, seed: int, classes: int) -> Any:
        """The package's attack object on a model."""
        given = {"eps": bound, "max_epsilon": bound, "norm": norm, "seed": seed, "n_classes": classes, "verbose": False}
        given = {key: value for key, value in given.items() if key in self.taken}
        own = {theirs: self.own[ours] for theirs, ours in self.taken.items() if ours in self.own}
        return getattr(_package(), self.name)(model.eval(), **own, **given)

    def _counted(self) -> tuple[int, int]:
        """Forwards and backwards for one image of a model that can't be broken: what the options cost, if they work."""
        model, x = _Unbreakable(), torch.full((1, 3, 32, 32), 0.5)
        with forked(0, x.device):
            try:
                self._made(model, self.norms[0], 1e-6, 0, 10)(x, torch.zeros(1, dtype=torch.long))
            except Exception as error:  # whatever the package raises
                raise ValueError(f"{self._spec()} fails: {type(error).__name__}: {error}") from error
        return model.forwards, model.backwards

    def _spec(self) -> str:
        return f"torchattacks:{self.name},{','.join(f'{k}={v}' for k, v in sorted(self.own.items()))}"


class _Unbreakable(nn.Module):
    """Class 0, by far, and a gradient: it counts the rows that it is asked, and those with a gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(-1, 1, 10 * 3).view(10, 3), requires_grad=False)
        self.forwards = self.backwards = 0

    def forward(self, x: Tensor) -> Tensor:
        self.forwards += len(x)
        self.backwards += len(x) if torch.is_grad_enabled() and x.requires_grad else 0
        return x.mean((2, 3)) @ self.weight.T + torch.eye(10)[0].to(x) * 50


def _documented(attack: type, taken: dict[str, str]) -> str:
    """The first words of the package on an attack, and what it says of the parameters, under their names here."""
    text = inspect.cleandoc(attack.__doc__ or "")
    said = {there: re.search(rf"^ +{there} ?\(.*?\): *(.+?)(?: *\(Default.*)?$", text, re.M) for there in taken}
    meanings = "".join(f"    {here}: {found[1].strip()}\n" for there, here in taken.items() if (found := said[there]))
    return f"{text.partition(chr(10) * 2)[0]}\n\nArgs:\n{meanings}"


def _package() -> Any:
    try:
        import torchattacks
    except ImportError as error:
        raise ValueError(
            "torchattacks isn't installed: pip install --no-deps torchattacks (it pins an old requests, and brings a "
            "broken copy of robustbench: if you use robustbench, reinstall that afterwards)"
        ) from error
    return torchattacks


def _kind(default: Any) -> Any:
    """The type of an option from its default; a count may be written as a float's whole number."""
    return {bool: bool, int: int | float, float: float, str: str}.get(type(default), object)
