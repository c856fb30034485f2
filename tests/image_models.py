"""A tiny random Gemma 3 with an image tower, as transformers saves it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

VOCAB, IMAGE = 512, 511  # the last id stands for a part of an image
TEXT = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "max_position_embeddings": 64,
    "sliding_window": 12,
    "layer_types": ["sliding_attention", "full_attention"],
    "pad_token_id": 0,
}
VISION = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 8,
    "patch_size": 2,
}


def image_model(tied: bool = True, seed: int = 0) -> Any:
    """The model, with random numbers in every tensor."""
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration

    torch.manual_seed(seed)
    config = Gemma3Config(
        text_config={**TEXT, "tie_word_embeddings": tied},
        vision_config=VISION,
        mm_tokens_per_image=4,
        boi_token_index=IMAGE - 2,
        eoi_token_index=IMAGE - 1,
        image_token_index=IMAGE,
        tie_word_embeddings=tied,
    )
    model = Gemma3ForConditionalGeneration(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model


def save_image_model(folder: Path, in_memory: bool = False, **given: Any) -> Path:
    """Save the model in a folder, with the names of the published files, or with those that the
    modules have in memory.
    """
    image_model(**given).save_pretrained(folder, save_original_format=not in_memory)
    for file in ("preprocessor_config.json", "processor_config.json"):
        (folder / file).write_text('{"image_size": 8}')
    return folder


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a folder of one file, under the names that the file has."""
    return load_file(folder / "model.safetensors")


def is_text(name: str) -> bool:
    """Whether a tensor, by its name in a file, is of the text part."""
    return "vision_tower." not in name and "multi_modal_projector." not in name


@torch.no_grad()
def answer(folder: Path, brightness: float = 1.0) -> torch.Tensor:
    """What transformers says to an image and text, (1, S, V)."""
    from transformers import AutoModelForImageTextToText

    model = AutoModelForImageTextToText.from_pretrained(folder).eval()
    tokens = torch.tensor([[2, IMAGE - 2, *[IMAGE] * 4, IMAGE - 1, 5, 6, 7]])
    pixels = torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    types = (tokens == IMAGE).long()
    found = model(input_ids=tokens, pixel_values=brightness * pixels, token_type_ids=types)
    logits: torch.Tensor = found.logits
    return logits
