"""Run cases on virtual devices: ``python -m engine.on_mesh OUT DATA LANGUAGE FSDP CASE...``.

Writes the results' arrays, named CASE/ARRAY, to the file OUT.
"""

from __future__ import annotations

import sys

import numpy as np

from engine.cases import CASES, REPLICAS
from jaxmoo.mesh import make_mesh


def main(out: str, data: str, language: str, fsdp: str, *names: str) -> None:
    """Run cases and store what they give."""
    found = {}
    for name in names:
        case = (CASES | REPLICAS)[name]
        mesh = make_mesh(case.k, data=int(data), language=int(language), fsdp=int(fsdp))
        found |= {f"{name}/{array}": x for array, x in case.engine(mesh).items()}
    np.savez(out, **found)


if __name__ == "__main__":
    main(*sys.argv[1:])
