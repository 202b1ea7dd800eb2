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
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from latentmem.core.memory import Memory
from latentmem.core.settings import LongTermSettings, MemorySettings
from latentmem.decoder.adapters import Adapters, insert
from latentmem.loading.hub import quiet, readable
from latentmem.longterm.blocks import StoredSlots, extended
from latentmem.longterm.longterm import FREQUENCY, FrequencyLongTerm
from latentmem.longterm.search import Projectors
from latentmem.model.backbone import Trained, fingerprint
from latentmem.model.model import MemoryModel
from latentmem.model.prompts import Prompts

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
NOT_LLAMA = ("architectures", "model_type", "auto_map", "torch_dtype", "dtype", "transformers_version")
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
    theirs, plus = _weights(name), _is_plus(config)
    own = _taken(theirs, lambda key: key in OWN)
    lora = _taken(theirs, lambda key: ".lora_" in key)
    store = _taken(theirs, lambda key: plus and key.split(".")[0] in STORE)
    retriever = _taken(theirs, lambda key: plus and not set(PROJECTORS).isdisjoint(key.split(".")))
    base = _base(config, {key.replace(".base_layer.", "."): value for key, value in theirs.items()}, dtype)
    identity, tokenizer = fingerprint(base), _tokenizer(name)
    if not trained:
        return MemoryModel(base.to(device), tokenizer, name=name, identity=identity)
    adapters = _adapters(base, config, lora)
    _check_own(own, config)
    pool = replace(
        _pool(config, own["memory"].to(device, dtype)),
        model=identity,
        adapters=adapters.identity,
        tokenizer=Prompts(tokenizer).identity if tokenizer is not None else "",
        model_name=name,
        longterm=_store(config, store, _capacity(config), dtype) if plus else None,
    )
    bos = own.get("bos_embedding", own["memory"][:, :0]).to(device, dtype)
    return MemoryModel(
        base.to(device),
        tokenizer,
        name=name,
        adapters=adapters,
        trained=Trained(bos, own["new_memory_positional_emb"][0, 0].to(device, dtype), pool),
        projectors=_projectors(config, retriever, device, dtype) if plus else None,
        identity=identity,
    )


def _taken(weights: dict[str, Tensor], belongs: Callable[[str], bool]) -> dict[str, Tensor]:
    """The weights whose names belong, taken out of the others."""
    return {key: weights.pop(key) for key in list(weights) if belongs(key)}


def _check_own(own: dict[str, Tensor], config: dict[str, Any]) -> None:
    """Refuse bos, mark or pool that are missing, unknown, of a wrong shape, or never written."""
    plus = _is_plus(config)
    absent = [*(["initialized"] * plus), *(["bos_embedding"] * (not config["add_bos_embedding"]))]
    expected = [key for key in OWN if key not in absent]
    missing, unknown = [key for key in expected if key not in own], [key for key in own if key not in expected]
    if unknown:
        raise ValueError(f"the checkpoint has {', '.join(unknown)}, which its config.json says it has not.")
    if missing:
        raise ValueError(f"the checkpoint lacks {', '.join(missing)}: it is not a complete MemoryLLM checkpoint.")
    L, d = config["num_hidden_layers"], config["hidden_size"]
    shapes = {
        "memory": [L, _capacity(config), d],
        "bos_embedding": [L, 1, d],
        "new_memory_positional_emb": [1, 1, d],
        "initialized": [],
    }
    for key, shape in shapes.items():
        if key in own and list(own[key].shape) != shape:
            raise ValueError(f"the checkpoint's {key} has the shape {list(own[key].shape)}, expected {shape}.")
    if not own.get("initialized", plus):
        raise ValueError("the checkpoint's memory was never written (initialized = 0): it has no pool to start from.")


def _capacity(config: dict[str, Any]) -> int:
    """N of the checkpoint's pool."""
    return (config["num_blocks"] - config.get("num_ltm_blocks", 0)) * config["num_tokens"]


def _pool(config: dict[str, Any], slots: Tensor) -> Memory:
    """A full memory that is older than all writes."""
    old = torch.zeros(slots.shape[:2], dtype=torch.int32)
    settings = MemorySettings(_capacity(config), config["num_tokens"], "paper")
    return Memory(slots=slots, births=old, origins=old - 1, settings=settings)


