"""Arguments of a wrong type or value are told in a line, before anything is done."""

from __future__ import annotations

import pytest
import torch

import signlattice
from call_arguments import EXEMPT, calls, good
from edges import wrong
from signlattice import CacheConfig, InputError, beta, haar_beta, load_model, measure_codec

NAMES = sorted(set(signlattice.__all__) - EXEMPT)


@pytest.mark.parametrize("name", NAMES)
def test_public_call_with_an_argument_of_no_use_is_refused_in_a_line(name, olmoe):
    found = {word: wrong(call) for word, call in calls(olmoe, name)}
    assert not {word: fault for word, fault in found.items() if fault}


def test_public_calls_are_all_tried(olmoe):
    assert sorted(good(olmoe)) == NAMES


@pytest.mark.parametrize(
    ("call", "told"),
    [
        (lambda: CacheConfig(window="16"), "window='16': expected an integer"),
        (lambda: CacheConfig(window=True), "window=True: expected an integer"),
        (lambda: CacheConfig(exempt=(0, "1")), r"exempt=\(0, '1'\): expected a tuple of integers"),
        (lambda: CacheConfig(impl="gpu"), "impl='gpu': choose one of auto, torch"),
        (lambda: CacheConfig(dtype="half"), "dtype='half': expected dtype or None"),
        (lambda: beta([[1.0, 2.0]]), "y=.*: expected Tensor"),
        (lambda: haar_beta(8.0), "d=8.0: expected an integer"),
        (lambda: load_model(3), "name=3: expected a text or Path"),
        (lambda: load_model("olmoe-mini", "gpu"), "device='gpu': no such device"),
        (lambda: measure_codec(None, None, []), "loaded=None: expected LoadedModel"),
    ],
)
def test_public_call_names_the_value_and_what_is_expected(call, told):
    with pytest.raises(InputError, match=told):
        call()


def test_public_call_takes_numbers_of_numpy():
    number = torch.tensor([8]).numpy()[0]
    assert haar_beta(number) == haar_beta(8) and CacheConfig(window=number).window == 8
