"""The command line: parse, load the configuration, call one function, print."""

from __future__ import annotations

import argparse
import difflib
import json
import os
import re
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, is_dataclass
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import tyro
from rich.console import Console
from rich.table import Table

from equipoise.building import Method, defaults
from equipoise.config import CompareConfig, RunConfig, TrainConfig, load
from equipoise.errors import UserError
from equipoise.methods import METHODS, find

DONE, FAILED, MISUSE = 0, 1, 2


@dataclass(frozen=True, kw_only=True)
class GenerateConfig:
    """Let a trained model continue a text."""

    run: Annotated[Path, tyro.conf.Positional]
    """Folder of a finished `equipoise train`."""
    prompt: str = "\n"
    """Text to continue."""
    tokens: int = 200
    """Tokens to add."""
    temperature: float = 0.8
    """0 takes the likeliest token; higher is wilder."""
    top_p: float = 1.0
    """Draw from the likeliest tokens that hold this share of the probability."""
    seed: int = 0
    """Seed of the draws."""


@dataclass(frozen=True, kw_only=True)
class MethodsConfig:
    """List the balancing methods, or show one."""

    name: Annotated[str | None, tyro.conf.Positional] = None
    """A method; all of them if not given."""


def _train(config: TrainConfig, as_json: bool) -> None:
    from equipoise.training.loop import train

    result = train(config)
    if int(os.environ.get("RANK", "0")) > 0:
        return  # torchrun's other ranks have the same result
    if as_json:
        _print_json(result)
        return
    print(
        f"{result['method']}: perplexity {result['perplexity']:.3f} ({result['loss']:.4f} nats per token), MaxVio "
        f"{result['max_vio_global']:.2f}, {result['dead_experts']} dead experts, {result['steps']} steps, "
        f"{result['tokens_per_second']:,.0f} tokens/s.\nWeights, metrics and checkpoints: {config.out}"
    )


def _compare(config: CompareConfig, as_json: bool) -> None:
    from equipoise.report.table import table
    from equipoise.training.compare import REPORT_FILE, compare

    results = compare(config)
    if as_json:
        _print_json(results)
        return
    Console().print(table(results))
    flops, rule = results["budget"]["flops"], config.optimizer
    counts = sorted({run["steps"] for run in results["runs"]})
    steps = f"{counts[0]} to {counts[-1]}" if len(counts) > 1 else f"{counts[0]}"
    print(
        f"Each run: {flops:.3g} FLOPs, {steps} steps; the learning rate rises to {rule.learning_rate:g} in the first "
        f"{rule.warmup:.0%} and falls to {rule.min_learning_rate:g}.\nReport: {Path(config.out) / REPORT_FILE}"
    )


def _generate(config: GenerateConfig, as_json: bool) -> None:
    from equipoise.training.sampling import continue_text

    pieces = continue_text(config.run, config.prompt, config.tokens, config.temperature, config.top_p, config.seed)
    if as_json:
        _print_json({"prompt": config.prompt, "text": "".join(pieces)})
        return
    print(config.prompt, end="", flush=True)
    for piece in pieces:
        print(piece, end="", flush=True)
    print()


def _methods(config: MethodsConfig, as_json: bool) -> None:
    chosen = [find(config.name)] if config.name else list(METHODS.values())
    if as_json:
        _print_json([_facts(method) for method in chosen])
        return
    table = Table("method", "what it does", "parts", "source")
    for method in chosen:
        table.add_row(method.name, method.summary, ", ".join(method.parts), method.source)
    Console().print(table)
    if config.name:
        print("Settings:", ", ".join(f"{name}={value}" for name, value in defaults(chosen[0]).items()))


def _facts(method: Method) -> dict[str, Any]:
    return asdict(method) | {"settings": defaults(method), "causal": method.causal, "state": method.state}


COMMANDS: dict[str, tuple[type, Callable[[Any, bool], None], str, str]] = {
    "compare": (
        CompareConfig,
        _compare,
        "Train balancing methods side by side at equal FLOPs on a text, and report.",
        "equipoise compare --methods switch loss_free --minutes 4 --data my_texts/",
    ),
    "train": (
        TrainConfig,
        _train,
        "Train one decoder; started again, it resumes. Under torchrun, on many ranks.",
        "equipoise train --method loss_free --steps 500 --out runs/mine",
    ),
    "generate": (
        GenerateConfig,
        _generate,
        "Let a trained model continue a text.",
        'equipoise generate runs/mine --prompt "def main("',
    ),
    "methods": (MethodsConfig, _methods, "List the balancing methods.", "equipoise methods loss_free --json"),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command. Returns the exit code: 0 done, 1 failed, 2 misuse, 128 + number after a signal."""
    words = list(sys.argv[1:] if arguments is None else arguments)
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
    from equipoise.training.run import Interrupted

    kind, function, summary, example = COMMANDS[command]
    common = argparse.ArgumentParser(f"equipoise {command}", add_help=False, allow_abbrev=False)
    common.add_argument("--json", action="store_true")
    takes_file = issubclass(kind, RunConfig)
    if takes_file:
        common.add_argument("--config")
    try:
        known, rest = common.parse_known_args(words)
        _refuse_unknown_flags(command, rest)
        given: dict[str, Any] = {"default": load(kind, known.config)} if takes_file and known.config else {}
        about = f"{summary} --json prints the result as JSON."
        about += " --config FILE reads settings from TOML, which flags override." if takes_file else ""
        config = tyro.cli(
            kind,
            args=rest,
            prog=f"equipoise {command}",
            description=f"{about} Example: {example}",
            config=(tyro.conf.OmitArgPrefixes,),
            **given,
        )
        function(config, known.json)
        sys.stdout.flush()
    except UserError as error:
        print(f"equipoise: {error}", file=sys.stderr)
        return MISUSE
    except Interrupted as stop:
        print(f"equipoise: {stop}", file=sys.stderr)
        return 128 + stop.signal
    except BrokenPipeError:  # `| head` has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED
    except KeyboardInterrupt:
        print("equipoise: Stopped by SIGINT.", file=sys.stderr)
        return 128 + signal.SIGINT
    except SystemExit as stop:  # tyro's own, after --help or an unknown flag
        return stop.code if isinstance(stop.code, int) else MISUSE
    return DONE


def _refuse_unknown_flags(command: str, words: list[str]) -> None:
    """Fails: UserError for a flag that is unknown, with the nearest, or given twice, which would drop the first."""
    flags = ["--help", "--json", *_flags(COMMANDS[command][0])]
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
    lines = [f"  {name:10} {summary}" for name, (_, _, summary, _) in COMMANDS.items()]
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


def _print_json(value: Any) -> None:
    print(json.dumps(value, indent=1))
