"""What the documents say is true: their code runs, the files and targets they name exist."""

import re
import subprocess
from pathlib import Path

import pytest

import mooncache
from mooncache.errors import REASON, UsageError
from mooncache.kernels.enums import Policy
from mooncache.kernels.settings import Settings
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


def test_the_readme_says_what_to_do_at_each_status_and_exception() -> None:
    said = table_of("When something fails")
    ours = {name for name, each in vars(mooncache).items() if isinstance(each, type) and issubclass(each, Exception)}
    known = {status.name for status in REASON} | ours | {"TimeoutError"}
    assert set(said) <= known
    assert known - set(said) == {"MooncacheError", "TransferFailed"}  # the base, and what has the statuses


def number_of(text: str) -> int:
    """4,096 or 2^31 or 64 KiB."""
    digits, _, unit = text.partition(" ")
    base, _, power = digits.replace(",", "").partition("^")
    return int(base) ** int(power or 1) << {"": 0, "KiB": 10, "MiB": 20, "GiB": 30}[unit]


def test_the_limits_of_the_readme_are_those_of_the_settings() -> None:
    text = README.split("## Limits and sizing\n")[1].split("\n## ")[0]
    rows = re.findall(r"^\| (`.*?) \| (.*?) \| (.*?) \|", text, re.MULTILINE)
    assert len(rows) > 8
    for settings, defaults, most in rows:
        names = re.findall(r"`(\w+)`", settings)
        spelled = [re.findall(r"[\d^]+(?:,\d{3})*(?: [KMG]iB)?", cell) for cell in (defaults, most)]
        for name, default, limit in zip(names, *spelled, strict=True):
            assert getattr(Settings(), name) == number_of(default), name
            Settings(**{name: number_of(limit)})
            with pytest.raises(UsageError):
                Settings(**{name: number_of(limit) + 1})


def test_what_the_readme_measured_is_in_the_list_with_date_and_commit() -> None:
    text = README.split("## Measured\n")[1].split("\n## ")[0]
    figures = re.findall(r"^\| ([^|]*) \| ([^|]*\d[^|]*) \| `", text, re.MULTILINE)
    measured = (ROOT / "docs/measured.md").read_text()
    assert len(figures) == 5
    for what, figure in figures:
        assert re.search(
            re.escape(f"| {what} | {figure} |") + r" `[^`]*` \| \d{4}-\d\d-\d\d \| [0-9a-f]{7} \|", measured
        )


@pytest.mark.parametrize(
    "document", ["README.md", "ARCHITECTURE.md", "CHANGELOG.md", "SECURITY.md", "docs/measured.md"]
)
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
