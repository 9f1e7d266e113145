"""Text towers compute little for padding, and give what they give with it."""

import pytest
import torch
from model_helpers import tiny_model

import distributed
from towers import clip_text, padding
from towers.library import HFTextTower

SMALL = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, vocab_size=100)


def embeddings_and_gradients(model, tokens) -> dict[str, torch.Tensor]:
    """What `encode_text` gives, and the gradients of a sum over it with fixed weights, by the parameters' names."""
    model.zero_grad()
    embedded = model.encode_text(tokens)
    towards = torch.randn(embedded.shape, generator=torch.Generator().manual_seed(0), dtype=embedded.dtype)
    (embedded * towards).sum().backward()
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {"embedding": embedded.detach(), **grads}


@pytest.mark.parametrize("checkpointed", [False, True])
def test_padding_is_not_computed_with_and_nothing_else_changes(checkpointed, monkeypatch):
    model = tiny_model("CLIP", context_length=24, text_layers=2).train().double()
    if checkpointed:
        model.text.checkpoint_gradients(model)
    tokens = torch.zeros(5, 20, dtype=torch.long)
    for row, length in zip(tokens, (20, 3, 2, 7, 3), strict=True):
        row[:length] = torch.randint(1, 126, (length,), generator=torch.Generator().manual_seed(length))
        row[length - 1] = 127
    tokens[2, 2:] = 127  # where end-of-text pads, the first one counts
    seen = []
    model.transformer.resblocks[1].mlp.register_forward_hook(lambda _, args, __: seen.append(tuple(args[0].shape)))

    packed = embeddings_and_gradients(model, tokens)
    assert set(seen) == {(36, model.config["text_width"])}  # 35 tokens, and one that nothing reads
    monkeypatch.setattr(clip_text, "packing_of", lambda *_: None)
    seen.clear()
    padded = embeddings_and_gradients(model, tokens)
    assert set(seen) == {(5, 20, model.config["text_width"])} and len(padded) > 20
    torch.testing.assert_close(packed, padded, rtol=1e-9, atol=1e-12)


def test_bert_reads_captions_of_nearly_one_length_together(monkeypatch):
    model = tiny_model("CLIP", text_tower="bert", context_length=24, text_layers=2).eval().double()
    tokens = torch.zeros(17, 20, dtype=torch.long)
    lengths = torch.randint(1, 21, (17,), generator=torch.Generator().manual_seed(0))
    for row, length in zip(tokens, lengths.tolist(), strict=True):
        row[:length] = torch.randint(1, 126, (length,), generator=torch.Generator().manual_seed(length))
    tokens[3] = 0  # no caption at all
    seen = []
    model.bert.register_forward_pre_hook(lambda _, __, given: seen.append(given["input_ids"].shape), with_kwargs=True)

    grouped = embeddings_and_gradients(model, tokens)
    assert len(seen) == 4 and sum(rows for rows, _ in seen) == 17 and seen[0][1] < seen[-1][1] == 20
    assert all(length % 4 == 0 for _, length in seen)  # few shapes
    monkeypatch.setattr(padding, "WORTH", 0)
    seen.clear()
    whole = embeddings_and_gradients(model, tokens)
    assert [tuple(shape) for shape in seen] == [(17, 20)] and len(whole) > 20
    torch.testing.assert_close(grouped, whole, rtol=1e-9, atol=1e-12)


def test_captions_of_nearly_one_length_are_not_packed():
    assert padding.packing_of(torch.tensor([9, 9, 7]), 10) is None  # 28 of 30 tokens
    packing = padding.packing_of(torch.tensor([9, 9, 6]), 10)
    assert packing is not None and len(packing.places) == packing.tokens == 27


def test_batches_of_many_lengths_have_few_numbers_of_rows():
    """Of each a library keeps what it has prepared, 0.9 MiB and more a layer."""
    ends = torch.randint(4, 60, (300, 64), generator=torch.Generator().manual_seed(0))
    found = [padding.packing_of(each, 77) for each in ends]
    rows = {len(packing.places) for packing in found}
    assert len({packing.tokens for packing in found}) > 150 and len(rows) <= 12
    assert all(packing.tokens <= len(packing.places) < 1.07 * packing.tokens for packing in found)


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
