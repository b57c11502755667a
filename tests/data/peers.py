"""Processes as threads of one."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

from jaxmoo.runtime.peers import Peers


def as_processes(count, work):
    """Call ``work(peers)`` as each of so many processes; return the results, or what was raised."""
    barrier, told = threading.Barrier(count), [b""] * count

    def run(number):
        def exchange(mine):
            told[number] = mine
            barrier.wait(60)
            every = list(told)
            barrier.wait(60)
            return every

        try:
            return work(Peers(number, count, exchange))
        except Exception as error:
            return error

    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(run, range(count)))
