import re
import subprocess
import sys

import pytest
import torch

from equipoise.errors import UserError
from equipoise.training import checkpoint
from training.checkpoint_cases import names, no_file_above, three, values

KILLED = """
import itertools, os, random, shutil, signal, sys, time
from pathlib import Path
import torch
from equipoise.training import checkpoint

folder = Path(sys.argv[1])
torch.set_num_threads(1)

def save(step):
    tensors = {"a": torch.full((1009,), step), "b": torch.full((31, 7), step / 3)}
    checkpoint.save(folder, step, tensors, {"at": step}, keep=1)

def check(*steps):
    tensors = {"a": torch.zeros(1009, dtype=torch.int64), "b": torch.zeros(31, 7)}
    loaded = checkpoint.load(folder, tensors)
    assert loaded.step in steps, (loaded, steps)
    assert loaded.state == {"at": loaded.step}
    assert (tensors["a"] == loaded.step).all() and (tensors["b"] == torch.tensor(loaded.step / 3)).all()
    return loaded.step

def run(child):
    pid = os.fork()
    if pid == 0:
        child()
        os._exit(0)
    return pid

def kill_at(event, step):
    changes = itertools.count()
    def hook(name, arguments):
        opened = name == "open" and str(arguments[0]).startswith(str(folder))
        if (opened or name in ("os.mkdir", "os.rename", "os.remove", "os.rmdir")) and next(changes) == event:
            os.kill(os.getpid(), signal.SIGKILL)
    sys.addaudithook(hook)
    save(step)

# Before every single change of the file system that a save makes: of a later step, the same step, and an earlier step.
for before, step in ((7, 8), (7, 7), (9, 8)):
    seen = set()
    for event in range(1000):
        shutil.rmtree(folder, ignore_errors=True)
        save(before)
        killed = os.WIFSIGNALED(os.waitpid(run(lambda: kill_at(event, step)), 0)[1])
        seen.add(check(before, step))
        save(10)
        assert os.listdir(folder) == ["step-00000010"], os.listdir(folder)
        if not killed:
            break
    assert seen == {before, step}
    assert event > 10

# At random moments of saves one after the other.
random.seed(0)
step = check(10)
for _ in range(5):
    pid = run(lambda: [save(later) for later in range(step + 1, step + 1000)])
    while checkpoint.latest(folder).name == f"step-{step:08d}":
        time.sleep(0.001)
    time.sleep(random.random() / 20)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    step = check(*range(step + 1, step + 1000))
"""


def test_killed_at_any_moment_the_last_checkpoint_stays(tmp_path):
    done = subprocess.run([sys.executable, "-c", KILLED, tmp_path / "run"], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_a_full_disk_leaves_the_last_checkpoint(tmp_path):
    three(tmp_path)
    before = names(tmp_path)
    with no_file_above(1000), pytest.raises(UserError) as caught:
        checkpoint.save(tmp_path, 9, values(), {}, keep=1)
    assert str(caught.value) == (
        f"Cannot write the checkpoint of step 9 to {tmp_path}: File too large; make room or choose another folder "
        "(the last good checkpoint, step-00000007, is kept)."
    )
    assert names(tmp_path) == before
    assert checkpoint.load(tmp_path, values()).step == 7


def test_a_disk_that_is_full_at_the_manifest_leaves_nothing(tmp_path):
    state = {"long": "x" * 100_000}
    with no_file_above(50_000), pytest.raises(UserError, match=re.escape("(there is no earlier one).")):
        checkpoint.save(tmp_path, 9, values(), state, keep=1)
    assert names(tmp_path) == []


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=re.escape(f"to {tmp_path / 'file' / 'run'}: Not a directory; ")):
        checkpoint.save(tmp_path / "file" / "run", 9, values(), {}, keep=1)


def test_an_error_of_ours_is_not_hidden(tmp_path):
    with pytest.raises(TypeError, match="not JSON serializable"):
        checkpoint.save(tmp_path, 9, values(), {"tensor": torch.zeros(1)}, keep=1)
