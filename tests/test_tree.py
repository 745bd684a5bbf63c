import math
from collections import OrderedDict
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bilevel import _tree
from bilevel._errors import StructureError

TREES: list[Any] = [
    torch.tensor([1.0, -2.0, 3.0]),
    torch.tensor(2.0),
    torch.arange(6.0).reshape(2, 3),
    {"b": torch.ones(2), "a": torch.zeros(1)},
    [torch.ones(2), (torch.zeros(1, 2), {"w": torch.tensor(5.0)})],
    OrderedDict(z=torch.ones(1), a=torch.full((3,), 2.0)),
]


@st.composite
def trees(draw: st.DrawFn) -> Any:
    """Nested dicts, lists and tuples of small float64 tensors."""
    shape = st.lists(st.integers(1, 3), max_size=2).map(tuple)
    seed = st.integers(0, 2**31)
    leaf = st.builds(
        lambda s, n: torch.randn(
            s, dtype=torch.float64, generator=torch.Generator().manual_seed(n)
        ),
        shape,
        seed,
    )
    return draw(
        st.recursive(
            leaf,
            lambda part: (
                st.lists(part, min_size=1, max_size=3)
                | st.tuples(part, part)
                | st.dictionaries(st.sampled_from("abc"), part, min_size=1)
            ),
            max_leaves=6,
        )
    )


def flat(tree: Any) -> torch.Tensor:
    return torch.cat([leaf.reshape(-1) for leaf in _tree.leaves(tree)])


@given(tree=trees())
def test_ravel_and_back_is_the_tree(tree: Any) -> None:
    vector, unravel = _tree.ravel(tree)
    assert vector.dim() == 1
    assert vector.numel() == _tree.size(tree)
    back = unravel(vector)
    _tree.check_like(back, tree, "back")
    assert all(map(torch.equal, _tree.leaves(back), _tree.leaves(tree)))


@given(tree=trees(), scale=st.floats(-3.0, 3.0))
def test_algebra_is_that_of_the_vector(tree: Any, scale: float) -> None:
    v = flat(tree)
    torch.testing.assert_close(_tree.norm(tree), v.norm())
    torch.testing.assert_close(_tree.vdot(tree, tree), v @ v)
    combined = _tree.axpy(scale, tree, tree)
    torch.testing.assert_close(flat(combined), (scale + 1.0) * v)
    assert torch.equal(flat(_tree.zeros_like(tree)), torch.zeros_like(v))


@pytest.mark.parametrize("scale", [1.0, -1.0, 0.3, 2, torch.tensor(0.7).double()], ids=str)
@pytest.mark.parametrize(
    "dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str
)
def test_algebra_over_lists_is_that_leaf_by_leaf_bit_for_bit(
    dtype: torch.dtype, scale: Any
) -> None:
    generator = torch.Generator().manual_seed(0)

    def tree() -> Any:
        a, b, c = (torch.randn(s, generator=generator) for s in ((4, 3, 1, 1), (), (4, 3)))
        return {"a": a.to(dtype, memory_format=torch.channels_last), "b": [b.to(dtype), (c,)]}

    left, right = tree(), tree()
    right["b"][1] = (right["b"][1][0].reshape(3, 4).T,)  # of another layout
    pairs = list(zip(_tree.leaves(left), _tree.leaves(right), strict=True))
    found = [_tree.axpy(scale, left, right), _tree.scale(scale, left)]
    expected = [*(b + a * scale for a, b in pairs), *(a * scale for a, _ in pairs)]
    for leaf, reference in zip(_tree.leaves(found), expected, strict=True):
        assert torch.equal(leaf, reference)
        assert (leaf.dtype, leaf.stride()) == (reference.dtype, reference.stride())


def test_dictionaries_are_ordered_by_key() -> None:
    tree = {"b": torch.ones(1), "a": torch.zeros(1)}
    assert [float(leaf) for leaf in _tree.leaves(tree)] == [0.0, 1.0]
    assert _tree.names(tree) == ["['a']", "['b']"]
    assert _tree.names([{"w": torch.ones(1)}]) == ["[0]['w']"]
    assert _tree.names(torch.ones(1)) == [""]


def test_ravel_of_several_dtypes_meets_in_the_widest_and_returns() -> None:
    tree = {"a": torch.ones(2, dtype=torch.float32), "b": torch.ones(1, dtype=torch.float64)}
    vector, unravel = _tree.ravel(tree)
    assert vector.dtype == torch.float64
    back = unravel(2.0 * vector)
    assert {name: leaf.dtype for name, leaf in back.items()} == {
        "a": torch.float32,
        "b": torch.float64,
    }


def test_vector_comes_back_in_its_own_dtype() -> None:
    _, unravel = _tree.ravel(torch.zeros(2))
    assert unravel(torch.ones(2).double()).dtype == torch.float32


