//! [`Layer`]: what a Gated DeltaNet layer computes between its two GEMMs; [`Weights`] and [`Projections`],
//! what it computes with.

pub use gdn_math::layer::Gate;

use crate::{
    argument::{ArgumentError, Because},
    dtype::Dtype,
    heads::Heads,
    overlap::Extents,
    packing::{Layout, Packing},
    tensor::{Operand, Space, Tensor},
    view::{Address, Packed, Unpacked},
};

/// The numbers of a layer that its tensors do not show.
///
/// The formulas, for one token of one sequence, are those of Yang, Kautz and Hatamizadeh, "Gated Delta
/// Networks" (2024), as the layers of Qwen3-Next and Qwen3.5 have them; v head h has key head `h / R`, where
/// `R = HV / HK`:
///
/// 1. `x = mixed_qkv`, from the split.
/// 2. `c = silu(conv_bias + sum_j conv_weight[:, j] * x(t - W + 1 + j))`, W =
///    [`conv_width`](Self::conv_width). What lies before the sequence is in `conv_state`.
/// 3. `q, k, v = c`; `q = q * scale / sqrt(sum q^2 + l2norm_eps)`, `k = k / sqrt(sum k^2 + l2norm_eps)`.
/// 4. `g = -exp(A_log) * softplus(a + dt_bias)`, `beta = sigmoid(b) * beta_scale`.
/// 5. `S *= exp(g)`; `S += beta * (v - S k) k^T`; `o = S q`, where S is `[DV, DK]`, one for each v head.
/// 6. `out = o / sqrt(mean(o^2) + norm_eps) * norm_weight * gate(z)`.
///
/// Inputs are taken as they are, everything between is f32, and each output is rounded once.
///
/// ```
/// use gdn::{Gate, Layer, Layout};
/// let mut layer = Layer::new(Layout::preset("Qwen3-Next-80B-A3B")?);
/// assert_eq!((layer.conv_width, layer.scale), (4, 1.0 / 128f32.sqrt()));
/// layer.gate = Gate::Sigmoid;
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Layer {
    /// The heads, and how the projections pack them.
    pub layout: Layout,
    /// Taps of the convolution. 4 in every released model.
    pub conv_width: usize,
    /// What is added to the sum of squares of a query or key. 1e-6; vLLM's CPU path has 1e-5.
    pub l2norm_eps: f32,
    /// What is added to the mean of squares of an output. 1e-6.
    pub norm_eps: f32,
    /// The factor of a query. `DK^-1/2`.
    pub scale: f32,
    /// The factor of beta. 1; 2 where a model has `allow_neg_eigval`.
    pub beta_scale: f32,
    /// What z goes through before it is the output's factor.
    pub gate: Gate,
}

/// The widest convolution that the ops take.
pub const MAX_CONV_WIDTH: usize = 16;

impl Layer {
    /// A layer with everything but the layout as Qwen3-Next has it.
    pub fn new(layout: Layout) -> Self {
        Self {
            layout,
            conv_width: 4,
            l2norm_eps: 1e-6,
            norm_eps: 1e-6,
            scale: 1.0 / (layout.heads.head_k_dim() as f32).sqrt(),
            beta_scale: 1.0,
            gate: Gate::Silu,
        }
    }

    /// The four numbers of the layout.
    pub fn heads(&self) -> Heads {
        self.layout.heads
    }

    /// C, the channels of the convolution: `2*HK*DK + HV*DV`.
    pub fn conv_channels(&self) -> usize {
        self.layout.heads.qkv_features()
    }

    /// # Errors
    /// [`ArgumentError::Value`] for a width of the convolution that the ops do not take.
    fn check(&self) -> Result<(), ArgumentError> {
        if (1..=MAX_CONV_WIDTH).contains(&self.conv_width) {
            return Ok(());
        }
        let expected = format!("from 1 to {MAX_CONV_WIDTH}");
        Err(ArgumentError::Value { argument: "conv_width", got: self.conv_width.to_string(), expected })
    }
}

/// The weights of a layer, each of any dtype and with any strides. `R` says where they are.
#[derive(Clone, Copy, Debug)]
#[allow(non_snake_case, reason = "the name that the field has in every checkpoint and engine")]
pub struct Weights<R> {
    /// `[C, W]`, the last tap that of the token itself. Channels in the order of `mixed_qkv`: all queries,
    /// all keys, all values.
    pub conv_weight: Tensor<R, 2>,
    /// `[C]`, where there is one.
    pub conv_bias: Option<Tensor<R, 1>>,
    /// `[HV]`
    pub A_log: Tensor<R, 1>,
    /// `[HV]`
    pub dt_bias: Tensor<R, 1>,
    /// `[DV]`
    pub norm_weight: Tensor<R, 1>,
}

