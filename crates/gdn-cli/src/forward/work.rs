//! A file's call: read and checked, and run piece by piece.

use std::{ops::Range, time::Instant};

use anyhow::{Context, bail};
use gdn::{CHUNK, Dtype, Layer, MAX_TOKENS, Shared, Weights};

use super::args::Args;
use crate::{
    call::{Bytes, Inputs, Op, Results, tokens_of_each},
    device::Backend,
    figures::available_memory,
    files::{Input, NewTensor, Tensor},
    interrupts::check_interrupted,
    numbers::{dtype_in_file, dtype_of},
    progress::Progress,
};

/// The three results, in the order of [`Results`]; the last two are states, which IN may have too.
pub(super) const RESULTS: [&str; 3] = ["out", "conv_state", "recurrent_state"];
const EXPECTED: [&str; 3] = ["expected_out", "expected_conv_state", "expected_recurrent_state"];

/// A file's call, checked.
pub(super) struct Work<'a> {
    pub(super) op: Op,
    pub(super) inputs: Inputs<'a>,
    /// The dims of `mixed_qkvz` that count rows.
    pub(super) leading: &'a [usize],
    pub(super) cu_seqlens: Vec<usize>,
    /// `conv_state` and `recurrent_state`, where the file has them.
    pub(super) states: [Option<&'a [u8]>; 2],
    pub(super) expected: [Option<Tensor<'a>>; 3],
    /// The names of all tensors that are looked at.
    pub(super) used: Vec<&'static str>,
}

/// Reads tensors of a file, and remembers which.
struct Reader<'a> {
    input: &'a Input,
    used: Vec<&'static str>,
}

impl<'a> Reader<'a> {
    fn get(&mut self, name: &'static str) -> anyhow::Result<Tensor<'a>> {
        self.used.push(name);
        self.input.tensor(name)
    }

    fn if_there(&mut self, name: &'static str) -> anyhow::Result<Option<Tensor<'a>>> {
        if self.input.has(name) { Ok(Some(self.get(name)?)) } else { Ok(None) }
    }

    /// A weight of one dim.
    fn vector(
        &mut self,
        name: &'static str,
        len: usize,
        layer: &Layer,
    ) -> anyhow::Result<gdn::Tensor<Shared<'a>, 1>> {
        let tensor = self.get(name)?;
        expect_shape(&tensor, &[len], layer.heads())?;
        Ok(gdn::Tensor::from_bytes(tensor.data, dtype(&tensor)?, [len])?)
    }
}

fn expect_shape(tensor: &Tensor<'_>, shape: &[usize], need: impl std::fmt::Display) -> anyhow::Result<()> {
    if tensor.shape != shape {
        bail!("'{}' has shape {:?}, {need} need {shape:?}", tensor.name, tensor.shape);
    }
    Ok(())
}

fn dtype(tensor: &Tensor<'_>) -> anyhow::Result<Dtype> {
    dtype_of(tensor.dtype)
        .with_context(|| format!("'{}' is {}, it must be F32, F16 or BF16", tensor.name, tensor.dtype))
}

/// The rows of a projection: its dims that count them, and how many they count.
fn rows<'a>(tensor: &Tensor<'a>, features: usize, layer: &Layer) -> anyhow::Result<&'a [usize]> {
    let shape = tensor.shape;
    let (Some((last, leading)), 2..=3) = (shape.split_last(), shape.len()) else {
        bail!("'{}' has shape {shape:?}, it must have 2 dims [N, ...] or 3 [B, T, ...]", tensor.name);
    };
    if *last != features {
        bail!("'{}' has {last} features, {} need {features}", tensor.name, layer.heads());
    }
    Ok(leading)
}

