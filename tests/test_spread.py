"""Learning from disk and by several processes: the same bits, whoever reads what, and when."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import weakref
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from torch import Tensor

from signlattice.distributed import spread
from signlattice.distributed.shards import Shards, write_shards
from signlattice.distributed.spread import Processes, SpreadKeys, open_keys
from signlattice.errors import InputError, IntegrityError
from signlattice.kernels import sign_gemm
from signlattice.rotations.config import SOLVERS, CalibrationWarning, LearnConfig, TracePoint
from signlattice.rotations.fixed import haar
from signlattice.rotations.learned import learn_rotations
from signlattice.rotations.objective import mean_cosine, smoothed_gradient

SHORT = {
    "annealed": LearnConfig(steps=12, warm_steps=8, batch=700, polish_steps=40, tolerance=1e-4),
    "itq": LearnConfig(solver="itq", steps=40, tolerance=1e-4),
    "gradient": LearnConfig(solver="gradient", steps=20),
}
BY_SOLVER = pytest.mark.parametrize("solver", SOLVERS)


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """As many as the processes below have, so that their bits are those of this one."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def planted(n: int, seed: int = 0, heads: int = 3, d: int = 16) -> Tensor:
    """Keys [n, H, d] near sign lattices, nearer in some heads than in others."""
    lattice, noise = (
        torch.randn(n, heads, d, generator=torch.Generator().manual_seed(2 * seed + i))
        for i in (0, 1)
    )
    keys = lattice.sign() + noise * torch.linspace(0.2, 1.5, heads)[:, None]
    return keys @ haar(d, 99)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """3000 keys of 3 heads in 15 chunks and 5 shards."""
    folder = tmp_path_factory.mktemp("spread") / "keys"
    write_shards(folder, planted(3000).split(700), chunk_keys=200, shard_bytes=120_000)
    return folder


