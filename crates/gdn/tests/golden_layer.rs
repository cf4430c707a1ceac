//! The f64 oracle of the layer's core, held to Hugging Face transformers: what its own Qwen3-Next and Qwen3.5
//! layers made of hidden states, with a cache, in a prefill, six decoded tokens and a further prefill (see
//! testdata/README.md).

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    fs,
    path::Path,
};

use gdn::{
    Heads, Packing,
    reference::{
        self,
        layer::{Gate, Numbers, State, Tokens, Weights, forward},
    },
};
use safetensors::{Dtype, SafeTensors};

/// A file of testdata: every tensor in f64, which holds each of its elements exactly.
struct File {
    metadata: HashMap<String, String>,
    tensors: BTreeMap<String, (Vec<usize>, Vec<f64>)>,
    dtype: Dtype,
}

impl File {
    fn read(path: &Path) -> File {
        let bytes = fs::read(path).unwrap();
        let (_, header) = SafeTensors::read_metadata(&bytes).unwrap();
        let file = SafeTensors::deserialize(&bytes).unwrap();
        let tensors = file.tensors().into_iter().map(|(name, tensor)| {
            let data = tensor.data();
            let numbers = match tensor.dtype() {
                Dtype::F32 => data.as_chunks().0.iter().map(|&x| f32::from_le_bytes(x).into()).collect(),
                Dtype::BF16 => {
                    data.as_chunks().0.iter().map(|&x| half::bf16::from_le_bytes(x).to_f64()).collect()
                }
                Dtype::F16 => {
                    data.as_chunks().0.iter().map(|&x| half::f16::from_le_bytes(x).to_f64()).collect()
                }
                Dtype::I32 => data.as_chunks().0.iter().map(|&x| i32::from_le_bytes(x).into()).collect(),
                other => panic!("{name} is of {other}"),
            };
            (name, (tensor.shape().to_vec(), numbers))
        });
        File {
            metadata: header.metadata().clone().unwrap(),
            dtype: file.tensor("expected_out").unwrap().dtype(),
            tensors: tensors.collect(),
        }
    }

    fn get(&self, name: &str) -> Option<&[f64]> {
        self.tensors.get(name).map(|(_, numbers)| &numbers[..])
    }

    fn number(&self, key: &str) -> usize {
        self.metadata[key].parse().unwrap()
    }

    fn heads(&self) -> [usize; 4] {
        ["num_k_heads", "num_v_heads", "head_k_dim", "head_v_dim"].map(|key| self.number(key))
    }

    /// The rows of a packed tensor `[N, F]` taken apart as the oracle of the split has it: two tensors, `[N,
    /// ..]` each.
    fn split(
        &self,
        name: &str,
        features: [usize; 2],
        place: impl Fn(usize) -> reference::Place,
    ) -> [Vec<f64>; 2] {
        let packed = self.get(name).unwrap();
        let num_rows = packed.len() / (features[0] + features[1]);
        let mut parts = features.map(|features| vec![f64::NAN; num_rows * features]);
        for (n, row) in packed.chunks(features[0] + features[1]).enumerate() {
            for (f, &x) in row.iter().enumerate() {
                let (part, g) = place(f);
                parts[part][n * features[part] + g] = x;
            }
        }
        parts
    }

    /// What the oracle makes of it: `out`, `conv_state` and `recurrent_state` of all sequences.
    fn run(&self) -> [Vec<f64>; 3] {
        let [hk, hv, dk, dv] = self.heads();
        let heads = Heads::new(hk, hv, dk, dv).unwrap();
        let packing: Packing = self.metadata["packing"].parse().unwrap();
        let mut numbers = Numbers::new(hk, hv, dk, dv);
        numbers.norm_eps = self.metadata["norm_eps"].parse().unwrap();
        assert_eq!(self.metadata["gate"], "silu");
        numbers.gate = Gate::Silu;
        let weights = Weights {
            conv_weight: self.get("conv_weight").unwrap(),
            conv_bias: self.get("conv_bias"),
            a_log: self.get("A_log").unwrap(),
            dt_bias: self.get("dt_bias").unwrap(),
            norm_weight: self.get("norm_weight").unwrap(),
        };
        let features = numbers.conv_features();
        let [mixed_qkv, z] =
            self.split("mixed_qkvz", [features, hv * dv], |f| reference::place_of_qkvz(&heads, packing, f));
        let [b, a] = self.split("mixed_ba", [hv, hv], |f| reference::place_of_ba(&heads, packing, f));

        let whole = [0.0, (b.len() / hv) as f64];
        let cu_seqlens: Vec<usize> =
            self.get("cu_seqlens").unwrap_or(&whole).iter().map(|&n| n as usize).collect();
        let mut results = [const { Vec::new() }; 3];
        for (sequence, pair) in cu_seqlens.windows(2).enumerate() {
            let rows =
                |tensor: &'_ [f64], features: usize| tensor[pair[0] * features..pair[1] * features].to_vec();
            let (mixed_qkv, z) = (rows(&mixed_qkv, features), rows(&z, hv * dv));
            let (b, a) = (rows(&b, hv), rows(&a, hv));
            let tokens = Tokens { mixed_qkv: &mixed_qkv, z: &z, b: &b, a: &a };
            let mut state = State::zeros(&numbers);
            for (name, of_sequence) in
                [("conv_state", &mut state.conv_state), ("recurrent_state", &mut state.recurrent_state)]
            {
                if let Some(all) = self.get(name) {
                    let size = of_sequence.len();
                    of_sequence.copy_from_slice(&all[sequence * size..(sequence + 1) * size]);
                }
            }
            results[0].extend(forward(&numbers, &weights, &tokens, &mut state));
            results[1].extend(state.conv_state);
            results[2].extend(state.recurrent_state);
        }
        results
    }
}

