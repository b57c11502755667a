"""Work that processes divide: all of it is done, or none of them believes so."""

from __future__ import annotations

import pytest

from data.peers import as_processes
from jaxmoo.errors import DataError
from jaxmoo.runtime.peers import Peers


def test_all_learn_what_each_tells_however_often():
    def work(peers):
        name = bytes([peers.number]) * 16
        # Those that tell nothing any more do not keep the others waiting.
        return [peers.union({name}) for _ in range(peers.number)]

    found = as_processes(3, lambda peers: peers.all_do(lambda: work(peers)))
    one, two = bytes([1]) * 16, bytes([2]) * 16
    assert found == [[], [{one, two}], [{one, two}, {two}]]


@pytest.mark.parametrize("when", ["before", "behind"])
def test_what_fails_in_one_fails_in_all(when):
    def work(peers):
        if peers.number == 1 and when == "before":
            raise DataError("en.jsonl:3: no text")
        peers.union(set())
        if peers.number == 1:
            raise DataError("en.jsonl:3: no text")
        return "done"

    found = as_processes(3, lambda peers: peers.all_do(lambda: work(peers)))
    assert [str(one) for one in found] == [
        "Process 1: en.jsonl:3: no text",
        "en.jsonl:3: no text",
        "Process 1: en.jsonl:3: no text",
    ]
    assert all(isinstance(one, DataError) for one in found)


def test_who_is_done_learns_that_one_has_failed_while_others_tell():
    def work(peers):
        if peers.number == 1:
            raise DataError("no text")
        return peers.union(set()) if peers.number == 2 else "done"

    found = as_processes(3, lambda peers: peers.all_do(lambda: work(peers)))
    assert [str(one) for one in found] == ["Process 1: no text", "no text", "Process 1: no text"]


def test_a_single_process_asks_nobody():
    alone = Peers()
    assert alone.all_do(lambda: alone.union({b"x" * 16})) == {b"x" * 16}
    assert alone.here() == 1
