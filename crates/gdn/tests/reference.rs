//! The f64 oracle of the layer's core, held to what can be worked out without it: small cases by hand, closed
//! forms of the recurrence, and properties that the formulas have. What Hugging Face transformers makes of
//! the same inputs is in `golden_layer.rs`.

use gdn::reference::layer::{
    Gate, Numbers, State, Tokens, Weights, forward, forward_with_states, sigmoid, silu, softplus,
};
use proptest::prelude::*;

/// Weights, tokens and a state that own their numbers.
#[derive(Clone, Debug)]
struct Case {
    numbers: Numbers,
    conv_weight: Vec<f64>,
    conv_bias: Option<Vec<f64>>,
    a_log: Vec<f64>,
    dt_bias: Vec<f64>,
    norm_weight: Vec<f64>,
    mixed_qkv: Vec<f64>,
    z: Vec<f64>,
    b: Vec<f64>,
    a: Vec<f64>,
    state: State,
}

impl Case {
    /// Everything from `next`, in the order of the fields.
    fn of(numbers: Numbers, num_tokens: usize, mut next: impl FnMut() -> f64) -> Case {
        let Numbers { num_v_heads, head_v_dim, conv_width, .. } = numbers;
        let mut take = |n: usize| (0..n).map(|_| next()).collect::<Vec<f64>>();
        let features = numbers.conv_features();
        let mut case = Case {
            numbers,
            conv_weight: take(features * conv_width),
            conv_bias: Some(take(features)),
            a_log: take(num_v_heads),
            dt_bias: take(num_v_heads),
            norm_weight: take(head_v_dim),
            mixed_qkv: take(num_tokens * features),
            z: take(num_tokens * num_v_heads * head_v_dim),
            b: take(num_tokens * num_v_heads),
            a: take(num_tokens * num_v_heads),
            state: State::zeros(&numbers),
        };
        let State { conv_state, recurrent_state } = &mut case.state;
        conv_state.iter_mut().chain(recurrent_state).for_each(|x| *x = next());
        case
    }

    fn random(numbers: Numbers, num_tokens: usize, seed: u64) -> Case {
        let mut bits = seed;
        Case::of(numbers, num_tokens, || {
            bits = bits.wrapping_add(0x9e37_79b9_7f4a_7c15);
            let mixed = (bits ^ (bits >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
            let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
            (mixed >> 11) as f64 / (1u64 << 53) as f64 * 4.0 - 2.0
        })
    }

    /// A state of zeros; c = silu(x), decay 1 (g = 0), beta 1, norm weights and gates 1; x all 1.
    fn plain(mut numbers: Numbers, num_tokens: usize) -> Case {
        (numbers.conv_width, numbers.l2norm_eps, numbers.norm_eps) = (1, 0.0, 0.0);
        (numbers.scale, numbers.gate) = (1.0, Gate::Sigmoid);
        let mut case = Case::of(numbers, num_tokens, || 1.0);
        (case.conv_bias, case.state) = (None, State::zeros(&numbers));
        case.a_log.fill(f64::NEG_INFINITY);
        case.b.fill(1e3);
        case.z.fill(1e3);
        case
    }

    fn weights(&self) -> Weights<'_> {
        let Case { conv_weight, a_log, dt_bias, norm_weight, .. } = self;
        Weights { conv_weight, conv_bias: self.conv_bias.as_deref(), a_log, dt_bias, norm_weight }
    }

    fn num_tokens(&self) -> usize {
        self.mixed_qkv.len() / self.numbers.conv_features()
    }

    fn tokens(&self, from: usize, to: usize) -> Tokens<'_> {
        fn rows(tensor: &[f64], features: usize, from: usize, to: usize) -> &[f64] {
            &tensor[from * features..to * features]
        }
        let Numbers { num_v_heads, head_v_dim, .. } = self.numbers;
        Tokens {
            mixed_qkv: rows(&self.mixed_qkv, self.numbers.conv_features(), from, to),
            z: rows(&self.z, num_v_heads * head_v_dim, from, to),
            b: rows(&self.b, num_v_heads, from, to),
            a: rows(&self.a, num_v_heads, from, to),
        }
    }

    fn run(&self) -> (Vec<f64>, State) {
        let mut state = self.state.clone();
        let out = forward(&self.numbers, &self.weights(), &self.tokens(0, self.num_tokens()), &mut state);
        (out, state)
    }