/// Where sequences begin, and the end of the last.
fn cu_seqlens(tensor: &Tensor<'_>, num_rows: usize) -> anyhow::Result<Vec<usize>> {
    let name = tensor.name;
    let entries: Vec<i64> = match tensor.dtype {
        safetensors::Dtype::I32 => {
            tensor.data.as_chunks().0.iter().map(|entry| i32::from_le_bytes(*entry).into()).collect()
        }
        safetensors::Dtype::I64 => {
            tensor.data.as_chunks().0.iter().map(|entry| i64::from_le_bytes(*entry)).collect()
        }
        other => bail!("'{name}' is {other}, it must be I32 or I64"),
    };
    if tensor.shape.len() != 1 || entries.is_empty() {
        bail!("'{name}' has shape {:?}, it must be [B + 1]", tensor.shape);
    }
    if entries[0] != 0 {
        bail!("'{name}' begins with {}, it must begin with 0", entries[0]);
    }
    if let Some(i) = (1..entries.len()).find(|i| entries[*i] < entries[i - 1]) {
        bail!("'{name}' has {} at [{i}], less than the {} before it", entries[i], entries[i - 1]);
    }
    let entries: Vec<usize> = entries.into_iter().map(|entry| entry as usize).collect();
    match entries.last() {
        Some(last) if *last != num_rows => {
            bail!("'{name}' ends with {last}, 'mixed_qkvz' has {num_rows} rows")
        }
        _ => Ok(entries),
    }
}

