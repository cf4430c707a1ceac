"""Whole models of transformers on a GPU, with gdn between the GEMMs of their layers and without.

Decode is float32's there, prefill's products are of float16: so each call is held to float64 by itself, and whole models are compared by
what their logits are off, in float32 too.
"""

import copy

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

import oracle_layer as ol
import test_integrations_transformers_core as whole
from test_integrations_transformers_core import KINDS, both, forced, in_pieces

import gdn
import gdn.integrations.transformers as integration

pytestmark = pytest.mark.gpus(1)

HEADS = (2, 4, 64, 64)
calls, off_again = whole.calls, whole.off_again


def model(kind, heads=HEADS, dtype=torch.float32):
    return whole.model(kind, heads, dtype).cuda()


def tokens(batch, length):
    return whole.tokens(batch, length).cuda()


def padded(batch, length):
    return whole.padded(batch, length).cuda()


def off(got, exact):
    """Of the norm."""
    return ((got.double() - exact.double()).norm() / exact.double().norm()).item()


def near(before, after, exact):
    """Logits as near to the exact ones as without gdn, up to luck; in float32 within one rounding of bfloat16."""
    errors = [off(one, exact) for one in (before, after)]
    assert before.dtype == after.dtype and before.shape == after.shape
    rounding = torch.finfo(torch.bfloat16).eps / 2
    assert errors[1] <= (rounding if before.dtype == torch.float32 else 2 * errors[0]), errors


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_two_hundred_greedy_tokens(kind, dtype, calls):
    """As on the CPU: prompts padded on the left, the same token wherever one stands out from rounding, logits as near as without gdn."""
    net, ids, mask = model(kind, dtype=dtype), tokens(3, 83), padded(3, 83)

    def run():
        with torch.no_grad():
            return net.generate(ids, attention_mask=mask, max_new_tokens=200, do_sample=False)

    before, after = both(run, calls)
    assert before.shape == after.shape == (3, 283)
    assert [name for name, _ in calls] == ["prefill"] * 3 + ["decode"] * 3 * 199
    with torch.no_grad():
        without = forced(net, ids, mask, before)
        exact = forced(copy.deepcopy(net).float(), ids, mask, before)
        with integration.installed():
            ours = forced(net, ids, mask, before)
    near(without, ours, exact)
    # A step's own: what prefill rounds is in the first steps, and fades in those after.
    rounding = torch.stack([one - exact for one in (without, ours)]).square().mean(-1).amax(0).sqrt()
    if dtype == torch.float32:
        # No step is off by more than a rounding of bfloat16, not the average alone.
        steps = (ours - exact).norm(dim=-1) / exact.norm(dim=-1)
        assert steps.max() <= torch.finfo(torch.bfloat16).eps
    top = exact.topk(2, -1).values
    # Six deviations of the difference of two logits.
    is_clear = top[..., 0] - top[..., 1] > 6 * 2**0.5 * rounding
    assert is_clear.float().mean() > (0.9 if dtype == torch.float32 else 0.4), "many steps must be decided"
    assert torch.equal(ours.argmax(-1)[is_clear], exact.argmax(-1)[is_clear])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS[:2])
def test_each_call_against_float64(kind, dtype, monkeypatch):
    """What the layers of a model that generates ask of gdn.Layer, the cache's own states among it."""
    net, ids, held = model(kind, dtype=dtype), tokens(2, 70), []
    for name in ("decode", "prefill"):
        method = getattr(gdn.Layer, name)

        def checked(self, projections, *rest, name=name, method=method, **options):
            conv, state = rest[-2:]
            before = [one.cpu().clone() for one in (conv, state)]
            out = method(self, projections, *rest, **options)
            numbers = ol.Numbers(self.heads, self.packing)
            weights = (
                self.conv_weight.flatten(1),
                self.conv_bias,
                self.A_log,
                self.dt_bias,
                self.norm_weight,
            )
            weights = ol.Weights(*(None if one is None else one.cpu().detach() for one in weights))
            parts = ol.unpacked([one.cpu() for one in projections], numbers)
            each = len(parts[0]) // len(conv)
            fresh = name == "prefill" and options["has_initial_state"] is not None
            for r in range(len(conv)):
                window, first = before[0][r][:, -3:], before[1][r]
                if fresh:
                    window, first = torch.zeros_like(window), torch.zeros_like(first)
                rows = slice(r * each, (r + 1) * each)

                def exact(seed=None, first=first, window=window, rows=rows):
                    given = [one[rows] for one in parts]
                    if seed is not None:
                        given, first = [ol.changed(one, seed) for one in given], ol.changed(first, seed)
                    return ol.sequence(numbers, weights, given, window, first)

                y, windows, states = exact()
                ol.near(out[rows].cpu(), y, f"out of {name}", lambda seed, exact=exact: exact(seed)[0])
                last = lambda seed, exact=exact: exact(seed)[2][-1]
                ol.near(state[r].cpu(), states[-1], f"state of {name}", last)
                assert torch.equal(conv[r][:, -3:].cpu().double(), windows[-1])
            held.append(name)
            return out

        monkeypatch.setattr(gdn.Layer, name, checked)
    with torch.no_grad(), integration.installed():
        net.generate(ids, max_new_tokens=12, do_sample=False)
    assert held == ["prefill"] * 3 + ["decode"] * 3 * 11


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("heads", [(2, 4, 128, 128), (2, 6, 96, 64), (1, 4, 64, 192)], ids=str)
@pytest.mark.parametrize("kind", KINDS[:2])
def test_prefill_and_steps_of_any_heads(kind, heads, dtype, calls):
    net, ids = model(kind, heads, dtype), tokens(2, 200)

    def logits(net):
        """A prompt, more of it behind, one token, and three at once."""
        return in_pieces(net, ids, (77, 196, 197, 200))

    with torch.no_grad():
        exact = logits(copy.deepcopy(net).float())
        before, after = both(lambda: logits(net), calls)
        near(before, after, exact)
        assert [name for name, _ in calls] == ["prefill"] * 6 + ["decode"] * 3 + ["prefill"] * 3