    /// c of every token `[T, C]`, worked out with an explicit window over `conv_state` and the inputs.
    fn convolved(&self) -> Vec<Vec<f64>> {
        let (features, width) = (self.numbers.conv_features(), self.numbers.conv_width);
        let input = |t: usize, f: usize| match t.checked_sub(width - 1) {
            Some(t) => self.mixed_qkv[t * features + f],
            None => self.state.conv_state[f * (width - 1) + t],
        };
        let c = |t: usize, f: usize| {
            let taps: f64 = (0..width).map(|j| self.conv_weight[f * width + j] * input(t + j, f)).sum();
            silu(self.conv_bias.as_ref().map_or(0.0, |bias| bias[f]) + taps)
        };
        (0..self.num_tokens()).map(|t| (0..features).map(|f| c(t, f)).collect()).collect()
    }
}

fn one_head(head_k_dim: usize, head_v_dim: usize) -> Numbers {
    Numbers::new(1, 1, head_k_dim, head_v_dim)
}

/// What silu makes `c` of, for c > 0: by halving the interval.
fn silu_inverse(c: f64) -> f64 {
    let (mut low, mut high) = (0.0, c + 1.0);
    for _ in 0..200 {
        let middle = (low + high) / 2.0;
        if silu(middle) < c { low = middle } else { high = middle }
    }
    (low + high) / 2.0
}

fn assert_close(got: &[f64], wanted: &[f64], bound: f64) {
    assert_eq!(got.len(), wanted.len());
    let largest = wanted.iter().fold(1.0, |largest: f64, x| largest.max(x.abs()));
    for (i, (got, wanted)) in got.iter().zip(wanted).enumerate() {
        assert!((got - wanted).abs() <= bound * largest, "element {i}: {got}, wanted {wanted}");
    }
}

#[test]
fn functions_by_hand() {
    let e = std::f64::consts::E;
    assert_close(&[sigmoid(0.0), sigmoid(1.0), sigmoid(-1.0)], &[0.5, e / (e + 1.0), 1.0 / (e + 1.0)], 1e-15);
    assert_eq!([sigmoid(-1e3), sigmoid(1e3), silu(0.0), silu(-1e3), silu(1e3)], [0.0, 1.0, 0.0, 0.0, 1e3]);
    assert_close(&[silu(2.0)], &[2.0 * e * e / (e * e + 1.0)], 1e-15);
    assert_close(&[softplus(0.0), softplus(1.0)], &[2f64.ln(), (1.0 + e).ln()], 1e-15);
    assert_eq!([softplus(90.0), softplus(1e4), softplus(-1e3)], [90.0, 1e4, 0.0]);
    assert_close(&[softplus(20.0), softplus(20.0 + 1e-12)], &[20.0, 20.0], 2.1e-9 / 20.0);
    // What is far below 1 is not lost: exp(-40), where ln(1 + exp(-40)) would be 0.
    assert!((softplus(-40.0) / (-40f64).exp() - 1.0).abs() < 1e-14);
}

#[test]
fn two_tokens_by_hand() {
    // The literals are from 40 digits and the matrix form of line 5, S exp(g) (1 - beta k k^T) + beta v k^T.
    let mut numbers = one_head(2, 2);
    numbers.conv_width = 2;
    let case = Case {
        numbers,
        conv_weight: vec![0.5, 1.0, -1.0, 2.0, 0.0, 1.0, 1.0, 1.0, 0.25, -1.0, 2.0, 0.5],
        conv_bias: Some(vec![0.0, 0.25, 0.0, -0.5, 0.0, 1.0]),
        a_log: vec![-1.0],
        dt_bias: vec![0.5],
        norm_weight: vec![1.0, 2.0],
        mixed_qkv: vec![1.0, 2.0, -1.0, 1.0, 3.0, -2.0, 0.0, 1.0, 2.0, -1.0, 1.0, 1.0],
        z: vec![1.0, -1.0, 2.0, 0.5],
        b: vec![0.0, 1.0],
        a: vec![1.0, -1.0],
        state: State { conv_state: vec![1.0; 6], recurrent_state: vec![1.0, 0.0, 0.0, -1.0] },
    };
    let (out, state) = case.run();
    let wanted = [0.372044106748293, -0.709714942238723, 1.670041775461658, 0.652785204330746];
    assert_close(&out, &wanted, 1e-14);
    let wanted = [0.0446234819258959, 0.0230485624130166, -0.157041097137171, 0.482570594269043];
    assert_close(&state.recurrent_state, &wanted, 1e-15);
    assert_eq!(state.conv_state, [0.0, 1.0, 2.0, -1.0, 1.0, 1.0]);
}

