"""First contact: scenarios by name, a deployment in a few words, and what is refused before any work."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from mooncache.cli import app
from mooncache.errors import UsageError
from sim import commands, shipped
from sim.brief import shared_out
from sim.config import Change, Model, Scenario, load_scenario
from sim.models import PRESETS, preset

INCIDENT = shipped.folder() / "tp4_layerwise.yaml"


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[Scenario]:
    """What is compared by the commands of a test, which end there."""
    found: list[Scenario] = []
    monkeypatch.setattr(commands, "_answer", lambda scenario, *_: found.append(scenario))
    return found


def run(*arguments: str) -> str:
    """Run the command; returns what it refuses, or nothing."""
    result = CliRunner().invoke(app, [*arguments])
    assert result.exit_code == (2 if result.stderr else 0), result.output
    return result.stderr


# ------------------------------------------------------------------------------ scenarios by name
def test_every_scenario_that_is_shipped_can_be_named() -> None:
    assert shipped.names() == ["conversation_trace", "model_8k", "tp4_layerwise"]
    for name in shipped.names():
        assert load_scenario(shipped.find(name)).name == name


def test_a_name_a_file_and_the_demo_are_one_scenario(asked: list[Scenario]) -> None:
    for arguments in (["compare", "tp4_layerwise"], ["compare", str(INCIDENT)], ["demo"]):
        assert run(*arguments) == ""
    assert asked[0] == asked[1] == asked[2] == load_scenario(INCIDENT)


def test_a_file_of_that_name_without_a_suffix_comes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model_8k").touch()
    assert shipped.find("model_8k") == Path("model_8k")


def test_a_name_that_is_none_is_refused_with_the_one_that_was_meant() -> None:
    assert "did you mean 'tp4_layerwise'?" in run("compare", "tp4_layerwice")
    assert "known: conversation_trace, model_8k, tp4_layerwise" in run("compare", "zebra")
    assert "--model" in run("compare")


# ------------------------------------------------------------------------------ a deployment in a few words
def test_a_deployment_in_a_few_words(asked: list[Scenario]) -> None:
    words = ["--model", "llama-3.1-70b", "--tp", "8", "--prompt", "32k", "--page", "16", "--nics", "4x400gbps"]
    assert run("compare", *words, "--set", "nic.latency=5us") == ""
    (scenario,) = asked
    assert isinstance(scenario.workload, Model)
    assert scenario.name == "llama-3.1-70b"
    assert (scenario.workload.model, scenario.workload.ranks) == (PRESETS["llama3-70b"], 8)
    assert (scenario.workload.tokens, scenario.workload.page) == (32768, 16)
    assert (scenario.nic.rate, scenario.nic.rails, scenario.nic.latency) == (200 * 10**9, 1, 5 * 10**6)


def test_words_beside_a_scenario_change_it(asked: list[Scenario]) -> None:
    assert run("compare", "tp4_layerwise", "--nics", "8x200Gbps", "--set", "nic.rate=100Gbps") == ""
    assert run("compare", "model_8k", "--model", "meta-llama/Llama-3.1-8B-Instruct", "--tp", "2") == ""
    incident, prompts = asked
    assert (incident.name, incident.nic.rails, incident.nic.rate) == ("tp4_layerwise", 2, 100 * 10**9)  # --set wins
    assert isinstance(prompts.workload, Model)
    assert (prompts.name, prompts.workload.model.name, prompts.workload.ranks) == ("model_8k", "llama3-8b", 2)


@pytest.mark.parametrize(
    ("nics", "ranks", "rails", "rate"),
    [("4x400Gbps", 4, 1, "400Gbps"), ("8 x 400Gbps", 4, 2, "400Gbps"), ("400Gbps", 4, 1, "100Gbps"),
     ("2x100gbps", 8, 1, "25Gbps"), ("1x400Gbps", 1, 1, "400Gbps")],
)  # fmt: skip
def test_nics_of_a_machine_are_shared_out_over_its_ranks(nics: str, ranks: int, rails: int, rate: str) -> None:
    said = f"--nics {nics}"
    assert shared_out(nics, ranks) == [Change(said, "nic.rails", rails), Change(said, "nic.rate", rate)]


@pytest.mark.parametrize(
    ("nics", "ranks", "reason"),
    [("3x400Gbps", 4, "share out evenly over 4 ranks, came 3"), ("1x1bps", 3, "a rate that 3 ranks can share"),
     ("400", 4, "expected a bit rate such as"), ("0x400Gbps", 4, "a bit rate"), ("", 4, "a bit rate")],
)  # fmt: skip
def test_nics_that_cannot_be_shared_out_are_refused(nics: str, ranks: int, reason: str) -> None:
    with pytest.raises(UsageError, match=reason):
        shared_out(nics, ranks)


@pytest.mark.parametrize(
    ("written", "beside", "reason"),
    [
        ("--model llama-3.1-7b", "", "expected a model, came 'llama-3.1-7b'"),
        ("--tp 3", "--model llama-3.1-70b", "expected ranks that divide the 8 KV heads"),
        ("--tp 100001", "--model llama-3.1-70b", "expected"),
        ("--prompt 12z", "--model llama-3.1-70b", "expected a valid integer, came '12z'"),
        ("--page 200000000", "--model llama-3.1-70b", "expected a value less than or equal to"),
        ("--nics 4x400furlongs", "--model llama-3.1-70b --tp 4", "expected a bit rate such as"),
        ("--nics 3x400Gbps", "--model llama-3.1-70b --tp 4", "expected NICs that share out evenly over 4 ranks"),
        ("--seed 99999999999999999999", "model_8k", "expected a value less than"),
        ("--replications 1001", "model_8k", "expected a value less than or equal to 1000"),
        ("--prompt 8k", "tp4_layerwise", "expected a scenario whose workload has tokens, came a shape"),
        ("--model llama-3.1-70b", "tp4_layerwise", "expected a scenario whose workload has model, came a shape"),
        ("--set workload.page=0", "model_8k", "workload.page: expected a value greater than 0"),
    ],
)
def test_a_refusal_names_the_option_as_it_was_written(written: str, beside: str, reason: str) -> None:
    refusal = run("compare", *beside.split(), *written.split(" ", 1))
    assert refusal.startswith(f"mooncache: error: {written}: {reason}")
    assert refusal.count("--") == refusal.count("\n") == 1


@pytest.mark.parametrize(
    ("name", "meant"),
    [("llama3-70b", "llama3-70b"), ("llama-3.1-70b", "llama3-70b"), ("Meta-Llama-3-8B-Instruct", "llama3-8b"),
     ("meta-llama/Llama-3.3-70B-Instruct", "llama3-70b"), ("llama3.1-8b", "llama3-8b"),
     ("Qwen/Qwen2.5-72B-Instruct", "qwen2.5-72b"), ("Qwen/Qwen3-235B-A22B", "qwen3-235b"),
     ("Qwen/Qwen3-235B-A22B-Instruct-2507", "qwen3-235b"), ("deepseek-ai/DeepSeek-R1-0528", "deepseek-v3"),
     ("moonshotai/Kimi-K2-Instruct", "kimi-k2")],
)  # fmt: skip
def test_models_are_known_by_the_names_they_are_published_under(name: str, meant: str) -> None:
    assert preset(name) == PRESETS[meant]


@pytest.mark.parametrize("name", ["llama-3.2-3b", "llama-3.1-405b", "meta-llama/", "", "gpt-oss-120b", "llama-4-8b"])
def test_models_of_other_dimensions_are_not_taken_for_known_ones(name: str) -> None:
    assert preset(name) is None


# ------------------------------------------------------------------------------ refused before the work
@pytest.mark.parametrize("place", ["file", "file/below", "/proc/none/of/it"])
def test_results_that_cannot_be_written_are_refused_before_the_work(
    place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(commands, "run_all", None)  # whoever gets so far fails
    refusal = run("compare", "tp4_layerwise", "--results", place)
    assert refusal.startswith(f"mooncache: error: --results {place}: expected a folder that can be written to")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_help_has_examples_that_are_understood(asked: list[Scenario], tmp_path: Path) -> None:
    assert commands.compare.__doc__ is not None
    examples: list[list[str]] = [
        line.split()[1:] for line in commands.compare.__doc__.splitlines() if line.startswith("      mooncache ")
    ]
    assert len(examples) == 5
    for example in examples[:4]:
        assert run(*example) == ""
    assert [scenario.name for scenario in asked] == [
        "tp4_layerwise", "tp4_layerwise", "llama-3.1-70b", "conversation_trace",
    ]  # fmt: skip


def test_scenarios_in_json_load_again(asked: list[Scenario], tmp_path: Path) -> None:
    """What a few words came to can be kept as a file."""
    run("compare", "--model", "deepseek-r1", "--prompt", "8k")
    content: dict[str, Any] = json.loads(asked[0].model_dump_json())
    (tmp_path / "kept.yaml").write_text(json.dumps(content))
    assert load_scenario(tmp_path / "kept.yaml") == asked[0]
