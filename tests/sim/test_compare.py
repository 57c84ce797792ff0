"""The main job, by its command: what it prints, what it writes, what it refuses."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import yaml
from typer.testing import CliRunner

from mooncache.cli import app
from sim import compare, report
from sim.compare import conclude
from sim.config import PAIRS, Scenario, load_scenario
from sim.costs import digest, load_calibration
from sim.runs import Job, Plan, run_all, simulate
from tests.helpers import environment

ROOT = Path(__file__).parents[2]
SHIPPED = ROOT / "configs" / "tp4_layerwise.yaml"
SMALL: dict[str, Any] = {
    "name": "small",
    "description": "Three requests",
    "workload": {
        "kind": "shape", "layers": 3, "ranks": 2, "slices": 1500, "slice_bytes": "512B", "requests": 3,
        "arrival": {"process": "poisson", "every": "2ms"},
    },
    "prefill": {"layer_time": "100us"},
    "replications": 2,
}  # fmt: skip
TOP = {"scenario", "seed", "calibration", "slices_per_second", "policies", "verdict"}
EACH = {
    "store", "policy", "added_ms_mean", "added_ms_ci95", "stall_us_p50", "stall_us_p99", "worker_free_share",
    "close_us_mean", "pool_high_water_slices", "leaked_slices",
}  # fmt: skip


class Answer(NamedTuple):
    status: int
    out: str
    err: str
    results: Path

    @property
    def object(self) -> dict[str, Any]:
        """What --json printed."""
        assert self.status == 0, self.err
        found: dict[str, Any] = json.loads(self.out)
        return found

    @property
    def folder(self) -> Path:
        (folder,) = self.results.iterdir()
        return folder

    def pair(self, name: str) -> dict[str, Any]:
        return next(p for p in self.object["policies"] if f"{p['store']}/{p['policy']}" == name)


def write(path: Path, content: dict[str, Any]) -> Path:
    path.write_text(yaml.safe_dump(content))
    return path


def ask(scenario: Path, results: Path, *options: str) -> Answer:
    """`mooncache compare`, in this process."""
    arguments = ["compare", str(scenario), "--results", str(results), "--processes", "1", *options]
    result = CliRunner().invoke(app, arguments)
    return Answer(result.exit_code, result.stdout, result.stderr, results)


def ask_elsewhere(scenario: Path, results: Path, *options: str, hash_seed: str = "0") -> Answer:
    """`mooncache compare`, in a process of its own."""
    script = "from mooncache.cli import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", script, "compare", str(scenario), "--results", str(results), *options],
        env=environment(PYTHONHASHSEED=hash_seed),
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    return Answer(done.returncode, done.stdout, done.stderr, results)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Answer:
    """The small scenario under all pairs."""
    folder = tmp_path_factory.mktemp("small")
    return ask(write(folder / "small.yaml", SMALL), folder / "results", "--json")


@pytest.fixture
def file(tmp_path: Path) -> Callable[..., Path]:
    """Writes the small scenario with some keys changed."""

    def make(**sections: Any) -> Path:
        merged = {
            **SMALL,
            **{
                key: {**SMALL.get(key, {}), **value} if isinstance(value, dict) else value
                for key, value in sections.items()
            },
        }
        return write(tmp_path / "scenario.yaml", merged)

    return make


# ------------------------------------------------------------------------------ what is printed
def test_json_is_one_object_with_every_promised_key(small: Answer) -> None:
    found = small.object
    assert set(found) >= TOP
    assert found["scenario"] == "small"
    assert found["seed"] == 1
    assert found["slices_per_second"] > 0
    assert found["slices"] == 14 * 2 * 3 * 3 * 2 * 1500
    assert [f"{p['store']}/{p['policy']}" for p in found["policies"]] == list(PAIRS)
    for policy in found["policies"]:
        assert set(policy) >= EACH
        assert all(value is not None for value in policy.values() if value != policy["response_p_value"])
        assert 0 <= policy["worker_free_share"] <= 1
        assert 0 < policy["stall_us_p50"] <= policy["stall_us_p99"]
        assert policy["close_us_mean"] > 0
        assert policy["pool_high_water_slices"] >= 1500
    assert small.err == ""


def test_the_report_names_its_calibration(small: Answer) -> None:
    shipped = load_calibration("shipped")
    found = small.object["calibration"]
    assert (found["name"], found["digest"], found["measured"]) == (shipped.name, digest(shipped), shipped.measured)
    assert found["machine"] == shipped.machine.model_dump()
    assert any(shipped.name in note for note in small.object["notes"])


def test_leak_on_the_pool_is_the_zero_of_added_and_only_leak_leaks(small: Answer) -> None:
    for store in ("heap", "pool"):
        leak = small.pair(f"{store}/leak")
        assert leak["added_ms_mean"] == leak["leak_ms_mean"]
        assert leak["leaked_slices"] == 3 * 3 * 2 * 1500
        assert leak["pool_high_water_slices"] == 3 * 3 * 1536  # of one rank, in whole chunks
        assert leak["worker_free_share"] == 0
    assert small.pair("pool/leak")["added_ms_mean"] == small.pair("pool/leak")["added_ms_ci95"] == 0
    assert small.pair("heap/leak")["added_ms_mean"] > 0.1  # fresh memory for each object
    for policy in small.object["policies"]:
        assert policy["leak_ms_mean"] == small.pair(f"{policy['store']}/leak")["added_ms_mean"]
        assert policy["policy"] == "leak" or policy["leaked_slices"] == 0


def test_only_policies_that_free_in_the_worker_have_a_share_of_it(small: Answer) -> None:
    share = {f"{p['store']}/{p['policy']}": p["worker_free_share"] for p in small.object["policies"]}
    assert share["heap/inline"] > share["pool/inline"] > 0
    assert share["heap/epoch"] > share["pool/epoch"] >= 0
    assert all(value == 0 for pair, value in share.items() if not pair.endswith(("inline", "epoch")))


def test_added_is_the_paired_difference_of_the_same_requests(tmp_path: Path, file: Callable[..., Path]) -> None:
    asked = load_scenario(file(pairs=["heap/inline", "pool/bulk"], replications=3))
    runs = list(run_all(Plan(asked)))
    assert [(run.job.pair, run.job.replication) for run in runs] == [
        (pair, replication)
        for replication in range(3)
        for pair in ("heap/leak", "heap/inline", "pool/leak", "pool/bulk")
    ]
    found = conclude(asked, runs)
    assert [p.policy for p in found.policies] == ["inline", "bulk"]
    by = {(run.job.pair, run.job.replication): run for run in runs}
    differences = [(by["heap/inline", r].response - by["pool/leak", r].response).mean() / 1e9 for r in range(3)]
    assert found.policies[0].added_ms_mean == pytest.approx(np.mean(differences), rel=1e-12)
    half = 4.302652729749464 * np.std(differences, ddof=1) / np.sqrt(3)  # Student's t, 2 degrees of freedom
    assert found.policies[0].added_ms_ci95 == pytest.approx(half, rel=1e-9)


def test_without_json_it_prints_a_table_the_notes_and_the_verdict(tmp_path: Path, file: Callable[..., Path]) -> None:
    answer = ask(file(pairs=["heap/inline", "heap/on_close", "pool/bulk"]), tmp_path / "results")
    assert answer.status == 0
    for text in ("Three requests", "heap + inline", "heap + on_close", "pool + bulk", "Choose", "one by one"):
        assert text in answer.out
    assert "heap + leak" not in answer.out  # simulated, since it is the zero, but not asked for


# ------------------------------------------------------------------------------ what is written
def test_the_run_folder_holds_result_summary_chart_and_manifest(small: Answer) -> None:
    assert sorted(path.name for path in small.folder.iterdir()) == [
        "chart.png", "manifest.json", "result.json", "summary.md",
    ]  # fmt: skip
    result = json.loads((small.folder / "result.json").read_text())
    printed = small.object
    manifest = json.loads((small.folder / "manifest.json").read_text())
    assert manifest["slices_per_second"] == printed.pop("slices_per_second")
    assert result == printed
    chart = (small.folder / "chart.png").read_bytes()
    assert chart.startswith(b"\x89PNG\r\n\x1a\n")
    assert len(chart) > 10_000
    summary = (small.folder / "summary.md").read_text()
    assert printed["verdict"] in summary
    for pair in PAIRS:
        assert f"| {pair.replace('/', ' + ')} |" in summary


def test_the_same_question_has_the_same_bytes_in_any_process(tmp_path: Path, file: Callable[..., Path]) -> None:
    scenario = file()
    one = ask_elsewhere(scenario, tmp_path / "one", "--processes", "1", "--json", hash_seed="1")
    two = ask_elsewhere(scenario, tmp_path / "two", "--processes", "2", "--json", hash_seed="12345")
    assert one.status == two.status == 0, one.err + two.err
    assert one.folder.name == two.folder.name
    for name in ("result.json", "summary.md"):
        assert (one.folder / name).read_bytes() == (two.folder / name).read_bytes()


def test_the_same_question_has_the_same_folder_and_another_has_another(
    tmp_path: Path, file: Callable[..., Path]
) -> None:
    pairs = "pairs=[pool/bulk]"
    for options in ((), (), ("--seed", "2"), ("--replications", "3"), ("--set", "nic.rate=100Gbps")):
        assert ask(file(), tmp_path / "results", "--set", pairs, *options).status == 0
    assert len(list((tmp_path / "results").iterdir())) == 4


# ------------------------------------------------------------------------------ options
def test_set_changes_a_key(tmp_path: Path, file: Callable[..., Path]) -> None:
    answer = ask(file(), tmp_path / "results", "--json", "--set", "workload.slices=300", "--set", "pairs=[pool/leak]")
    (policy,) = answer.object["policies"]
    assert policy["leaked_slices"] == 3 * 3 * 2 * 300


def test_seed_moves_the_first_replication_and_each_next_one_by_one(tmp_path: Path, file: Callable[..., Path]) -> None:
    options = ("--json", "--set", "pairs=[heap/inline]", "--replications", "1", "--seed")
    means = [ask(file(), tmp_path / seed, *options, seed).pair("heap/inline")["response_ms_mean"] for seed in "123"]
    assert len(set(means)) == 3
    asked = load_scenario(file(), ["replications=2", "seed=2", "pairs=[heap/inline]"])
    both = [r.response.mean() / 1e9 for r in run_all(Plan(asked)) if r.job.pair == "heap/inline"]
    assert both == means[1:]


def test_one_replication_has_no_interval(tmp_path: Path, file: Callable[..., Path]) -> None:
    answer = ask(file(), tmp_path / "results", "--json", "--replications", "1")
    for policy in answer.object["policies"]:
        assert policy["added_ms_ci95"] is None
        assert policy["response_p_value"] is None
    assert (answer.folder / "chart.png").stat().st_size > 10_000


def test_fast_mode_says_how_far_it_is_from_exact_mode(tmp_path: Path, file: Callable[..., Path]) -> None:
    answer = ask(file(), tmp_path / "results", "--json", "--set", "mode=fast", "--set", "pairs=[pool/bulk]")
    assert answer.object["mode"] == "fast"
    (note,) = (note for note in answer.object["notes"] if note.startswith("fast mode"))
    assert "mean response time differs from the exact mode by 0." in note


TRACE = [{"timestamp": 100 * i, "input_length": 500 + 900 * i, "output_length": 5, "hash_ids": [0]} for i in range(6)]
SMALL_MODEL = {"kind": "trace", "path": "absent.jsonl", "model": "llama3-8b", "page": 16, "ranks": 2}


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    path = tmp_path / "trace.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in TRACE))
    return path


def test_trace_replays_a_file(tmp_path: Path, trace: Path) -> None:
    scenario = write(tmp_path / "t.yaml", {"name": "t", "workload": SMALL_MODEL, "pairs": ["pool/bulk"]})
    answer = ask(scenario, tmp_path / "results", "--json", "--trace", str(trace))
    asked = load_scenario(scenario, [f"workload.path={trace}"])
    per_pair = compare.build_workload(asked, 1).total_slices
    assert answer.object["slices"] == per_pair * sum(p["replications"] for p in answer.object["policies"]) * 2 > 0


# ------------------------------------------------------------------------------ what is refused
def refused(answer: Answer) -> str:
    """One line on stderr, status 2, nothing else, nothing written."""
    assert answer.status == 2, answer.out + answer.err
    assert answer.out == ""
    (line,) = answer.err.splitlines()
    assert line.startswith("mooncache: error: ")
    assert not answer.results.exists()
    return line


def calibration_without(table: str) -> str:
    content = load_calibration("shipped").model_dump()
    del content["tables"][table]
    return json.dumps(content)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"calibration": "/no/such/file.json"}, ["/no/such/file.json", "mooncache calibrate"]),
        ({"nics": {}}, ["nics", "did you mean 'nic'"]),
        ({"nic": {"rate": 400}}, ["nic.rate", "a bit rate such as '400Gbps'"]),
        ({"engine": {"arenas": "shared"}, "workload": {"ranks": 8}}, ["allocate", "4 threads", "came 8"]),
        ({"workload": {"slices": 5_000_000}}, ["engine.pool_slices", "5000000"]),
        ({"decode": {"pages": 10}}, ["decode.pages", "750"]),
    ],
    ids=[
        "no calibration",
        "unknown key",
        "no unit",
        "arenas beyond the table",
        "layer beyond the pool",
        "prompt beyond",
    ],
)
def test_what_cannot_be_simulated_is_refused_in_one_line(
    tmp_path: Path, file: Callable[..., Path], changes: dict[str, Any], expected: list[str]
) -> None:
    line = refused(ask(file(**changes), tmp_path / "results", "--json"))
    for text in expected:
        assert text in line


@pytest.mark.parametrize("table", ["wake", "free_contended"])
def test_a_calibration_that_lacks_a_table_is_refused(tmp_path: Path, file: Callable[..., Path], table: str) -> None:
    path = tmp_path / "c.json"
    path.write_text(calibration_without(table))
    line = refused(ask(file(calibration=str(path)), tmp_path / "results", "--json"))
    assert str(path) in line
    assert table in line
    assert "mooncache calibrate" in line


@pytest.mark.parametrize(
    "content", ["", "{}", "[1]", '{"format": 1, "tables": {}}', "not json", '{"format": 2}'],
)  # fmt: skip
def test_a_file_that_is_no_calibration_is_refused(tmp_path: Path, file: Callable[..., Path], content: str) -> None:
    path = tmp_path / "c.json"
    path.write_text(content)
    assert str(path) in refused(ask(file(calibration=str(path)), tmp_path / "results", "--json"))


def test_trace_on_a_scenario_of_another_kind_is_refused(tmp_path: Path, file: Callable[..., Path], trace: Path) -> None:
    line = refused(ask(file(), tmp_path / "results", "--trace", str(trace)))
    assert "workload.kind" in line
    assert "trace" in line


def test_a_malformed_trace_line_is_refused_by_number_and_field(tmp_path: Path, trace: Path) -> None:
    trace.write_text(
        trace.read_text() + '{"timestamp": 700, "input_length": "many", "output_length": 1, "hash_ids": []}\n'
    )
    scenario = write(tmp_path / "t.yaml", {"name": "t", "workload": SMALL_MODEL, "pairs": ["pool/bulk"]})
    line = refused(ask(scenario, tmp_path / "results", "--trace", str(trace)))
    assert "trace.jsonl:7" in line
    assert "input_length" in line


def test_a_refusal_by_a_simulation_in_another_process_is_one_line_too(
    tmp_path: Path, file: Callable[..., Path]
) -> None:
    scenario = file(engine={"arenas": "shared"}, workload={"ranks": 8})
    refused(ask_elsewhere(scenario, tmp_path / "results", "--json", "--processes", "2"))


# ------------------------------------------------------------------------------ the shipped scenario
@pytest.fixture(scope="module")
def shipped() -> compare.Comparison:
    """Every layer, rank and slice of it, but one replication of the pairs that the incident is about."""
    pairs = "pairs=[heap/leak, heap/inline, heap/on_close, pool/leak, pool/inline, pool/bulk]"
    asked = load_scenario(SHIPPED, [pairs, "replications=1"])
    return conclude(asked, list(run_all(Plan(asked))))


def test_the_shipped_scenario_is_the_one_of_the_incident() -> None:
    asked = load_scenario(SHIPPED)
    assert (asked.workload.kind, asked.workload.ranks, asked.pairs, asked.mode) == ("shape", 4, PAIRS, "exact")
    assert asked.calibration == "shipped"


def test_the_shipped_scenario_shows_the_incident(shipped: compare.Comparison) -> None:
    added = {f"{p.store}/{p.policy}": p.added_ms_mean for p in shipped.policies}
    assert added["heap/inline"] > 100
    assert added["pool/bulk"] < added["heap/inline"] / 20
    assert added["pool/inline"] < added["heap/inline"] / 20


def test_the_verdict_names_the_best_the_worst_and_the_mechanism(shipped: compare.Comparison) -> None:
    assert shipped.verdict.startswith("Choose pool + ")
    assert "heap + inline adds" in shipped.verdict
    assert "of the worker's time" in shipped.verdict
    assert "transfers fall behind" in shipped.verdict
    inline = next(p for p in shipped.policies if (p.store, p.policy) == ("heap", "inline"))
    assert inline.worker_free_share > 0.5
    assert f"{inline.worker_free_share:.0%}" in shipped.verdict


# ------------------------------------------------------------------------------ verdicts
def verdict_of(*pairs: str, **sections: Any) -> str:
    asked = Scenario.model_validate({**SMALL, "pairs": list(pairs), **sections})
    return conclude(asked, list(run_all(Plan(asked)))).verdict


def test_where_nothing_matters_the_verdict_says_so() -> None:
    assert "no other placement that was compared adds 1 ms more" in verdict_of("pool/inline", "pool/bulk")
    assert verdict_of("heap/leak", "pool/leak").startswith("Only leaking engines were compared")
    assert verdict_of("pool/bulk").startswith("Choose pool + bulk")


LARGE = {**SMALL["workload"], "slices": 20_000, "layers": 20, "ranks": 1}


@pytest.mark.parametrize(
    ("pair", "sections", "cause"),
    [
        ("heap/inline", {"prefill": {"layer_time": "1ms"}}, "busy for 4.5 ms, and the next layer is computed in"),
        ("heap/inline", {"prefill": {"layer_time": "9ms"}}, "the worker frees slices for 4.3 ms of each layer"),
        ("heap/inline", {"prefill": {"layer_time": "9ms"}, "nic": {"rate": "5Gbps"}}, "the worker frees slices"),
        ("heap/deferred", {"prefill": {"layer_time": "9ms"}}, "making the slices of a layer takes the caller"),
        ("heap/on_close", {"prefill": {"layer_time": "1.4ms"}, "engine": {"submit_threads": 1}},
         "to free them at close, and layers wait for the one thread"),
    ],
    ids=["worker behind", "worker keeps up", "wire behind", "caller makes", "caller frees"],
)  # fmt: skip
def test_the_verdict_says_why_and_says_that_transfers_fall_behind_only_where_they_do(
    pair: str, sections: dict[str, Any], cause: str
) -> None:
    asked = Scenario.model_validate({**SMALL, "workload": LARGE, "pairs": [pair, "pool/bulk"], **sections})
    found = conclude(asked, list(run_all(Plan(asked))))
    assert found.verdict.startswith("Choose pool + bulk: it adds ")
    assert cause in found.verdict
    behind = found.stall_ms_by_layer[pair][-1] - found.stall_ms_by_layer["pool/bulk"][-1]
    assert ("fall behind" in found.verdict) == (behind > 20)  # ms
    assert ("the wire is at the limit" in " ".join(found.warnings)) == ("nic" in sections)


def test_what_is_saturated_or_runs_out_is_warned_of() -> None:
    hurried = {"workload": LARGE, "prefill": {"layer_time": "1ms"}, "engine": {"pool_slices": 85_000}}
    asked = Scenario.model_validate({**SMALL, **hurried, "pairs": ["heap/leak", "heap/inline", "pool/bulk"]})
    leaks, pool, worker = conclude(asked, list(run_all(Plan(asked)))).warnings
    assert leaks.startswith("heap + leak used up the 85,000 slices of engine.pool_slices")
    assert pool == "engine.pool_slices, 85,000, is about to run out, or has, under heap + inline (95%)"
    assert worker.startswith("the worker is at the limit: of the time that compute leaves, heap + inline takes 4")
    idle = Scenario.model_validate({**SMALL, "pairs": ["pool/bulk"], "prefill": {"layer_time": "9ms"}})
    assert conclude(idle, list(run_all(Plan(idle)))).warnings == ()


def test_the_table_fits_into_eighty_columns_without_losing_a_digit(tmp_path: Path, file: Callable[..., Path]) -> None:
    answer = ask(file(workload=LARGE), tmp_path / "results", "--replications", "5")
    assert "…" not in answer.out
    written = [line for line in answer.out.splitlines() if not line.startswith("Written: ")]
    assert max(map(len, written)) <= 80
    verdict = written[0]
    assert verdict.startswith("Choose ")


def test_the_title_says_what_is_simulated_whatever_set_has_changed(tmp_path: Path, file: Callable[..., Path]) -> None:
    changes = ("--set", "workload.slices=777", "--set", "nic.rate=100Gbps", "--set", "pairs=[pool + bulk]")
    words = " ".join(ask(file(), tmp_path / "results", *changes).out.split())
    assert "Three requests: 3 requests x 3 layers x 2 ranks, 777 slices of 512 B a layer and rank" in words
    assert "100Gbps" in words


def test_a_chart_of_one_pair_can_be_drawn(tmp_path: Path) -> None:
    asked = Scenario.model_validate({**SMALL, "pairs": ["pool/bulk"], "replications": 1})
    found = conclude(asked, list(run_all(Plan(asked))))
    folder = report.write(found, tmp_path / "results", {"seconds": 0})
    assert (folder / "chart.png").stat().st_size > 1000
    assert folder.name == found.run_name


def test_a_job_gives_the_same_run_again(file: Callable[..., Path]) -> None:
    job = Job(load_scenario(file()), "heap/thread_cache", 1)
    one, two = simulate(job), simulate(job)
    assert one.figures == two.figures
    np.testing.assert_array_equal(one.response, two.response)
    np.testing.assert_array_equal(one.stall, two.stall)
