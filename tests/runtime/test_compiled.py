"""Compiled programs are kept where a run says, unless the user keeps them elsewhere."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest
from jax.experimental.compilation_cache import compilation_cache

from jaxmoo.runtime.compiled import compiler_options, kept_programs


@pytest.fixture
def no_other_cache():
    """As where a user has set nothing; programs that compile in no time are kept, too."""
    names = (
        "jax_compilation_cache_dir",
        "jax_persistent_cache_min_compile_time_secs",
        "jax_persistent_cache_min_entry_size_bytes",
    )
    before = {name: getattr(jax.config, name) for name in names}
    for name, value in zip(names, (None, 0.0, -1), strict=True):
        jax.config.update(name, value)
    yield
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


def compile_anew():
    jax.clear_caches()
    return jax.jit(lambda x: jnp.sin(x) @ x.T).lower(jnp.ones((8, 8))).compile()


def files(directory):
    return {p: p.stat().st_mtime_ns for p in directory.rglob("*") if p.is_file()}


def test_a_program_is_compiled_once_and_then_read(no_other_cache, tmp_path, caplog):
    with kept_programs(tmp_path / "a"):
        compile_anew()
    kept = files(tmp_path / "a")
    assert kept
    with kept_programs(tmp_path / "a"), jax.log_compiles(), caplog.at_level("WARNING"):
        compile_anew()
    assert "Persistent compilation cache hit" in caplog.text
    assert files(tmp_path / "a") == kept
    # Each run keeps its own, and nothing is kept outside.
    with kept_programs(tmp_path / "b"):
        compile_anew()
    assert len(files(tmp_path / "b")) == len(kept)
    compile_anew()
    assert jax.config.jax_compilation_cache_dir is None and files(tmp_path / "a") == kept


@pytest.mark.filterwarnings("ignore:Error reading persistent compilation cache")
def test_a_damaged_file_costs_a_compilation_and_no_more(no_other_cache, tmp_path):
    for _ in range(2):
        with kept_programs(tmp_path):
            compile_anew()
        for file in files(tmp_path):
            file.write_bytes(file.read_bytes()[:20])


def test_the_users_own_cache_is_used(no_other_cache, tmp_path):
    jax.config.update("jax_compilation_cache_dir", str(tmp_path / "users"))
    with kept_programs(tmp_path / "run"):
        compile_anew()
    assert files(tmp_path / "users") and not (tmp_path / "run").exists()


ASYNC = "xla_tpu_enable_async_all_to_all"


@pytest.mark.parametrize(
    ("kind", "sizes", "set"),
    [
        ("TPU v5 lite", [16], True),
        ("TPU v5 lite", [32], False),  # its compiler would end with an error
        ("TPU v5 lite", [16, 16], True),
        ("TPU v5 lite", [64, 64], False),
        ("TPU v5", [128], True),
        ("TPU v6 lite", [256], True),
    ],
)
def test_the_exchange_runs_beside_products_where_the_compiler_can(kind, sizes, set):
    devices = [
        SimpleNamespace(platform="tpu", device_kind=kind, slice_index=number)
        for number, size in enumerate(sizes)
        for _ in range(size)
    ]
    assert compiler_options(devices, {}) == ({ASYNC: True} if set else {})
    assert compiler_options(devices, {ASYNC: None}) == {}
    assert compiler_options(devices, {ASYNC: True}) == {ASYNC: True}
