"""transformers' Qwen3-Next and Qwen3.5 in inference, all between their GEMMs by gdn: whole models with random weights."""

import copy

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

if not transformers.__version__.startswith("5.23."):
    pytest.skip(f"transformers 5.23 is needed, here is {transformers.__version__}", allow_module_level=True)

import tiny_models
from transformers.cache_utils import DynamicCache, StaticCache

import gdn
import gdn.integrations.transformers as integration
from gdn.integrations import UnknownEngine

KINDS = ["Qwen3Next", "Qwen3_5", "Qwen3_5Moe"]
HEADS = [(4, 8, 32, 32), (2, 6, 16, 24), (1, 4, 16, 16), (2, 2, 16, 16), (3, 12, 24, 8)]
EOS = dict(eos_token_id=None, pad_token_id=0)


@pytest.fixture(autouse=True)
def off_again():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # small tensors, and a machine that may be busy
    yield
    torch.set_num_threads(threads)
    integration.uninstall()


@pytest.fixture
def calls(monkeypatch):
    """Rows of each call of a layer's method."""
    rows = []
    for name in ("decode", "prefill"):
        method = getattr(gdn.Layer, name)

        def counted(self, projections, *rest, name=name, method=method, **options):
            rows.append((name, projections[0].shape[0]))
            return method(self, projections, *rest, **options)

        monkeypatch.setattr(gdn.Layer, name, counted)
    return rows


def model(kind=KINDS[0], heads=HEADS[0], dtype=torch.float32):
    torch.manual_seed(0)
    made = getattr(transformers, kind + "ForCausalLM")(tiny_models.config(kind, heads)).to(dtype).eval()
    made.generation_config.update(**EOS)
    with torch.no_grad():
        for name, one in made.named_parameters():
            # Decays and gates as trained models have them, and logits that are not all alike.
            if name.endswith("A_log"):
                one.copy_(torch.empty(one.shape).uniform_(1, 16).log())
            elif name.endswith("dt_bias"):
                one.copy_(torch.empty(one.shape).uniform_(-4, 0))
            elif one.dim() >= 2:
                one.copy_(torch.randn(one.shape) * (0.3 if "conv1d" in name else 0.6 / one.shape[-1] ** 0.5))
    return made


def tokens(batch, length):
    return torch.randint(
        0, tiny_models.VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(1)
    )


def padded(batch, length):
    mask = torch.ones(batch, length, dtype=torch.long)
    for r in range(batch - 1):
        mask[r, : 3 + 5 * r] = 0
    return mask


def in_pieces(net, ids, ends):
    """Logits of tokens given up to each of `ends`, on the cache of those before."""
    out, cache, start = [], None, 0
    for end in ends:
        step = net(ids[:, start:end], past_key_values=cache, use_cache=True)
        out.append(step.logits)
        cache, start = step.past_key_values, end
    return torch.cat(out, 1)


def forced(net, ids, mask, all_ids):
    """Logits for given tokens behind a prompt, step by step."""
    seen, steps, start = mask, [], ids.shape[1]
    step = net(ids, attention_mask=mask, use_cache=True, logits_to_keep=1)
    for t in range(start, all_ids.shape[1]):
        steps.append(step.logits[:, -1])
        seen = torch.cat([seen, torch.ones_like(seen[:, :1])], 1)
        step = net(
            all_ids[:, t : t + 1], attention_mask=seen, past_key_values=step.past_key_values, use_cache=True
        )
    return torch.stack(steps)


def both(run, calls):
    """What `run` returns without gdn and with it. gdn has to be used the second time, and only then."""
    before = run()
    assert calls == []
    with integration.installed():
        after = run()
    used = list(calls)
    assert used
    run()
    assert calls == used
    return before, after


def close(before, after, exact=None):
    """Within what roundings of float32 come to after some layers; in bfloat16 as near to float32's result as without gdn, up to
    the luck that roundings of four layers are. (`test_one_layer_is_nearer` leaves nothing to it.)"""
    assert before.shape == after.shape and before.dtype == after.dtype
    if before.dtype == torch.float32:
        torch.testing.assert_close(after, before, rtol=0, atol=1e-4 * before.abs().max().item())
        return
    errors = [(one.double() - exact.double()).norm() for one in (before, after)]
    assert errors[1] <= 2 * errors[0], errors


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_two_hundred_greedy_tokens(kind, dtype, calls):
    """Prompts of three lengths, padded on the left. Then the logits, where all go on from the tokens of the model without gdn: as
    near to those of a wider type as without gdn, and the same token wherever one stands out from rounding."""
    net, ids, mask = model(kind, dtype=dtype), tokens(3, 23), padded(3, 23)

    def run():
        how = dict(max_new_tokens=200, do_sample=False, output_logits=True, return_dict_in_generate=True)
        made = net.generate(ids, attention_mask=mask, **how)
        return made.sequences, torch.stack(made.logits).to(dtype)

    is_exact = dtype == torch.float32
    with torch.no_grad():
        before, without = run()
        assert before.shape == (3, 223) and calls == []
        with integration.installed():
            after, ours = run()
            assert calls == [("prefill", 69)] * 3 + [("decode", 3)] * 3 * 199
            if not is_exact:
                ours = forced(net, ids, mask, before)
        used = len(calls)
        net(ids, attention_mask=mask)
        # The same tokens lead to the same logits: they need not be given again.
        exact = without if is_exact else forced(net.float(), ids, mask, before)
    assert len(calls) == used
    assert not is_exact or torch.equal(before, after)
    close(without, ours, exact)
    top, rounding = exact.topk(2, -1).values, (without - exact).square().mean().sqrt()
    # Six deviations of the difference of two logits.
    is_clear = top[..., 0] - top[..., 1] > 6 * 2**0.5 * rounding
    assert is_clear.float().mean() > 0.4, "many steps must be decided"
    assert torch.equal(ours.argmax(-1)[is_clear], exact.argmax(-1)[is_clear])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("heads", HEADS, ids=str)
