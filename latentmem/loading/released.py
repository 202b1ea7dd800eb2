"""The released checkpoints memoryllm-7b, -8b, -8b-chat and mplus-8b <-> ours: names, LoRA pair, bos, mark, pool, store.

theirs                           ours
memory [L, N, d]                 the pool: `llm.empty()`
bos_embedding [L, 1, d]          what stands first in each layer
new_memory_positional_emb        mark: added to the last K positions of a write
lora ... .default.weight         adapter "write"
lora ... .decoder_adapter.weight adapter "read"
num_tokens, num_blocks           K, N / K; in M+ (N + R) / K

only M+:
num_ltm_blocks                   R / K
ltm, ltm_keys [S, d], [S, width] slots and keys of the long-term memory, of each layer
ltm_ages [S]                     orders, negated
ltm_recall_frequencies [S]       frequencies
query_proj, key_proj, ...        the trained retriever, `longterm.search.Projectors`
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from latentmem.core.memory import Memory
from latentmem.core.settings import LongTermSettings, MemorySettings
from latentmem.decoder.adapters import Adapters, insert
from latentmem.longterm.blocks import StoredSlots, extended
from latentmem.longterm.longterm import FREQUENCY, FrequencyLongTerm
from latentmem.longterm.search import Projectors
from latentmem.model.backbone import Trained, fingerprint
from latentmem.model.model import MemoryModel

KEYS = ("num_blocks", "num_tokens", "add_bos_embedding", "lora_config", "add_decoder_lora")
LORA_KEYS = ("r", "lora_alpha", "lora_dropout", "target_modules")
# keys that transformers 4 wrote into every config.json
LEGACY = """
    add_cross_attention architectures auto_map bad_words_ids begin_suppress_tokens
    cross_attention_hidden_size decoder_start_token_id diversity_penalty do_sample dtype early_stopping
    encoder_no_repeat_ngram_size exponential_decay_length_penalty finetuning_task forced_bos_token_id
    forced_eos_token_id is_decoder length_penalty max_length min_length model_type no_repeat_ngram_size
    num_beam_groups num_beams num_return_sequences output_scores prefix pretraining_tp pruned_heads
    remove_invalid_values repetition_penalty return_dict_in_generate rope_scaling rope_theta
    sep_token_id suppress_tokens task_specific_params temperature tf_legacy_loss tie_encoder_decoder
    tokenizer_class top_k top_p torch_dtype torchscript transformers_version typical_p use_bfloat16
