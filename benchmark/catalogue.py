"""The catalogue: what a spec can name, what it costs, and what each of its options means."""

from __future__ import annotations

import inspect
import re
import textwrap
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from benchmark import checkpoints, config, constructors, data, registry, specs, zoo
from benchmark.checkpoints import Need
from benchmark.dataset import FORMS, SPLITS
from benchmark.errors import UsageError, unknown
from benchmark.specs import Spec, show

SECTION = re.compile(r"^(?:Args|Raises|Attributes|Returns):\n(?:(?: {4}.*)?(?:\n|$))*", re.M)
"""A section of a docstring, which a page has words of its own for or leaves out."""
TRAINED = ("size", "objective", "critics", "adversarial_eps")
"""What tells the recipe of a variant from that of the component it is a variant of."""


def entries(kind: str, need: Need) -> list[dict[str, Any]]:
    """All that a kind has, by name: for a data set's family, components with weights or that need none."""
    if kind == "datasets":
        return [_dataset(name) for name in data.names()]
    if kind == "budgets":
        return [_budget(budget) for budget in config.BUDGETS.values()]
    if kind == "attacks":
        return [_attack(Spec(name)) for name in registry.names("attacks")]
    family = need.form.family
    found = [_component(kind, Spec(name), need) for name in checkpoints.names(kind, family, need.roots)]
    return found + (zoo.listing(family) if kind == "classifiers" else [])


def entry(kind: str, text: str, need: Need) -> dict[str, Any]:
    """What is known of one name or spec, with the text of its documentation and of its options.

    Raises:
        UsageError: for an unknown name, or an option that it doesn't take.
    """
    documented: Callable | None = None
    if kind in ("datasets", "budgets") or text.partition(":")[0] in zoo.ZOOS:
        known = {e["name"]: e for e in entries(kind, need)}
        if text not in known:
            raise UsageError(unknown(kind[:-1], text, list(known)))
        found = known[text]
        if kind == "datasets":
            documented = data.reader(text)
    else:
        spec = checkpoints.named(specs.parse(text))
        found = _attack(spec) if kind == "attacks" else _component(kind, spec, need)
        documented = registry.described(kind, found.get("component", spec.name), spec.argument)
    text = SECTION.sub("", inspect.getdoc(documented) or "") if documented else ""
    meanings = {"split": f"one of {', '.join(SPLITS)}."} | (explained(documented) if documented else {})
    return found | {
        "documentation": text.replace("``", "`").strip(),
        "meanings": {option: meanings.get(option, "") for option in found.get("options", {})},
    }


def explained(component: Callable) -> dict[str, str]:
    """What each option of a component means: its docstring's Args, or where it refers to a base, the base's."""
    found: dict[str, str] = {}
    for owner in inspect.getmro(component) if inspect.isclass(component) else (component,):
        section = re.search(r"^Args:\n((?:(?: {4}.*)?(?:\n|$))*)", inspect.cleandoc(owner.__doc__ or ""), re.M)
        for item in re.split(r"\n(?= {4}\S)", section[1].rstrip()) if section else ():
            names, _, meaning = " ".join(item.split()).partition(": ")
            if not re.fullmatch(r"as (for )?``\w+``\.?", meaning):
                found = {name: meaning.replace("``", "`") for name in names.split(", ")} | found
    return found


def table(kind: str, found: list[dict[str, Any]]) -> Iterator[str]:
    """A heading, and a line for each entry."""
    columns = COLUMNS[kind]
    rows = [list(columns), *([_cell(e, column) for column in columns.values()] for e in found)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(columns) - 1)]
    for row in rows:
        yield "  ".join([*(text.ljust(width) for text, width in zip(row, widths, strict=False)), row[-1]]).rstrip()


