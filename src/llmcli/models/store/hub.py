"""Repositories on the Hugging Face hub, through huggingface_hub and its shared cache."""

import json
from pathlib import Path
from typing import Any

from llmcli import console
from llmcli.errors import ModelUnavailableError
from llmcli.models.registry import HubSource, ModelSpec

CONFIGURATION = ["*.json", "*.txt", "*.model", "*.spm", "*.jinja", "*.py"]
SAFETENSORS = "model.safetensors"  # or, in shards, model-00001-of-00002.safetensors and so on, with an index
PICKLED = "pytorch_model.bin"


def find(source: HubSource, *, allow_pickle: bool) -> Path | None:
    """The cached snapshot, if it is there and whole. Raises ModelUnavailable for what can be no hub id."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    for weights in [SAFETENSORS, *([PICKLED] if allow_pickle else [])]:
        try:
            path = snapshot_download(source.repo, revision=source.revision, local_files_only=True, **_patterns(weights))
        except LocalEntryNotFoundError:
            continue
        except HFValidationError as exc:
            raise _translated(exc, source) from exc
        if _is_complete(Path(path), weights):
            return Path(path)
    return None


def fetch(spec: ModelSpec, source: HubSource, *, allow_pickle: bool) -> Path:
    """Download what the hub has of the revision and the cache lacks.

    Raises ModelUnavailable: not found, gated, unreachable, or only pickled weights.
    """
    from huggingface_hub import HfApi, constants, hf_hub_download, snapshot_download, try_to_load_from_cache
    from huggingface_hub.utils import disable_progress_bars, filter_repo_objects, logging

    if not console.verbose:
        logging.set_verbosity_error()
    if console.quiet or not console.is_terminal():
        disable_progress_bars()
    try:
        info = HfApi().model_info(
            source.repo, revision=source.revision, files_metadata=True, timeout=constants.HF_HUB_ETAG_TIMEOUT
        )
        sizes = {file.rfilename: file.size or 0 for file in info.siblings or ()}
        patterns = _patterns(_weights(source.repo, set(sizes), allow_pickle=allow_pickle))
        missing = [
            name
            for name in filter_repo_objects(sizes, **patterns)
            if not isinstance(try_to_load_from_cache(source.repo, name, revision=info.sha), str)
        ]
        if missing:
            size = sum(sizes[name] for name in missing)
            license = getattr(info.card_data, "license", None) or spec.license or "not stated"
            console.notice(f"pulling {source.repo}, {size / 1e6:.0f} MB from the hub (license: {license})")
        # One by one, as Ctrl-C would have to wait for snapshot_download's threads (one file alone comes in parallel
        # where the hub keeps it in Xet); and weights last, so that where they are, the rest is too.
        for name in sorted(missing, key=lambda name: name.endswith((".safetensors", ".bin"))):
            hf_hub_download(source.repo, name, revision=info.sha)
        disable_progress_bars()
        snapshot_download(source.repo, revision=source.revision, **patterns)  # nothing is left but to note the revision
    except (ModelUnavailableError, MemoryError):
        raise
    except Exception as exc:
        raise _translated(exc, source) from exc
    if not (path := find(source, allow_pickle=allow_pickle)):
        raise ModelUnavailableError(f"the hub did not give all of {source.repo}", hint="try again later")
    return path


def remove(source: HubSource) -> bool:
    """Delete the cached revision. Other tools that share the cache lose it too."""
    from huggingface_hub import scan_cache_dir
    from huggingface_hub.errors import CacheNotFound

    try:
        cache = scan_cache_dir()
    except CacheNotFound:
        return False
    commits = [
        revision.commit_hash
        for repo in cache.repos
        if repo.repo_id == source.repo and repo.repo_type == "model"
        for revision in repo.revisions
        if source.revision is None or _is(revision, source.revision)
    ]
    if commits:
        cache.delete_revisions(*commits).execute()
    return bool(commits)


def _is(cached: Any, revision: str) -> bool:
    return revision in cached.refs or cached.commit_hash.startswith(revision)


def _patterns(weights: str) -> dict[str, Any]:
    """The files of a model, as huggingface_hub filters by; subfolders hold other formats (onnx, original), but for
    the numbered ones: sentence-transformers' modules."""
    stem, suffix = weights.split(".")
    return {"allow_patterns": [*CONFIGURATION, weights, f"{stem}-*.{suffix}"], "ignore_patterns": ["[!0-9]*/*"]}


def _weights(repo: str, files: set[str], *, allow_pickle: bool) -> str:
    """Which weights to take. Raises ModelUnavailable where there are none that may be opened."""
    there = [weights for weights in (SAFETENSORS, PICKLED) if {weights, f"{weights}.index.json"} & files]
    if not there or "config.json" not in files:
        raise ModelUnavailableError(
            f"{repo} holds no model that transformers can load",
            hint="it takes config.json and model.safetensors; a .gguf file is given by its path",
        )
    if there == [PICKLED] and not allow_pickle:
        raise ModelUnavailableError(
            f"{repo} has only pickled weights, which can run code when opened",
            hint="--allow-pickle takes them, if you trust whoever made them",
        )
    return there[0]


def _is_complete(snapshot: Path, weights: str) -> bool:
    """huggingface_hub can tell only of snapshots that it fetched at once; a tool that takes file by file may
    have been interrupted."""
    files, index = ["config.json", weights], snapshot / f"{weights}.index.json"
    if index.is_file() and not (snapshot / weights).is_file():
        files = ["config.json", *json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()]
    return all((snapshot / file).is_file() for file in set(files))


def _translated(exc: Exception, source: HubSource) -> Exception:
    """huggingface_hub's exception as one of ours; a full disk stays as it is."""
    from huggingface_hub import constants, errors

    if isinstance(exc, errors.LocalEntryNotFoundError) and isinstance(exc.__cause__, Exception):
        exc = exc.__cause__  # it adds no more than that the cache does not help
    page = f"{constants.ENDPOINT}/{source.repo}"
    status = getattr(getattr(exc, "response", None), "status_code", None)
    if isinstance(exc, errors.GatedRepoError):
        return ModelUnavailableError(
            f"{source.repo} is gated: its owner asks you to accept terms first",
            hint=f"accept them at {page}, then set HF_TOKEN or run `hf auth login`",
        )
    if isinstance(exc, errors.RevisionNotFoundError):
        return ModelUnavailableError(f"{source.repo} has no revision {source.revision!r}", hint=f"see {page}")
    if isinstance(exc, errors.RepositoryNotFoundError) or status == 404:
        return ModelUnavailableError(
            f"{source.repo} is not on the hub, or is private",
            hint=f"check the name at {page}; for a private one set HF_TOKEN or run `hf auth login`",
        )
    if status in (401, 403):
        reason = getattr(exc, "server_message", None) or status
        return ModelUnavailableError(
            f"the hub refuses access to {source.repo}: {reason}", hint="check HF_TOKEN, or run `hf auth login`"
        )
    if status:
        return ModelUnavailableError(f"the hub answered {status} for {source.repo}", hint="try again later")
    if isinstance(exc, errors.HFValidationError):
        return ModelUnavailableError(f"{source.repo} is not a hub id", hint="write org/name or org/name@revision")
    if isinstance(exc, OSError) and exc.errno:
        return exc
    reason = (str(exc).strip() or type(exc).__name__).splitlines()[0]
    return ModelUnavailableError(
        f"cannot pull {source.repo}: the connection to the hub at {constants.ENDPOINT} failed: {reason}",
        hint="check the network, HF_ENDPOINT and proxy settings, then pull again",
    )
