"""The grid of sizes at equal FLOPs: which models, which budgets, and that the runs can be fitted."""

import csv
import json
from dataclasses import replace
from pathlib import Path

import pytest

from equipoise.config import CompareConfig, DataConfig, ModelConfig, OptimizerConfig
from equipoise.errors import UserError
from equipoise.models.decoder import Decoder
from equipoise.scaling.planning import PlannedRun
from equipoise.scaling.runs import read_runs
from equipoise.training import child
from equipoise.training import isoflop as module
from equipoise.training.contenders import contenders
from equipoise.training.run import RESULT_FILE, RUNS
from equipoise.training.text import read_text
from tiny_runs import Killed, no_file_above, write_text

MODEL = ModelConfig(dim=16, num_heads=1, num_layers=2, hidden_dim=8, num_experts=4, top_k=1)


def config(**changes) -> CompareConfig:
    given = {"methods": ("switch",), "isoflop": "2e9,4e9", "model": MODEL, "threads": 1}
    return CompareConfig(**(given | changes))


def test_a_size_counts_what_a_token_visits_and_what_there_is():
    size = module._size(MODEL, 32, vocab_size=256, seq_len=8)
    assert (size.model.dim, size.model.hidden_dim) == (32, 16)
    decoder = Decoder(size.model, 256)
    assert size.total == sum(weight.numel() for weight in decoder.parameters())
    expert = 3 * 32 * 16
    assert size.total - size.params == 2 * 3 * expert  # of each layer's four experts a token visits one


def test_a_shared_pool_counts_once():
    """Also where the method comes from the comparison, not from its model."""
    size = module._size(replace(MODEL, method="unipool"), 32, vocab_size=256, seq_len=8)
    expert = 3 * 32 * 16
    assert size.total - size.params == (8 - 2) * expert
    base = config(methods=("unipool",), isoflop="1e11,4e11")
    sizes, _ = module._grid(base, contenders(base)["unipool"], 256)
    same = next(each for each in sizes if each.model.dim == 32)
    assert (same.model.method, same.total - same.params) == ("unipool", (8 - 2) * expert)


def test_every_budget_gets_sizes_around_what_it_pays_for():
    base = config(isoflop="1e11,4e11")
    (row,) = contenders(base).values()
    sizes, plan = module._grid(base, row, 256)
    assert [run.budget for run in plan] == [1e11] * 7 + [4e11] * 7
    for run in plan:
        assert run.params == sizes[run.size].params
        assert run.tokens == run.budget / sizes[run.size].flops_per_token
    small, large = plan[3].params, plan[10].params
    assert 1.6 < large / small < 2.5  # the best size grows with the root of the budget


def test_under_a_schedule_a_run_lasts_as_long_as_its_budget():
    """Planned as the trainer will count it: 9 steps with four experts per token, then as many with one as are left."""
    base = config(methods=("loss_free",), model=replace(MODEL, sparsity=("0:4", "9:1")))
    (row,) = contenders(base).values()
    size = module._size(row.run(base, row.items, seed=0, out="out").model, 32, vocab_size=256, seq_len=8)
    early, late = (size.ledger.per_token(step).total for step in (0, 9))
    tokens = base.optimizer.batch_size * base.data.seq_len
    budget = float(tokens * (9 * early + 20 * late))
    planned = PlannedRun(budget=budget, size=0, params=float(size.params), tokens=budget / early)
    run = module._run(base, row, size, planned, seed=0)
    assert run.log_every == 29 // 10
    assert run.checkpoint_every == 50
    assert run.model.set == row.scaled(29)


def test_under_a_schedule_a_size_counts_what_a_token_visits_at_the_end():
    size = module._size(replace(MODEL, sparsity=("0:4", "5:3,2", "9:1,2")), 32, vocab_size=256, seq_len=8)
    expert = 3 * 32 * 16
    assert size.total - size.params == (3 + 2) * expert
    assert size.flops_per_token == size.ledger.per_token(9).total < size.ledger.per_token(5).total


def test_the_narrowest_size_has_experts_of_width_one():
    """Widths are multiples of twice the heads, up to eight times the configuration's own."""
    base = config(isoflop="1e11,4e11", model=replace(MODEL, hidden_dim=1))
    (row,) = contenders(base).values()
    sizes, _ = module._grid(base, row, 256)
    assert [size.model.dim for size in sizes] == list(range(2, 129, 2))
    assert [size.model.hidden_dim for size in sizes] == [max(1, round(dim / 16)) for dim in range(2, 129, 2)]


