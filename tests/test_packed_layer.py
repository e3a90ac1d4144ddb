"""One layer of the compressed cache, held to its definition whatever way its tokens come."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from random import Random

import pytest
import torch
from torch import Tensor

from cache_cases import DEVICES, difference, held, layer_code
from conftest import thinned
from signlattice.cache.layer import BLOCK, LayerFormat, PackedLayer
from signlattice.cache.masks import MaskCache
from signlattice.cache.storage import KEY_FORMATS, PAGE, VALUE_FORMATS, key_storage, value_storage
from signlattice.errors import InputError
from signlattice.models.hooks import AttentionCall, AttentionLayer
from signlattice.quantizers.sign import SignQuantizer

pytestmark = pytest.mark.usefixtures("one_thread", "no_grad")

HEADS, GROUP, D = 2, 2, 16
LATER = 7

TOLERANCE = {torch.float32: 2e-6, torch.float16: 3e-3, torch.bfloat16: 2e-2}
"""Of ‖got − expected‖ / ‖expected‖ over all outputs of an attention call: a few roundings of the
query's dtype. A query that saw one token more, or one whole that should be packed, is off by
0.01 and more."""


@dataclass(frozen=True)
class Case:
    """A layer, what it keeps, and how many tokens of padding each sequence begins with."""

    code: str | None = "rotation"
    centering: str = "token_mean"
    keys: str = "sign"
    values: str = "int8"
    window: int = 16
    sinks: int = 4
    spare: int = 8
    sliding: int | None = None
    softcap: float | None = None
    sink_logits: bool = False
    impl: str = "torch"  # kernels are held to it elsewhere, and each compiles for itself
    dtype: torch.dtype = torch.float32
    starts: tuple[int, ...] = (0, 0)
    n: int = 80
    device: str = "cpu"
    chunked: bool = False  # sliding is the length of chunks that a query does not see beyond
    form: str = "bool"  # of the mask: else hidden by "inf" or the dtype's "least"
    holes: float = 0.0  # share of earlier tokens that a query does not see
    later: bool = False  # whether queries of the first call see all its tokens
    biased: bool = False  # whether the mask, or position_bias beside a bool one, adds to scores
    per_head: bool = False  # whether heads have masks of their own

    @property
    def layer_code(self) -> SignQuantizer | None:
        if self.keys != "sign":
            return None
        return layer_code(self.code, HEADS, D, self.centering).to(torch.device(self.device))

    @property
    def logits(self) -> Tensor | None:
        if not self.sink_logits:
            return None
        return torch.linspace(-1, 2, HEADS * GROUP, device=self.device)

    def layer(self) -> PackedLayer:
        attention = AttentionLayer(
            index=0,
            source=0,
            n_heads=HEADS,
            n_query_heads=HEADS * GROUP,
            head_dim=D,
            scaling=1.0,  # not that of the calls, which counts
            window=self.sliding,
            softcap=self.softcap,
            sinks=self.sink_logits,
            chunked=self.chunked,
        )
        fmt = LayerFormat(
            self.keys, self.values, self.window, self.sinks, self.spare, None, self.impl
        )
        return PackedLayer(attention, fmt, self.layer_code, MaskCache())


@dataclass(frozen=True)
class Tokens:
    """Queries [B, Hq, T, D], keys and values [B, H, T, D]."""

    query: Tensor
    keys: Tensor
    values: Tensor

    def map(self, change: Callable[[Tensor], Tensor]) -> Tokens:
        return Tokens(*(change(part) for part in (self.query, self.keys, self.values)))

    def part(self, first: int, last: int) -> Tokens:
        return self.map(lambda part: part[:, :, first:last])


def given(case: Case, seed: int = 0) -> Tokens:
    generator = torch.Generator().manual_seed(seed)

    def random(heads: int) -> Tensor:
        x = torch.randn(len(case.starts), heads, case.n, D, generator=generator)
        return x.to(case.device, case.dtype)

    return Tokens(random(HEADS * GROUP), random(HEADS), random(HEADS))


@lru_cache(8)
def visible(case: Case) -> Tensor:
    """bool [B, 1 or Hq, T, T]: which tokens a query may look at."""
    i, j = torch.arange(case.n)[:, None], torch.arange(case.n)
    starts = torch.tensor(case.starts)[:, None, None, None]
    near = torch.tensor(True)
    if case.chunked:
        near = (j - starts) // case.sliding == (i - starts) // case.sliding
    elif case.sliding is not None:
        near = j > i - case.sliding
    generator = torch.Generator().manual_seed(0)
    shape = len(case.starts), HEADS * GROUP if case.per_head else 1, case.n, case.n
    there = torch.rand(shape, generator=generator) >= case.holes
    causal = j <= i
    if case.later:
        causal = causal | ((i < LATER) & (j < LATER))
    return (causal & (j >= starts) & near & (there | (i == j))).to(case.device)


@lru_cache(8)
def bias(case: Case) -> Tensor:
    """[B, 1 or Hq, T, T]: what is added to the scores."""
    generator = torch.Generator().manual_seed(1)
    values = torch.randn(visible(case).shape, generator=generator).to(case.device, case.dtype)
    return values if case.biased else torch.zeros_like(values)


def mask_and_bias(case: Case, part: tuple[slice, ...]) -> tuple[Tensor, Tensor | None]:
    """Attention mask and position bias of some queries and tokens, in the form of the case."""
    shown, added = visible(case)[part], bias(case)[part]
    if case.form == "bool":
        return shown, added if case.biased else None
    hidden = -torch.inf if case.form == "inf" else torch.finfo(case.dtype).min
    return added.masked_fill(~shown, hidden), None


def by_definition(case: Case, x: Tokens) -> Tensor:
    """A query sees whole what is near or a sink, and else what the codec reads back.

    In fp64, with the mean still on the keys: that it cancels is the layer's claim.
    """
    code = case.layer_code
    if code is not None:
        packed_keys = code.decode(code.encode(x.keys)).double()
    else:
        packed_keys = reconstruct(key_storage(case.keys, case.dtype, None, "auto"), x.keys)
    packed_values = reconstruct(value_storage(case.values, case.dtype), x.values)
    i, j = torch.arange(case.n)[:, None], torch.arange(case.n)
    starts = torch.tensor(case.starts)[:, None, None]
    whole = (j > i - case.window) | ((j >= starts) & (j < starts + case.sinks))
    whole = whole[:, None, None].to(case.device)  # [B, 1, 1, T, T]
    query = x.query.double().unflatten(1, (HEADS, GROUP))

    def scores(keys: Tensor) -> Tensor:
        found = 0.3 * query @ keys.double()[:, :, None].mT
        return found if case.softcap is None else case.softcap * (found / case.softcap).tanh()

    def by_group(heads: Tensor) -> Tensor:  # [B, 1 or Hq, T, T] as [B, 1 or H, 1 or G, T, T]
        return heads[:, None] if heads.shape[1] == 1 else heads.unflatten(1, (HEADS, GROUP))

    seen = torch.where(whole, scores(x.keys), scores(packed_keys)) + by_group(bias(case))
    seen = seen.masked_fill(~by_group(visible(case)), -torch.inf)
    if case.sink_logits:
        own = case.logits.double().view(1, HEADS, GROUP, 1, 1)
        seen = torch.cat((seen, own.expand(*seen.shape[:-1], 1)), -1)
    weights = seen.softmax(-1).nan_to_num(0.0)[..., : case.n]
    near_values = (weights * whole) @ x.values.double()[:, :, None]
    far_values = (weights * ~whole) @ packed_values.double()[:, :, None]
    return (near_values + far_values).flatten(1, 2)


def reconstruct(store, vectors: Tensor) -> Tensor:
    store.append(0, vectors)
    return store.read(0, vectors.shape[2], torch.float32).double()


def run(case: Case, x: Tokens, sizes: tuple[int, ...], layer: PackedLayer | None = None) -> Tensor:
    """What a layer makes of tokens that come in calls of such sizes; the rest is the last call."""
    layer = case.layer() if layer is None else layer
    at, outputs = layer.n_tokens, []
    sinks = None if case.logits is None else case.logits.view(1, -1, 1, 1)
    call = AttentionCall(0.3, case.softcap, sinks)
    masked = any(case.starts) or case.sliding is not None
    masked |= case.form != "bool" or case.holes > 0 or case.later or case.biased
    for size in (*sizes, x.query.shape[2] - at - sum(sizes)):
        if not size:
            continue
        new = x.part(at, at + size)
        length, offset = layer.get_mask_sizes(size)
        here = slice(None), slice(None), slice(at, at + size), slice(offset, offset + length)
        mask, added = mask_and_bias(case, here) if masked else (None, None)
        keys, values = layer.update(new.keys, new.values)
        assert keys is values
        outputs.append(keys.attend(new.query, replace(call, mask=mask, bias=added)))
        at += size
    return torch.cat(outputs, 2)


WAYS = {"at once": (), "odd": (7, 63, 1, 1, 1), "one by one": (1,) * 79}


def check(case: Case, way: str, seed: int = 0) -> None:
    x = given(case, seed)
    got, expected = run(case, x, WAYS[way]), by_definition(case, x)
    assert got.dtype == case.dtype
    real = torch.arange(case.n) >= torch.tensor(case.starts)[:, None]
    keep = real[:, None, :, None].to(case.device)
    assert difference(got * keep, expected * keep) < TOLERANCE[case.dtype]


def random_case(seed: int) -> tuple[Case, tuple[int, ...]]:
    """A configuration of a layer and its masks, and the sizes of the calls that tokens come in."""
    draw = Random(seed)
    softcap, sink_logits = draw.choice([None, None, 3.0]), draw.random() < 0.25
    cancels = softcap is None and not sink_logits
    sliding = draw.choice([None, None, 9, 24])
    window = draw.choice([0, 1, 5, 16, 64])
    later = draw.random() < 0.2
    case = Case(
        code=draw.choice(["rotation", "lattice"]),
        centering=draw.choice(["token_mean", "none"] if cancels else ["none"]),
        keys=draw.choice(["sign", "sign", *KEY_FORMATS]),
        values=draw.choice(VALUE_FORMATS),
        window=window if sliding is None else min(window, sliding),
        sinks=draw.choice([0, 1, 4]) if sliding is None else 0,
        sliding=sliding,
        softcap=softcap,
        sink_logits=sink_logits,
        starts=draw.choice([(0, 0), (0, 5), (3, 30)]),
        chunked=sliding is not None and draw.random() < 0.5,
        form=draw.choice(["bool", "inf", "least"]),
        holes=draw.choice([0.0, 0.0, 0.3]),
        later=later,
        biased=draw.random() < 0.3,
        per_head=draw.random() < 0.4,
    )
    sizes = [LATER] if later else []
    while (left := case.n - sum(sizes)) > 0:
        sizes.append(min(left, draw.choice([1, 1, 2, 7, 30])))
    return case, tuple(sizes[:-1])


@pytest.mark.parametrize("seed", thinned(range(400), every=40))
def test_packed_layer_agrees_with_a_model_of_it_in_double_precision(seed):
    case, sizes = random_case(seed)
    x = given(case, seed)
    got, expected = run(case, x, sizes), by_definition(case, x)
    real = torch.arange(case.n) >= torch.tensor(case.starts)[:, None]
    keep = real[:, None, :, None]
    assert difference(got * keep, expected * keep) < 1e-5


PRODUCT = itertools.product(
    ["rotation", "lattice"], ["full", "int8", "int4", "int2"], [0, 1, 16, 64], [0, 4]
)


@pytest.mark.parametrize("case", thinned(PRODUCT, every=15), ids=str)
def test_packed_layer_attends_alike_however_tokens_come(case):
    code, values, window, sinks = case
    for way in ("at once", "odd"):
        check(Case(code, values=values, window=window, sinks=sinks), way)


@pytest.mark.parametrize(
    "case",
    [Case(code, values=values) for code in ("rotation", "lattice") for values in VALUE_FORMATS]
    + [Case(window=window, sinks=sinks) for window in (0, 1, 64) for sinks in (0, 4)],
)
def test_packed_layer_shows_a_query_the_same_token_by_token(case):
    check(case, "one by one")


@pytest.mark.parametrize("way", thinned(WAYS, 2))
@pytest.mark.parametrize(
    "case",
    [
        Case("lattice", values="int4"),
        Case(impl="cpu", values="int2"),
        Case("lattice", impl="cpu", values="int4"),
        Case(centering="dc"),
        Case(centering="none", softcap=2.0),
        Case("lattice", centering="none", softcap=2.0, starts=(0, 21)),
        Case(centering="none", sink_logits=True),
        Case(centering="none", sink_logits=True, softcap=2.0, starts=(0, 21)),
        Case(window=100),
        Case(sinks=90),
        Case(sliding=24, sinks=0),
        Case(sliding=24, sinks=0, window=24),
        Case("lattice", sliding=10, sinks=0, window=0, values="int2"),
        Case(sliding=1, sinks=0, window=1),
        Case(sliding=24, sinks=0, centering="none", softcap=2.0, starts=(0, 70)),
    ],
)
def test_packed_layer_of_other_kinds_keeps_to_the_definition(case, way):
    check(case, way)


@pytest.mark.parametrize("way", thinned(WAYS, 2))
@pytest.mark.parametrize("keys", [fmt for fmt in KEY_FORMATS if fmt != "sign"])
def test_packed_layer_with_other_keys_keeps_to_the_definition(keys, way):
    check(Case(keys=keys, values="int8", starts=(0, 13)), way)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("way", ["at once", "odd"])
@pytest.mark.parametrize(
    "case",
    [
        Case("lattice", values="int8", dtype=torch.float16),
        Case("lattice", values="full", dtype=torch.bfloat16),
    ],
)
def test_packed_layer_in_half_precision_keeps_to_the_definition(case, way, device):
    """A lattice: its signs are searched for in fp32, while a key that is rotated in half precision
    may come out with other signs near zero (`kernels.pack_into`)."""
    case = replace(case, starts=(0, 9), device=device)
    check(case, way)
    check(replace(case, sliding=24, sinks=0), way)


@pytest.mark.parametrize("starts", [(0, 0), (0, 200)])
def test_packed_layer_reads_a_prompt_of_several_blocks(starts):
    case = Case(n=2 * BLOCK + 30, starts=starts)
    x = given(case)
    expected = by_definition(case, x)
    for sizes in ((), (BLOCK + 1,)):
        got = run(case, x, sizes)
        assert difference(got[0], expected[0]) < TOLERANCE[case.dtype]
        assert difference(got[1, :, starts[1] :], expected[1, :, starts[1] :]) < 2e-6


# Batches.

PADDED = [
    Case(starts=(0, 5, 33)),
    Case("lattice", values="int2", window=0, starts=(0, 5, 33)),
    Case(values="full", window=64, sinks=0, starts=(0, 5, 33)),
    Case(sliding=20, sinks=0, starts=(0, 5, 33)),
    Case(keys="int4", values="fp8", starts=(0, 5, 33)),
    Case(centering="none", sink_logits=True, starts=(0, 5, 33)),
]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("case", PADDED)
def test_packed_layer_reads_a_sequence_the_same_alone_and_padded_in_a_batch(case, way):
    """Its sinks are its own first tokens, whatever comes before them.

    The odd calls begin with one that is nothing but padding for the third.
    """
    x = given(case)
    batch = run(case, x, WAYS[way])
    assert batch.isfinite().all()  # a query that is padding sees nothing, and is not NaN
    for b, start in enumerate(case.starts):
        alone = x.map(lambda part, b=b, start=start: part[b : b + 1, :, start:])
        got = run(replace(case, starts=(0,), n=case.n - start), alone, ())
        assert difference(batch[b, :, start:], got[0]) < TOLERANCE[case.dtype]


@pytest.mark.parametrize("way", ["at once", "one by one"])
def test_packed_layer_ignores_what_lies_in_the_padding(way):
    case = Case(starts=(0, 33))
    x, other = given(case), given(case, seed=1)
    changed = Tokens(*(part.clone() for part in (x.query, x.keys, x.values)))
    for part, from_other in zip(vars(changed).values(), vars(other).values()):
        part[1, :, :33] = 50 * from_other[1, :, :33]
    got, expected = run(case, changed, WAYS[way]), run(case, x, WAYS[way])
    assert torch.equal(got[0], expected[0]) and torch.equal(got[1, :, 33:], expected[1, :, 33:])


CHANGES = {
    "reorder": lambda layer: layer.reorder_cache(torch.tensor([2, 0, 0])),
    "repeat": lambda layer: layer.batch_repeat_interleave(2),
    "select": lambda layer: layer.batch_select_indices(torch.tensor([2, 1])),
}
ORDERS = {"reorder": [2, 0, 0], "repeat": [0, 0, 1, 1, 2, 2], "select": [2, 1]}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("case", PADDED)
def test_packed_layer_changes_of_the_batch_reach_every_part(case, change):
    x, order = given(case), torch.tensor(ORDERS[change])
    moved = replace(case, starts=tuple(case.starts[b] for b in order))
    layer, expected = case.layer(), moved.layer()
    reordered = x.map(lambda part: part[order])
    run(case, x.part(0, 60), (60,), layer)
    CHANGES[change](layer)
    run(moved, reordered.part(0, 60), (60,), expected)
    for name, tensor in held(expected).items():
        torch.testing.assert_close(held(layer)[name], tensor, msg=name)
    got = run(moved, reordered, (1,) * 19, layer)
    assert difference(got, run(moved, reordered, (1,) * 19, expected)) < TOLERANCE[case.dtype]


def test_packed_layer_update_refuses_a_batch_of_another_size():
    case = Case()
    layer, x = case.layer(), given(case)
    layer.update(x.keys, x.values)
    with pytest.raises(InputError, match="1 sequences for a cache that holds 2"):
        layer.update(x.keys[:1], x.values[:1])


@pytest.mark.parametrize("shape", [(2, 3, 5, 16), (2, 2, 5, 32)])
def test_packed_layer_update_refuses_keys_of_another_shape(shape):
    other = torch.zeros(shape)
    with pytest.raises(InputError, match=r"heads of .* this cache was made for a model with 2 of"):
        Case().layer().update(other, other)


def test_packed_layer_reset_makes_it_as_new():
    case = Case(starts=(0, 5))
    layer, x = case.layer(), given(case)
    run(case, given(case, seed=1), (), layer)
    layer.reset()
    assert layer.get_seq_length() == 0 and not layer.is_initialized
    assert torch.equal(run(case, x, (70,), layer), run(case, x, (70,)))


def test_packed_kv_refuses_to_go_to_another_device():
    case = Case()
    tokens, _ = case.layer().update(given(case).keys, given(case).values)
    assert tokens.to(torch.device("cpu")) is tokens
    with pytest.raises(InputError, match="put both on one device"):
        tokens.to(torch.device("meta"))


# Taking tokens back.

CROPPED = [
    Case(),
    Case("lattice", values="int2", window=0, starts=(0, 5)),
    Case(values="full", window=1, sinks=0),
    Case(sliding=20, sinks=0),
    Case(keys="int4", values="int4"),
]


@pytest.mark.parametrize("at", [3, 30, 64, 66])
@pytest.mark.parametrize("case", CROPPED)
def test_packed_layer_crop_leaves_no_trace_of_what_was_taken_back(case, at):
    """Around the first tokens, where no window is full yet, and on both sides of a page."""
    x, wrong = given(case), given(replace(case, n=case.spare), seed=1)
    layer = case.layer()
    run(case, x.part(0, at), (), layer)
    for removed in (1, case.spare):
        layer.update(wrong.keys[:, :, :removed], wrong.values[:, :, :removed])
        layer.crop(-removed)
        assert layer.get_seq_length() == at
    got = run(case, x, (1,) * (case.n - at), layer)
    start = max(case.starts)
    expected = by_definition(case, x)[:, :, max(at, start) :]
    assert difference(got[:, :, max(start - at, 0) :], expected) < TOLERANCE[case.dtype]


@pytest.mark.parametrize("case", CROPPED)
def test_packed_layer_crop_leaves_no_trace_of_speculation_all_along(case):
    """Calls of six tokens of which four are taken back, attended to on the way."""
    case = replace(case, starts=(0, 0), n=300)
    x, wrong = given(case), given(case, seed=1)
    layer, outputs = case.layer(), [torch.empty(0)]
    for at in range(0, case.n, 2):
        guess = Tokens(
            *(
                torch.cat((right[:, :, at : at + 2], other[:, :, :4]), 2)
                for right, other in zip(vars(x).values(), vars(wrong).values())
            )
        )
        here = guess.query.shape[2]
        length, offset = layer.get_mask_sizes(here)
        part = slice(None), slice(None), slice(at, at + here), slice(offset, offset + length)
        mask, _ = mask_and_bias(replace(case, n=case.n + 4), part)
        tokens, _ = layer.update(guess.keys, guess.values)
        outputs.append(tokens.attend(guess.query, AttentionCall(0.3, mask=mask))[:, :, :2])
        layer.crop(-4)
    got = torch.cat(outputs[1:], 2)
    assert difference(got, by_definition(case, x)) < TOLERANCE[case.dtype]


def test_crop_takes_back_what_leaves_the_next_query_its_window():
    """It counts itself, so one token more than is spare."""
    case = Case(window=16, spare=4, sinks=2)
    x, layer = given(case), case.layer()
    run(case, x.part(0, 60), (), layer)
    with pytest.raises(InputError, match="can take back 5 of its 60 tokens without a trace"):
        layer.crop(-6)
    layer.crop(-5)
    got = run(case, x, (1,) * 25, layer)
    assert difference(got, by_definition(case, x)[:, :, 55:]) < TOLERANCE[case.dtype]
    assert layer.weight().n_packed == 2 * HEADS * (80 - 18)


@pytest.mark.parametrize("removed", [80, 1000])
@pytest.mark.parametrize("case", [Case(starts=(0, 5)), Case(sliding=10, sinks=0, n=80)])
def test_packed_layer_crop_can_take_all_back(case, removed):
    layer, x = case.layer(), given(case)
    run(case, given(case, seed=1), (), layer)
    layer.crop(-removed)
    assert layer.get_seq_length() == 0
    assert difference(run(case, x, (), layer), run(case, x, ())) < TOLERANCE[case.dtype]


def test_packed_layer_crop_is_given_a_number_below_zero():
    case = Case()
    layer, x = case.layer(), given(case)
    layer.crop(-3)  # nothing there, nothing done
    layer.update(x.keys, x.values)
    layer.crop(0)
    assert layer.get_seq_length() == case.n
    with pytest.raises(InputError, match=r"crop\(1\): give minus the number"):
        layer.crop(1)


# Sliding windows.


@pytest.mark.parametrize("size", [1, 10, 400])
def test_packed_layer_that_slides_forgets(size):
    case = Case(sliding=12, window=4, sinks=0, spare=3, n=401)
    x, layer = given(case), case.layer()
    most = 0
    for at in range(0, 400, size):
        run(case, x.part(0, at + size), (), layer)
        most = max(most, layer.key_storage.room, layer.value_storage.room)
        assert layer.get_seq_length() == at + size
    assert layer.recent["keys"].shape[2] == 7
    # what is kept: window and spare, a page that is not dropped yet, and room up to a whole page
    assert most <= 12 + 3 + size + 2 * PAGE
    run(case, x, (), layer)
    assert layer.key_storage.room <= 12 + 3 + 2 * PAGE


@pytest.mark.parametrize("sizes", [(), (1,) * 399, (7, 163, 1), (399,)])
def test_packed_layer_that_slides_reads_several_windows_whatever_the_calls(sizes):
    case = Case(sliding=12, window=4, sinks=0, spare=3, n=400, starts=(0, 150))
    x = given(case)
    got, expected = run(case, x, sizes), by_definition(case, x)
    assert difference(got[0], expected[0]) < TOLERANCE[case.dtype]
    assert difference(got[1, :, 150:], expected[1, :, 150:]) < TOLERANCE[case.dtype]


def test_packed_layer_crop_refuses_what_a_sliding_layer_would_need_again():
    case = Case(sliding=12, window=4, sinks=0, spare=3, n=200)
    layer, x = case.layer(), given(case)
    run(case, x, (), layer)
    layer.crop(-3)
    with pytest.raises(InputError, match=r"crop\(-150\): layer 0 can take back 1 of its 197"):
        layer.crop(-150)
    assert layer.get_seq_length() == 197  # and nothing was changed
    assert difference(run(case, x, (), layer), by_definition(case, x)[:, :, 197:]) < 2e-6


STATES = torch.zeros(1, HEADS, 80, D)


@pytest.mark.parametrize(
    ("keys", "values", "message"),
    [
        (STATES, STATES[:, :, 1:], "values of shape .*79.* give as many of each"),
        (STATES[:, :, :0], STATES[:, :, :0], "keys of shape .* one token or more"),
        (STATES[0], STATES[0], "keys of shape .* one token or more"),
        (STATES, STATES.tolist(), "values of layer 0 are list: load the model in float16"),
        (STATES.double(), STATES.double(), "keys of layer 0 are torch.float64: load the model"),
        (STATES.int(), STATES, "keys of layer 0 are torch.int32: load the model"),
        (STATES[:, :1], STATES[:, :1], "keys of 1 heads of 16"),
    ],
)
def test_update_refuses_what_are_no_tokens_of_its_layer(
    keys: Tensor, values: Tensor, message: str
) -> None:
    layer = Case().layer()
    with pytest.raises(InputError, match=message):
        layer.update(keys, values)
    layer.update(STATES, STATES)  # nothing is left of the refused ones
    assert layer.n_tokens == 80
