"""A model's name to a directory on this machine, fetched from the hub when it has to be.

An existing path always wins, and what looks like a path is never sent to the hub.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from mlx_medphi.errors import CheckpointError, HubError

__all__ = ["resolve_model"]

# owner/name as the hub allows them.
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
# Weights, configuration and tokenizer; no pickles and no code.
WANTED = ["*.safetensors", "*.json", "*.jinja"]
# Exports for other programs lie in folders.
UNWANTED = ["*/*", "consolidated*.safetensors"]
# Folders that people keep models in; `runs/typo` is no model of somebody called runs.
LOCAL_NAMES = (
    "adapter", "adapters", "checkpoints", "data", "fused", "model", "models", "out", "output",
    "outputs", "runs", "tmp",
)  # fmt: skip
OFFLINE_VARIABLE = "HF_HUB_OFFLINE"


def resolve_model(
    path_or_repo: str | Path, *, revision: str | None = None, offline: bool = False
) -> Path:
    """The local directory or file of a model.

    Args:
        path_or_repo: an existing directory or file, or a hub id `owner/name`.
        revision: branch, tag or commit of a hub id; None means its main branch.
        offline: use what was fetched before and no network, as `HF_HUB_OFFLINE=1` does.

    Raises:
        CheckpointError: neither an existing path nor a hub id, or a path with a mistake in it.
        HubError: the hub does not have it, cannot be reached, or was not to be asked.
    """
    path = Path(path_or_repo).expanduser()
    if str(path_or_repo) and path.exists():
        if revision is not None:
            raise CheckpointError(f"{path}: a revision belongs to a hub id, this is a local path")
        return path
    if isinstance(path_or_repo, Path) or not _is_hub_id(path_or_repo):
        raise CheckpointError(
            f"{path_or_repo}: no such file or directory, and not a hub id of the form OWNER/NAME"
        )
    owner = path_or_repo.partition("/")[0]
    if Path(owner).is_dir() or owner.lower() in LOCAL_NAMES:
        where = "is a folder here" if Path(owner).is_dir() else "is a usual name of a local folder"
        raise CheckpointError(
            f"{path_or_repo}: no such file or directory; {owner} {where}, so this is not taken for "
            "a hub id OWNER/NAME and was not sent to the hub; check the path"
            + (", or fetch the id from another folder" if Path(owner).is_dir() else "")
        )
    return _fetch(path_or_repo, revision, offline)


def _is_hub_id(text: str) -> bool:
    plain = HUB_ID.fullmatch(text) is not None and ".." not in text and "--" not in text
    return plain and not text.endswith((".safetensors", ".json", ".git"))


def _fetch(repo: str, revision: str | None, offline: bool) -> Path:
    # Heavy, and only needed for models that are not on this machine.
    from huggingface_hub import constants, errors, snapshot_download

    # The client reads these variables once, when it is imported; a notebook sets them later.
    endpoint = os.environ.get("HF_ENDPOINT") or constants.ENDPOINT
    switched_off = os.environ.get(OFFLINE_VARIABLE, "").upper() in ("1", "ON", "YES", "TRUE")
    offline = offline or switched_off or constants.HF_HUB_OFFLINE
    name = repo if revision is None else f"{repo} at revision {revision}"
    try:
        folder = snapshot_download(
            repo,
            revision=revision,
            allow_patterns=WANTED,
            ignore_patterns=UNWANTED,
            local_files_only=offline,
            endpoint=endpoint.rstrip("/"),
        )
    except errors.GatedRepoError as exc:
        raise HubError(
            f"{repo}: its owner asks for consent; accept the terms on its page and set HF_TOKEN"
        ) from exc
    except errors.RevisionNotFoundError as exc:
        raise HubError(f"{repo}: {endpoint} has no revision {revision!r} of it") from exc
    except errors.RepositoryNotFoundError as exc:
        raise HubError(
            f"{repo}: no such model at {endpoint}, and no such path here; check the name, or set "
            "HF_TOKEN if it is private"
        ) from exc
    except errors.LocalEntryNotFoundError as exc:
        raise HubError(_not_cached(name, endpoint, offline)) from exc
    except Exception as exc:
        # The client's transport errors differ by its version (requests, httpx, httpx2); whatever
        # goes wrong while fetching is this error.
        reason = str(exc).strip().splitlines() or [type(exc).__name__]
        raise HubError(f"{name}: fetching from {endpoint} failed: {reason[0]}") from exc
    return Path(folder)


def _not_cached(name: str, endpoint: str, offline: bool) -> str:
    if offline:
        return (
            f"{name}: not, or not wholly, among the models fetched before, and fetching is "
            f"switched off; run once without offline and {OFFLINE_VARIABLE}, or give a local "
            "directory"
        )
    return (
        f"{name}: {endpoint} cannot be reached and the model was not fetched before; check the "
        "network and HF_ENDPOINT, or give a local directory"
    )
