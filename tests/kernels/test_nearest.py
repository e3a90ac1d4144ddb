"""The search for signs: what it finds, and every implementation against the reference."""

from __future__ import annotations

import itertools

import pytest
import torch
from accuracy import DEVICE
from hypothesis import given, settings
from hypothesis import strategies as st
from test_pack import lazily
from torch import Tensor

from conftest import thinned
from signlattice import kernels
from signlattice.bits import pack_signs, sign, unpack_signs
from signlattice.errors import InputError
from signlattice.kernels import cores
from signlattice.kernels.nearest import cpu, reference, triton
from signlattice.kernels.runtime import Launch

WHERE = {"torch": DEVICE, "cpu": "cpu", "triton": DEVICE}
"""Every implementation, and the device that it is tested on."""
EACH = pytest.mark.parametrize("impl", WHERE)

# The interpreter takes milliseconds for each coordinate of a tile: sizes are small where it runs.


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def problem(
    batch: int, n_heads: int, n_tokens: int, d: int, skew: float = 0.5, device: str = "cpu"
) -> tuple[Tensor, Tensor]:
    """(c, G) of random vectors and a basis as far from an orthogonal one as ``skew`` says."""
    basis = torch.linalg.qr(torch.randn(n_heads, d, d))[0]
    basis += skew * torch.randn(n_heads, d, d) / d**0.5
    vectors = torch.randn(batch, n_heads, n_tokens, d)
    gram = basis @ basis.mT
    return (vectors @ basis.mT).to(device), ((gram + gram.mT) / 2).to(device)


def products(signs: Tensor, correlations: Tensor, gram: Tensor) -> tuple[Tensor, Tensor]:
    """cᵀs and sᵀGs in fp64."""
    s, c = signs.double(), correlations.double()
    return (s * c).sum(-1), ((s @ gram.double()) * s).sum(-1)


def distance(signs: Tensor, correlations: Tensor, gram: Tensor) -> Tensor:
    """sᵀGs − 2 cᵀs in fp64: what the search makes small."""
    along, length = products(signs, correlations, gram)
    return length - 2 * along


def assert_found(
    got: tuple[Tensor, Tensor, Tensor], correlations: Tensor, gram: Tensor, passes: int
) -> None:
    """The words of the reference, to the bit, and both products of the signs that they hold.

    What a choice rests on is a sum of c and of entries of G times 0, ±1 or ±2, which are exact, in
    an order that is given: there is no rounding in which implementations may differ.
    """
    words, *sums = got
    assert torch.equal(words, reference.nearest_signs(correlations, gram, passes)[0])
    expected = products(unpack_signs(words), correlations, gram)
    for found, exact in zip(sums, expected, strict=True):
        assert found.dtype == torch.float32 and found.is_contiguous()
        torch.testing.assert_close(found.double(), exact, rtol=1e-5, atol=1e-5 * len(gram[0]))


# What is found


def chosen_one_by_one(correlations: Tensor, gram: Tensor, passes: int) -> Tensor:
    """Each sign the better of the two by the whole sum, in fp64, given all others."""
    signs = torch.zeros_like(correlations)
    for j in list(range(signs.shape[-1])) * passes:
        plus, minus = signs.clone(), signs.clone()
        plus[..., j], minus[..., j] = 1, -1
        better = distance(plus, correlations, gram) <= distance(minus, correlations, gram)
        signs = torch.where(better[..., None], plus, minus)
    return signs


@pytest.mark.parametrize("passes", [1, 2, 5])
def test_nearest_signs_are_each_the_better_one_given_all_others(passes):
    correlations, gram = problem(2, 3, 20, 16)
    words, *_ = reference.nearest_signs(correlations, gram, passes)
    assert torch.equal(unpack_signs(words), chosen_one_by_one(correlations, gram, passes))


def test_nearest_signs_are_mostly_the_best_of_all():
    correlations, gram = problem(1, 1, 60, 16, skew=0.25)
    every = torch.tensor(list(itertools.product((-1.0, 1.0), repeat=16)), dtype=torch.float64)
    length = ((every @ gram[0].double()) * every).sum(-1)
    least = (length - 2 * correlations[0, 0].double() @ every.T).amin(-1)
    words, *_ = reference.nearest_signs(correlations, gram, 4)
    found = distance(unpack_signs(words), correlations, gram)[0, 0]
    plain = distance(sign(correlations), correlations, gram)[0, 0]
    assert (found > least - 1e-9).all()
    assert (found < least + 1e-9).double().mean() > 0.7
    assert (found - least).mean() < (plain - least).mean() / 2


@EACH
def test_nearest_signs_on_an_orthogonal_basis_are_those_of_the_correlations(impl):
    correlations = torch.randn(1, 2, 9, 16, device=WHERE[impl])
    gram = torch.eye(16, device=WHERE[impl]).repeat(2, 1, 1)
    words, along, length = kernels.nearest_signs(correlations, gram, passes=2, impl=impl)
    assert torch.equal(words, pack_signs(correlations))
    torch.testing.assert_close(along, correlations.abs().sum(-1))
    torch.testing.assert_close(length, torch.full_like(length, 16.0))


