"""Reading Hugging Face configs of both generations, and refusing what is not implemented."""

from __future__ import annotations

import numpy as np
import pytest

from jaxmoo.errors import ConfigError
from jaxmoo.models import DecoderConfig, Llama3Rope, rope_tables
from jaxmoo.models.families import FAMILIES, LayerKind
from jaxmoo.models.rope import LinearRope, LongRope, Rope

LLAMA = {
    "model_type": "llama",
    "vocab_size": 100,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
}
SCALING = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def test_sizes_that_older_configs_leave_out_are_derived():
    config = DecoderConfig.from_hf(LLAMA)
    assert (config.num_key_value_heads, config.head_dim) == (4, 8)
    assert (config.rope_theta, config.tie_word_embeddings) == (10000.0, False)


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_theta": 5e5, "rope_scaling": {"rope_type": "llama3", **SCALING}},
        {"rope_theta": 5e5, "rope_scaling": {"type": "llama3", **SCALING}},
        {"rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5, **SCALING}},
    ],
    ids=["transformers 4", "transformers 4, early", "transformers 5"],
)
def test_both_spellings_of_the_rotary_settings_are_read(rope):
    config = DecoderConfig.from_hf(LLAMA | rope)
    assert config.rope_theta == 5e5
    assert config.rope_scaling == Llama3Rope(**SCALING)


