"""Packaging. Ranges are wide and say what the code needs; constraints.txt pins what the tests ran
with.

NVIDIA Apex is not listed anywhere: the project called "apex" on the package index is unrelated.
Apex comes with NVIDIA's containers.
"""

from pathlib import Path

from setuptools import find_packages, setup

REQUIRES = [
    "torch>=2.6",  # what megatron-core 0.16 asks for
    "megatron-core>=0.14",  # the _forward_impl seam of the parallel linears
    "transformers>=4.51",
    "tokenizers>=0.21",
    "safetensors>=0.4.3",
    "sentencepiece>=0.2",
    "pydantic>=2.6",
    "pyyaml>=6.0",
    "numpy>=1.26",
    "numba>=0.59",
    "matplotlib>=3.8",
    "tensorboard>=2.16",
    "psutil>=5.9",
]

EXTRAS = {
    "gguf": ["gguf>=0.10", "accelerate>=0.26"],
    "data": ["datasets>=2.19", "pyarrow>=15"],
    "wandb": ["wandb>=0.17"],
    "eval": ["lm-eval>=0.4.5"],
    "eight-bit": ["torchao>=0.9"],  # learn.optimizer.kind=adamw8bit
    "cuda": ["transformer-engine[pytorch]>=1.13; platform_system == 'Linux'"],
    "dev": [
        *(
            "pytest>=8",
            "pytest-timeout>=2.3",
            "pytest-xdist>=3.8",
            "ruff>=0.9",
            "mypy>=1.13",
            "types-PyYAML>=6.0.12",
        ),
        *("pre-commit>=3.5", "torchao>=0.9"),
        # its interpreter runs the CUDA kernels; a CUDA build of torch brings its own
        "triton>=3.6; platform_system == 'Linux'",
    ],
}

setup(
    name="megamask",
    version="0.1.0",
    description="Learn N:M sparsity masks for frozen large language models on Megatron-Core tensor parallelism",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.10",
    packages=find_packages(include=["megamask", "megamask.*"]),
    package_data={"megamask": ["py.typed", "report/*.html", "weights/known/*.json"]},
    install_requires=REQUIRES,
    extras_require=EXTRAS,
    entry_points={"console_scripts": ["megamask = megamask.__main__:main"]},
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Intended Audience :: Science/Research",
        "Operating System :: POSIX",
        "Programming Language :: Python :: 3",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