def page(found: dict[str, Any], width: int) -> Iterator[str]:
    """All that is known of an entry of ``entry``, in lines of a width."""
    component = found.get("component", found["name"])
    head = found["name"] + ("" if component == found["name"] else f": {component} with {_difference(found)}")
    yield from textwrap.wrap(head, width, subsequent_indent="  ")
    for paragraph in filter(None, re.split(r"\n\n|\n(?=- )", found["documentation"])):
        yield from [""] * (not paragraph.startswith("- "))
        if paragraph.startswith("|"):  # a table: its rows as they are
            yield from paragraph.split("\n")
            continue
        yield from textwrap.wrap(paragraph, width, subsequent_indent="  " * paragraph.startswith("- "))
    if options := {f"{k}={v}": found["meanings"][k] for k, v in found.get("options", {}).items()}:
        yield from ("", "Options:")
        column = max(map(len, options)) + 4
        for option, meaning in options.items():
            yield from textwrap.wrap(f"  {option:<{column - 4}}  {meaning}", width, subsequent_indent=" " * column)
    told = ("name", "about", "documentation", "options", "meanings", "component", "differs")
    facts = {k.replace("_", " "): v for k, v in found.items() if k not in told and v not in (None, {}, "")}
    yield ""
    for fact, value in facts.items():
        yield from textwrap.wrap(f"{fact}: {_in_words(value)}", width, subsequent_indent="  ")


# --- entries


def _dataset(name: str) -> dict[str, Any]:
    reader = data.reader(name)
    found: dict[str, Any] = {"name": name, "about": _first(reader), "radii": config.RADII.get(name, {})}
    if form := FORMS.get(name):
        found |= {"shape": "×".join(map(str, form.shape)), "classes": form.classes}
    return found | {"options": _options(reader, Spec(name))}


def _budget(budget: config.Budget) -> dict[str, Any]:
    return {
        "name": budget.name,
        "n": budget.n,
        "select": budget.select,
        "draws": budget.draws,
        "attacks": budget.attacks,
    }


def _attack(spec: Spec) -> dict[str, Any]:
    """An attack; how many steps, draws and queries it takes in a run is said by the run's budget."""
    attack: Any = registry.load("attacks", spec.name, spec.argument)
    options = _options(attack, spec)
    efforts = {b.name: b.attacks.get(spec.name, b.attacks["pgd"]) for b in config.BUDGETS.values()}
    follows = options.keys() - spec.options.keys()  # what a spec says is so at every budget
    efforts = {name: {k: v for k, v in effort.items() if k in follows} for name, effort in efforts.items()}
    found: dict[str, Any] = _named(spec, attack) | {"about": _first(attack)}
    if not hasattr(attack, "argument") or spec.argument:  # what is named by an argument has its own
        found |= {"norms": ", ".join(attack.norms), "black_box": attack.black_box}
    return found | {"options": options, "budgets": {name: effort for name, effort in efforts.items() if effort}}


def _component(kind: str, spec: Spec, need: Need) -> dict[str, Any]:
    """A purifier or a classifier; a card's name is that of its component with the card's options and weights."""
    cards = checkpoints.cards(need.form.family, need.roots)
    card = checkpoints.read_card(cards[spec.name]) if spec.name in cards else {}
    name = card.get("component", spec.name)
    built = _built(spec, need) if kind == "purifiers" else None
    component: Any = registry.load(kind, name, spec.argument)
    options = _options(component, spec, card.get("options"))
    found = _named(spec, component) | {"about": _first(component), "component": name, "options": options}
    found |= {"weights": bool(card.get("files")), "source": card.get("source")}
    if any(not remote.path.is_file() for remote in checkpoints.published(card, need)):
        found["not here yet"] = f"python -m benchmark fetch {spec.name} --dataset {need.form.family}"
    accuracy = card.get("measured", {}).get("test", {}).get("accuracy")
    if kind == "classifiers" and accuracy is not None:
        found["clean"] = round(100 * accuracy, 2)
    recipe = card.get("recipe", {})
    if name != spec.name and name in cards:
        base = checkpoints.read_card(cards[name])
        theirs = _options(component, Spec(name), base.get("options"))
        differs = {k: v for k, v in options.items() if v != theirs[k]}
        trained = _training(base.get("recipe", {}))
        if recipe.get("epochs"):  # otherwise they are the base's weights
            differs |= {k: v for k, v in _training(recipe).items() if v != trained.get(k)}
        found["differs"] = differs
    if built is not None:
        found |= _abilities(built.module)
        found["dial"] = recipe.get("dial") or found["dial"]  # weights may have another than their component
    return found


