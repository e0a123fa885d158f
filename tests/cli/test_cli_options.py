"""Options follow the settings' fields: one each, with the field's help and default."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from mlx_medphi.cli.options import field_help, quantization
from mlx_medphi.cli.train import settings
from mlx_medphi.config import GenerateConfig, LoRAConfig, TrainConfig
from mlx_medphi.errors import ConfigError, UsageError

VERB_OF = {LoRAConfig: "train", TrainConfig: "train", GenerateConfig: "generate"}


@pytest.mark.parametrize("config", VERB_OF)
def test_every_field_is_an_option_with_its_help_and_default(run: Any, config: type) -> None:
    shown = " ".join(run(VERB_OF[config], "--help").out.split())
    helps = field_help(config)
    assert sorted(helps) == sorted(field.name for field in dataclasses.fields(config))
    for field in dataclasses.fields(config):
        flag = "--" + field.name.replace("_", "-")
        _, found, behind = shown.partition(f" {flag} ")
        assert found, flag
        assert helps[field.name].split(";")[0].split("`")[0].strip(".")[1:] in behind
        if isinstance(field.default, (int, float)) and not isinstance(field.default, bool):
            assert f"[default: {field.default}]" in behind


def test_file_overrides_default_and_option_overrides_file(tmp_path: Path) -> None:
    file = tmp_path / "a.yaml"
    file.write_text("lora:\n  rank: 8\n  scale: 4\ntrain:\n  seed: 5\n  epochs: 2\n")
    config, lora = settings(file, {"rank": 32, "epochs": 1.0})
    assert lora == LoRAConfig(rank=32, scale=4)
    assert config == TrainConfig(seed=5, epochs=1.0)
    assert settings(None, {}) == (TrainConfig(), LoRAConfig())


def test_wrong_options_of_both_kinds_are_told_together() -> None:
    with pytest.raises(ConfigError, match=r"epochs is -1.*seed is -2.*rank is 0"):
        settings(None, {"epochs": -1.0, "seed": -2, "rank": 0})
    with pytest.raises(ConfigError, match="rank is 0"):
        settings(None, {"rank": 0})


def test_full_means_no_adapter_and_takes_no_options_of_one() -> None:
    assert settings(None, {"fine_tune_type": "full"}) == (TrainConfig(), None)
    with pytest.raises(UsageError, match=r"--num-layers, --rank: no adapter"):
        settings(None, {"fine_tune_type": "full", "rank": 4, "num_layers": 2})


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        (["--learning-rate", "10"], "learning_rate is 10.0"),
        (["--fine-tune-type", "qlora"], "expected one of 'lora', 'rslora', 'dora'"),
        (["--rank", "0"], "rank is 0"),
    ],
)
def test_an_impossible_option_is_refused_before_anything_is_read(
    run: Any, tmp_path: Path, line: list[str], expected: str
) -> None:
    paths = ["--model", tmp_path / "none", "--data", tmp_path / "none", "--out", tmp_path / "run"]
    done = run("train", *paths, *line)
    assert done.code == 2 and done.err.count("\n") == 1
    assert expected in done.err
    assert not (tmp_path / "run").exists()


def test_only_the_bits_that_help_offers_are_taken() -> None:
    assert [quantization(bits, 32) for bits in (None, 4, 8)] == [None, (4, 32), (8, 32)]
    with pytest.raises(UsageError, match="--quantize is 3, expected 4 or 8"):
        quantization(3, 64)


def test_flags_without_a_value_can_be_turned_off(run: Any, tmp_path: Path) -> None:
    config, _ = settings(None, {"pack": False})
    assert config == TrainConfig(pack=False)
    assert "--pack / --no-pack" in run("train", "--help").out
