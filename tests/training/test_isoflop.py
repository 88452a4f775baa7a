"""The grid of sizes at equal FLOPs: which models, which budgets, and that the runs can be fitted."""

import csv
from dataclasses import replace
from pathlib import Path

import pytest

from equipoise.config import CompareConfig, DataConfig, ModelConfig, OptimizerConfig
from equipoise.errors import UserError
from equipoise.models.decoder import Decoder
from equipoise.scaling.planning import PlannedRun
from equipoise.scaling.runs import read_runs
from equipoise.training import isoflop as module
from equipoise.training.contenders import contenders
from tiny_runs import write_text

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
    size = module._size(replace(MODEL, method="unipool"), 32, vocab_size=256, seq_len=8)
    expert = 3 * 32 * 16
    assert size.total - size.params == (8 - 2) * expert


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


@pytest.mark.parametrize("words", ["0,1e9", "1e9,e", "1.2.3,1e9"])
def test_budgets_must_be_numbers_above_zero(words):
    with pytest.raises(UserError, match="isoflop must list budgets above 0"):
        module.budgets(config(isoflop=words))


def test_budgets_that_no_size_fits_are_refused_before_anything_is_trained(tmp_path: Path):
    data = DataConfig(source=str(write_text(tmp_path / "text")), seq_len=16, validation_tokens=128)
    with pytest.raises(UserError, match="candidate sizes"):
        module.isoflop(config(isoflop="1e6,2e6", out=str(tmp_path / "out"), data=data))
    assert not (tmp_path / "out").exists()


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
