//! The core of a Gated DeltaNet layer, between its two GEMMs: causal convolution, gates, delta rule, gated
//! norm. All in f64, one token after the other, with no rounding in between and no thought of speed.
//!
//! It is written from the six formulas in [`forward`] and shares nothing with the library: plain numbers,
//! plain slices. Values of bf16, f16 and f32 are exact in f64, so its error is that of f64.
//!
//! Sources: the gated delta rule is that of [Gated Delta Networks](https://arxiv.org/abs/2412.06464), where S
//! is `[DV, DK]` as well; convolution, gates and norm are those of the Qwen3-Next and Qwen3.5 layers of
//! Hugging Face transformers (`Qwen3NextGatedDeltaNet`), to whose results `tests/golden_layer.rs` holds this
//! file.

/// What the norm's output is multiplied with: a function of `z`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Gate {
    /// z * sigmoid(z): Qwen3-Next, Qwen3.5.
    Silu,
    /// sigmoid(z): the other gate of the norm in flash-linear-attention (`FusedRMSNormGated`).
    Sigmoid,
}

/// The numbers of a layer. In shapes: HK = `num_k_heads`, HV = `num_v_heads`, DK = `head_k_dim`, DV =
/// `head_v_dim`, W = `conv_width`, C = 2 * HK * DK + HV * DV features of the convolution, R = HV / HK.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Numbers {
    /// HK, the heads of q and k.
    pub num_k_heads: usize,
    /// HV, the heads of v, z, b, a and of the recurrent state. A multiple of HK: v head h uses k head floor(h
    /// / R).
    pub num_v_heads: usize,
    /// DK, the features of a head of q and of k.
    pub head_k_dim: usize,
    /// DV, the features of a head of v and of z.
    pub head_v_dim: usize,
    /// W, the taps of the convolution.
    pub conv_width: usize,
    /// What is added to the sum of squares of q and of k.
    pub l2norm_eps: f64,
    /// What is added to the mean of squares of the delta rule's output.
    pub norm_eps: f64,
    /// What the normed q is multiplied with.
    pub scale: f64,
    /// What sigmoid(b) is multiplied with; 2 where a model allows negative eigenvalues.
    pub beta_scale: f64,
    /// The gate of the norm.
    pub gate: Gate,
}

impl Numbers {
    /// The numbers of a layer of Qwen3-Next or Qwen3.5 with these heads: W = 4, both eps 1e-6, scale DK^-1/2,
    /// beta_scale 1, silu.
    pub fn new(num_k_heads: usize, num_v_heads: usize, head_k_dim: usize, head_v_dim: usize) -> Numbers {
        Numbers {
            num_k_heads,
            num_v_heads,
            head_k_dim,
            head_v_dim,
            conv_width: 4,
            l2norm_eps: 1e-6,
            norm_eps: 1e-6,
            scale: (head_k_dim as f64).powf(-0.5),
            beta_scale: 1.0,
            gate: Gate::Silu,
        }
    }

    /// C, the features of `mixed_qkv` and of the convolution.
    pub fn conv_features(&self) -> usize {
        2 * self.num_k_heads * self.head_k_dim + self.num_v_heads * self.head_v_dim
    }
}

/// The weights of a layer, each dense.
#[derive(Clone, Copy, Debug)]
pub struct Weights<'a> {
    /// `[C, W]`; the last tap is the token's own.
    pub conv_weight: &'a [f64],
    /// `[C]`.
    pub conv_bias: Option<&'a [f64]>,
    /// `[HV]`.
    pub a_log: &'a [f64],
    /// `[HV]`.
    pub dt_bias: &'a [f64],
    /// `[DV]`.
    pub norm_weight: &'a [f64],
}

/// T tokens of one sequence, each slice dense, as a split leaves them.
#[derive(Clone, Copy, Debug)]
pub struct Tokens<'a> {
    /// `[T, C]`: q of all k heads, k of all k heads, v of all v heads.
    pub mixed_qkv: &'a [f64],
    /// `[T, HV, DV]`.
    pub z: &'a [f64],
    /// `[T, HV]`.
    pub b: &'a [f64],
    /// `[T, HV]`.
    pub a: &'a [f64],
}

/// What one sequence leaves behind.
#[derive(Clone, Debug, PartialEq)]
pub struct State {
    /// `[C, W - 1]`: the last inputs of the convolution, oldest first; zeros before the first token.
    pub conv_state: Vec<f64>,
    /// `[HV, DV, DK]`: S; zeros before the first token.
    pub recurrent_state: Vec<f64>,
}

