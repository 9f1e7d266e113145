"""--patch-dropout: a ViT that leaves out patches in training alone."""

import pytest
import torch
from helpers import command
from model_helpers import tiny_model
from roco_tree import make_roco

import main
from runtime.checkpoints import load_checkpoint
from towers.build import build_image_tower, drop_patches


def tokens_of(tower, images):
    """What the first block is given."""
    seen = []
    hook = tower.blocks[0].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    tower(images)
    hook.remove()
    return seen[0]  # (B, tokens, d)


def test_patches_are_left_out_in_training_alone_and_are_others_for_each_image():
    model = tiny_model("CLIP")
    tower, names = model.visual, list(model.state_dict())
    images = torch.randn(2, 3, *model.preprocess.shape, generator=torch.Generator().manual_seed(0))
    whole = tokens_of(tower.eval(), images)
    drop_patches(tower, "a ViT", 0.5)
    assert torch.equal(tokens_of(tower.eval(), images), whole) and list(model.state_dict()) == names
    torch.manual_seed(0)
    part = tokens_of(tower.train(), images)
    patches = whole.shape[1] - tower.num_prefix_tokens
    assert patches > 3 and part.shape[1] == tower.num_prefix_tokens + patches // 2
    places = [[(row == whole[i]).all(1).nonzero().item() for row in part[i]] for i in range(2)]
    for found in places:
        assert found[: tower.num_prefix_tokens] == list(range(tower.num_prefix_tokens))
        assert len(set(found)) == len(found)
    assert set(places[0]) != set(places[1])


def test_a_tower_without_patches_is_refused():
    with pytest.raises(ValueError, match="--patch-dropout: resnet18 cannot leave patches out"):
        drop_patches(build_image_tower("resnet18", {}, (32, 32))[0], "resnet18", 0.5)


def test_it_is_part_of_the_run_and_not_of_the_model(tmp_path):
    roco = make_roco(tmp_path / "roco")
    main.main(command(roco, tmp_path / "out", "--patch-dropout", "0.5", "--epochs", "1"))
    state = load_checkpoint(tmp_path / "out" / "checkpoint.pt")
    assert state["settings"]["patch_dropout"] == 0.5 and "patch_drop" not in str(state["model"])
    tower = main.models.load_pretrained(tmp_path / "out" / "checkpoint.pt").model.visual
    assert type(tower.patch_drop) is torch.nn.Identity
    with pytest.raises(ValueError, match="settings differ.*patch_dropout: 0.5 there, 0.0 now"):
        main.main(command(roco, tmp_path / "out", "--epochs", "1"))
