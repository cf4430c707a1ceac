"""What libtorch has for C++ only may be missing from a PyTorch of tomorrow: the package goes on without, or says what it lacks."""

import pytest

pytest.importorskip("torch")

C = "torch_tensor_to_pyobject"
WRAP = "_Z16THPVariable_WrapRKN2at10TensorBaseE"
INFERENCE = "_ZN2at6native12is_inferenceERKNS_6TensorE"
MODES = "_ZN3c104impl20TorchDispatchModeTLS9stack_lenEv"
BUMP = "_ZN5torch8autograd4impl12bump_versionERKN2at6TensorE"
DELETE = "torch_delete_stable_ivalue"
NEGATED = "_ZN2at6native6is_negERKNS_6TensorE"
MEMBERS = "c10::TensorImpl"

#: Registers as `import gdn` does, with names that are taken as missing. Then everything that has to do with them.
TEXT = """
import importlib.util, sys
import torch

without = sys.argv[1].split(",")
path = importlib.util.find_spec("gdn").submodule_search_locations[0] + "/_gdn.abi3.so"
spec = importlib.util.spec_from_file_location("gdn._gdn", path)
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
register = module.register
module.register = lambda torch: register(torch, without=without)
sys.modules["gdn._gdn"] = module

import gdn
assert gdn._gdn is module
import oracle

HEADS = (2, 4, 8, 16)
for n in (0, 3, 3000):  # 3000: outputs of many blocks
    qkvz, ba = oracle.packed(n, HEADS, torch.bfloat16)
    expected = oracle.split_bits(qkvz, ba, HEADS, "interleaved")
    back = [oracle.bits(qkvz), oracle.bits(ba)]
    for split, merge in ((gdn.split, gdn.merge), (torch.ops.gdn.split, torch.ops.gdn.merge)):
        parts = split(qkvz, ba, *HEADS)
        oracle.same(tuple(parts), expected)
        oracle.same(tuple(merge(*parts, *HEADS)), back)
    out = tuple(torch.zeros_like(part) for part in parts)
    versions = [part._version for part in out]
    assert gdn.split(qkvz, ba, *HEADS, out=out) == out
    oracle.same(out, expected)
    assert all(part._version == old + 1 for part, old in zip(out, versions))
for split, kind in ((gdn.split, ValueError), (torch.ops.gdn.split, RuntimeError)):
    try:
        split(qkvz, ba[1:], *HEADS)
    except kind as error:
        print(str(error).splitlines()[0])
with torch.inference_mode():
    inference = tuple(torch.zeros_like(part) for part in out)
for given in (out, inference):
    versions = [None if part.is_inference() else part._version for part in given]
    try:
        with torch.inference_mode():
            torch.ops.gdn.split.out(qkvz, ba, *HEADS, **dict(zip(["mixed_qkv", "z", "b", "a"], given)))
    except RuntimeError as error:
        print(str(error).splitlines()[0])
        continue
    oracle.same(given, expected)
    assert all(old is None or part._version == old + 1 for part, old in zip(given, versions))
    print("written")

import oracle_layer as ol
numbers, weights = ol.Numbers(HEADS), ol.weights(HEADS)
projections, states = ol.projections(3, numbers, "packed"), ol.states(3, HEADS, "dense")
others = [one.clone() for one in states]
expected = ol.layer(numbers, weights).decode(projections, *states, state_indices=torch.tensor([2, 0, 1]))
decode = lambda: torch.ops.gdn.decode(
    *projections, *vars(weights).values(), *others, *HEADS, state_indices=torch.tensor([2, 0, 1]), scale=None
)
try:
    assert torch.equal(decode(), expected) and torch.equal(others[1], states[1])
    for _ in range(1000):
        decode()
except RuntimeError as error:
    print(str(error).splitlines()[0])
else:
    print("decoded")
"""


@pytest.mark.parametrize(
    "without",
    [
        [],
        [C],
        [WRAP],
        [BUMP],
        [INFERENCE, C],
        [C, WRAP],
        [C, WRAP, BUMP],
        [DELETE],
        [MODES],
        [NEGATED],
        [MEMBERS],
    ],
    ids=str,
)
def test_what_cpp_alone_has_may_be_missing(without, python):
    first, second, *written = python(TEXT, ",".join(without)).splitlines()
    assert first == second == "mixed_ba has 2999 rows, mixed_qkvz has 3000"
    if C in without and WRAP in without and BUMP in without:
        assert len(written) == 3 and all(
            "lacks torch::autograd::impl::bump_version" in line and "gdn.split" in line for line in written
        )
    else:
        assert written == ["written", "written", "decoded"]