/// The projections of N tokens: rows of any stride, each row dense, of any dtype. `mixed_qkv` and z have one
/// dtype, b and a another if they like.
#[derive(Clone, Copy, Debug)]
pub enum Projections<R> {
    /// As they come out of the GEMMs; [`Layer::layout`] says in what order.
    Packed(Packed<Tensor<R, 2>>),
    /// As [`split`](crate::split()) leaves them.
    Unpacked(Unpacked<Tensor<R, 2>>),
}

/// One of q, k, v, z, b, a in the projections, whatever their packing: for each key head a stretch of
/// features.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Field<P> {
    /// The tensor in which it lies.
    pub(crate) at: P,
    pub(crate) dtype: Dtype,
    /// Bytes from the start of the tensor's row to the first key head's features.
    pub(crate) start: usize,
    /// Bytes from a row to the next.
    pub(crate) row_stride: usize,
    /// Bytes from a key head's features to the next one's.
    pub(crate) head_step: usize,
}

/// What every token needs, checked.
#[derive(Clone, Copy, Debug)]
#[allow(non_snake_case, reason = "as in Weights")]
pub(crate) struct Tokens<P> {
    pub(crate) layer: Layer,
    /// N.
    pub(crate) num_tokens: usize,
    pub(crate) q: Field<P>,
    pub(crate) k: Field<P>,
    pub(crate) v: Field<P>,
    pub(crate) z: Field<P>,
    pub(crate) b: Field<P>,
    pub(crate) a: Field<P>,
    pub(crate) conv_weight: Operand<P, Dtype, 2>,
    pub(crate) conv_bias: Option<Operand<P, Dtype, 1>>,
    pub(crate) A_log: Operand<P, Dtype, 1>,
    pub(crate) dt_bias: Operand<P, Dtype, 1>,
    pub(crate) norm_weight: Operand<P, Dtype, 1>,
    pub(crate) out: Operand<P, Dtype, 3>,
}

