"""What a benchmark measured, as a typed record: one dataclass per kind of benchmark, with the JSON's fields.

Producers build these, and `to_json` makes the `extra_info` of pytest-benchmark's file of them; readers get them back
from `read_file`, which refuses what is not as the records say. The JSON schema of the file is made of them too
(`python -m dflash.measuring.result`). Names and formulas are in dflash/metrics.py. None means not measured.
"""

import dataclasses
import json
from pathlib import Path
from typing import Annotated, Any, Literal, TypeAlias, TypeVar

from pydantic import Field, TypeAdapter, ValidationError
from pydantic.json_schema import GenerateJsonSchema

from dflash.config import UserError
from dflash.decoding.audit import Divergence
from dflash.decoding.parity import AtLeastOne, Count, Fraction, NotNegative, ParityResult
from dflash.host.disk import read_object
from dflash.host.provenance import FLAGS, SCHEMA_VERSION
from dflash.metrics import finite

Positive: TypeAlias = Annotated[float, Field(ge=1e-30, le=1e30)]
Interval: TypeAlias = tuple[Positive, Positive]
Sha256: TypeAlias = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
MillisecondsBySize: TypeAlias = dict[AtLeastOne, Positive]
T = TypeVar("T")


class ResultError(UserError, ValueError):
    """A benchmark file that does not match the records: where, what it should be, and what it is."""


# ---- what identifies a measurement, and what is accepted


@dataclasses.dataclass(frozen=True, kw_only=True)
class Origin:
    """What was measured: the case, the device, and the inputs by hash. `name` is its pytest id.

    `sampling` None is greedy decoding. `prompts_sha256` is of the token ids; besides the messages, the two facts after
    it decided them.
    """

    case: str
    name: str = ""
    platform: str | None = None
    device_kind: str | None = None
    device_count: AtLeastOne | None = None
    cpu_count: AtLeastOne | None = None
    cpu_model: str | None = None
    mesh: dict[str, AtLeastOne] | None = None
    jax: str | None = None
    kernels: str | None = None
    target: str | None = None
    target_sha256: Sha256 | None = None
    draft: str | None = None
    draft_sha256: Sha256 | None = None
    draft_vocab_size: AtLeastOne | None = None
    prompts: str | None = None
    prompts_sha256: Sha256 | None = None
    chat_template_args: dict[str, Any] | None = None
    template_date: str | None = None
    protocol: str | None = None
    cache_sha256: Sha256 | None = None
    seeds: dict[str, int] | None = None
    run_name: str | None = None
    sampling: dict[str, float] | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Accepted:
    """What the target accepted, as `metrics.acceptance` counts it; None if nothing was drafted, or if it is unknown."""

    num_drafts: Count | None
    num_draft_tokens: Count | None
    num_accepted_tokens: Count | None
    accept_len_mean: NotNegative | None
    acceptance_length: Annotated[float, Field(ge=1)] | None
    accept_rate: Fraction | None
    accept_histogram: list[Count] | None
    accept_rate_per_pos: list[Fraction] | None
    acceptance_length_ci95: Interval | None = None
    acceptance_length_by_prompt: Annotated[float, Field(ge=1)] | None = None
    acceptance_length_by_prompt_ci95: Interval | None = None


# ---- a decoding case


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenPlace:
    """A token of a prompt's answer, both from 0."""

    prompt: Count
    token: Count


@dataclasses.dataclass(frozen=True, kw_only=True)
class BlockSizeAdvice:
    """What the cost model predicts for a block size; `timed` is False if its steps were interpolated."""

    block_size: Annotated[int, Field(ge=2)]
    acceptance_length: float
    break_even_acceptance_length: float
    predicted_speedup_x: float
    timed: bool


@dataclasses.dataclass(frozen=True, kw_only=True)
class VerifyRatio:
    """T_verify(`tokens`) / T_1, the steps timed alone; without an interval where too few rounds were taken."""

    tokens: AtLeastOne
    ratio: Positive
    ratio_ci95: Interval | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Advice:
    """The block size that the cost model advises; 1 is plain greedy decoding."""

    best_block_size: AtLeastOne
    best_predicted_speedup_x: Positive
    by_block_size: list[BlockSizeAdvice]


