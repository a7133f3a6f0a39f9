"""Command-line options made from a dataclass of settings: one option per field, whose docstring is its help.

A field `batch_size: int = 1` becomes `--batch-size INTEGER`, with the field's default. A flag that is off by default
has no `--no-` form. A tuple is given as comma-separated words.
"""

from __future__ import annotations

import ast
import functools
import inspect
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import Field, fields
from typing import Annotated, Any, get_args, get_origin, get_type_hints

import typer

from .options import comma_separated


def field_docs(settings: type) -> dict[str, str]:
    """Name of a field -> the docstring that follows it in the source of the dataclass `settings`, on one line.

    >>> from reallm.finetuning.settings import FinetuneSettings
    >>> field_docs(FinetuneSettings)["batch_size"]
    'Windows per optimiser step.'
    """
    (definition,) = ast.parse(textwrap.dedent(inspect.getsource(settings))).body
    assert isinstance(definition, ast.ClassDef)
    docs = {}
    for statement, following in zip(definition.body, definition.body[1:], strict=False):
        if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
            doc = following.value if isinstance(following, ast.Expr) else None
            if isinstance(doc, ast.Constant) and isinstance(doc.value, str):
                docs[statement.target.id] = " ".join(doc.value.split())
    return docs


def options_from(settings: type) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """A decorator that replaces a command's parameter `settings` by one option per field of that dataclass.

    The command then gets an instance of the dataclass as `settings`. Its other parameters stay unchanged.
    """

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        hints, docs = get_type_hints(settings), field_docs(settings)
        options = [_option(field, hints[field.name], docs[field.name]) for field in fields(settings)]
        signature = inspect.signature(command, eval_str=True)
        others = [parameter for name, parameter in signature.parameters.items() if name != "settings"]

        @functools.wraps(command)
        def with_settings(**values: Any) -> None:
            given = {field.name: values.pop(field.name) for field in fields(settings)}
            for field in fields(settings):
                if _is_list(hints[field.name]):
                    given[field.name] = tuple(comma_separated(given[field.name]))
            command(**values, settings=settings(**given))

        parameters = [parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY) for parameter in (*others, *options)]
        vars(with_settings)["__signature__"] = inspect.Signature(parameters)
        with_settings.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
        return with_settings

    return decorate


def _option(field: Field[Any], hint: Any, doc: str) -> inspect.Parameter:
    """The keyword parameter from which typer makes the option of `field`."""
    default: Any = field.default
    flag = (f"--{field.name.replace('_', '-')}",) if default is False else ()
    if _is_list(hint):
        default = ",".join(default)
    annotation = Annotated[_option_type(hint), typer.Option(*flag, help=doc)]  # type: ignore[valid-type]  # made here
    return inspect.Parameter(field.name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)


def _is_list(hint: Any) -> bool:
    return get_origin(hint) is Sequence or get_origin(hint) is tuple


def _option_type(hint: Any) -> Any:
    """The type that typer parses for a field of type `hint`: str for lists, and for fields that take a path or text."""
    if _is_list(hint):
        return str
    if str in get_args(hint):
        return str | None
    return hint
