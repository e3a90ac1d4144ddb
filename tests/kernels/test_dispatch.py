"""One place of dispatch: what runs where, and a clear error for what cannot, before any launch."""

from __future__ import annotations

import pytest
import torch

from signlattice import kernels
from signlattice.errors import InputError
from signlattice.kernels.layout import PackedKeys
from signlattice.kernels.runtime import Launch

IMPLS = ("torch", "triton")
B, H, C, T, D = 2, 3, 8, 4, 64


@pytest.fixture(autouse=True)
def nothing_is_launched(monkeypatch: pytest.MonkeyPatch) -> None:
    def launched(*arguments: object) -> None:
        pytest.fail("a kernel was launched on bad input")

    monkeypatch.setattr(Launch, "__call__", launched)


def packed_keys(batch=B, n_heads=H, room=C, n_bytes=D // 8, **device) -> PackedKeys:
    cells = (batch, n_heads, room)
    scale = torch.zeros(cells, dtype=torch.float16, **device)
    words = torch.zeros(*cells, n_bytes, dtype=torch.uint8, **device)
    return PackedKeys(words, scale, torch.zeros_like(scale))


def with_part(**parts: torch.Tensor) -> PackedKeys:
    return PackedKeys(**vars(packed_keys()) | parts)


# Each case: what is wrong, and a word that the message must have.

HADAMARD = {
    "order": ({"x": torch.zeros(2, 17)}, "order 17"),
    "order of no supported form": ({"x": torch.zeros(2, 36)}, "order 36"),
    "small order": ({"x": torch.zeros(2, 8)}, "rows of 8"),
    "large order": ({"x": torch.zeros(1, 16384)}, "rows of 16384"),
    "no axis": ({"x": torch.tensor(1.0)}, "rows of 0"),
    "fp64": ({"x": torch.zeros(2, 64, dtype=torch.float64)}, "float64"),
    "integers": ({"x": torch.zeros(2, 64, dtype=torch.int32)}, "int32"),
    "too few signs": ({"signs": torch.ones(32)}, r"signs of shape \[32\]"),
    "signs of every row": ({"signs": torch.ones(2, 64)}, r"signs of shape \[2, 64\]"),
    "true and false": ({"signs": torch.ones(64, dtype=torch.bool)}, "signs is torch.bool"),
    "another device": ({"signs": torch.ones(64, device="meta")}, "signs on meta"),
    "too many rows": ({"x": torch.zeros(1).expand(2**30, 16), "signs": None}, "1073741824 rows"),
    "impl": ({"impl": "cuda"}, "impl='cuda'"),
    "no such impl here": ({"impl": "cpu"}, "hadamard has auto, torch, triton"),
}


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("case", HADAMARD)
def test_hadamard_transform_refuses(case, impl):
    wrong, message = HADAMARD[case]
    arguments = {"x": torch.zeros(2, 64), "signs": torch.ones(64), "impl": impl} | wrong
    with pytest.raises(InputError, match=message):
        kernels.hadamard_transform(**arguments)


HALF = torch.zeros(B, H, C, dtype=torch.float16)
PACK = {
    "keys of three axes": ({"keys": torch.zeros(H, T, D)}, r"keys of shape .* \[B, H, T, D\]"),
    "head size": ({"keys": torch.zeros(B, H, T, 72)}, "head_dim 72"),
    "fp64": ({"keys": torch.zeros(B, H, T, D, dtype=torch.float64)}, "float64"),
    "another batch": ({"keys": torch.zeros(B + 1, H, T, D)}, "words of shape"),
    "another head size": ({"keys": torch.zeros(B, H, T, 128)}, "words of shape"),
    "words of three axes": ({"packed": with_part(words=torch.zeros(B, H, C))}, "words of shape"),
    "words of int8": (
        {"packed": with_part(words=torch.zeros(B, H, C, D // 8, dtype=torch.int8))},
        "use uint8",
    ),
    "words with gaps": (
        {"packed": with_part(words=torch.zeros(B, H, C, D // 4, dtype=torch.uint8)[..., ::2])},
        "words is not contiguous",
    ),
    "scale of fp32": ({"packed": with_part(scale=HALF.float())}, "scale is torch.float32"),
    "scale of another shape": ({"packed": with_part(scale=HALF[:, :2])}, "scale of shape"),
    "scale with gaps": (
        {"packed": with_part(scale=HALF.transpose(0, 1).contiguous().transpose(0, 1))},
        "scale is not contiguous",
    ),
    "dc of fp32": ({"packed": with_part(dc=HALF.float())}, "dc is torch.float32"),
    "dc of another shape": ({"packed": with_part(dc=HALF[:, :, :3])}, "dc of shape"),
    "one rotation for all heads": ({"rotation": torch.zeros(D, D)}, "rotation of shape"),
    "rotation of fp64": ({"rotation": torch.zeros(H, D, D).double()}, "rotation is torch.float64"),
    "mean of all heads": ({"mean": torch.zeros(D)}, "mean of shape"),
    "mean of integers": ({"mean": torch.zeros(H, D, dtype=torch.int64)}, "mean is torch.int64"),
    "one temperature": ({"temperature": torch.ones(())}, "temperature of shape"),
    "temperature of fp64": ({"temperature": torch.ones(H).double()}, "temperature is"),
    "one position": ({"positions": torch.zeros(1, dtype=torch.int32)}, "positions of shape"),
    "positions of fp32": ({"positions": torch.zeros(B)}, "positions is torch.float32"),
    "a position below zero": ({"positions": torch.tensor([0, -1])}, "places -1 to 0"),
    "a position too late": ({"positions": torch.tensor([0, C - T + 1])}, "do not fit"),
    "more keys than room": ({"keys": torch.zeros(B, H, C + 1, D)}, "9 keys do not fit"),
    "rule": ({"rule": "median"}, "unknown scale rule 'median'"),
    "rotation on another device": ({"rotation": torch.zeros(H, D, D, device="meta")}, "on meta"),
    "cache on another device": ({"packed": packed_keys(device="meta")}, "words on meta"),
    "positions on another device": (
        {"positions": torch.zeros(B, dtype=torch.int32, device="meta")},
        "positions on meta",
    ),
    "impl": ({"impl": "numba"}, "impl='numba'"),
}


def pack_arguments(**device: str) -> dict:
    return {
        "packed": packed_keys(**device),
        "keys": torch.zeros(B, H, T, D, **device),
        "rotation": torch.zeros(H, D, D, **device),
        "positions": torch.zeros(B, dtype=torch.int32, **device),
    }


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("case", PACK)
def test_pack_into_refuses(case, impl):
    wrong, message = PACK[case]
    with pytest.raises(InputError, match=message):
        kernels.pack_into(**pack_arguments() | {"impl": impl} | wrong)


@pytest.mark.parametrize("impl", IMPLS)
def test_pack_into_refuses_more_rows_than_a_kernel_counts(impl):
    batch = 2**30 // T
    with pytest.raises(InputError, match="1073741824 rows"):
        kernels.pack_into(
            packed_keys(batch, device="meta"),
            torch.zeros(batch, H, T, D, device="meta"),
            torch.zeros(H, D, D, device="meta"),
            torch.zeros(batch, dtype=torch.int32, device="meta"),
            impl=impl,
        )


DEQUANTISE = {
    "words of three axes": ({"packed": with_part(words=torch.zeros(B, H, C))}, "words of shape"),
    "head size": ({"packed": packed_keys(n_bytes=9)}, "head_dim 72"),
    "words of int32": (
        {"packed": with_part(words=torch.zeros(B, H, C, D // 8, dtype=torch.int32))},
        "use uint8",
    ),
    "scale of fp32": ({"packed": with_part(scale=HALF.float())}, "scale is torch.float32"),
    "scale of another shape": ({"packed": with_part(scale=HALF[:1])}, "scale of shape"),
    "dc of another shape": ({"packed": with_part(dc=HALF[:1])}, "dc of shape"),
    "rotation of another size": ({"rotation": torch.zeros(H, 80, 80)}, "rotation of shape"),
    "rotation of integers": (
        {"rotation": torch.zeros(H, D, D, dtype=torch.int8)},
        "rotation is torch.int8",
    ),
    "mean of another shape": ({"mean": torch.zeros(H, 1, D)}, "mean of shape"),
    "mean on another device": ({"mean": torch.zeros(H, D, device="meta")}, "mean on meta"),
    "rotation on another device": ({"rotation": torch.zeros(H, D, D, device="meta")}, "on meta"),
    "into fp64": ({"dtype": torch.float64}, "dtype is torch.float64"),
    "too many rows": (
        {
            "packed": packed_keys(2**27, device="meta"),
            "rotation": torch.zeros(H, D, D, device="meta"),
        },
        "1073741824 rows",
    ),
    "impl": ({"impl": "cpu"}, "unpack has auto, torch, triton"),
}


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("case", DEQUANTISE)
def test_dequantise_refuses(case, impl):
    wrong, message = DEQUANTISE[case]
    arguments = {"packed": packed_keys(), "rotation": torch.zeros(H, D, D), "impl": impl}
    with pytest.raises(InputError, match=message):
        kernels.dequantise(**arguments | wrong)


@pytest.mark.parametrize("kernel", ["hadamard", "pack", "unpack"])
def test_chosen_auto_is_triton_on_a_gpu_and_the_reference_on_a_cpu(kernel):
    assert kernels.chosen(kernel, "auto", torch.device("cuda")) == "triton"
    assert kernels.chosen(kernel, "auto", torch.device("cpu")) == "torch"
    assert kernels.chosen(kernel, "torch", torch.device("cuda")) == "torch"
