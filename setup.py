"""Packaging of kvtier; every tool is configured in pyproject.toml, every pinned version is in constraints.txt."""

from pathlib import Path

from setuptools import find_packages, setup

DEV = [
    "hypothesis>=6.100",
    "import-linter>=2.3",
    "mypy>=1.13",
    "pytest>=8",
    "pytest-asyncio>=1.0",
    "pytest-timeout>=2.3",
    "pytest-xdist>=3.6",
    "ruff>=0.9",
    "tomli-w>=1.0",
]

setup(
    name="kvtier",
    version="0.1.0",
    description="Tiered KV-cache offload for LLM inference: device, host and disk, compressed, found by prefix",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.11",
    packages=find_packages(include=["kvtier", "kvtier.*"]),
    package_data={"kvtier": ["py.typed"]},
    install_requires=[
        "aiofiles>=23.2",
        "lz4>=4.3",
        "numpy>=1.26",
        "prometheus-client>=0.20",
        "pydantic>=2.7",
        "rich>=13",
        "torch>=2.6",
        "typer>=0.12",
        "xxhash>=3.4",
    ],
    extras_require={
        "hf": ["transformers>=5.16.1", "safetensors>=0.5"],
        "vllm": ["vllm>=0.32"],
        "fast": ["numba>=0.61"],
        "gpu": ["triton>=3.2; platform_system == 'Linux'"],
        "plot": ["matplotlib>=3.8"],
        "dev": DEV,
    },
    entry_points={"console_scripts": ["kvtier = kvtier.cli:main"]},
    classifiers=[
        "Intended Audience :: Developers",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3 :: Only",
        "Programming Language :: Python :: 3.11",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
)
