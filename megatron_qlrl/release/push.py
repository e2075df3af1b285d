"""Uploads a model folder to the Hugging Face hub, file by file of a list that was checked.

static checks -> the files -> (with the user's yes) repository -> what is there already -> upload
"""

import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol

from megatron_qlrl.config.schema import MODEL_NAME
from megatron_qlrl.errors import ReleaseError
from megatron_qlrl.release.static import release_files, static_checks

_LOADED = (".safetensors", ".bin", ".pt", ".pth", ".pkl", ".ckpt", ".h5", ".msgpack", ".gguf",
           ".py", ".index.json")  # fmt: skip
"""Ends of names of files that somebody's software loads as weights or code."""


class Hub(Protocol):
    """What is used of huggingface_hub's HfApi."""

    def create_repo(self, repo_id: str, *, private: bool, exist_ok: bool) -> object: ...
    def model_info(self, repo_id: str) -> Any: ...
    def list_repo_files(self, repo_id: str) -> Iterable[str]: ...
    def upload_folder(
        self,
        *,
        repo_id: str,
        folder_path: Path,
        allow_patterns: Sequence[str],
        commit_message: str,
    ) -> object: ...


def files_to_push(folder: Path, repo: str) -> list[Path]:
    """Returns the files that `push` uploads.

    Raises:
        ReleaseError: `repo` is no OWNER/NAME, or a static check of the folder fails.
    """
    if "/" not in repo or not re.fullmatch(MODEL_NAME, repo):
        raise ReleaseError(f"{repo!r} is no name of a repository; write OWNER/NAME")
    for check in static_checks(folder):
        if check.status == "failed":
            raise ReleaseError(f"{folder} is not uploaded: {check.name}: {check.detail}")
    return release_files(folder)


def push(folder: Path, repo: str, *, private: bool, hub: Hub) -> None:
    """Makes the repository if there is none, and uploads the folder's files as one commit.

    Raises:
        ReleaseError: as `files_to_push`; a private upload would become public, or weights of
            another model would stay beside these; the hub refuses.
    """
    from httpx import HTTPError

    names = [file.name for file in files_to_push(folder, repo)]
    try:
        hub.create_repo(repo, private=private, exist_ok=True)
        if private and not hub.model_info(repo).private:
            raise ReleaseError(
                f"{repo} exists and is public; make it private on the hub, name another "
                "repository, or leave --private out"
            )
        others = sorted(
            name
            for name in hub.list_repo_files(repo)
            if name.endswith(_LOADED) and name not in names
        )
        if others:
            raise ReleaseError(
                f"{repo} holds {', '.join(others[:3])} ({len(others)} such), which this release "
                "does not: software might load that in place of these weights; remove it there, "
                "or name another repository"
            )
        hub.upload_folder(
            repo_id=repo,
            folder_path=folder,
            allow_patterns=names,
            commit_message="Upload a release of megatron_qlrl",
        )
    except (HTTPError, OSError, ValueError) as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise ReleaseError(
            f"the hub did not take {repo}: {lines[0]}; log in with `hf auth login` (or set "
            "HF_TOKEN) as somebody who may write there, and try again"
        ) from error


def listing(files: Sequence[Path], repo: str, *, private: bool, endpoint: str) -> list[str]:
    """Returns lines that say what goes where."""
    sizes = {file.name: file.stat().st_size for file in files}
    return [
        *(f"{size:>16,}  {name}" for name, size in sizes.items()),
        f"{sum(sizes.values()):>16,}  bytes in {len(files)} files",
        f"to {endpoint}/{repo}, {'private' if private else 'public'} if it does not exist yet",
    ]