#[test]
fn one_feature_is_a_scalar_recurrence() {
    // DK = DV = 1, no eps: q and k are signs, so S = S exp(g) (1 - beta) + beta v k, and the normed o is the
    // sign of S q.
    let mut numbers = one_head(1, 1);
    (numbers.l2norm_eps, numbers.norm_eps) = (0.0, 0.0);
    let case = Case::random(numbers, 9, 1);
    let (mut s, mut wanted) = (case.state.recurrent_state[0], Vec::new());
    for (t, c) in case.convolved().iter().enumerate() {
        let (q, k, v) = (c[0].signum(), c[1].signum(), c[2]);
        let g = -case.a_log[0].exp() * (1.0 + (case.a[t] + case.dt_bias[0]).exp()).ln();
        let beta = 1.0 / (1.0 + (-case.b[t]).exp());
        s = s * g.exp() * (1.0 - beta) + beta * v * k;
        wanted.push((s * q).signum() * case.norm_weight[0] * silu(case.z[t]));
    }
    let (out, state) = case.run();
    assert_close(&out, &wanted, 1e-14);
    assert_close(&state.recurrent_state, &[s], 1e-14);
}

#[test]
fn beta_zero_leaves_the_decay_alone() {
    let mut case = Case::random(Numbers::new(1, 2, 3, 2), 5, 2);
    case.b.fill(-1e3);
    let (_, state) = case.run();
    let decay = |h: usize| {
        let sum: f64 = (0..5).map(|t| (1.0 + (case.a[2 * t + h] + case.dt_bias[h]).exp()).ln()).sum();
        (-case.a_log[h].exp() * sum).exp()
    };
    let wanted: Vec<f64> =
        case.state.recurrent_state.iter().enumerate().map(|(i, s)| s * decay(i / 6)).collect();
    assert_close(&state.recurrent_state, &wanted, 1e-14);
}

#[test]
fn equal_keys_with_beta_one_replace_the_value() {
    let numbers = one_head(2, 3);
    let mut case = Case::plain(numbers, 4);
    // Keys (1, 1) / sqrt 2 throughout, another value each time.
    for t in 0..4 {
        for d in 0..3 {
            case.mixed_qkv[t * 7 + 4 + d] = (t * 3 + d) as f64 - 4.0;
        }
    }
    case.state.recurrent_state = vec![1.0, 3.0, 5.0, 5.0, -2.0, 8.0];
    let (out, states) = forward_with_states(&case.numbers, &case.weights(), &case.tokens(0, 4), &case.state);
    let half = 0.5f64.sqrt();
    for (t, state) in states.iter().enumerate() {
        let v: Vec<f64> = (0..3).map(|d| silu(case.mixed_qkv[t * 7 + 4 + d])).collect();
        // What S had for this key is gone; what it had for (1, -1) / sqrt 2 is still there.
        let along = |sign: f64| -> Vec<f64> {
            state.recurrent_state.chunks(2).map(|row| half * (row[0] + sign * row[1])).collect()
        };
        assert_close(&along(1.0), &v, 1e-14);
        assert_close(&along(-1.0), &[-2.0 * half, 0.0, -10.0 * half], 1e-14);
        // q is the key, so o is v.
        let rms = (v.iter().map(|v| v * v).sum::<f64>() / 3.0).sqrt();
        let wanted: Vec<f64> = v.iter().map(|v| v / rms).collect();
        assert_close(&out[t * 3..t * 3 + 3], &wanted, 1e-14);
    }
}

#[test]
fn orthogonal_keys_with_beta_one_store_every_value() {
    let dim = 4;
    let mut case = Case::plain(one_head(dim, dim), dim);
    for t in 0..dim {
        let row = &mut case.mixed_qkv[t * 3 * dim..(t + 1) * 3 * dim];
        row[..2 * dim].fill(0.0);
        row[dim + t] = 7.0;
        for d in 0..dim {
            row[2 * dim + d] = (10 * t + d) as f64;
        }
    }
    let (_, state) = case.run();
    for (d, row) in state.recurrent_state.chunks(dim).enumerate() {
        let wanted: Vec<f64> = (0..dim).map(|t| silu((10 * t + d) as f64)).collect();
        assert_close(row, &wanted, 1e-14);
    }
}

