"""The folder configs/ is installed as memoryllm_jax/configs, so that --config=configs/tiny.py works without a clone.

pyproject.toml has everything else; a list of packages that are found cannot be extended there.
"""

from setuptools import find_namespace_packages, setup

setup(
    packages=[
        *find_namespace_packages(include=["memoryllm_jax*"]),
        "memoryllm_jax.configs",
        "memoryllm_jax.configs.protocols",
    ],
    package_dir={"memoryllm_jax.configs": "configs"},
)