def test_the_newer_spelling_wins_where_both_are_present():
    rope = {"rope_theta": 1e4, "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}
    assert DecoderConfig.from_hf(LLAMA | rope).rope_theta == 1e6


GEMMA3 = {"model_type": "gemma3_text", "head_dim": 8}
PHI3 = {"model_type": "phi3"}
MIXTRAL = {"model_type": "mixtral", "num_key_value_heads": 4, "num_local_experts": 4}
MOE = {"model_type": "qwen3_moe", "num_experts": 8, "num_experts_per_tok": 2}
LONG = {"type": "longrope", "short_factor": [1.0], "long_factor": [2.0], "factor": 2.0}


@pytest.mark.parametrize(
    ("change", "window"),
    [
        ({"model_type": "mistral", "sliding_window": None}, None),
        ({"model_type": "mistral", "sliding_window": 16}, 16),
        ({"model_type": "mistral"}, 4096),  # what transformers takes where it is not said
        ({"model_type": "qwen2", "sliding_window": 16}, None),
        ({"model_type": "qwen2", "use_sliding_window": True, "max_window_layers": 2}, None),
        ({"model_type": "qwen2", "use_sliding_window": True, "max_window_layers": 0}, 4096),
        (
            {
                "model_type": "qwen3",
                "use_sliding_window": True,
                "sliding_window": 16,
                "layer_types": ["sliding_attention"] * 2,
            },
            16,
        ),
        ({"model_type": "llama", "sliding_window": 16}, None),
        ({"model_type": "mixtral"}, None),
        ({"model_type": "qwen3_moe", "sliding_window": 16}, None),
        ({"model_type": "qwen3_moe", "use_sliding_window": True, "sliding_window": 16}, 16),
    ],
)
def test_the_window_is_that_of_transformers(change, window):
    config = DecoderConfig.from_hf(LLAMA | {"num_key_value_heads": 4} | change)
    assert config.sliding_window == window


@pytest.mark.parametrize(
    ("change", "dense"),
    [
        ({}, ()),
        ({"mlp_only_layers": [0, 3]}, (0, 3)),
        ({"decoder_sparse_step": 2}, (0, 2)),
        ({"decoder_sparse_step": 2, "mlp_only_layers": [1]}, (0, 1, 2)),
    ],
)
def test_layers_without_experts_are_those_of_transformers(change, dense):
    config = DecoderConfig.from_hf(LLAMA | MOE | {"num_hidden_layers": 4} | change)
    assert config.dense_layers == dense


FULL, NEAR = "full_attention", "sliding_attention"


@pytest.mark.parametrize(
    ("change", "windows"),
    [
        ({"model_type": "qwen2", "use_sliding_window": True, "max_window_layers": 1}, [None, 16]),
        (
            {"model_type": "qwen3", "use_sliding_window": True, "layer_types": [NEAR, FULL]},
            [16, None],
        ),
        (GEMMA3 | {"num_hidden_layers": 7}, [16] * 5 + [None, 16]),
        (GEMMA3 | {"num_hidden_layers": 3, "sliding_window_pattern": 2}, [16, None, 16]),
        ({"model_type": "gemma2", "num_hidden_layers": 3}, [16, None, 16]),
        # which transformers does not read in this family
        (
            {"model_type": "gemma2", "num_hidden_layers": 3, "sliding_window_pattern": 3},
            [16, None, 16],
        ),
        ({"model_type": "cohere2", "num_hidden_layers": 5}, [16] * 3 + [None, 16]),
    ],
)
def test_every_layer_has_its_window(change, windows):
    sizes = {"num_key_value_heads": 4, "sliding_window": 16}
    config = DecoderConfig.from_hf(LLAMA | sizes | change)
    assert [kind.window for kind in config.kinds] == windows


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_what_a_config_leaves_out_is_what_transformers_takes(family):
    from transformers import AutoConfig

    config = {**LLAMA, "hidden_size": 128, "num_attention_heads": 32}
    del config["model_type"], config["rms_norm_eps"]
    if FAMILIES[family].part is not None:
        config = {FAMILIES[family].part: config}
    whole = AutoConfig.for_model(family, **config).to_dict()
    expected = DecoderConfig.from_hf(whole)
    assert DecoderConfig.from_hf({"model_type": family, **config}) == expected


@pytest.mark.parametrize(
    "change",
    [
        {"attention_bias": None, "mlp_bias": None, "partial_rotary_factor": None},
        {"model_type": "cohere", "use_qk_norm": None},
    ],
)
def test_a_null_switches_nothing_on(change):
    without = {name: value for name, value in (LLAMA | change).items() if value is not None}
    assert DecoderConfig.from_hf(LLAMA | change) == DecoderConfig.from_hf(without)


def test_what_gemma_3s_older_configs_leave_out_is_known():
    """As those on the hub: sizes of the largest parts, and one stretching for layers of a kind."""
    found = DecoderConfig.from_hf(
        {
            "model_type": "gemma3",
            "text_config": {
                "hidden_size": 2560,
                "intermediate_size": 10240,
                "num_hidden_layers": 34,
                "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
                "sliding_window": 1024,
            },
            "vision_config": {"hidden_size": 1152},
        }
    )
    near, far = found.kinds[4:6]
    assert near == LayerKind(1024, Rope(1e4))
    assert far == LayerKind(None, Rope(1e6, LinearRope(8.0)))
    assert (found.vocab_size, found.num_attention_heads, found.head_dim) == (262208, 8, 256)
    assert found.tie_word_embeddings


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "linear", "factor": 4.0},
        {"rope_type": "llama3", **SCALING},
        {"rope_type": "dynamic", "factor": 4.0},
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32},
        {
            "rope_type": "yarn",
            "factor": 4.0,
            "original_max_position_embeddings": 32,
            "beta_fast": 16.0,
            "beta_slow": 2.0,
            "mscale": 0.7,
            "mscale_all_dim": 1.2,
            "truncate": False,
        },
        {
            "rope_type": "longrope",
            "factor": 4.0,
            "original_max_position_embeddings": 32,
            "short_factor": [1.0, 1.1, 1.2, 1.3],
            "long_factor": [1.0, 2.0, 3.0, 4.0],
        },
    ],
    ids=lambda rope: rope["rope_type"],
)
@pytest.mark.parametrize("length", [20, 100])
def test_stretched_frequencies_are_those_of_transformers(rope, length):
    import torch
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    settings = LLAMA | {"rope_parameters": {"rope_theta": 5e5, **rope}}
    table = LlamaRotaryEmbedding(LlamaConfig(**settings))
    cos, sin = table(torch.zeros(1), torch.arange(length)[None])
    config = DecoderConfig.from_hf(settings)
    found = rope_tables(config, np.arange(length))
    for ours, theirs in zip(found, (cos, sin), strict=True):
        np.testing.assert_allclose(ours, theirs[0, :, : ours.shape[-1]], atol=1e-5)


