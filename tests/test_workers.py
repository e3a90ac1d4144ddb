"""Work shared out among processes: the same bits for any number, and no hang where one fails."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from contextlib import redirect_stdout
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from conftest import TEXTS
from processes import SECONDS, run_workers
from signlattice import calibration, cli
from signlattice.distributed.capture import MAX_PARTS, split_batches
from signlattice.distributed.workers import Workers
from signlattice.errors import InputError
from signlattice.models.passages import Passage, batches


@given(count=st.integers(1, 9), n=st.integers(0, 40))
def test_workers_share_each_item_once_and_evenly(count, n):
    shares = [Workers(rank, count).share(range(n)) for rank in range(count)]
    assert sorted(item for share in shares for item in share) == list(range(n))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


@pytest.mark.parametrize("rank, count", [(1, 1), (-1, 2), (0, 0)])
def test_workers_refuse_a_rank_out_of_range(rank, count):
    with pytest.raises(InputError, match=f"rank={rank} of {count} processes"):
        Workers(rank, count)


def test_workers_are_one_process_without_torchrun(monkeypatch):
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    with Workers.current() as workers:
        workers.barrier()
        assert (workers.count, workers.leads) == (1, True)


@given(lengths=st.lists(st.integers(1, 9), min_size=1, max_size=200), batch_size=st.integers(1, 5))
def test_split_batches_keeps_the_batches_of_all_passages(lengths, batch_size):
    pieces = [Passage(str(i), torch.full((n,), i), n) for i, n in enumerate(lengths)]
    parts = split_batches(pieces, batch_size)
    assert len(parts) <= MAX_PARTS
    in_parts = [ids.tolist() for part in parts for _, ids, _ in batches(part, batch_size)]
    assert in_parts == [ids.tolist() for _, ids, _ in batches(pieces, batch_size)]


# Learning a codec.


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("workers") / "text"
    folder.mkdir()
    for number in range(24):
        (folder / f"{number}.txt").write_text(f"# {number}\n" + TEXTS[number % 3] * 8)
    return folder


def learn(model: Path, text: Path, output: Path) -> int:
    options = ("--text", text, "--code", "rotation", "--keys-per-dim", 40, "--batch-size", 4)
    with (text.parent / f"said-{os.environ['RANK']}").open("w") as said, redirect_stdout(said):
        return cli.main(list(map(str, ("learn", model, "-o", output, "--quiet", *options))))


def learn_until_one_is_killed(model: Path, text: Path, output: Path) -> int:
    """Learn, and kill process 1 where it begins with a layer."""
    if os.environ["RANK"] == "1":
        calibration._learned = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
    return learn(model, text, output)


@pytest.fixture(scope="module")
def alone(llama_folder: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The codec file that one process writes."""
    output = tmp_path_factory.mktemp("alone") / "codec.safetensors"
    assert run_workers(1, learn, llama_folder, text, output) == [0]
    return output.read_bytes()


@pytest.mark.parametrize("count", [2, 3])
@pytest.mark.slow
def test_cli_learn_writes_the_same_file_by_any_number_of_processes(
    count, alone, llama_folder, text, tmp_path
):
    output = tmp_path / "codec.safetensors"
    assert run_workers(count, learn, llama_folder, text, output) == [0] * count
    assert output.read_bytes() == alone
    assert [path.name for path in tmp_path.iterdir()] == [output.name]
    said = [(text.parent / f"said-{rank}").read_text() for rank in range(count)]
    assert "codec.safetensors" in said[0] and not any(said[1:]), "one process reports"


@pytest.mark.slow
def test_cli_learn_resumes_by_another_number_of_processes(alone, llama_folder, text, tmp_path):
    output = tmp_path / "codec.safetensors"
    codes = run_workers(3, learn_until_one_is_killed, llama_folder, text, output)
    assert codes[1] == -signal.SIGKILL and 0 not in codes and not output.exists()
    assert next(tmp_path.glob("codec.safetensors.parts/*/layer-0.safetensors")).is_file()
    assert run_workers(2, learn, llama_folder, text, output) == [0, 0]
    assert output.read_bytes() == alone
    assert [path.name for path in tmp_path.iterdir()] == [output.name]


def test_learn_codec_shared_needs_a_folder():
    with pytest.raises(InputError, match="2 processes share their work in a folder: give scratch"):
        calibration.learn_codec_shared(Workers(0, 2), None, None)


@pytest.mark.slow
def test_workers_all_end_with_the_message_of_the_one_that_fails(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "from signlattice.distributed.workers import Workers\n"
        "with Workers.current() as workers:\n"
        "    workers.barrier()\n"
        "    if workers.rank == 1:\n"
        "        raise RuntimeError('no disk left for layer 7')\n"
        "    workers.barrier()\n"
    )
    command = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node")
    done = subprocess.run(
        [*command, "2", str(script)], capture_output=True, text=True, timeout=SECONDS
    )
    assert done.returncode != 0
    assert "no disk left for layer 7" in done.stderr