Status: TypeAlias = Literal[
    "ok", "invalid", "too-noisy", "quick", "slow-baseline", "unexplained", "no-baseline", "no-draft"
]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Workload(Origin):
    """What a decoding case is. `scripted` tokens of every block are right by script; None: the draft's own proposals.

    `block_size` is None where nothing was drafted, or a server does not say.
    """

    mode: str
    block_size: Annotated[int, Field(ge=2)] | None
    batch_size: AtLeastOne
    prompt_len: Count
    max_new_tokens: AtLeastOne
    dtype: str
    proposer: str | None
    scripted: Count | None
    workload_version: int | None = None
    baseline: str | None = None

    @property
    def is_own(self) -> bool:
        """Whether a draft proposed by itself; scripted cases show a machine, not a draft."""
        return self.scripted is None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Failed(Workload):
    """A decoding case that could not be measured, and why: one sentence; no traceback, no folder."""

    status: Literal["failed"]
    error: Annotated[str, Field(min_length=1)]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Decode(Workload, Accepted):
    """A decoding case beside greedy decoding. `lossless` None: nothing was compared.

    `no_draft` and `acceptance_unknown` say why a server has no draft or reports no acceptance.
    `between_runs`: the standard deviation of the logarithm of speed-ups between fresh processes, over `runs` of them.
    """

    num_prompts: AtLeastOne
    prompt_len_mean: NotNegative | None = None
    rounds: Count
    num_output_tokens: Count
    tok_s_total: Positive | None
    baseline_tok_s_total: Positive | None
    ttft_ms: NotNegative | None
    tpot_ms: NotNegative | None
    baseline_tpot_ms: NotNegative | None = None
    compile_s: NotNegative | None
    speedup_x: Positive | None
    speedup_x_ci95: Interval | None
    speedup_x_timing_ci95: Interval | None = None
    between_runs: Annotated[float, Field(ge=0, le=10)] | None = None
    runs: AtLeastOne = 1
    spread: float | None = None
    drift: float | None = None
    outliers: Count | None = None
    too_noisy: str | None = None
    block_ratio: Positive | None = None
    predicted_block_ratio: Positive | None = None
    predicted_speedup_x: Positive | None = None
    residual: float | None = None
    verify_ratio: Positive | None = None
    verify_ratio_ci95: Interval | None = None
    cheapest_verify: VerifyRatio | None = None
    draft_ratio: Positive | None = None
    break_even_acceptance_length: Positive | None = None
    time_shares: dict[str, float] | None = None
    advice: Advice | None = None
    experts: AtLeastOne | None = None
    experts_awake_step: float | None = None
    experts_awake_step_expected: float | None = None
    experts_awake_verify: float | None = None
    experts_awake_verify_expected: float | None = None
    lossless: bool | None
    first_divergence: TokenPlace | None
    divergences: list[Divergence] | None = None
    near_ties: Count | None = None
    status: Status
    resumed: bool = False
    no_draft: str | None = None
    acceptance_unknown: str | None = None
    target_repeats_itself: bool = True

    @property
    def counts(self) -> bool:
        """Whether its speed-up may be compared and published: measured, tokens proven, not too noisy.

        An unexplained one counts: it is what was measured, whatever the cost model says.
        """
        return bool(self.lossless) and self.speedup_x is not None and self.status in ("ok", "unexplained")


@dataclasses.dataclass(frozen=True, kw_only=True)
class BrokenConvention:
    """What is accepted here with a convention broken, and how often chance makes that differ so from the server's."""

    accept_len_mean: NotNegative
    accept_rate_per_pos: list[Fraction]
    chance: Fraction


@dataclasses.dataclass(frozen=True, kw_only=True)
class OwnAcceptance(Accepted):
    """Our own acceptance of a served draft, decoded here in float32 on the same prompts, and the server's beside it.

    `chance`: how often the two would differ so if both ran the draft alike. Beyond that there is a `gap`, `broken` has
    what each broken convention gives here, and `explained_by` those that give what the server reports, nearest first.
    """

    chance: Fraction
    gap: bool
    broken: dict[str, BrokenConvention] = dataclasses.field(default_factory=dict)
    explained_by: list[str] = dataclasses.field(default_factory=list)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Served(Decode):
    """A server's case, over HTTP. `server`: kind and version; `over_budget` answers were too long and were cut.

    `alarm` names an acceptance that is next to nothing; `own_unknown` says why the server's was not held to ours.
    """

    baseline_ttft_ms: NotNegative | None = None
    server: str | None = None
    server_commands: list[str] = dataclasses.field(default_factory=list)
    interleaved: bool = False
    compared: str | None = None
    over_budget: Count = 0
    prompts_equal: Count | None = None
    alarm: Literal["hardly-accepted"] | None = None
    own: OwnAcceptance | None = None
    own_unknown: str | None = None