#[test]
fn beta_two_reflects() {
    // S (1 - 2 k k^T) twice is S, where v is 0 and nothing decays.
    let mut case = Case::plain(one_head(3, 2), 2);
    case.numbers.beta_scale = 2.0;
    case.mixed_qkv =
        [[0.0; 3], [0.5, 2.0, 1.0]].concat().into_iter().chain([0.0; 2]).collect::<Vec<_>>().repeat(2);
    case.state.recurrent_state = vec![1.0, 2.0, -3.0, 4.0, 0.5, -6.0];
    let (_, states) = forward_with_states(&case.numbers, &case.weights(), &case.tokens(0, 2), &case.state);
    assert_close(&states[1].recurrent_state, &case.state.recurrent_state, 1e-14);
    let moved =
        states[0].recurrent_state.iter().zip(&case.state.recurrent_state).any(|(x, y)| (x - y).abs() > 0.1);
    assert!(moved, "one reflection changes the state");
}

#[test]
fn the_convolution_is_its_impulse_response() {
    for width in 1..6 {
        // DK = DV = 1, beta 1, k = 1: S is c of v.
        let mut case = Case::plain(one_head(1, 1), width + 2);
        case.numbers.conv_width = width;
        let taps: Vec<f64> = (1..=width).map(|j| j as f64 / 2.0).collect();
        case.conv_weight = [vec![1.0; 2 * width], taps.clone()].concat();
        case.conv_bias = Some(vec![1.0, 1.0, 0.25]);
        case.mixed_qkv = (0..width + 2).flat_map(|t| [1.0, 1.0, f64::from(t == 0)]).collect();
        case.state = State::zeros(&case.numbers);
        let tokens = case.tokens(0, width + 2);
        let (_, states) = forward_with_states(&case.numbers, &case.weights(), &tokens, &case.state);
        for (t, state) in states.iter().enumerate() {
            let tap = taps.iter().rev().nth(t).unwrap_or(&0.0);
            assert_close(&state.recurrent_state, &[silu(0.25 + tap)], 1e-15);
            let window: Vec<f64> = (0..width - 1).map(|j| f64::from(t + j + 2 == width)).collect();
            assert_eq!(state.conv_state[2 * (width - 1)..], window, "width {width}, after token {t}");
        }
    }
}

#[test]
fn the_norm_and_both_gates() {
    let mut case = Case::random(Numbers::new(2, 4, 3, 5), 3, 3);
    case.numbers.norm_eps = 0.0;
    case.norm_weight.fill(1.0);
    let (silu_out, _) = case.run();
    case.numbers.gate = Gate::Sigmoid;
    let (sigmoid_out, _) = case.run();
    let wanted: Vec<f64> = sigmoid_out.iter().zip(&case.z).map(|(y, z)| y * z).collect();
    assert_close(&silu_out, &wanted, 1e-15);
    for (y, z) in sigmoid_out.chunks(5).zip(case.z.chunks(5)) {
        let mean: f64 = y.iter().zip(z).map(|(y, z)| (y / sigmoid(*z)).powi(2)).sum::<f64>() / 5.0;
        assert_close(&[mean], &[1.0], 1e-14);
    }
    // Scaled weights scale the output, a scaled q does not (but for eps).
    (case.numbers.scale, case.norm_weight) = (17.0, vec![-3.0; 5]);
    let wanted: Vec<f64> = sigmoid_out.iter().map(|y| -3.0 * y).collect();
    assert_close(&case.run().0, &wanted, 1e-14);
}

#[test]
fn eps_is_added_to_the_sum_and_to_the_mean() {
    // DK = DV = 2; c of q is (3, 0), of k (0, 1), of v (0, 4): every root is that of a square.
    let mut case = Case::plain(one_head(2, 2), 1);
    (case.numbers.l2norm_eps, case.numbers.norm_eps) = (7.0, 8.0);
    case.mixed_qkv = [3.0, 3.0, 0.0, 3.0, 0.0, 4.0].map(silu_inverse).to_vec();
    let (out, state) = case.run();
    // q = (3, 3) / 5, k = (0, 3) / 4, S = v k^T = [0, 0; 0, 3], o = (0, 9 / 5), y = o / sqrt(o^2 / 2 + 8).
    assert_close(&state.recurrent_state, &[0.0, 0.0, 0.0, 3.0], 1e-12);
    assert_close(&out, &[0.0, 1.8 / (1.8f64 * 1.8 / 2.0 + 8.0).sqrt()], 1e-12);
}

