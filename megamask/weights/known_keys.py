"""Keys of config.json that no family reads: those that change nothing, and those that must not
change anything.
"""

from __future__ import annotations

from typing import Any

# Keys that cannot change the arithmetic of a forward pass in evaluation mode, in any family.
HARMLESS = frozenset({
    "architectures", "model_type", "transformers_version", "_name_or_path", "_commit_hash",
    "_attn_implementation", "_attn_implementation_autoset", "attn_implementation",
    "attention_dropout", "attn_pdrop", "embd_pdrop", "resid_pdrop", "hidden_dropout",
    "attention_probs_dropout_prob", "hidden_dropout_prob", "embedding_dropout", "residual_dropout",
    "classifier_dropout", "summary_type", "summary_use_proj", "summary_activation",
    "summary_proj_to_labels", "summary_first_dropout", "initializer_range", "use_cache",
    "cache_implementation", "torchscript", "is_llama_config", "is_decoder", "pad_token_id",
    "bos_token_id", "eos_token_id", "sep_token_id", "decoder_start_token_id", "tokenizer_class",
    "prefix", "output_attentions", "output_hidden_states", "return_dict", "return_dict_in_generate",
    "output_scores", "chunk_size_feed_forward", "id2label", "label2id", "num_labels",
    "problem_type", "task_specific_params", "finetuning_task", "max_sequence_length", "max_length",
    "min_length", "do_sample", "temperature", "top_k", "top_p", "typical_p", "repetition_penalty",
    "length_penalty", "num_beams", "transformers.js_config", "unsloth_fixed", "unsloth_version",
    "license", "gradient_checkpointing", "keys_to_ignore_at_inference",
    "pretraining_tp",  # in how many products Llama once cut a matrix; no class here reads it
})  # fmt: skip
# Keys that can change the arithmetic, with the values that leave it unchanged, in any family.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "rope_interleaved": (False,),
    "quantization_config": (),
    "is_encoder_decoder": (False,),
    "add_cross_attention": (False,),
    "cross_attention_hidden_size": (),
    "tie_encoder_decoder": (False,),
    "pruned_heads": ({},),
    "use_bfloat16": (False,),
    "auto_map": ({},),
}
