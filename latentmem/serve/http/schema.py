"""What requests and responses look like."""

from __future__ import annotations

from dataclasses import MISSING
from datetime import datetime
from typing import Annotated, Any, Literal

from fastapi import Query
from pydantic import BaseModel, ConfigDict, Field, create_model

from latentmem.core.settings import LARGEST, LongTermSettings, MemorySettings, Setting, settings_of
from latentmem.model.prompts import Write as Whose
from latentmem.serve.engine.answer import Sampling

SOURCE_LENGTH = 256  # characters of the name of a source
INT64 = (1 << 63) - 1
Limit = Annotated[int, Query(ge=1, le=100)]
Count = Annotated[int, Field(ge=0, le=1 << 31)]
Text = Annotated[str, Field(min_length=1)]
Name = Annotated[str, Field(pattern="^[A-Za-z0-9_][A-Za-z0-9_-]{0,63}$")]  # as the store's; there the last word is said
SourceName = Annotated[str, Field(min_length=1, max_length=SOURCE_LENGTH)]
Role = Literal["raw", "system", "user", "assistant"]


class Strict(BaseModel):
    """A body whose fields are all known and of their own types."""

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)


class Loose(BaseModel):
    """A body of OpenAI's, whose clients send more fields than matter here."""

    model_config = ConfigDict(strict=True, extra="allow", allow_inf_nan=False)


# --- sampling and messages --------------------------------------------------------------------------------------------


class SamplingFields(BaseModel):
    """How an answer is made."""

    max_tokens: Annotated[int, Field(ge=1, le=1 << 31)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    seed: Annotated[int, Field(ge=-(1 << 63), lt=1 << 63)] | None = None
    stop: Text | Annotated[list[Text], Field(max_length=4)] | None = None
    repeats: bool | None = Field(
        default=None, description="may an answer say a sentence again; else the answer ends before it"
    )

    def sampling(self, **more: Any) -> Sampling:
        """The same for the engine; `more` takes precedence."""
        fields = {
            what: getattr(self, what) for what in ("max_tokens", "temperature", "top_p", "seed", "repeats")
        } | more
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())
        return Sampling(**{what: value for what, value in fields.items() if value is not None}, stop=stop)


class Turn(Strict):
    role: Literal["system", "user", "assistant"]
    content: str


class Part(Loose):
    """A part of a message; only type "text" is taken."""

    type: str
    text: str | None = None


class ChatMessage(Loose):
    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[Part]


# --- OpenAI's requests ------------------------------------------------------------------------------------------------


class MemoryChoice(Strict):
    """The memory of a request: which one, at which version, and whose turns are written into it."""

    id: Name
    write: bool | Whose = Field(default=False, description="whose turns are written; true: both, false: none")
    version: Count | None = None
    window: Count | None = Field(default=None, description="tokens of earlier messages that a written chat reads")

    @property
    def written(self) -> Whose:
        """Whose turns are written."""
        return self.write if isinstance(self.write, str) else "both" if self.write else "none"


class StreamOptions(Loose):
    include_usage: bool | None = None


class OpenAIRequest(Loose, SamplingFields):
    model: str
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: Annotated[int, Field(ge=1, le=128)] | None = None
    user: str | None = None
    memory: Name | MemoryChoice | None = None


class ChatRequest(OpenAIRequest):
    messages: Annotated[list[ChatMessage], Field(min_length=1)]
    max_completion_tokens: Annotated[int, Field(ge=1, le=1 << 31)] | None = None


class CompletionRequest(OpenAIRequest):
    prompt: Text | Annotated[list[Text], Field(min_length=1, max_length=1)]


# --- OpenAI's responses -----------------------------------------------------------------------------------------------


class ErrorFacts(BaseModel):
    message: str
    type: str
    param: str | None
    code: str | None


class Error(BaseModel):
    error: ErrorFacts


