"""What is uploaded, what is refused, and that a dry run sends nothing. The hub is a server of this
test's own, to which the real huggingface_hub speaks."""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest

from megatron_qlrl.errors import ReleaseError
from megatron_qlrl.release.push import files_to_push, listing, push
from tests.fakes.hub import FakeHub

ROOT = Path(__file__).resolve().parents[3]
TOKEN = "hf_not_a_token_but_looks_like_one"


class FakeApi:
    """The methods of HfApi that are used, by hand."""

    def __init__(self, *, exists_public: bool = False, holds: tuple[str, ...] = ()) -> None:
        self.calls: list[str] = []
        self.uploaded: dict[str, Any] = {}
        self._public, self._holds = exists_public, holds
        self._private = False
        self.fails: Exception | None = None

    def create_repo(self, repo_id: str, *, private: bool, exist_ok: bool) -> None:
        assert exist_ok
        self.calls.append(f"create {repo_id}")
        self._private = private and not self._public

    def model_info(self, repo_id: str) -> Any:
        return SimpleNamespace(private=self._private)

    def list_repo_files(self, repo_id: str) -> list[str]:
        return list(self._holds)

    def upload_folder(self, **given: Any) -> None:
        if self.fails:
            raise self.fails
        self.calls.append("upload")
        self.uploaded = given


@pytest.fixture
def folder(release_folder: Callable[..., Path]) -> Path:
    return release_folder()


def test_the_checked_files_are_uploaded_and_no_others(folder: Path) -> None:
    api = FakeApi(holds=(".gitattributes", "README.md", "model.safetensors"))
    (folder / ".cache").mkdir()
    (folder / ".cache" / "secret").write_text("x")
    push(folder, "me/model", private=True, hub=api)
    assert api.calls == ["create me/model", "upload"]
    assert api.uploaded["repo_id"] == "me/model" and api.uploaded["folder_path"] == folder
    assert api.uploaded["allow_patterns"] == [
        "README.md", "chat_template.jinja", "config.json", "model.safetensors", "tokenizer.json",
    ]  # fmt: skip


@pytest.mark.parametrize("repo", ["model", "a/b/c", "../x", "a b/c", "-a/b", "a/", ""])
def test_a_repository_has_an_owner_and_a_name(folder: Path, repo: str) -> None:
    with pytest.raises(ReleaseError, match="is no name of a repository; write OWNER/NAME"):
        files_to_push(folder, repo)


def test_what_fails_a_check_is_not_uploaded(folder: Path) -> None:
    (folder / "notes.txt").write_text("private")
    api = FakeApi()
    with pytest.raises(ReleaseError, match=r"is not uploaded: files: .*notes\.txt does not belong"):
        push(folder, "me/model", private=False, hub=api)
    assert api.calls == []


def test_a_private_upload_does_not_become_public(folder: Path) -> None:
    api = FakeApi(exists_public=True)
    with pytest.raises(ReleaseError, match="exists and is public"):
        push(folder, "me/model", private=True, hub=api)
    assert "upload" not in api.calls


def test_other_weights_do_not_stay_beside_these(folder: Path) -> None:
    api = FakeApi(holds=("model.safetensors.index.json", "model-00001-of-00002.safetensors"))
    with pytest.raises(ReleaseError, match=r"holds model-00001.*\(2 such\), which this release"):
        push(folder, "me/model", private=False, hub=api)
    assert "upload" not in api.calls


@pytest.mark.parametrize(
    "error", [httpx.ConnectError("no route"), OSError("no token"), ValueError("bad\nsecond line")]
)
def test_a_hub_that_refuses_is_one_message(folder: Path, error: Exception) -> None:
    api = FakeApi()
    api.fails = error
    first = str(error).split("\n")[0]
    with pytest.raises(ReleaseError, match=f"did not take me/model: {first}; log in with `hf auth"):
        push(folder, "me/model", private=False, hub=api)


def test_the_list_has_sizes_and_the_target(folder: Path) -> None:
    lines = listing(
        files_to_push(folder, "me/model"), "me/model", private=True, endpoint="https://hub"
    )
    size = (folder / "config.json").stat().st_size
    assert f"{size:>16,}  config.json" in lines
    assert lines[-1] == "to https://hub/me/model, private if it does not exist yet"


# --- the command line and the real huggingface_hub ---------------------------------------


@pytest.fixture
def hub() -> Iterator[FakeHub]:
    hub = FakeHub()
    yield hub
    hub.close()


def command(hub: FakeHub, home: Path, *argv: str | Path) -> subprocess.CompletedProcess[str]:
    env = os.environ | {
        "HF_ENDPOINT": hub.url, "HF_TOKEN": TOKEN, "HF_HOME": str(home), "PYTHONPATH": str(ROOT),
        "HF_HUB_DISABLE_XET": "1", "no_proxy": "*",
    }  # fmt: skip
    env.pop("HF_HUB_OFFLINE", None)
    return subprocess.run(
        [sys.executable, "-m", "megatron_qlrl", "release", "push", *map(str, argv)],
        env=env, capture_output=True, text=True, check=False, timeout=120,
    )  # fmt: skip


def test_a_dry_run_sends_nothing(hub: FakeHub, folder: Path, tmp_path: Path) -> None:
    done = command(hub, tmp_path, folder, "me/model")
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("dry run: nothing was sent; --yes uploads\n")
    assert f"to {hub.url}/me/model, public if it does not exist yet" in done.stdout
    assert hub.requests == [] and hub.tokens == []


def test_yes_uploads_every_byte(hub: FakeHub, folder: Path, tmp_path: Path) -> None:
    done = command(hub, tmp_path, folder, "me/model", "--private", "--yes")
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith(f"uploaded: {hub.url}/me/model\n")
    assert hub.files == {file.name: file.read_bytes() for file in folder.iterdir()}
    assert hub.visibility == "private"
    assert set(hub.tokens) == {f"Bearer {TOKEN}"}
    assert TOKEN not in done.stdout + done.stderr


def test_a_refusal_is_one_message_without_the_token(folder: Path, tmp_path: Path) -> None:
    hub = FakeHub(refuses=True)
    done = command(hub, tmp_path, folder, "me/model", "--yes")
    hub.close()
    assert done.returncode == 2
    assert "qlrl: error: the hub did not take me/model: " in done.stderr
    assert "Traceback" not in done.stderr
    assert TOKEN not in done.stdout + done.stderr
