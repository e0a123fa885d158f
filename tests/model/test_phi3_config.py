"""Every published form of config.json is read as transformers reads it, and written back."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mlx_medphi.errors import CheckpointError
from mlx_medphi.model.config import Phi3Config, Quantization

BASE: dict[str, Any] = {
    "model_type": "phi3",
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 256,
    "sliding_window": 20,
}
SHORT, LONG = [1.0 + i / 20 for i in range(8)], [1.0 + i / 2 for i in range(8)]
FACTORS = {"short_factor": SHORT, "long_factor": LONG}
OLD = {
    **BASE,
    "rope_theta": 5000.0,
    "original_max_position_embeddings": 32,
    "rope_scaling": {"type": "longrope", **FACTORS},
}
NEW = {
    **BASE,
    "rope_parameters": {
        "rope_type": "longrope",
        "rope_theta": 5000.0,
        "partial_rotary_factor": 1.0,
        "original_max_position_embeddings": 32,
        **FACTORS,
    },
}


def test_the_old_and_the_new_form_are_the_same_model() -> None:
    assert Phi3Config.from_hf(OLD) == Phi3Config.from_hf(NEW)
    assert Phi3Config.from_hf(NEW).rope_theta == 5000.0


def test_where_both_forms_stand_the_old_one_counts_as_in_transformers() -> None:
    both = {**OLD, "rope_parameters": {"rope_type": "default", "rope_theta": 7.0}}
    assert Phi3Config.from_hf(both) == Phi3Config.from_hf(OLD)
    # An empty old form is no form.
    assert Phi3Config.from_hf({**NEW, "rope_scaling": None}) == Phi3Config.from_hf(NEW)


@pytest.mark.parametrize("name", ["su", "yarn"])
def test_early_names_of_longrope_are_longrope(name: str) -> None:
    early = {**OLD, "rope_scaling": {"type": name, **FACTORS}}
    assert Phi3Config.from_hf(early) == Phi3Config.from_hf(OLD)


@pytest.mark.parametrize("name", ["linear", "dynamic", "llama3", "", None])
def test_an_unknown_rope_scaling_is_an_error(name: str | None) -> None:
    for raw in (
        {**BASE, "rope_scaling": {"type": name, "factor": 2.0}},
        {**BASE, "rope_parameters": {"rope_type": name, "factor": 2.0}},
    ):
        with pytest.raises(CheckpointError, match="rope scaling .* is unknown"):
            Phi3Config.from_hf(raw)


def test_the_attention_factor_is_the_papers_unless_the_file_says_more() -> None:
    def factor(**more: Any) -> float:
        raw = {**OLD, "rope_scaling": {"type": "longrope", **FACTORS, **more}}
        longrope = Phi3Config.from_hf(raw).longrope
        assert longrope is not None
        return longrope.attention_factor

    assert factor() == pytest.approx((1 + 3 / 5) ** 0.5, rel=1e-12)  # ln 8 / ln 32 = 3 / 5
    assert factor(factor=1024.0) == pytest.approx(3**0.5, rel=1e-12)  # ln 1024 / ln 32 = 2
    assert factor(attention_factor=1.25, factor=1024.0) == 1.25


def test_the_switch_comes_after_the_original_length() -> None:
    config = Phi3Config.from_hf(OLD)
    assert [config.uses_long_factors(n) for n in (1, 32, 33)] == [False, False, True]
    assert not Phi3Config.from_hf(BASE).uses_long_factors(10**6)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"model_type": "llama"}, "model_type is 'llama', expected 'phi3'"),
        ({"hidden_act": "gelu"}, "hidden_act must be 'silu'"),
        ({"attention_bias": True}, "attention_bias false"),
        ({"hidden_size": None}, "hidden_size is None"),
        ({"hidden_size": "64"}, "hidden_size is '64'"),
        ({"hidden_size": 63}, "4 heads do not fit hidden_size 63"),
        ({"num_key_value_heads": 3}, "num_key_value_heads 3"),
        ({"rms_norm_eps": 0}, "rms_norm_eps is 0"),
        ({"rope_theta": "big"}, "rope_theta is 'big'"),
        ({"partial_rotary_factor": 0.2}, "3 rotary dimensions of 16"),
        ({"partial_rotary_factor": 2.0}, "32 rotary dimensions of 16"),
        ({"sliding_window": -1}, "sliding_window is -1"),
        ({"rope_scaling": [1]}, "rope settings must be an object, found list"),
        ({"rope_scaling": {"type": "longrope", "short_factor": SHORT}}, "long_factor holds None"),
        (
            {"rope_scaling": {"type": "longrope", **FACTORS, "short_factor": SHORT[:3]}},
            "short_factor holds 3 values, expected 8",
        ),
        (
            {"rope_scaling": {"type": "longrope", **FACTORS, "short_factor": [0.0] * 8}},
            "expected 8 positive numbers",
        ),
        ({"rope_scaling": {"type": "longrope", **FACTORS}}, "longrope needs a whole number"),
        ({"quantization": {"bits": 7, "group_size": 64}}, "bits 7 and group_size 64"),
        ({"quantization": {"bits": 4, "group_size": 48}}, "group_size 48"),
        ({"quantization": [4, 64]}, "quantization must be an object"),
        ({"quantization": {"bits": 4, "group_size": 32, "mode": "mxfp4"}}, "mode 'mxfp4'"),
        ({"quantization_config": {"quant_method": "awq"}}, "a form MLX does not write"),
    ],
)
def test_what_is_not_understood_is_an_error(change: dict[str, Any], words: str) -> None:
    with pytest.raises(CheckpointError, match=words) as caught:
        Phi3Config.from_hf({**BASE, **change}, "some/config.json")
    assert str(caught.value).startswith("some/config.json")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"partial_rotary_factor": float("inf")}, "partial_rotary_factor is inf, expected"),
        ({"partial_rotary_factor": 1e308}, "32 rotary dimensions of 16 are not possible"),
        ({"rope_theta": float("inf")}, "rope_theta is inf, expected a positive number"),
        ({"rope_theta": float("nan")}, "rope_theta is nan"),
        ({"rms_norm_eps": 10**400}, "rms_norm_eps is 10000"),
        ({"hidden_size": 10**400}, "hidden_size is 10000"),
        ({"num_hidden_layers": 10**8}, "num_hidden_layers is 100000000, expected a .* up to 10000"),
        ({"tie_word_embeddings": "false"}, "tie_word_embeddings is 'false', expected true or"),
        ({"tie_word_embeddings": 0}, "tie_word_embeddings is 0, expected true or false"),
    ],
)
def test_a_number_or_flag_that_is_none_is_an_error(change: dict[str, Any], words: str) -> None:
    small = {**BASE, "hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 4}
    with pytest.raises(CheckpointError, match=words) as caught:
        Phi3Config.from_hf(json.loads(json.dumps({**small, **change})))
    assert len(str(caught.value)) < 150


def test_rope_factors_are_finite() -> None:
    scaling = {**OLD["rope_scaling"]}
    scaling["long_factor"] = [float("inf"), *scaling["long_factor"][1:]]
    with pytest.raises(CheckpointError, match="long_factor"):
        Phi3Config.from_hf({**OLD, "rope_scaling": scaling})


def test_what_is_written_is_read_back_the_same(each_folder: Path) -> None:
    config = Phi3Config.from_hf(json.loads((each_folder / "config.json").read_text()))
    assert Phi3Config.from_hf(json.loads(json.dumps(config.to_hf()))) == config


def test_unusual_values_are_written_and_read_back() -> None:
    config = Phi3Config.from_hf(OLD)
    assert config.longrope is not None
    layers = {"lm_head": (8, 64), "model.layers.0.mlp.down_proj": None}
    for unusual in (
        replace(config, head_dim=24, rotary_dim=16),
        replace(config, longrope=replace(config.longrope, attention_factor=1.5)),
        replace(config, quantization=Quantization(4, 32, layers)),
        replace(config, tie_word_embeddings=True, sliding_window=None),
    ):
        assert Phi3Config.from_hf(json.loads(json.dumps(unusual.to_hf()))) == unusual


def test_every_rotary_dimension_survives_being_written_as_a_factor() -> None:
    plain = Phi3Config.from_hf(BASE)
    for head_dim in range(2, 130):
        for rotary in range(2, head_dim + 1, 2):
            config = replace(plain, head_dim=head_dim, rotary_dim=rotary)
            assert Phi3Config.from_hf(config.to_hf()).rotary_dim == rotary


def test_transformers_reads_what_is_written(each_folder: Path, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    config = Phi3Config.from_hf(json.loads((each_folder / "config.json").read_text()))
    (tmp_path / "config.json").write_text(json.dumps(config.to_hf()))
    ours = transformers.Phi3Config.from_pretrained(tmp_path)
    theirs = transformers.Phi3Config.from_pretrained(each_folder)
    # The old form keeps a copy under its own name of the type, the rest must agree.
    rope = [dict(c.rope_parameters) for c in (ours, theirs)]
    for section in rope:
        section.pop("type", None)
    assert rope[0] == rope[1]
    for name in ("hidden_size", "num_key_value_heads", "sliding_window", "tie_word_embeddings"):
        assert getattr(ours, name) == getattr(theirs, name)


def test_quantization_of_single_layers_is_read() -> None:
    section = {
        "bits": 4,
        "group_size": 64,
        "mode": "affine",
        "lm_head": {"bits": 8, "group_size": 32},
        "model.embed_tokens": False,
        "model.layers.0.mlp.down_proj": True,
    }
    read = Phi3Config.from_hf({**BASE, "quantization": section}).quantization
    assert read is not None
    assert read.of("lm_head") == (8, 32)
    assert read.of("model.embed_tokens") is None
    assert read.of("model.layers.0.mlp.down_proj") == (4, 64)