class Usage(BaseModel):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class MemoryUsed(BaseModel):
    """The memory that was read, at which version, and the version and source that what was said was written as.

    Of an `empty` memory nothing is known, and the model answers by itself.
    """

    id: str
    version: int | None
    written: int | None = None
    source: str | None = None
    empty: bool | None = None


class Answer(BaseModel):
    role: Literal["assistant"] = "assistant"
    content: str


class ChatChoice(BaseModel):
    index: int
    message: Answer
    finish_reason: str
    logprobs: None = None


class ChatCompletion(BaseModel):
    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage
    memory: MemoryUsed | None = None


class TextChoice(BaseModel):
    index: int
    text: str
    finish_reason: str
    logprobs: None = None


class Completion(BaseModel):
    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    choices: list[TextChoice]
    usage: Usage
    memory: MemoryUsed | None = None


class Model(BaseModel):
    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "latentmem"


class Models(BaseModel):
    object: Literal["list"] = "list"
    data: list[Model]


# --- memories ---------------------------------------------------------------------------------------------------------


class _Named(Strict):
    id: Name


class _New(_Named):
    exist_ok: bool = False


def _type(one: Setting) -> Any:
    return Literal.__getitem__(one.choices) if one.choices else one.type


def _fields(kind: Any) -> dict[str, Any]:
    """A field for each setting of a class, with its help, bounds and choices; one with a default may be left out."""
    fields: dict[str, Any] = {}
    for one in settings_of(kind):
        value = _type(one)
        if one.type is LongTermSettings:
            value = Annotated[int, Field(ge=0, le=LARGEST)] | LongTerm
        elif one.type in (int, float):
            most = one.most if one.most is not None else INT64
            value = Annotated.__class_getitem__((value, Field(ge=one.least, le=most)))  # type: ignore[attr-defined]
        required = one.default is MISSING
        default: Any = ... if required else None
        fields[one.name] = (value if required else value | None, Field(default, description=one.help))
    return fields


LongTerm = create_model("LongTerm", __base__=Strict, **_fields(LongTermSettings))
_Create: Any = create_model("Create", __base__=_New, **_fields(MemorySettings))


class Create(_Create):
    """A new memory: its name and its settings; what is left out is as the adapters were trained, or by the model."""

    def settings(self) -> MemorySettings:
        return MemorySettings.of(self.model_dump(exclude={"id", "exist_ok"}, exclude_none=True))


class _Info(BaseModel):
    id: str
    object: Literal["memory"] = "memory"
    versions: int
    pending: int
    changed: datetime
    bytes: int
    prunable: int
    M: int
    N: int
    model: str


_PART: dict[str, Any] = {one.name: (_type(one), Field(description=one.help)) for one in settings_of(LongTermSettings)}
_KEPT: dict[str, Any] = {
    one.name: (_type(one) | None, Field(description=f"{one.help}; null: an older version, which does not say"))
    for one in settings_of(MemorySettings)
    if one.name in ("order", "form")
}
LongTermInfo = create_model("LongTermInfo", **_PART)
_MemoryInfo: Any = create_model("MemoryInfo", __base__=_Info, longterm=(LongTermInfo | None, ...), **_KEPT)


class MemoryInfo(_MemoryInfo):
    """A memory as its journal has it; without `longterm` a memory keeps nothing of what it drops."""


class MemoryList(BaseModel):
    object: Literal["list"] = "list"
    data: list[MemoryInfo]
    has_more: bool


class Rights(BaseModel):
    """What the key of a request may do; `name` is "none" where no key is asked for."""

    object: Literal["key"] = "key"
    name: str
    writes: bool


class Deleted(BaseModel):
    id: str
    object: Literal["memory.deleted"] = "memory.deleted"
    deleted: bool = True


class Write(Strict):
    """A text, or turns of a conversation."""

    text: Text | None = None
    messages: Annotated[list[Turn], Field(min_length=1)] | None = None
    source: SourceName = "text"
    role: Role | None = None
    wait: bool = True


