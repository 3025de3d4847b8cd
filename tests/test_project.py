"""What the project says of itself: versions that agree, and examples that work."""

import re
import tomllib
from pathlib import Path
from typing import Any

import yaml

from cbtm_pipeline import config

ROOT = Path(__file__).parents[1]


def pins(text: str) -> dict[str, str]:
    return {
        name.lower().replace("_", "-"): version for name, version in re.findall(r"([\w.-]+)==([\w.]+)", text)
    }


def requirement_names(requirements: list[str]) -> set[str]:
    return {re.split(r"[<>=~\[; ]", requirement)[0].lower().replace("_", "-") for requirement in requirements}


def test_every_dependency_is_pinned_and_the_conda_environment_agrees() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    constraints = pins((ROOT / "envs/constraints.txt").read_text())
    needed = requirement_names(project["dependencies"])
    for extra in project["optional-dependencies"].values():
        assert requirement_names(extra) <= constraints.keys()
    assert needed <= constraints.keys()
    conda = pins((ROOT / "envs/cbtm.yaml").read_text())
    assert conda.keys() == needed - {"snakemake"}  # Snakemake starts the jobs and is not started by them
    assert conda.items() <= constraints.items()


def merged(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    return {
        **base,
        **{
            key: merged(base[key], value) if isinstance(value, dict) else value for key, value in over.items()
        },
    }


def test_config_in_the_readme_is_valid() -> None:
    examples = re.findall(r"```yaml\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    assert examples
    for example in examples:
        config.validate(merged(yaml.safe_load((ROOT / "config.yaml").read_text()), yaml.safe_load(example)))


def test_commands_in_the_readme_exist() -> None:
    readme = (ROOT / "README.md").read_text()
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.M))
    for target in re.findall(r"^make (\w+)", readme, re.M):
        assert target in targets
    for module in re.findall(r"python -m cbtm_pipeline\.(\w+)", readme):
        assert (ROOT / f"src/cbtm_pipeline/{module}.py").exists()
    for link in re.findall(r"\]\((?!https?:)([^)#]+)\)", readme):
        assert (ROOT / link).exists(), link