impl<'a> Work<'a> {
    /// Reads what the file says and checks that it fits.
    pub(super) fn of(args: &Args, input: &'a Input) -> anyhow::Result<Self> {
        let metadata = input.metadata().pairs();
        let mut layer = Layer::new(args.layout.for_file(metadata)?);
        args.layer.set(&mut layer, metadata)?;
        let heads = layer.heads();
        let mut file = Reader { input, used: Vec::new() };

        let mixed_qkvz = file.get("mixed_qkvz")?;
        let leading = rows(&mixed_qkvz, heads.qkvz_features(), &layer)?;
        let mixed_ba = file.get("mixed_ba")?;
        let other = rows(&mixed_ba, heads.ba_features(), &layer)?;
        if other != leading {
            bail!("'mixed_ba' has rows {other:?}, 'mixed_qkvz' has rows {leading:?}");
        }
        // The features fit the file, and so do the numbers of rows.
        let num_rows = leading.iter().product();

        let conv_weight = file.get("conv_weight")?;
        let channels = layer.conv_channels();
        layer.conv_width = match *conv_weight.shape {
            [c, width] | [c, 1, width] if c == channels => width,
            ref shape => {
                bail!("'conv_weight' has shape {shape:?}, {heads} need [{channels}, W] or [{channels}, 1, W]")
            }
        };
        if !(1..=gdn::MAX_CONV_WIDTH).contains(&layer.conv_width) {
            bail!("'conv_weight' has {} taps, it must have 1 to {}", layer.conv_width, gdn::MAX_CONV_WIDTH);
        }
        let taps = [channels, layer.conv_width];
        let weights = Weights {
            conv_weight: gdn::Tensor::from_bytes(conv_weight.data, dtype(&conv_weight)?, taps)?,
            conv_bias: match input.has("conv_bias") {
                true => Some(file.vector("conv_bias", channels, &layer)?),
                false => None,
            },
            A_log: file.vector("A_log", heads.num_v_heads(), &layer)?,
            dt_bias: file.vector("dt_bias", heads.num_v_heads(), &layer)?,
            norm_weight: file.vector("norm_weight", heads.head_v_dim(), &layer)?,
        };

        let cu_seqlens = match (file.if_there("cu_seqlens")?, leading) {
            (Some(tensor), _) => cu_seqlens(&tensor, num_rows)?,
            (None, [batch, 0]) if *batch > 0 => {
                bail!("'mixed_qkvz' has sequences of no tokens, which need 'cu_seqlens'")
            }
            (None, [batch, tokens]) => (0..=*batch).map(|r| r * tokens).collect(),
            (None, _) => vec![0, num_rows],
        };
        let num_sequences = cu_seqlens.len() - 1;
        let op = match args.op {
            Some(Op::Decode) => {
                match tokens_of_each(&cu_seqlens) {
                    None if num_sequences > 0 => {
                        bail!("--op decode: all sequences must have as many tokens, {}", unequal(&cu_seqlens))
                    }
                    Some(tokens) if !(1..=MAX_TOKENS).contains(&tokens) => {
                        bail!("--op decode: the sequences have {tokens} tokens, it takes 1 to {MAX_TOKENS}")
                    }
                    _ => {}
                }
                Op::Decode
            }
            Some(Op::Prefill) => Op::Prefill,
            None => Op::of(&cu_seqlens),
        };

        let need = format!("{heads} and {num_sequences} sequences");
        let conv_state = file.if_there("conv_state")?;
        let window = layer.conv_width - 1;
        let columns = match conv_state.as_ref().map(|tensor| tensor.shape) {
            None => window,
            Some([b, c, columns]) if (*b, *c) == (num_sequences, channels) && *columns >= window => *columns,
            Some(shape) => bail!(
                "'conv_state' has shape {shape:?}, {need} need [{num_sequences}, {channels}, {window} or more]"
            ),
        };
        let recurrent_state = file.if_there("recurrent_state")?;
        let state = [num_sequences, heads.num_v_heads(), heads.head_v_dim(), heads.head_k_dim()];
        if let Some(tensor) = &recurrent_state {
            expect_shape(tensor, &state, &need)?;
        }
        let activations = dtype(&mixed_qkvz)?;
        let inputs = Inputs {
            layer,
            dtype: activations,
            mixed_qkvz: mixed_qkvz.data,
            ba_dtype: dtype(&mixed_ba)?,
            mixed_ba: mixed_ba.data,
            weights,
            columns,
            conv_dtype: conv_state.as_ref().map_or(Ok(activations), dtype)?,
            state_dtype: recurrent_state.as_ref().map_or(Ok(Dtype::F32), dtype)?,
        };
        let mut work = Self {
            op,
            inputs,
            leading,
            cu_seqlens,
            states: [conv_state, recurrent_state].map(|state| state.map(|tensor| tensor.data)),
            expected: [const { None }; 3],
            used: Vec::new(),
        };
        for (i, result) in work.results()?.iter().enumerate() {
            let Some(tensor) = file.if_there(EXPECTED[i])? else { continue };
            dtype(&tensor)?;
            if tensor.shape != result.shape {
                bail!(
                    "'{}' has shape {:?}, '{}' has {:?}",
                    tensor.name,
                    tensor.shape,
                    result.name,
                    result.shape
                );
            }
            work.expected[i] = Some(tensor);
        }
        work.used = file.used;
        Ok(work)
    }

    pub(super) fn num_rows(&self) -> usize {
        self.cu_seqlens.last().copied().unwrap_or(0)
    }

    pub(super) fn num_sequences(&self) -> usize {
        self.cu_seqlens.len() - 1
    }

    /// The dtypes of [`RESULTS`].
    pub(super) fn dtypes(&self) -> [Dtype; 3] {
        [self.inputs.dtype, self.inputs.conv_dtype, self.inputs.state_dtype]
    }

    /// What is computed, in the order of [`RESULTS`].
    pub(super) fn results(&self) -> anyhow::Result<Vec<NewTensor>> {
        let heads = self.inputs.layer.heads();
        let (hv, dk, dv) = (heads.num_v_heads(), heads.head_k_dim(), heads.head_v_dim());
        let num_sequences = self.num_sequences();
        let shapes = [
            [self.leading, &[hv, dv]].concat(),
            vec![num_sequences, self.inputs.layer.conv_channels(), self.inputs.columns],
            vec![num_sequences, hv, dv, dk],
        ];
        RESULTS
            .iter()
            .zip(self.dtypes())
            .zip(shapes)
            .map(|((name, dtype), shape)| NewTensor::new(name, dtype_in_file(dtype), shape))
            .collect()
    }