@pytest.fixture(scope="module")
def others(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Held-out keys."""
    folder = tmp_path_factory.mktemp("spread") / "others"
    write_shards(folder, [planted(500, seed=1)], chunk_keys=100)
    return folder


@pytest.fixture
def copy(folder: Path, tmp_path: Path) -> Path:
    """The keys in a folder that a test may damage."""
    target = tmp_path / "copy"
    target.mkdir()
    for file in folder.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    return target


def in_memory(keys: SpreadKeys) -> Tensor:
    return torch.cat([keys.chunks[chunk] for chunk in keys.order], dim=1)


# The sums.


@pytest.mark.parametrize("temperature", [0.0, 0.5])
def test_gradient_and_cosine_are_those_of_the_keys_in_memory(temperature, tmp_path):
    write_shards(tmp_path / "keys", [planted(3000).double()], chunk_keys=170, dtype=torch.float64)
    keys, rotation = open_keys(tmp_path / "keys"), haar(16, 0, dtype=torch.float64).repeat(3, 1, 1)
    found = keys.gradient(rotation, temperature, "torch")
    wanted = smoothed_gradient(in_memory(keys), rotation, temperature)
    torch.testing.assert_close(found, wanted, atol=1e-13, rtol=0)
    betas = keys.cosines(rotation[:2], (2, 0))
    assert betas == pytest.approx([mean_cosine(in_memory(keys)[h], rotation[0]) for h in (2, 0)])
    some = keys.narrowed((2, 0))
    torch.testing.assert_close(some.gradient(rotation[:2], temperature, "torch"), found[[2, 0]])


def test_sums_have_the_same_bits_in_any_order(folder):
    keys, rotation = open_keys(folder), haar(16, 0).repeat(3, 1, 1)
    orders = [keys.dealt(seed) for seed in range(5)]
    assert len({dealt.order for dealt in orders}) == 5
    gradients = [dealt.gradient(rotation, 0.0, "torch") for dealt in orders]
    assert all(torch.equal(gradient, gradients[0]) for gradient in gradients)
    assert len({tuple(dealt.cosines(rotation, (0, 1, 2))) for dealt in orders}) == 1
    # Sums of the same terms as they are do depend on it.
    plain = [
        sum(smoothed_gradient(dealt.chunks[chunk], rotation, 0.0) for chunk in dealt.order)
        for dealt in orders
    ]
    assert not all(torch.equal(gradient, plain[0]) for gradient in plain)


def test_rounding_is_finer_than_that_of_the_terms(folder):
    keys, rotation = open_keys(folder), haar(16, 0).repeat(3, 1, 1)
    terms = [sign_gemm(keys.chunks[chunk], rotation, impl="torch") for chunk in keys.order]
    exact = torch.stack(terms).double().sum(0) / (3000 * 16)
    # The gradient is an fp32 number, whose own rounding is all that is left.
    found = keys.gradient(rotation, 0.0, "torch")
    torch.testing.assert_close(found, exact.float(), atol=0, rtol=2**-23)


@given(count=st.integers(1, 20), step=st.integers(0, 99), size=st.integers(1, 4000))
@settings(max_examples=50)
def test_each_chunk_of_a_batch_is_one_process_s_and_shares_are_equal(folder, count, step, size):
    ranks = [open_keys(folder, processes=_Alone(rank, count)) for rank in range(count)]
    batches = [keys.dealt(3).batch(step, size) for keys in ranks]
    shares = [batch.own for batch in batches]
    assert sorted(sum(shares, ())) == sorted(batches[0].order)
    assert max(map(len, shares)) - min(map(len, shares)) <= 1
    # A process reads its own chunks whatever the batch, so that it need cache no others.
    assert all(set(b.own) <= set(keys.dealt(3).own) for b, keys in zip(batches, ranks))


@given(size=st.integers(1, 4000))
@settings(max_examples=30)
def test_batches_go_through_all_keys(folder, size):
    keys = open_keys(folder).dealt(0)
    seen, step = [], 0
    while len(seen) < len(keys.order):
        batch = keys.batch(step, size)
        assert batch.n_keys == 200 * len(batch.order)
        seen, step = [*seen, *batch.order], step + 1
    assert tuple(seen) == keys.order
    assert keys.batch(step, size).order == keys.batch(0, size).order
    assert abs(3000 / step - size) < max(size, 400)


@dataclass(frozen=True)
class _Alone(Processes):
    """One of several processes, whose others say nothing."""

    def led(self, work):
        return work()

    def agree(self, error):
        if error is not None:
            raise error


@dataclass(frozen=True)
class _Astray(_Alone):
    """Two processes, the other of which is at another rotation, by one bit of one entry."""

    def add_up(self, total):
        total *= 2
        total[1] += 1


def test_processes_that_drift_apart_stop(folder):
    keys = open_keys(folder, processes=_Astray(0, 2))
    with pytest.raises(IntegrityError, match="2 processes do not come to the same rotation"):
        learn_rotations(keys, SHORT["itq"])


def test_a_single_bit_of_a_rotation_is_noticed():
    rotation = haar(16, 0).repeat(2, 1, 1)
    marks = {int(spread._checksum(rotation))}
    for at in range(0, 512, 37):
        other = rotation.clone()
        other.view(torch.int32).view(-1)[at] ^= 1
        marks.add(int(spread._checksum(other)))
    assert len(marks) == 1 + len(range(0, 512, 37))


@pytest.mark.parametrize("temperature", [0.0, 0.5])
def test_kernels_of_a_gpu_find_the_same_sums(temperature, tmp_path):
    write_shards(tmp_path / "keys", [planted(600)], chunk_keys=250)
    keys = open_keys(tmp_path / "keys", device="cuda" if torch.cuda.is_available() else "cpu")
    rotation = haar(16, 0).repeat(3, 1, 1).to(keys.device)
    found, wanted = (keys.gradient(rotation, temperature, impl) for impl in ("triton", "torch"))
    assert found.device == keys.device
    torch.testing.assert_close(found, wanted, atol=1e-6, rtol=0)
    dealt = keys.dealt(1).gradient(rotation, temperature, "triton")
    assert keys.dealt(1).order != keys.order and torch.equal(dealt, found)


# Learning from disk, by one process.


@BY_SOLVER
def test_keys_on_disk_teach_what_keys_in_memory_do(solver, folder):
    keys = open_keys(folder)
    config = replace(SHORT[solver], tolerance=0.0)
    if solver == "annealed":
        config = replace(config, batch=3000)  # one batch: the order of keys is no matter
    streamed = learn_rotations(keys, config)
    whole = learn_rotations(in_memory(keys), config)
    for ours, theirs in zip(streamed, whole, strict=True):
        assert ours.train_beta == pytest.approx(theirs.train_beta, abs=2e-4)
        assert (ours.n_keys, ours.config) == (theirs.n_keys, theirs.config)
        assert [p.step for p in ours.trace][:-1] == [p.step for p in theirs.trace][:-1]
        first, other = ours.trace[1], theirs.trace[1]
        assert first.train_beta == pytest.approx(other.train_beta, abs=1e-4)


def test_annealed_batches_from_disk_find_the_lattice(tmp_path):
    keys = planted(10240)
    by_document = keys[keys[:, 0, 0].argsort()]
    write_shards(tmp_path / "keys", by_document.split(1000), chunk_keys=256)
    learned = learn_rotations(open_keys(tmp_path / "keys"), LearnConfig(batch=2048))
    optimum = mean_cosine(in_memory(open_keys(tmp_path / "keys"))[0], haar(16, 99))
    assert learned[0].train_beta > optimum - 0.002 > 0.9


def test_held_out_keys_may_be_on_disk_or_in_memory_and_teach_nothing(folder, others):
    on_disk = open_keys(others)
    runs = [
        learn_rotations(open_keys(folder), SHORT["itq"], held_out=held_out)
        for held_out in (None, on_disk, in_memory(on_disk))
    ]
    for none, disk, memory in zip(*runs):
        assert none.held_out_beta is None
        assert torch.equal(none.matrix, disk.matrix) and torch.equal(none.matrix, memory.matrix)
        assert disk.held_out_beta == pytest.approx(memory.held_out_beta, abs=1e-6)


def test_half_precision_on_disk_is_computed_with_in_fp32(folder, tmp_path):
    write_shards(tmp_path / "half", [planted(3000)], chunk_keys=200, dtype=torch.float16)
    half, full = (learn_rotations(open_keys(f), SHORT["itq"]) for f in (tmp_path / "half", folder))
    for ours, theirs in zip(half, full):
        assert ours.matrix.dtype == torch.float32
        assert ours.trace[0].train_beta == pytest.approx(theirs.trace[0].train_beta, abs=1e-5)


@pytest.mark.parametrize("cached", [0, 3, 15])
def test_no_more_is_in_memory_than_a_chunk_and_the_cache(cached, folder, monkeypatch):
    alive, most = weakref.WeakSet(), 0
    original = Shards.read

    def watched(self: Shards, chunk: int, *, check: bool = True) -> Tensor:
        nonlocal most
        keys = original(self, chunk, check=check)
        alive.add(keys)
        most = max(most, sum(tensor.shape[1] for tensor in alive))
        return keys

    monkeypatch.setattr(Shards, "read", watched)
    chunk_bytes = 3 * 200 * 16 * 4
    keys = open_keys(folder, cache_bytes=cached * chunk_bytes)
    # The reference, since a thread of others may let go of its keys a moment after they are used.
    learned = learn_rotations(keys, SHORT["annealed"], impl="torch")
    assert most == 200 * min(15, cached + 1)
    monkeypatch.undo()
    plain = learn_rotations(open_keys(folder), SHORT["annealed"], impl="torch")
    assert all(torch.equal(a.matrix, b.matrix) for a, b in zip(learned, plain))


# Stopping and going on.


class Stop:
    """A progress that interrupts at its n-th call."""

    def __init__(self, call: int) -> None:
        self.calls = call

    def __call__(self, point: TracePoint) -> None:
        self.calls -= 1
        if self.calls == 0:
            raise KeyboardInterrupt


@BY_SOLVER
def test_a_run_that_was_interrupted_ends_as_one_that_was_not(solver, folder, others, tmp_path):
    config = replace(SHORT[solver], trace_every=4, checkpoint_every=1000)
    run = {"config": config, "held_out": open_keys(others), "checkpoint": tmp_path / "run"}
    straight = learn_rotations(open_keys(folder), **run | {"checkpoint": None})
    for call in (1, 2, 2):
        with pytest.raises(KeyboardInterrupt):
            learn_rotations(open_keys(folder), **run, progress=Stop(call))
    for resumed, whole in zip(learn_rotations(open_keys(folder), **run), straight, strict=True):
        assert torch.equal(resumed.matrix, whole.matrix)
        assert [replace(p, seconds=0) for p in resumed.trace] == [
            replace(p, seconds=0) for p in whole.trace
        ]
    with pytest.raises(IntegrityError, match="other keys"):
        learn_rotations(open_keys(folder), **run | {"held_out": None})
    swapped = [open_keys(keys).narrowed((1, 0, 2)) for keys in (folder, others)]
    with pytest.raises(IntegrityError, match="other keys"):
        learn_rotations(swapped[0], **run | {"held_out": swapped[1]})
    with pytest.raises(IntegrityError, match="other keys"), pytest.warns(CalibrationWarning):
        learn_rotations(open_keys(others), **run)


def test_damage_met_on_the_way_costs_nothing_that_was_done(copy, folder, tmp_path):
    config = replace(SHORT["annealed"], trace_every=1, checkpoint_every=1000)
    shard, file = copy / "keys.00003.safetensors", tmp_path / "run"
    whole = shard.read_bytes()

    def damage(point: TracePoint) -> None:
        if point.step == 11:
            shard.write_bytes(whole[:-100])

    with pytest.raises(IntegrityError, match="keys.00003.safetensors"):
        learn_rotations(open_keys(copy), config, checkpoint=file, progress=damage)
    shard.write_bytes(whole)
    seen: list[TracePoint] = []
    resumed = learn_rotations(open_keys(copy), config, checkpoint=file, progress=seen.append)
    assert seen[0].step >= 12
    straight = learn_rotations(open_keys(folder), config)
    assert all(torch.equal(a.matrix, b.matrix) for a, b in zip(resumed, straight))


@pytest.mark.parametrize(
    ("held_out", "message"),
    [
        (planted(99, heads=2).transpose(0, 1), r"held_out of shape \[2, 99, 16\]: expected \[3, M"),
        (planted(99, d=32).transpose(0, 1), r"held_out of shape \[3, 99, 32\]: expected \[3, M"),
    ],
)
def test_held_out_keys_of_other_heads_are_refused(held_out, message, folder):
    with pytest.raises(InputError, match=message):
        learn_rotations(open_keys(folder), held_out=held_out)


def test_few_keys_are_warned_of_by_the_process_that_leads(tmp_path):
    write_shards(tmp_path / "keys", [planted(500)])
    with pytest.warns(CalibrationWarning, match="31.2 per dimension"):
        learn_rotations(open_keys(tmp_path / "keys"), SHORT["itq"])


# The command, and several processes.


def environment(rank: int = 0, count: int = 1, port: int = 0) -> dict[str, str]:
    own = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    own |= {"OMP_NUM_THREADS": "1"}
    if count > 1:  # what torchrun sets
        own |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count)}
        own |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    return own


def start(count: int, *arguments: object) -> list[subprocess.Popen]:
    """``count`` processes of the command, as torchrun would start them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    return [
        subprocess.Popen(
            [sys.executable, "-m", "signlattice.distributed.spread", *map(str, arguments)],
            env=environment(rank, count, port),
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        for rank in range(count)
    ]


def ends(processes: list[subprocess.Popen]) -> tuple[list[int], list[str]]:
    """Exit codes, and what each said on stderr."""
    try:
        said = [process.communicate(timeout=60)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [process.returncode for process in processes], said


def learned(file: Path) -> tuple[Tensor, dict]:
    with safe_open(file, framework="pt") as read:
        return read.get_tensor("rotations"), json.loads(
            read.metadata()["signlattice.distributed.spread"]
        )


def flags(config: LearnConfig) -> list[str]:
    names = ("solver", "seed", "steps", "warm_steps", "batch", "polish_steps", "tolerance")
    return [
        text
        for name in names
        if getattr(config, name) is not None
        for text in (f"--{name.replace('_', '-')}", str(getattr(config, name)))
    ]


def assert_same(file: Path, other: Path) -> None:
    (rotations, header), (others, theirs) = learned(file), learned(other)
    assert torch.equal(rotations, others)
    assert header | {"processes": 0} == theirs | {"processes": 0}


@pytest.fixture(scope="module")
def alone(folder: Path, others: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """By solver, what one process learns."""
    place = tmp_path_factory.mktemp("alone")
    for solver in ("annealed", "itq"):
        options = ("--held-out", others, *flags(SHORT[solver]))
        assert spread.main([*map(str, (folder, place / solver, *options))]) == 0
    return {solver: place / solver for solver in ("annealed", "itq")}


def test_the_record_says_what_was_learned_from_what(alone, folder, others):
    rotations, header = learned(alone["annealed"])
    keys, judges = open_keys(folder), open_keys(others)
    assert header["keys"] == keys.chunks.shards.fingerprint
    assert header["held_out"] == judges.chunks.shards.fingerprint
    assert (header["n_keys"], header["processes"]) == (3000, 1)
    assert LearnConfig(**header["config"] | {"temperature": (2.0, 0.1), "angle": (0.2, 0.04)}) == (
        SHORT["annealed"].resolved(16)
    )
    for name, source in (("train_beta", keys), ("held_out_beta", judges)):
        found = [mean_cosine(k, r) for k, r in zip(in_memory(source), rotations, strict=True)]
        assert header[name] == pytest.approx(found, abs=1e-6)
    assert len(set(header["train_beta"])) == 3


@pytest.mark.parametrize(("solver", "count"), [("annealed", 2), ("annealed", 3)])
def test_several_processes_learn_what_one_does(solver, count, alone, folder, others, tmp_path):
    options = ("--held-out", others, *flags(SHORT[solver]))
    codes, said = ends(start(count, folder, tmp_path / "out", *options))
    assert codes == [0] * count, said
    assert_same(tmp_path / "out", alone[solver])
    assert learned(tmp_path / "out")[1]["processes"] == count
    assert "step" in said[0] and not any(said[1:]), "one process reports, and the others are silent"


def test_torchrun_starts_it(alone, folder, others, tmp_path):
    command = (
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        "-m",
        "signlattice.distributed.spread",
        folder,
        tmp_path / "out",
        "--held-out",
        others,
        *flags(SHORT["itq"]),
    )
    done = subprocess.run(
        list(map(str, command)), env=environment(), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert_same(tmp_path / "out", alone["itq"])
    assert learned(tmp_path / "out")[1]["processes"] == 2


def test_more_processes_than_chunks_are_no_harm(tmp_path):
    write_shards(tmp_path / "keys", [planted(3000)], chunk_keys=3000)
    out, options = tmp_path / "out", flags(SHORT["itq"])
    codes, said = ends(start(2, tmp_path / "keys", out, *options))
    assert codes == [0, 0], said
    assert spread.main([str(tmp_path / "keys"), str(tmp_path / "one"), *options]) == 0
    assert_same(out, tmp_path / "one")


def test_a_run_that_was_killed_is_resumed_by_another_number_of_processes(folder, tmp_path):
    """SIGKILL to one of two: the other does not wait for it, and what both had done is kept."""
    config = LearnConfig(steps=100, warm_steps=100, batch=700, polish_steps=5, tolerance=0.0)
    checkpoint, out = tmp_path / "run", tmp_path / "out"
    options = (*flags(config), "--checkpoint", checkpoint, "--checkpoint-every", 1)
    running = start(2, folder, out, *options)
    try:
        wait_for(checkpoint, running)
        os.kill(running[0].pid, signal.SIGKILL)
    finally:
        codes, _ = ends(running)
    assert codes[0] == -signal.SIGKILL and codes[1] not in (0, -signal.SIGKILL)
    assert not out.exists()
    with safe_open(checkpoint, framework="pt") as read:
        done = json.loads(read.metadata()["signlattice.rotations.solvers"])["state"]["total"]
    assert 0 < done < 205
    for name, more in (("resumed", ("--checkpoint", checkpoint)), ("straight", ())):
        arguments = (folder, tmp_path / name, *flags(config), *more, "--checkpoint-every", 1)
        assert spread.main(list(map(str, arguments))) == 0
    assert_same(tmp_path / "resumed", tmp_path / "straight")


def wait_for(file: Path, running: list[subprocess.Popen]) -> None:
    until = time.monotonic() + 60
    while not file.exists():
        assert time.monotonic() < until and all(process.poll() is None for process in running)
        time.sleep(0.01)


def test_damage_that_one_process_meets_ends_all_with_one_message(copy, tmp_path):
    content = bytearray((copy / "keys.00000.safetensors").read_bytes())
    content[-1] ^= 1  # in the shard's last chunk, which one process reads
    (copy / "keys.00000.safetensors").write_bytes(content)
    checkpoint = tmp_path / "run"
    codes, said = ends(start(2, copy, tmp_path / "out", "--checkpoint", checkpoint))
    assert codes == [2, 2]
    assert said[1] == "" and said[0].splitlines()[-1].startswith("error: ")
    assert "keys.00000.safetensors is damaged" in said[0]
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--held-out", "nowhere"), "nowhere holds no whole keys"),
        (("--steps", "0"), "steps=0"),
        (("--cache-bytes", "-1"), "cache_bytes=-1"),
        (("--checkpoint", "{folder}/index.json"), "is no checkpoint"),
        (("--impl", "triton", "--held-out", "{small}"), r"expected [3, M, 16]"),
    ],
)
def test_bad_input_ends_the_command_with_2_and_one_line(options, message, folder, tmp_path, capsys):
    write_shards(tmp_path / "small", [planted(99, heads=2)])
    places = {"folder": folder, "small": tmp_path / "small"}
    before = sorted(folder.iterdir())
    given = [option.format(**places) for option in options]
    assert spread.main([str(folder), str(tmp_path / "out"), *given]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ") and said.count("\n") == 1 and message in said
    assert sorted(folder.iterdir()) == before and not (tmp_path / "out").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_told(folder, tmp_path, capsys):
    assert spread.main([str(folder), str(tmp_path / "out"), "--device", "cuda"]) == 2
    assert "has no GPU, there are 0" in capsys.readouterr().err
