"""Repositories on the Hugging Face Hub, through huggingface_hub and its shared cache."""

import json
from pathlib import Path

from llmcli import console
from llmcli.errors import ModelUnavailableError, first_line
from llmcli.models.registry import HubSource, ModelSpec

CONFIGURATION = ["*.json", "*.txt", "*.model", "*.spm", "*.jinja", "*.py"]
SAFETENSORS = "model.safetensors"  # or, in shards, model-00001-of-00002.safetensors and so on, with an index
PICKLED = "pytorch_model.bin"
ADAPTER, ADAPTER_CONFIG = "adapter_model.safetensors", "adapter_config.json"


def find(source: HubSource, *, allow_pickle: bool, is_adapter: bool = False) -> Path | None:
    """Return the cached snapshot if it is complete."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    for weights in [ADAPTER] if is_adapter else [SAFETENSORS, *([PICKLED] if allow_pickle else [])]:
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
    """Download the files of the revision that the cache lacks, and return the snapshot."""
    from huggingface_hub import HfApi, constants, hf_hub_download, snapshot_download, try_to_load_from_cache
    from huggingface_hub.utils import disable_progress_bars, filter_repo_objects, logging

    if not console.verbose:
        logging.set_verbosity_error()
    if console.quiet or not console.is_terminal():
        disable_progress_bars()
    try:
        timeout = constants.HF_HUB_ETAG_TIMEOUT
        info = HfApi().model_info(source.repo, revision=source.revision, files_metadata=True, timeout=timeout)
        sizes = {file.rfilename: file.size or 0 for file in info.siblings or ()}
        weights = ADAPTER if spec.is_adapter else _weights(source.repo, set(sizes), allow_pickle=allow_pickle)
        if spec.is_adapter and ADAPTER not in sizes:
            raise ModelUnavailableError(f"{source.repo} has no {ADAPTER}", hint="save an adapter with safetensors")
        patterns = _patterns(weights)
        wanted = filter_repo_objects(sizes, **patterns)
        cached = {name: try_to_load_from_cache(source.repo, name, revision=info.sha) for name in wanted}
        if missing := [name for name, path in cached.items() if not isinstance(path, str)]:
            size = sum(sizes[name] for name in missing)
            license = getattr(info.card_data, "license", None) or spec.license or "not stated"
            console.notice(f"pulling {source.repo}, {size / 1e6:.0f} MB from the Hub (license: {license})")
        # One by one: Ctrl-C would have to wait for the threads of snapshot_download. (A single file comes in parallel
        # anyway if the Hub keeps it in Xet.) Weights come last: once they are there, the rest is too.
        for name in sorted(missing, key=lambda name: name.endswith((".safetensors", ".bin"))):
            hf_hub_download(source.repo, name, revision=info.sha)
        disable_progress_bars()
        snapshot_download(source.repo, revision=source.revision, **patterns)  # only records the revision
    except (ModelUnavailableError, MemoryError):
        raise
    except Exception as exc:
        raise _translated(exc, source) from exc
    if not (path := find(source, allow_pickle=allow_pickle, is_adapter=spec.is_adapter)):
        raise ModelUnavailableError(f"incomplete download of {source.repo}", hint="try again later")
    return path


def remove(source: HubSource) -> bool:
    """Delete the cached revision, also for other tools that share the cache. False if it is not cached."""
    from huggingface_hub import scan_cache_dir
    from huggingface_hub.errors import CacheNotFound

    try:
        cache = scan_cache_dir()
    except CacheNotFound:
        return False
    repos = [repo for repo in cache.repos if repo.repo_id == source.repo and repo.repo_type == "model"]
    name, commits = source.revision, list[str]()
    for revision in (revision for repo in repos for revision in repo.revisions):
        if name is None or name in revision.refs or revision.commit_hash.startswith(name):
            commits.append(revision.commit_hash)
    if commits:
        cache.delete_revisions(*commits).execute()
    return bool(commits)


def _patterns(weights: str) -> dict[str, list[str]]:
    # Directories hold other formats, except sentence-transformers' numbered ones, which may have weights of layers.
    stem, suffix = weights.split(".")
    wanted = [*CONFIGURATION, weights, f"{stem}-*.{suffix}", f"[0-9]*/{SAFETENSORS}"]
    return {"allow_patterns": wanted, "ignore_patterns": ["[!0-9]*/*"]}


def _weights(repo: str, files: set[str], *, allow_pickle: bool) -> str:
    there = [weights for weights in (SAFETENSORS, PICKLED) if {weights, f"{weights}.index.json"} & files]
    if not there or "config.json" not in files:
        raise ModelUnavailableError(
            f"{repo} has no model that Transformers can load",
            hint="expected config.json and model.safetensors; pass a .gguf file by its path, an adapter with --adapter",
        )
    if there == [PICKLED] and not allow_pickle:
        raise ModelUnavailableError(
            f"{repo} has only pickled weights, which can run code when opened",
            hint="if you trust whoever made them, pass --allow-pickle",
        )
    return there[0]


def _is_complete(snapshot: Path, weights: str) -> bool:
    # A tool that fetches file by file may have been interrupted.
    config = ADAPTER_CONFIG if weights == ADAPTER else "config.json"
    files, index = [config, weights], snapshot / f"{weights}.index.json"
    if index.is_file() and not (snapshot / weights).is_file():
        files = ["config.json", *json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()]
    return all((snapshot / file).is_file() for file in set(files))


def _translated(exc: Exception, source: HubSource) -> Exception:
    """Return huggingface_hub's exception as one of ours; that of a full disk is returned as it is."""
    from huggingface_hub import constants, errors

    if isinstance(exc, errors.LocalEntryNotFoundError) and isinstance(exc.__cause__, Exception):
        exc = exc.__cause__  # The outer one only adds that the file is not cached either.
    repo, page, token = source.repo, f"{constants.ENDPOINT}/{source.repo}", "set HF_TOKEN or run `hf auth login`"
    status = getattr(getattr(exc, "response", None), "status_code", None)
    reason = first_line(exc)
    refusal = getattr(exc, "server_message", None) or status
    not_found = f"{repo} is not on the Hub, or is private"
    check_name = f"check the name at {page}; for a private one {token}"
    # The first row that holds. A status in place of an exception covers what the Hub answers without a type of its own.
    table: list[tuple[type[Exception] | tuple[int, ...], str, str]] = [
        (errors.GatedRepoError, f"{repo} is gated: its owner asks you to accept terms first",
         f"accept them at {page}, then {token}"),
        (errors.RevisionNotFoundError, f"{repo} has no revision {source.revision!r}", f"see {page}"),
        (errors.RepositoryNotFoundError, not_found, check_name),
        ((404,), not_found, check_name),
        ((401, 403), f"the Hub refused access to {repo}: {refusal}", "check HF_TOKEN, or run `hf auth login`"),
        ((status,) if status else (), f"the Hub returned HTTP {status} for {repo}", "try again later"),
        (errors.HFValidationError, f"{repo} is not a Hub ID", "write org/name or org/name@revision"),
    ]  # fmt: skip
    for case, message, hint in table:
        if status in case if isinstance(case, tuple) else isinstance(exc, case):
            return ModelUnavailableError(message, hint=hint)
    if isinstance(exc, OSError) and exc.errno:
        return exc
    return ModelUnavailableError(
        f"cannot pull {repo}: the connection to the Hub at {constants.ENDPOINT} failed: {reason}",
        hint="check the network, HF_ENDPOINT and proxy settings, then pull again",
    )