def test_heads_without_a_kernel(calls):
    """The layer's own prefill, and gdn's decode on the states that it leaves."""
    net, ids = model(KINDS[0], (2, 4, 32, 32)), tokens(2, 40)

    def run():
        with torch.no_grad():
            return net.generate(ids, max_new_tokens=12, do_sample=False)

    before, after = both(run, calls)
    assert torch.equal(before, after)
    assert [name for name, _ in calls] == ["decode"] * 3 * 11


@pytest.mark.parametrize("kind", KINDS[:2])
def test_one_layer_is_nearer(kind, calls):
    """In bfloat16, to the same layer's output in float32 from the same hidden states."""
    layer = model(kind, dtype=torch.bfloat16).model.layers[0].linear_attn
    hidden = torch.randn(4, 150, 64, device="cuda").bfloat16()
    with torch.no_grad():
        exact = copy.deepcopy(layer).float()(hidden.float())
        before, after = both(lambda: layer(hidden), calls)
    errors = off(before, exact), off(after, exact)
    assert errors[1] < errors[0], errors


def test_padding_on_both_sides(calls):
    net, ids = model(KINDS[0]), tokens(3, 90)
    mask = padded(3, 90)
    mask[2, 70:] = 0
    with torch.no_grad():
        before, after = both(lambda: net(ids, attention_mask=mask).logits, calls)
    near(before[mask.bool()], after[mask.bool()], before[mask.bool()])


def test_states_stay_where_they_are(calls):
    from transformers.cache_utils import DynamicCache

    net, ids = model(KINDS[0]), tokens(2, 20)

    def run():
        cache = DynamicCache(config=net.config)
        net(ids[:, :3], past_key_values=cache, use_cache=True)
        held = [one.conv_states[0].data_ptr() for one in cache.layers[:3]]
        held += [one.recurrent_states[0].data_ptr() for one in cache.layers[:3]]
        before = torch.cuda.memory_allocated()
        for t in range(3, 20):
            net(ids[:, t : t + 1], past_key_values=cache, use_cache=True)
        now = [one.conv_states[0].data_ptr() for one in cache.layers[:3]]
        assert held == now + [one.recurrent_states[0].data_ptr() for one in cache.layers[:3]]
        assert torch.cuda.memory_allocated() - before < 1 << 20
        return [(one.conv_states[0], one.recurrent_states[0]) for one in cache.layers[:3]]

    with torch.no_grad():
        before, after = both(run, calls)
    for pair, ours in zip(before, after, strict=True):
        for one, other in zip(pair, ours, strict=True):
            assert one.shape == other.shape and one.dtype == other.dtype and one.stride() == other.stride()
            assert off(other, one) < 2e-3


def test_training_is_the_layer_s_own(calls):
    net, ids = model(KINDS[1]).train(), tokens(2, 70)

    def run():
        net.zero_grad()
        net(ids, labels=ids).loss.backward()
        return [one.grad.clone() for one in net.parameters() if one.grad is not None]

    before = run()
    with integration.installed():
        after = run()
    assert calls == [] and len(before) == len(after)
    # Gradients are summed by atomic additions.
    assert all(off(other, one) < 1e-3 for one, other in zip(before, after) if one.any())


def test_device_map(tmp_path, calls):
    pytest.importorskip("accelerate")
    net, ids = model(KINDS[0]), tokens(2, 70)
    net.save_pretrained(tmp_path)
    with torch.no_grad():
        before = net(ids).logits
        with integration.installed():
            for where in ("auto", {"": 0}):
                loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, device_map=where)
                near(before, loaded.eval()(ids).logits, before)
    assert [name for name, _ in calls] == ["prefill"] * 6


def test_compiled(calls):
    net, ids = model(KINDS[0]), tokens(2, 70)
    with torch.no_grad():
        before = net(ids).logits
        with integration.installed():
            torch._dynamo.reset()
            layer = net.model.layers[0].linear_attn
            hidden = torch.randn(2, 70, 64, device="cuda")
            expected = layer(hidden)
            compiled = torch.compile(layer, fullgraph=True)
            assert off(compiled(hidden), expected) < 1e-5
            near(before, torch.compile(net, backend="aot_eager")(ids).logits, before)
    torch._dynamo.reset()
