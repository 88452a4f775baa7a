"""Whatever a user can mend is one sentence and exit code 2, and nothing is lost."""

import shutil
from functools import partial
from pathlib import Path

import pytest
import torch

from equipoise import cli
from equipoise.commands import COMMANDS
from equipoise.config import TrainConfig
from equipoise.training.checkpoint import latest
from equipoise.training.loop import WEIGHTS_FILE
from equipoise.training.run import CHECKPOINTS, RESULT_FILE, claim
from tiny_commands import tiny_command
from tiny_runs import Killed, no_file_above, stopped_before, write_text


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    return write_text(tmp_path_factory.mktemp("text"))


@pytest.fixture
def words(text: Path, tmp_path: Path):
    return partial(tiny_command, text, tmp_path / "out")


@pytest.fixture(scope="module")
def finished(text: Path, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("finished")
    assert cli.main(tiny_command(text, folder)) == 0
    return folder


@pytest.fixture
def refused(capfd):
    """Runs a command that must be refused, and returns its sentence."""

    def refused(command: list[str]) -> str:
        capfd.readouterr()
        assert cli.main(command) == cli.MISUSE == 2
        out, err = capfd.readouterr()
        assert out == ""
        assert err.startswith("equipoise: ")
        assert err.count("\n") == 1
        assert err[-2] in ".?"
        return err[len("equipoise: ") : -1]

    return refused


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        ("--method los_free", "Unknown method 'los_free' (did you mean 'loss_free'?); there are unbalanced, "),
        ("--set bias.rat=1", "Method 'loss_free' has no setting 'bias.rat' (did you mean 'bias.rate'?); "),
        ("--set nonsense", "model.set must be a text such as bias.rate=1e-3, not 'nonsense'."),
        ("--lerning-rate 1", "Unknown option --lerning-rate; did you mean --learning-rate?"),
        ("--learning_rat=1", "Unknown option --learning-rat; did you mean --learning-rate?"),
        ("--frobnicate", "Unknown option --frobnicate; equipoise train --help lists them."),
        ("--top-k 5", "top_k must be at most num_experts (4), not 5."),
        ("--top-k 0", "model.top_k must be a whole number above 0, not 0."),
        ("--num-experts -1", "model.num_experts must be a whole number above 0, not -1."),
        ("--dim 18", "dim must be a multiple of 2 * num_heads (4), not 18."),
        ("--batch-size 5 --grad-accumulation 2", "batch_size must be a multiple of grad_accumulation (2), not 5."),
        ("--dense-layers 3", "dense_layers must be at most 2, not 3."),
        ("--flops 1e9", "Give exactly one of steps and flops, not both."),
        ("--tokenizer bpe:10", "There is no tokenizer 'bpe:10'; name 'bytes', or 'bpe:4096' with any size above 256."),
        (
            "--method expert_choice",
            "expert_choice looks at later tokens, so evaluating it left to right would be wrong; ",
        ),
        ("--learning-rate 1e30 --min-learning-rate 0 --warmup 0", "Step 2, "),
        ("--config nowhere.toml", "Cannot read the configuration nowhere.toml: No such file or directory."),
    ],
)
def test_a_wrong_setting_is_one_sentence(words, refused, more: str, sentence: str) -> None:
    assert refused(words(more)).startswith(sentence)


@pytest.mark.parametrize("command", ["train", "compare"])
@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("empty.txt", b"", "is empty; name a file with text."),
        ("blank.txt", b" \n\n", "is empty; name a file with text."),
        (
            "binary.txt",
            bytes(range(256)) * 99,
            "is not UTF-8 text; save it as UTF-8, leave it out, or name a folder of",
        ),
        ("short.txt", b"to be", "The corpus is a single document, so nothing can be held out for validation; add"),
        (
            "short.jsonl",
            b'{"text": "to"}\n{"text": "be"}\n',
            "The text has 3 tokens, but one sequence of seq_len 16 takes 17",
        ),
        ("broken.jsonl", b'{"text": "to"}\n{"tex": "be"}\n', "line 2: a line of a .jsonl file must be"),
        ("absent.txt", None, "There is no file or folder"),
    ],
)
def test_a_wrong_text_is_one_sentence_and_keeps_the_folder_free(
    words, refused, tmp_path: Path, command: str, name: str, content: bytes | None, sentence: str
) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    assert sentence in refused(words(f"--data {tmp_path / name}", command))
    assert not (tmp_path / "out" / RESULT_FILE).exists()
    assert cli.main(words()) == 0


def test_a_flag_given_twice_is_one_sentence(words, refused) -> None:
    assert refused([*words(), "--seed", "1", "--seed=2"]) == (
        "Option --seed is given twice; give all its values after one --seed."
    )


