"""Repositories on the Hugging Face hub, through huggingface_hub and its shared cache."""

from pathlib import Path
from typing import Any

from llmcli import console
from llmcli.errors import ModelUnavailable
from llmcli.registry import HubSource, ModelSpec

CONFIGURATION = ["*.json", "*.txt", "*.model", "*.spm", "*.jinja", "*.py"]
SAFETENSORS = ["model.safetensors", "model-*.safetensors"]
PICKLED = ["pytorch_model.bin", "pytorch_model-*.bin"]
SUBFOLDERS = ["*/*"]  # other formats of the same weights: onnx, original, ...


def find(source: HubSource, *, allow_pickle: bool) -> Path | None:
    """The cached snapshot, if it is there and whole."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    for weights in [SAFETENSORS, *([PICKLED] if allow_pickle else [])]:
        try:
            path = snapshot_download(
                source.repo,
                revision=source.revision,
                allow_patterns=CONFIGURATION + weights,
                ignore_patterns=SUBFOLDERS,
                local_files_only=True,
            )
        except LocalEntryNotFoundError:
            continue
        if any(file for pattern in weights for file in Path(path).glob(pattern)):
            return Path(path)
    return None


def fetch(spec: ModelSpec, source: HubSource, *, allow_pickle: bool) -> Path:
    """Download what the hub has of the revision and the cache lacks.

    Raises ModelUnavailable: not found, gated, unreachable, or only pickled weights.
    """
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.utils import disable_progress_bars, filter_repo_objects

    if console.quiet or not console.is_terminal():
        disable_progress_bars()
    try:
        info = HfApi().model_info(source.repo, revision=source.revision, files_metadata=True)
        sizes = {file.rfilename: file.size or 0 for file in info.siblings or ()}
        patterns = {
            "allow_patterns": CONFIGURATION + _weights(source.repo, set(sizes), allow_pickle=allow_pickle),
            "ignore_patterns": SUBFOLDERS,
        }
        size = sum(sizes[name] for name in filter_repo_objects(sizes, **patterns))
        license = getattr(info.card_data, "license", None) or spec.license or "not stated"
        console.notice(f"pulling {source.repo}, {size / 1e6:.0f} MB from the hub (license: {license})")
        return Path(snapshot_download(source.repo, revision=source.revision, **patterns))
    except (ModelUnavailable, MemoryError):
        raise
    except Exception as problem:
        raise _translated(problem, source) from problem


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


def _weights(repo: str, files: set[str], *, allow_pickle: bool) -> list[str]:
    """The patterns of the weight files to take. Raises ModelUnavailable where there are none that may be opened."""
    if any(Path(file).match(pattern) for file in files for pattern in SAFETENSORS):
        return SAFETENSORS
    if not any(Path(file).match(pattern) for file in files for pattern in PICKLED):
        raise ModelUnavailable(f"{repo} holds no weights that transformers can load")
    if not allow_pickle:
        raise ModelUnavailable(
            f"{repo} has only pickled weights, which can run code when opened",
            hint="--allow-pickle takes them, if you trust whoever made them",
        )
    return PICKLED


def _translated(problem: Exception, source: HubSource) -> Exception:
    """huggingface_hub's exception as one of ours; a full disk stays as it is."""
    from huggingface_hub import constants, errors

    page = f"{constants.ENDPOINT}/{source.repo}"
    status = getattr(getattr(problem, "response", None), "status_code", None)
    if isinstance(problem, errors.GatedRepoError) or status == 403:
        return ModelUnavailable(
            f"{source.repo} is gated: its owner asks you to accept terms first",
            hint=f"accept them at {page}, then set HF_TOKEN or run `hf auth login`",
        )
    if isinstance(problem, errors.RevisionNotFoundError):
        return ModelUnavailable(f"{source.repo} has no revision {source.revision!r}", hint=f"see {page}")
    if isinstance(problem, errors.RepositoryNotFoundError) or status in (401, 404):
        return ModelUnavailable(
            f"{source.repo} is not on the hub, or is private",
            hint=f"check the name at {page}; for a private one set HF_TOKEN or run `hf auth login`",
        )
    if status:
        return ModelUnavailable(f"the hub answered {status} for {source.repo}", hint="try again later")
    if isinstance(problem, errors.HFValidationError):
        return ModelUnavailable(f"{source.repo} is not a hub id", hint="write org/name or org/name@revision")
    if isinstance(problem, OSError) and problem.errno:
        return problem
    return ModelUnavailable(
        f"cannot reach the hub at {constants.ENDPOINT}: {problem or type(problem).__name__}",
        hint="check the network, HF_ENDPOINT and proxy settings; `llmcli models list` shows what is cached",
    )