impl State {
    /// The state before the first token.
    pub fn zeros(numbers: &Numbers) -> State {
        let Numbers { num_v_heads, head_k_dim, head_v_dim, conv_width, .. } = *numbers;
        State {
            conv_state: vec![0.0; numbers.conv_features() * (conv_width - 1)],
            recurrent_state: vec![0.0; num_v_heads * head_v_dim * head_k_dim],
        }
    }
}

/// 1 / (1 + exp(-x))
pub fn sigmoid(x: f64) -> f64 {
    1.0 / (1.0 + (-x).exp())
}

/// x * sigmoid(x)
pub fn silu(x: f64) -> f64 {
    x * sigmoid(x)
}

/// ln(1 + exp(x)), and x above 20, as PyTorch has it.
pub fn softplus(x: f64) -> f64 {
    if x > 20.0 { x } else { x.exp().ln_1p() }
}

/// The core of the layer over T tokens of one sequence: gives `[T, HV, DV]` and moves `state` on by T tokens.
///
/// For each token t, and v head h with the k head floor(h / R):
///
/// 1. x = `mixed_qkv`(t).
/// 2. c = silu(`conv_bias` + sum over j < W of `conv_weight`[:, j] * x(t - W + 1 + j)); earlier x come from
///    `conv_state`.
/// 3. q, k, v = c; q = q / sqrt(sum q^2 + `l2norm_eps`) * `scale`; k = k / sqrt(sum k^2 + `l2norm_eps`).
/// 4. g = -exp(`A_log`) * softplus(a + `dt_bias`); beta = sigmoid(b) * `beta_scale`.
/// 5. S = S * exp(g); r = S k; S = S + beta * (v - r) k^T; o = S q.
/// 6. y = o / sqrt(mean(o^2) + `norm_eps`) * `norm_weight` * gate(z).
///
/// # Panics
/// Where a slice has another length than its shape says.
pub fn forward(numbers: &Numbers, weights: &Weights<'_>, tokens: &Tokens<'_>, state: &mut State) -> Vec<f64> {
    check(numbers, weights, tokens, state);
    (0..num_tokens(numbers, tokens)).flat_map(|t| step(numbers, weights, tokens, t, state)).collect()
}

/// As [`forward`], but gives the state after each of the T tokens as well: what speculative decoding goes
/// back to.
///
/// # Panics
/// Where a slice has another length than its shape says.
pub fn forward_with_states(
    numbers: &Numbers,
    weights: &Weights<'_>,
    tokens: &Tokens<'_>,
    state: &State,
) -> (Vec<f64>, Vec<State>) {
    check(numbers, weights, tokens, state);
    let (mut state, mut out, mut states) = (state.clone(), Vec::new(), Vec::new());
    for t in 0..num_tokens(numbers, tokens) {
        out.extend(step(numbers, weights, tokens, t, &mut state));
        states.push(state.clone());
    }
    (out, states)
}

fn num_tokens(numbers: &Numbers, tokens: &Tokens<'_>) -> usize {
    tokens.mixed_qkv.len() / numbers.conv_features()
}

fn check(numbers: &Numbers, weights: &Weights<'_>, tokens: &Tokens<'_>, state: &State) {
    let Numbers { num_k_heads, num_v_heads, head_k_dim, head_v_dim, conv_width, .. } = *numbers;
    let (features, num_tokens) = (numbers.conv_features(), num_tokens(numbers, tokens));
    assert_eq!(num_v_heads % num_k_heads, 0, "num_v_heads is a multiple of num_k_heads");
    for (name, len, wanted) in [
        ("mixed_qkv", tokens.mixed_qkv.len(), num_tokens * features),
        ("z", tokens.z.len(), num_tokens * num_v_heads * head_v_dim),
        ("b", tokens.b.len(), num_tokens * num_v_heads),
        ("a", tokens.a.len(), num_tokens * num_v_heads),
        ("conv_weight", weights.conv_weight.len(), features * conv_width),
        ("conv_bias", weights.conv_bias.map_or(features, <[f64]>::len), features),
        ("A_log", weights.a_log.len(), num_v_heads),
        ("dt_bias", weights.dt_bias.len(), num_v_heads),
        ("norm_weight", weights.norm_weight.len(), head_v_dim),
        ("conv_state", state.conv_state.len(), features * (conv_width - 1)),
        ("recurrent_state", state.recurrent_state.len(), num_v_heads * head_v_dim * head_k_dim),
    ] {
        assert_eq!(len, wanted, "elements of {name}");
    }
}

