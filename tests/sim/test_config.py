"""Scenarios: what is read, and how everything else is refused."""

from __future__ import annotations

import contextlib
import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from mooncache.errors import UsageError
from sim import config
from sim.config import PAIRS, Scenario, load_scenario
from sim.errors import ConfigError, Problem
from sim.models import PRESETS

NAMES = [pair.replace("/", " + ") for pair in PAIRS]
CONFIGS = Path(__file__).parents[2] / "configs"

SHAPE = """\
name: small
workload:
  kind: shape
  layers: 2
  ranks: 1
  slices: 10
  slice_bytes: 512B
  requests: 3
  arrival: {every: 1ms}
prefill:
  layer_time: 3ms
"""
MODEL = """\
name: prompts
workload: {kind: model, tokens: 100, requests: 2, arrival: {every: 1s}}
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "scenario.yaml"


def load(file: Path, text: str, *overrides: str) -> Scenario:
    file.write_text(text)
    return load_scenario(file, overrides)


def refusal(file: Path, text: str, *overrides: str) -> str:
    """The error as printed, with the folder cut off."""
    with pytest.raises(ConfigError) as caught:
        load(file, text, *overrides)
    assert isinstance(caught.value, UsageError)
    assert caught.value.problems
    return str(caught.value).replace(f"{file.parent}/", "")


# What is read


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.name)
def test_shipped_scenarios_load_and_are_named_after_their_file(path: Path) -> None:
    assert load_scenario(path).name == path.stem


def test_defaults_are_the_documented_ones(file: Path) -> None:
    scenario = load(file, SHAPE)
    assert scenario.engine.slice_bytes == 65536
    assert scenario.nic.rate == 400 * 10**9
    assert scenario.nic.latency == 2 * 10**6
    assert (scenario.nic.rails, scenario.nic.signal, scenario.nic.gathers) == (1, 1, 1)
    assert scenario.reclaim.period == 10**9
    assert scenario.prefill.flops == 990 * 10**12
    assert scenario.workload.kind == "shape"
    assert scenario.workload.arrival.process == "poisson"


def test_all_pairs_are_seven_policies_on_two_stores(file: Path) -> None:
    scenario = load(file, SHAPE + "pairs: all")
    assert len(scenario.pairs) == 14
    assert (scenario.pairs[0], scenario.pairs[-1]) == ("heap/leak", "pool/bulk")
    assert scenario == load(file, SHAPE)


def test_pairs_are_kept_once_and_in_canonical_order(file: Path) -> None:
    scenario = load(file, SHAPE + "pairs: [pool + bulk, heap/inline, pool/bulk]")
    assert scenario.pairs == ("heap/inline", "pool/bulk")


def test_a_model_is_a_preset_or_its_dimensions(file: Path) -> None:
    inline = "{name: llama3-70b, layers: 80, parameters: 70.6e9, query_heads: 64, kv_heads: 8, head_dim: 128}"
    by_default, by_name, by_dimensions = (
        load(file, MODEL, *overrides).workload
        for overrides in ([], ["workload.model=llama3-70b"], [f"workload.model={inline}"])
    )
    assert by_default == by_name == by_dimensions


def test_trace_paths_are_relative_to_the_scenario_unless_absolute(file: Path) -> None:
    text = "name: t\nworkload: {kind: trace, path: traces/a.jsonl}"
    relative = load(file, text).workload
    absolute = load(file, text, "workload.path=/data/a.jsonl").workload
    assert isinstance(relative, config.Trace)
    assert isinstance(absolute, config.Trace)
    assert relative.path == str(file.parent / "traces" / "a.jsonl")
    assert absolute.path == "/data/a.jsonl"


def test_overrides_win_in_their_order_and_make_missing_sections(file: Path) -> None:
    scenario = load(file, SHAPE, "nic.rate=100Gbps", "nic.rate=200Gbps", "workload.slices=7", "seed=12")
    assert scenario.nic.rate == 200 * 10**9
    assert scenario.workload.kind == "shape"
    assert scenario.workload.slices == 7
    assert scenario.seed == 12


def test_scalars_are_those_of_yaml_1_2(file: Path) -> None:
    scenario = load(file, SHAPE + "engine: {pool_slices: 4_194_304}\n", "prefill.jitter=1e-3", "name=on")
    assert scenario.engine.pool_slices == 4_194_304
    assert scenario.prefill.jitter == 0.001
    assert scenario.name == "on"


def test_a_dumped_scenario_loads_again_as_the_same(file: Path) -> None:
    for text in (SHAPE, MODEL):
        scenario = load(file, text, "nic.latency=1.5us")
        assert load(file, scenario.model_dump_json()) == scenario
        assert load(file, yaml.safe_dump(scenario.model_dump(mode="json"))) == scenario


def test_scenarios_are_frozen_and_hashable(file: Path) -> None:
    scenario = load(file, SHAPE)
    assert len({scenario, load(file, SHAPE)}) == 1
    with pytest.raises(ValueError, match="frozen"):
        scenario.seed = 2  # type: ignore[misc]


# What is refused, and where it says it is


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ("sead: 1", "12: sead: expected a known key, came 'sead'; did you mean 'seed'?"),
        ("nic:\n  rat: 5Gbps", "13: nic.rat: expected a known key, came 'rat'; did you mean 'rate'?"),
        (
            "nic: {zz: 1}",
            "12: nic.zz: expected a known key, came 'zz'; known: rate, message_rate, latency, rails, signal, gathers",
        ),
        (
            "nic:\n  rate: 5",
            "13: nic.rate: expected a bit rate such as '400Gbps' (units: bps, Kbps, Mbps, Gbps, Tbps), came 5 (int)",
        ),
        (
            "reclaim: {period: 3 minutes}",
            "12: reclaim.period: expected a duration such as '90ns' (units: ps, ns, us, ms, s), came '3 minutes' (str)",
        ),
        ("nic: {rails: 0}", "12: nic.rails: expected a value greater than or equal to 1, came 0 (int)"),
        ("nic: {rails: 9}", "12: nic.rails: expected a value less than or equal to 8, came 9 (int)"),
        ("nic: {gathers: 17}", "12: nic.gathers: expected a value less than or equal to 16, came 17 (int)"),
        ("reclaim: {period: 0s}", "12: reclaim.period: expected a value greater than 0, came '0s' (str)"),
        ("seed: '4'", "12: seed: expected a valid integer, came '4' (str)"),
        ("seed: 1.0", "12: seed: expected a valid integer, came 1.0 (float)"),
        ("seed: true", "12: seed: expected a valid integer, came True (bool)"),
        ("seed: 010", "12: seed: expected a valid integer, came '010' (str)"),
        ("seed: 12:30", "12: seed: expected a valid integer, came '12:30' (str)"),
        ("seed: -1", "12: seed: expected a value greater than or equal to 0, came -1 (int)"),
        ("replications: 0", "12: replications: expected a value greater than 0, came 0 (int)"),
        ("mode: quick", "12: mode: expected 'exact' or 'fast', came 'quick' (str)"),
        ("engine: {arenas: on}", "12: engine.arenas: expected 'own' or 'shared', came 'on' (str)"),
        ("engine:", "12: engine: expected a mapping of keys, came nothing"),
        ("engine: [1]", "12: engine: expected a mapping of keys, came [1] (list)"),
        ("decode: {pages: 0}", "12: decode.pages: expected a value greater than 0, came 0 (int)"),
        ("pairs: []", "12: pairs: expected 'all' or a list of store + policy, came [] (list)"),
        ("pairs: some", "12: pairs: expected 'all' or a list of store + policy, came 'some' (str)"),
        (
            "pairs: [heap/inlin]",
            "12: pairs: expected store + policy, came 'heap/inlin' (str); did you mean 'heap + inline'?",
        ),
        ("pairs: [[1]]", f"12: pairs: expected store + policy, came [1] (list); known: {', '.join(NAMES)}"),
        ("seed: 1\nseed: 2", "13: seed: expected each key once, came 'seed' a second time"),
        ("seed: &x 1\nreplications: *x", "13: replications: expected a value written out, came a YAML alias"),
        ("engine: &x {a: *x}", "12: engine.a: expected a value written out, came a YAML alias"),
        ("seed: !!int z", "12: seed: expected a plain value, came 'z' as !!int"),
        (
            "seed: !!python/name:os.system ''",
            "12: seed: expected a plain value, came '' as !!python/name:os.system",
        ),
        ("? [a]\n: 1", "12: expected a plain key, came a list or mapping"),
        ("a: [", "12: expected YAML; its parser says: expected the node content, but found '<stream end>'"),
        ("---\na: 1", "12: expected YAML; its parser says: but found another document"),
    ],
)
def test_bad_lines_are_refused_with_file_line_key_expected_and_came(file: Path, lines: str, message: str) -> None:
    assert refusal(file, SHAPE + lines) == f"scenario.yaml:{message}"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("seed", "expected key.path=value, came 'seed' (str)"),
        ("=1", "expected key.path=value, came '=1' (str)"),
        ("nic..rate=1", "expected key.path=value, came 'nic..rate=1' (str)"),
        ("name.x=1", "name.x: expected a key inside a section, came 'small' (str) there"),
        ("nic.rate=1", "nic.rate: expected a bit rate such as"),
        ("nic={rate: 1}", "nic.rate: expected a bit rate such as"),
        ("nic.rate=", "nic.rate: expected a bit rate such as"),
        ("seed={", "expected YAML; its parser says:"),
        ("workload.kind=tracy", "workload.kind: expected shape, model or trace, came 'tracy' (str)"),
        ("workload={}", "workload.kind: expected shape, model or trace, came nothing"),
        (
            "workload.arrival.evry=1s",
            "workload.arrival.evry: expected a known key, came 'evry'; did you mean",
        ),
        ("workload.arrival.process=random", "workload.arrival.process: expected 'poisson' or 'fixed', came"),
        (
            "workload.slice_bytes=1MiB",
            "workload.slice_bytes: expected at most engine.slice_bytes, 64KiB, came 1MiB",
        ),
        ("workload.requests=1000001", "workload.requests: expected a value less than or equal to 1000000"),
        ("prefill={}", "prefill.layer_time: expected a duration, since a shape has no FLOPs"),
        ("prefill.efficiency=.nan", "prefill.efficiency: expected a valid number, came '.nan' (str)"),
        ("prefill.efficiency=1e999", "prefill.efficiency: expected a finite number, came inf (float)"),
    ],
)
def test_bad_overrides_are_refused_by_their_own_text(file: Path, override: str, message: str) -> None:
    assert refusal(file, SHAPE, override).startswith(f"--set {override}: {message}")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "workload.model=llama-70b",
            "workload.model: expected a model, came 'llama-70b' (str); did you mean 'llama",
        ),
        ("workload.model={headdim: 1}", "workload.model.layers: expected a value, came nothing"),
        ("workload.model=3", "workload.model: expected a mapping of keys, came 3 (int)"),
        ("workload.dtype=int8", "workload.dtype: expected 'bf16', 'fp16' or 'fp8', came 'int8' (str)"),
        ("workload.mean_run=0.5", "workload.mean_run: expected a value greater than or equal to 1, came 0.5"),
        ("workload.cached=1.5", "workload.cached: expected a value less than or equal to 1, came 1.5"),
        ("workload.tokens=0", "workload.tokens: expected a value greater than 0, came 0"),
    ],
)
def test_bad_models_are_refused(file: Path, override: str, message: str) -> None:
    assert refusal(file, MODEL, override).startswith(f"--set {override}: {message}")


def test_ranks_that_cannot_share_the_heads_are_refused_by_their_own_text(file: Path) -> None:
    message = refusal(file, MODEL, "workload.ranks=3")
    assert message == (
        "--set workload.ranks=3: workload.ranks: "
        "expected ranks that divide the 8 KV heads of llama3-70b, or a multiple of them, came 3"
    )


def test_a_misspelt_dimension_of_an_inline_model_is_recognised(file: Path) -> None:
    assert "workload.model.kvheads: expected a known key, came 'kvheads'; did you mean 'kv_heads'?" in refusal(
        file, MODEL, "workload.model={kvheads: 3}"
    )


def test_all_problems_are_reported_at_once(file: Path) -> None:
    assert refusal(file, SHAPE + "seed: x\nmode: x").splitlines() == [
        "scenario.yaml:12: seed: expected a valid integer, came 'x' (str)",
        "scenario.yaml:13: mode: expected 'exact' or 'fast', came 'x' (str)",
    ]


def test_a_missing_key_is_placed_at_its_section(file: Path) -> None:
    lines = [line for line in SHAPE.splitlines() if "slices" not in line]
    assert refusal(file, "\n".join(lines)) == "scenario.yaml:2: workload.slices: expected a value, came nothing"


@pytest.mark.parametrize("text", ["", "# nothing\n", "null"])
def test_an_empty_file_is_refused(file: Path, text: str) -> None:
    assert refusal(file, text) == "scenario.yaml:1: expected a mapping of keys, came nothing"


def test_a_list_an_unprintable_and_a_bottomless_file_are_refused(file: Path) -> None:
    assert "expected a mapping of keys, came [1] (list)" in refusal(file, "- 1")
    assert "unacceptable character" in refusal(file, "\0")
    assert "recursion" in refusal(file, "[" * 2_000)
    assert "expected a plain value" in refusal(file, SHAPE + "seed: " + "9" * 5_000)


def test_a_file_that_cannot_be_opened_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none\.yaml: expected a readable file, came No such file"):
        load_scenario(tmp_path / "none.yaml")
    with pytest.raises(ConfigError, match="expected a readable file, came Is a directory"):
        load_scenario(tmp_path)


def test_the_error_survives_the_way_from_a_worker_process(file: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        load(file, SHAPE, "seed=x")
    copy = pickle.loads(pickle.dumps(caught.value))
    assert str(copy) == str(caught.value)
    assert copy.problems == caught.value.problems


# Nothing else comes out, whatever goes in

PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.sampled_from(PAIRS),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


def every_key(value: Any, path: str = "") -> list[str]:
    inside = value.items() if isinstance(value, dict) else ()
    return [key for name, item in inside for key in (f"{path}{name}", *every_key(item, f"{path}{name}."))]


KEYS = every_key(yaml.safe_load(SHAPE)) + [f"workload.model.{name}" for name in PRESETS] + ["nic.rate", "pairs"]


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(key=st.sampled_from(KEYS), value=PLAIN, kind=st.sampled_from([SHAPE, MODEL]))
def test_any_value_anywhere_is_accepted_or_a_config_error(file: Path, key: str, value: Any, kind: str) -> None:
    problems: tuple[Problem, ...] = ()
    try:
        load(file, kind, f"{key}={json.dumps(value)}")
    except ConfigError as error:
        problems = error.problems
    assert all(problem.where and problem.message.startswith("expected ") for problem in problems)


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(junk=st.text(max_size=40))
@example("!!int ''")
@example("a: !!timestamp x")
@example("a: !!binary =")
def test_any_text_is_accepted_or_a_config_error(file: Path, junk: str) -> None:
    for text in (junk, SHAPE + junk):
        file.write_text(text, encoding="utf-8", errors="surrogatepass")
        with contextlib.suppress(ConfigError):
            load_scenario(file)
