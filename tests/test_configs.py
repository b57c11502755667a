"""Every config that comes with the project can be run: its step is lowered, and some fit."""

from __future__ import annotations

from pathlib import Path

import pytest

from jaxmoo.config import validate
from jaxmoo.config.training import load_config
from jaxmoo.data.tokenization.tokenizer import read_template
from jaxmoo.hf import load_tokenizer
from jaxmoo.train.planning import abstract_step, plan, shape_of

ROOT = Path(__file__).parents[1]
# What each file says it is for: devices, and the memory of one in GB.
DEVICES = {
    "llama-3-8b": (8, 32),
    "llama-3.1-8b": (8, 32),
    "qwen3-4b-base": (8, 32),
    "qwen3-8b-base": (8, 32),
    "gemma-3-4b": (8, 24),
    "apertus-8b": (8, 40),
    "eurollm-9b": (8, 40),
    "aya-expanse-8b": (8, 40),
    "qwen3-0.6b-base": (1, 24),
    "qwen3-8b-base-lora": (1, 40),
    "qwen3-8b-base-qlora": (1, 24),
    "qwen3-30b-a3b": (8, 80),
    "lora": (1, 8),
    "quickstart": (1, 8),
}

# Those that are compiled, one for each number of devices.
COMPILED = {1: "qwen3-0.6b-base", 8: "qwen3-8b-base"}


def test_every_config_is_listed():
    assert {path.stem for path in (ROOT / "configs").glob("*.yaml")} == set(DEVICES)


@pytest.mark.parametrize("name", DEVICES)
def test_every_config_makes_a_step(name):
    """Its settings agree with each other and with the model; nothing is traced."""
    config = load_config(ROOT / f"configs/{name}.yaml")
    validate(config)
    assert abstract_step(config, shape_of(config.model.source)).gradients.partition.names


def memory_of_one(devices: int) -> int:
    """Bytes per device; the steps of the other configs for so many devices are lowered."""
    for name, (count, _) in DEVICES.items():
        if count == devices and name != COMPILED[devices]:
            config = load_config(ROOT / f"configs/{name}.yaml")
            step = abstract_step(config, shape_of(config.model.source))
            step.function.lower(*step.arguments)
    return plan(load_config(ROOT / f"configs/{COMPILED[devices]}.yaml")).total


@pytest.mark.slow
@pytest.mark.parametrize("devices", COMPILED)
def test_every_step_is_lowered_and_one_compiles_and_fits(devices, eight_devices):
    """Compiling all of them takes minutes; `jaxmoo plan` does it for one."""
    if devices == 1:
        total = memory_of_one(1)
    else:
        total = eight_devices("test_configs", "memory_of_one", devices)
    assert total < DEVICES[COMPILED[devices]][1] * 1e9


def test_the_template_for_llama_3_marks_what_the_assistant_says(smollm2_dir):
    tokenizer = load_tokenizer(smollm2_dir)
    tokenizer.chat_template = read_template(str(ROOT / "configs/chat_templates/llama-3.jinja"))
    chat = [
        {"role": "user", "content": " How? "},
        {"role": "assistant", "content": "So."},
        {"role": "user", "content": "Why?"},
    ]
    text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)

    def turn(role: str) -> str:
        return f"<|start_header_id|>{role}<|end_header_id|>\n\n"

    assert text == (
        f"{tokenizer.bos_token}{turn('user')}How?<|eot_id|>{turn('assistant')}So.<|eot_id|>"
        f"{turn('user')}Why?<|eot_id|>{turn('assistant')}"
    )
    found = tokenizer.apply_chat_template(
        chat[:2], return_dict=True, return_assistant_tokens_mask=True
    )
    marked = [t for t, m in zip(found["input_ids"], found["assistant_masks"], strict=True) if m]
    assert tokenizer.decode(marked) == "So.<|eot_id|>"
