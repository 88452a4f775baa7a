"""The command line: parse, load the configuration, call one function, print."""

from __future__ import annotations

import argparse
import difflib
import importlib
import os
import re
import signal
import sys
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import is_dataclass
from typing import Any, get_type_hints

import tyro

from equipoise.commands import COMMANDS
from equipoise.config import RunConfig
from equipoise.errors import Interrupted, UserError
from equipoise.toml import load

DONE, FAILED, MISUSE = 0, 1, 2


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command. Returns the exit code: 0 done, 1 failed, 2 misuse, 128 + number after a signal."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    try:
        code = _main(words)
        sys.stdout.flush()
        return code
    except BrokenPipeError:  # `| head` has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED


def _main(words: list[str]) -> int:
    if not words or words[0] in ("-h", "--help"):
        print(_overview())
        return DONE if words else MISUSE
    if words[0] == "--version":
        from equipoise import __version__

        print(__version__)
        return DONE
    if words[0] not in COMMANDS:
        near = difflib.get_close_matches(words[0], COMMANDS, n=1)
        hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(COMMANDS)}."
        print(f"equipoise: Unknown command {words[0]!r}; {hint}", file=sys.stderr)
        return MISUSE
    return _run(words[0], words[1:])


def _run(command: str, words: list[str]) -> int:
    name, summary = COMMANDS[command]
    module = importlib.import_module(f"equipoise.commands.{name}")
    kind: type = module.Config
    common = argparse.ArgumentParser(f"equipoise {command}", add_help=False, allow_abbrev=False)
    common.add_argument("--json", action="store_true")
    takes_file = issubclass(kind, RunConfig)
    if takes_file:
        common.add_argument("--config")
    try:
        known, rest = common.parse_known_args(words)
        _refuse_unknown_flags(command, kind, rest)
        given: dict[str, Any] = {"default": load(kind, known.config)} if takes_file and known.config else {}
        about = f"{summary} --json prints the result as JSON."
        about += " --config FILE reads settings from TOML, which flags override." if takes_file else ""
        config = tyro.cli(
            kind,
            args=rest,
            prog=f"equipoise {command}",
            description=f"{about} Example: {module.EXAMPLE}",
            config=(tyro.conf.OmitArgPrefixes,),
            **given,
        )
        with warnings.catch_warnings():
            warnings.showwarning = _show_warning
            module.run(config, known.json)
    except UserError as error:
        print(f"equipoise: {error}", file=sys.stderr)
        return MISUSE
    except Interrupted as stop:
        print(f"equipoise: {stop}", file=sys.stderr)
        return 128 + stop.signal
    except KeyboardInterrupt:
        print("equipoise: Stopped by SIGINT.", file=sys.stderr)
        return 128 + signal.SIGINT
    except SystemExit as stop:  # tyro's own, after --help or an unknown flag
        return stop.code if isinstance(stop.code, int) else MISUSE
    return DONE


def _show_warning(message: Warning | str, *where: Any) -> None:
    """One sentence, as for errors: the line of code it comes from helps nobody here."""
    print(f"equipoise: {message}", file=sys.stderr)


def _refuse_unknown_flags(command: str, kind: type, words: list[str]) -> None:
    """Fails: UserError for a flag that is unknown, with the nearest, or given twice, which would drop the first."""
    flags = ["--help", "--json", *_flags(kind)]
    given = [word.partition("=")[0].replace("_", "-") for word in words if re.match("--[a-z]", word)]
    if command == "compare" and "--method" in given:
        raise UserError("A comparison takes several methods; give --methods, not --method.")
    for flag in given:
        if given.count(flag) > 1:
            raise UserError(f"Option {flag} is given twice; give all its values after one {flag}.")
        if flag not in flags and flag.replace("--no-", "--") not in flags:
            near = difflib.get_close_matches(flag, flags, n=1)
            hint = f"did you mean {near[0]}?" if near else f"equipoise {command} --help lists them."
            raise UserError(f"Unknown option {flag}; {hint}")


def _flags(kind: type) -> Iterator[str]:
    """The flags of a configuration, as tyro names them."""
    for name, hint in get_type_hints(kind, include_extras=True).items():
        if is_dataclass(hint):
            yield from _flags(hint)  # type: ignore
        else:
            renamed = [note.name for note in getattr(hint, "__metadata__", ()) if getattr(note, "name", None)]
            yield f"--{renamed[0] if renamed else name}".replace("_", "-")


def _overview() -> str:
    lines = [f"  {name:16} {summary}" for name, (_, summary) in COMMANDS.items()]
    return "\n".join(
        [
            "equipoise: keep the experts of a sparse Mixture-of-Experts evenly used.",
            "",
            *lines,
            "",
            "equipoise COMMAND --help explains a command. Example: equipoise compare --minutes 4",
            "Exit codes: 0 done, 1 failed, 2 misuse or bad input, 128 + number after a signal.",
        ]
    )
