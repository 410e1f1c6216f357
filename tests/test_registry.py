"""Specs and the registry: a grammar that round-trips, names without a list, and errors that say what would do."""

from __future__ import annotations

import textwrap
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from attacks import Attack
from benchmark import registry
from benchmark.constructors import options, resolve
from benchmark.errors import UsageError
from benchmark.registry import load, names, source
from benchmark.specs import Spec, expand, parse, read, show, split
from purifiers import Purifier

NAMED = [(kind, name) for kind in registry.BASES for name in names(kind)]
every_component = pytest.mark.parametrize("kind, name", NAMED, ids=lambda v: v)

words = st.from_regex(r"[a-z][a-z_]{0,8}", fullmatch=True).filter(lambda w: w not in ("true", "false", "inf", "nan"))
names_of_components = st.from_regex(r"[a-z][a-z0-9]{0,5}(-[a-z0-9]{1,4})?", fullmatch=True).filter(
    lambda w: w != "file"
)
scalars = st.one_of(
    st.integers(-(10**9), 10**9),
    st.floats(allow_nan=False, allow_infinity=False),
    st.booleans(),
    words,
    st.fractions(max_denominator=10**4),
)
list_items = st.one_of(st.integers(-99, 99), st.floats(-1, 1).filter(lambda v: "e" not in repr(v)), words)
values = st.one_of(scalars, st.lists(list_items, min_size=2, max_size=4))
specs = st.builds(Spec, names_of_components, st.none() | words, st.dictionaries(words, values, max_size=4))


@pytest.mark.parametrize(
    "text, value",
    [
        ("3", 3),
        ("-3", -3),
        ("0.15", 0.15),
        ("1e-3", 1e-3),
        ("1e+16", 1e16),
        ("8/255", Fraction(8, 255)),
        ("true", True),
        ("False", False),
        ("sde", "sde"),
        ("0.1+0.1+0.05", [0.1, 0.1, 0.05]),
        ("a+2+true", ["a", 2, True]),
    ],
)
def test_values(text, value):
    assert read(text) == value and type(read(text)) is type(value)


@given(specs)
def test_a_spec_round_trips_through_its_canonical_text(spec):
    assert parse(str(spec)) == spec
    assert str(parse(str(spec))) == str(spec)


@given(specs)
def test_the_order_of_options_is_no_part_of_an_identity(spec):
    backwards = Spec(spec.name, spec.argument, dict(reversed(spec.options.items())))
    assert str(backwards) == str(spec)


@given(st.lists(specs, min_size=1, max_size=4))
def test_a_list_of_specs_splits_into_them(many):
    assert split(",".join(map(str, many))) == [str(spec) for spec in many]


@pytest.mark.parametrize(
    "text, expected",
    [
        ("identity,vae,diffpure", ["identity", "vae", "diffpure"]),
        ("diffpure:rule=eta,steps=5,vae", ["diffpure:rule=eta,steps=5", "vae"]),
        ("vae,file:mine.py:Mine,amount=2,vae", ["vae", "file:mine.py:Mine,amount=2", "vae"]),
        ("pgd:steps=5,path=a:b", ["pgd:steps=5,path=a:b"]),
        ("vae, identity,", ["vae", "identity"]),
    ],
)
def test_an_item_with_an_equals_before_any_colon_belongs_to_the_spec_before(text, expected):
    assert split(text) == expected


@pytest.mark.parametrize(
    "text, expected",
    [
        ("vae", ["vae"]),
        ("vae:temperature={0,1}", ["vae:temperature=0", "vae:temperature=1"]),
        ("{vae,identity}", ["vae", "identity"]),
        ("d:a={1,2},b={x,y}", ["d:a=1,b=x", "d:a=1,b=y", "d:a=2,b=x", "d:a=2,b=y"]),
        ("d:{a=1,b=2}", ["d:a=1", "d:b=2"]),
    ],
)
def test_braces_make_a_grid(text, expected):
    assert expand(text) == expected


