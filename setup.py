"""Packages and shipped data; everything else stands in pyproject.toml.

prompts/, eval/ and configs/ stay readable at the top of the repository and are installed as
llmrec/_shipped/{prompts,eval,configs}/, so that a top-level `eval` never becomes importable.
pyproject.toml cannot say both "find the packages" and "and these three", hence this file.
"""

from setuptools import find_packages, setup

SHIPPED = {f"llmrec._shipped.{folder}": folder for folder in ("prompts", "eval", "configs")}

setup(
    packages=[*find_packages(include=["llmrec", "llmrec.*"]), *SHIPPED],
    package_dir=SHIPPED,
    package_data={name: ["**/*"] for name in SHIPPED},
    exclude_package_data={
        "llmrec._shipped.eval": ["results/**"]
    },  # kept runs: for readers, not users
)