def test_a_wrong_file_names_the_nearest_key(words, refused, tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text("[optimizer]\nlerning_rate = 1\n")
    assert refused(words(f"--config {path}")) == (
        f"{path}: unknown key optimizer.lerning_rate; did you mean optimizer.learning_rate or "
        "optimizer.min_learning_rate?"
    )
    path.write_text("steps = 'many'\n")
    assert refused(words(f"--config {path}")) == f"{path}: steps must be a whole number above 0, not 'many'."


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ("trian", "Unknown command 'trian'; did you mean train?"),
        ("xyz", f"Unknown command 'xyz'; there are {', '.join(COMMANDS)}."),
        ("methods --jsn", "Unknown option --jsn; did you mean --json?"),
        ("methods --hlp", "Unknown option --hlp; did you mean --help?"),
        ("methods loss_fre", "Unknown method 'loss_fre' (did you mean 'loss_free'?); there are "),
        (
            "generate nowhere",
            "nowhere holds no finished run (model.safetensors is missing); finish `equipoise train` first.",
        ),
        ("compare --flops 1e7 --methods unbalanced swich", "Unknown method 'swich' (did you mean 'switch'?); "),
        ("compare --flops 1e7 --minutes 1", "Give exactly one of flops, minutes and isoflop, not flops and minutes."),
        ("compare --flops 1e7 --methods switch switch", "methods must name each method once, not switch, switch."),
        ("compare --flops 1e7 --top-k 99", "top_k must be at most num_experts (16), not 99."),
        ("compare --steps 5", "Unknown option --steps; "),
        ("compare --method switch", "A comparison takes several methods; give --methods, not --method."),
    ],
)
def test_a_wrong_command_is_one_sentence(refused, line: str, sentence: str) -> None:
    assert refused(line.split()).startswith(sentence)


def test_generation_out_of_range_is_one_sentence(finished: Path, refused) -> None:
    """Before anything is printed."""
    for flags, sentence in (
        ("--top-p 3", "top_p=3.0 is no probability"),
        ("--temperature -1", "temperature=-1.0 is no temperature"),
        ("--tokens -1", "num_tokens=-1 is negative"),
    ):
        assert refused(["generate", str(finished), *flags.split()]).startswith(sentence)


def test_what_a_flag_cannot_hold_is_said_without_a_traceback(words, capfd) -> None:
    for more in ("--steps many", "--device tpu", "--config"):
        assert cli.main(words(more)) == 2
        out, err = capfd.readouterr()
        assert out == ""
        assert more.split()[0] in err
        assert "Traceback" not in err


def test_a_damaged_checkpoint_is_refused_until_the_one_before_is_allowed(words, refused, tmp_path: Path) -> None:
    with pytest.raises(Killed), stopped_before(5):
        cli.main(words())
    checkpoints = tmp_path / "out" / CHECKPOINTS
    assert latest(checkpoints).name == "step-00000004"
    file = next(latest(checkpoints).glob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:-1])  # truncated
    sentence = refused(words())
    assert f"{file} is damaged: " in sentence
    assert sentence.endswith("; --allow-previous takes the one before it.")
    assert cli.main(words("--allow-previous")) == 0


def test_another_configuration_or_thread_count_is_refused(words, refused, tmp_path: Path) -> None:
    with pytest.raises(Killed), stopped_before(4):
        cli.main(words())
    assert refused(words("--top-k 1 --seed 3")) == (
        f"{tmp_path / 'out'} holds results of another configuration (model.top_k, seed); choose another --out, or "
        "remove the folder."
    )
    try:
        assert refused(words("--threads 2")) == (
            "The run cannot continue bit for bit: threads was 1 and is 2. Resume it where it ran, or pass "
            "--allow-inexact."
        )
    finally:
        torch.set_num_threads(1)


def test_two_processes_in_one_folder_are_refused(words, refused, tmp_path: Path) -> None:
    with claim(tmp_path / "out", TrainConfig(), set()):
        assert refused(words()) == (
            f"Another process is working in {tmp_path / 'out'}; wait for it, or choose another --out."
        )


def test_a_full_disk_is_one_sentence_and_keeps_the_checkpoint(words, refused, tmp_path: Path) -> None:
    with pytest.raises(Killed), stopped_before(4):
        cli.main(words())
    with no_file_above(20_000):
        sentence = refused(words())
    assert sentence.startswith("Cannot write the checkpoint of step 4 to ")
    assert "the last good checkpoint, step-00000002, is kept" in sentence
    assert cli.main(words()) == 0


def test_a_folder_that_cannot_be_written_is_one_sentence(words, refused, tmp_path: Path) -> None:
    (tmp_path / "out").write_text("a file")
    assert refused(words()) == (
        f"Cannot write {tmp_path / 'out'} (File exists); make room or choose another --out: what was saved before is "
        "kept."
    )


def test_a_missing_weight_file_of_a_finished_run_is_one_sentence(finished: Path, refused, tmp_path: Path) -> None:
    copy = shutil.copytree(finished, tmp_path / "copy")
    (copy / WEIGHTS_FILE).write_bytes(b"not weights")
    assert refused(["generate", str(copy)]).startswith(f"{copy / WEIGHTS_FILE} does not hold this model's weights (")