def _is_plus(config: dict[str, Any]) -> bool:
    return bool(set(PLUS) & set(config))


def _store(config: dict[str, Any], theirs: dict[str, Tensor], N: int, dtype: torch.dtype) -> FrequencyLongTerm:
    """The long-term memory of a checkpoint; slots of its pool count as the newest that were ever written."""
    L, d, S, K = config["num_hidden_layers"], config["hidden_size"], config["ltm_initial_size"], config["num_tokens"]
    shapes = {"ltm": (S, d), "ltm_keys": (S, config["selector_hidden_dim"])}
    each_shape = {key: torch.Size(shapes.get(key, (S,))) for key in STORE}
    _same_keys({f"{key}.{i}": each_shape[key] for key in STORE for i in range(L)}, theirs, "long-term memory")
    each = {key: torch.stack([theirs[f"{key}.{i}"] for i in range(L)]) for key in STORE}
    old = torch.zeros(L, S, dtype=torch.int32)
    orders = -each["ltm_ages"].round().long()
    stored = StoredSlots(each["ltm"].to(dtype), old, old - 1, orders, each["ltm_keys"].to(dtype))
    R, period = config["num_ltm_blocks"] * K, config["update_ltm_frequency"] * K
    return FrequencyLongTerm(
        LongTermSettings(R=R, limit=1 << 62, group="slot", every=0, rule="frequency", period=period),
        torch.full((L, N), K - 1, dtype=torch.int32),
        extended((), stored),
        frequencies=each["ltm_recall_frequencies"].float(),
    )


def _projectors(
    config: dict[str, Any], theirs: dict[str, Tensor], device: torch.device, dtype: torch.dtype
) -> Projectors:
    """The trained retriever, every weight accounted for."""
    L, d, width = config["num_hidden_layers"], config["hidden_size"], config["selector_hidden_dim"]
    hidden = next((w.shape[0] for key, w in sorted(theirs.items()) if key.endswith(".0.weight")), d // 2)
    shapes = {0: torch.Size((hidden, d)), 2: torch.Size((width, hidden))}
    names = {(p, i): f"model.layers.{i}.self_attn.{p}" for p in PROJECTORS for i in range(L)}
    expected = {f"{name}.{k}.weight": shape for name in names.values() for k, shape in shapes.items()}
    _same_keys(expected, theirs, "retriever")

    def pairs(which: str) -> list[tuple[Tensor, Tensor]]:
        at = [names[which, i] for i in range(L)]
        return [tuple(theirs[f"{name}.{k}.weight"].to(device, dtype) for k in shapes) for name in at]  # type: ignore[misc]

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


def _weights(name: str) -> dict[str, Tensor]:
    """All tensors of the checkpoint's safetensors files, on the CPU."""
    from transformers.utils import cached_file

    with readable(name):
        files = [cached_file(name, "model.safetensors", _raise_exceptions_for_missing_entries=False)]
        if files == [None]:
            index = Path(str(cached_file(name, "model.safetensors.index.json")))
            shards = sorted(set(json.loads(index.read_text())["weight_map"].values()))
            files = [cached_file(name, shard) for shard in shards]
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


def _base(config: dict[str, Any], weights: dict[str, Tensor], dtype: torch.dtype) -> Any:
    """The Llama under the adapters, every weight accounted for."""
    from transformers import LlamaConfig, LlamaForCausalLM

    not_llama = {*KEYS, *OPTIONAL, *PLUS, *NOT_LLAMA}
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
    r, alpha, dropout, modules = (settings[key] for key in LORA_KEYS)
    adapters = insert(base, r=r, alpha=alpha, dropout=dropout, target_modules=modules)
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


def _same_keys(expected: dict[str, Any], theirs: dict[str, Tensor], what: str) -> None:
    missing, unknown = sorted(set(expected) - set(theirs)), sorted(set(theirs) - set(expected))
    wrong = [key for key in expected if key in theirs and theirs[key].shape != expected[key]]
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
