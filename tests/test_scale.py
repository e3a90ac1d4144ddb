from __future__ import annotations

import dataclasses

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode, addmm_flop

from signlattice.errors import InputError
from signlattice.kernels.gradient.triton import MAX_DIM
from signlattice.kernels.polar_factor import triton as by_products
from signlattice.models import cost
from signlattice.models.cost import A100, H100, Keys, Schedule
from signlattice.rotations.config import LearnConfig
from signlattice.rotations.learned import learn_rotation

PAPER = Keys(n_layers=16, n_heads=1, dim=2048, n_tokens=16_000_000)


def resolved(dim: int) -> Schedule:
    config = LearnConfig().resolved(dim)
    return Schedule(config.warm_steps, config.steps, config.batch, config.polish_steps)


@pytest.mark.filterwarnings("ignore::signlattice.rotations.config.CalibrationWarning")
def test_key_flops_and_matrix_flops_are_those_that_training_does():
    dim, n_keys = 32, 20_000
    keys = torch.randn(n_keys, dim, generator=torch.Generator().manual_seed(0)) ** 3
    config = LearnConfig(warm_steps=7, steps=11, batch=6000, polish_steps=9, trace_every=5)
    # An addition in place, which the gradient makes, is a product that the counter does not know.
    in_place = {torch.ops.aten.addmm_: lambda c, a, b, out_shape=None, **_: addmm_flop(c, a, b)}
    with FlopCounterMode(display=False, custom_mapping=in_place) as counter:
        learned = learn_rotation(keys, config, impl="torch")
    done = learned.trace[-1].step - 18
    schedule = Schedule(7, 11, 6000, done, 5)
    # Counted: products alone, one of them in each polar factor, which decomposes on a processor.
    matrices = cost.matrix_flops(schedule, dim, polar=2, turn=4)
    expected = cost.key_flops(schedule, n_keys, dim) + matrices
    assert counter.get_total_flops() == pytest.approx(expected, rel=0.01)


def test_polar_takes_as_many_products_as_counted():
    dim = 24
    noise = torch.randn(dim, dim, generator=torch.Generator().manual_seed(1))
    matrix = torch.eye(dim) + noise / 20  # no singular value is a thousandth of the largest
    with FlopCounterMode(display=False) as counter:
        found = by_products.polar(matrix)
    torch.testing.assert_close(found @ found.T, torch.eye(dim), atol=1e-5, rtol=0)
    assert counter.get_total_flops() == cost.POLAR * dim**3


def test_machine_gradient_rate_is_of_the_kernel_up_to_its_own_limit():
    assert cost.KERNEL_DIM == MAX_DIM[cost.SINGLE]
    for machine in (A100, H100):
        assert machine.gradient_rate(cost.KERNEL_DIM) == machine.tf32 / 3
        assert machine.gradient_rate(cost.KERNEL_DIM + 1) == machine.fp32


def test_hours_of_learning_by_hand():
    schedule = resolved(2048)
    # Passes of 16 layers: polish, batches of a tenth of the keys, beta at half a gradient's price.
    passes = 300 + 1124 / 10 + schedule.judged / 2
    work = 16 * (passes * 4 * 16e6 * 2048**2 + 1424 * 56 * 2048**3 + 1124 * 20 / 3 * 2048**3)
    found = cost.hours(0, PAPER, schedule, A100)
    assert found.learning == pytest.approx(work / (0.4 * 19.5e12) / 3600, rel=1e-4)
    assert found.disk == pytest.approx(2 * 1.048576e12 / 5e9 / 3600)


def test_keys_and_training_flops_of_the_appendix_case_by_hand():
    assert PAPER.n_bytes() == 16 * 16_000_000 * 2048 * 2 == 1_048_576_000_000
    assert PAPER.state_bytes() == 16 * 2 * 2048**2 * 4
    schedule = resolved(2048)
    assert (schedule.warm_steps, schedule.batch) == (1024, 3 * 2048**2 // 8)
    one_pass = cost.step_flops(PAPER.n_tokens, PAPER.dim)
    assert one_pass == 4 * 16_000_000 * 2048**2
    polish = 16 * 300 * one_pass
    assert polish < cost.training_flops(schedule, PAPER) < 2 * polish


def test_keys_of_heads_hold_the_bytes_of_their_layer_and_cost_less_to_learn():
    heads = dataclasses.replace(PAPER, n_heads=16, dim=128)
    assert heads.n_bytes() == PAPER.n_bytes()
    per_head = cost.training_flops(resolved(128), heads)
    assert per_head < cost.training_flops(resolved(2048), PAPER) / 10


def test_keys_layer_bytes_are_fp32_keys_and_the_state_of_rotations():
    assert PAPER.layer_bytes == 16_000_000 * 2048 * 4 + 2 * 2048**2 * 4
    heads = dataclasses.replace(PAPER, n_heads=16, dim=128)
    assert heads.layer_bytes == 16 * (16_000_000 * 128 * 4 + 2 * 128**2 * 4)


@pytest.mark.parametrize("n_gpus, layers", [(1, 16), (2, 8), (5, 4), (8, 2), (16, 1), (99, 1)])
def test_hours_of_learning_are_those_of_the_gpu_with_the_most_layers(n_gpus, layers):
    for machine in (A100, H100):
        one, several, own = (
            cost.hours(1_300_000_000, keys, resolved(2048), machine, n)
            for keys, n in (
                (PAPER, 1),
                (PAPER, n_gpus),
                (dataclasses.replace(PAPER, n_layers=layers), 1),
            )
        )
        assert several.learning == own.learning
        assert several.capture == pytest.approx(one.capture / n_gpus)
        assert several.disk == one.disk, "one disk serves all"


def test_machine_half_precision_and_tf32_rates_are_of_one_data_sheet():
    for machine in (A100, H100):
        assert machine.tf32 == pytest.approx(machine.device.flops / 2, rel=1e-3)


@pytest.mark.parametrize("change", [{"dim": 0}, {"n_tokens": 1.5}, {"n_layers": True}])
def test_keys_tell_sizes_that_are_none(change):
    with pytest.raises(InputError, match="expected an integer of at least 1"):
        dataclasses.replace(PAPER, **change)


@pytest.mark.parametrize("change", [{"efficiency": 1.5}, {"tf32": 0.0}])
def test_machine_that_cannot_be_is_told(change):
    with pytest.raises(InputError, match="efficiency of at most 1"):
        dataclasses.replace(H100, **change)


def test_hours_without_a_gpu_are_refused():
    with pytest.raises(InputError, match="n_gpus=0"):
        cost.hours(0, PAPER, resolved(2048), A100, 0)
