"""The words of commands that train tiny runs."""

import re
from pathlib import Path

TINY = (
    "--dim 16 --num-layers 2 --num-heads 2 --hidden-dim 16 --num-experts 4 --seq-len 16 --batch-size 4 --threads 1 "
    "--validation-tokens 128"
)
OWN = {
    "train": "--method loss_free --steps 5 --checkpoint-every 2 --log-every 1 --no-tensorboard",
    "compare": "--flops 2e7 --methods loss_free",
}


def tiny_command(text: Path, out: Path, more: str = "", command: str = "train") -> list[str]:
    """The words of a tiny training or comparison, with these flags in place of its own."""
    flags = _flags(f"{TINY} {OWN[command]} --data {text} --out {out}") | _flags(more)
    return [command, *(word for flag in flags.values() for word in flag)]


def _flags(line: str) -> dict[str, list[str]]:
    """The words of each flag, by its name."""
    return {each.split()[0]: each.split() for each in re.findall(r"--\S+(?: (?!--)\S+)*", line)}
