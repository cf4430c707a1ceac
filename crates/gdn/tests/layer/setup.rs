//! A layer with weights and inputs, made from numbers.

use gdn::{
    Dtype, Gate, Heads, Layer, Layout, Packed, Packing, Projections, Shared, Unpacked, Weights,
    reference::{self, layer as oracle},
};

use super::memory::{Memory, Random};

/// What makes inputs hostile.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Inputs {
    Random,
    EqualKeys,
    AlternatingKeys,
    /// beta near 1: b = 8 and 20.
    StrongBeta,
    /// g = 0 exactly.
    NoDecay,
    /// g = -20 and -1000.
    StrongDecay,
    /// a = 90.
    LargeA,
    ZeroQueries,
    ZeroKeys,
    /// S of 1e4.
    LargeState,
}

impl Inputs {
    pub const ALL: [Self; 10] = [
        Self::Random,
        Self::EqualKeys,
        Self::AlternatingKeys,
        Self::StrongBeta,
        Self::NoDecay,
        Self::StrongDecay,
        Self::LargeA,
        Self::ZeroQueries,
        Self::ZeroKeys,
        Self::LargeState,
    ];
}

/// A layer with weights and N tokens of inputs.
#[derive(Clone)]
pub struct Setup {
    pub layer: Layer,
    pub packed: bool,
    pub num_tokens: usize,
    pub mixed_qkvz: Memory<2>,
    pub mixed_ba: Memory<2>,
    pub mixed_qkv: Memory<2>,
    pub z: Memory<2>,
    pub b: Memory<2>,
    pub a: Memory<2>,
    pub conv_weight: Memory<2>,
    pub conv_bias: Option<Memory<1>>,
    pub a_log: Memory<1>,
    pub dt_bias: Memory<1>,
    pub norm_weight: Memory<1>,
}

/// What of a [`Setup`] can be chosen.
#[derive(Clone, Copy, Debug)]
pub struct Options {
    pub heads: [usize; 4],
    pub packing: Packing,
    pub packed: bool,
    pub dtype: Dtype,
    pub ba_dtype: Dtype,
    pub weight_dtype: Dtype,
    pub conv_width: usize,
    pub conv_bias: bool,
    pub gate: Gate,
    pub beta_scale: f32,
    pub inputs: Inputs,
    /// Elements between rows, and elements past a line at which tensors begin.
    pub gap: usize,
    pub misalignment: usize,
    pub seed: u64,
}

impl Options {
    pub fn new(heads: [usize; 4]) -> Self {
        Self {
            heads,
            packing: Packing::Interleaved,
            packed: true,
            dtype: Dtype::F32,
            ba_dtype: Dtype::F32,
            weight_dtype: Dtype::F32,
            conv_width: 4,
            conv_bias: false,
            gate: Gate::Silu,
            beta_scale: 1.0,
            inputs: Inputs::Random,
            gap: 0,
            misalignment: 0,
            seed: 1,
        }
    }
}

impl Setup {
    pub fn new(options: &Options, num_tokens: usize) -> Self {
        let Options { heads: [hk, hv, dk, dv], dtype, gap, misalignment, inputs, .. } = *options;
        let heads = Heads::new(hk, hv, dk, dv).unwrap();
        let mut layer = Layer::new(Layout::new(heads, options.packing));
        (layer.conv_width, layer.gate, layer.beta_scale) =
            (options.conv_width, options.gate, options.beta_scale);
        let mut random = Random(options.seed);
        let rows =
            |dtype, features| Memory::poisoned(dtype, [num_tokens, features], [0, 1], [gap, 0], misalignment);
        let keys = hk * dk;
        let (qkv_features, z_features) = (heads.qkv_features(), heads.z_features());
        let key: Vec<f64> = (0..keys).map(|_| random.normal()).collect();
        let mixed_qkv = rows(dtype, qkv_features).fill(|[t, c]| {
            let (is_q, is_k) = (c < keys, (keys..2 * keys).contains(&c));
            match inputs {
                Inputs::EqualKeys if is_k => key[c - keys],
                Inputs::AlternatingKeys if is_k => key[c - keys] * if t % 2 == 0 { 1.0 } else { -1.0 },
                Inputs::ZeroQueries if is_q => 0.0,
                Inputs::ZeroKeys if is_k => 0.0,
                _ => random.normal(),
            }
        });
        let z = rows(dtype, z_features).fill(|_| random.normal());
        let b = rows(options.ba_dtype, hv).fill(|[t, _]| match inputs {
            Inputs::StrongBeta | Inputs::EqualKeys | Inputs::AlternatingKeys => [8.0, 20.0][t % 2],
            _ => random.normal(),
        });
        let a = rows(options.ba_dtype, hv).fill(|[t, h]| match inputs {
            Inputs::NoDecay => -200.0,
            Inputs::StrongDecay => [18.0, 0.0, 980.0, -3.0][(t + h) % 4],
            Inputs::LargeA => 90.0,
            _ => random.normal(),
        });
        let mixed_qkvz = rows(dtype, heads.qkvz_features()).fill(|[t, f]| {
            match reference::place_of_qkvz(&heads, options.packing, f) {
                (0, c) => mixed_qkv.get([t, c]),
                (_, c) => z.get([t, c]),
            }
        });
        let mixed_ba =
            rows(options.ba_dtype, heads.ba_features()).fill(|[t, f]| {
                match reference::place_of_ba(&heads, options.packing, f) {
                    (0, c) => b.get([t, c]),
                    (_, c) => a.get([t, c]),
                }
            });
        let weight = options.weight_dtype;
        let width = options.conv_width;
        // Equal keys stay equal through a convolution of one tap only.
        let one_tap = matches!(inputs, Inputs::EqualKeys | Inputs::AlternatingKeys);
        let conv_weight = Memory::dense(weight, [qkv_features, width]).fill(|[_, tap]| match one_tap {
            true => f64::from(u8::from(tap + 1 == width)),
            false => random.normal() * 0.5,
        });
        let vector = |dtype, len| Memory::dense(dtype, [len]);
        let conv_bias =
            options.conv_bias.then(|| vector(weight, qkv_features).fill(|_| random.normal() * 0.1));
        let strong = matches!(inputs, Inputs::StrongDecay);
        let a_log = vector(Dtype::F32, hv).fill(|_| if strong { 0.02 } else { random.normal() * 0.5 });
        let dt_bias = vector(weight, hv).fill(|_| if strong { 0.0 } else { random.normal() * 0.5 });
        let norm_weight = vector(weight, dv).fill(|_| 1.0 + random.normal() * 0.1);
        Self {
            layer,
            packed: options.packed,
            num_tokens,
            mixed_qkvz,
            mixed_ba,
            mixed_qkv,
            z,
            b,
            a,
            conv_weight,
            conv_bias,
            a_log,
            dt_bias,
            norm_weight,
        }
    }

