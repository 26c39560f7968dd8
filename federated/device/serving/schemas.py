"""What requests may hold. A field that would change the answer and is not supported is refused, never dropped.

The names are OpenAI's and vLLM's. A field that is not listed here may be sent as null; a few may be sent with the value
that means "off".
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, StringConstraints, field_validator, model_validator

__all__ = [
    "ActivateBody",
    "ChatBody",
    "ClassifyBody",
    "CompletionBody",
    "EmbeddingBody",
    "GenerationBody",
    "LoadBody",
    "RouteBody",
    "UnloadBody",
]

_OFF: Mapping[str, tuple[Any, ...]] = {
    "n": (1,),
    "best_of": (1,),
    "echo": (False,),
    "logprobs": (False,),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "logit_bias": ({},),
    "tools": ([],),
    "response_format": ({"type": "text"},),
    "suffix": ("",),
    "store": (False,),
    "refusal": (),
    "annotations": ([],),
}


def _whole(text: str) -> str:
    r"""JSON may hold half of a character (``"\ud800"``); no tokenizer reads that."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError("holds half of a surrogate pair, which is no character") from None
    return text


Text = Annotated[str, AfterValidator(_whole)]
Name = Annotated[str, StringConstraints(max_length=200)]
Number = Annotated[float, Field(allow_inf_nan=False)]


def _same(value: Any, off: Any) -> bool:
    """Whether a value is the one that means off: 0 is not False, which asks a completion for logprobs of its tokens."""
    return isinstance(value, bool) == isinstance(off, bool) and bool(value == off)


class _Body(BaseModel):
    model_config = ConfigDict(extra="allow", frozen=True)

    @model_validator(mode="after")
    def _nothing_ignored(self) -> Self:
        for name, value in (self.model_extra or {}).items():
            if value is not None and not any(_same(value, off) for off in _OFF.get(name, ())):
                expected = f", expected {_OFF[name][0]!r} or nothing" if _OFF.get(name) else ""
                raise ValueError(f"{name[:60]!r} is not supported by this server{expected}: leave it out")
        return self


class _Asking(_Body):
    model: Name | None = None
    user: Name | None = None


class StreamOptions(_Body):
    """Whether a stream ends with a record of the tokens used."""

    include_usage: bool = False


class GenerationBody(_Asking):
    """What completions and chats have in common."""

    temperature: Number = Field(1.0, ge=0, le=2)
    top_p: Number = Field(1.0, gt=0, le=1)
    max_tokens: int | None = Field(None, ge=1)
    stop: Text | tuple[Text, ...] | None = None
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    stream: bool = False
    stream_options: StreamOptions | None = None

    @field_validator("temperature", "top_p", mode="before")
    @classmethod
    def _default_for_null(cls, value: Any) -> Any:
        return 1.0 if value is None else value

    @property
    def stops(self) -> tuple[str, ...]:
        """The stop texts."""
        return (self.stop,) if isinstance(self.stop, str) else self.stop or ()

    @property
    def include_usage(self) -> bool:
        """Whether the stream ends with a record of the tokens used."""
        return self.stream_options is not None and self.stream_options.include_usage


class CompletionBody(GenerationBody):
    """``/v1/completions``."""

    prompt: Text | Annotated[tuple[Text, ...], Field(min_length=1, max_length=1)]

    @property
    def text(self) -> str:
        """The prompt."""
        return self.prompt if isinstance(self.prompt, str) else self.prompt[0]


class TextPart(_Body):
    """A piece of a message."""

    type: Literal["text"]
    text: Text


class Message(_Body):
    """One turn of a chat."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Text | tuple[TextPart, ...]

    def plain(self) -> dict[str, str]:
        """As the backend reads it."""
        content = self.content
        return {"role": self.role, "content": content if isinstance(content, str) else "".join(p.text for p in content)}


class ChatBody(GenerationBody):
    """``/v1/chat/completions``."""

    messages: Annotated[tuple[Message, ...], Field(min_length=1)]
    max_completion_tokens: int | None = Field(None, ge=1)


class EmbeddingBody(_Asking):
    """``/v1/embeddings``."""

    input: Text | Annotated[tuple[Text, ...], Field(min_length=1)]
    encoding_format: Literal["float", "base64"] = "float"

    @property
    def texts(self) -> Sequence[str]:
        """What to embed."""
        return (self.input,) if isinstance(self.input, str) else self.input


class Series(_Body):
    """A sensor's values: a list of channels for each time step."""

    values: Annotated[tuple[tuple[Number, ...], ...], Field(min_length=1)]


class ClassifyBody(_Asking):
    """``/classify``: texts, or series for a sensor's task."""

    input: Text | Series | Annotated[tuple[Text | Series, ...], Field(min_length=1)]

    @property
    def rows(self) -> list[dict[str, Any]]:
        """The task's rows."""
        given = self.input if isinstance(self.input, tuple) else (self.input,)
        return [{"text": one} if isinstance(one, str) else {"values": one.values} for one in given]


class LoadBody(_Body):
    """``/v1/load_lora_adapter``: ``lora_path`` names a version of the local store."""

    lora_name: Name
    lora_path: Name
    load_inplace: bool = False


class UnloadBody(_Body):
    """``/v1/unload_lora_adapter``."""

    lora_name: Name


class ActivateBody(_Body):
    """``/admin/activate``: an adapter's name, ``name@sha256:...`` or ``null``."""

    model: Name


class RouteBody(_Body):
    """``/admin/route``: sends a user or an arm to an adapter's name; null: no more."""

    user: Name | None = None
    arm: Name | None = None
    model: Name | None = None

    @model_validator(mode="after")
    def _one(self) -> Self:
        if (self.user is None) == (self.arm is None):
            raise ValueError("name either a user or an arm")
        return self