@EACH
def test_nearest_signs_with_nothing_to_tell_them_by_set_all_bits(impl):
    correlations = torch.zeros(1, 1, 2, 16, device=WHERE[impl])
    for zero in (0.0, -0.0):
        words, along, length = kernels.nearest_signs(
            correlations + zero, torch.zeros(1, 16, 16, device=WHERE[impl]), passes=1, impl=impl
        )
        assert (words == 0xFF).all() and (along == 0).all() and (length == 0).all()


@settings(max_examples=30)
@given(
    seed=st.integers(0, 2**32 - 1),
    d=st.sampled_from((16, 32, 64)),
    skew=st.floats(0, 3),
    definite=st.booleans(),
)
def test_nearest_signs_raise_the_sum_in_no_pass(seed, d, skew, definite):
    torch.manual_seed(seed)
    correlations, gram = problem(1, 2, 5, d, skew)
    if not definite:  # nor need it be: the diagonal has no part in a choice
        gram = gram - 2 * torch.diag_embed(gram.diagonal(dim1=1, dim2=2))
    sums = [
        distance(unpack_signs(cpu.nearest_signs(correlations, gram, n)[0]), correlations, gram)
        for n in range(1, 6)
    ]
    rounding = 1e-5 * d * (1 + skew) ** 2
    assert all((b <= a + rounding).all() for a, b in itertools.pairwise(sums))


@pytest.mark.parametrize("d", [16, 64])
def test_nearest_signs_after_enough_passes_have_no_better_single_flip(d):
    correlations, gram = problem(1, 2, 30, d)
    words, *_ = reference.nearest_signs(correlations, gram, 12)
    signs = unpack_signs(words)
    flipped = signs[..., None, :] * (1 - 2 * torch.eye(d))  # [1, 2, 30, flips, D]
    there = distance(signs, correlations, gram)[..., None]
    assert (distance(flipped, correlations[..., None, :], gram[:, None]) > there - 1e-4).all()
    first = unpack_signs(reference.nearest_signs(correlations, gram, 1)[0])
    assert (distance(first, correlations, gram) > there[..., 0] + 1e-4).any()


# Each implementation


@pytest.mark.parametrize("passes", [1, 3])
@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 3, 63), (2, 1, 63), (2, 3, 1)])
@pytest.mark.parametrize("d", thinned(kernels.HEAD_DIMS, every=2))
def test_nearest_signs_on_a_processor_are_those_of_the_reference(d, shape, passes):
    correlations, gram = problem(*shape, d)
    got = kernels.nearest_signs(correlations, gram, passes=passes, impl="cpu")
    assert_found(got, correlations, gram, passes)


