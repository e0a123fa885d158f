"""Settings: one default each, unknown names refused with a hint, all problems told at once."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mlx_medphi.config import (
    PROJECTIONS,
    ExportConfig,
    GenerateConfig,
    LoRAConfig,
    TrainConfig,
    load_config,
    to_dict,
    updated,
)
from mlx_medphi.errors import ConfigError

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
CONFIGS = [LoRAConfig, TrainConfig, GenerateConfig, ExportConfig]


def yaml_file(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def message(tmp_path: Path, text: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(yaml_file(tmp_path, text))
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("config", CONFIGS)
def test_every_field_is_described_in_the_docstring(config: type) -> None:
    for field in dataclasses.fields(config):
        assert f"\n        {field.name}: " in (config.__doc__ or "")


@pytest.mark.parametrize("config", CONFIGS)
def test_settings_cannot_be_changed_and_survive_json(config: type) -> None:
    made = config()
    with pytest.raises(dataclasses.FrozenInstanceError):
        made.seed = 1
    assert config(**json.loads(json.dumps(to_dict(made)))) == made


@pytest.mark.parametrize("path", sorted(EXAMPLES.rglob("*.yaml")), ids=lambda path: path.name)
def test_every_shipped_file_loads(path: Path) -> None:
    load_config(path)


def test_an_empty_file_is_the_defaults(tmp_path: Path) -> None:
    assert load_config(yaml_file(tmp_path, "")) == (LoRAConfig(), TrainConfig())


def test_a_file_overrides_only_what_it_names(tmp_path: Path) -> None:
    lora, train = load_config(
        yaml_file(tmp_path, "lora:\n  rank: 8\n  keys: [mlp.down_proj]\ntrain:\n  epochs: 1\n")
    )
    assert lora == LoRAConfig(rank=8, keys=("mlp.down_proj",))
    assert train == TrainConfig(epochs=1)
    # Whole numbers may stand for numbers, as people write them.
    assert updated(train, {"epochs": 2}, "typed").epochs == 2


def test_an_unknown_key_names_the_nearest(tmp_path: Path) -> None:
    text = message(tmp_path, "train:\n  learing_rate: 0.1\n")
    assert "run.yaml, section train" in text
    assert "unknown key 'learing_rate', did you mean 'learning_rate'?" in text


def test_a_key_like_no_other_lists_the_known(tmp_path: Path) -> None:
    text = message(tmp_path, "lora:\n  xyzzy: 1\n")
    assert all(field.name in text for field in dataclasses.fields(LoRAConfig))


def test_all_problems_of_a_section_are_told_at_once(tmp_path: Path) -> None:
    text = message(tmp_path, "train:\n  batchsize: 2\n  iters: many\n  pack: 1\n  seed: 1.5\n")
    for part in ("batch_size", "iters is 'many'", "pack is 1", "seed is 1.5"):
        assert part in text, part


def test_all_impossible_values_are_told_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        TrainConfig(learning_rate=10, epochs=-1, batch_size=0, warmup=2, max_length=3)
    for name in ("learning_rate", "epochs", "batch_size", "warmup", "max_length"):
        assert name in str(caught.value), name


@pytest.mark.parametrize(
    ("config", "values"),
    [
        (TrainConfig, {"learning_rate": 10.0}),
        (TrainConfig, {"learning_rate": float("nan")}),
        (TrainConfig, {"learning_rate": 0.0}),
        (TrainConfig, {"iters": 0}),
        (TrainConfig, {"epochs": float("inf")}),
        (TrainConfig, {"max_grad_norm": 0.0}),
        (TrainConfig, {"seed": -1}),
        (TrainConfig, {"patience": 0}),
        (LoRAConfig, {"rank": 0}),
        (LoRAConfig, {"scale": float("nan")}),
        (LoRAConfig, {"dropout": 1.0}),
        (LoRAConfig, {"keys": ()}),
        (LoRAConfig, {"num_layers": 0}),
        (LoRAConfig, {"fine_tune_type": "qlora"}),
        (GenerateConfig, {"temperature": -1.0}),
        (GenerateConfig, {"top_p": 0.0}),
        (GenerateConfig, {"min_p": 1.5}),
        (GenerateConfig, {"repetition_penalty": 0.5}),
        (GenerateConfig, {"max_tokens": 0}),
    ],
)
def test_an_impossible_value_is_refused_by_name(config: type, values: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(values))):
        config(**values)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"rank": "8"}, "a whole number"),
        ({"rank": True}, "a whole number"),
        ({"rank": 8.0}, "a whole number"),
        ({"scale": "2"}, "a number"),
        ({"keys": "mlp.down_proj"}, "a list of names"),
        ({"keys": [1]}, "a list of names"),
        ({"num_layers": "all"}, "a whole number or null"),
        ({"fine_tune_type": 3}, "one of 'lora', 'rslora', 'dora'"),
    ],
)
def test_a_value_of_the_wrong_type_says_what_was_expected(
    values: dict[str, Any], expected: str
) -> None:
    with pytest.raises(ConfigError, match=f"expected {expected}"):
        updated(LoRAConfig(), values, "typed")


def test_none_is_a_value_where_the_setting_allows_it() -> None:
    assert updated(LoRAConfig(num_layers=4), {"num_layers": None}, "typed").num_layers is None


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("optimizer:\n  lr: 1\n", "unknown section 'optimizer'; known: lora, train"),
        ("- train\n", "expected the sections 'lora' and 'train', found list"),
        ("train: fast\n", "section 'train' must map names to values"),
        ("train:\n  seed: [1\n", "not valid YAML"),
        ("train: !!python/object/apply:os.getcwd []\n", "not valid YAML"),
    ],
)
def test_a_malformed_file_says_what_is_wrong(tmp_path: Path, text: str, expected: str) -> None:
    assert expected in message(tmp_path, text)


def test_a_syntax_error_names_its_line(tmp_path: Path) -> None:
    assert "run.yaml:3: not valid YAML" in message(tmp_path, "train:\n  seed: 1\n  : : :\n")


def test_a_file_that_is_not_utf8_or_not_there_says_so(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    with pytest.raises(ConfigError, match="cannot be read"):
        load_config(path)
    path.write_bytes(b"train: \xff\xfe\n")
    with pytest.raises(ConfigError, match="UTF-8"):
        load_config(path)


def test_rslora_multiplies_by_scale_and_root_of_rank() -> None:
    assert LoRAConfig(scale=2.0, rank=16).multiplier == 2.0
    assert LoRAConfig(scale=2.0, rank=16, fine_tune_type="rslora").multiplier == 8.0
    assert len(PROJECTIONS) == 4


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (lambda: TrainConfig(iters=2.5), "iters is 2.5, expected a whole number or null"),
        (lambda: TrainConfig(iters="5"), "iters is '5', expected a whole number"),
        (lambda: TrainConfig(batch_size=True), "batch_size is True, expected a whole number"),
        (lambda: TrainConfig(pack=1), "pack is 1, expected true or false"),
        (lambda: LoRAConfig(keys="mlp.down_proj"), "keys is 'mlp.down_proj', expected a list"),
        (lambda: GenerateConfig(seed=None), "seed is None, expected a whole number"),
    ],
)
def test_a_value_of_another_type_is_refused_from_code_too(make, name: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(name)):
        make()


def test_a_number_that_yaml_takes_for_text_is_written_out(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("train:\n  learning_rate: 2e-4\n")
    with pytest.raises(ConfigError, match=r"learning_rate is '2e-4', .*; write 0\.0002$"):
        load_config(path)


def test_an_impossible_value_names_the_file(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("train:\n  learning_rate: 10\n")
    with pytest.raises(ConfigError, match=r"c\.yaml, section train: learning_rate is 10"):
        load_config(path)


@pytest.mark.parametrize(
    "text",
    [
        "train:\n  iters: 2020-13-45\n",
        "train:\n  iters: " + "9" * 5000 + "\n",
        "train: " + "[" * 5000 + "\n",
        "train: {1: 2, null: 3}\n",
        "train:\n  learning_rate: 1" + "0" * 400 + "\n",
        "train:\n  seed: 99999999999999999999999\n",
        "train:\n  iters: 99999999999999999999999\n",
        "train:\n  epochs: 1.0e+300\n",
    ],
    ids=["date", "digits", "deep", "keys", "rate", "seed", "iters", "epochs"],
)
def test_yaml_that_python_stumbles_over_is_a_config_error(tmp_path: Path, text: str) -> None:
    with pytest.raises(ConfigError):
        load_config(yaml_file(tmp_path, text))


def test_numbers_of_a_sweep_become_plain_numbers() -> None:
    config = TrainConfig(iters=np.int64(6), learning_rate=np.float32(0.5))
    assert (type(config.iters), type(config.learning_rate)) == (int, float)
    assert json.dumps(to_dict(config))
