"""A run that trains adapters, from its config to files that peft and transformers load."""

from __future__ import annotations

import json
import re
import shutil

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from flax import nnx
from safetensors.numpy import load_file

from jaxmoo.commands.convert import main as convert
from jaxmoo.commands.train import main
from jaxmoo.config import load_config
from jaxmoo.convert.models import open_model
from jaxmoo.engine import cost
from jaxmoo.hf import save_adapter
from jaxmoo.kernels.quantized import dequantize, quantize
from jaxmoo.models import Decoder, DecoderConfig, merge_adapters
from jaxmoo.models.lora import adapters, initial_adapters, quantized_kernels
from jaxmoo.models.quantization import count_parameters
from jaxmoo.runs.checkpoint import STATE
from jaxmoo.runs.directory import RunDirectory
from jaxmoo.runs.trained_parameters import run_segments, split_model
from jaxmoo.train.export import export
from jaxmoo.train.job import Job
from jaxmoo.train.metrics import read_metrics
from jaxmoo.train.planning import abstract_step
from jaxmoo.train.setup import prepare

WEIGHTS, ADAPTER = "model.safetensors", "adapter_model.safetensors"
LORA = {"rank": 4, "alpha": 8, "targets": ["q_proj", "v_proj", "down_proj"], "export": "both"}


def run_config(write_config, **lora):
    return write_config(
        lora=LORA | lora,
        optimizer__learning_rate=1e-2,
        report=False,
        tensorboard=False,
        data__seen=["it", "pt"],
        data__unseen=[],
        resolve__weighting="famo",
    )


@pytest.fixture
def config_file(write_config):
    return run_config(write_config)


def copied(run, path, *without):
    """A copy of a run as it was before it had written some things."""
    shutil.copytree(run, path)
    for name in ("results.json", "export", "adapter", *without):
        target = path / name
        shutil.rmtree(target) if target.is_dir() else target.unlink()
    return path


@pytest.mark.slow
def test_a_run_from_config_to_files_that_peft_loads(write_config, tiny_model, tmp_path, capsys):
    run = tmp_path / "run"
    config_file = run_config(write_config, rslora=True, dora=True, rank_pattern={"down_proj": 2})
    assert main(["--config", str(config_file)]) == 0
    # Adapters on layers 2 and 3: (in + out) x rank of three projections, and their magnitudes.
    trained = 2 * (4 * ((32 + 32) + (32 + 16)) + 2 * (64 + 32) + (32 + 16 + 32))
    assert f"Training {trained:,} of " in capsys.readouterr().out
    results = json.loads((run / "results.json").read_text())
    assert results["summary_after"]["seen_nll"] < results["summary_before"]["seen_nll"]
    rows = [row for row in read_metrics(run / "metrics.jsonl") if "loss" in row]
    assert set(rows[0]["blocks"]) == {"layers.2", "layers.3"}
    assert rows[0]["loss_weights"] == {"it": 1, "pt": 1} != rows[1]["loss_weights"]

    # The base is as it was but for what the adapters add.
    before, after = load_file(tiny_model / WEIGHTS), load_file(run / "export" / WEIGHTS)
    changed = {name for name in after if not np.array_equal(before[name], after[name])}
    assert changed == {
        f"model.layers.{i}.{module}.weight"
        for i in (2, 3)
        for module in ("self_attn.q_proj", "self_attn.v_proj", "mlp.down_proj")
    }

    # What transformers reads and what peft reads predict the same.
    import torch
    from peft import AutoPeftModelForCausalLM
    from transformers import AutoModelForCausalLM

    tokens = np.arange(40)[None] * 7 % 259

    def theirs(model):
        with torch.no_grad():
            return model(torch.tensor(tokens)).logits.numpy()

    base = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    start = theirs(base)
    expected = theirs(AutoModelForCausalLM.from_pretrained(run / "export", dtype=torch.float32))
    largest = np.abs(expected).max()
    # ... which finds the base model by itself.
    adapted = theirs(AutoPeftModelForCausalLM.from_pretrained(run / "adapter", dtype=torch.float32))
    np.testing.assert_allclose(adapted, expected, atol=1e-5 * largest)
    assert np.abs(adapted - start).max() > 1e-3 * largest

    # Checkpoints hold adapters and their moments, nothing of the model's size.
    with ocp.PyTreeCheckpointer() as checkpointer:
        state = checkpointer.restore((run / "checkpoints" / "4" / STATE).absolute())
    assert 3 * trained <= count(state) < 3.1 * trained

    # What is exported later is the same.
    merged, adapter = tmp_path / "merged", tmp_path / "adapter"
    assert convert(["to-hf", str(run), str(merged)]) == 0
    assert convert(["to-hf", str(run), str(adapter), "--adapter"]) == 0
    assert (merged / WEIGHTS).read_bytes() == (run / "export" / WEIGHTS).read_bytes()
    assert (adapter / ADAPTER).read_bytes() == (run / "adapter" / ADAPTER).read_bytes()
    assert convert(["inspect", str(run)]) == 0
    assert (
        "adapters with magnitudes (DoRA) of rank 4 on q_proj, v_proj, down_proj"
        in capsys.readouterr().out
    )

    # Interrupted after step 2 and resumed, a run ends with the same adapters.
    resumed = copied(run, tmp_path / "resumed", "checkpoints/4")
    assert main(["--config", str(config_file), f"output={resumed}"]) == 0
    assert "Resuming from the checkpoint of step 2" in capsys.readouterr().out
    assert (resumed / "adapter" / ADAPTER).read_bytes() == (run / "adapter" / ADAPTER).read_bytes()

    # Another run may begin with them.
    config = load_config(config_file, [f"lora.adapter={adapter}"])
    more = prepare(config, lambda _: None)
    save_adapter(more.merge(more.state.params, more.frozen), tmp_path / "more", base_model="base")
    assert (tmp_path / "more" / ADAPTER).read_bytes() == (adapter / ADAPTER).read_bytes()