def test_arguments_and_options():
    assert parse("file:some/Mine.py:Mine,amount=1/2") == Spec("file", "some/Mine.py:Mine", {"amount": Fraction(1, 2)})
    assert parse("diffpure:t_star=0.1") == Spec("diffpure", None, {"t_star": 0.1})
    assert parse("zoo:Some_Name,eps=3") == Spec("zoo", "Some_Name", {"eps": 3})


def test_dashes_and_underscores_are_the_same_in_names():
    assert parse("resnet_at") == parse("resnet-at") == parse("ResNet-AT")
    assert parse("diffpure:t-star=0.2") == parse("diffpure:t_star=0.2")
    assert parse("pgd:steps=3,random-start=false") == parse("pgd:steps=3,random_start=false")


@pytest.mark.parametrize("text", ["vae:a=1,b", "vae:a=1,=2", "vae:a=1,b=", ":a=1", "", "vae,b"])
def test_what_is_no_spec(text):
    with pytest.raises(UsageError, match=r"a spec is name\[:argument\]"):
        parse(text)


@every_component
def test_every_name_loads_one_component_with_typed_options(kind, name):
    component = load(kind, name)
    assert options(component) == {k: p for k, p in options(component).items() if p.default is not p.empty}
    defaults = resolve(component, Spec(name))
    assert set(defaults) == set(options(component))
    written = parse(str(Spec(name, None, defaults)))
    assert resolve(component, written) == defaults


@every_component
def test_an_unknown_option_names_the_nearest_and_all(kind, name):
    component = load(kind, name)
    for key in options(component):
        with pytest.raises(UsageError) as error:
            resolve(component, Spec(name, None, {key + "x": 1}))
        assert all(part in str(error.value) for part in (repr(key + "x"), f"did you mean {key}", *options(component)))


@pytest.mark.parametrize("kind, wrong, near", [("purifiers", "difpure", "diffpure"), ("attacks", "apgdd", "apgd")])
def test_an_unknown_name_names_the_nearest_and_all(kind, wrong, near):
    with pytest.raises(UsageError) as error:
        load(kind, wrong)
    message = str(error.value)
    assert f"unknown {kind[:-1]} {wrong!r}" in message and "did you mean" in message and near in message
    assert all(name in message for name in names(kind))


def test_a_name_like_no_other_still_lists_all():
    with pytest.raises(UsageError) as error:
        load("classifiers", "zzzzzz")
    assert "did you mean" not in str(error.value) and "known: resnet" in str(error.value)


@pytest.mark.parametrize(
    "component, key, value, wanted",
    [
        (("purifiers", "diffpure"), "steps", "ten", "int"),
        (("purifiers", "diffpure"), "steps", "2.5", "int"),
        (("purifiers", "diffpure"), "steps", "true", "int"),
        (("purifiers", "diffpure"), "t_star", "high", "float or list"),
        (("purifiers", "diffpure"), "eta", "0.1+0.2", "float"),
        (("purifiers", "diffpure"), "rule", "7", "str"),
        (("attacks", "pgd"), "random_start", "2", "bool"),
    ],
)
def test_a_value_of_the_wrong_type(component, key, value, wanted):
    with pytest.raises(UsageError, match=f"{key} takes {wanted}, got '{value.replace('+', '.')}'"):
        resolve(load(*component), parse(f"{component[1]}:{key}={value}"))


def test_values_that_lose_nothing_are_converted():
    chosen = resolve(load("purifiers", "diffpure"), parse("diffpure:t_star=1/10,eta=1"))
    assert chosen["t_star"] == 0.1 and type(chosen["t_star"]) is float
    assert chosen["eta"] == 1.0 and type(chosen["eta"]) is float


def test_a_spec_overrides_a_card_and_a_card_the_class():
    component = load("purifiers", "diffpure")
    chosen = resolve(component, parse("diffpure:steps=7"), {"steps": 5, "rule": "eta"})
    assert (chosen["steps"], chosen["rule"], chosen["t_star"]) == (7, "eta", 0.1)


def test_an_argument_that_a_component_does_not_take_is_an_error():
    with pytest.raises(UsageError, match="0.1"):
        load("purifiers", "diffpure", parse("diffpure:0.1").argument)


