"""--shared-view: SLIP with two views of an image in place of three."""

from dataclasses import replace

import pytest
import torch
from helpers import command
from model_helpers import batches, gradients, split, tiny_model
from roco_tree import make_roco

import main


@pytest.mark.parametrize("objective", ["SLIP", "SIGSLIP"])
@pytest.mark.parametrize("accumulate", [main.accumulate_micro, main.accumulate_full])
def test_a_shared_view_is_slip_whose_first_view_is_the_captions(objective, accumulate):
    model = tiny_model(objective).double()
    image, text, _, view2 = batches(model, 8)
    whole, expected = gradients(model, split([image, text, image, view2], 2), accumulate)
    model.zero_grad()
    model.objective = replace(model.objective, inputs=("image", "text", "view2"))  # as --shared-view does
    shared, found = gradients(model, split([image, text, view2], 2), accumulate)
    assert whole[0].keys() == shared[0].keys() and whole[0]["ssl_loss"] > 0
    for key, value in whole[0].items():
        torch.testing.assert_close(shared[0][key], value, msg=lambda m, k=key: f"{k}: {m}")
    for name, grad in expected.items():
        torch.testing.assert_close(found[name], grad, rtol=1e-7, atol=1e-10, msg=lambda m, n=name: f"{n}: {m}")


def test_a_shared_view_trains_with_two_views_and_is_part_of_the_run(tmp_path, monkeypatch):
    roco, seen = make_roco(tmp_path / "roco"), []
    monkeypatch.setattr(main, "update", lambda run, batches, totals, _real=main.update: (
        seen.append(set(batches[0])), _real(run, batches, totals)))  # fmt: skip
    main.main(command(roco, tmp_path / "out", "--shared-view", "--epochs", "1"))
    assert seen and all("image" in keys and "view2" in keys and "view1" not in keys for keys in seen)
    with pytest.raises(ValueError, match="settings differ.*shared_view: True there, False now"):
        main.main(command(roco, tmp_path / "out", "--epochs", "1"))
