"""Help, exit codes, last words."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pytest
from typed import Typed, typing

import headstart
from headstart.cli import doctor, entry, methods, outcome
from headstart.cli.entry import COMMANDS
from headstart.errors import DataError


@pytest.fixture
def typed(capsys: pytest.CaptureFixture[str]) -> Typed:
    return typing(capsys)


def test_help_is_quick_and_loads_nothing_heavy() -> None:
    code = (
        "import sys, time\n"
        "from headstart.cli import main\n"
        "code = main(['--help'])\n"
        "heavy = {'torch', 'torchvision', 'timm', 'numpy', 'pandas', 'sklearn', 'PIL', 'accelerate'}\n"
        "print(code, time.process_time(), sorted(heavy & set(sys.modules)))"
    )
    took = []
    for _ in range(3):
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        last = done.stdout.splitlines()[-1].split(" ", 2)
        assert last[0] == "0" and last[2] == "[]", last
        took.append(float(last[1]))
    # Seconds of the processor, from the start of Python: what it takes on a machine with nothing else to do.
    assert min(took) < 0.4, took


def test_help_names_every_command(typed: Typed) -> None:
    ended = typed("--help")
    assert ended.code == 0 and ended.err == ""
    for name in COMMANDS:
        assert f" {name} " in ended.out
    assert typed().out == ended.out  # nothing typed: the same


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help_with_an_example(typed: Typed, name: str) -> None:
    ended = typed(name, "--help")
    assert ended.code == 0
    assert f"Example: headstart {name}" in ended.out
    assert typed(name, "-h").out == ended.out


def test_brackets_in_help_are_no_markup(typed: Typed) -> None:
    said = " ".join(typed("compare", "--help").out.replace("│", " ").split())
    assert '--methods "full,l2-sp[alpha=0.01],l2-sp[alpha=0.1]"' in said
    assert "NAME[KEY=VALUE,...]" in said


def test_version(typed: Typed) -> None:
    assert typed("--version").out == f"headstart {headstart.__version__}\n"
    done = subprocess.run(
        [sys.executable, "-m", "headstart", "-V"], capture_output=True, text=True, check=True
    )
    assert done.stdout == f"headstart {headstart.__version__}\n"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("trian",), "Unknown command 'trian'. Did you mean 'train'?"),
        (("frobnicate",), "Unknown command 'frobnicate'. Allowed: demo, check,"),
        (("--versoin",), "Unknown option '--versoin'. Did you mean '--version'? See: headstart --help"),
        (
            ("train", "x", "--epoch", "3"),
            "Unknown option '--epoch'. Did you mean '--epochs'? See: headstart train --help",
        ),
        (("train", "x", "--epochs", "many"), "'--epochs': Input should be a valid integer"),
        (("train", "x", "--epochs"), "'--epochs' requires an argument"),
        (("plan",), "Missing argument"),
        (("data", "digits", "extra", "--out", "x"), "extra"),
        (("plan", "full", "--classes", "1"), "'--classes'"),
    ],
)
def test_usage_errors_are_one_line_and_1(typed: Typed, words: tuple[str, ...], said: str) -> None:
    refusal = typed(*words).refusal
    assert said in refusal
    assert "\n" not in refusal


def raising(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    def fail(**_: object) -> int:
        raise error

    monkeypatch.setattr(entry, "_command", lambda name: _Fails(fail))


class _Fails:
    def __init__(self, fail: object) -> None:
        self.fail = fail
        self.name = "train"

    def make_context(self, name: str, args: list[str], parent: object) -> _Fails:
        return self

    def __enter__(self) -> _Fails:
        return self

    def __exit__(self, *_: object) -> None: ...

    @property
    def command(self) -> _Fails:
        return self

    def invoke(self, context: object) -> int:
        return self.fail()  # type: ignore[operator, no-any-return]


def test_our_own_errors_are_said_as_they_are(typed: Typed, monkeypatch: pytest.MonkeyPatch) -> None:
    raising(monkeypatch, DataError("No pictures.\nLook elsewhere."))
    assert typed("train").refusal == "headstart: No pictures.\nLook elsewhere."


def test_what_the_machine_refuses_is_no_bug(typed: Typed, monkeypatch: pytest.MonkeyPatch) -> None:
    raising(monkeypatch, OSError(errno.ENOSPC, "No space left on device", "big.pt"))
    assert typed("train").refusal == "headstart: big.pt: No space left on device."


def test_a_bug_is_one_line_and_a_file(typed: Typed, monkeypatch: pytest.MonkeyPatch) -> None:
    raising(monkeypatch, ZeroDivisionError("by\nzero"))
    ended = typed("train")
    assert ended.code == 1
    first, second = ended.err.splitlines()
    assert first == "headstart: ZeroDivisionError: by zero"
    assert second.startswith("This is a bug in headstart; details: ")
    details = Path(second.partition("details: ")[2])
    assert details.is_relative_to(os.environ["HEADSTART_CACHE"])
    assert "Traceback" in details.read_text() and "ZeroDivisionError" in details.read_text()


def test_a_bug_where_no_cache_can_be_written(
    typed: Typed, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("HEADSTART_CACHE", str(tmp_path / "file"))
    raising(monkeypatch, KeyError("k"))
    details = Path(typed("train").err.partition("details: ")[2].strip())
    assert "KeyError" in details.read_text()
    details.unlink()


def test_debugging_shows_the_traceback(typed: Typed, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HEADSTART_DEBUG", "1")
    raising(monkeypatch, DataError("x"))
    assert "Traceback" in typed("train").err


@pytest.mark.parametrize(
    ("words", "again"),
    [
        ("train a b --out 'o o' --overwrite", "headstart train a b --out 'o o' --resume"),
        ("train a --out o --resume", "headstart train a --out o --resume"),
        ("compare a --out o", "headstart compare a --out o"),
    ],
)
def test_an_interrupt_says_how_to_go_on(
    typed: Typed, monkeypatch: pytest.MonkeyPatch, words: str, again: str
) -> None:
    import shlex

    raising(monkeypatch, KeyboardInterrupt())
    ended = typed(*shlex.split(words))
    assert ended.code == 130
    assert ended.err == f"headstart: interrupted. Go on with: {again}\n"


def test_an_interrupt_of_what_leaves_nothing(typed: Typed, monkeypatch: pytest.MonkeyPatch) -> None:
    raising(monkeypatch, KeyboardInterrupt())
    assert typed("doctor") == (130, "", "headstart: interrupted.\n")


def test_sigterm_is_an_interrupt(typed: Typed, monkeypatch: pytest.MonkeyPatch) -> None:
    def killed(**_: object) -> int:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(5)
        return 0

    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(entry, "_command", lambda name: _Fails(killed))
    assert typed("train").code == 130
    assert signal.getsignal(signal.SIGTERM) == before


def test_pressing_again_and_again_is_quiet() -> None:
    """Ctrl-C five times, the later ones while Python shuts down: one line and no traceback."""
    script = (
        "import atexit, os, signal, sys\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "press = lambda: os.kill(os.getpid(), signal.SIGINT)\n"
        "from headstart.cli import doctor, entry, main\n"
        "entry._command = lambda name: press()\n"
        "atexit.register(lambda: [press() for _ in range(4)])\n"
        "sys.argv = ['headstart', 'compare', 'a']\n"
        "sys.exit(main())\n"
    )
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stderr) == (
        130,
        "headstart: interrupted. Go on with: headstart compare a\n",
    )


def test_ctrl_c_before_all_is_loaded() -> None:
    script = (
        "import sys\n"
        "class Press:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name == 'typer':\n"
        "            raise KeyboardInterrupt\n"
        "sys.meta_path.insert(0, Press())\n"
        "from headstart.cli import main\n"
        "sys.exit(main())\n"
    )
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stderr) == (130, "")


def test_a_closed_pipe_is_quiet() -> None:
    for words in (["--help"], ["--version"]):
        with subprocess.Popen(
            [sys.executable, "-m", "headstart", *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE
        ) as process:
            assert process.stdout is not None and process.stderr is not None
            process.stdout.close()
            said = process.stderr.read()
            process.wait()
        assert (process.returncode, said) == (0, b"")


def test_shell_completion_knows_the_commands() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "headstart"],
        env={
            **os.environ,
            "_HEADSTART_COMPLETE": "complete_bash",
            "COMP_WORDS": "headstart tr",
            "COMP_CWORD": "1",
        },
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout.split() == ["train"], done


def test_only_the_first_of_several_processes_speaks(monkeypatch: pytest.MonkeyPatch) -> None:
    assert outcome.is_main()
    monkeypatch.setenv("RANK", "1")
    assert not outcome.is_main()


def test_commands_and_modules_agree() -> None:
    folder = Path(entry.__file__).parent
    shared = {"__init__", "answers", "asked", "entry", "options", "outcome", "progress"}
    assert {path.stem for path in folder.glob("*.py")} - shared == set(COMMANDS)
    assert all(callable(module.run) for module in (doctor, methods))


def test_json_keeps_names_readable(capsys: pytest.CaptureFixture[str]) -> None:
    outcome.show_json({"Kläranlage": Path("a")})
    said = capsys.readouterr().out
    assert "Kläranlage" in said and json.loads(said) == {"Kläranlage": "a"}


def test_a_warning_says_what_is_wrong_and_not_where(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(warnings, "formatwarning", warnings.formatwarning)  # put back afterwards
    assert entry.main(["--version"]) == 0
    said = warnings.formatwarning(UserWarning("tau means little"), UserWarning, __file__, 1)
    assert said == "note: tau means little\n"
