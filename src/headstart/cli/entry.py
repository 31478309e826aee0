"""The command `headstart`: finds a command, runs it, and turns whatever happens into an exit code.

The modules of the commands are imported when one of them is asked for, so that `headstart --help` is quick.
"""

from __future__ import annotations

import inspect
import io
import os
import signal
import sys
import warnings
from collections.abc import Callable, Sequence
from importlib import import_module
from typing import TYPE_CHECKING, Any, NamedTuple

import typer
from typer.core import TyperCommand, TyperGroup

import headstart
from headstart.cli import outcome
from headstart.errors import ConfigError, HeadstartError, unknown

if TYPE_CHECKING:
    pass

NAME = "headstart"


class Entry(NamedTuple):
    """One line of the help, and how to go on after the command was interrupted."""

    about: str
    panel: str
    go_on: tuple[str, ...] | None = None  # flags to add; None: it leaves nothing to go on with


COMMANDS = {
    "demo": Entry("The main job on real pictures: fetch, compare, predict.", "Start here", ()),
    "check": Entry("Look a folder of pictures over before training on it.", "Your pictures"),
    "data": Entry("Fetch a named data set as a plain folder of pictures.", "Your pictures"),
    "train": Entry("Fine-tune one network with one method.", "Work", ("--resume",)),
    "compare": Entry("Run several methods over several seeds, and say which to take.", "Work", ()),
    "report": Entry("Write a comparison as one HTML file that opens offline.", "Work"),
    "predict": Entry("Label pictures with a trained model.", "Work", ()),
    "export": Entry("Turn a run into a bundle that others can use: ONNX, model card, verified.", "Work"),
    "serve": Entry("Serve a model: a page for people, an address for programs.", "Work"),
    "fisher": Entry("Measure which weights of a network matter, for l2-sp's Fisher variants.", "Work"),
    "methods": Entry("List the methods, their papers, presets and hyper-parameters.", "Look things up"),
    "models": Entry("List the networks that can be fine-tuned.", "Look things up"),
    "plan": Entry("Print what a method would train, when and how fast, without data.", "Look things up"),
    "doctor": Entry("Say what is installed, which devices there are, what can be reached.", "Look things up"),
}


class Commands(TyperGroup):
    """The commands by name; one is imported when it is about to run, not to be listed."""

    def list_commands(self, ctx: Any) -> list[str]:
        """All names, in the order of the help."""
        return list(COMMANDS)

    def get_command(self, ctx: Any, cmd_name: str) -> TyperCommand | None:
        """What a list needs of a command: its name and one line."""
        entry = COMMANDS.get(cmd_name)
        return entry and TyperCommand(cmd_name, help=entry.about, rich_help_panel=entry.panel)

    def resolve_command(self, ctx: Any, args: list[str]) -> tuple[str | None, Any, list[str]]:
        """The command that is about to run."""
        name = args[0]
        if name not in COMMANDS:
            if ctx.resilient_parsing:
                return None, None, args[1:]
            raise ConfigError(unknown("command", name, COMMANDS))
        return name, _command(name), args[1:]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: what stands after `headstart`; None: the process's own.

    Returns:
        The exit code: 0 good, 1 a mistake of the person (said in one or two lines on stderr) or of
        headstart (with a file that holds the details), 2 finished with failed runs, 130 interrupted.
    """
    given = list(sys.argv[1:] if argv is None else argv)
    outcome.typed.set(tuple(given))
    if isinstance(sys.stdout, io.TextIOWrapper):  # a name that cannot be written is no reason to stop
        sys.stdout.reconfigure(errors="backslashreplace")
    # What is wrong, and not where in headstart it was noticed. Recorders of warnings are not disturbed.
    warnings.formatwarning = lambda message, *_, **__: f"note: {message}\n"
    with outcome.terminated_like_interrupted():
        try:
            code = _run(given)
            sys.stdout.flush()  # a closed pipe is noticed here, not when Python ends
            return code
        except KeyboardInterrupt:
            if argv is None:  # all is saved: pressing again gets no traceback out of Python's exit
                signal.signal(signal.SIGINT, signal.SIG_IGN)
            return outcome.interrupted(_again(given))
        except BrokenPipeError:
            return outcome.pipe_closed()
        except SystemExit as left:  # how rich leaves a closed pipe
            if isinstance(left.__context__, BrokenPipeError):
                return outcome.pipe_closed()
            raise
        except (HeadstartError, OSError) as error:
            return outcome.refused(error)
        except Exception as error:  # noqa: BLE001  # the last place where it can be said in one line
            return outcome.broken(error)


def _run(given: list[str]) -> int:
    root = typer.main.get_command(_app())
    if f"_{NAME.upper()}_COMPLETE" in os.environ:  # a shell asks for completions
        root(args=given, prog_name=NAME)
    usage_error: type[Exception] = typer.BadParameter.__bases__[0]  # older releases: click's own
    try:
        with root.make_context(NAME, given) as context:
            code = root.invoke(context)
    except typer.Exit as done:
        return done.exit_code
    except typer.Abort:
        raise KeyboardInterrupt from None
    except usage_error as error:
        raise ConfigError(_usage(error)) from None
    return code if isinstance(code, int) else outcome.GOOD


def _app() -> typer.Typer:
    app = typer.Typer(
        name=NAME,
        cls=Commands,
        invoke_without_command=True,
        context_settings={"help_option_names": ["-h", "--help"]},
    )

    @app.callback()
    def headstart_(
        context: typer.Context,
        version: bool = typer.Option(False, "--version", "-V", help="Print the version and stop."),
    ) -> None:
        """Fine-tune a pretrained network on your own pictures, with the method that earns it.

        New here? Type: headstart demo
        """
        if version:
            print(f"{NAME} {headstart.__version__}")
            raise typer.Exit
        if context.invoked_subcommand is None:
            print(context.get_help())
            raise typer.Exit

    return app


def _command(name: str) -> Any:
    run: Callable[..., int] = import_module(f"headstart.cli.{name}").run
    single = typer.Typer(
        add_completion=False,
        context_settings={"help_option_names": ["-h", "--help"]},
        rich_markup_mode="rich",
    )
    # In brackets rich looks for markup, and swallows what people are to type.
    single.command(name, help=inspect.cleandoc(run.__doc__ or "").replace("[", r"\["))(run)
    return typer.main.get_command(single)


def _usage(error: Any) -> str:
    """A mistake in the flags as one sentence, with the nearest name and where to read on."""
    context = getattr(error, "ctx", None)
    where = NAME if context is None else context.command_path
    option = getattr(error, "option_name", None)
    if option is not None and context is not None and type(error).__name__ == "NoSuchOption":
        names = [name for param in context.command.params for name in (*param.opts, *param.secondary_opts)]
        said = unknown("option", option, [name for name in names if name.startswith("--")])
    else:
        said = str(error.format_message()).replace("\n", " ").strip()
        said = said if said.endswith((".", "?", ")")) else f"{said}."
    return f"{said} See: {where} --help"


def _again(given: list[str]) -> list[str] | None:
    """The command that goes on after this one was interrupted, or None."""
    entry = COMMANDS.get(given[0]) if given else None
    if entry is None or entry.go_on is None:
        return None
    kept = [word for word in given if word not in ("--overwrite", "--no-resume")]
    return [NAME, *kept, *(flag for flag in entry.go_on if flag not in kept)]
