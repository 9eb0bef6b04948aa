import torch
from torch import nn

from persona_nns.organism.residuals import swap_last_residuals


def test_only_the_last_prompt_tokens_change_places():
    block = nn.Identity()
    hidden = torch.arange(24.0).reshape(4, 3, 2)
    last = torch.tensor([0, 1, 2, 1])
    torch.manual_seed(0)
    with swap_last_residuals(block, last):
        swapped = block(hidden)
    rows = torch.arange(4)
    taken = {tuple(row) for row in swapped[rows, last].tolist()}
    assert taken == {tuple(row) for row in hidden[rows, last].tolist()}
    assert not torch.equal(swapped[rows, last], hidden[rows, last])
    kept = torch.ones(4, 3, dtype=torch.bool)
    kept[rows, last] = False
    assert torch.equal(swapped[kept], hidden[kept])
    assert torch.equal(block(hidden), hidden)
