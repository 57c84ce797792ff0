"""Scenarios: the requests, the engine and the NIC of a comparison. Read from YAML, strictly.

    workload   what is asked for: a plain shape, a model and its prompts, or a request trace
    prefill    when each layer's KV cache is ready         engine    how the engine is set up
    nic        how fast the wire takes slices              decode    how long pages stay taken
    reclaim    how the reclaim policies are set up         pairs     which stores and policies to compare

An unknown key, a number without its unit, a wrong type and a value out of range are each a `ConfigError` that
names the file, the line, the key, what was expected and what came. All models are frozen.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Sequence, Set
from pathlib import Path
from typing import Annotated, Literal, NamedTuple, cast

from pydantic import (
    BaseModel,
    BeforeValidator,
    Field,
    NonNegativeInt,
    PositiveInt,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic_core import ErrorDetails

from mooncache import limits
from mooncache.errors import UsageError
from mooncache.kernels.enums import Policy, Store
from sim import units
from sim.errors import ConfigError, Problem, came
from sim.models import PRESETS, DType, Transformer, preset, token_bytes
from sim.units import BitRate, Bytes, Duration, EventRate, FlopRate
from sim.yaml_source import Source, read_yaml

STORES = tuple(sorted(store.name.lower() for store in Store))
POLICIES = tuple(policy.name.lower() for policy in Policy)
PAIRS = tuple(f"{store}/{policy}" for store in STORES for policy in POLICIES)


def _did_you_mean(name: object, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(str(name), known, n=1)
    return f"did you mean {close[0]!r}?" if close else f"known: {', '.join(known)}"


def _preset(value: object) -> object:
    """Return a preset by its name; leave anything else for pydantic to read as a mapping of dimensions."""
    if not isinstance(value, str):
        return value
    found = preset(value)
    if found is None:
        raise UsageError(f"expected a model, came {came(value)}; {_did_you_mean(value, list(PRESETS))}")
    return found


# ------------------------------------------------------------------------------ how large a scenario may be
LAYERS = 1024
"""Eight times the layers of the deepest models published (126)."""

RANKS = 1024
"""Tensor parallelism over more than the largest NVLink domains (576) is nobody's."""

ENGINES = 1024
"""instances x ranks: each has an engine's state of some MiB, pools untouched."""

LAYER_TIMES = 100_000_000
"""requests x layers x ranks: events, and for each layer eight bytes of its time and as many of its stall, 1.6 GB."""

POOL_SLICES = 1 << 28
"""64 of the default pools: 10 GB of slots where all are used."""

TOKENS = 100_000_000
"""A hundred times the longest contexts on offer, in and out."""

THREADS = 256
"""Callers of one rank; each has a block and a cache of its own."""

REPLICATIONS = 1000
"""With five Student's t is 2.8, with a thousand 2.0: more only takes longer."""

NAME_LENGTH = 100
"""Characters of a scenario's name: with its hash, in any script, less than the 255 bytes of a folder's name."""

Requests = Annotated[int, Field(gt=0, le=1_000_000)]  # each is an object, and a process of the simulation
Layers = Annotated[int, Field(gt=0, le=LAYERS)]
Ranks = Annotated[int, Field(gt=0, le=RANKS)]
Instances = Annotated[int, Field(gt=0, le=ENGINES)]
Slices = Annotated[int, Field(gt=0, le=POOL_SLICES)]
CacheSlices = Annotated[int, Field(gt=0, le=1 << 20)]
Tokens = Annotated[int, BeforeValidator(units.parse_tokens), Field(gt=0, le=TOKENS)]
OutputTokens = Annotated[int, BeforeValidator(units.parse_tokens), Field(ge=0, le=TOKENS)]
Threads = Annotated[int, Field(gt=0, le=THREADS)]
Depth = Annotated[int, Field(gt=0, le=1 << 16)]  # as the engine's settings, and so the next
Lot = Annotated[int, Field(gt=0, le=1 << 12)]
SliceBytes = Annotated[Bytes, Field(le=1 << 30)]
Seed = Annotated[int, Field(ge=0, lt=1 << 63)]
Replications = Annotated[int, Field(gt=0, le=REPLICATIONS)]
Share = Annotated[float, Field(ge=0, le=1)]
PositiveDuration = Annotated[Duration, Field(gt=0)]
Preset = Annotated[Transformer, BeforeValidator(_preset)]


class _Section(BaseModel, extra="forbid", frozen=True, strict=True, allow_inf_nan=False):
    """One mapping of a scenario."""


class Arrival(_Section):
    """The times at which requests arrive."""

    process: Literal["poisson", "fixed"] = "poisson"  # independent users; fixed: to look at one request
    every: Duration  # mean time between arrivals; 0s: all at once


