//! The plan of the work: how many workers, how many rows for each, and how many rows at a time.
//!
//! The seed of this library, a Triton kernel for Ascend NPUs, runs a grid of at most `cores` workers, gives
//! each a contiguous chunk of rows and lets it take `rows_per_iter` rows at a time, so that a tile of inputs
//! and outputs fits the on-chip buffer:
//!
//! ```text
//! grid          = max(1, min(cores, rows))
//! rows_per_core = ceil(rows / grid)
//! rows_per_iter = min(next_pow2(max(1, buffer / row_bytes)), rows_per_core, MAX_ROWS_PER_ITER)
//! ```
//!
//! [`plan`] keeps its shape and mends its rounding: the seed rounds *up*, so that its tile can be nearly
//! twice the buffer, and its last `min` can leave a number that is no power of two, which its compiler
//! refuses as an extent. Here `rows_per_iter` is always a power of two, and a tile exceeds the buffer only
//! where a single row does.

/// What a device offers to the planner.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DeviceProfile {
    /// Workers that run at a time: CPU threads, or vector cores of an NPU.
    pub cores: usize,
    /// Bytes of fast memory that a worker's tile may take.
    pub buffer_bytes: usize,
    /// The most rows at a time, buffer or not.
    pub max_rows_per_iter: usize,
}

impl DeviceProfile {
    /// The seed's device: `cores` vector cores with 85 KiB of buffer each, at most 64 rows at a time.
    pub fn ascend(cores: usize) -> Self {
        Self { cores, buffer_bytes: 85 * 1024, max_rows_per_iter: 64 }
    }
}

/// How the rows are shared out. Worker `i` has the rows from `i * rows_per_core` on, those there are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Tiling {
    /// Workers that have rows; 1 where there are none.
    pub grid: usize,
    /// Rows of each worker; the last may have fewer.
    pub rows_per_core: usize,
    /// Rows a worker takes at a time, a power of two; its last tile may have fewer.
    pub rows_per_iter: usize,
}

/// Plans `rows` rows that take `row_bytes` each, inputs and outputs together. Zeros anywhere count as ones.
///
/// ```
/// use gdn::tiling::{DeviceProfile, plan};
/// // 1000 tokens of Qwen3-Next's bf16 rows on 48 vector cores: 49,408 bytes a row, one row at a time.
/// let tiling = plan(1000, 49_408, &DeviceProfile::ascend(48));
/// assert_eq!((tiling.grid, tiling.rows_per_core, tiling.rows_per_iter), (48, 21, 1));
/// ```
pub fn plan(rows: usize, row_bytes: usize, device: &DeviceProfile) -> Tiling {
    let rows_per_core = rows.div_ceil(device.cores.max(1)).max(1);
    let fitting = device.buffer_bytes / row_bytes.max(1);
    let most = fitting.min(device.max_rows_per_iter).max(1);
    Tiling {
        grid: rows.div_ceil(rows_per_core).max(1),
        rows_per_core,
        rows_per_iter: prev_power_of_two(most).min(rows_per_core.checked_next_power_of_two().unwrap_or(most)),
    }
}

fn prev_power_of_two(n: usize) -> usize {
    1 << n.max(1).ilog2()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::Heads;

    /// The seed's own lines, in elements as it has them.
    fn seed(rows: usize, row_elements: usize, element_size: usize, cores: usize) -> (usize, usize, usize) {
        let grid = cores.min(rows).max(1);
        let rows_per_core = rows.div_ceil(grid);
        let ub_size = 85 * 1024 / element_size;
        let fitting = (ub_size / row_elements).max(1).next_power_of_two();
        (grid, rows_per_core, fitting.min(rows_per_core).min(64))
    }

    fn row_elements(heads: &Heads) -> usize {
        2 * (heads.qkvz_features() + heads.ba_features())
    }

    #[test]
    fn the_seeds_figures() {
        // (heads, bf16 rows on 48 cores) -> what the seed plans, worked out by hand from its source.
        let full = Heads::new(16, 32, 128, 128).unwrap();
        assert_eq!(row_elements(&full), 24_704);
        assert_eq!(seed(4096, 24_704, 2, 48), (48, 86, 1));
        let shard = full.shard(4).unwrap();
        assert_eq!(row_elements(&shard), 6_176);
        assert_eq!(seed(4096, 6_176, 2, 48), (48, 86, 8), "43,520 / 6,176 = 7, rounded up to 8");

        let ours = plan(4096, 24_704 * 2, &DeviceProfile::ascend(48));
        assert_eq!((ours.rows_per_core, ours.rows_per_iter), (86, 1));
        let ours = plan(4096, 6_176 * 2, &DeviceProfile::ascend(48));
        assert_eq!(ours.rows_per_iter, 4, "8 rows take 98,816 bytes, the buffer has 87,040");
    }

    #[test]
    fn nothing_and_zeros() {
        let device = DeviceProfile { cores: 0, buffer_bytes: 0, max_rows_per_iter: 0 };
        assert_eq!(plan(0, 0, &device), Tiling { grid: 1, rows_per_core: 1, rows_per_iter: 1 });
        assert_eq!(plan(5, 0, &device).rows_per_core, 5);
        let huge = plan(usize::MAX, usize::MAX, &DeviceProfile::ascend(1));
        assert_eq!((huge.rows_per_core, huge.rows_per_iter), (usize::MAX, 1));
    }

    proptest! {
        #[test]
        fn held_against_the_seed(
            rows in 0usize..5000, row in 1usize..100_000, element in prop::sample::select(vec![1usize, 2, 4, 8]),
            cores in 1usize..100,
        ) {
            let ours = plan(rows, row * element, &DeviceProfile::ascend(cores));
            let (grid, rows_per_core, rows_per_iter) = seed(rows, row, element, cores);
            // Every row has one worker, and no worker is left without rows (the seed's can be).
            prop_assert!(ours.grid * ours.rows_per_core >= rows && ours.grid <= grid);
            prop_assert!(rows == 0 || (ours.grid - 1) * ours.rows_per_core < rows);
            prop_assert_eq!(ours.rows_per_core, rows_per_core.max(1));
            // A tile is a power of two of rows and fits, where one row does.
            let buffer = 85 * 1024;
            prop_assert!(ours.rows_per_iter.is_power_of_two() && ours.rows_per_iter <= 64);
            prop_assert!(ours.rows_per_iter == 1 || ours.rows_per_iter * row * element <= buffer);
            // Where the seed's tile fits and is not cut to the rows there are, it is ours too.
            if rows_per_iter < rows_per_core && rows_per_iter * row * element <= buffer {
                prop_assert_eq!(ours.rows_per_iter, rows_per_iter);
            }
        }
    }
}