@pytest.mark.parametrize("kind", KINDS[:2])
def test_prefill_and_steps_of_any_heads(kind, heads, dtype, calls):
    net, ids = model(kind, heads, dtype), tokens(2, 40)

    def logits(net):
        """A prompt, more of it behind, one token, and three at once."""
        return in_pieces(net, ids, (17, 36, 37, 40))

    with torch.no_grad():
        exact = logits(copy.deepcopy(net).float())
        before, after = both(lambda: logits(net), calls)
        close(before, after, exact)
        assert (
            calls
            == [("prefill", 34)] * 3 + [("prefill", 38)] * 3 + [("decode", 2)] * 3 + [("prefill", 6)] * 3
        )
        del calls[:]
        close(*both(lambda: net(ids, use_cache=False).logits, calls), copy.deepcopy(net).float()(ids).logits)


@pytest.mark.parametrize("heads", HEADS, ids=str)
@pytest.mark.parametrize("kind", KINDS[:2])
def test_one_layer_is_nearer(kind, heads, calls):
    """In bfloat16, to the same layer's output in float32 from the same hidden states."""
    layer = model(kind, heads, torch.bfloat16).model.layers[0].linear_attn
    hidden = torch.randn(4, 150, 64).bfloat16()
    with torch.no_grad():
        exact = copy.deepcopy(layer).float()(hidden.float()).double()
        before, after = both(lambda: layer(hidden), calls)
    errors = [(one.double() - exact).norm() for one in (before, after)]
    assert errors[1] < errors[0], errors


@pytest.mark.parametrize("kind", KINDS[:2])
def test_states_stay_where_they_are(kind, calls):
    """The cache's own tensors, in its own layout, with what transformers would have left there."""
    net, ids = model(kind), tokens(2, 20)
    layers = [i for i, name in enumerate(net.config.layer_types) if name == "linear_attention"]

    def run():
        cache = DynamicCache(config=net.config)
        net(ids[:, :3], past_key_values=cache, use_cache=True)
        held = [[cache.layers[i].conv_states[0], cache.layers[i].recurrent_states[0]] for i in layers]
        at = [[one.data_ptr() for one in pair] for pair in held]
        for t in range(3, 20):
            net(ids[:, t : t + 1], past_key_values=cache, use_cache=True)
        now = [[cache.layers[i].conv_states[0], cache.layers[i].recurrent_states[0]] for i in layers]
        assert all(one is other for a, b in zip(held, now) for one, other in zip(a, b))
        assert at == [[one.data_ptr() for one in pair] for pair in now]
        return now

    with torch.no_grad():
        before, after = both(run, calls)
    for pair, ours in zip(before, after, strict=True):
        for one, other in zip(pair, ours, strict=True):
            assert one.shape == other.shape and one.dtype == other.dtype and one.stride() == other.stride()
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    assert before[0][0].shape[-1] == 4


def test_a_cache_that_is_used_again(calls):
    net, ids = model(), tokens(2, 12)
    for make in (
        lambda: DynamicCache(config=net.config),
        lambda: StaticCache(config=net.config, max_cache_len=32),
    ):
        del calls[:]

        def run():
            cache, out = make(), []
            for _ in range(2):
                out.append(net(ids[:, :11], past_key_values=cache, use_cache=True).logits)
                out.append(net(ids[:, 11:], past_key_values=cache, use_cache=True).logits)
                cache.reset()
            return torch.cat(out, 1)

        with torch.no_grad():
            before, after = both(run, calls)
        close(before, after)


def test_beams_and_samples(calls):
    net, ids = model(), tokens(2, 9)

    def run():
        torch.manual_seed(3)
        with torch.no_grad():
            beams = net.generate(ids, max_new_tokens=12, num_beams=3, do_sample=False)
            return beams, net.generate(ids, max_new_tokens=12, do_sample=True)

    (beams, samples), ours = both(run, calls)
    assert torch.equal(beams, ours[0]) and torch.equal(samples, ours[1])