class Shape(_Section):
    """Slices stated outright: so many of such a size for each layer and rank."""

    kind: Literal["shape"]
    layers: Layers
    ranks: Ranks  # tensor parallelism; each rank has an engine of its own
    slices: Slices  # for each layer and rank
    slice_bytes: Bytes
    requests: Requests
    arrival: Arrival
    output_tokens: OutputTokens = 343  # mean of the Mooncake conversation trace


class _Cache(_Section):
    """The layout of a model's KV cache."""

    model: Preset = PRESETS["llama3-70b"]  # a preset's name, or a mapping with the fields of `Transformer`
    page: Tokens = 1  # tokens; 1 is where the slice counts of the incident come from
    ranks: Ranks = 4  # tensor parallelism; TP4, as in the incident
    dtype: DType = "bf16"  # what most deployments keep KV in
    mean_run: float = Field(default=1.0, ge=1, le=TOKENS)  # adjacent pages that merge into a slice; 1: fully scattered

    @model_validator(mode="after")
    def _heads_can_be_dealt_out(self) -> _Cache:
        try:
            token_bytes(self.model, self.ranks, self.dtype)
        except UsageError as error:
            raise ConfigError(Problem("", "workload.ranks", str(error))) from None
        return self


class Model(_Cache):
    """Prompts of one length, on a model."""

    kind: Literal["model"]
    tokens: Tokens  # prompt length
    cached: Share = 0.0  # of the tokens: not computed, but sent; 0: prompts have nothing in common
    requests: Requests
    arrival: Arrival
    output_tokens: OutputTokens = 343  # mean of the Mooncake conversation trace


class Trace(_Cache):
    """The requests of a trace file in the Mooncake JSONL format, on a model."""

    kind: Literal["trace"]
    path: str  # relative to the scenario's folder; once loaded, as this process can open it
    start: NonNegativeInt = 0  # first request taken
    limit: PositiveInt | None = None  # requests taken; null: to the end
    prefix_cache: Literal["none", "infinite"] = "none"  # infinite: prefixes seen before are not computed
    spread: Literal["auto", "never"] = "auto"  # auto: time stamps in buckets are spread inside them, by seed

    @field_validator("path")
    @classmethod
    def _beside_the_scenario(cls, path: str, info: ValidationInfo) -> str:
        return os.path.normpath(os.path.join((info.context or {}).get("folder", ""), path))


_KINDS: dict[str, type[BaseModel]] = {"shape": Shape, "model": Model, "trace": Trace}


class Prefill(_Section):
    """The speed at which prefill makes KV cache."""

    instances: Instances = 1  # groups of `ranks` accelerators that share the requests; 1 shows the effect
    layer_time: Duration | None = None  # compute time of a layer; null: estimated from FLOPs, needs a model
    flops: FlopRate = units.FLOP_RATE.parse("990T")  # an H100 SXM: 989 TFLOP/s of dense bf16 (NVIDIA)
    efficiency: float = Field(default=0.5, ge=1e-6, le=1)  # share reached; half is usual for prefill
    jitter: Share = 0.05  # coefficient of variation of a layer's time: GPU kernels are steady


class EngineShape(_Section):
    """The transfer engine of one rank."""

    submit_threads: Threads = 4  # threads that submit and close; SGLang has 4 transfer queues by default
    queue_depth: Depth = 512  # work requests in flight; upstream: 2 queue pairs of 256
    chain: Lot = 128  # work requests a post; the post list of perftest's best small-message rates
    poll_lot: Lot = 64  # completions a poll; as upstream
    slice_bytes: SliceBytes = units.BYTES.parse("64KiB")  # longest slice; as upstream
    pool_slices: Slices = 4_194_304  # two mean conversation requests at page 1 with nothing freed
    arenas: Literal["own", "shared"] = "own"  # malloc arena of a rank; shared: one for all, as in containers


class Nic(_Section):
    """The NIC of one rank, or each of its NICs where it has several rails."""

    rate: BitRate = units.BIT_RATE.parse("400Gbps")  # one NDR port, the usual NIC beside an H100
    message_rate: EventRate = units.EVENT_RATE.parse("200M/s")  # ConnectX-6: 215 M/s (NVIDIA), rounded down
    latency: Duration = units.DURATION.parse("2us")  # NDR in a cloud: below 2 us (Azure HBv4)
    rails: int = Field(default=1, ge=1, le=limits.NICS)  # NICs, each of this rate; slices are spread over them
    signal: int = Field(default=1, ge=1, le=4096)  # a completion every so many work requests; 1: upstream's way, and
    # how costs were measured: a completion that answers for several is priced as one, a little too cheap
    gathers: int = Field(default=1, ge=1, le=limits.SLICES_GATHERED)  # slices in one work request; 1: pages at the
    # target are scattered as well; more: they lie side by side, as in a pool that nobody has used yet