def test_the_original_context_may_be_said_outside_of_the_rotary_settings():
    """As in transformers, which prefers it, and has a default in Phi-3."""
    scaling = {name: value for name, value in SCALING.items() if "original" not in name}
    rope = {"rope_scaling": {"rope_type": "llama3", **scaling}}
    found = DecoderConfig.from_hf(LLAMA | rope | {"original_max_position_embeddings": 16})
    assert found.rope_scaling == Llama3Rope(**scaling, original_max_position_embeddings=16)

    long = LONG | {"short_factor": [1.0] * 4, "long_factor": [2.0] * 4}
    phi3 = DecoderConfig.from_hf(LLAMA | PHI3 | {"rope_scaling": long}).rope_scaling
    assert isinstance(phi3, LongRope) and phi3.original_max_position_embeddings == 4096


def test_of_gemma_3_with_images_the_whole_says_whether_the_head_is_the_embedding():
    whole = {"model_type": "gemma3", "text_config": {}, "tie_word_embeddings": False}
    assert not DecoderConfig.from_hf(whole).tie_word_embeddings


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "lllama"}, "'lllama' is not supported. Did you mean 'llama'"),
        ({"model_type": "gpt2"}, "Supported: apertus, .*, llama, mistral, .*, smollm3"),
        ({"model_type": None}, "model_type None is not supported"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu'"),
        ({"attention_bias": True}, "attention_bias=True"),
        ({"mlp_bias": True}, "mlp_bias=True"),
        ({"rope_scaling": {"rope_type": "yarn"}}, "rope type 'yarn'"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "needs low_freq_factor, high"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"model_type": "mistral", "sliding_window": 0}, "sliding_window must be a positive"),
        (GEMMA3 | {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping=50.0"),
        (GEMMA3 | {"use_bidirectional_attention": True}, "use_bidirectional_attention=True"),
        (GEMMA3 | {"hidden_activation": "silu"}, "hidden_activation='silu'"),
        ({"model_type": "gemma3"}, "gemma3 needs text_config"),
        ({"model_type": "cohere", "use_qk_norm": True}, "use_qk_norm=True"),
        ({"model_type": "apertus", "hidden_act": "gelu"}, "hidden_act='gelu'"),
        (PHI3 | {"rope_scaling": {"type": "longrope"}}, "needs short_factor, long_factor"),
        (PHI3 | {"rope_scaling": LONG}, "one for each of the 4 pairs of a head, got 1"),
        (
            MIXTRAL | {"num_experts_per_tok": 5},
            r"num_experts_per_tok \(5\) must be at most num_exp",
        ),
        (MIXTRAL | {"router_jitter_noise": 0.1}, "router_jitter_noise=0.1"),
        (MIXTRAL | {"num_local_experts": 0}, "num_experts must be a positive integer, got 0"),
        (MIXTRAL | {"router_aux_loss_coef": -1}, "router_aux_loss_coef must be a finite number"),
        (MOE | {"mlp_only_layers": [-1]}, r"mlp_only_layers must be a list of layers, got \[-1\]"),
        (MOE | {"decoder_sparse_step": 0}, "decoder_sparse_step must be a positive integer"),
        (MOE | {"norm_topk_prob": 1}, "norm_topk_prob must be true or false, got 1"),
        (MOE | {"moe_intermediate_size": "24"}, "moe_intermediate_size must be a positive int"),
        ({"vocab_size": None, "hidden_size": None}, "lacks vocab_size, hidden_size"),
        ({"num_hidden_layers": -1}, "num_hidden_layers must be a positive integer, got -1"),
        ({"num_hidden_layers": "2"}, "num_hidden_layers must be a positive integer, got '2'"),
        ({"num_key_value_heads": 3}, "must be a multiple of num_key_value_heads"),
        ({"head_dim": 7}, "head_dim must be even"),
    ],
)
def test_what_would_change_the_output_is_never_ignored(change, message):
    with pytest.raises(ConfigError, match=message):
        DecoderConfig.from_hf(LLAMA | change)


