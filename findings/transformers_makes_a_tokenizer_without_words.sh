#!/usr/bin/env bash
# AutoTokenizer of transformers 5 does not miss a vocabulary. In a folder with the config.json of a CLIP and no file of a
# tokenizer, as copies of checkpoints often are, it returns a CLIPTokenizer of two tokens, and nothing is said: each letter
# of a caption becomes the id that its end has too. The text tower then gives two captions of as many letters the same
# embedding, and zero-shot classification such labels the same probability.
#
# Seen with transformers 5.24.0 and tokenizers 0.23.3 on Python 3.11: 2 tokens; "mass" and "cyst" are 0, 2, 2, 2, 2, 2.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q transformers==5.24.0
"$folder/venv/bin/python" - "$folder/clip" <<'PYTHON'
import sys

import tokenizers
import transformers

print("transformers", transformers.__version__, "tokenizers", tokenizers.__version__)
transformers.CLIPConfig().save_pretrained(sys.argv[1])
tokenizer = transformers.AutoTokenizer.from_pretrained(sys.argv[1])
ids = [tokenizer(text)["input_ids"] for text in ("mass", "cyst")]
print(f"{type(tokenizer).__name__} of {len(tokenizer)} tokens; mass is {ids[0]}, cyst is {ids[1]}")
assert len(tokenizer) == 2 and ids[0] == ids[1] == [0, 2, 2, 2, 2, 2], "this has changed"
PYTHON
