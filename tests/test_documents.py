"""What the documents say is true: their code runs, the files and targets they name exist."""

import re
import subprocess
from pathlib import Path

import pytest

from mooncache.kernels.layout import Policy
from mooncache.opening import PROVIDERS

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def test_the_readme_example_runs() -> None:
    example, of_rdma = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    names: dict[str, object] = {}
    exec(compile(example, "README.md", "exec"), names)
    compile(of_rdma, "README.md", "exec")  # runs with such NICs only
    for engine in (names["prefill"], names["decode"]):
        engine.close()  # type: ignore[attr-defined]


def table_of(section: str) -> list[str]:
    """What the first column of a section's table names in code."""
    text = README.split(f"## {section}\n")[1].split("\n## ")[0]
    return re.findall(r"`(\w+)`", "".join(re.findall(r"^\| (`.*?) \|", text, re.MULTILINE)))


def test_the_readme_lists_all_policies() -> None:
    assert table_of("The comparison") == [policy.name.lower() for policy in Policy]


def test_the_readme_lists_all_wires() -> None:
    assert {*table_of("Wires"), "auto"} == set(PROVIDERS)


@pytest.mark.parametrize("document", ["README.md", "ARCHITECTURE.md", "CHANGELOG.md", "SECURITY.md"])
def test_paths_that_documents_name_exist(document: str) -> None:
    text = (ROOT / document).read_text()
    named = re.findall(r"`((?:mooncache|sim|configs|notebooks|tests|kernels)/[\w/.]*)`", text)
    missing = [name for name in named if not ((ROOT / name).exists() or (ROOT / "mooncache" / name).exists())]
    assert not missing


def test_what_the_threat_model_says_has_tests() -> None:
    """Each line that says what somebody cannot do names some, and all that are named exist."""
    there = {
        name
        for path in ROOT.glob("tests/**/test_*.py")
        for name in re.findall(r"^def (test_\w+)", path.read_text(), re.M)
    }
    model = (ROOT / "SECURITY.md").read_text()
    assert set(re.findall(r"`(test_\w+)`", model)) <= there
    cannot = [line for line in model.splitlines() if line.startswith("| cannot |")]
    assert len(cannot) > 20
    assert [line for line in cannot if "`test_" not in line] == []


def test_make_targets_that_the_readme_names_exist() -> None:
    known = subprocess.run(["make", "-s", "help"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for target in set(re.findall(r"`?make (\w+)`?", README)):
        assert target in known