NAN, INFINITE = float("nan"), float("inf")
WINDOW = {"model_type": "qwen3", "use_sliding_window": True}
GRANITE = {"model_type": "granite"}


def stretched(**changes) -> dict:
    return {"rope_scaling": {"rope_type": "llama3", **SCALING, **changes}}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        *(
            ({"rope_theta": theta}, "rope_theta must be a finite number of at least 1, got")
            for theta in (NAN, 0, -1, 0.5, INFINITE, 1e39, 10**400, "1e4", None, True, [1e4])
        ),
        *(
            ({"rms_norm_eps": eps}, "rms_norm_eps must be a finite number of at least 0, got")
            for eps in (NAN, -1e-6, INFINITE, "1e-5", None, False, {})
        ),
        *(
            (stretched(factor=factor), "factor must be a finite number of at least 1, got")
            for factor in (0, -8, NAN, "8", [8.0], None, True)
        ),
        (stretched(low_freq_factor=0), "low_freq_factor must be a finite number above 0, got 0"),
        (stretched(high_freq_factor=1.0), "high_freq_factor must be a finite number above 1, got"),
        (
            stretched(original_max_position_embeddings=8192.5),
            "original_max_position_embeddings must be a positive integer, got 8192.5",
        ),
        ({"rope_scaling": "llama3"}, "rope_scaling must be an object or null, got 'llama3'"),
        ({"rope_parameters": [1]}, r"rope_parameters must be an object or null, got \[1\]"),
        ({"rope_scaling": {"rope_type": ["llama3"]}}, r"rope type \['llama3'\] is not supported"),
        (
            {"tie_word_embeddings": "false"},
            "tie_word_embeddings must be true or false, got 'false'",
        ),
        ({"tie_word_embeddings": 1}, "tie_word_embeddings must be true or false, got 1"),
        ({"hidden_size": "32"}, "hidden_size must be a positive integer, got '32'"),
        ({"num_attention_heads": [4]}, r"num_attention_heads must be a positive.*got \[4\]"),
        ({"num_attention_heads": 0}, "num_attention_heads must be a positive integer, got 0"),
        ({"num_attention_heads": 64}, "head_dim must be a positive integer, got 0"),
        ({"vocab_size": True}, "vocab_size must be a positive integer, got True"),
        ({"head_dim": 2**20}, "head_dim must be at most 65536, got 1048576"),
        ({"vocab_size": 2**31}, "vocab_size must be at most 2147483647, got 2147483648"),
        ({"vocab_size": 10**4000}, r"at most 2147483647, got 10+\.\.\."),
        (
            {"vocab_size": 2**30, "hidden_size": 2**30, "head_dim": 64},
            r"1\.2e\+18 parameters, which no machine holds",
        ),
        ({"model_type": ["llama"]}, r"model_type \['llama'\] is not supported"),
        (GRANITE | {"residual_multiplier": None}, "residual_multiplier must be a finite number"),
        (GRANITE | {"attention_multiplier": None}, "attention_multiplier must be a finite number"),
        ({"model_type": "cohere", "logit_scale": None}, "logit_scale must be a finite number"),
        (WINDOW | {"use_sliding_window": "false"}, "use_sliding_window must be true or false"),
        (WINDOW | {"max_window_layers": "0"}, "max_window_layers must be a number of layers"),
        (WINDOW | {"layer_types": ["sliding_attention"]}, "layer_types must be a list of full_att"),
        (WINDOW | {"layer_types": [["full_attention"]] * 2}, "layer_types must be a list of full_"),
    ],
)
def test_values_of_another_type_or_out_of_range_are_refused_by_name(change, message):
    with pytest.raises(ConfigError, match=message):
        DecoderConfig.from_hf(LLAMA | change)


def test_a_billion_layers_are_more_than_any_model_has():
    with pytest.raises(ConfigError, match="num_hidden_layers must be at most 10000, got 100000000"):
        DecoderConfig.from_hf(LLAMA | {"num_hidden_layers": 10**9})