class Decode(_Section):
    """The machine that receives."""

    pages: PositiveInt | None = None  # page pool, counted in pages of all layers; null: never the bottleneck
    first_token: Duration = units.DURATION.parse("20ms")  # last layer arrived to first token: one decode step
    token_time: Duration = units.DURATION.parse("25ms")  # pages are held output tokens x this; 40 tokens/s


class Reclaim(_Section):
    """The settings of reclaim policies that have some."""

    cache_slices: CacheSlices = 4096  # thread_cache: its ring; as upstream
    period: PositiveDuration = units.DURATION.parse("1ms")  # deferred: from lot to lot; below a layer's time
    lot: Slices = 16_384  # deferred: slices freed in one go; 16 M/s, more than one worker completes


class Scenario(_Section):
    """The whole input of one comparison. Two equal scenarios give byte-identical results."""

    name: str = Field(min_length=1, max_length=NAME_LENGTH)  # of its folder of results, too
    description: str = ""
    workload: Annotated[Shape | Model | Trace, Field(discriminator="kind")]
    prefill: Prefill = Prefill()
    engine: EngineShape = EngineShape()
    nic: Nic = Nic()
    decode: Decode = Decode()
    reclaim: Reclaim = Reclaim()
    pairs: tuple[str, ...] = PAIRS  # "all", or a list such as [heap + inline, pool + bulk]; in PAIRS' order
    calibration: str = "shipped"  # or the path of a calibration file of your own
    seed: Seed = 1  # of the first replication
    replications: Replications | None = None  # 2 at least for an interval; null: as many as `precision` asks, 2 to 40
    precision: float = Field(default=0.1, gt=0, le=1)  # how far the interval of what a pair adds may reach to either
    # side, as a share of the pair's response time; 0.1: a tenth is seen by users, and takes a fifth of a minute
    mode: Literal["exact", "fast"] = "exact"  # fast: whole batches by closed form, for long traces

    @field_validator("name")
    @classmethod
    def _names_a_folder(cls, name: str) -> str:
        if not name.isprintable() or {"/", "\\"} & set(name) or name.startswith("."):
            raise UsageError(
                "expected printable characters without '/' and '\\', the first no '.', since results are written to a "
                f"folder of this name, came {came(name)}"
            )
        return name

    @field_validator("pairs", mode="before")
    @classmethod
    def _all_or_a_list(cls, pairs: object) -> tuple[str, ...]:
        if pairs == "all":
            return PAIRS
        if not isinstance(pairs, (list, tuple)) or not pairs:
            raise UsageError(f"expected 'all' or a list of store + policy, came {came(pairs)}")
        names = {name: pair for pair in PAIRS for name in (pair.replace("/", " + "), pair)}
        for pair in pairs:
            if not isinstance(pair, str) or pair not in names:
                raise UsageError(f"expected store + policy, came {came(pair)}; {_did_you_mean(pair, list(names)[::2])}")
        chosen = {names[pair] for pair in pairs}
        return tuple(pair for pair in PAIRS if pair in chosen)

    @model_validator(mode="after")
    def _is_of_a_size_that_ends(self) -> Scenario:
        workload, instances = self.workload, self.prefill.instances
        layers = workload.layers if isinstance(workload, Shape) else workload.model.layers
        if instances * workload.ranks > ENGINES:
            message = f"expected instances x ranks up to {ENGINES}, came {instances} x {workload.ranks}"
            raise ConfigError(Problem("", "prefill.instances" if instances > 1 else "workload.ranks", message))
        requests = 1 if isinstance(workload, Trace) else workload.requests
        if requests * layers * workload.ranks > LAYER_TIMES:
            message = f"expected requests x layers x ranks up to {LAYER_TIMES}, "
            message += f"came {requests} x {layers} x {workload.ranks}"
            raise ConfigError(Problem("", "workload.requests", message))
        return self

    @model_validator(mode="after")
    def _sections_agree(self) -> Scenario:
        if not isinstance(self.workload, Shape):
            return self
        if self.prefill.layer_time is None:
            message = "expected a duration, since a shape has no FLOPs to estimate one from, came nothing"
            raise ConfigError(Problem("", "prefill.layer_time", message))
        if self.workload.slice_bytes > self.engine.slice_bytes:
            limit, size = map(units.BYTES.spell, (self.engine.slice_bytes, self.workload.slice_bytes))
            message = f"expected at most engine.slice_bytes, {limit}, came {size}"
            raise ConfigError(Problem("", "workload.slice_bytes", message))
        return self


