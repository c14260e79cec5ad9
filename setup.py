"""Packaging of sscl_jax: `pip install .`, or `pip install -e '.[test]'` to work on it."""

from pathlib import Path

from setuptools import find_packages, setup

setup(
    name="sscl_jax",
    version="0.1.0",
    description="Semi-supervised medical image segmentation by self-ensembling contrast",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.11",
    packages=find_packages(include=["sscl_jax*", "data_prep*", "configs*"]),
    package_data={"data_prep": ["splits/*.json"]},
    # Lower bounds are the oldest releases that the test suite was run with, not a guess.
    install_requires=[
        "absl-py>=2.5.1",
        "array_record>=0.8.6",
        "flatbuffers>=25.12.19",
        "flax>=0.12.8",
        "importlib_resources>=7.1.0",  # tensorflow-datasets imports it and does not ask for it
        "jax>=0.10.2",
        "matplotlib>=3.11.2",
        "ml_collections>=1.1.0",
        "nibabel>=5.4.2",
        "numpy>=2.4.6",
        "optax>=0.2.8",
        "orbax-checkpoint>=0.12.8",
        "scipy>=1.17.1",
        "tensorboardX>=2.6.5",
        "tensorflow-datasets>=4.9.10",
        "tqdm>=4.70.1",
    ],
    extras_require={
        # Accelerators.
        "cuda": ["jax[cuda12]"],
        "tpu": ["jax[tpu]"],
        # File formats other than NIfTI.
        "h5": ["h5py>=3.16.0"],
        "dicom": ["SimpleITK>=2.5.7"],
        "nrrd": ["SimpleITK>=2.5.7"],
        # Preparing on several machines. Holds numpy below 2.5 and protobuf below 7.
        "beam": ["apache-beam>=2.77.0"],
        # Export to ONNX, and a runtime to try it.
        "onnx": ["jax2onnx>=0.13.0", "onnxruntime>=1.32.0"],
        # PyTorch, to compare the speed with: benchmarks/torch_step.py.
        "bench": ["torch>=2.13.0"],
        "test": [
            "hypothesis>=6.170.17",
            "h5py>=3.16.0",
            "ipykernel>=7.4.0",
            "MedPy>=0.5.2",
            "mypy>=2.4.1",
            "nbclient>=0.11.0",
            "pytest>=9.2.0",
            "pytest-xdist>=3.8.0",
            "ruff>=0.17.6",
            "SimpleITK>=2.5.7",
        ],
    },
    entry_points={
        "console_scripts": [
            "sscl-prepare = data_prep.__main__:main",
            "sscl-train = sscl_jax.main:run",
            "sscl-predict = sscl_jax.predict:main",
            "sscl-evaluate = sscl_jax.evaluate:main",
            "sscl-export = sscl_jax.export:main",
        ]
    },
    classifiers=[
        "Intended Audience :: Science/Research",
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.13",
        "Topic :: Scientific/Engineering :: Medical Science Apps.",
    ],
)