    /// Some rows as a setup of their own.
    pub fn rows(&self, rows: std::ops::Range<usize>) -> Self {
        let cut = |memory: &Memory<2>| {
            Memory::dense(memory.dtype, [rows.len(), memory.sizes[1]])
                .fill(|[t, f]| memory.get([rows.start + t, f]))
        };
        Self {
            num_tokens: rows.len(),
            mixed_qkvz: cut(&self.mixed_qkvz),
            mixed_ba: cut(&self.mixed_ba),
            mixed_qkv: cut(&self.mixed_qkv),
            z: cut(&self.z),
            b: cut(&self.b),
            a: cut(&self.a),
            ..self.clone()
        }
    }

    pub fn projections(&self) -> Projections<Shared<'_>> {
        if self.packed {
            Projections::Packed(Packed { mixed_qkvz: self.mixed_qkvz.view(), mixed_ba: self.mixed_ba.view() })
        } else {
            Projections::Unpacked(Unpacked {
                mixed_qkv: self.mixed_qkv.view(),
                z: self.z.view(),
                b: self.b.view(),
                a: self.a.view(),
            })
        }
    }

    pub fn weights(&self) -> Weights<Shared<'_>> {
        Weights {
            conv_weight: self.conv_weight.view(),
            conv_bias: self.conv_bias.as_ref().map(Memory::view),
            A_log: self.a_log.view(),
            dt_bias: self.dt_bias.view(),
            norm_weight: self.norm_weight.view(),
        }
    }

    pub fn numbers(&self) -> oracle::Numbers {
        let (layer, heads) = (&self.layer, self.layer.heads());
        oracle::Numbers {
            num_k_heads: heads.num_k_heads(),
            num_v_heads: heads.num_v_heads(),
            head_k_dim: heads.head_k_dim(),
            head_v_dim: heads.head_v_dim(),
            conv_width: layer.conv_width,
            l2norm_eps: layer.l2norm_eps.into(),
            norm_eps: layer.norm_eps.into(),
            scale: layer.scale.into(),
            beta_scale: layer.beta_scale.into(),
            gate: match layer.gate {
                Gate::Silu => oracle::Gate::Silu,
                Gate::Sigmoid => oracle::Gate::Sigmoid,
            },
        }
    }

    /// What the oracle makes of some rows, with the states after each of them.
    pub fn exact(
        &self,
        rows: std::ops::Range<usize>,
        state: &oracle::State,
    ) -> (Vec<f64>, Vec<oracle::State>) {
        self.exact_of(rows, state, 0.0, 0)
    }

    /// The same of inputs and states each of which is changed by so much of itself, up or down.
    pub fn exact_of(
        &self,
        rows: std::ops::Range<usize>,
        state: &oracle::State,
        change: f64,
        seed: u64,
    ) -> (Vec<f64>, Vec<oracle::State>) {
        let mut random = Random(seed);
        let mut changed =
            |x: f64| if random.bits().is_multiple_of(2) { x * (1.0 + change) } else { x * (1.0 - change) };
        let state = &oracle::State {
            conv_state: state.conv_state.clone(),
            recurrent_state: state.recurrent_state.iter().map(|x| changed(*x)).collect(),
        };
        let slice = |memory: &Memory<2>| {
            let features = memory.sizes[1];
            rows.clone().flat_map(|t| (0..features).map(move |f| memory.get([t, f]))).collect::<Vec<_>>()
        };
        let (conv_weight, a_log) = (self.conv_weight.all(), self.a_log.all());
        let (dt_bias, norm_weight) = (self.dt_bias.all(), self.norm_weight.all());
        let conv_bias = self.conv_bias.as_ref().map(Memory::all);
        let weights = oracle::Weights {
            conv_weight: &conv_weight,
            conv_bias: conv_bias.as_deref(),
            a_log: &a_log,
            dt_bias: &dt_bias,
            norm_weight: &norm_weight,
        };
        let [mixed_qkv, z, b, a] = [&self.mixed_qkv, &self.z, &self.b, &self.a]
            .map(|memory| slice(memory).into_iter().map(&mut changed).collect::<Vec<_>>());
        let tokens = oracle::Tokens { mixed_qkv: &mixed_qkv, z: &z, b: &b, a: &a };
        oracle::forward_with_states(&self.numbers(), &weights, &tokens, state)
    }
}