""".split()  # noqa: SIM905 - shorter to read than 45 quoted words
UNUSED = ("shrink_to_one_embedding", "tune_special_tokens", "special_token_ids")  # variants; accepted when off
OPTIONAL = ("drop_memory_per_layer", "num_memory_tokens")
PLUS: dict[str, Any] = {  # keys of M+, and what is understood of those that have to be so
    **dict.fromkeys(("num_ltm_blocks", "ltm_initial_size", "selector_hidden_dim", "update_ltm_frequency")),
    **{"update_ltm_mode": "immediate", "initial_rf_when_moving_stm_to_ltm": FREQUENCY, "decay_frequency": 1},
    **{"add_selector": True, "num_selector_layers": 2, "add_encoder_retriever": True, "detach_hidden_state": None},
}
OWN = ("memory", "bos_embedding", "new_memory_positional_emb", "initialized")
STORE = ("ltm", "ltm_keys", "ltm_ages", "ltm_recall_frequencies")
PROJECTORS = ("query_proj", "key_proj", "encoder_query_proj")
NAMES = {".default.": ".write.", ".decoder_adapter.": ".read."}


def is_released(config: dict[str, Any]) -> bool:
    """Whether a config.json belongs to a MemoryLLM checkpoint."""
    return (
        config.get("model_type") == "memoryllm"
        or "num_blocks" in config
        or any(name in str(config.get("architectures")) for name in ("MemoryLLM", "MPlus"))
    )


def load(name: str, config: dict[str, Any], dtype: torch.dtype, device: torch.device, *, trained: bool) -> MemoryModel:
    """Load a released checkpoint from a folder or the hub.

    Args:
        config: its config.json.
        trained: with its adapters, bos, mark and pool; else only the base model under them.

    Raises:
        ValueError: keys or shapes that are unknown or missing, all of them named.
    """
    _check_config(config)
    theirs = _weights(name, config)
    own = {key: theirs.pop(key) for key in OWN if key in theirs}
    lora = {key: theirs.pop(key) for key in list(theirs) if ".lora_" in key}
    plus = _is_plus(config)
    store = {key: theirs.pop(key) for key in list(theirs) if plus and key.split(".")[0] in STORE}
    retriever = {key: theirs.pop(key) for key in list(theirs) if plus and set(key.split(".")) & set(PROJECTORS)}
    base = _base(config, {key.replace(".base_layer.", "."): value for key, value in theirs.items()}, dtype)
    identity = fingerprint(base)
    tokenizer = _tokenizer(name)
    if not trained:
        return MemoryModel(base.to(device), tokenizer, name=name, identity=identity)

    adapters = _adapters(base, config, lora)
    base.to(device)
    left_out = [*(["initialized"] * plus), *(["bos_embedding"] * (not config["add_bos_embedding"]))]
    expected = [key for key in OWN if key not in left_out]
    missing, unknown = [key for key in expected if key not in own], [key for key in own if key not in expected]
    if unknown:
        raise ValueError(f"the checkpoint has {', '.join(unknown)}, which its config.json says it has not.")
    if missing:
        raise ValueError(f"the checkpoint lacks {', '.join(missing)}: it is not a complete MemoryLLM checkpoint.")
    K = config["num_tokens"]
    N = (config["num_blocks"] - config.get("num_ltm_blocks", 0)) * K
    L, d = config["num_hidden_layers"], config["hidden_size"]
    shapes = {
        "memory": [L, N, d],
        "bos_embedding": [L, 1, d],
        "new_memory_positional_emb": [1, 1, d],
        "initialized": [],
    }
    for key, shape in shapes.items():
        if key in own and list(own[key].shape) != shape:
            raise ValueError(f"the checkpoint's {key} has the shape {list(own[key].shape)}, expected {shape}.")
    if not own.get("initialized", plus):
        raise ValueError("the checkpoint's memory was never written (initialized = 0): it has no pool to start from.")
    from latentmem.model.prompts import Prompts

    old = torch.zeros(L, N, dtype=torch.int32)
    pool = Memory(
        slots=own["memory"].to(device, dtype),
        births=old,
        origins=old - 1,
        settings=MemorySettings(N, K, "paper"),
        model=identity,
        adapters=adapters.identity,
        tokenizer=Prompts(tokenizer).identity if tokenizer is not None else "",
        model_name=name,
        longterm=_store(config, store, N, dtype) if plus else None,
    )
    extra = Trained(
        bos=own.get("bos_embedding", own["memory"][:, :0]).to(device, dtype),
        mark=own["new_memory_positional_emb"][0, 0].to(device, dtype),
        pool=pool,
    )
    projectors = _projectors(config, retriever, device, dtype) if plus else None
    return MemoryModel(
        base, tokenizer, name=name, adapters=adapters, trained=extra, projectors=projectors, identity=identity
    )


def _is_plus(config: dict[str, Any]) -> bool:
    return bool(set(PLUS) & set(config))


def _store(config: dict[str, Any], found: dict[str, Tensor], N: int, dtype: torch.dtype) -> FrequencyLongTerm:
    """The long-term memory of a checkpoint; slots of its pool count as the newest that were ever written."""
    L, d, S, K = config["num_hidden_layers"], config["hidden_size"], config["ltm_initial_size"], config["num_tokens"]
    shapes = {"ltm": (S, d), "ltm_keys": (S, config["selector_hidden_dim"]), "ltm_ages": (S,)}
    shapes["ltm_recall_frequencies"] = (S,)
    meta = {f"{key}.{i}": torch.empty(shape, device="meta") for key, shape in shapes.items() for i in range(L)}
    _same_keys({key: tensor.shape for key, tensor in meta.items()}, found, "long-term memory")
    each = {key: torch.stack([found[f"{key}.{i}"] for i in range(L)]) for key in STORE}
    old = torch.zeros(L, S, dtype=torch.int32)
    orders = -each["ltm_ages"].round().long()
    stored = StoredSlots(each["ltm"].to(dtype), old, old - 1, orders, each["ltm_keys"].to(dtype))
    return FrequencyLongTerm(
        LongTermSettings(
            R=config["num_ltm_blocks"] * K,
            limit=1 << 62,
            group="slot",
            every=0,
            rule="frequency",
            period=config["update_ltm_frequency"] * K,
        ),
        torch.full((L, N), K - 1, dtype=torch.int32),
        extended((), stored),
        frequencies=each["ltm_recall_frequencies"].float(),
    )


def _projectors(
    config: dict[str, Any], found: dict[str, Tensor], device: torch.device, dtype: torch.dtype
) -> Projectors:
    """The trained retriever, every weight accounted for."""
    L, d, width = config["num_hidden_layers"], config["hidden_size"], config["selector_hidden_dim"]
    hidden = next((w.shape[0] for key, w in sorted(found.items()) if key.endswith(".0.weight")), d // 2)
    shapes = {0: torch.Size((hidden, d)), 2: torch.Size((width, hidden))}
    names = {(p, i): f"model.layers.{i}.self_attn.{p}" for p in PROJECTORS for i in range(L)}
    expected = {f"{name}.{k}.weight": shape for name in names.values() for k, shape in shapes.items()}
    _same_keys(expected, found, "retriever")

    def pairs(which: str) -> list[tuple[Tensor, Tensor]]:
        at = [names[which, i] for i in range(L)]
        return [tuple(found[f"{name}.{k}.weight"].to(device, dtype) for k in shapes) for name in at]  # type: ignore[misc]

    return Projectors(pairs("query_proj"), pairs("key_proj"))  # the third chooses what is dropped, if asked to


def _check_config(config: dict[str, Any]) -> None:
    from transformers import LlamaConfig

    plus = PLUS if _is_plus(config) else {}
    standard = {*LlamaConfig().to_dict(), *LEGACY, *KEYS, *OPTIONAL, *plus}
    unknown = sorted(key for key in config if key not in standard and not key.startswith("_"))
    unknown = [key for key in unknown if key not in UNUSED or config[key]]
    if unknown:
        raise ValueError(f"the checkpoint's config.json has unknown keys: {', '.join(unknown)}.")
    missing = [key for key in (*KEYS, *plus) if key not in config]
    lora = config.get("lora_config") or {}
    missing += [f"lora_config.{key}" for key in LORA_KEYS if key not in lora]
    if missing:
        raise ValueError(f"the checkpoint's config.json lacks {', '.join(missing)}.")
    for key, value in plus.items():
        if value is not None and config[key] != value:
            raise ValueError(f"the checkpoint's {key} = {config[key]!r} is not supported; {value!r} is.")
    tokens = config.get("num_memory_tokens")
    if tokens not in (None, config["num_blocks"] * config["num_tokens"]):
        raise ValueError(f"the checkpoint's num_memory_tokens = {tokens} is not num_blocks * num_tokens.")


def _weights(name: str, config: dict[str, Any]) -> dict[str, Tensor]:
    """All tensors of the checkpoint's safetensors files, on the CPU."""
    from transformers.utils import cached_file

    from latentmem.loading.hub import readable

    with readable(name):
        single = cached_file(name, "model.safetensors", _raise_exceptions_for_missing_entries=False)
        index = None if single else cached_file(name, "model.safetensors.index.json")
        files = [single] if single else _shards(name, str(index))
    tensors: dict[str, Tensor] = {}
    for file in files:
        try:
            with safe_open(file, framework="pt") as opened:
                tensors |= {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118 - no mapping
        except SafetensorError as error:
            raise ValueError(
                f"{file} is not a complete safetensors file ({error}); fetch the checkpoint again."
            ) from error
    return tensors


def _shards(name: str, index: str) -> list[str]:
    from transformers.utils import cached_file

    shards = sorted(set(json.loads(Path(index).read_text())["weight_map"].values()))
    return [str(cached_file(name, shard)) for shard in shards]


def _base(config: dict[str, Any], weights: dict[str, Tensor], dtype: torch.dtype) -> Any:
    """The Llama under the adapters, every weight accounted for."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from latentmem.loading.hub import quiet

    not_llama = {
        *KEYS,
        *OPTIONAL,
        *PLUS,
        "architectures",
        "model_type",
        "auto_map",
        "torch_dtype",
        "dtype",
        "transformers_version",
    }
    llama = LlamaConfig(**{key: value for key, value in config.items() if key not in not_llama})
    weights = {key: value for key, value in weights.items() if not key.endswith("rotary_emb.inv_freq")}
    with torch.device("meta"):
        expected = {key: value.shape for key, value in LlamaForCausalLM(llama).state_dict().items()}
    if llama.tie_word_embeddings:
        expected.pop("lm_head.weight", None)
        weights.pop("lm_head.weight", None)
    _same_keys(expected, weights, "weights")
    with quiet():
        return LlamaForCausalLM.from_pretrained(None, config=llama, state_dict=weights, dtype=dtype)


def _adapters(base: Any, config: dict[str, Any], lora: dict[str, Tensor]) -> Adapters:
    """The LoRA pair, every weight accounted for."""
    settings = config["lora_config"]
    adapters = insert(
        base,
        r=settings["r"],
        alpha=settings["lora_alpha"],
        dropout=settings["lora_dropout"],
        target_modules=settings["target_modules"],
    )
    renamed = {}
    for key, value in lora.items():
        for theirs, ours in NAMES.items():
            key = key.replace(theirs, ours)
        renamed[key] = value
    if not config["add_decoder_lora"]:
        renamed |= {key.replace(".write.", ".read."): value for key, value in renamed.items()}
    state = base.state_dict()
    _same_keys({key: value.shape for key, value in state.items() if ".lora_" in key}, renamed, "LoRA weights")
    with torch.no_grad():
        for key, value in renamed.items():
            state[key].copy_(value)
    return adapters


def _same_keys(expected: dict[str, Any], found: dict[str, Tensor], what: str) -> None:
    missing, unknown = sorted(set(expected) - set(found)), sorted(set(found) - set(expected))
    wrong = [key for key in expected if key in found and found[key].shape != expected[key]]
    if missing or unknown or wrong:
        problems = [
            f"{label}: {', '.join(keys[:8])}{' ...' if len(keys) > 8 else ''} ({len(keys)})"
            for label, keys in (("missing", missing), ("unknown", unknown), ("of a wrong shape", wrong))
            if keys
        ]
        raise ValueError(f"the checkpoint's {what} do not fit: {'; '.join(problems)}.")


def _tokenizer(name: str) -> Any:
    """The checkpoint's tokenizer, or None where a local folder has none: then only token ids can be used."""
    from transformers import AutoTokenizer

    folder = Path(name)
    if folder.is_dir() and not any((folder / file).is_file() for file in ("tokenizer.json", "tokenizer.model")):
        return None
    return AutoTokenizer.from_pretrained(name)