def test_ravel_keeps_the_graph() -> None:
    tree = {"a": torch.ones(2, requires_grad=True), "b": torch.ones(1, requires_grad=True)}
    vector, _ = _tree.ravel(tree)
    (vector * torch.tensor([1.0, 2.0, 3.0])).sum().backward()
    assert tree["a"].grad is not None
    assert tree["a"].grad.tolist() == [1.0, 2.0]


@pytest.mark.parametrize("tree", TREES, ids=lambda tree: type(tree).__name__)
def test_detach_shares_nothing(tree: Any) -> None:
    copy = _tree.detach(tree)
    for leaf in _tree.leaves(copy):
        leaf += 1.0
    assert torch.equal(flat(copy) - flat(tree), torch.ones(_tree.size(tree)))
    assert type(copy) is type(tree)


def test_is_finite_sees_every_leaf() -> None:
    assert _tree.is_finite({"a": torch.ones(2), "b": torch.zeros(1)})
    assert not _tree.is_finite({"a": torch.ones(2), "b": torch.tensor([float("nan")])})
    assert not _tree.is_finite([torch.tensor(float("inf"))])
    assert not _tree.is_finite(torch.tensor([float("inf"), -float("inf")]))


@pytest.mark.parametrize(("dtype", "large"), [(torch.float64, 1e308), (torch.float16, 6e4)])
def test_large_entries_are_finite_though_their_sum_is_not(dtype: torch.dtype, large: float) -> None:
    assert _tree.is_finite(torch.full((100,), large, dtype=dtype))


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({}, r"`x0` must hold at least one tensor\. Got an empty tree: \{\}"),
        ([], r"at least one tensor\. Got an empty tree: \[\]"),
        ({"w": 1.0}, r"`x0\['w'\]` must be a tensor\. Got float"),
        (3, r"`x0` must be a tensor\. Got int"),
        (torch.arange(3), r"`x0` must be a floating-point tensor\. Got dtype torch\.int64"),
        ([torch.ones(1), torch.tensor([True])], r"`x0\[1\]` must be .*torch\.bool"),
    ],
)
def test_wrong_variable_says_the_rule(tree: Any, message: str) -> None:
    with pytest.raises(StructureError, match=message):
        _tree.check_variable(tree, "x0")


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({"b": torch.ones(2)}, r"must have the structure \[\"\['a'\]\"\]\. Got \[\"\['b'\]\"\]"),
        ({"a": torch.ones(3)}, r"`y\['a'\]` must have shape \(2,\)"),
        ({"a": torch.ones(2).double()}, r"Got \(2,\) and torch\.float64"),
    ],
)
def test_unlike_tree_says_the_rule(tree: Any, message: str) -> None:
    with pytest.raises(StructureError, match=message):
        _tree.check_like(tree, {"a": torch.ones(2)}, "y")


@pytest.mark.parametrize(
    ("tree", "reference", "message"),
    [
        (1.0, torch.ones(1), r"`w` must be a tensor\. Got float"),
        ({"a": None}, {"a": torch.ones(1)}, r"must have the structure"),
        ([torch.ones(1)], (torch.ones(1),), r"same dicts, lists and tuples as tuple.*Got list"),
        ([torch.ones(1)], torch.ones(1), r"must have the structure \[''\]"),
        (OrderedDict(a=torch.ones(1)), {"a": torch.ones(1)}, r"Got OrderedDict"),
    ],
)
def test_unlike_containers_say_the_rule(tree: Any, reference: Any, message: str) -> None:
    with pytest.raises(StructureError, match=message):
        _tree.check_like(tree, reference, "w")


@pytest.mark.parametrize("tree", TREES, ids=lambda tree: type(tree).__name__)
def test_good_variable_passes(tree: Any) -> None:
    _tree.check_variable(tree, "x0")
    _tree.check_like(tree, _tree.detach(tree), "x0")


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("scale", [6e-5, 1.0, 6e3])
def test_length_of_numbers_whose_squares_do_not_fit(dtype: torch.dtype, scale: float) -> None:
    power = 1 if dtype is torch.float16 else 8 if scale != 1.0 else 1
    entry = scale**power  # 1e-34 to 1e30 in float32
    for tree in (
        torch.tensor([3.0, 4.0], dtype=torch.float64).mul(entry).to(dtype),
        [torch.full((1, 3), entry, dtype=dtype), torch.full((22,), entry, dtype=dtype)],
    ):
        assert _tree.length(tree) == pytest.approx(5.0 * entry, rel=2e-3)


def test_length_of_zeros_and_of_what_is_not_finite() -> None:
    empty = torch.zeros(0)
    assert _tree.length(torch.zeros(3)) == 0.0
    assert _tree.length([empty, torch.zeros(2)]) == 0.0
    assert _tree.length([torch.full((2, 2), 1e200, dtype=torch.float64)]) == 2e200
    assert _tree.length(torch.tensor([1.0, math.inf])) == math.inf
    assert math.isnan(_tree.length(torch.tensor([1.0, math.nan, 2.0])))
    assert math.isnan(_tree.length([torch.tensor([math.nan]), torch.ones(2, 2)]))
