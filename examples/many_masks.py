"""One loaded model, many masks:

    python examples/many_masks.py models/dense "def main():" code=a.safetensors prose=b.safetensors

The first argument is the model that the masks were made for, the second a text to measure and to
continue, and what follows are mask files by name.
"""

import sys
import time

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import megamask

hf, text, *given = sys.argv[1:]
files = dict(one.split("=", 1) for one in given)

# 1. The dense model, loaded once. Its weights are the only copy, whatever the number of masks.
loaded = AutoModelForCausalLM.from_pretrained(hf, dtype=torch.bfloat16).eval()
tokenizer = AutoTokenizer.from_pretrained(hf)
tokens = tokenizer(text, return_tensors="pt")


@torch.no_grad()
def loss() -> float:
    """Nats a token of the text, under the weights that the model shows now."""
    return float(loaded(**tokens, labels=tokens["input_ids"]).loss)


dense = loss()
print(f"dense: loss {dense:.4f}")

# 2. All masks are checked against the model (names, shapes, fingerprint) and decoded here, before
#    anything changes. A mask takes a bit per weight.
masks = megamask.Masks(loaded, files)

# 3. A block shows a mask, and brings back what was shown before, also after an exception.
for name in files:
    begin = time.perf_counter()
    with masks.use(name):
        milliseconds = 1e3 * (time.perf_counter() - begin)
        print(f"{name}: loss {loss():.4f}, shown after {milliseconds:.1f} ms")

# 4. A plain call shows a mask until the next call. So a server changes the task between requests.
masks.use(next(iter(files)))
continued = loaded.generate(**tokens, max_new_tokens=8, do_sample=False)
print(f"{next(iter(files))} continues: {tokenizer.decode(continued[0])!r}")

# 5. None shows the dense weights again, bit for bit.
masks.use(None)
print(f"dense again: {loss() == dense}")

# 6. One mask without a name, and without keeping it: swap. It can be a block too.
with megamask.swap(loaded, next(iter(files.values()))):
    weights = [one.weight for one in loaded.modules() if isinstance(one, torch.nn.Linear)]
    zeros = sum(int((one == 0).sum()) for one in weights) / sum(one.numel() for one in weights)
print(f"zeros under the first mask, head included: {zeros:.1%}")
