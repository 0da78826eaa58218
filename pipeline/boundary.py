"""Where a user's Python meets Rowmill: arguments are checked, and whatever goes wrong is a ``RowmillError``."""

from __future__ import annotations

import functools
import inspect
import types
from collections.abc import Callable
from datetime import datetime
from typing import Annotated, Any, TypeVar

from pydantic import ConfigDict, Field, ValidationError, validate_call

from pipeline.spec import values
from pipeline.spec.values import Whole as Whole
from storage.errors import InvalidJob, RowmillError, Unexpected

T = TypeVar("T")
C = TypeVar("C", bound=Callable[..., Any])

_STRICT = ConfigDict(strict=True, arbitrary_types_allowed=True)
_OWN = "_rowmill_user_code"


Text = Annotated[values.Text, Field(max_length=8192)]
"""A name, an id, a place. SQLite takes no longer patterns than 50,000 bytes."""
Limit = Annotated[Whole, Field(ge=1, le=values.MOST_ITEMS)]
"""How many things to list."""
Seconds = Annotated[float, Field(ge=0)]
Moment = Annotated[float, Field(allow_inf_nan=False)] | datetime
"""Unix seconds, or a ``datetime``."""


def boundary(cls: type[T]) -> type[T]:
    """Check the arguments of a class's public methods by their annotations, and translate what they raise.

    A wrong argument raises :class:`~storage.errors.InvalidJob` naming it. Whatever is no :class:`RowmillError` becomes
    :class:`~storage.errors.Unexpected`, except what the user's own callbacks (see :func:`own`) raise.
    """
    for name, member in list(vars(cls).items()):
        if isinstance(member, property) and not name.startswith("_"):
            assert member.fget is not None
            setattr(cls, name, property(_translated(member.fget), doc=member.__doc__))
        elif inspect.isfunction(member) and (not name.startswith("_") or name in _SPECIAL):
            checked = name == "__init__" or not name.startswith("_")
            setattr(cls, name, _translated(member, _checked(member) if checked else None))
    return cls


_SPECIAL = frozenset({"__init__", "__len__", "__iter__", "__next__", "__getitem__"})


def _checked(function: Callable[..., Any]) -> Callable[..., Any]:
    # What it returns is not checked, and may be named by types that are imported for type checkers only.
    copy = types.FunctionType(
        function.__code__, function.__globals__, function.__name__, function.__defaults__, function.__closure__
    )
    copy.__kwdefaults__ = function.__kwdefaults__
    copy.__annotations__ = {name: kind for name, kind in function.__annotations__.items() if name != "return"}
    return validate_call(config=_STRICT)(copy)


def _translated(function: C, checked: Callable[..., Any] | None = None) -> C:
    call = checked or function

    @functools.wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        try:
            return call(*args, **kwargs)
        except RowmillError:
            raise
        except ValidationError as error:
            raise _refusal(function, error) from None
        except Exception as error:
            ended = isinstance(error, (LookupError, StopIteration)) and function.__name__ in ("__getitem__", "__next__")
            if ended or getattr(error, _OWN, False):
                raise  # how a sequence, or an iterator, says where it ends; or it is the user's
            raise _unexpected(error) from error

    return wrapper  # type: ignore[return-value]


def _unexpected(error: Exception) -> Unexpected:
    return Unexpected(f"unexpected {type(error).__name__}: {error}")


def _refusal(function: Callable[..., Any], error: ValidationError) -> InvalidJob:
    problem = error.errors(include_url=False)[0]
    parameters = list(inspect.signature(function).parameters)
    at = problem["loc"][0] if problem["loc"] else None
    name = parameters[at] if isinstance(at, int) and at < len(parameters) else at if isinstance(at, str) else None
    names = ", ".join(parameters[1:])
    match problem["type"]:
        case "unexpected_keyword_argument":
            message = f"{function.__name__}() has no such argument; it takes: {names or 'nothing'}"
        case "unexpected_positional_argument" | "missing_argument" | "missing_keyword_only_argument":
            name, message = None, f"{function.__name__}() takes {names or 'nothing'}: {problem['msg'].lower()}"
        case "value_error":
            message = problem["msg"].removeprefix("Value error, ")
        case _:
            shown = repr(problem["input"])
            shown = shown if len(shown) <= 100 else f"{shown[:100]}…"
            message = f"{problem['msg'].removeprefix('Input ')}, not {shown}"
    return InvalidJob(message, field=name)


def own(callback: Callable[..., Any]) -> Callable[..., None]:
    """A user's callback: what it raises is the user's to see, as it was raised."""

    @functools.wraps(callback)
    def called(*args: Any) -> None:
        try:
            callback(*args)
        except Exception as error:
            setattr(error, _OWN, True)
            raise

    return called
