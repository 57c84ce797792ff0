"""Exceptions: each arrives whole wherever it goes, in another process as well."""

from __future__ import annotations

import copy
import importlib
import pickle
import pkgutil
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import pytest

import mooncache
import sim
from mooncache import Failure, MooncacheError, Status, TransferFailed
from sim.errors import ConfigError, Problem, TraceError

FAILURES = (Failure(0, Status.FLUSHED, "why"), Failure(3, Status.PEER_GONE, "gone"))
# Those that are made of more than a text.
MADE = {
    TransferFailed: lambda: TransferFailed(FAILURES, 3, "prefill-0"),
    ConfigError: lambda: ConfigError(Problem("a.yaml:1", "key", "expected"), Problem("", "", "two")),
    TraceError: lambda: TraceError("trace.jsonl", 7, "timestamp", "an integer", "nothing"),
}


def _import_all() -> None:
    for package in (mooncache, sim):
        for module in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
            if "rdma" not in module.name and "__main__" not in module.name:  # those need libraries
                importlib.import_module(module.name)


def _kinds(base: type[MooncacheError] = MooncacheError) -> Iterator[type[MooncacheError]]:
    yield base
    for kind in base.__subclasses__():
        yield from _kinds(kind)


_import_all()
KINDS = sorted(set(_kinds()), key=lambda kind: kind.__qualname__)
WAYS = {
    **{f"pickle {n}": lambda e, n=n: pickle.loads(pickle.dumps(e, n)) for n in range(pickle.HIGHEST_PROTOCOL + 1)},
    "copy": copy.copy,
    "deepcopy": copy.deepcopy,
}


def made(kind: type[MooncacheError]) -> MooncacheError:
    return MADE.get(kind, lambda: kind("what was expected, what came"))()


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_every_exception_arrives_whole(kind, way):
    error = made(kind)
    error.note = "an attribute of its own"  # type: ignore[attr-defined]
    error.__cause__ = OSError(5, "what it was raised from")
    arrived = WAYS[way](error)
    assert type(arrived) is kind
    assert str(arrived) == str(error)
    assert vars(arrived) == vars(error)
    assert arrived.args == error.args


def fail(kind: str) -> None:
    raise made(next(k for k in KINDS if k.__qualname__ == kind))


def test_every_exception_arrives_from_a_process_of_a_pool():
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        for kind in KINDS:
            with pytest.raises(kind) as caught:
                pool.submit(fail, kind.__qualname__).result(60)
            assert str(caught.value) == str(made(kind))