# ---- the other benchmarks


@dataclasses.dataclass(frozen=True, kw_only=True)
class Step(Origin):
    """T_1, T_verify(S) and T_draft(S) by S, and the memory floor of a step of S tokens, in milliseconds.

    `estimate_ms` is what the TPU's compiler makes of the steps of the target, on a TPU. `product_ms` is one product of
    the output head with one column, as a step computes it (`plain`), and with seven columns of zeros beside it.
    """

    step_ms: Positive
    verify_ms: MillisecondsBySize
    draft_ms: MillisecondsBySize
    floor_ms: MillisecondsBySize
    estimate_ms: MillisecondsBySize = dataclasses.field(default_factory=dict)
    product_ms: dict[Literal["plain", "padded"], Positive] = dataclasses.field(default_factory=dict)
    bandwidth_gb_s: Positive
    context: Count
    batch_size: AtLeastOne
    dtype: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Category(Accepted):
    """Acceptance over the prompts of one category."""

    num_prompts: AtLeastOne


@dataclasses.dataclass(frozen=True, kw_only=True)
class Acceptance(Origin, Accepted):
    """Live acceptance by category of prompts, and over all of them."""

    block_size: Annotated[int, Field(ge=2)]
    max_new_tokens: AtLeastOne
    lossless: bool
    by_category: dict[str, Category]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Bucket:
    """Blocks whose context starts at the same position."""

    n: Count
    accept_len_mean: NotNegative
    accept_len_p50: NotNegative
    accept_len_p90: NotNegative | None = None
    tok_acc_mean: Fraction | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Offline(Origin, Accepted):
    """Acceptance at the anchors of a teacher cache; `live_*` at those that live decoding would visit."""

    rows: Literal["held_out", "train", "all"]
    block_size: Annotated[int, Field(ge=2)]
    num_samples: Count
    accept_len_p50: NotNegative
    accept_len_p90: NotNegative
    accept_len_p99: NotNegative
    accept_rate_tokens: Fraction
    token_acc_mean: Fraction
    token_acc_p50: Fraction
    token_acc_p90: Fraction
    by_ctx_pos_start: dict[int, Bucket]
    live_num_samples: Count | None = None
    live_accept_len_mean: NotNegative | None = None
    live_acceptance_length: Annotated[float, Field(ge=1)] | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Training(Origin):
    """A training step beside the machine's rate of matrix products, and what reading and writing a cache take."""

    dtype: str
    step_s: Positive
    draft_tokens_per_s: Positive
    gflop_s: Positive
    matmul_gflop_s: Positive
    matmul_fraction: Positive
    read_s: NotNegative
    cache_write_gb_s: Positive
    disk_write_gb_s: Positive


@dataclasses.dataclass(frozen=True, kw_only=True)
class Peer(Origin):
    """Ours beside another implementation's: how many times as fast, and both sides' figures."""

    faster_x: Positive
    faster_x_ci95: Interval | None
    torch_step_ms: Positive | None = None
    torch_verify_ms: Positive | None = None
    step_ms: Positive | None = None
    tok_s_total: Positive | None = None
    reference_tok_s_total: Positive | None = None


Result: TypeAlias = Decode | Served | Step | Acceptance | Offline | Training | Peer
# By the group of pytest-benchmark that a kind is written under.
KINDS: dict[str, type[Result]] = {
    "decode": Decode,
    "serving": Served,
    "step": Step,
    "acceptance": Acceptance,
    "evaluate": Offline,
    "training": Training,
    "peers": Peer,
}


# ---- what the file says of the run


