#!/usr/bin/env bash
# A folder of open_clip, opened as "local-dir:FOLDER", brings its weights and its tokenizer, whatever the tokenizer is
# called in open_clip_config.json. The configuration of a text tower of transformers (hf_model_name) is not looked for
# there: a path is taken from the working directory, and "local-dir:" is taken for the name of a repository of the hub.
# A folder that holds the configuration beside the rest can say so by no name but its own absolute path, which is lost
# when it is moved, or ".", with which it opens from inside it alone.
#
# Seen with open_clip_torch 3.3.0 and transformers 5.24.0 on Python 3.11, without a network for the hub.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q open_clip_torch==3.3.0 transformers==5.24.0 torch==2.14.1 torchvision==0.29.1
HF_HUB_OFFLINE=1 SAVED="$folder/saved" "$folder/venv/bin/python" - <<'PYTHON'
import json
import os
from pathlib import Path

import open_clip
import torch
import transformers

print("open_clip", open_clip.__version__, "transformers", transformers.__version__)
saved = Path(os.environ["SAVED"])
words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "b", "c"]
sizes = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
transformers.BertConfig(vocab_size=len(words), **sizes).save_pretrained(saved)
transformers.BertTokenizer(vocab={word: i for i, word in enumerate(words)}).save_pretrained(saved)
vision = dict(image_size=32, patch_size=16, width=32, layers=1, head_width=16)
text = dict(hf_model_name=str(saved), hf_tokenizer_name="no/where", hf_proj_type="linear", context_length=8)
net = open_clip.CustomTextCLIP(16, vision, {**text, "hf_model_pretrained": False})
torch.save(net.state_dict(), saved / "open_clip_pytorch_model.bin")

found = {}
for name in (str(saved), ".", "local-dir:.", f"local-dir:{saved}"):
    config = {"embed_dim": 16, "vision_cfg": vision, "text_cfg": {**text, "hf_model_name": name}}
    (saved / "open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": {}}))
    for place in (saved.parent, saved):
        os.chdir(place)
        open_clip.get_tokenizer(f"local-dir:{saved}")  # from the folder, wherever one stands
        try:
            open_clip.create_model(f"local-dir:{saved}")
            opens = True
        except (OSError, ValueError) as error:
            opens = False
            print("   ", str(error).strip().splitlines()[0])
        found.setdefault(name, []).append(opens)
    print("hf_model_name", repr(name), "opens from elsewhere, from inside:", *found[name])
assert list(found.values()) == [[True, True], [False, True], [False, False], [False, False]], "this has changed"
PYTHON