#[test]
fn hostile_values_stay_finite() {
    let mut case = Case::random(Numbers::new(1, 2, 4, 3), 6, 4);
    case.conv_bias = None;
    case.mixed_qkv.fill(0.0);
    case.state.conv_state.fill(0.0);
    (case.a, case.b) =
        ([90.0, -90.0, 1e3, 0.0, -1e3, 20.0].repeat(2), [8.0, 20.0, -90.0, 1e3, -1e3, 0.0].repeat(2));
    (case.a_log, case.dt_bias) = (vec![0.0; 2], vec![0.0; 2]);
    let (out, state) = case.run();
    assert!(out.iter().chain(&state.recurrent_state).all(|x| x.is_finite()));
    // Zero keys write nothing. In head 0, g = -1000 forgets everything; in head 1 the decays are exp of 0,
    // -ln 2 and -20, twice.
    let (forgotten, decayed) = state.recurrent_state.split_at(12);
    assert_eq!(forgotten, [0.0; 12]);
    let decay = (-2.0 * (2f64.ln() + 20.0)).exp();
    for (s, before) in decayed.iter().zip(&case.state.recurrent_state[12..]) {
        assert!((s / (before * decay) - 1.0).abs() < 1e-8, "{s} of {before}");
    }
    assert_eq!(out, [0.0; 36], "a query of zeros reads zeros");
}

#[test]
#[should_panic(expected = "elements of dt_bias")]
fn a_slice_of_another_length() {
    let mut case = Case::random(one_head(2, 2), 1, 5);
    case.dt_bias.push(0.0);
    case.run();
}

fn numbers() -> impl Strategy<Value = Numbers> {
    (1usize..4, 1usize..4, 1usize..6, 1usize..6, 1usize..6, any::<bool>()).prop_map(
        |(hk, r, dk, dv, width, silu)| {
            let mut numbers = Numbers::new(hk, hk * r, dk, dv);
            numbers.conv_width = width;
            numbers.gate = if silu { Gate::Silu } else { Gate::Sigmoid };
            numbers.beta_scale = if width % 2 == 0 { 2.0 } else { 1.0 };
            numbers
        },
    )
}