@pytest.mark.slow
def test_a_run_on_a_quantised_base(write_config, tiny_model, tmp_path, capsys):
    """Checkpoints hold adapters only; what is exported is the base with them, or what they saw."""
    run = tmp_path / "run"
    config_file = run_config(write_config, quantize_base="int8")
    assert main(["--config", str(config_file)]) == 0
    trained = 2 * 4 * ((32 + 32) + (32 + 16) + (64 + 32))
    whole = sum(x.size for x in load_file(tiny_model / WEIGHTS).values())
    assert f"Training {trained:,} of {whole + trained:,} parameters" in capsys.readouterr().out
    results = json.loads((run / "results.json").read_text())
    assert results["summary_after"]["seen_nll"] < results["summary_before"]["seen_nll"]
    assert "LoRA on a base in int8 (rank 4" in (run / "export" / "README.md").read_text()

    # Merged onto the base itself: nothing is coarser than it was.
    before, after = load_file(tiny_model / WEIGHTS), load_file(run / "export" / WEIGHTS)
    changed = {name for name in after if not np.array_equal(before[name], after[name])}
    assert changed == {
        f"model.layers.{i}.{module}.weight"
        for i in (2, 3)
        for module in ("self_attn.q_proj", "self_attn.v_proj", "mlp.down_proj")
    }
    assert convert(["to-hf", str(run), str(tmp_path / "merged")]) == 0
    assert (tmp_path / "merged" / WEIGHTS).read_bytes() == (run / "export" / WEIGHTS).read_bytes()
    opened = open_model(run)
    for name in changed:
        _, _, layer, module, projection, _ = name.split(".")
        segment = opened.model.layers["2"]
        kernel = getattr(getattr(segment, module), projection).kernel[int(layer) - 2]
        np.testing.assert_allclose(kernel.T, after[name], atol=1e-6)
    model = open_model(run, merge=False).model
    assert [path[-1] for _, path, _ in adapters(model)] == ["q_proj", "v_proj", "down_proj"]
    assert any(quantized_kernels(model))

    # Resumed from step 2 it ends with the same adapters, and is merged into what these saw.
    resumed = copied(run, tmp_path / "resumed", "checkpoints/4")
    overrides = [f"output={resumed}", "lora.merge_onto=quantized"]
    assert main(["--config", str(config_file), *overrides]) == 0
    assert (resumed / "adapter" / ADAPTER).read_bytes() == (run / "adapter" / ADAPTER).read_bytes()
    coarse = load_file(resumed / "export" / WEIGHTS)
    name = "model.layers.0.mlp.up_proj.weight"
    values = dequantize(*quantize(before[name].T, "int8")).T
    np.testing.assert_allclose(coarse[name], values, rtol=1e-6)
    merge_adapters(model)
    kernel = model.layers["2"].mlp.down_proj.kernel[1]
    np.testing.assert_allclose(coarse["model.layers.3.mlp.down_proj.weight"], kernel.T, atol=1e-6)


