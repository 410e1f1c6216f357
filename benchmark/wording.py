"""Numbers and protocols in words, the same in every format."""

from __future__ import annotations

from typing import Any

from benchmark import specs
from benchmark.grades import MEANING
from benchmark.report import COLUMNS, RULES, Table

SHARES = {c for c in COLUMNS if c.startswith(("clean", "robust"))} | {"null_floor", "random_control"}
"""The columns that are accuracies."""
FACTS = "dataset norm eps budget n draws rule seed protocol precision torch commit".split()
"""The columns of a protocol line."""
GRADES = (
    "A grade judges the evidence for a number, not the defense: "
    f"{'; '.join(f'{letter}, {meaning}' for letter, meaning in MEANING.items())}. audit --only grades says what."
)
"""What the letters mean, and where it is said what a row lacks."""
RANKS = (
    "Ranks compare rows of one protocol on the same images, each under the attacks it met; rows that a paired test "
    "doesn't tell from the first of their group share its rank (sign flips at 5 %, corrected for all pairs)."
)


DATASETS = {
    "celeba": "CelebA", "cifar10": "CIFAR-10", "cifar100": "CIFAR-100", "fashion-mnist": "Fashion-MNIST",
    "imagenet": "ImageNet", "mnist": "MNIST", "svhn": "SVHN",
}  # fmt: skip
"""What families of images are called in print."""


def dataset(spec: str) -> str:
    """What a caption calls a data set: its family, where the spec names one; the protocol line has the spec."""
    parsed = specs.parse(spec)
    family = str(parsed.options.get("family", parsed.name))
    split = f", {parsed.options['split']} images" if "split" in parsed.options else ""
    return DATASETS[family] + split if family in DATASETS else spec


def facts(table: Table) -> str:
    """How the rows of a table were measured: its protocol line."""
    said = []
    for key in FACTS:
        if values := sorted({row[key] for row in table.rows if row[key] is not None}):
            value = ", ".join(map(str, values))
            said.append(value if key in ("dataset", "norm", "eps") else f"{key} {value}")
    return f"{said[0]}, {' '.join(said[1:3])}; {'; '.join(said[3:])}."


def accuracy(table: Table) -> str:
    """What an accuracy and its interval are."""
    foreknown = any("noise=verdict" in r["view"] for r in table.rows)
    seen = f" that no attack saw{', unless its row says so' if foreknown else ''}"
    return (
        f"Accuracy is {RULES[table.rule].format(seen=seen)}; clean accuracy stands under the same rule. Intervals are "
        "95 % Wilson over images and draws, and say nothing of training seeds."
    )


def explained(table: Table) -> str:
    """What the numbers of a table to read are."""
    return (
        f"{accuracy(table)}{_unknown(table)} Any iteration: no draw in the attack's loop was ever wrong; its null "
        "floor is what that rule reads at x itself. s/image is wall time; draws at x are shared between the attacks "
        f"of a defense. {GRADES}"
    )


def _unknown(table: Table) -> str:
    """Why accuracies are missing, where the reason is the rule."""
    if table.rule == "mean-logits" and any(row["robust"] is None for row in table.rows):
        return " Mean logits are of logits.npz, which stays with the run and in no repository; worst cases have none."
    return ""


def attacks(rows: list[dict[str, Any]]) -> list[str]:
    """What each row's attack is called: as it is displayed, with what else tells it from another row of the table."""
    several = len({row["seed"] for row in rows}) > 1
    names = [row["display"] + (f", seed {row['seed']}" if several else "") for row in rows]
    keys = [(row["purifier"], row["classifier"], row["view"], name) for row, name in zip(rows, names, strict=True)]
    specs: dict[tuple, set[str]] = {}
    for key, row in zip(keys, rows, strict=True):
        specs.setdefault(key, set()).add(row["attack"])
    return [
        f"{name} ({row['attack']})" if len(specs[key]) > 1 else name
        for name, key, row in zip(names, keys, rows, strict=True)
    ]


def titled(column: str) -> str:
    """The head of a column to read."""
    return f"{column} %" if column in SHARES else column


def cell(row: dict[str, Any], column: str) -> str:
    """A value to read: accuracies in percent, a dash for what is unknown."""
    value = row[column]
    if value is None:
        return "–"
    return percent(value) if column in SHARES else f"{value:.4g}" if isinstance(value, float) else str(value)


def with_interval(row: dict[str, Any], key: str) -> str:
    """An accuracy of a row and its interval, in percent."""
    if row[key] is None:
        return "–"
    return f"{percent(row[key])} [{percent(row[f'{key}_low'])}, {percent(row[f'{key}_high'])}]"


def share(value: float | None) -> str:
    """A fraction in percent, or a dash where it is unknown."""
    return "–" if value is None else percent(value)


def p_value(p: float) -> str:
    """A p-value, which is never 0."""
    return f"{p:.4f}" if p >= 5e-5 else "<0.0001"


def points(difference: float, low: float, high: float) -> str:
    """A difference of accuracies with its interval, in percentage points."""
    return f"{100 * difference:+.1f} [{100 * low:+.1f}, {100 * high:+.1f}]"


def percent(value: float) -> str:
    """A fraction in percent."""
    return f"{100 * value:.1f}"


def two_digits(value: float) -> str:
    """A number to two digits, without an exponent."""
    return f"{float(f'{value:.2g}'):g}"


def seconds(row: dict[str, Any]) -> str:
    """Seconds per image, where they are known."""
    return "–" if row["seconds_per_image"] is None else two_digits(row["seconds_per_image"])


def count(parameters: int | None) -> str:
    """How many parameters a purifier has, in thousands."""
    return "–" if parameters is None else f"{parameters / 1000:,.0f} k" if parameters else "0"
