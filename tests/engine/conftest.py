"""Meshes of virtual devices, in a process of their own."""

from __future__ import annotations

import pytest


@pytest.fixture(scope="session")
def on_mesh(eight_devices):
    """``(mesh, case) -> arrays by name``."""
    return lambda mesh, name: eight_devices("engine.cases", "on_mesh", mesh, name)