class Written(BaseModel):
    """A write that no crash loses; its version and sizes once they are known.

    `lost` is how many slots of each layer the write dropped for good, the mean over layers.
    """

    id: str
    version: int | None
    tokens: int
    M: int | None
    N: int | None
    lost: float | None
    state: Literal["applied", "pending"]


class Ask(Strict, SamplingFields):
    question: Text
    version: Count | None = None
    sources: bool = False


class Passage(BaseModel):
    """Sentences of one update that an answer drew on; no text where the memory does not hold all of it."""

    source: str
    text: str
    share: float


class Asked(BaseModel):
    id: str
    answer: str
    version: int | None
    finish_reason: str
    usage: Usage
    sources: dict[str, float] | None = None
    passages: list[Passage] | None = None
    known: float | None = Field(None, description="estimate from 0 to 1 that what was asked stands in the memory")
    notice: str | None = Field(None, description="that the memory is empty, so the model answered by itself")


class VersionOf(BaseModel):
    id: str
    version: int


class HistoryLine(BaseModel):
    version: int
    event: str
    source: str | None
    tokens: int
    base: VersionOf | None
    state: str
    pruned: bool
    error: str | None
    key: str | None
    bytes: int
    M: int | None
    N: int | None
    lost: float
    time: datetime
    text: str | list[dict[str, str]] | list[int] | None = None


class History(BaseModel):
    object: Literal["list"] = "list"
    data: list[HistoryLine]
    has_more: bool


class SourceLeft(BaseModel):
    source: str
    tokens: int
    slots: int
    share_left: float = Field(serialization_alias="left", title="Left")
    stored: float
    pinned: bool
    expires: datetime | None
    forecast: dict[int, float]


class Stats(VersionOf):
    M: int
    N: int
    K: int
    half_life: float | None
    bytes: int
    prunable: int
    sources: list[SourceLeft]


class Underway(BaseModel):
    """Tokens of what is being written, and of what waits behind it."""

    done: int
    total: int


class Slots(VersionOf):
    """Where the slots of a memory came from, without what is in them.

    `layers` has for each layer its slots, oldest first, as runs of three numbers: the place of the source in `sources`,
    or -1 for what is older than the memory; the number of the update that wrote it; how many slots.
    """

    L: int
    M: int
    N: int
    K: int
    R: int
    updates: int
    stored: int
    sources: list[str]
    layers: list[list[int]]
    writing: Underway | None = None


class Drawn(Strict):
    """A question as `ask` puts it, or the messages of a chat, and what was answered."""

    question: Text | None = None
    messages: Annotated[list[Turn], Field(min_length=1, max_length=256)] | None = None
    answer: Text
    version: Count | None = None


class DrawnOn(VersionOf):
    sources: dict[str, float]
    passages: list[Passage]
    known: float | None = Field(None, description="estimate from 0 to 1 that what was asked stands in the memory")


class Rollback(Strict):
    version: Count


class Prune(Strict):
    """Which versions stay: `keep` of the newest, or those that are not older than so many seconds."""

    keep: Annotated[int, Field(ge=1, le=1 << 31)] | None = None
    older_than: Annotated[float, Field(ge=0, le=1e11)] | None = None
    dry_run: bool = False


class Pruned(BaseModel):
    """The versions that can not be opened any more, and the bytes that this frees."""

    id: str
    versions: list[int]
    bytes: int


class Fork(Strict):
    id: Name
    version: Count | None = None


class Forget(Strict):
    source: SourceName
    exact: bool = False


class Forgotten(VersionOf):
    rewritten: list[str] | None = None


class Pin(Strict):
    source: SourceName
    pinned: bool = True


class Expire(Strict):
    source: SourceName
    after: Annotated[float, Field(ge=0, le=1e9)] | None


class Expiring(BaseModel):
    id: str
    source: str
    expires: datetime | None


class State(BaseModel):
    status: Literal["ok"] = "ok"
