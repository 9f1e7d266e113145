"""Text towers compute little for padding, and give what they give with it."""

import pytest
import torch
from model_helpers import tiny_model

import distributed
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


def captions(n: int, length: int, seed: int = 0) -> torch.Tensor:
    """(n, length): captions of 2 tokens and more, one of them of the whole length."""
    g, tokens = torch.Generator().manual_seed(seed), torch.zeros(n, length, dtype=torch.long)
    for i, row in enumerate(tokens):
        own = length if i == 0 else int(torch.randint(2, length // 2, (), generator=g))
        row[:own] = torch.randint(1, 126, (own,), generator=g)
        row[own - 1] = 127
    return tokens


def test_a_tower_that_is_split_over_processes_is_called_once(monkeypatch):
    model = tiny_model("CLIP", text_tower="bert", context_length=24, text_layers=2).eval()
    seen = []
    model.bert.register_forward_pre_hook(lambda *_, **given: seen.append(1), with_kwargs=False)
    model.encode_text(captions(16, 20))
    assert len(seen) == padding.GROUPS
    monkeypatch.setattr(distributed, "is_sharded", lambda module: module is model.bert)
    model.encode_text(captions(16, 20))
    assert len(seen) == padding.GROUPS + 1


@pytest.mark.filterwarnings("ignore")  # of the tracer, about every shape
@pytest.mark.parametrize("tower", ["clip", "bert"])
def test_a_traced_tower_reads_other_captions(tower):
    model = tiny_model("CLIP", text_tower=tower, context_length=24, text_layers=2).eval()
    traced = torch.jit.trace_module(model, {"encode_text": captions(16, 12)})
    for n, length in ((16, 12), (16, 20), (3, 12)):
        tokens = captions(n, length, seed=1)
        if tower == "clip" or n == 16:  # transformers' own tracing fixes the number of rows
            torch.testing.assert_close(traced.encode_text(tokens), model.encode_text(tokens), rtol=1e-5, atol=1e-6)


def test_no_captions_give_no_embeddings():
    model = tiny_model("CLIP", context_length=24)
    assert model.encode_text(torch.zeros(0, 5, dtype=torch.long)).shape == (0, model.config["embed_dim"])


@pytest.mark.parametrize("tower", ["clip", "bert"])
def test_an_exported_tower_takes_any_number_of_captions(tower):
    model = tiny_model("CLIP", text_tower=tower, context_length=24, text_layers=2).eval()

    class Text(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, tokens):
            return self.model.encode_text(tokens)

    rows = {0: torch.export.Dim("batch", min=1)}
    program = torch.export.export(Text(), (captions(16, 12),), dynamic_shapes=(rows,)).module()
    for n in (16, 3):
        tokens = captions(n, 12, seed=1)
        torch.testing.assert_close(program(tokens), model.encode_text(tokens), rtol=1e-5, atol=1e-6)
