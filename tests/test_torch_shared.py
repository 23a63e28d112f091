"""Shared memory: workers forked or spawned, and threads, step one model and one state; each sees what the others did.

What forks does so in an interpreter of its own, and everything has a time limit: a hang is a failure.
"""

import contextlib
import functools
import sys
import threading

import pytest
import torch
import torch.multiprocessing as mp
from rmsprop.torch import RMSprop
from torch import nn

WORKERS, STEPS = 2, 10
# A gradient that stays the same has no variance in the end: alpha keeps that far off.
OPTIONS = {"momentum": 0.9, "centered": True, "alpha": 0.9999}
LARGE = 1_500_000
LIMIT = 40  # seconds


class SharedRMSprop(RMSprop):
    """As in A3C: all of the state exists, in shared memory, before there are workers."""

    def __init__(self, params, **options):
        super().__init__(params, **options)
        self.init_state()
        for entry in self.state.values():
            for tensor in entry.values():
                tensor.share_memory_()


def stepped(params, **options):
    """The state comes from a step, and is moved to shared memory where it is."""
    opt = RMSprop(params, **options)
    give_gradients(opt)
    opt.param_groups[0]["lr"] = 0.0
    opt.step()
    opt.param_groups[0]["lr"] = 0.01
    for state in opt.state.values():
        for value in state.values():
            value.share_memory_()
            value.zero_()
    opt.zero_grad()
    return opt


def replaced(params, **options):
    """Every tensor of the state is put in place of another."""
    opt = stepped(params, **options)
    for state in opt.state.values():
        for key, value in state.items():
            state[key] = value.clone().share_memory_()
    return opt


def small_model(size=1):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4 * size, 5 * size), nn.Linear(5 * size, 1))


def give_gradients(opt):
    """The same at every step, so that the order of the workers makes no difference."""
    for group in opt.param_groups:
        for index, param in enumerate(group["params"]):
            param.grad = torch.full_like(param, 0.5 + index)


def work(pairs, lock):
    """What a worker does: its gradients are its own, the rest is everybody's."""
    for model, opt in pairs:
        params = opt.param_groups[0]["params"]
        assert all(one is other for one, other in zip(model.parameters(), params))
        give_gradients(opt)
        for _ in range(STEPS):
            with lock:
                opt.step()


def bits(opt):
    params = opt.param_groups[0]["params"]
    return [
        tensor.detach().clone()
        for param in params
        for tensor in (param, *opt.state[param].values())
    ]


def equals_steps(opt, count, size=1):
    """Whether it is where that many steps come to in one process."""
    expected = SharedRMSprop(small_model(size).parameters(), **OPTIONS)
    give_gradients(expected)
    for _ in range(count):
        expected.step()
    torch.testing.assert_close(bits(opt), bits(expected), rtol=0, atol=0)