proptest! {
    /// A sequence cut anywhere gives the same bits, and so do its tokens one at a time.
    #[test]
    fn cut_anywhere(numbers in numbers(), num_tokens in 0usize..9, cut in 0usize..9, seed: u64) {
        let case = Case::random(numbers, num_tokens, seed);
        let cut = cut.min(num_tokens);
        let (out, end) = case.run();
        let mut state = case.state.clone();
        let mut parts = forward(&numbers, &case.weights(), &case.tokens(0, cut), &mut state);
        parts.extend(forward(&numbers, &case.weights(), &case.tokens(cut, num_tokens), &mut state));
        prop_assert_eq!(&parts, &out);
        prop_assert_eq!(&state, &end);

        let (with_states, states) =
            forward_with_states(&numbers, &case.weights(), &case.tokens(0, num_tokens), &case.state);
        prop_assert_eq!(&with_states, &out);
        prop_assert_eq!(states.len(), num_tokens);
        let mut state = case.state.clone();
        for (t, after) in states.iter().enumerate() {
            forward(&numbers, &case.weights(), &case.tokens(t, t + 1), &mut state);
            prop_assert_eq!(&state, after);
        }
        prop_assert_eq!(state, end);
    }

    /// A layer is its v heads, each with the k head floor(h / R), as layers of one head.
    #[test]
    fn heads_do_not_meet(numbers in numbers(), num_tokens in 1usize..5, seed: u64) {
        let case = Case::random(numbers, num_tokens, seed);
        let (out, state) = case.run();
        let Numbers { num_k_heads: hk, num_v_heads: hv, head_k_dim: dk, head_v_dim: dv, conv_width, .. } = numbers;
        for h in 0..hv {
            let k_head = h / (hv / hk);
            let features: Vec<usize> = (0..dk).map(|d| k_head * dk + d)
                .chain((0..dk).map(|d| (hk + k_head) * dk + d))
                .chain((0..dv).map(|d| 2 * hk * dk + h * dv + d))
                .collect();
            let rows = |tensor: &[f64], width: usize, features: &[usize]| -> Vec<f64> {
                tensor.chunks(width.max(1)).flat_map(|row| features.iter().map(|&f| row[f])).collect()
            };
            let channels = |tensor: &[f64], width: usize| -> Vec<f64> {
                features.iter().flat_map(|&f| tensor[f * width..(f + 1) * width].to_vec()).collect()
            };
            let of_head: Vec<usize> = (h * dv..(h + 1) * dv).collect();
            let alone = Case {
                numbers: Numbers { num_k_heads: 1, num_v_heads: 1, ..numbers },
                conv_weight: channels(&case.conv_weight, conv_width),
                conv_bias: case.conv_bias.as_ref().map(|bias| channels(bias, 1)),
                a_log: vec![case.a_log[h]],
                dt_bias: vec![case.dt_bias[h]],
                norm_weight: case.norm_weight.clone(),
                mixed_qkv: rows(&case.mixed_qkv, numbers.conv_features(), &features),
                z: rows(&case.z, hv * dv, &of_head),
                b: rows(&case.b, hv, &[h]),
                a: rows(&case.a, hv, &[h]),
                state: State {
                    conv_state: channels(&case.state.conv_state, conv_width - 1),
                    recurrent_state: case.state.recurrent_state[h * dv * dk..(h + 1) * dv * dk].to_vec(),
                },
            };
            let (out_alone, state_alone) = alone.run();
            prop_assert_eq!(out_alone, rows(&out, hv * dv, &of_head));
            prop_assert_eq!(&state_alone.recurrent_state[..], &state.recurrent_state[h * dv * dk..(h + 1) * dv * dk]);
            prop_assert_eq!(state_alone.conv_state, channels(&state.conv_state, conv_width - 1));
        }
    }

    /// Line 5 as matrices, S = S exp(g) (1 - beta k k^T) + beta v k^T, and line 2 over an explicit window.
    #[test]
    fn the_matrix_form(mut numbers in numbers(), num_tokens in 1usize..6, seed: u64) {
        (numbers.num_k_heads, numbers.num_v_heads) = (1, 1);
        let case = Case::random(numbers, num_tokens, seed);
        let (dk, dv) = (numbers.head_k_dim, numbers.head_v_dim);
        let mut s = case.state.recurrent_state.clone();
        let (out, end) = case.run();
        for (t, c) in case.convolved().iter().enumerate() {
            let normed = |x: &[f64]| -> Vec<f64> {
                let sum: f64 = x.iter().map(|x| x * x).sum();
                x.iter().map(|x| x * (sum + 1e-6).sqrt().recip()).collect()
            };
            let (q, k, v) = (normed(&c[..dk]), normed(&c[dk..2 * dk]), &c[2 * dk..]);
            let beta = numbers.beta_scale / (1.0 + (-case.b[t]).exp());
            let decay = (1.0 + (case.a[t] + case.dt_bias[0]).exp()).powf(-case.a_log[0].exp());
            let before = s.clone();
            for (d, i) in (0..dv).flat_map(|d| (0..dk).map(move |i| (d, i))) {
                let moved: f64 = (0..dk)
                    .map(|j| before[d * dk + j] * (f64::from(i == j) - beta * k[j] * k[i]))
                    .sum();
                s[d * dk + i] = decay * moved + beta * v[d] * k[i];
            }
            let o: Vec<f64> = (0..dv)
                .map(|d| (0..dk).map(|i| s[d * dk + i] * q[i]).sum::<f64>() / (dk as f64).sqrt())
                .collect();
            let rms = (o.iter().map(|o| o * o).sum::<f64>() / dv as f64 + 1e-6).sqrt();
            let wanted: Vec<f64> = (0..dv).map(|d| {
                let z = case.z[t * dv + d];
                let gate = if numbers.gate == Gate::Silu { z } else { 1.0 } / (1.0 + (-z).exp());
                o[d] / rms * case.norm_weight[d] * gate
            }).collect();
            // The norm divides by what may be as small as its eps: the error of o, 1e-15 of S, then grows a
            // thousandfold.
            assert_close(&out[t * dv..(t + 1) * dv], &wanted, 1e-10);
        }
        assert_close(&end.recurrent_state, &s, 1e-12);
    }
}
