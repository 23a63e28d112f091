"""Parameters come in any form: iterables, pairs, mappings, groups of each; a generator is read once."""

import pytest
from problems import bits, gradients_for, random_arrays
from rmsprop import Parameter, RMSprop

SHAPES = ((3, 2), (4,))
NAMES = ["w", "b"]


def named(params):
    return dict(zip(NAMES, params, strict=True))


UNNAMED = {
    "list": list,
    "tuple": tuple,
    "generator": iter,
    "values of a dict": lambda params: named(params).values(),
}
NAMED = {
    "pairs": lambda params: list(named(params).items()),
    "generator of pairs": lambda params: iter(named(params).items()),
    "items of a dict": lambda params: named(params).items(),
    "mapping": named,
}
FORMS = {**UNNAMED, **NAMED}
WRAPPED = {
    "as it is": lambda made: made,
    "a group": lambda made: {"params": made},
    "a list of a group": lambda made: [{"params": made}],
    "a generator of a group": lambda made: iter([{"params": made}]),
}
MAKE = {
    "ndarray": lambda array: array,
    "Parameter": Parameter,
    "contiguous": Parameter,
}


@pytest.mark.parametrize("kind", MAKE)
@pytest.mark.parametrize("wrapped", WRAPPED)
@pytest.mark.parametrize("form", FORMS)
def test_form(form, wrapped, kind):
    params = [MAKE[kind](array) for array in random_arrays(0, SHAPES)]
    given = WRAPPED[wrapped](FORMS[form](params))
    opt = RMSprop(given, contiguous_params=kind == "contiguous")
    (group,) = opt.param_groups
    assert isinstance(group["params"], tuple)
    assert all(
        kept is param for kept, param in zip(group["params"], params, strict=True)
    )
    assert group.get("param_names") == (NAMES if form in NAMED else None)

    expected, grads = random_arrays(0, SHAPES), gradients_for(params, seed=1)
    RMSprop(expected).step(grads=grads)
    opt.step(grads=grads)
    assert bits(params) == bits(expected)


@pytest.mark.parametrize("form", FORMS)
def test_form_in_an_added_group(form, contiguous):
    first, *added = [Parameter(array) for array in random_arrays(0, ((2,), *SHAPES))]
    opt = RMSprop(
        {"first": first} if form in NAMED else [first], contiguous_params=contiguous
    )
    opt.add_param_group({"params": FORMS[form](added)})
    group = opt.param_groups[1]
    assert all(
        kept is param for kept, param in zip(group["params"], added, strict=True)
    )
    assert group.get("param_names") == (NAMES if form in NAMED else None)


def test_names_of_parameters():
    params = [
        Parameter(array, name) for array, name in zip(random_arrays(0, SHAPES), NAMES)
    ]
    assert RMSprop(params).param_groups[0]["param_names"] == NAMES


def test_groups_may_mix_forms():
    first, second, third = random_arrays(0, ((2,), *SHAPES))
    opt = RMSprop(
        [{"params": {"first": first}}, {"params": iter(named([second, third]).items())}]
    )
    assert [group["param_names"] for group in opt.param_groups] == [["first"], NAMES]