def test_an_export_that_is_not_what_the_settings_ask_for_is_made_anew(
    write_config, tiny_model, tmp_path
):
    """Of a finished run: merged onto another base, or left from an earlier step."""
    config_file, said = run_config(write_config, quantize_base="int8", export="merged"), []
    run = RunDirectory(tmp_path / "run")
    setup = prepare(load_config(config_file), lambda _: None)

    def exported(step, *overrides, params=setup.state.params):
        said.clear()
        config = load_config(config_file, overrides)
        job = Job(config, setup, run, None, None, None, said.append)
        run.write_results({"steps": step, "exported": export(job, params, step)})
        return load_file(run.export / WEIGHTS)["model.layers.0.mlp.up_proj.weight"]

    base = exported(4)
    assert np.array_equal(base, exported(4)) and not said
    coarse = exported(4, "lora.merge_onto=quantized")
    assert "is merged onto base, and lora.merge_onto is now quantized" in said[0]
    assert not np.array_equal(base, coarse)
    exported(4, "lora.merge_onto=quantized")
    assert not said
    # Interrupted between the new export and its record, it is not taken for the old one.
    export(
        Job(load_config(config_file), setup, run, None, None, None, said.append),
        setup.state.params,
        4,
    )
    assert np.array_equal(exported(4, "lora.merge_onto=quantized"), coarse)

    # After two more steps adapters alone are exported; what lies in export/ is that of step 4.
    exported(6, "lora.export=adapter")
    changed = jax.tree.map(lambda x: x + 1, setup.state.params)
    exported(6, params=changed)
    later = load_file(run.export / WEIGHTS)["model.layers.3.mlp.down_proj.weight"]
    exported(6, "lora.export=adapter")
    exported(6)
    assert not said  # it is still there, and that of step 6
    before = load_file(tiny_model / WEIGHTS)["model.layers.3.mlp.down_proj.weight"]
    assert np.abs(later - before).max() > 1


def test_new_adapters_change_nothing_and_are_spread_as_pefts(config_file):
    config = load_config(config_file, ["model.trainable=.*"])
    sizes = DecoderConfig(
        vocab_size=64,
        hidden_size=400,
        intermediate_size=100,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=32,
    )
    model = Decoder.abstract(sizes, segments=run_segments(config, sizes))
    _, shapes, _ = split_model(config, model)
    found = nnx.to_pure_dict(initial_adapters(shapes, seed=0))["layers"]["0"]
    assert not any(x.any() for x in jax.tree.leaves(found) if x.shape[1] == 4)
    for name, size in (("self_attn", 400), ("mlp", 100)):
        projection = found[name]["q_proj" if name == "self_attn" else "down_proj"]
        a = np.asarray(projection["lora_A"]["kernel"])
        bound = size**-0.5
        assert np.abs(a).max() <= bound
        # Of a uniform distribution, a third of the square.
        assert np.mean(a**2) == pytest.approx(bound**2 / 3, rel=0.1)
        assert abs(np.corrcoef(a[0].ravel(), a[1].ravel())[0, 1]) < 0.1  # layers differ


