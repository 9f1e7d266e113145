"""Text towers of transformers read captions of nearly one length together, and give what they give for all at once."""

import pytest
import torch

from towers import padding
from towers.library import HFTextTower

SMALL = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, vocab_size=100)


@pytest.mark.parametrize(("kind", "pad"), [("bert", 0), ("roberta", 1)])
@pytest.mark.parametrize("side", ["right", "left"])
def test_groups_of_one_length_change_nothing(kind, pad, side, monkeypatch):
    torch.manual_seed(0)
    settings = {"model_type": kind, "pad_token_id": pad, "max_position_embeddings": 40, **SMALL}
    tower = HFTextTower(settings).eval().double()
    tokens = torch.full((18, 24), pad)
    for i, row in enumerate(tokens):
        length = 24 if i == 5 else 2 + i % 7
        row[slice(0, length) if side == "right" else slice(24 - length, 24)] = torch.randint(5, 100, (length,))
    seen = []
    tower.model.register_forward_pre_hook(lambda _, __, given: seen.append(given["input_ids"].shape), with_kwargs=True)

    def results():
        tower.zero_grad()
        found = tower(tokens)
        found.square().sum().backward()
        return [found.detach(), *(p.grad for p in tower.parameters() if p.grad is not None)]

    grouped = results()
    # Padded on the left, every caption ends in the last column: nothing can be cut off behind it.
    assert len(seen) == (4 if side == "right" else 1) and sum(rows for rows, _ in seen) == 18
    monkeypatch.setattr(padding, "WORTH", 0)
    whole = results()
    assert len(whole) > 20
    for first, second in zip(grouped, whole, strict=True):
        torch.testing.assert_close(first, second, rtol=1e-9, atol=1e-12)
