"""Two gloo processes that run tests: both run the body, and a hang or a death of either is a failure."""

import functools
import importlib
import inspect
import multiprocessing
import traceback
import warnings
from datetime import timedelta
from multiprocessing.connection import wait

import pytest
import torch
import torch.distributed as dist

LIMIT = 20  # seconds; a collective that waits longer fails where it waits


class Answer:
    """Tells how a block ended: None, or what went wrong, of which the rank then dies."""

    def __init__(self, connection):
        self.connection = connection

    def __enter__(self):
        return self

    def __exit__(self, kind, error, trace):
        self.connection.send(error and "".join(traceback.format_exception(error)))


def serve(rank, rendezvous, connection):
    """What a rank does: runs the bodies of tests by name."""
    warnings.simplefilter("error")
    # What torch says where `no_dist=True` asks for it.
    warnings.filterwarnings("ignore", "torch.distributed is disabled")
    torch.set_num_threads(1)
    with Answer(connection):
        dist.init_process_group(
            "gloo",
            init_method=f"file://{rendezvous}",
            rank=rank,
            world_size=2,
            timeout=timedelta(seconds=LIMIT),
        )
    while True:
        module, name, arguments = connection.recv()
        with Answer(connection):
            getattr(importlib.import_module(module), name).body(**arguments)
            dist.barrier()


class Ranks:
    """The two processes. They start with the first test and again after one that failed."""

    def __init__(self, folder):
        self.folder, self.started, self.processes = folder, 0, []

    def start(self):
        self.started += 1
        rendezvous = self.folder / str(self.started)
        spawn = multiprocessing.get_context("spawn")
        self.connections, ends = zip(*(spawn.Pipe() for _ in range(2)), strict=True)
        self.processes = [
            spawn.Process(target=serve, args=(rank, rendezvous, end), daemon=True)
            for rank, end in enumerate(ends)
        ]
        for process, end in zip(self.processes, ends, strict=True):
            process.start()
            end.close()
        self.answers()

    def stop(self):
        for process in self.processes:
            process.kill()
            process.join()
        self.processes = []

    def run(self, task):
        if not self.processes:
            self.start()
        for connection in self.connections:
            connection.send(task)
        self.answers()

    def answers(self):
        waiting, failures = list(self.connections), []
        while waiting:
            # One that has failed makes the other wait: for a collective, or the barrier.
            ready = wait(waiting, timeout=3 if failures else 2 * LIMIT)
            if not ready:
                failures.append("a rank hangs")
                break
            for connection in ready:
                waiting.remove(connection)
                try:
                    failure = connection.recv()
                except EOFError:
                    failure = "a rank died"
                if failure:
                    failures.append(failure)
        if failures:
            self.stop()
            pytest.fail("\n".join(failures), pytrace=False)


def on_both_ranks(body):
    """Makes a test whose body runs on both ranks, with pytest's arguments."""

    @functools.wraps(body)
    def test(ranks, **arguments):
        ranks.run((body.__module__, body.__name__, arguments))

    ranks = inspect.Parameter("ranks", inspect.Parameter.POSITIONAL_OR_KEYWORD)
    parameters = inspect.signature(body).parameters.values()
    test.__signature__ = inspect.Signature([ranks, *parameters])
    test.body = body
    return test
