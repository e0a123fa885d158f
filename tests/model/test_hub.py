"""A hub id is fetched, kept, resumed and refused as it should be; paths never reach the network."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from hub_server import REPO, Hub, serve

from mlx_medphi.errors import CheckpointError, HubError
from mlx_medphi.model.checkpoint import load
from mlx_medphi.model.hub import resolve_model


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of the hub client, and nothing of this machine's own settings."""
    from huggingface_hub import constants

    folder = tmp_path / "hub-cache"
    # The client reads its variables when it is imported, which may be before this test.
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(folder))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_PROGRESS_BARS", True)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    for name in ("http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    return folder


@pytest.fixture
def hub(cache: Path, phi3: Path, mini: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A hub that serves mini-4k as main and gqa as v0, with files that must not be fetched."""
    for name in ("pytorch_model.bin", "modeling_phi3.py", "README.md"):
        (mini / name).write_text("not for us")
    (mini / "onnx").mkdir()
    (mini / "onnx" / "config.json").write_text("{}")
    server = Hub({"main": mini, "v0": phi3 / "gqa"})
    with serve(server):
        monkeypatch.setenv("HF_ENDPOINT", server.endpoint)
        yield server


def logits(model: Any, folder: Path) -> np.ndarray:
    ids = mx.load(str(folder / "reference.safetensors"))["ids"]
    return np.array(model(ids).astype(mx.float32))


def test_a_hub_id_loads_the_model_it_names(hub: Hub, phi3: Path) -> None:
    model, tokenizer = load(REPO)
    folder = phi3 / "mini-4k"
    np.testing.assert_array_equal(logits(model, folder), logits(load(folder)[0], folder))
    assert tokenizer.vocab_size == 316


def test_only_weights_configuration_and_tokenizer_are_fetched(hub: Hub) -> None:
    resolve_model(REPO)
    assert sorted(hub.fetched()) == [
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    ]


def test_a_template_in_a_file_of_its_own_is_fetched(hub: Hub, mini: Path) -> None:
    (mini / "chat_template.jinja").write_text("{{ messages }}")
    assert (resolve_model(REPO) / "chat_template.jinja").read_text() == "{{ messages }}"


def test_what_was_fetched_is_not_fetched_again(hub: Hub) -> None:
    first = resolve_model(REPO)
    hub.requests.clear()
    assert resolve_model(REPO) == first
    assert hub.fetched() == []


def test_a_revision_is_another_model(hub: Hub) -> None:
    assert load(REPO, revision="v0")[0].config.num_key_value_heads == 2
    assert load(REPO)[0].config.num_key_value_heads == 4
    with pytest.raises(HubError, match="has no revision 'v9' of it"):
        load(REPO, revision="v9")


def test_a_broken_download_goes_on_where_it_stopped(
    hub: Hub, mini: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    # The client keeps whole pieces, of 10 MB, and waits a second before it goes on.
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 10_000)
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    hub.breaks["model.safetensors"] = 1
    folder = resolve_model(REPO)
    fetched = (folder / "model.safetensors").read_bytes()
    assert fetched == (mini / "model.safetensors").read_bytes()
    ranges = [r for m, p, r in hub.requests if m == "GET" and p.endswith("model.safetensors")]
    assert len(ranges) == 2
    assert ranges[0] in ("", "bytes=0-")
    assert int(ranges[1].removeprefix("bytes=").removesuffix("-")) == 220_000


def test_after_a_failed_download_only_what_is_missing_is_fetched(
    hub: Hub, phi3: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    hub.breaks["model.safetensors"] = 100
    with pytest.raises(HubError, match=f"{REPO}: fetching from .* failed") as caught:
        load(REPO)
    assert "\n" not in str(caught.value)
    hub.breaks.clear()
    hub.requests.clear()
    folder = phi3 / "mini-4k"
    np.testing.assert_array_equal(logits(load(REPO)[0], folder), logits(load(folder)[0], folder))
    assert hub.fetched() == ["model.safetensors"]


@pytest.mark.parametrize("switch", ["argument", "variable"])
def test_offline_uses_what_was_fetched_and_no_network(
    hub: Hub, monkeypatch: pytest.MonkeyPatch, switch: str
) -> None:
    folder = resolve_model(REPO)
    hub.requests.clear()
    if switch == "variable":
        monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert resolve_model(REPO, offline=switch == "argument") == folder
    with pytest.raises(HubError, match="not wholly, among the models fetched before.*run once"):
        resolve_model("clinic/other", offline=switch == "argument")
    with pytest.raises(HubError, match="other at revision v1: not, or not wholly"):
        resolve_model("clinic/other", revision="v1", offline=switch == "argument")
    assert hub.requests == []


def test_an_incomplete_download_is_not_taken_for_a_model_offline(hub: Hub) -> None:
    (resolve_model(REPO) / "model.safetensors").unlink()
    with pytest.raises(HubError, match="not wholly"):
        resolve_model(REPO, offline=True)


def test_without_a_network_what_was_fetched_is_used(
    hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = resolve_model(REPO)
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")  # nothing listens there
    assert resolve_model(REPO) == folder


def test_without_a_network_an_unknown_model_is_an_error(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(HubError, match="http://127.0.0.1:9 cannot be reached.*check the network"):
        resolve_model(REPO)


def test_a_model_the_hub_does_not_have_is_an_error(hub: Hub) -> None:
    with pytest.raises(
        HubError, match="clinic/nothing: no such model at http://127.0.0.1"
    ) as caught:
        resolve_model("clinic/nothing")
    assert "\n" not in str(caught.value)


def test_a_gated_model_says_what_to_do(hub: Hub) -> None:
    hub.gated = True
    with pytest.raises(HubError, match="asks for consent; accept the terms"):
        resolve_model(REPO)


def test_a_repository_without_safetensors_is_an_error(hub: Hub, mini: Path) -> None:
    (mini / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="neither model.safetensors nor"):
        load(REPO)


@pytest.mark.parametrize(
    "text",
    [
        "./runs/base",
        "../base",
        "/nowhere/base",
        "~/nowhere/base",
        "runs/a/base",
        "base",
        "",
        "runs/base.safetensors",
        "a/..",
        "a b/c",
        "runs/typo",
        "Models/phi-3",
    ],
)
def test_what_looks_like_a_path_is_never_sent_to_the_hub(hub: Hub, text: str) -> None:
    with pytest.raises(CheckpointError, match="no such file or directory"):
        load(text)
    assert hub.requests == []


def test_a_path_object_is_never_sent_to_the_hub(hub: Hub) -> None:
    with pytest.raises(CheckpointError, match="no such file or directory"):
        load(Path(REPO))
    assert hub.requests == []


def test_an_existing_path_wins_over_a_hub_id(
    hub: Hub, mini: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(mini.parent)
    (mini.parent / "clinic").mkdir()
    mini.rename(mini.parent / REPO)
    assert resolve_model(REPO) == Path(REPO)
    with pytest.raises(CheckpointError, match="a revision belongs to a hub id"):
        resolve_model(REPO, revision="main")
    assert hub.requests == []


def test_a_mistake_below_a_local_folder_is_never_sent_to_the_hub(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "clinic").mkdir()
    with pytest.raises(
        CheckpointError, match="clinic is a folder here.*OWNER/NAME.*check the path"
    ):
        resolve_model(REPO)
    assert hub.requests == []
