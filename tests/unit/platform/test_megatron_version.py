import re
from pathlib import Path

import pytest
from packaging.specifiers import SpecifierSet

from megatron_qlrl.errors import ConfigError
from megatron_qlrl.platform.megatron_version import check_megatron, is_supported

ROOT = Path(__file__).resolve().parents[3]


@pytest.mark.parametrize(
    ("version", "supported"),
    [
        ("0.16.0", False),
        ("0.16.1", True),
        ("0.16.2", True),
        ("0.17.0", False),
        ("0.18.1", False),
        ("0.19.1", False),
        ("0.19.2", True),
        ("0.19.10", True),
        ("0.19.2+local", True),
        ("0.19.2rc1", False),
        ("0.20.0", False),
        ("1.19.2", False),
    ],
)
def test_tested_series_are_supported(version: str, supported: bool) -> None:
    assert is_supported(version) == supported
    (wanted,) = re.findall(r'"megatron-core(.+)"', (ROOT / "setup.py").read_text())
    assert SpecifierSet(wanted).contains(version, prereleases=False) == supported


def test_another_version_is_refused_with_its_place_and_the_tested_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    info = tmp_path / "megatron_core-0.17.1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: megatron-core\nVersion: 0.17.1\n")
    check_megatron()  # the one that is installed
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ConfigError) as refused:
        check_megatron()
    assert str(refused.value).startswith(
        f"megatron-core 0.17.1 ({tmp_path / 'megatron'}) is not supported; "
        "this package is tested with 0.16.1 and 0.19.2: pip install"
    )