/// The 2-norm of the difference over that of what is exact, all elements together.
fn error(got: &[f64], exact: &[f64]) -> f64 {
    assert_eq!(got.len(), exact.len());
    let squares = |x: &mut dyn Iterator<Item = f64>| x.map(|x| x * x).sum::<f64>();
    let difference = squares(&mut got.iter().zip(exact).map(|(got, exact)| got - exact));
    (difference / squares(&mut exact.iter().copied())).sqrt()
}

/// What rounding every element once to `dtype` does to the exact numbers, as `error` measures it.
fn one_rounding(exact: &[f64], dtype: Dtype) -> f64 {
    let rounded = exact.iter().map(|&x| match dtype {
        Dtype::F32 => f64::from(x as f32),
        Dtype::BF16 => half::bf16::from_f64(x).to_f64(),
        Dtype::F16 => half::f16::from_f64(x).to_f64(),
        other => panic!("{other}"),
    });
    error(&rounded.collect::<Vec<_>>(), exact)
}

/// How many roundings to the activations' dtype may lie between the oracle and transformers: in `out`, in the
/// recurrent state.
///
/// In bf16 and f16 transformers computes the delta rule in f32 and rounds around it. What reaches the state
/// are two roundings of v and two of k (the convolution's sum, silu), k counted twice (it is read with and
/// written with), and one of beta: 7, which add up as squares, sqrt(7) = 2.6. What reaches `out` are besides
/// two of q, one of o, of the normed o, of its product with the weight, and of the result: 13, sqrt(13) =
/// 3.6. Measured: at most 2.6 and 3.5.
///
/// In f32 the count is that of sums: 4 + DK + DV terms and more in each of the chunked form's products, where
/// a rounding of each partial sum adds up to several. Measured: at most 11 and 23, where the chunk begins
/// from a state of many tokens.
fn roundings(dtype: Dtype) -> [f64; 2] {
    if dtype == Dtype::F32 { [30.0, 15.0] } else { [4.0, 3.0] }
}

#[test]
fn transformers_own_layers() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../testdata");
    let mut seen = BTreeSet::new();
    for entry in fs::read_dir(&folder).unwrap() {
        let path = entry.unwrap().path();
        let name = path.file_name().unwrap().to_str().unwrap();
        let Some((_, step)) = name.strip_suffix(".safetensors").and_then(|stem| stem.split_once("-layer"))
        else {
            continue;
        };
        let file = File::read(&path);
        let [hk, hv, ..] = file.heads();
        seen.insert((file.dtype.to_string(), hv / hk, step.to_owned()));

        let [out, conv_state, recurrent_state] = file.run();
        assert!(
            file.get("expected_conv_state").unwrap() == conv_state,
            "{name}: conv_state is copied, not computed"
        );
        for ((output, exact), allowed) in
            [("out", out), ("recurrent_state", recurrent_state)].iter().zip(roundings(file.dtype))
        {
            let theirs = error(file.get(&format!("expected_{output}")).unwrap(), exact);
            let one = one_rounding(exact, file.dtype);
            println!("{name}, {output}: {theirs:.2e}, {:.1} roundings", theirs / one);
            assert!(theirs <= allowed * one, "{name}, {output}: {theirs:e}, of one rounding {one:e}");
        }
    }
    for dtype in ["BF16", "F32"] {
        for ratio in [1, 2, 3] {
            for step in ["", "-decode"] {
                assert!(
                    seen.contains(&(dtype.to_owned(), ratio, step.to_owned())),
                    "{dtype}, R = {ratio}, {step:?}"
                );
            }
        }
    }
}
