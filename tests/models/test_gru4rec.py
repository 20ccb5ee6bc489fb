"""GRU4Rec: a step against the gates' formulas."""

import numpy as np
import torch

from llmrec.models.config import UserModelConfig
from llmrec.models.gru4rec import GRU4Rec


def test_states_equal_the_gates_one_step_at_a_time():
    torch.manual_seed(0)
    config = UserModelConfig(name="gru4rec", width=3, blocks=2, dropout=0.5)
    model = GRU4Rec(config).double().eval()
    weights = {name: weight.numpy() for name, weight in model.state_dict().items()}
    x = torch.randn(1, 5, 3, dtype=torch.float64)

    def sigmoid(value):
        return 1 / (1 + np.exp(-value))

    def layer(number, inputs):
        of_input, of_state = (weights[f"layers.weight_{kind}_l{number}"] for kind in ("ih", "hh"))
        bias_input, bias_state = (weights[f"layers.bias_{k}_l{number}"] for k in ("ih", "hh"))
        state, states = np.zeros(3), []
        for item in inputs:
            a, b = of_input @ item + bias_input, of_state @ state + bias_state  # (3 D,)
            reset, keep = sigmoid(a[:3] + b[:3]), sigmoid(a[3:6] + b[3:6])
            state = (1 - keep) * np.tanh(a[6:] + reset * b[6:]) + keep * state
            states.append(state)
        return np.array(states)

    states = layer(1, layer(0, x[0].numpy()))
    expected = states @ weights["out.weight"].T + weights["out.bias"]
    real = torch.ones(1, 5, dtype=torch.bool)
    np.testing.assert_allclose(model(x, real)[0].detach().numpy(), expected, rtol=1e-10)


def test_a_history_after_padding_starts_from_an_empty_state():
    """One item after four of padding: what the first item of a full row gives."""
    torch.manual_seed(0)
    model = GRU4Rec(UserModelConfig(name="gru4rec", width=3)).double().eval()
    item = torch.randn(1, 1, 3, dtype=torch.float64)
    first = model(item.expand(1, 5, 3), torch.ones(1, 5, dtype=torch.bool))[:, 0]
    after_padding = model(item.expand(1, 5, 3), torch.arange(5)[None] == 4)[:, 4]
    torch.testing.assert_close(after_padding, first)