def test_a_run_of_the_grid_is_its_contenders_at_this_size_budget_and_seed():
    base = config(methods=("loss_free",), sweep=("top_k.drop=score,position",), device="cpu")
    row = contenders(base)["loss_free top_k.drop=position"]
    size = module._size(row.run(base, row.items, seed=0, out="out").model, 32, vocab_size=256, seq_len=8)
    tokens = base.optimizer.batch_size * base.data.seq_len
    few, many = (float(steps * tokens * size.flops_per_token) for steps in (0.4, 3000))
    short, long = (module._run(base, row, size, PlannedRun(flops, 0, 1.0, 1.0), seed=3) for flops in (few, many))
    assert (short.model.dim, short.model.hidden_dim, short.model.method) == (32, 16, "loss_free")
    assert (short.seed, short.flops, short.steps, short.device) == (3, few, None, "cpu")
    assert Path(short.out) == Path(base.out, RUNS, f"loss_free-top_k.drop=position-{few:g}-dim32-seed3")
    assert short.model.set == ("top_k.drop=position", "bias.rate=1.5")
    assert long.model.set == ("top_k.drop=position", "bias.rate=0.001")
    assert [(run.log_every, run.checkpoint_every) for run in (short, long)] == [(1, 50), (300, 3000)]


@pytest.mark.parametrize("words", ["0,1e9", "1e9,e", "1.2.3,1e9"])
def test_budgets_must_be_numbers_above_zero(words):
    with pytest.raises(UserError, match="isoflop must list budgets above 0"):
        module.budgets(config(isoflop=words))


def test_budgets_whose_runs_would_share_a_folder_are_refused():
    with pytest.raises(UserError, match="must differ in their first six digits"):
        module.budgets(config(isoflop="1.0000001e11,1.0000002e11"))
    assert module.budgets(config(isoflop="1.00001e11,1.00002e11")) == [1.00001e11, 1.00002e11]


def test_budgets_that_no_size_fits_are_refused_before_anything_is_trained(tmp_path: Path):
    data = DataConfig(source=str(write_text(tmp_path / "text")), seq_len=16, validation_tokens=128)
    with pytest.raises(UserError, match="candidate sizes"):
        module.isoflop(config(isoflop="1e6,2e6", out=str(tmp_path / "out"), data=data))
    with pytest.raises(UserError, match="exactly one of flops, minutes and isoflop, not flops and isoflop"):
        module.isoflop(config(flops=1e9, isoflop="1e6,2e6", out=str(tmp_path / "out"), data=data))
    assert not (tmp_path / "out").exists()


class Grid:
    """A grid whose runs are finished by being written down, so that none has to be trained."""

    def __init__(self, folder: Path):
        self.out, self.data = folder / "out", write_text(folder / "text")

    def config(self, **changes) -> CompareConfig:
        data = DataConfig(source=str(self.data), seq_len=16, validation_tokens=128)
        own = {"isoflop": "4e11,1e11", "data": data, "model": replace(MODEL, num_heads=2), "out": str(self.out)}
        return config(**own | changes)

    def runs(self, given: CompareConfig) -> list[tuple]:
        """Method, budget, seed and size of each run, in the order in which they are trained."""
        vocab_size = read_text(given.data, given.optimizer, seed=0).tokenizer.vocab_size
        found = []
        for seed in range(given.seeds):
            for name, row in contenders(given).items():
                sizes, plan = module._grid(given, row, vocab_size)
                found += [(name, planned.budget, seed, sizes[planned.size]) for planned in plan]
        return found

    def finish(self, given: CompareConfig, runs: list[tuple]) -> list[list[str]]:
        """Write down the results of these runs. Returns: the lines that they should become."""
        digest = read_text(given.data, given.optimizer, seed=0).digest
        lines = []
        for number, (name, budget, seed, size) in enumerate(runs):
            folder = self.out / RUNS / f"{name.replace(' ', '-')}-{budget:g}-dim{size.model.dim}-seed{seed}"
            folder.mkdir(parents=True, exist_ok=True)
            tokens = 1000 + number
            result = {"tokens": tokens, "flops": 7 * size.params * tokens, "loss": 3 + number / 64}
            (folder / RESULT_FILE).write_text(json.dumps(result | {"text": {"digest": digest}}))
            values = (size.params, size.total, *result.values())
            lines.append([str(value) for value in (name, *values, seed, size.model.dim)])
        return lines

    def lines(self) -> list[list[str]]:
        header, *lines = csv.reader((self.out / module.RUNS_FILE).read_text().splitlines())
        assert header == ["method", "params", "total", "tokens", "flops", "loss", "seed", "dim"]
        return lines