def run_processes(method, function, arguments=(), count=1):
    context = mp.get_context(method)
    processes = [context.Process(target=function, args=arguments) for _ in range(count)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(LIMIT)
        assert process.exitcode == 0


def workers(method):
    """The number of updates adds up, and they are what one process makes of them; the parent goes on from there."""
    pairs = []
    for make in (SharedRMSprop, stepped, replaced):
        for contiguous in (False, True):
            model = small_model()
            opt = make(model.parameters(), **OPTIONS, contiguous_params=contiguous)
            pairs.append((model.share_memory(), opt))
    lock = mp.get_context(method).Lock()
    run_processes(method, work, (pairs, lock), WORKERS)
    for _, opt in pairs:
        equals_steps(opt, WORKERS * STEPS)
        give_gradients(opt)
        opt.step()
        equals_steps(opt, WORKERS * STEPS + 1)


def test_spawned_workers():
    workers("spawn")


# --- after a fork: in an interpreter of their own ---------------------------------------------


def forked_workers():
    workers("fork")


def forked_workers_without_a_lock():
    """Hogwild: updates may be lost, nothing else."""
    model = small_model().share_memory()
    before = [param.detach().clone() for param in model.parameters()]
    opt = SharedRMSprop(model.parameters(), alpha=0.9)
    run_processes("fork", work, ([(model, opt)], contextlib.nullcontext()), WORKERS)
    for param, old in zip(model.parameters(), before, strict=True):
        assert (param < old).all()
        assert 1 <= opt.state[param]["step"] <= WORKERS * STEPS


def forked_worker_with_large_tensors():
    """The parent has used its threads, and torch's, before the fork; the child uses its own."""
    torch.set_num_threads(3)
    param = nn.Parameter(torch.zeros(LARGE).share_memory_())
    (param * 1.0).sum().backward()
    opt = RMSprop([param], alpha=0.75, lr=0.5)
    opt.step()
    assert (param == -1.0).all()

    def child():
        opt.step()
        # Torch's own operations would wait for the parent's threads.
        torch.set_num_threads(1)
        assert (param < -1.0).all()
        assert (param == param[0]).all()
        fresh = RMSprop([param], alpha=0.75, lr=0.5, threads=3)
        with torch.no_grad():
            param.zero_()
        fresh.step()

    run_processes("fork", child)
    assert (param == -1.0).all()
    opt.step()
    assert (param < -1.0).all()


def forked_worker_of_a_parent_that_never_stepped():
    """The parent has used torch's threads, and ours never; state is made in the child."""
    torch.set_num_threads(3)
    param = nn.Parameter(torch.zeros(LARGE).share_memory_())
    (param * 1.0).sum().backward()
    opt = RMSprop([param], alpha=0.75, lr=0.5, momentum=0.5, centered=True)

    def child():
        opt.step()
        # Torch's own operations would wait for the parent's threads.
        torch.set_num_threads(1)
        assert (param < 0).all()

    run_processes("fork", child)


FORKED = [
    forked_workers,
    forked_workers_without_a_lock,
    forked_worker_with_large_tensors,
    forked_worker_of_a_parent_that_never_stepped,
]


@pytest.mark.parametrize("scenario", [each.__name__ for each in FORKED])
def test_fork(scenario, run_python):
    run_python(f"import test_torch_shared; test_torch_shared.{scenario}()", LIMIT + 20)


# --- threads ---------------------------------------------------------------------------------


@pytest.fixture
def switching_often():
    usual = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(usual)


def run_threads(functions):
    """A thread that raises fails the test by pytest's own warning, one that hangs by this."""
    threads = [threading.Thread(target=each, daemon=True) for each in functions]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(LIMIT)
        assert not thread.is_alive()


@pytest.mark.parametrize("size, count", [(1, 200), (200, 10)])
@pytest.mark.parametrize("locked", [False, True], ids=["no lock", "lock"])
def test_threads_with_one_optimizer(locked, size, count, switching_often, contiguous):
    """Take turns, with a lock and without."""
    model = small_model(size)
    opt = SharedRMSprop(model.parameters(), **OPTIONS, contiguous_params=contiguous)
    give_gradients(opt)
    lock = threading.Lock() if locked else contextlib.nullcontext()

    def steps():
        for _ in range(count):
            with lock:
                opt.step()

    run_threads([steps] * 4)
    equals_steps(opt, 4 * count, size)


@pytest.mark.parametrize("numel, count", [(64, 500), (200_000, 20)])
def test_threads_with_their_own_optimizers(numel, count, switching_often):
    """Over one parameter: updates may be lost, nothing else. Sizes that stay on the caller and that do not."""
    param = nn.Parameter(torch.zeros(numel))
    param.grad = torch.ones(numel)
    opts = [RMSprop([param], alpha=0.5, threads=2) for _ in range(4)]

    def steps(opt):
        for _ in range(count):
            opt.step()

    run_threads([functools.partial(steps, opt) for opt in opts])
    assert param.isfinite().all()
    assert (param < 0).all()
    for opt in opts:
        assert opt.state[param]["step"] == count
        assert (opt.state[param]["square_avg"] > 0.99).all()


def test_the_first_step_from_two_threads():
    """One of them makes the state, and no update is lost."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        for _ in range(20):
            params = [torch.ones(5, requires_grad=True) for _ in range(10)]
            opt = RMSprop(params)
            for param in params:
                param.grad = torch.ones(5)
            gate = threading.Barrier(2)

            def step(gate=gate, opt=opt):
                gate.wait()
                opt.step()

            threads = [threading.Thread(target=step) for _ in range(2)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join(60)
            assert {opt.state[param]["step"].item() for param in params} == {2.0}
    finally:
        sys.setswitchinterval(interval)