def _built(spec: Spec, need: Need) -> checkpoints.Component:
    """A purifier without its weights, or with them where its constructor computes with them."""
    try:
        return checkpoints.build("purifiers", spec, need, hollow=True)
    except RuntimeError:
        return checkpoints.build("purifiers", spec, need)


def _named(spec: Spec, component: Any) -> dict[str, Any]:
    argument = spec.argument or getattr(component, "argument", None)
    return {"name": f"{spec.name}:{argument}" if argument else spec.name}


def _options(component: Any, spec: Spec, defaults: Mapping[str, Any] | None = None) -> dict[str, str]:
    return {k: show(v) for k, v in constructors.resolve(component, spec, defaults).items()}


def _training(recipe: dict[str, Any]) -> dict[str, str]:
    """What ``TRAINED`` names of a recipe, objectives by their own names."""
    chosen = {k: v for k in TRAINED if (v := recipe.get(k))}
    chosen |= chosen.pop("objective", {})
    return {k: show(v) for k, v in chosen.items()}


def _abilities(purifier: Any) -> dict[str, Any]:
    """What a purifier costs and how it is set and attacked."""
    return {
        "parameters": sum(p.numel() for p in purifier.parameters()),
        "nfe": purifier.nfe,
        "stochastic": purifier.stochastic,
        "dial": purifier.dial,
        "differentiable": purifier.differentiable,
        "surrogates": ", ".join(purifier.surrogates),
    }


def _first(documented: Any) -> str:
    return (documented.__doc__ or "").strip().split("\n")[0].replace("``", "`")


# --- as text


def _in_words(value: Any) -> str:
    if isinstance(value, dict):
        nested = any(isinstance(v, dict) for v in value.values())
        return ("; " if nested else ", ").join(f"{k} {_in_words(v)}" for k, v in value.items())
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    return ("no", "yes")[value] if isinstance(value, bool) else str(value)


def _what(found: dict[str, Any]) -> str:
    """What a component computes; of a variant in what it differs."""
    if found.get("source"):
        return f"{found['component']}: {found['source']}"
    if found.get("component") == "file":
        return "a component of one's own"
    return f"{found['component']} with {_difference(found)}" if "differs" in found else found.get("about", "-")


def _difference(found: dict[str, Any]) -> str:
    return ", ".join(f"{k}={v}" for k, v in found.get("differs", {}).items()) or "weights of its own"


def _cell(found: dict[str, Any], column: str | Callable[[dict[str, Any]], str]) -> str:
    if callable(column):
        return column(found)
    value = found.get(column)
    return "-" if value in (None, "", {}) else _in_words(value)


COLUMNS: dict[str, dict[str, str | Callable[[dict[str, Any]], str]]] = {
    "purifiers": {
        "purifier": "name",
        "NFE": "nfe",
        "parameters": lambda e: _in_words(e["parameters"]) if e["parameters"] else "-",
        "random": "stochastic",
        "gradient": lambda e: "exact" if e["differentiable"] else e["surrogates"],
        "g(x)": _what,
    },
    "attacks": {"attack": "name", "norms": "norms", "black box": "black_box", "search": "about"},
    "classifiers": {
        "classifier": "name",
        "clean %": "clean",
        "robust %": "robust",
        "threat": lambda e: f"{e['threat']} {e['eps']}" if "threat" in e else "-",
        "network": _what,
    },
    "datasets": {"data set": "name", "shape": "shape", "classes": "classes", "radii": "radii", "images": "about"},
    "budgets": {
        "budget": "name",
        "n": "n",
        "select": "select",
        "draws": "draws",
        "steps × draws of PGD": lambda e: "{steps} × {eot}".format(**e["attacks"]["pgd"]),
        "of APGD": lambda e: "{steps} × {eot}".format(**e["attacks"]["apgd"]),
        "of Square": lambda e: "{queries} × {eot}".format(**e["attacks"]["square"]),
    },
}
"""The columns of each kind's table: a heading, and the key of an entry or what makes words of one."""
