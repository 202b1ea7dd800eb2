"""The write/read pair: each acts where it belongs and nowhere else, and both learn in one graph."""

import copy
import threading
from dataclasses import replace

import pytest
import reference
import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners import lora
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from latentmem.core.memory import Memory, draw, kept
from latentmem.core.read import read
from latentmem.core.settings import MemorySettings
from latentmem.decoder.adapters import READ, WRITE, Adapters, insert
from latentmem.decoder.linear import Linear
from latentmem.loading.trained import fill_pool
from latentmem.model.backbone import Trained, fingerprint
from latentmem.model.model import MemoryModel
from latentmem.model.prompts import Prompts
from latentmem.testing import byte_tokenizer, tiny_model, updated

N, K, R, ALPHA = 12, 4, 3, 6.0
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
A, B, Q = [7, 91, 33, 250], [5, 120, 77], [40, 9, 133, 8, 222]


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def tiny():
    return tiny_model(initializer_range=0.15)


def adapted(preset="exact"):
    """A tiny model with a random write/read pair; in "paper" with a random bos, mark and pool."""
    base = tiny()
    identity = fingerprint(base)
    adapters = insert(base, r=R, alpha=ALPHA, dropout=0.1, target_modules=TARGETS)
    with torch.no_grad():
        for i, (_, weight) in enumerate(adapters.parameters()):
            weight.copy_(0.15 * random(*weight.shape, seed=i))
    if preset == "exact":
        return MemoryModel(base, adapters=adapters, identity=identity)
    L, d = base.config.num_hidden_layers, base.config.hidden_size
    old = torch.zeros(L, N, dtype=torch.int32)
    pool = Memory(
        random(L, N, d), old, old - 1, MemorySettings(N, K, preset), model=identity, adapters=adapters.identity
    )
    return MemoryModel(base, adapters=adapters, identity=identity, trained=Trained(random(L, 1, d), random(d), pool))


def holding(llm, M):
    memory = llm.empty(N, K)
    old = torch.zeros(memory.L, M, dtype=torch.int32)
    return replace(memory, slots=random(memory.L, M, memory.d, seed=3), births=old, origins=old - 1)


def lora_layers(llm):
    """Name of the linear layer in the plain model -> the layer with the adapters."""
    return {name: module for name, module in llm.base.named_modules() if hasattr(module, "lora_A")}


def merged(llm, adapter):
    """A plain copy of the model with one adapter added to its weights, made by hand."""
    plain = tiny()
    with torch.no_grad():
        for name, layer in lora_layers(llm).items():
            weight = plain.get_submodule(name).weight
            weight += ALPHA / R * layer.lora_B[adapter].weight @ layer.lora_A[adapter].weight
    return plain


