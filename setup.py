"""Installs dsv3 and its command; from a clone: pip install -e '.[test]'."""

import setuptools

setuptools.setup(
  name="dsv3",
  version="0.1.0",
  description="DeepSeek-V3 in JAX and Flax, for research.",
  packages=setuptools.find_packages(include=["dsv3", "dsv3.*"]),
  package_data={"dsv3.lab": ["templates/*.j2"], "dsv3.infer": ["*.cc"]},
  python_requires=">=3.11",
  install_requires=[
    "jax>=0.10.2",
    "flax>=0.12.8",
    "optax>=0.2.8",
    "orbax-checkpoint>=0.12.8",
    "chex>=0.1.92",
    "ml_collections>=1.1.0",
    "jinja2>=3.1",
    "numpy>=2.4",
    "tokenizers>=0.23",
    "tensorboardX>=2.6.5",
    "rich>=14.0",
    "tqdm>=4.70",
  ],
  extras_require={
    "parquet": ["pyarrow>=26"],
    "plot": ["matplotlib>=3.11"],
    "harness": ["lm_eval>=0.4.13"],
    "test": [
      "hypothesis>=6.170",
      "ipykernel>=7.4",
      "lm_eval>=0.4.13",
      "matplotlib>=3.11",
      "nbclient>=0.11",
      "pyarrow>=26",
      "pytest>=9.2",
      "pytest-xdist>=3.8",
      "ray>=2.60",
      "submitit>=1.5.4",
    ],
    "hf": ["torch==2.13.0", "transformers>=5.23"],
    "slurm": ["submitit>=1.5.4"],
    "ray": ["ray>=2.60"],
    "gpu": ["tokamax>=0.0.12"],
    "hopper-compile": [  # kernels for a GPU that is not there; of JAX's version
      "absl-py>=2.3",
      "jax-cuda13-plugin>=0.10.2",
      "jax-cuda13-pjrt>=0.10.2",
    ],
  },
  entry_points={"console_scripts": ["dsv3 = dsv3.__main__:main"]},
)