class Change(NamedTuple):
    """A change of a scenario by an option of its own, such as --model."""

    option: str  # as the user wrote it, for refusals: "--model llama-3.1-70b"
    key: str  # "workload.model"
    value: object


def load_scenario(path: str | Path, changes: Sequence[str | Change] = ()) -> Scenario:
    """Read a scenario from a YAML file.

    Args:
        changes: each a `Change`, or the text of a --set: "key.path=value", the value being YAML ("nic.rate=200Gbps",
            "pairs=[heap/inline]"). The last one wins. They are checked as if they stood in the file.
    Raises: ConfigError with every problem found.
    """
    try:
        text = Path(path).read_bytes()
    except OSError as error:
        problem = Problem(str(path), "", f"expected a readable file, came {error.strerror or error}")
        raise ConfigError(problem) from None
    except ValueError as error:  # a path that can be none
        raise ConfigError(Problem(repr(str(path)), "", f"expected a readable file, came {error}")) from None
    source = read_yaml(text, lambda line: f"{path}:{line}")
    for change in changes:
        _change(source, change)
    options = {change.option for change in changes if isinstance(change, Change)}
    try:
        return Scenario.model_validate(source.data, context={"folder": os.path.dirname(path)})
    except ValidationError as error:
        raise ConfigError(*(_problem(source, details, options) for details in error.errors())) from None


def _change(source: Source, change: str | Change) -> None:
    """Put the value of a change into the data, making the sections it needs."""
    if isinstance(change, Change):
        place, path, replacement = change.option, change.key, Source(change.value, {"": change.option})
    else:
        place = f"--set {change}"
        path, equals, text = change.partition("=")
        if not equals or not all(path.split(".")):
            raise ConfigError(Problem(place, "", f"expected key.path=value, came {came(change)}"))
        replacement = read_yaml(text, lambda line: place)
    *sections, last = path.split(".")
    section = source.data
    for name in sections:
        section = section.setdefault(name, {}) if isinstance(section, dict) else None
    if not isinstance(section, dict):
        raise ConfigError(Problem(place, path, f"expected a key inside a section, came {came(section)} there"))
    section[last] = replacement.data
    for key in [key for key in source.where if f"{key}.".startswith(f"{path}.")]:
        del source.where[key]
    source.where.update({f"{path}.{key}".rstrip("."): where for key, where in replacement.where.items()})


def _problem(source: Source, details: ErrorDetails, options: Set[str]) -> Problem:
    """Translate one of pydantic's findings into our words. Of an option the user knows the name, not the key."""
    keys, section = _locate([str(part) for part in details["loc"]])
    kind, value = details["type"], details["input"]
    if kind == "extra_forbidden":
        known = list(section.model_fields)
        message = f"expected a known key, came {keys[-1]!r}; {_did_you_mean(keys[-1], known)}"
    elif kind == "missing":
        message = "expected a value, came nothing"
    elif kind == "value_error":
        error = details["ctx"]["error"]
        message = str(error)
        if isinstance(error, ConfigError):  # two sections disagree: it says itself which key is meant
            keys, message = error.problems[0].key.split("."), error.problems[0].message
    elif kind.startswith("union_tag"):
        tag = value.get("kind") if isinstance(value, dict) else None
        keys, message = [*keys, "kind"], f"expected shape, model or trace, came {came(tag)}"
    elif kind.startswith("model"):
        message = f"expected a mapping of keys, came {came(value)}"
    else:
        wanted = details["msg"].removeprefix("Input should be ")
        article = "a value " if kind.startswith(("greater", "less")) else ""
        message = f"expected {article}{wanted}, came {came(value)}"
    places = (source.where.get(".".join(keys[:depth])) for depth in range(len(keys), -1, -1))
    where = next(place for place in places if place)
    if where in options:
        if kind == "extra_forbidden":
            message = f"expected a scenario whose workload has {keys[-1]}, came a {source.data['workload']['kind']}"
        return Problem(where, "", message)
    return Problem(where, ".".join(keys), message)


def _locate(names: list[str]) -> tuple[list[str], type[BaseModel]]:
    """Return the key path of pydantic's location, and the section that its last key is, or should be, in."""
    keys = names
    section: type[BaseModel] = Scenario
    if names[:1] == ["workload"] and len(names) > 1:  # pydantic puts the kind in between
        section, names = _KINDS[names[1]], names[2:]
        keys = ["workload", *names]
    for name in names[:-1]:
        section = cast("type[BaseModel]", section.model_fields[name].annotation)
    return keys, section