def write_reference(write, read, first, slots, ids):
    """New slots of "exact": the text runs under `write`, sink and slots give keys and values under `read`."""
    hidden, new = write.get_input_embeddings()(torch.tensor([ids])), []
    heads, groups = write.config.num_attention_heads, write.config.num_key_value_heads
    for i, (mine, theirs) in enumerate(zip(write.model.layers, read.model.layers, strict=True)):
        new.append(hidden[0])
        prefix = theirs.input_layernorm(torch.cat([first[i], slots[i]])[None])
        x = mine.input_layernorm(hidden)
        q = mine.self_attn.q_proj(x)
        k = torch.cat([theirs.self_attn.k_proj(prefix), mine.self_attn.k_proj(x)], dim=1)
        v = torch.cat([theirs.self_attn.v_proj(prefix), mine.self_attn.v_proj(x)], dim=1)
        q, k, v = (
            t.reshape(1, t.shape[1], count, -1).transpose(1, 2)
            for t, count in zip((q, k, v), (heads, groups, groups), strict=True)
        )
        T, n = k.shape[2], q.shape[2]
        cos, sin = write.model.rotary_emb(x, torch.arange(T)[None])
        q = apply_rotary_pos_emb(q, q, cos[:, -n:], sin[:, -n:])[0]
        k = apply_rotary_pos_emb(k, k, cos, sin)[0].repeat_interleave(heads // groups, dim=1)
        sees = torch.arange(T)[None] <= torch.arange(T - n, T)[:, None]
        scores = (q @ k.transpose(2, 3) / q.shape[3] ** 0.5).masked_fill(~sees, float("-inf"))
        out = scores.softmax(-1) @ v.repeat_interleave(heads // groups, dim=1)
        hidden = hidden + mine.self_attn.o_proj(out.transpose(1, 2).reshape(1, n, -1))
        hidden = hidden + mine.mlp(mine.post_attention_layernorm(hidden))
    return torch.stack(new)


def gap(a, b):
    assert a.shape == b.shape
    return (a - b).abs().max().item()


def plain_to_the_bit(base):
    plain = MemoryModel(tiny()).base if isinstance(base.lm_head, Linear) else tiny()  # by the same kernels
    with torch.no_grad():
        ids = torch.tensor([A + Q])
        return torch.equal(base(input_ids=ids).logits, plain(input_ids=ids).logits)


# --- where each acts ------------------------------------------------------------------------------------------------


def test_a_fresh_pair_changes_nothing():
    base = tiny()
    adapters = insert(base, r=R, alpha=ALPHA, dropout=0.1, target_modules=TARGETS)
    assert len(adapters.layers) == 3 * len(TARGETS)
    for name in (None, WRITE, READ):
        with adapters.use(name):
            assert plain_to_the_bit(base)


def test_outside_of_use_the_base_is_the_plain_model_to_the_bit():
    llm = adapted()
    assert plain_to_the_bit(llm.base)
    memory = llm.write_ids(llm.empty(N, K), A + B)
    llm.logits(memory, Q)
    llm.generate_ids(memory, Q, max_new_tokens=3)
    assert plain_to_the_bit(llm.base)


def test_the_adapters_change_what_is_computed_at_all():
    llm, ids = adapted(), torch.tensor([Q])
    with torch.no_grad():
        plain = llm.base(input_ids=ids).logits
        for name in (WRITE, READ):
            with llm.adapters.use(name):
                logits = llm.base(input_ids=ids).logits
            assert gap(logits, merged(llm, name)(input_ids=ids).logits) < 1e-5
            assert gap(logits, plain) > 0.1


def test_an_empty_memory_and_the_sink_know_no_adapter():
    llm, plain = adapted(), MemoryModel(tiny())
    memory = llm.empty(N, K)
    with torch.no_grad():
        assert torch.equal(llm.logits(memory, Q), plain.logits(plain.empty(N, K), Q))
        assert torch.equal(llm.first, plain.first)
    ours, theirs = (model.generate_ids(model.empty(N, K), Q, max_new_tokens=6) for model in (llm, plain))
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize("verb", ["logits", "new_slots", "write_ids", "generate_ids"])
def test_the_sink_knows_no_adapter_whichever_verb_asks_for_it_first(verb):
    llm = adapted()
    getattr(llm, verb)(holding(llm, 7), A)
    with torch.no_grad():
        assert gap(llm.first, reference.sink(tiny(), llm.base.config.bos_token_id)) < 1e-5


@pytest.mark.parametrize("M", [0, 4, 7, N])
def test_in_exact_the_write_adapter_acts_on_the_text_alone_and_the_read_adapter_on_sink_and_slots(M):
    llm = adapted()
    memory = holding(llm, M)
    with torch.no_grad():
        theirs = write_reference(merged(llm, WRITE), merged(llm, READ), llm.first, memory.slots, A)
        for other in (WRITE, READ):  # neither adapter alone would give the same
            alone = reference.write_exact(merged(llm, other), llm.first, memory.slots, A)
            assert gap(alone, theirs) > 1e-2
        assert gap(llm.new_slots(memory, A), theirs) < 1e-5


@pytest.mark.parametrize("M", [4, N])
def test_the_read_adapter_acts_on_sink_slots_and_reading(M):
    llm = adapted()
    memory = holding(llm, M)
    with torch.no_grad():
        theirs = reference.read(merged(llm, READ), llm.first, memory.slots, Q)
        assert gap(llm.logits(memory, Q), theirs) < 1e-5


def test_greedy_generation_runs_under_the_read_adapter():
    llm = adapted()
    memory, model, ids = holding(llm, 7), merged(llm, READ), list(Q)
    with torch.no_grad():
        while len(ids) < len(Q) + 8:
            ids.append(int(reference.read(model, llm.first, memory.slots, ids)[-1].argmax()))
    assert llm.generate_ids(memory, Q, max_new_tokens=8)[0].tolist() == ids


def test_in_paper_a_write_runs_as_a_whole_under_the_write_adapter_and_a_read_under_the_read_adapter():
    llm = adapted("paper")
    memory, extra = llm.empty(), llm.trained
    with torch.no_grad():
        for ids in (A + B, B):
            theirs = reference.write_paper(merged(llm, WRITE), extra.bos, extra.mark, memory.slots, ids, K)
            assert gap(llm.new_slots(memory, ids), theirs) < 1e-5
        theirs = reference.read(merged(llm, READ), extra.bos, memory.slots, Q)
        assert gap(llm.logits(memory, Q), theirs) < 1e-5


def test_a_pool_is_born_of_the_text_alone_however_short_it_is():
    llm = adapted("paper")
    llm.prompts = Prompts(byte_tokenizer())
    empty = replace(llm.empty(), **{name: getattr(llm.empty(), name)[:, :0] for name in ("slots", "births", "origins")})
    text = "ab"
    pool = fill_pool(llm, empty, text)
    assert pool.M == N and pool.updates == 0 and (pool.births == 0).all() and (pool.origins == -1).all()
    ids = llm.prompts.written(text) * K  # two tokens: as many as give K slots, and K more
    longer = empty
    while longer.M < N:
        longer = llm.write_ids(longer, ids)
    assert len(ids) == 2 * K and torch.equal(pool.slots, longer.slots)


def test_keys_and_values_kept_through_writes_are_those_of_the_read_adapter_to_the_bit():
    llm = adapted()
    memory = llm.empty(N, K)
    for _ in range(4):
        memory = llm.write_ids(memory, A)
    derived = llm.prefixes.get(memory)
    with torch.no_grad(), llm.adapters.use(READ):
        fresh = read(llm.decoder, llm.first, memory.slots)
    for name in ("keys", "rotated", "values"):
        assert all(map(torch.equal, getattr(derived, name), getattr(fresh, name))), name


# --- learning -------------------------------------------------------------------------------------------------------


def test_both_adapters_get_their_gradients_in_one_graph_and_they_are_right():
    llm = adapted()
    for _, weight in llm.adapters.parameters():
        weight.requires_grad_()
    memory = holding(llm, 10)
    start = memory.slots.requires_grad_()
    write, reading = merged(llm, WRITE), merged(llm, READ)

    slots = start
    for ids in (A, B):
        new = write_reference(write, reading, llm.first, slots, ids)
        stays = kept(draw(memory, len(ids)), memory.M)
        slots = torch.stack([torch.cat([slots[i][stays[i]], new[i]]) for i in range(memory.L)])
        memory = updated(memory, llm.new_slots(memory, ids))
    weight = random(len(Q), 260, seed=5)
    loss = (llm.logits(memory, Q) * weight).sum()
    theirs = (reference.read(reading, llm.first, slots, Q) * weight).sum()
    assert gap(loss, theirs) <= 1e-5 * weight.numel()
    loss.backward()
    ours = start.grad.clone()
    start.grad = None
    theirs.backward()
    assert gap(ours, start.grad) <= 1e-5 * start.grad.abs().max()

    scale = ALPHA / R  # of a weight W + scale B A: dB = scale dW A', dA = scale B' dW
    for adapter, model in ((WRITE, write), (READ, reading)):
        for name, layer in lora_layers(llm).items():
            up, down, whole = layer.lora_B[adapter].weight, layer.lora_A[adapter].weight, model.get_submodule(name)
            if whole.weight.grad is None:  # the last layer's own work reaches no slot
                assert adapter == WRITE and ".2." in name and up.grad is None
                continue
            for found, right in (
                (up.grad, scale * whole.weight.grad @ down.T),
                (down.grad, scale * up.T @ whole.weight.grad),
            ):
                assert right.abs().max() > 0
                assert gap(found, right) <= 1e-5 * right.abs().max(), (adapter, name)


def test_a_step_of_the_optimizer_changes_both_adapters_and_nothing_else():
    llm = adapted()
    weights = dict(llm.adapters.parameters())
    before = {name: weight.detach().clone() for name, weight in llm.base.state_dict().items()}
    for weight in weights.values():
        weight.requires_grad_()
    optimizer = torch.optim.SGD(weights.values(), lr=0.1)
    memory = holding(llm, 7)
    memory = updated(memory, llm.new_slots(memory, A))
    llm.logits(memory, Q).logsumexp(-1).sum().backward()
    optimizer.step()
    changed = {name for name, weight in llm.base.state_dict().items() if not torch.equal(weight, before[name])}
    assert changed and all(".lora_" in name for name in changed)
    for adapter in (WRITE, READ):
        assert any(f".lora_A.{adapter}." in name for name in changed)
        assert any(f".lora_B.{adapter}." in name for name in changed)
    assert plain_to_the_bit(llm.base)


# --- switching ------------------------------------------------------------------------------------------------------


def output(llm):
    with torch.no_grad():
        return llm.base(input_ids=torch.tensor([Q])).logits


def test_a_second_pair_of_switches_works_too():
    llm = adapted()
    plain = output(llm)
    with llm.adapters.use(READ):
        reading = output(llm)
    for base in (llm.base, copy.deepcopy(llm.base)):
        again = Adapters(base)
        with torch.no_grad(), again.use(READ):
            assert torch.equal(base(input_ids=torch.tensor([Q])).logits, reading)
        assert torch.equal(output(llm), plain)


def test_use_nests_and_puts_back_what_was_active():
    llm = adapted()
    plain = output(llm)
    with llm.adapters.use(WRITE):
        writing = output(llm)
        with llm.adapters.use(READ):
            reading = output(llm)
            with llm.adapters.use(None):
                assert torch.equal(output(llm), plain)
            assert torch.equal(output(llm), reading)
        assert torch.equal(output(llm), writing)
    assert torch.equal(output(llm), plain)
    assert not torch.equal(reading, writing)


KINDS = {
    "plain": {},
    "bias": {"lora_bias": True},
    "dora": {"use_dora": True},
    "rank-stabilised": {"use_rslora": True},
}


@pytest.mark.filterwarnings("ignore:Already found a `peft_config`", "ignore:`lora_bias=True` was passed")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_a_layer_gives_what_pefts_own_forward_gives(kind, dtype):
    base = tiny().to(dtype)
    for name in (WRITE, READ):
        config = LoraConfig(r=R, lora_alpha=ALPHA, lora_dropout=0.5, target_modules=TARGETS, **KINDS[kind])
        inject_adapter_in_model(config, base, adapter_name=name)
    base.eval()
    for i, (name, part) in enumerate(base.named_modules()):
        if name.endswith((f"lora_A.{WRITE}", f"lora_B.{WRITE}", f"lora_B.{READ}")):
            for weight in part.parameters():
                weight.copy_(0.5 * random(*weight.shape, seed=i))
        if READ in name and dtype == torch.bfloat16:
            part.float()  # as PEFT does with adapters of a model in 16 bits
    theirs = copy.deepcopy(base)
    adapters, layers = Adapters(base), [m for m in theirs.modules() if isinstance(m, lora.Linear)]
    assert {layer.lora_A[READ].weight.dtype for layer in adapters.layers} == {torch.float32}
    for name in (WRITE, READ):
        for mine, other in zip(adapters.layers, layers, strict=True):
            x = random(1, 5, mine.in_features).to(dtype)
            other.set_adapter(name)
            with adapters.use(name):
                found = mine(x)
            expected = other(x)
            # In bfloat16 both round what comes from the layer, from A, from B and their sum, in sums of another order.
            precision = 1e-5 if dtype == torch.float32 else 2 * torch.finfo(dtype).eps
            assert gap(found, expected) <= precision * expected.abs().max() and found.dtype == dtype
            assert gap(found, mine(x)) > 0.01 and torch.equal(mine(x), mine.base_layer(x))
    base.train()
    with adapters.use(WRITE):
        assert gap(mine(x), mine(x)) > 0  # dropout


def test_an_error_inside_use_puts_back_what_was_active():
    llm = adapted()
    plain = output(llm)
    with pytest.raises(KeyError), llm.adapters.use(WRITE):
        raise KeyError
    assert torch.equal(output(llm), plain)


def test_a_switch_leaves_the_gradient_flags_of_both_adapters():
    llm = adapted()
    for _, weight in llm.adapters.parameters():
        weight.requires_grad_()
    for name in (WRITE, READ, None):
        with llm.adapters.use(name):
            assert all(weight.requires_grad for _, weight in llm.adapters.parameters())
    assert all(weight.requires_grad for _, weight in llm.adapters.parameters())


def test_a_switch_in_one_thread_is_not_seen_in_another():
    # An answer that is being streamed runs in a thread of its own, while the caller may write or read.
    llm = adapted()
    plain, inside, leave = output(llm), threading.Event(), threading.Event()

    def other():
        with llm.adapters.use(READ):
            inside.set()
            leave.wait(300)

    thread = threading.Thread(target=other)
    thread.start()
    assert inside.wait(300)
    try:
        seen = output(llm)
        with llm.adapters.use(WRITE):  # entered while the other is inside, left after it has gone
            leave.set()
            thread.join()
    finally:
        leave.set()
        thread.join()
    assert torch.equal(output(llm), plain), "the other thread's adapter was left active"
    assert torch.equal(seen, plain), "the other thread's adapter was active here"


# --- identity -------------------------------------------------------------------------------------------------------


def test_the_identity_covers_every_weight_the_scale_and_nothing_else():
    llm = adapted()
    identity = llm.adapters.identity
    assert adapted().adapters.identity == identity
    for name, weight in llm.adapters.parameters():
        old = weight.detach().clone()
        with torch.no_grad():
            weight.view(-1)[-1] += 1.0
        assert llm.adapters.identity != identity, name
        with torch.no_grad():
            weight.copy_(old)
        assert llm.adapters.identity == identity, name
    fresh = copy.deepcopy(llm.base)
    for layer in Adapters(fresh).layers:
        layer.scaling[READ] = 1.0
    assert Adapters(fresh).identity != identity


def test_names_of_the_weights_are_unique_and_in_a_fixed_order():
    names = [name for name, _ in adapted().adapters.parameters()]
    assert len(set(names)) == len(names) == 3 * len(TARGETS) * 2 * 2
    assert names == [name for name, _ in adapted().adapters.parameters()]


def test_the_identity_of_the_model_does_not_know_the_adapters():
    llm = adapted()
    assert fingerprint(llm.base) == fingerprint(tiny()) == llm.identity


def test_a_memory_of_other_adapters_is_refused():
    llm = adapted()
    memory = llm.write_ids(llm.empty(N, K), A)
    llm.check(memory)
    with torch.no_grad():
        next(iter(llm.adapters.parameters()))[1].add_(0.5)
    for use in (lambda m: llm.logits(m, Q), lambda m: llm.write_ids(m, B), lambda m: llm.generate_ids(m, Q)):
        with pytest.raises(ValueError, match="another adapter"):
            use(memory)
    plain = MemoryModel(tiny())
    with pytest.raises(ValueError, match="another adapter"):
        plain.check(memory)
    with pytest.raises(ValueError, match="another adapter"):
        llm.check(plain.empty(N, K))


def test_a_change_too_small_for_the_identity_still_projects_memories_anew():
    llm = adapted()
    with torch.no_grad():
        for _, weight in llm.adapters.parameters():
            weight.copy_(weight.bfloat16())
        memory = holding(llm, 7)
        before, identity = llm.logits(memory, Q), llm.adapters.identity
        for _, weight in llm.adapters.parameters():
            weight.mul_(1.0015)  # less than half a step of bfloat16, in which the identity is computed
        assert llm.adapters.identity == identity
        theirs = reference.read(merged(llm, READ), llm.first, memory.slots, Q)
        assert gap(before, theirs) > 1e-4
        assert gap(llm.logits(memory, Q), theirs) < 1e-5