@pytest.fixture
def grid(tmp_path: Path, monkeypatch) -> Grid:
    """Whatever would be trained is a kill."""

    def kill(*words: object, **settings: object) -> None:
        raise Killed

    monkeypatch.setattr(child.subprocess, "Popen", kill)
    return Grid(tmp_path)


def test_finished_runs_are_read_not_repeated_one_line_each(grid: Grid):
    given = grid.config(methods=("switch", "loss_free"), sweep=("bias.rate=0.5,0.25",), seeds=2)
    runs = grid.runs(given)
    assert [(name, budget, seed) for name, budget, seed, _ in runs] == [
        (name, budget, seed)
        for seed in (0, 1)
        for name in ("switch", "loss_free bias.rate=0.5", "loss_free bias.rate=0.25")
        for budget in (1e11, 4e11)
        for _ in range(7)
    ]
    expected = grid.finish(given, runs)
    assert module.isoflop(given) == grid.out / "isoflop.csv"
    assert grid.lines() == expected
    assert {method: len(found.params) for method, found in read_runs(grid.out / "isoflop.csv").items()} == {
        "switch": 28,
        "loss_free bias.rate=0.5": 28,
        "loss_free bias.rate=0.25": 28,
    }


def test_a_killed_grid_keeps_its_lines_and_goes_on_with_the_next_run(grid: Grid):
    given = grid.config()
    runs = grid.runs(given)
    expected = grid.finish(given, runs[:3])
    with pytest.raises(Killed):
        module.isoflop(given)
    assert grid.lines() == expected
    name, budget, seed, size = runs[3]
    begun = [path.name for path in (grid.out / RUNS).glob("*.toml")]  # what the fourth run's process would have read
    assert begun == [f"{name}-{budget:g}-dim{size.model.dim}-seed{seed}.toml"]
    expected = grid.finish(given, runs)
    module.isoflop(given)
    assert grid.lines() == expected


def test_budgets_seeds_and_methods_may_join_but_no_other_model(grid: Grid):
    given = grid.config()
    first = grid.finish(given, grid.runs(given))
    module.isoflop(given)
    assert grid.lines() == first
    with pytest.raises(UserError, match=r"holds results of another configuration \(model\.num_layers\)"):
        module.isoflop(grid.config(model=replace(MODEL, num_heads=2, num_layers=3)))
    assert grid.lines() == first
    more = grid.config(isoflop="1e11,2e11,4e11", seeds=2, methods=("switch", "loss_free"))
    expected = grid.finish(more, grid.runs(more))
    module.isoflop(more)
    assert grid.lines() == expected
    assert len(expected) == 3 * 2 * 2 * 7


def test_a_budget_that_joins_cuts_no_line_away_before_its_own_are_there(grid: Grid):
    given = grid.config()
    first = grid.finish(given, grid.runs(given))
    module.isoflop(given)
    more = grid.config(isoflop="1e11,2e11,4e11")
    with pytest.raises(Killed):
        module.isoflop(more)
    assert grid.lines() == first
    expected = grid.finish(more, grid.runs(more))
    module.isoflop(more)
    assert grid.lines() == expected


def test_a_full_disk_keeps_whole_lines(grid: Grid):
    given = grid.config(methods=("switch", "loss_free"), seeds=3)
    expected = grid.finish(given, grid.runs(given))
    with no_file_above(3000), pytest.raises(UserError, match=r"Cannot write .*make room"):
        module.isoflop(given)
    lines = grid.lines()
    assert 14 < len(lines) < len(expected)
    assert lines == expected[: len(lines)]


def test_another_text_is_refused_and_the_lines_stay(grid: Grid):
    given = grid.config()
    expected = grid.finish(given, grid.runs(given))
    module.isoflop(given)
    next(path for path in sorted(grid.data.rglob("*.txt"))).write_text("another text " * 60)
    with pytest.raises(UserError, match=r"The text has changed since .*-seed0 was trained"):
        module.isoflop(given)
    assert grid.lines() == expected


@pytest.mark.slow
def test_the_grid_is_trained_and_can_be_read(tmp_path: Path):
    """Fourteen processes."""
    data = DataConfig(source=str(write_text(tmp_path / "text")), seq_len=16, validation_tokens=128)
    few_steps = OptimizerConfig(batch_size=128)
    file = module.isoflop(config(isoflop="4e10,8e10", data=data, optimizer=few_steps, out=str(tmp_path / "out")))
    with file.open() as lines:
        rows = list(csv.DictReader(lines))
    assert len(rows) == 14
    for row in rows:
        budget = 4e10 if float(row["flops"]) < 6e10 else 8e10
        assert float(row["flops"]) == pytest.approx(budget, rel=0.05)
    assert list(read_runs(file)) == ["switch"]
