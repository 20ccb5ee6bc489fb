"""NextItNet: parity with a plain loop, and how far it looks back."""

import numpy as np
import pytest
import torch

from llmrec.models.config import UserModelConfig
from llmrec.models.nextitnet import CausalConvolution, NextItNet

WIDTH = 3


def build(**options):
    """A model in float64 whose every weight and bias matters."""
    torch.manual_seed(0)
    model = NextItNet(UserModelConfig(name="nextitnet", width=WIDTH, **options)).double().eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.normal_()
    return model


def test_a_convolution_adds_each_tap_at_its_distance():
    """Kernel 2, dilation 3, one number wide: 10 x[i - 3] + x[i] + 0.5."""
    convolution = CausalConvolution(width=1, kernel=2, dilation=3)
    with torch.no_grad():
        convolution.weight.copy_(torch.tensor([10.0, 1.0]).view(1, 1, 1, 2))
        convolution.bias.fill_(0.5)
        found = convolution(torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0]).view(1, 5, 1))
    assert found.flatten().tolist() == [1.5, 2.5, 3.5, 10 + 4.5, 20 + 5.5]


def test_states_equal_a_plain_loop():
    model = build(blocks=2, kernel=3, dilations=(1, 2))
    weights = {name: weight.numpy() for name, weight in model.state_dict().items()}
    x = torch.randn(1, 11, WIDTH, dtype=torch.float64)

    def convolved(name, value, dilation):
        taps, states = weights[f"{name}.weight"][:, :, 0], []  # (D, D, 3), the last tap is now
        for now in range(len(value)):
            state = weights[f"{name}.bias"]
            for back in range(3):
                if now - back * dilation >= 0:
                    state = state + taps[:, :, 2 - back] @ value[now - back * dilation]
            states.append(state)
        return np.array(states)

    def norm(name, value):
        centred = value - value.mean(-1, keepdims=True)
        scaled = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5)
        return scaled * weights[f"{name}.weight"] + weights[f"{name}.bias"]

    h = x[0].numpy()
    for number, dilation in enumerate((1, 2, 1, 2)):
        block = f"blocks.{number}"
        inner = norm(f"{block}.first_norm", convolved(f"{block}.first", h, dilation))
        inner = np.maximum(inner, 0)
        inner = norm(f"{block}.second_norm", convolved(f"{block}.second", inner, 2 * dilation))
        h = h + np.maximum(inner, 0)
    real = torch.ones(1, 11, dtype=torch.bool)
    np.testing.assert_allclose(model(x, real)[0].detach().numpy(), h, rtol=1e-9)


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"kernel": 3, "dilations": (1, 4), "blocks": 1}, 31),  # 1 + 3 x 2 x 5
        ({"kernel": 2, "dilations": (1, 2), "blocks": 2}, 19),  # 1 + 3 x 1 x 6
        ({"kernel": 2, "dilations": (3,), "blocks": 1}, 10),  # 1 + 3 x 1 x 3
    ],
)
def test_a_state_reads_the_items_of_its_field_and_none_before(options, field):
    torch.manual_seed(0)
    config = UserModelConfig(name="nextitnet", width=WIDTH, max_length=40, **options)
    model = NextItNet(config).double().eval()  # fresh: random norms may close every ReLU
    assert model.field == field
    x = torch.randn(8, 40, WIDTH, dtype=torch.float64, requires_grad=True)
    model(x, torch.ones(8, 40, dtype=torch.bool))[:, -1].square().sum().backward()
    read = x.grad.any(dim=2).any(dim=0)  # (L,)
    assert not read[: 40 - field].any()
    assert read[40 - field]


def test_the_last_state_of_a_history_longer_than_the_field_is_the_same_from_the_field_alone():
    model = build(max_length=40)
    x, real = torch.randn(2, 40, WIDTH, dtype=torch.float64), torch.ones(2, 40, dtype=torch.bool)
    torch.testing.assert_close(model.last(x, real), model(x, real)[:, -1])