impl<P: Address> Tokens<P> {
    /// Checks shapes and dtypes, and adds what memory the tensors take to `extents`.
    pub(crate) fn new<R: Space<Raw = P>, W: Space<Raw = P>>(
        layer: &Layer,
        projections: &Projections<R>,
        weights: &Weights<R>,
        out: &Tensor<W, 3>,
        extents: &mut Extents,
    ) -> Result<Self, ArgumentError> {
        layer.check()?;
        let heads = layer.heads();
        let hv = heads.num_v_heads();
        let (dk, dv) = (heads.head_k_dim(), heads.head_v_dim());
        let ratio = heads.ratio();
        let need = || Because::Need(heads.to_string());
        let rows = |argument: &'static str, tensor: &Tensor<R, 2>, features: usize| {
            let rows = tensor.operand();
            rows.expect(argument, 1, "features", features, need)?;
            if rows.sizes[1] > 1 && rows.strides[1] != 1 {
                return Err(ArgumentError::Stride { argument, dim: 1, got: rows.strides[1], expected: 1 });
            }
            Ok(rows)
        };
        let same = |argument: &'static str,
                    rows: &Operand<P, Dtype, 2>,
                    other: &'static str,
                    first: &Operand<P, Dtype, 2>,
                    dtype: bool| {
            rows.expect(argument, 0, "rows", first.sizes[0], || Because::Argument(other))?;
            if dtype && rows.kind != first.kind {
                let because = Because::Argument(other);
                return Err(ArgumentError::Dtype { argument, got: rows.kind, expected: first.kind, because });
            }
            Ok(())
        };
        let field = |rows: &Operand<P, Dtype, 2>, start: usize, head_step: usize| Field {
            at: rows.at,
            dtype: rows.kind,
            start: start * rows.kind.size(),
            row_stride: rows.strides[0] * rows.kind.size(),
            head_step: head_step * rows.kind.size(),
        };
        let (qkv, z, b, a, num_tokens);
        match projections {
            Projections::Packed(Packed { mixed_qkvz, mixed_ba }) => {
                let qkvz = rows("mixed_qkvz", mixed_qkvz, heads.qkvz_features())?;
                let ba = rows("mixed_ba", mixed_ba, heads.ba_features())?;
                same("mixed_ba", &ba, "mixed_qkvz", &qkvz, false)?;
                extents.add("mixed_qkvz", &qkvz, false);
                extents.add("mixed_ba", &ba, false);
                num_tokens = qkvz.sizes[0];
                match layer.layout.packing {
                    Packing::Interleaved => {
                        let step = 2 * dk + 2 * ratio * dv;
                        qkv = [0, dk, 2 * dk].map(|start| field(&qkvz, start, step));
                        z = field(&qkvz, 2 * dk + ratio * dv, step);
                        (b, a) = (field(&ba, 0, 2 * ratio), field(&ba, ratio, 2 * ratio));
                    }
                    Packing::Contiguous => {
                        qkv = unpacked(&qkvz, heads, field);
                        z = field(&qkvz, heads.qkv_features(), ratio * dv);
                        (b, a) = (field(&ba, 0, ratio), field(&ba, hv, ratio));
                    }
                }
            }
            Projections::Unpacked(Unpacked { mixed_qkv, z: z_rows, b: b_rows, a: a_rows }) => {
                let mixed_qkv = rows("mixed_qkv", mixed_qkv, heads.qkv_features())?;
                let z_rows = rows("z", z_rows, heads.z_features())?;
                let b_rows = rows("b", b_rows, hv)?;
                let a_rows = rows("a", a_rows, hv)?;
                same("z", &z_rows, "mixed_qkv", &mixed_qkv, true)?;
                same("b", &b_rows, "mixed_qkv", &mixed_qkv, false)?;
                same("a", &a_rows, "b", &b_rows, true)?;
                for (argument, rows) in
                    [("mixed_qkv", &mixed_qkv), ("z", &z_rows), ("b", &b_rows), ("a", &a_rows)]
                {
                    extents.add(argument, rows, false);
                }
                num_tokens = mixed_qkv.sizes[0];
                qkv = unpacked(&mixed_qkv, heads, field);
                z = field(&z_rows, 0, ratio * dv);
                (b, a) = (field(&b_rows, 0, ratio), field(&a_rows, 0, ratio));
            }
        }
        let conv_weight = weights.conv_weight.operand();
        conv_weight.expect("conv_weight", 0, "channels", heads.qkv_features(), need)?;
        conv_weight.expect("conv_weight", 1, "taps", layer.conv_width, || {
            Because::Need(format!("conv_width = {}", layer.conv_width))
        })?;
        extents.add("conv_weight", &conv_weight, false);
        let mut vector =
            |argument: &'static str, tensor: &Tensor<R, 1>, unit: &'static str, expected: usize| {
                let vector = tensor.operand();
                vector.expect(argument, 0, unit, expected, need)?;
                extents.add(argument, &vector, false);
                Ok(vector)
            };
        let conv_bias = match &weights.conv_bias {
            Some(bias) => Some(vector("conv_bias", bias, "channels", heads.qkv_features())?),
            None => None,
        };
        let a_log = vector("A_log", &weights.A_log, "heads", hv)?;
        let dt_bias = vector("dt_bias", &weights.dt_bias, "heads", hv)?;
        let norm_weight = vector("norm_weight", &weights.norm_weight, "features", dv)?;
        let out = out.operand();
        let other = match projections {
            Projections::Packed(_) => "mixed_qkvz",
            Projections::Unpacked(_) => "mixed_qkv",
        };
        out.expect("out", 0, "rows", num_tokens, || Because::Argument(other))?;
        out.expect("out", 1, "heads", hv, need)?;
        out.expect("out", 2, "features", dv, need)?;
        extents.add("out", &out, true);
        let [q, k, v] = qkv;
        Ok(Self {
            layer: *layer,
            num_tokens,
            q,
            k,
            v,
            z,
            b,
            a,
            conv_weight,
            conv_bias,
            A_log: a_log,
            dt_bias,
            norm_weight,
            out,
        })
    }
}

/// q, k and v where all queries come first, then all keys, then all values.
fn unpacked<P>(
    rows: &Operand<P, Dtype, 2>,
    heads: Heads,
    field: impl Fn(&Operand<P, Dtype, 2>, usize, usize) -> Field<P>,
) -> [Field<P>; 3] {
    let keys = heads.num_k_heads() * heads.head_k_dim();
    [
        field(rows, 0, heads.head_k_dim()),
        field(rows, keys, heads.head_k_dim()),
        field(rows, 2 * keys, heads.ratio() * heads.head_v_dim()),
    ]
}