ATTACK = """
    from __future__ import annotations
    from attacks import Attack
    class Nothing(Attack):
        '''Returns x.'''
        def __init__(self, *, times: int = 1): self.times = times
        def display(self, stochastic): return "nothing"
        def length(self, stochastic): return 0
        def evaluations(self, stochastic): return 0
        def start(self, x, y, victim, threat): return {"x": x, "broken_at": y * 0 - 1}
        def step(self, k, state, x, y, victim, threat): return state
        def finish(self, state): return state["x"][None]
    class _Private(Attack): pass
"""


def test_a_purifier_and_an_attack_by_file(newcomer, tmp_path):
    purifier = load("purifiers", "file", newcomer)
    assert issubclass(purifier, Purifier) and purifier.__name__ == "Shrink"
    spec = parse(f"file:{newcomer},amount=1/2,flip=true")
    assert resolve(purifier, spec) == {
        "amount": 0.5, "sigma": 0.05, "steps": 2, "flip": True, "border": "clamp", "rounds": 1,
    }  # fmt: skip
    with pytest.raises(UsageError, match="steps takes int"):
        resolve(purifier, parse(f"file:{newcomer},steps=many"))
    path = tmp_path / "nothing.py"
    path.write_text(textwrap.dedent(ATTACK))
    attack = load("attacks", "file", str(path))  # the one class needs no name
    assert issubclass(attack, Attack) and resolve(attack, parse(f"file:{path},times=3")) == {"times": 3}


def test_two_files_of_one_name_do_not_disturb_each_other(tmp_path):
    loaded = []
    for folder, hint in (("a", "int"), ("b", "float")):
        (tmp_path / folder).mkdir()
        path = tmp_path / folder / "mine.py"
        path.write_text(
            "from __future__ import annotations\nfrom purifiers import Purifier\n"
            f"Number = {hint}\nclass Mine(Purifier):\n"
            "    def __init__(self, *, k: Number = Number(1)): super().__init__()\n"
        )
        loaded.append(load("purifiers", "file", f"{path}:Mine"))
    kinds = [type(resolve(component, parse("file:x.py:Mine,k=2"))["k"]) for component in loaded]
    assert kinds == [int, float]


@pytest.mark.parametrize("argument", [None, "", "nowhere.py:Mine", "mine.txt:Mine"])
def test_a_file_that_is_none(argument):
    with pytest.raises(UsageError, match=r"write file:PATH\.py:Class"):
        load("purifiers", "file", argument)


def test_a_class_that_a_file_does_not_define(newcomer, tmp_path):
    path = newcomer.rpartition(":")[0]
    with pytest.raises(UsageError) as error:
        load("purifiers", "file", f"{path}:Shrunk")
    assert "did you mean Shrink" in str(error.value) and "purifiers.Purifier" in str(error.value)
    with pytest.raises(UsageError, match=r"attacks\.Attack"):
        load("attacks", "file", f"{path}:Shrink")


def test_what_a_file_imports_from_beside_it_is_part_of_its_source(tmp_path):
    mine, helper, deeper, other = (tmp_path / f"{name}.py" for name in ("mine", "helper", "deeper", "other"))
    mine.write_text("import torch\nfrom helper import double\nfrom purifiers import Purifier\n")
    helper.write_text("import deeper\n")
    deeper.write_text("x = 1\n")
    other.write_text("x = 1\n")
    (tmp_path / "purifiers").mkdir()
    (tmp_path / "purifiers" / "__init__.py").write_text("")
    spec = Spec("file", f"{mine}:Mine", {})
    before = source(spec)
    for path, counts in ((other, False), (tmp_path / "purifiers" / "__init__.py", False), (deeper, True)):
        path.write_text("x = 2\n")
        assert (source(spec) != before) == counts, path


def test_an_option_without_a_default_has_to_be_given():
    def made(*, scale: float):
        return scale

    with pytest.raises(UsageError, match="scale has no default; write file:mine.py:made,scale=VALUE"):
        resolve(made, Spec("file", "mine.py:made", {}))
    assert resolve(made, Spec("file", "mine.py:made", {"scale": 2})) == {"scale": 2.0}


@given(values)
def test_show_and_read_are_inverse(value):
    assert read(show(value)) == value
