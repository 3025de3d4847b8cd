"""What the project says of itself: versions that agree, and examples that work."""

import ast
import re
import tomllib
from pathlib import Path
from typing import Any

import yaml

import cbtm_pipeline
from cbtm_pipeline import __main__, config, plan

ROOT = Path(__file__).parents[1]
COMMANDS = __main__.MODULES  # module by command


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


README = (ROOT / "README.md").read_text()
PAGES = sorted((ROOT / "docs").glob("*.md"))


def links(text: str) -> list[str]:
    return re.findall(r"\]\((?!https?:)([^)#]+)(?:#[^)]*)?\)", text)


def make_targets() -> set[str]:
    return set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M))


def test_commands_in_the_readme_exist() -> None:
    for target in re.findall(
        r"\bmake ([a-z-]+)`?", "\n".join(re.findall(r"^make .*|`make .*?`", README, re.M))
    ):
        assert target in make_targets()
    for module in re.findall(r"python -m cbtm_pipeline\.(\w+)", README):
        assert (ROOT / f"src/cbtm_pipeline/{module}.py").exists()


def test_links_lead_somewhere() -> None:
    for page in [*PAGES, *ROOT.glob("*.md")]:
        for link in links(page.read_text()):
            assert (page.parent / link).exists(), f"{page.name}: {link}"


def test_every_page_is_linked_from_the_readme() -> None:
    linked = {(ROOT / link).resolve() for link in links(README)}
    pages = {*PAGES, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", ROOT / "CITATION.cff"}
    assert pages <= linked, f"not linked: {sorted(page.name for page in pages - linked)}"


def test_every_command_is_documented() -> None:
    for command in COMMANDS:
        assert f"cbtm {command}" in README
        assert f"cbtm {command}" in (ast.get_docstring(ast.parse(source("__main__"))) or "")
    makefile = (ROOT / "Makefile").read_text()
    for target in make_targets():
        assert re.search(rf"^{target}:.*## ", makefile, re.M), f"make help does not explain {target}"
    contract = (ROOT / "docs/data-contract.md").read_text()
    for rule in plan.RULES:
        assert f"| {rule} |" in contract, f"docs/data-contract.md does not say what {rule} writes"


def source(name: str) -> str:
    return (ROOT / f"src/cbtm_pipeline/{name}.py").read_text()


def test_every_option_of_a_rule_is_explained() -> None:
    for name in [*plan.RULES, *COMMANDS.values()]:
        calls = [node for node in ast.walk(ast.parse(source(name))) if isinstance(node, ast.Call)]
        for call in calls:
            if isinstance(call.func, ast.Attribute) and call.func.attr == "add_argument":
                help_text = {k.arg for k in call.keywords}
                assert "help" in help_text, f"{name}: {ast.unparse(call.args[0])} has no help"


def test_the_tree_in_the_readme_is_true() -> None:
    (tree,) = re.findall(r"```text\n(config\.yaml.*?)```", README, re.S)
    package = ROOT / "src/cbtm_pipeline"
    names = re.findall(r"^  ([\w/. ]+?)(?:  |$)", tree, re.M)
    listed = {name for line in names for name in line.split()}
    modules = {path.name for path in package.glob("*.py")} - {"__init__.py", "__main__.py"}
    folders = {f"{path.parent.name}/" for path in package.glob("*/__init__.py")}
    assert listed == modules | folders


def test_modules_of_tests_have_names_of_their_own() -> None:
    """Two with one name, in two folders, cannot be collected by one process."""
    names = [path.name for path in (ROOT / "tests").rglob("test_*.py")]
    assert sorted(set(names)) == sorted(names)


def test_hosted_ci_runs_the_same_script() -> None:
    jobs = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text())["jobs"]
    assert [step["run"] for job in jobs.values() for step in job["steps"] if "run" in step] == [".ci/run"]


def test_versions_agree() -> None:
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert version == cbtm_pipeline.__version__
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"] == version
    released = re.findall(r"^## (\S+) \((\d{4}-\d\d-\d\d)\)$", (ROOT / "CHANGELOG.md").read_text(), re.M)
    assert released[0][0] == version
    assert released == sorted(released, key=lambda entry: entry[1], reverse=True)