/// Token `t` of `tokens`: gives `[HV, DV]` and moves `state` on by one token.
fn step(
    numbers: &Numbers,
    weights: &Weights<'_>,
    tokens: &Tokens<'_>,
    t: usize,
    state: &mut State,
) -> Vec<f64> {
    let Numbers { num_k_heads, num_v_heads, head_k_dim, head_v_dim, .. } = *numbers;
    let x = part(tokens.mixed_qkv, t, numbers.conv_features());
    let z = part(tokens.z, t, num_v_heads * head_v_dim);
    let b = part(tokens.b, t, num_v_heads);
    let a = part(tokens.a, t, num_v_heads);

    let c = convolution(numbers, weights, x, &mut state.conv_state);
    let (all_q, rest) = c.split_at(num_k_heads * head_k_dim);
    let (all_k, all_v) = rest.split_at(num_k_heads * head_k_dim);

    let mut out = Vec::new();
    for h in 0..num_v_heads {
        let k_head = h / (num_v_heads / num_k_heads);
        let q = l2_normed(part(all_q, k_head, head_k_dim), numbers.l2norm_eps, numbers.scale);
        let k = l2_normed(part(all_k, k_head, head_k_dim), numbers.l2norm_eps, 1.0);
        let v = part(all_v, h, head_v_dim);

        let g = -weights.a_log[h].exp() * softplus(a[h] + weights.dt_bias[h]);
        let beta = sigmoid(b[h]) * numbers.beta_scale;

        let size = head_v_dim * head_k_dim;
        let s = &mut state.recurrent_state[h * size..(h + 1) * size];
        let o = delta_rule(s, &q, &k, v, g, beta);

        out.extend(gated_norm(numbers, &o, weights.norm_weight, part(z, h, head_v_dim)));
    }
    out
}

/// The `i`th `len` elements: row `i` of a dense tensor.
fn part(tensor: &[f64], i: usize, len: usize) -> &[f64] {
    &tensor[i * len..(i + 1) * len]
}

/// Line 2 for one token: x `[C]` to c `[C]`; `conv_state` `[C, W - 1]` moves on by one.
fn convolution(numbers: &Numbers, weights: &Weights<'_>, x: &[f64], conv_state: &mut [f64]) -> Vec<f64> {
    let width = numbers.conv_width;
    let mut c = Vec::new();
    for (feature, &x) in x.iter().enumerate() {
        let past = &mut conv_state[feature * (width - 1)..(feature + 1) * (width - 1)];
        let window: Vec<f64> = past.iter().copied().chain([x]).collect();
        let taps = part(weights.conv_weight, feature, width);
        let bias = weights.conv_bias.map_or(0.0, |bias| bias[feature]);
        c.push(silu(bias + dot(taps, &window)));
        past.copy_from_slice(&window[1..]);
    }
    c
}

/// x / sqrt(sum x^2 + eps) * scale
fn l2_normed(x: &[f64], eps: f64, scale: f64) -> Vec<f64> {
    let norm = (dot(x, x) + eps).sqrt();
    x.iter().map(|x| x / norm * scale).collect()
}

/// Line 5 for one token of one v head: `s` `[DV, DK]` moves on by one, and o `[DV]` comes out.
fn delta_rule(s: &mut [f64], q: &[f64], k: &[f64], v: &[f64], g: f64, beta: f64) -> Vec<f64> {
    let (decay, mut o) = (g.exp(), Vec::new());
    for (row, &v) in s.chunks_exact_mut(k.len()).zip(v) {
        row.iter_mut().for_each(|s| *s *= decay);
        let r = dot(row, k);
        row.iter_mut().zip(k).for_each(|(s, k)| *s += beta * (v - r) * k);
        o.push(dot(row, q));
    }
    o
}

/// Line 6 for one token of one v head: o, `norm_weight` and z `[DV]` to y `[DV]`.
fn gated_norm(numbers: &Numbers, o: &[f64], norm_weight: &[f64], z: &[f64]) -> Vec<f64> {
    let root = (dot(o, o) / o.len() as f64 + numbers.norm_eps).sqrt();
    let gate = |z: f64| match numbers.gate {
        Gate::Silu => silu(z),
        Gate::Sigmoid => sigmoid(z),
    };
    o.iter().zip(norm_weight).zip(z).map(|((o, w), &z)| o / root * w * gate(z)).collect()
}

fn dot(x: &[f64], y: &[f64]) -> f64 {
    x.iter().zip(y).map(|(x, y)| x * y).sum()
}
