"""Command-line options from the fields of a dataclass.

    @dataclasses.dataclass(frozen=True)
    class Settings:
        data: Annotated[Path, Option("Folder with the corpus.")]
        steps: Annotated[int | None, Option("Optimisation steps.", panel="How long")] = None

    app.command("pretrain")(command(Settings, run))

The name, type and default of a field become the option's: ``tokens_per_batch: Annotated[int, Option(...)] = 8`` is
``--tokens-per-batch``, an integer, 8 by default. A field without a default is a required option.
"""

from __future__ import annotations

import dataclasses
import inspect
import typing
from collections.abc import Callable
from typing import Annotated, Any, TypeVar

Settings = TypeVar("Settings")


@dataclasses.dataclass(frozen=True)
class Option:
    """How a field appears on the command line.

    Attributes:
        help: text for ``--help``, and the documentation of the field.
        panel: heading in ``--help`` below which the option is listed.
        flags: names in place of the field's, for example ``"--lowercase/--cased"``, or ``"--resume"`` for a bool
            without a ``--no-resume``.
        positional: a positional argument in place of an option.
        metavar: placeholder of the value in ``--help``.
        show_default: whether ``--help`` shows the default, or the text that it shows.
        parser: converts the word on the command line to the value.
        min: the smallest number that is allowed.
        defaults: of the other options, computed from the values of this one and of those in ``reads``, by name, which
            are read first.
        reads: see ``defaults``.
        instead_of: an option that this one replaces: where this one is typed, the other has no value unless typed.
    """

    help: str
    panel: str | None = None
    flags: str | None = None
    positional: bool = False
    metavar: str | None = None
    show_default: bool | str = True
    parser: Callable[[str], Any] | None = None
    min: float | None = None
    defaults: Callable[..., dict[str, Any]] | None = None
    reads: tuple[str, ...] = ()
    instead_of: str | None = None


def _sets_defaults(name: str, options: dict[str, Option]) -> Callable[..., Any] | None:
    """A callback for typer that sets defaults once ``name`` is read. None if no default depends on it."""
    import typer

    wanted = {(other, *option.reads): option.defaults for other, option in options.items() if option.defaults}
    wanted = {names: defaults for names, defaults in wanted.items() if name in names}
    if not wanted:
        return None

    def callback(ctx: typer.Context, value: Any) -> Any:
        read = {**ctx.params, name: value}
        for names, defaults in wanted.items():
            if defaults is not None and read.keys() >= set(names):
                chosen = defaults(**{each: read[each] for each in names})
                ctx.default_map = {**(ctx.default_map or {}), **chosen}
        return value

    callback.__annotations__ = {"ctx": typer.Context}
    return callback


def command(settings: type[Settings], run: Callable[[Settings], None]) -> Callable[..., None]:
    """A function for ``typer.Typer.command``, with one parameter for each field of the dataclass ``settings``.

    Args:
        settings: all its fields are annotated with an `Option`.
        run: called with the ``settings`` built from the command line.
    """
    import typer

    hints = typing.get_type_hints(settings, include_extras=True)
    options: dict[str, Option] = {name: typing.get_args(hint)[1] for name, hint in hints.items()}
    parameters = [inspect.Parameter("ctx", inspect.Parameter.KEYWORD_ONLY, annotation=typer.Context)]
    for field in dataclasses.fields(settings):  # type: ignore[arg-type]
        kind, option = typing.get_args(hints[field.name])
        kind = str | None if option.parser else kind  # the parser returns the value, whatever the field's type
        words = {name: getattr(option, name) for name in ("help", "metavar", "show_default", "parser", "min")}
        words["rich_help_panel"] = option.panel
        callback = _sets_defaults(field.name, options)
        if callback is not None:
            words |= {"is_eager": True, "callback": callback}
        flags = (option.flags,) if option.flags else ()
        parameter = typer.Argument(**words) if option.positional else typer.Option(*flags, **words)
        parameters.append(
            inspect.Parameter(
                field.name,
                inspect.Parameter.KEYWORD_ONLY,
                default=inspect.Parameter.empty if field.default is dataclasses.MISSING else field.default,
                annotation=Annotated[kind, parameter],
            )
        )

    def parsed(ctx: typer.Context, **given: Any) -> None:
        def is_typed(name: str) -> bool:
            source = ctx.get_parameter_source(name)
            return source is not None and source.name == "COMMANDLINE"

        for name, option in options.items():
            if option.instead_of is not None and is_typed(name) and not is_typed(option.instead_of):
                given[option.instead_of] = None
        run(settings(**given))

    parsed.__doc__ = run.__doc__
    parsed.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    parsed.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return parsed
