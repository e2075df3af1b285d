"""What a model folder's card says of the name and the licence."""

from pathlib import Path

import pytest

from megatron_qlrl.release.base import base_name, is_release, licence


def card(folder: Path, *lines: str) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "README.md").write_text("\n".join(["---", *lines, "---", "", "# A model"]))
    return folder


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("Qwen2.5-7B-Instruct", "Qwen2.5-7B-Instruct"),
        ("hub/models--Qwen--Qwen3-4B/snapshots/1cfa9a7208912126459214e8b04321603b3df60c",
         "Qwen/Qwen3-4B"),
        ("runs/rl/hf", "not named (set model.name)"),
        ("my model", "not named (set model.name)"),
    ],
)  # fmt: skip
def test_name_of_a_base_model_by_its_folder(tmp_path: Path, path: str, name: str) -> None:
    assert base_name(tmp_path / path) == name


def test_releases_pass_the_name_of_their_base_on(tmp_path: Path) -> None:
    ours = card(tmp_path / "hf", "base_model: Qwen/Qwen3-4B", "tags: [megatron_qlrl]")
    assert is_release(ours)
    assert base_name(ours) == "Qwen/Qwen3-4B"
    # On the card of somebody else's model it is that model's own base.
    theirs = card(tmp_path / "x", "base_model: Qwen/Qwen3-4B", "tags: [theirs]")
    assert not is_release(theirs)
    assert base_name(theirs) == "x"
    nameless = card(tmp_path / "y", "base_model: ['a', 'b']", "tags: [megatron_qlrl]")
    assert base_name(nameless) == "y"


@pytest.mark.parametrize(
    ("lines", "fields"),
    [
        (["license: apache-2.0"], {"license": "apache-2.0"}),
        (
            ["license: other", "license_name: qwen-research", "license_link: LICENSE"],
            {"license": "other", "license_name": "qwen-research", "license_link": "LICENSE"},
        ),
        (["license: mit", "license_link: javascript:alert(1)"], {"license": "mit"}),
        (["license: |", "  mit", "  ---", "  # x"], {}),
        (["license: [mit, apache-2.0]"], {}),
        (["license_name: no-licence-field"], {}),
        (["license: {broken"], {}),
        (["just a line"], {}),
    ],
)
def test_licence_on_the_card(tmp_path: Path, lines: list[str], fields: dict[str, str]) -> None:
    assert licence(card(tmp_path / "m", *lines)) == fields


def test_no_card_names_no_licence(tmp_path: Path) -> None:
    assert licence(tmp_path) == {}
    (tmp_path / "README.md").write_bytes(b"\xff\xfe---\n")
    assert licence(tmp_path) == {}
