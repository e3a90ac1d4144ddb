from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from signlattice.kernels import cores


@pytest.fixture(params=["torch's threads", "threads of our own"])
def either_pool(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "threads of our own":
        monkeypatch.setattr(cores, "_openmp", lambda: None)
    elif cores._openmp() is None:
        pytest.skip("torch's OpenMP has another interface here")


@pytest.mark.parametrize("n", [1, 2, 3])
def test_run_on_all_threads_does_work_by_so_many_threads_at_once(n: int, either_pool: None) -> None:
    meeting, seen = threading.Barrier(n, timeout=20), []

    def work() -> None:
        meeting.wait()  # passes only if all are there together
        seen.append(threading.get_ident())

    cores.run_on_all_threads(work, n)
    assert len(set(seen)) == n and threading.get_ident() in seen


def test_run_on_all_threads_raises_an_exception_of_any_and_the_next_call_works(
    either_pool: None,
) -> None:
    here = threading.get_ident()
    started = threading.Barrier(2, timeout=20)

    def work() -> None:
        started.wait()
        if threading.get_ident() != here:
            raise ValueError("from another thread")

    with pytest.raises(ValueError, match="from another thread"):
        cores.run_on_all_threads(work, 2)
    done = []
    cores.run_on_all_threads(lambda: done.append(1), 2)
    assert len(done) == 2


def test_run_on_all_threads_leaves_torch_computing_as_before(either_pool: None) -> None:
    a = torch.randn(600, 600, generator=torch.Generator().manual_seed(0))
    before = a @ a
    cores.run_on_all_threads(lambda: None, torch.get_num_threads())
    assert torch.equal(a @ a, before)


def test_map_matrices_leaves_threads_to_come_as_many_threads_as_before() -> None:
    n = torch.get_num_threads()
    cores.map_matrices(torch.linalg.inv, torch.eye(3).expand(4, 3, 3))
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(torch.get_num_threads).result() == n
