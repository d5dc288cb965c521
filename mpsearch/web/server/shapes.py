"""What may be sent and what is answered, as the OpenAPI document says it. Nothing else is taken."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

#: Rows of a page.
MOST_ROWS = 1000
_PRINTABLE = r"^[^\x00-\x1f\x7f-\x9f]+$"

Name = Annotated[str, Field(min_length=1, max_length=200, pattern=_PRINTABLE, examples=["tiny-llama"])]
BudgetText = Annotated[str, Field(min_length=1, max_length=200, examples=["weights <= 4.25 bits"])]
FormatText = Annotated[str, Field(min_length=1, max_length=100, examples=["int4-g64"])]
Pattern = Annotated[str, Field(min_length=1, max_length=500, examples=["*.down_proj"])]
#: Of a view: what was stored when it was made.
Mark = Annotated[str, Field(pattern=r"^[0-9a-f]{0,16}$")]
Key = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
#: A plan of a view.
PlanName = Annotated[str, Field(pattern=r"^(?:\d{1,9}|[0-9a-f]{64})?$", examples=["0"])]
Scalar = Annotated[int, Field(ge=-(2**63), lt=2**63)] | float | bool | Annotated[str, Field(max_length=200)]
Settings = Annotated[dict[Annotated[str, Field(max_length=60)], Scalar], Field(max_length=30)]


class Strict(BaseModel):
    """A body: no further keys, no other types, finite numbers only."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class Query(BaseModel):
    """Parameters: no others, finite numbers only."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)


class Paged(Query):
    """Which rows."""

    offset: Annotated[int, Field(ge=0, lt=2**53)] = 0
    limit: Annotated[int, Field(ge=1, le=MOST_ROWS)] = 100


class OfStudy(Query):
    """Which study."""

    study: Name


class PagedStudy(Paged):
    """Which rows of which study."""

    study: Name


class Plans(PagedStudy):
    """Which plans, and whether whole; at most 50 whole ones at once."""

    whole: bool = False


class Scores(PagedStudy):
    """Which rows of the scores, or the whole table."""

    whole: bool = False


class Lines(Query):
    """Which lines of a log: those after the number of one."""

    study: Name
    after: Annotated[int, Field(ge=0, lt=2**53)] = 0
    limit: Annotated[int, Field(ge=1, le=MOST_ROWS)] = 1000


class Solve(Strict):
    """What to solve for; without budgets, for the study's own."""

    study: Name
    budgets: Annotated[list[BudgetText], Field(max_length=20)] = []
    goal: Annotated[str, Field(min_length=1, max_length=100, examples=["loss", "worst", "weights"])] = "loss"
    most_loss: Annotated[float | None, Field(ge=0)] = None


class Choices(Query):
    """Which plans of a view, by number; refused when the study has changed since the view of ``mark``."""

    study: Name
    first: Annotated[int, Field(ge=0, lt=2**53)] = 0
    count: Annotated[int, Field(ge=1, le=MOST_ROWS)] = 100
    mark: Mark = ""


class Why(Query):
    """Which layer of which plan: a number of the view or a key of its formats, else the plan for the own budgets."""

    study: Name
    layer: Pattern
    plan: PlanName = ""
    mark: Mark = ""


class Compare(Query):
    """Which two plans of a view, each by its number or by the key of its formats."""

    study: Name
    a: PlanName
    b: PlanName
    mark: Mark = ""


class Resolve(Strict):
    """What to solve for until it is asked again; without budgets, for the study's own. Patterns are those of layers."""

    study: Name
    budgets: Annotated[list[BudgetText], Field(max_length=20)] = []
    pins: Annotated[dict[Pattern, FormatText], Field(max_length=2000)] = {}
    bars: Annotated[dict[Pattern, Annotated[list[FormatText], Field(max_length=300)]], Field(max_length=2000)] = {}
    floors: Annotated[dict[Pattern, FormatText], Field(max_length=2000)] = {}
    against: Annotated[list[Annotated[int, Field(ge=0, lt=2**16)]] | None, Field(max_length=100_000)] = None
    whole: bool = False
    patient: bool = False
    mark: Mark = ""


class Export(Strict):
    """Who is to load the plan; the answer is JSON, or an archive."""

    to: Annotated[str, Field(min_length=1, max_length=60, examples=["llm-compressor"])]
    version: Annotated[str, Field(max_length=40)] = ""
    assume: Annotated[str, Field(max_length=40)] = ""
    archive: bool = False


class Which(Strict):
    """Which study."""

    study: Name


class Submit(Strict):
    """A study of a model and of texts that the server knows by name."""

    name: Name
    model: Name
    calibration: Name
    validation: Annotated[str, Field(max_length=200)] = ""
    budgets: Annotated[list[BudgetText], Field(min_length=1, max_length=20)]
    formats: Annotated[list[FormatText] | None, Field(min_length=1, max_length=200)] = None
    activations: Annotated[list[FormatText], Field(max_length=50)] = []
    kv: Annotated[list[FormatText], Field(max_length=50)] = []
    estimator: Annotated[str, Field(min_length=1, max_length=60)] = "divergence"
    estimator_settings: Settings = {}
    solver: Annotated[str, Field(min_length=1, max_length=60)] = "auto"
    solver_settings: Settings = {}
    pins: Annotated[dict[Annotated[str, Field(max_length=500)], FormatText], Field(max_length=1000)] = {}
    protect: Annotated[str, Field(max_length=200)] = ""
    ties: Literal["auto", "none"] = "auto"
    target: Annotated[str, Field(max_length=60)] = ""
    clamp: bool = False
    cautious: Annotated[float, Field(ge=0, le=100)] = 0.0
    tokens: Annotated[int, Field(ge=1, le=2**24)] = 8192
    validation_tokens: Annotated[int, Field(ge=1, le=2**24)] = 16384
    length: Annotated[int, Field(ge=2, le=2**20)] = 256
    batch_size: Annotated[int, Field(ge=1, le=4096)] = 2
    points: Annotated[int, Field(ge=0, le=1000)] = 8
    random: Annotated[int, Field(ge=0, le=1000)] = 0
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0


class Block(BaseModel):
    """The fields of an error; ``code`` is explained by ``mpsearch explain``."""

    code: str
    kind: str
    message: str
    where: str
    because: str
    advice: str


class Failure(BaseModel):
    """An answer that is an error."""

    error: Block


class Rows(BaseModel):
    """Rows of a list; ``next`` is the offset of the following page, null on the last."""

    items: list[dict[str, Any]]
    total: int
    offset: int
    next: int | None


class Health(BaseModel):
    """The server answers."""

    status: Literal["ok"]


class StudyAnswer(BaseModel):
    """A study: its question, and what it is doing."""

    name: str
    state: str
    created: str
    updated: str
    spec: dict[str, Any]
    status: dict[str, Any]
    notices: list[dict[str, str]]


class Solved(BaseModel):
    """A plan, and the proof that comes with it."""

    key: str
    plan: dict[str, Any]
    loss: float | None
    bound: float | None
    gap: float | None
    bits: float
    bytes: int
    prices: list[dict[str, Any]]


class Files(BaseModel):
    """The files of an export, name -> text."""

    files: dict[str, str]
    notes: list[str]
