"""Which kind of devices a program is for is told by its mesh, not found out from the process."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import jax
import pytest

from jaxmoo.errors import ConfigError
from jaxmoo.mesh import make_mesh
from jaxmoo.models import Decoder, DecoderConfig
from jaxmoo.models.lora import LoRA, add_adapters
from jaxmoo.platforms import platform_of

PACKAGE = Path(__file__).parents[1] / "jaxmoo"

# What tells of the devices that the process has.
ASKS_JAX = {"default_backend", "devices", "local_devices", "device_count", "local_device_count"}
DEFAULTS = {"default_platform", "several_devices"}

# Where it may be asked for: defaults of what people call by themselves, and what is about the
# process itself.
ASKED = {
    ("platforms.py", "default_platform"),
    ("platforms.py", "several_devices"),
    ("mesh.py", "make_mesh"),
    ("models/decoder.py", "Decoder"),
    ("models/attention/choice.py", "attend"),
    ("models/attention/choice.py", "choose_attention"),
    ("kernels/reductions.py", "is_partitioned"),  # gram, combine_rows and resolve_conflicts
    ("runtime/compiled.py", "kept_programs"),
    ("runtime/processes.py", "start"),
    ("runtime/processes.py", "Agreement"),
}


def asked(path: Path) -> Iterator[str]:
    """The outermost functions and classes of a file that ask."""
    for outer in ast.parse(path.read_text(encoding="utf-8")).body:
        for node in ast.walk(outer):
            match node:
                case ast.Attribute(value=ast.Name(id="jax"), attr=name) if name in ASKS_JAX:
                    yield getattr(outer, "name", "the module")
                case ast.Name(id=name) if name in DEFAULTS:
                    yield getattr(outer, "name", "the module")


def test_nothing_but_defaults_asks_what_the_process_has():
    found = {
        (path.relative_to(PACKAGE).as_posix(), name)
        for path in PACKAGE.rglob("*.py")
        if path.parent.name != "commands"
        for name in asked(path)
    }
    assert found == ASKED


def test_questions_are_found(tmp_path):
    file = tmp_path / "module.py"
    file.write_text(
        "import jax\nN = jax.device_count()\nclass A:\n def f(self): return jax.devices()[0]\n"
    )
    assert list(asked(file)) == ["the module", "A"]


def devices(*platforms: str) -> list[SimpleNamespace]:
    return [SimpleNamespace(platform=platform) for platform in platforms]


def test_a_mesh_has_devices_of_one_kind():
    assert platform_of(devices("cuda", "gpu")) == "gpu"
    assert platform_of(devices("tpu")) == "tpu"
    with pytest.raises(ConfigError, match="devices of one kind, found cpu and tpu"):
        make_mesh(2, devices=devices("cpu", "tpu"))
    with pytest.raises(ConfigError, match="found none"):
        platform_of([])


@pytest.mark.parametrize("platform", ["cpu", "gpu", "tpu"])
def test_every_product_of_a_model_knows_the_kind(platform):
    config = DecoderConfig(
        vocab_size=64,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=128,
    )
    model = Decoder.abstract(config, platform=platform, attention="xla")
    add_adapters(model, LoRA(rank=2, alpha=2.0, targets=("q_proj",)), layers=[0, 1])
    layer = model.layers["0"]
    adapted = layer.self_attn.q_proj
    parts = (layer.self_attn, layer.self_attn.o_proj, layer.mlp.up_proj, adapted, adapted.lora_B)
    for part in parts:
        assert part.platform == platform
    assert Decoder.abstract(config).platform == jax.default_backend()
