import pytest
import torch

from equipoise.config import ModelConfig
from equipoise.errors import UserError
from equipoise.models.decoder import Decoder
from equipoise.models.generation import _draw, generate

V = 19


def build(method="loss_free", max_seq_len=None, **changes):
    """A decoder whose layers say more than a fresh one's, which would repeat its last token."""
    torch.manual_seed(0)
    sizes = {"dim": 20, "num_layers": 3, "num_heads": 5, "hidden_dim": 7, "num_experts": 5, "top_k": 2}
    config = ModelConfig(**sizes, dense_layers=1, shared_experts=1, method=method, **changes)
    model = Decoder(config, V, max_seq_len).double()
    with torch.no_grad():
        for weight in model.layers.parameters():
            weight *= 3
    return model


def without_cache(model, prompt, num_tokens):
    """Greedy generation that reads the whole text again for each token."""
    text, logits = list(prompt), []
    for _ in range(num_tokens):
        logits.append(model(torch.tensor([text]))[0, -1])
        text.append(int(logits[-1].argmax()))
    return text[len(prompt) :], torch.stack(logits)


@pytest.mark.parametrize("max_seq_len", [None, 6])
@pytest.mark.parametrize("method", ["unbalanced", "loss_free", "global_batch"])
def test_the_cache_changes_no_token_and_no_logit(method, max_seq_len):
    model, prompt = build(method, max_seq_len).eval(), [3, 1, 4, 1, 5]
    seen = []
    hook = model.register_forward_hook(lambda module, inputs, output: seen.append(output[0, -1]))
    drawn = list(generate(model, prompt, 13, temperature=0.0))
    hook.remove()
    with torch.no_grad():
        expected, logits = without_cache(model, prompt, 13)
    assert drawn == expected
    assert len(set(drawn)) > 3
    torch.testing.assert_close(torch.stack(seen), logits, atol=1e-12, rtol=0)


@torch.no_grad()
def test_a_text_may_be_read_in_pieces_and_side_by_side():
    model = build(max_seq_len=5).eval()
    token_BS = torch.randint(V, (2, 11), generator=torch.Generator().manual_seed(1))
    cache = model.cache(batch=2, capacity=11)
    pieces = [model(piece, cache) for piece in token_BS.split([3, 1, 5, 2], dim=1)]
    torch.testing.assert_close(torch.cat(pieces, 1), model(token_BS), atol=1e-12, rtol=0)
    assert cache.length == 11


def test_draws_follow_the_distribution():
    prob_V = torch.tensor([0.15, 0.5, 0.05, 0.3], dtype=torch.float64)
    generator, n = torch.Generator().manual_seed(0), 4000

    def share(temperature, top_p):
        drawn = torch.tensor([_draw(temperature, top_p, generator, prob_V.log()) for _ in range(n)])
        return torch.bincount(drawn, minlength=4) / n

    squared = prob_V.square() / prob_V.square().sum()
    nucleus = torch.tensor([0, 5 / 8, 0, 3 / 8])
    for seen, expected in ((share(1.0, 1.0), prob_V), (share(0.5, 1.0), squared), (share(1.0, 0.79), nucleus)):
        assert ((seen - expected).abs() <= 4 * (expected * (1 - expected) / n).sqrt()).all()
    assert share(1.0, 0.5).tolist() == [0, 1, 0, 0]


def test_equal_seeds_draw_equal_tokens():
    model = build()
    first, again, other = (list(generate(model, [2], 31, seed=seed)) for seed in (5, 5, 6))
    assert first == again != other


def test_tokens_come_one_by_one_and_the_model_is_left_as_it_was():
    model, calls = build(), []
    model.register_forward_hook(lambda module, inputs, output: calls.append(module.training))
    stream = generate(model, [1, 2], 5)
    assert calls == []
    next(stream)
    assert calls == [False]
    assert torch.is_grad_enabled()
    next(stream)
    stream.close()
    assert calls == [False, False]
    assert model.training
    assert model.layers[1].moe.training


def test_nothing_to_draw():
    assert list(generate(build(), [1], 0)) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([], 3), "prompt is empty"),
        (([1, 19], 3), "Token 19 of the prompt is unknown; this model's tokens are 0 to 18"),
        (([1], -1), "num_tokens=-1"),
        (([1], 3, -0.5), "temperature=-0.5"),
        (([1], 3, float("nan")), "temperature=nan"),
        (([1], 3, 1.0, 0.0), "top_p=0.0"),
    ],
)
def test_misuse_is_refused_before_the_first_token(arguments, message):
    with pytest.raises(UserError, match=message):
        generate(build(), *arguments)


def test_experts_that_look_at_later_tokens_need_a_fall_back():
    with pytest.raises(UserError, match="expert_choice looks at later tokens"):
        list(generate(build("expert_choice"), [1], 3))
    model = build("expert_choice", set=("expert_choice.evaluation=top_k",))
    assert list(generate(model, [3, 1], 7, temperature=0.0)) == without_cache(model.eval(), [3, 1], 7)[0]
