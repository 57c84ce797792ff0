"""Scenarios of any size and any name: refused with what is allowed, or they end; nothing is written elsewhere."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from annotated_types import Ge, Gt, Le, Lt
from pydantic import BaseModel

from mooncache.errors import MooncacheError, UsageError
from sim import config, report
from sim.compare import conclude
from sim.config import Scenario, load_scenario
from sim.costs import load_calibration
from sim.errors import ConfigError
from sim.models import Transformer
from sim.runs import Job, Plan, run_all, simulate
from sim.workload import build_workload

SHAPE = """\
name: small
workload: {kind: shape, layers: 2, ranks: 1, slices: 10, slice_bytes: 512B, requests: 2, arrival: {every: 1ms}}
prefill: {layer_time: 3ms}
replications: 1
"""
MODEL = """\
name: prompts
workload: {kind: model, tokens: 640, ranks: 1, requests: 2, arrival: {every: 1s}}
replications: 1
"""
SECTIONS: dict[str, type[BaseModel]] = {
    "workload": config.Shape, "prefill": config.Prefill, "engine": config.EngineShape, "nic": config.Nic,
    "decode": config.Decode, "reclaim": config.Reclaim, "": Scenario,
}  # fmt: skip
HUGE = (2**31, 10**12, 2**63 - 1, 2**63, 10**30)
OF_QUANTITIES = {
    "nic.rate": ("1bps", "9Tbps"), "nic.message_rate": ("1/s", "999G/s"), "nic.latency": ("0ns", "3600s"),
    "prefill.layer_time": ("0ns", "1ps", "86400s"), "prefill.flops": ("1M", "9000P"),
    "workload.arrival.every": ("0s", "86400s"), "workload.slice_bytes": ("1B", "64KiB", "8000TB"),
    "engine.slice_bytes": ("1B", "1GiB", "8000TB"), "decode.first_token": ("0s", "86400s"),
    "decode.token_time": ("0s", "86400s"), "reclaim.period": ("1ps", "86400s"),
}  # fmt: skip


def bounds(model: type[BaseModel], prefix: str) -> Iterator[tuple[str, float]]:
    """Every integer key with the largest value that it may have."""
    for name, field in model.model_fields.items():
        if field.annotation in (int, float):
            most = [m.le for m in field.metadata if isinstance(m, Le)]
            most += [m.lt - 1 for m in field.metadata if isinstance(m, Lt)]
            least = [m for m in field.metadata if isinstance(m, Ge | Gt)]
            quantity = any("validator" in type(m).__name__.lower() for m in field.metadata)
            if not quantity:
                assert most, f"{prefix}{name} has no upper limit"
                assert least, f"{prefix}{name} has no lower limit"
                yield f"{prefix}{name}", float(most[0])


BOUNDED = [
    bound for name, section in SECTIONS.items() for bound in bounds(section, f"{name}." if name else "")
] + [(f"workload.{name}", most) for name, most in bounds(config.Model, "")]  # fmt: skip


def load(folder: Path, text: str, *overrides: str) -> Scenario:
    (folder / "scenario.yaml").write_text(text)
    return load_scenario(folder / "scenario.yaml", overrides)


@pytest.mark.parametrize(("key", "most"), BOUNDED)
def test_every_number_has_an_upper_limit(tmp_path: Path, key: str, most: float) -> None:
    text = (
        MODEL if key.removeprefix("workload.") in config.Model.model_fields and key.startswith("workload.") else SHAPE
    )
    for value in (int(most) + 1, *HUGE):
        if value > most:
            with pytest.raises(ConfigError, match="expected a value less than"):
                load(tmp_path, text, f"{key}={value}")


def test_every_dimension_of_a_model_has_an_upper_limit() -> None:
    assert {key for key, _ in bounds(Transformer, "")} == Transformer.model_fields.keys() - {"name"}


EXTREME = [
    "workload.layers=1024", "workload.ranks=64", "prefill.instances=64", "workload.requests=2000",
    "workload.output_tokens=100000000", "engine.submit_threads=256", "engine.queue_depth=65536", "engine.chain=4096",
    "engine.poll_lot=4096", "engine.pool_slices=268435456", "reclaim.cache_slices=1048576", "reclaim.lot=268435456",
    "seed=9223372036854775807", "decode.pages=1", "decode.pages=999999999999999999999", "nic.signal=4096",
    "engine.pool_slices=1", *(f"{key}={value}" for key, values in OF_QUANTITIES.items() for value in values),
]  # fmt: skip


def ends_or_is_refused(folder: Path, text: str, *overrides: str) -> None:
    said = ""
    try:
        run = simulate(Job(load(folder, text, *overrides), "pool/bulk", 0))
    except MooncacheError as error:
        said = str(error)
    assert "expected" in said or (run.slices > 0 and (run.response >= 0).all())


@pytest.mark.parametrize("mode", ["exact", "fast"])
@pytest.mark.parametrize("extreme", EXTREME)
def test_an_extreme_scenario_is_refused_in_our_words_or_ends(tmp_path: Path, extreme: str, mode: str) -> None:
    ends_or_is_refused(tmp_path, SHAPE, extreme, f"mode={mode}")


@pytest.mark.parametrize(
    "extreme",
    [
        "workload.tokens=100000000", "workload.page=100000000", "workload.mean_run=1e8",
        "prefill={flops: 1M, efficiency: 1e-6}", "prefill.efficiency=1e-300",
        "workload.model={layers: 1024, parameters: 1e15, query_heads: 4096, kv_heads: 4096, head_dim: 65535}",
        "workload.model={layers: 1, parameters: 1e-300, query_heads: 1, kv_heads: 1, head_dim: 1}",
        "workload.model={layers: 1, parameters: 1, query_heads: 1, head_dim: 1, latent: 1048576, rope_dim: 65536}",
    ],
)  # fmt: skip
def test_an_extreme_model_is_refused_in_our_words_or_ends(tmp_path: Path, extreme: str) -> None:
    ends_or_is_refused(tmp_path, MODEL, extreme)


def test_more_slices_than_can_be_simulated_one_by_one_are_refused_but_not_in_fast_mode(tmp_path: Path) -> None:
    many = ["workload.slices=1000000", "workload.layers=1000", "workload.requests=11"]
    with pytest.raises(UsageError, match=r"up to 10,000,000,000 slices .* 11,000,000,000 of all requests; mode: fast"):
        build_workload(load(tmp_path, SHAPE, *many), 0)
    assert build_workload(load(tmp_path, SHAPE, *many, "mode=fast"), 0).total_slices == 11 * 10**9
    with pytest.raises(UsageError, match="of the first 4"):
        build_workload(load(tmp_path, SHAPE, *many, "mode=fast", "workload.ranks=3"), 0)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["prefill.instances=1024", "workload.ranks=2"], r"instances x ranks up to 1024, came 1024 x 2"),
        (["workload.requests=1000000", "workload.layers=101"], r"requests x layers x ranks up to 100000000"),
    ],
)
def test_what_is_too_much_together_is_refused_with_both_factors(
    tmp_path: Path, overrides: list[str], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        load(tmp_path, SHAPE, *overrides)


# ------------------------------------------------------------------------------ names and files
BAD_NAMES = [
    "..", "../x", "../../x", "/tmp/x", "a/b", "a\\b", ".", ".hidden", "", "a\nb", "a\0b", "\x7f", "x" * 101, "\u202e",
]  # fmt: skip
GOOD_NAMES = ["small", "a b", "TP4, layer-wise", "層", "🦭" * 50, "x" * 100, "~", "-rf", "con", "a..b"]


@pytest.mark.parametrize("name", BAD_NAMES)
def test_a_name_that_is_none_of_a_folder_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(ConfigError, match="name: expected"):
        load(tmp_path, SHAPE.replace("name: small", f"name: {_quoted(name)}"))


@pytest.mark.parametrize("name", GOOD_NAMES)
def test_results_are_written_to_a_folder_of_the_scenarios_name_and_nowhere_else(tmp_path: Path, name: str) -> None:
    text = SHAPE.replace("name: small", f"name: {_quoted(name)}") + "pairs: [pool/bulk]\n"
    asked = load(tmp_path, text)
    found = conclude(asked, list(run_all(Plan(asked))))
    folder = report.write(found, tmp_path / "results", {})
    assert folder.parent == tmp_path / "results"
    assert os.listdir(tmp_path / "results") == [folder.name]
    assert folder.name.startswith(name)


def _quoted(name: str) -> str:
    escaped = "".join(f"\\U{ord(c):08x}" for c in name)
    return f'"{escaped}"'


@pytest.mark.parametrize("content", [b"\xff\xfe", b"\x80{}", b"", b"[]", b'{"tables": 1e999}', b"{" * 100_000])
def test_a_file_that_is_no_calibration_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "calibration.json").write_bytes(content)
    with pytest.raises(ConfigError, match="expected a calibration file"):
        load_calibration(str(tmp_path / "calibration.json"))


@pytest.mark.parametrize("where", ["no\0such", "", ".", "x" * 5000])
def test_a_path_that_leads_nowhere_is_refused(where: str) -> None:
    with pytest.raises(ConfigError, match="expected a calibration file"):
        load_calibration(where)
    with pytest.raises(ConfigError, match="expected a readable file"):
        load_scenario(where)
