"""Packaging. ``kernels/`` is installed as ``resfused.kernels``, never as a top-level ``kernels``."""

import re
from pathlib import Path

from setuptools import find_packages, setup

root = Path(__file__).parent
version = re.search(r'__version__ = "(.+)"', (root / "resfused" / "version.py").read_text())
if version is None:
    raise RuntimeError("resfused/version.py must define __version__")

# On an index page there is no repository that a path could lead into: such links become names.
readme = re.sub(r"\[([^]]+)\]\((?!https?:|#)([^)]+)\)", r"\1 (`\2`)", (root / "README.md").read_text(encoding="utf-8"))

# Triton's interpreter needs numpy, and does not ask for it.
bench = ["matplotlib>=3.8", "numpy>=1.26", "rich>=13", "scikit-learn>=1.5", "torchvision"]
networks = ["timm>=1", "transformers>=4.50"]
loops = ["accelerate>=1.15", "lightning>=2.5"]
test = [
    "pytest>=8",
    "pytest-xdist>=3.5",
    "hypothesis>=6.100",
    "expecttest>=0.2",
    "onnx",
    "onnxscript",
    *networks,
    *loops,
    *bench,
]

setup(
    name="resfused",
    version=version.group(1),
    description="Fused BatchNorm + residual addition + ReLU in Triton, for training residual networks",
    long_description=readme,
    long_description_content_type="text/markdown",
    author="The resfused developers",
    license_expression="Apache-2.0",
    license_files=["LICENSE"],
    keywords=[
        "batch normalization",
        "residual networks",
        "ResNet",
        "ReLU",
        "kernel fusion",
        "PyTorch",
        "Triton",
        "GPU",
    ],
    packages=[
        *find_packages(include=["resfused", "resfused.*"]),
        "resfused.kernels",
        *(f"resfused.kernels.{name}" for name in find_packages("kernels")),
    ],
    package_dir={"resfused": "resfused", "resfused.kernels": "kernels"},
    package_data={
        "resfused": ["py.typed"],
        "resfused.kernels.cpu": ["source/**/*.cpp", "source/**/*.h"],
        "resfused.kernels.gpu": ["launch_table.json"],
    },
    python_requires=">=3.10,<3.14",
    install_requires=[
        "torch>=2.11",
        # Compiles the kernels for CPUs at first use.
        "ninja>=1.11",
        # Triton has wheels for Linux only; elsewhere plain PyTorch operators run.
        "triton>=3.6; platform_system == 'Linux'",
    ],
    extras_require={
        "test": test,
        "bench": bench,
        "dev": [*test, "ruff>=0.12", "mypy>=1.15", "pre-commit>=4", "import-linter>=2.3", "build>=1.2", "twine>=6.1"],
    },
    classifiers=[
        "Environment :: GPU :: NVIDIA CUDA",
        "Intended Audience :: Developers",
        "Intended Audience :: Science/Research",
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3 :: Only",
        *(f"Programming Language :: Python :: 3.{minor}" for minor in range(10, 14)),
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
)
