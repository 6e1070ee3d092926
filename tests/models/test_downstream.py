from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional

from ubp_fast.models.downstream import DOWNSTREAM_SEED, DownstreamBody, DownstreamNetwork


def seeded(**sizes: int) -> DownstreamNetwork:
    torch.manual_seed(DOWNSTREAM_SEED)
    return DownstreamNetwork(input_dim=5, num_outputs=3, hidden_dim=8, thin_dim=16, num_blocks=2, **sizes)


def test_parameters_are_counted_as_in_the_challenge():
    with torch.device("meta"):
        network = DownstreamNetwork(512, 100)
    sizes = {name: parameter.numel() for name, parameter in network.named_parameters()}
    assert sum(sizes.values()) - sizes["body.input.weight"] - sizes["body.input.bias"] == 50_575_460
    assert len([name for name in sizes if name.startswith("body.blocks.")]) == 18


def test_parameters_are_created_from_the_input_to_the_output():
    """Golden (f) needs this order: the layers draw their initial values from one stream of random numbers."""
    torch.manual_seed(DOWNSTREAM_SEED)
    linears = [nn.Linear(*sizes) for sizes in ((5, 8), (8, 16), (16, 8), (8, 16), (16, 8), (8, 3))]
    found = [module for module in seeded().modules() if isinstance(module, nn.Linear)]
    assert len(found) == len(linears)
    for layer, expected in zip(found, linears, strict=True):
        assert torch.equal(layer.weight, expected.weight)
        assert torch.equal(layer.bias, expected.bias)


def test_forward_is_the_written_equation():
    network = seeded().double()
    inputs = torch.randn(4, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    parameter = dict(network.named_parameters())

    def linear(name: str, values: torch.Tensor) -> torch.Tensor:
        return values @ parameter[f"{name}.weight"].T + parameter[f"{name}.bias"]

    def norm(values: torch.Tensor) -> torch.Tensor:
        centred = values - values.mean(1, keepdim=True)
        return centred / (centred.pow(2).mean(1, keepdim=True) + 1e-5).sqrt()

    hidden = norm(linear("body.input", inputs))
    for block in ("body.blocks.0", "body.blocks.1"):
        hidden = hidden + linear(f"{block}.contract", functional.gelu(linear(f"{block}.expand", norm(hidden))))
    torch.testing.assert_close(network(inputs), linear("head", norm(hidden)), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(network.body(inputs), norm(hidden), rtol=1e-12, atol=1e-12)


def test_the_body_alone_starts_like_the_network():
    torch.manual_seed(DOWNSTREAM_SEED)
    body = DownstreamBody(5, 8, 16, 2)
    for (name, own), (other_name, other) in zip(body.named_parameters(), seeded().body.named_parameters(), strict=True):
        assert name == other_name
        assert torch.equal(own, other)
