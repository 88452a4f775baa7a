import torch

from equipoise.balancing.flat import names, pack, unpack


def test_what_is_packed_comes_back_with_names_shapes_and_values():
    tensors = {"scalar": torch.tensor(3.5), "table": torch.rand(2, 3), "none": torch.zeros(0, 3), "row": torch.rand(5)}
    flat, layout = pack(tensors, torch.ones(1))
    assert flat.shape == (12,)
    assert names(layout) == tuple(tensors)
    back = unpack(flat, layout)
    assert back.keys() == tensors.keys()
    assert all(back[name].shape == tensor.shape and torch.equal(back[name], tensor) for name, tensor in tensors.items())


def test_nothing_packs_into_nothing_of_the_wanted_dtype():
    flat, layout = pack({}, torch.ones(1, dtype=torch.float64))
    assert (flat.shape, flat.dtype, layout) == ((0,), torch.float64, "")
    assert unpack(flat, layout) == {}
    assert names(layout) == ()


def test_large_integers_keep_every_digit():
    flat, layout = pack({"a": torch.tensor([2**62 + 1]), "b": torch.tensor(1)}, torch.ones(1))
    assert unpack(flat, layout)["a"].tolist() == [2**62 + 1]


def test_what_is_packed_is_a_copy_also_of_a_single_tensor():
    given = torch.tensor([3, 1])
    flat, layout = pack({"a": given}, torch.ones(1))
    given.add_(9)
    assert unpack(flat, layout)["a"].tolist() == [3, 1]


def test_gradients_pass_through():
    a, b = torch.rand(2, requires_grad=True), torch.rand((), requires_grad=True)
    flat, _ = pack({"a": a, "b": b}, torch.ones(1))
    flat.backward(torch.tensor([1.0, 2.0, 3.0]))
    assert (a.grad.tolist(), b.grad.item()) == ([1, 2], 3)