    /// Memory for the results, where they go to no file.
    pub(super) fn blocks(&self) -> anyhow::Result<Vec<Bytes>> {
        let results = self.results()?;
        let bytes = results.iter().map(|result| result.bytes).fold(0, usize::saturating_add);
        if let Some(available) = available_memory().filter(|available| bytes > *available) {
            bail!("the results take {bytes} bytes of memory, {available} are available");
        }
        results.iter().map(|result| Ok(Bytes::new(result.bytes)?)).collect()
    }

    /// Computes the results, about `piece` multiply-adds at a time, and gives the seconds that it took. What
    /// is done soon is done several times.
    pub(super) fn run(
        &self,
        data: &mut [&mut [u8]],
        backend: &Backend,
        piece: usize,
    ) -> anyhow::Result<Vec<f64>> {
        let [out, conv_state, recurrent_state] = data else { unreachable!("three results were asked for") };
        let mut results = Results { out, conv_state, recurrent_state };
        let pieces = self.pieces(piece);
        let mut progress = Progress::new((self.num_rows() * self.inputs.row_bytes()) as u64);
        let mut seconds = Vec::new();
        while seconds.is_empty() || (seconds.iter().sum::<f64>() < REPEATED_SECONDS && seconds.len() < 1001) {
            for (state, before) in
                [&mut *results.conv_state, results.recurrent_state].into_iter().zip(self.states)
            {
                match before {
                    Some(before) => state.copy_from_slice(before),
                    None => state.fill(0),
                }
            }
            let mut once = 0.0;
            for Piece { sequences, rows } in &pieces {
                check_interrupted()?;
                let entry = |r: usize| (self.cu_seqlens[r].clamp(rows.start, rows.end) - rows.start) as i64;
                let cu_seqlens: Vec<i64> = (sequences.start..=sequences.end).map(entry).collect();
                let started = Instant::now();
                let (sequences, rows, end) = (sequences.clone(), rows.clone(), rows.end);
                backend.run(&mut self.inputs.call(self.op, sequences, rows, &cu_seqlens, &mut results)?)?;
                once += started.elapsed().as_secs_f64();
                progress.set((end * self.inputs.row_bytes()) as u64);
            }
            seconds.push(once);
        }
        progress.finish();
        Ok(seconds)
    }

    /// The calls of the op: sequences as long as they are not too much work together, and of a longer one
    /// some chunks at a time.
    fn pieces(&self, multiply_adds: usize) -> Vec<Piece> {
        // Convolution, gates and norm take about as long as so many multiply-adds for each feature.
        let of_row = self.inputs.multiply_adds() + 32 * self.inputs.layer.heads().qkvz_features();
        let most = (multiply_adds / of_row).max(1).next_multiple_of(CHUNK);
        let Inputs { dtype, conv_dtype, state_dtype, .. } = self.inputs;
        // Cut at a multiple of a chunk a sequence gives the same bits, where its states lose nothing between
        // the calls.
        let lossless = state_dtype == Dtype::F32 && (conv_dtype == Dtype::F32 || conv_dtype == dtype);
        cut(&self.cu_seqlens, most, self.op == Op::Prefill && lossless)
    }
}

/// Work that takes less than this is repeated until it has, for a figure of its time that says something.
const REPEATED_SECONDS: f64 = 0.1;

/// Rows that are handed to the op at a time, and the sequences to which they belong.
#[derive(Debug, PartialEq, Eq)]
struct Piece {
    sequences: Range<usize>,
    rows: Range<usize>,
}