@pytest.mark.parametrize(("seed", "shape"), [(1001, (2, 3, 41)), (180, (1, 1, 300))])
def test_nearest_signs_on_a_processor_add_up_in_the_order_of_the_reference(seed, shape):
    """In each a vector has a sum within 1e-6 of zero: another order of terms changes its sign."""
    torch.manual_seed(seed)
    correlations, gram = problem(*shape, 512)
    got = kernels.nearest_signs(correlations, gram, passes=2, impl="cpu")
    assert_found(got, correlations, gram, 2)


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_nearest_signs_share_the_vectors_among_threads(threads, monkeypatch):
    correlations, gram = problem(2, 3, 41, 32)
    used = []

    def counted(work, n, run_on_all_threads=cores.run_on_all_threads):
        used.append(n)
        run_on_all_threads(work, n)

    monkeypatch.setattr(cpu, "run_on_all_threads", counted)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    assert_found(cpu.nearest_signs(correlations, gram, 2), correlations, gram, 2)
    cpu.nearest_signs(correlations[:, :, :1], gram, 2)
    assert used == [min(threads, 246 // cpu.LEAST_PIECE), 1]


@pytest.mark.parametrize("d", thinned(kernels.HEAD_DIMS, every=5))
def test_nearest_signs_on_a_gpu_are_those_of_the_reference(d, monkeypatch):
    monkeypatch.setattr(triton, "FEW", 0)  # so that two vectors are a tile, as many are
    correlations, gram = problem(1, 1, 2, d, device=DEVICE)
    got = kernels.nearest_signs(correlations, gram, passes=2, impl="triton")
    assert_found(got, correlations, gram, 2)


@pytest.mark.parametrize(
    ("shape", "d", "passes"),
    [
        ((1, 1, 1), 80, 3),
        ((2, 3, 1), 16, 3),
        pytest.param((2, 3, 63), 16, 3, marks=pytest.mark.exhaustive),
        pytest.param((2, 1, 63), 80, 1, marks=pytest.mark.exhaustive),
        pytest.param((1, 1, 63), 128, 1, marks=pytest.mark.exhaustive),
        pytest.param((1, 3, 17), 64, 2, marks=pytest.mark.exhaustive),
        ((1, 3, 17), 32, 2),
    ],
)
def test_nearest_signs_on_a_gpu_take_any_number_of_vectors_and_passes(shape, d, passes):
    correlations, gram = problem(*shape, d, device=DEVICE)
    got = kernels.nearest_signs(correlations, gram, passes=passes, impl="triton")
    assert_found(got, correlations, gram, passes)


@EACH
@pytest.mark.parametrize("axes", [(0, 2, 1, 3), (0, 1, 3, 2), (3, 1, 2, 0)])
def test_nearest_signs_take_vectors_of_any_layout(axes, impl):
    shape = tuple((1, 2, 5, 16)[axis] for axis in axes)
    correlations = torch.randn(shape, device=WHERE[impl]).permute(
        *(axes.index(axis) for axis in range(4))
    )
    gram = problem(1, 2, 1, 16, device=WHERE[impl])[1]
    gram = gram.permute(1, 2, 0).contiguous().permute(2, 0, 1)
    assert not correlations.is_contiguous() and not gram.is_contiguous()
    before = correlations.clone(), gram.clone()
    got = kernels.nearest_signs(correlations, gram, passes=1, impl=impl)
    assert_found(got, correlations, gram, 1)
    assert torch.equal(correlations, before[0]) and torch.equal(gram, before[1])


@EACH
@pytest.mark.parametrize("shape", [(0, 2, 3), (2, 2, 0), (2, 0, 3)])
def test_nearest_signs_of_no_vectors_are_no_words(shape, impl):
    correlations = torch.empty(*shape, 64, device=WHERE[impl])
    gram = torch.zeros(shape[1], 64, 64, device=WHERE[impl])
    words, along, length = kernels.nearest_signs(correlations, gram, impl=impl)
    assert words.shape == (*shape, 8) and words.dtype == torch.uint8
    assert along.shape == length.shape == shape


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_nearest_signs_take_vectors_beyond_2_31_numbers(axis):
    shape, strides = [1, 1, 1, 16], [16, 16, 16, 1]
    shape[axis], strides[axis] = 3, 2**30 + 16
    reach = 2 * strides[axis] + 16
    # what an offset of 32 bits would wrap to lies before the vectors, in the same buffer
    far = lazily(2 * reach, torch.float32).as_strided(shape, strides, reach)
    near, gram = problem(*shape, device=DEVICE)
    far.copy_(near)
    assert_found(kernels.nearest_signs(far, gram, passes=1, impl="triton"), near, gram, 1)


# What is refused

VECTORS, GRAM = torch.zeros(2, 3, 4, 64), torch.zeros(3, 64, 64)
REFUSED = {
    "three axes": ({"correlations": torch.zeros(3, 4, 64)}, r"correlations of .* \[B, H, T, D\]"),
    "head size": ({"correlations": torch.zeros(2, 3, 4, 72)}, "head_dim 72"),
    "fp16": ({"correlations": VECTORS.half()}, "correlations is torch.float16: use float32"),
    "fp64": ({"correlations": VECTORS.double()}, "correlations is torch.float64: use float32"),
    "one matrix for all heads": ({"gram": GRAM[0]}, r"gram of shape \[64, 64\]"),
    "matrices of other heads": ({"gram": GRAM[:2]}, r"gram of shape \[2, 64, 64\]"),
    "matrix of another size": ({"gram": torch.zeros(3, 80, 80)}, r"gram of shape \[3, 80, 80\]"),
    "matrix of fp64": ({"gram": GRAM.double()}, "gram is torch.float64"),
    "matrix on another device": ({"gram": GRAM.to("meta")}, "gram on meta"),
    "no pass": ({"passes": 0}, "passes=0"),
    "passes below zero": ({"passes": -1}, "passes=-1"),
    "too many vectors": (
        {"correlations": torch.zeros(1).expand(2**20, 3, 2**10, 64)},
        "1073741824 rows",
    ),
    "impl": ({"impl": "numba"}, "impl='numba': nearest has auto, torch, triton, cpu"),
}


@EACH
@pytest.mark.parametrize("case", REFUSED)
def test_nearest_signs_refuses(case, impl, monkeypatch):
    def launched(*arguments: object) -> None:
        pytest.fail("a kernel was launched on bad input")

    monkeypatch.setattr(Launch, "__call__", launched)
    wrong, message = REFUSED[case]
    arguments = {"correlations": VECTORS, "gram": GRAM, "passes": 2, "impl": impl} | wrong
    with pytest.raises(InputError, match=message):
        kernels.nearest_signs(**arguments)


def test_nearest_signs_on_a_processor_refuses_tensors_that_are_elsewhere():
    with pytest.raises(InputError, match="impl='cpu' on meta tensors"):
        kernels.nearest_signs(VECTORS.to("meta"), GRAM.to("meta"), impl="cpu")


def test_chosen_nearest_is_compiled_wherever_the_vectors_are():
    assert kernels.chosen("nearest", "auto", torch.device("cuda")) == "triton"
    assert kernels.chosen("nearest", "auto", torch.device("cpu")) == "cpu"
