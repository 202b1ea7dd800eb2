"""Everything that the package asks of transformers, torch and PEFT: layers, caches, attention, hooks, adapters.

What we lean on beyond the documented interfaces of the three, and what breaks where a version changes it. Seen to work
with transformers 5.16.1 and 5.23.0, torch 2.13.0, PEFT 0.21.2.

| name | where | without it |
| --- | --- | --- |
| **transformers** | | |
| `model.get_decoder()` with `layers`, `rotary_emb`; a layer's `self_attn` | decoder | the model is refused |
| `apply_rotary_pos_emb` in the module of the attention's class | decoder | layers that rotate keys are refused |
| `self_attn(x, position_embeddings=, position_ids=, attention_mask=, past_key_values=)` | decoder | refused |
| `past_key_values=`, which is `cache=` from 5.24 on, with a warning that is silenced here | model | gone in 5.40 |
| `input_layernorm`, `k_proj`, `v_proj`, `k_norm`, `head_dim` of a layer | decoder | keys are taken from a whole pass |
| config: `layer_types`, `sliding_window` | decoder | windows go unnoticed |
| config: `logits_scaling`, `logit_scale`, `final_logit_softcapping` | decoder | other logits of long texts |
| `config._attn_implementation` | attention | memories stand in front of every row's text: slower |
| `integrations.sdpa_attention.sdpa_attention_forward` | attention | import fails |
| `masking_utils`: `AttentionMaskInterface`, `sdpa_mask`, `causal_mask_function` | attention | import fails |
| the attention gets the very tensors that the cache returns | attention, cache | the model is refused |
| `cache_utils.DynamicLayer`: `keys`, `values`, `batch_select_indices`, ... | cache | answers of beams mix |
| `GradientCheckpointingLayer`: `_can_checkpoint_with_cache`, `_gradient_checkpointing_func` | hooks | an error |
| `layer_type` in the signature of `rotary_emb.forward` | decoder | models with two rotations are refused |
| **torch** | | |
| `Module._modules`, `Module._parameters`, `Tensor._version` | adapters | changed weights go unnoticed |
| `Module._forward_pre_hooks` | attention | the output layer's hook is set twice |
| attributes of a tensor survive as long as the tensor | attention | models are refused |
| `ops.mkldnn._linear_pointwise`, `autograd.forward_ad._current_level` | linear | torch's own kernel: slower |
| `ao.quantization.quantize_dynamic` | linear | int8 is refused |
| **PEFT** | | |
| `BaseTunerLayer`: `_active_adapter`, `_disable_adapters`, `adapter_layer_names` | adapters | switching fails |
| `lora.Linear`: `lora_A`, `lora_B`, `scaling`, `lora_dropout`, `base_layer` | adapters | an error |
| `lora.Linear`: `lora_variant`, `merged` | adapters | an error |
"""

import warnings

warnings.filterwarnings("ignore", "`past_key_values` is deprecated", FutureWarning)