Verdict: TypeAlias = Literal["pass", "fail", "no-baseline", "invalid"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class CaseVerdict:
    """A case's verdict against the baselines, and the sentence that says why; empty for a pass."""

    case: str
    verdict: Verdict
    sentence: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class GateResult:
    """Every case that was compared with a baseline, and whether that fails the run."""

    failed: bool
    cases: Annotated[list[CaseVerdict], Field(min_length=1)]


@dataclasses.dataclass(frozen=True, kw_only=True)
class AuditResult(Origin):
    """An audit of decoding on a device (dflash/decoding/audit.py)."""

    dtype: str
    verdict: Literal["lossless", "lossless up to near ties", "defect"]
    tokens: Count
    near_ties: Count
    defects: list[str]
    parity: ParityResult
    divergences: dict[str, list[Divergence]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Git:
    """The commit of the checkout, and whether files that decide the figures differ from it."""

    commit: Annotated[str, Field(pattern="^[0-9a-f]{40,64}$")] | None
    dirty: bool


@dataclasses.dataclass(frozen=True, kw_only=True)
class Inputs:
    """What was read: names, and hashes of the contents; a list of them where cases differ."""

    target: str | list[str] | None = None
    target_sha256: Sha256 | list[Sha256] | None = None
    draft: str | list[str] | None = None
    draft_sha256: Sha256 | list[Sha256] | None = None
    prompts: str | list[str] | None = None
    prompts_sha256: Sha256 | list[Sha256] | None = None
    chat_template_args: dict[str, Any] | list[dict[str, Any]] | None = None
    template_date: str | list[str] | None = None
    cache_sha256: Sha256 | list[Sha256] | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Provenance:
    """Where a file comes from (dflash/host/provenance.py). In `device` and `read` a list holds what differs by case.

    `flags` are an allow-list, never the environment. `gate` None: nothing was held to a baseline. `failed` are cases
    that could not be measured; benchmarks holds those that were. `failed_tests` are pytest ids.
    """

    schema_version: Literal[1]
    git: Git | None
    versions: dict[str, str]
    device: dict[str, Any]
    read: Inputs
    seeds: dict[str, int] | None
    flags: dict[Annotated[str, Field(pattern=f"^({'|'.join(FLAGS)})$")], str]
    command: Annotated[list[str], Field(min_length=1)]
    compile_cache: Literal["off", "cold", "warm", "unknown"]
    gate: GateResult | None = None
    audits: list[AuditResult] = dataclasses.field(default_factory=list)
    failed: list[Failed] = dataclasses.field(default_factory=list)
    failed_tests: list[str] = dataclasses.field(default_factory=list)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Timing:
    """Of a benchmark's rounds, in seconds, as pytest-benchmark has them."""

    median: NotNegative
    rounds: Count
    data: list[NotNegative]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Benchmark:
    """An entry of pytest-benchmark; its group says which record `extra_info` is. Other groups are not read."""

    group: str | None
    name: str
    fullname: str
    extra_info: dict[str, Any]
    stats: Timing


@dataclasses.dataclass(frozen=True, kw_only=True)
class BenchmarkFile:
    """What pytest-benchmark writes, with `dflash`. `version` is pytest-benchmark's."""

    datetime: str
    version: str
    machine_info: dict[str, Any]
    commit_info: dict[str, Any]
    benchmarks: list[Benchmark]
    dflash: Provenance


@dataclasses.dataclass(kw_only=True)
class Results:
    """What a run measured, in order; `failed` are cases that could not be, `failed_tests` names of tests.

    `gate` is what the baselines say of the cases, None where nothing was held to one.
    """

    measured: list[Result] = dataclasses.field(default_factory=list)
    failed: list[Failed] = dataclasses.field(default_factory=list)
    audits: list[AuditResult] = dataclasses.field(default_factory=list)
    gate: GateResult | None = None
    failed_tests: list[str] = dataclasses.field(default_factory=list)

    def of(self, kind: type[T]) -> list[T]:
        """The results of a kind."""
        return [r for r in self.measured if isinstance(r, kind)]

    @property
    def decodes(self) -> list[Decode]:
        """Decoding cases, served ones among them."""
        return self.of(Decode)

    def checks(self) -> dict[str, Any]:
        """What the file says of them under `dflash`, as JSON."""
        return {
            "gate": self.gate and to_json(self.gate),
            "audits": [to_json(audit) for audit in self.audits],
            "failed": [to_json(case) for case in self.failed],
            "failed_tests": self.failed_tests,
        }


@dataclasses.dataclass(kw_only=True)
class ResultFile(Results):
    """The results of a benchmark file, and what it says of itself."""

    path: Path
    when: str
    machine: dict[str, Any]
    provenance: Provenance

    @property
    def short_when(self) -> str:
        """Day and minute, UTC."""
        return self.when[:16].replace("T", " ")


# ---- to JSON, from JSON, and what JSON may be


def to_json(record: Any) -> dict[str, Any]:
    """The record as JSON: null for NaN and infinity. Optional fields without a value are left out."""
    optional = {f.name: f.default for f in dataclasses.fields(record)}
    value = {name: value for name, value in dataclasses.asdict(record).items() if value != optional[name]}
    return dict(finite(value))


def from_json(raw: Any, kind: type[T]) -> T:
    """The record of this kind. Raises ResultError with what is wrong and where: the first ten faults."""
    try:
        # Strict, and therefore via JSON: only there a list may be a tuple, and a name a number.
        return TypeAdapter(kind).validate_json(json.dumps(finite(raw)), strict=True)
    except ValidationError as error:
        faults = [f"{'.'.join(map(str, e['loc'])) or 'it'}: {e['msg']}" for e in error.errors(include_input=False)]
        more = f" and {len(faults) - 10} more" if len(faults) > 10 else ""
        raise ResultError("; ".join(faults[:10]) + more) from None


def read_file(path: Path) -> ResultFile:
    """Reads what `--benchmark-json` wrote. Raises ResultError for anything else."""
    remedy = "name a file of --benchmark-json, as `pytest bench` of this project writes it"
    raw = read_object(path, ResultError, remedy)
    block = raw.get("dflash")
    version = block.get("schema_version") if isinstance(block, dict) else None
    if isinstance(version, bool) or version != SCHEMA_VERSION:
        raise ResultError(
            f"{path} must be of dflash.schema_version {SCHEMA_VERSION}, got {str(version)[:20]}: {remedy}"
        )
    try:
        file = from_json(raw, BenchmarkFile)
        measured = [_result(place, benchmark) for place, benchmark in enumerate(file.benchmarks)]
    except ResultError as error:
        raise ResultError(f"{path} is damaged ({error}): {remedy}") from None
    results = [r for r in measured if r is not None]
    if not results and not file.dflash.failed:
        raise ResultError(f"{path} holds nothing that `pytest bench` of this project measures: {remedy}")
    origin = file.dflash
    return ResultFile(
        path=path,
        when=file.datetime,
        machine=file.machine_info,
        provenance=origin,
        measured=results,
        failed=origin.failed,
        audits=origin.audits,
        gate=origin.gate,
        failed_tests=origin.failed_tests,
    )


def _result(place: int, benchmark: Benchmark) -> Result | None:
    """The record of an entry; None if another project's benchmark wrote it."""
    if benchmark.group not in KINDS:
        return None
    try:
        return from_json(benchmark.extra_info | {"name": benchmark.fullname}, KINDS[benchmark.group])
    except ResultError as error:
        raise ResultError(f"benchmarks.{place}.extra_info: {error}") from None


class _Untitled(GenerateJsonSchema):
    """A title that repeats the field's name says nothing."""

    def field_title_should_be_set(self, schema: Any) -> bool:  # noqa: ARG002
        return False


def schema() -> dict[str, Any]:
    """The JSON schema of the file (report/results.schema.json)."""
    kinds = (BenchmarkFile, *KINDS.values())
    references, definitions = TypeAdapter.json_schemas(
        [(kind.__name__, "validation", TypeAdapter(kind)) for kind in kinds],
        ref_template="#/$defs/{model}",
        schema_generator=_Untitled,
    )
    definitions["$defs"]["Provenance"]["properties"]["flags"]["additionalProperties"] = False
    definitions["$defs"]["Benchmark"]["allOf"] = [
        {
            "if": {"properties": {"group": {"const": group}}},
            "then": {"properties": {"extra_info": references[kind.__name__, "validation"]}},
        }
        for group, kind in KINDS.items()
    ]
    some = {"minItems": 1}
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "A benchmark file of dflash",
        "description": "Made of the records in dflash/measuring/result.py.",
        **references["BenchmarkFile", "validation"],
        # Empty only where every case failed.
        "anyOf": [
            {"properties": {"benchmarks": some}},
            {"properties": {"dflash": {"required": ["failed"], "properties": {"failed": some}}}},
        ],
        **definitions,
    }


if __name__ == "__main__":
    print(json.dumps(schema(), indent=1))