def test_padding_on_both_sides(calls):
    net, ids = model(), tokens(3, 30)
    mask = padded(3, 30)
    mask[2, 20:] = 0
    with torch.no_grad():
        before, after = both(lambda: net(ids, attention_mask=mask).logits, calls)
    close(before[mask.bool()], after[mask.bool()])


@pytest.mark.parametrize("kind", KINDS)
def test_training_is_the_layer_s_own(kind, calls):
    net, ids = model(kind).train(), tokens(2, 20)

    def run():
        net.zero_grad()
        net(ids, labels=ids).loss.backward()
        return [one.grad.clone() for one in net.parameters() if one.grad is not None]

    before = run()
    with integration.installed():
        after = run()
    assert calls == [] and len(before) == len(after)
    assert all(map(torch.equal, before, after))


def test_what_is_left_to_the_layer(calls):
    """Gradients of some, tangents, transforms, float64, hooks on its modules, and packed sequences that kernels heed."""
    net = model().requires_grad_(False)
    layer = net.model.layers[0].linear_attn
    hidden = torch.randn(1, 8, 64)
    fw = torch.autograd.forward_ad
    with integration.installed():
        layer(hidden)
        assert calls == [("prefill", 8)], "grad mode is no matter where nothing requires a gradient"
        del calls[:]
        layer(hidden.clone().requires_grad_()).sum().backward()
        layer.out_proj.weight.requires_grad_(True)
        layer(hidden)
        layer.out_proj.weight.requires_grad_(False)
        with fw.dual_level():
            assert fw.unpack_dual(layer(fw.make_dual(hidden, hidden))).tangent is not None
        torch.func.jvp(layer, (hidden,), (hidden,))
        copy.deepcopy(layer).double()(hidden.double())
        with pytest.raises(ValueError, match="packed sequences"):
            layer(hidden, cu_seq_lens_q=torch.tensor([0, 4, 8], dtype=torch.int32))
        for module in (layer.norm, layer.conv1d):
            handle = module.register_forward_hook(lambda *_: None)
            layer(hidden)
            handle.remove()
        cache = DynamicCache(config=net.config)
        cache.layers[0].activate_past_recording()
        layer(hidden, cache_params=cache)
        assert calls == []
        layer(hidden)
        assert calls == [("prefill", 8)]


def test_adapters_and_copies(calls):
    peft = pytest.importorskip("peft")
    net, ids = model(), tokens(2, 20)
    config = peft.LoraConfig(
        target_modules=["in_proj_qkvz", "in_proj_ba", "out_proj"], init_lora_weights=False
    )
    torch.manual_seed(0)
    net = peft.get_peft_model(net, config).eval()
    with torch.no_grad():
        close(*both(lambda: net(ids).logits, calls))


def test_compiled(calls):
    net, ids = model(), tokens(2, 20)
    with torch.no_grad():
        before = net(ids).logits
        with integration.installed():
            torch._dynamo.reset()
            layer = net.model.layers[0].linear_attn
            hidden = torch.randn(2, 20, 64)
            expected = layer(hidden)
            whole = torch.compile(layer, backend="aot_eager", fullgraph=True)
            torch.testing.assert_close(whole(hidden), expected, rtol=1e-4, atol=1e-5)
            close(before, torch.compile(net, backend="aot_eager")(ids).logits)
    torch._dynamo.reset()


def test_device_map(tmp_path, calls):
    pytest.importorskip("accelerate")
    net, ids = model(), tokens(2, 20)
    net.save_pretrained(tmp_path)
    with torch.no_grad():
        before = net(ids).logits
        with integration.installed():
            loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, device_map={"": "cpu"})
            close(before, loaded.eval()(ids).logits)
    assert calls


@pytest.mark.parametrize("name", ["torch_chunk_gated_delta_rule", "causal_conv1d_update", "l2norm"])
def test_functions_that_somebody_replaced_are_refused(name, monkeypatch):
    from transformers.models.qwen3_5 import modeling_qwen3_5 as modeling

    monkeypatch.setattr(modeling, name, lambda *_, **__: None)
    before = modeling.Qwen3_5GatedDeltaNet.forward
    with pytest.raises(UnknownEngine, match=name):
        integration.install(any_release=True)
    assert modeling.Qwen3_5GatedDeltaNet.forward is before and not integration.is_installed()


def test_undone():
    from transformers.models.qwen3_5 import modeling_qwen3_5
    from transformers.models.qwen3_next import modeling_qwen3_next

    layers = [modeling_qwen3_5.Qwen3_5GatedDeltaNet, modeling_qwen3_next.Qwen3NextGatedDeltaNet]
    before = [dict(vars(layer)) for layer in layers]
    with integration.installed():
        assert all(vars(layer)["forward"] is not old["forward"] for layer, old in zip(layers, before))
    assert [dict(vars(layer)) for layer in layers] == before