def test_the_plan_counts_adapters_and_no_gradients_of_what_they_adapt(config_file):
    sizes = DecoderConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=96,
    )
    overrides = ["model.trainable=.*"]
    ordinary = abstract_step(load_config(config_file, overrides), sizes)
    step = abstract_step(load_config(config_file, [*overrides, "lora.quantize_base=int8"]), sizes)
    # In 8 bits and a scale per column; embedding and norms are as before.
    columns, kernels = 4 * (3 * 32 + 2 * 16 + 2 * 64), 4 * (32 * (32 + 2 * 16 + 32) + 3 * 32 * 64)
    assert nbytes(ordinary.arguments[1]) - nbytes(step.arguments[1]) == 3 * kernels - 4 * columns
    assert count_parameters(step.arguments[1]) == count(ordinary.arguments[1])
    step = ordinary
    state, frozen, _ = step.arguments
    trained = 4 * 4 * ((32 + 32) + (32 + 16) + (64 + 32))
    assert count(state.params) == trained
    assert count(state.opt_state) == pytest.approx(2 * trained, abs=8)  # two moments, and steps
    assert count(frozen) == count(nnx.state(Decoder.abstract(sizes)))
    # Forward, once more in the backward pass, and the inputs' gradients; the fourth product of a
    # layer's parameters, their own gradient, is not formed.
    tokens, layer = 2 * 2 * 96, 32 * (32 + 2 * 16 + 32) + 3 * 32 * 64
    attention = 4 * 96 * 32
    forward = 4 * tokens * (2 * layer + attention)
    flops = cost.flops(step.function.trace(*step.arguments).jaxpr, 1)["total"]
    assert 3 * forward < flops < 3 * forward + 4 * tokens * 2 * layer


def count(tree):
    return sum(x.size for x in jax.tree.leaves(tree))


def nbytes(tree):
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))


# --- Bad input ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("lora.rank=0", "lora.rank"),
        ("lora.alpha=0", "lora.alpha"),
        ("lora.targets=[q_proj, qproj]", "no projection is called 'qproj'. Did you mean 'q_proj'"),
        ("lora.targets=[lm_head]", "embeddings, the head and routers get no adapters"),
        ("lora.targets=[]", "no projections to adapt"),
        ("lora.rank=null", "lora.alpha, lora.targets, lora.export have no effect without"),
        ("model.trainable=layernorm", "lora.rank: 'layernorm' matches part of layer 0"),
        (r"model.trainable=embed_tokens|layers\.3\.", "part of what lies outside of the layers"),
        (r"model.trainable=q_proj", "it chooses whole layers"),
        ("model.trainable=lora_A", "matches no layer"),
        ("lora.quantize_base=int4", "lora.quantize_base"),
        ("lora.quantize_base=nf4", "lora.quantize_base: q_proj: nf4 holds 64 neighbouring inputs"),
        ("lora.merge_onto=quantized", "lora.merge_onto has no effect without lora.quantize_base"),
        ("lora.adapter=nowhere", "nowhere/adapter_config.json cannot be read"),
    ],
)
def test_settings_that_contradict_adapters_end_the_command(override, message, config_file, capsys):
    assert main(["--config", str(config_file), override]) == 2
    captured = capsys.readouterr()
    assert re.sub(r"\s+", " ", message) in re.sub(r"\s+", " ", captured.err)
    assert "Traceback" not in captured.err and "Loading" not in captured.err


def test_adapters_of_a_run_without_them_are_refused(write_config, tmp_path, capsys):
    (tmp_path / "run").mkdir()
    shutil.copy(write_config(), tmp_path / "run" / "config.yaml")
    assert convert(["to-hf", str(tmp_path / "run"), str(tmp_path / "out"), "--adapter"]) == 2
    assert "is not a training run with adapters" in capsys.readouterr().err