/// Whole sequences of `most` rows together, or one that has more; that one is cut after every `most` rows
/// where it may be.
fn cut(cu_seqlens: &[usize], most: usize, may_cut: bool) -> Vec<Piece> {
    let mut pieces = Vec::new();
    let mut r = 0;
    while r + 1 < cu_seqlens.len() {
        let start = cu_seqlens[r];
        // A sequence without tokens has states all the same.
        let fits = |end: &usize| cu_seqlens[*end] - start + (*end - r) <= most;
        let end = (r + 1..cu_seqlens.len()).take_while(fits).last().unwrap_or(r + 1);
        let rows = start..cu_seqlens[end];
        if end == r + 1 && rows.len() > most && may_cut {
            let parts = rows.clone().step_by(most);
            pieces.extend(
                parts.map(|part| Piece { sequences: r..end, rows: part..(part + most).min(rows.end) }),
            );
        } else {
            pieces.push(Piece { sequences: r..end, rows });
        }
        r = end;
    }
    pieces
}

/// Two lengths that differ, where not all are the same.
fn unequal(cu_seqlens: &[usize]) -> String {
    let length = |r: usize| cu_seqlens[r + 1] - cu_seqlens[r];
    let other = (1..cu_seqlens.len() - 1).find(|r| length(*r) != length(0)).unwrap_or(0);
    format!("sequence 0 has {}, sequence {other} has {}", length(0), length(other))
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use clap::Parser;
    use gdn::Cpu;

    use super::*;

    #[derive(Parser)]
    struct Command {
        #[command(flatten)]
        args: Args,
    }

    /// The results of a file of testdata/.
    fn results(name: &str, piece: usize) -> (usize, Vec<Vec<u8>>) {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../testdata").join(name);
        let Command { args } = Command::parse_from(["forward".as_ref(), path.as_os_str()]);
        let input = Input::open(&path).unwrap();
        let work = Work::of(&args, &input).unwrap();
        let mut blocks = work.blocks().unwrap();
        let mut data: Vec<&mut [u8]> = blocks.iter_mut().map(Bytes::all_mut).collect();
        data.iter_mut().for_each(|data| data.fill(0xA5));
        work.run(&mut data, &Backend::Cpu(Cpu::new()), piece).unwrap();
        (work.pieces(piece).len(), data.into_iter().map(|data| data.to_vec()).collect())
    }

    #[test]
    fn pieces_give_the_same_bits_as_the_whole() {
        for (name, pieces) in [
            ("batched-bf16-layer-more.safetensors", 4),
            ("batched-bf16-layer-decode.safetensors", 1),
            ("r1-f32-layer-more.safetensors", 2),
            ("contiguous-r2-f16-layer.safetensors", 2),
        ] {
            let (cut, whole) = (results(name, 0), results(name, usize::MAX));
            assert_eq!((cut.0, whole.0), (pieces, 1), "{name}");
            assert!(cut.1 == whole.1, "{name}");
        }
    }

    #[test]
    fn pieces_are_all_rows_once_in_order() {
        let cases: [&[usize]; 6] =
            [&[0], &[0, 0], &[0, 100], &[0, 0, 5, 5, 40, 41, 200, 200], &[0, 33], &[0, 1, 2, 3, 4]];
        for cu_seqlens in cases {
            for may_cut in [false, true] {
                let pieces = cut(cu_seqlens, 32, may_cut);
                let mut row = 0;
                let mut sequence = 0;
                for Piece { sequences, rows } in &pieces {
                    assert_eq!(rows.start, row, "{cu_seqlens:?}: {pieces:?}");
                    row = rows.end;
                    assert!(
                        sequences.start == sequence
                            || sequences.start + 1 == sequence && rows.start > cu_seqlens[sequences.start]
                    );
                    sequence = sequences.end;
                    assert!(rows.len() <= 32 || (!may_cut && sequences.len() == 1), "{pieces:?}");
                    let whole = rows.end == cu_seqlens[sequences.end];
                    assert!(whole || (may_cut && sequences.len() == 1 && rows.len() == 32), "{pieces:?}");
                }
                assert_eq!((row, sequence), (*cu_seqlens.last().unwrap(), cu_seqlens.len() - 1));
            }
        }
    }
}
