//! [`Wgmma`] on the host. Products are worked out at once; until their group was waited for, their operands
//! are lent and their sums are not to be had.

use std::{collections::VecDeque, format, string::String, vec::Vec};

use super::{
    Thread, WARP, bytes,
    schedule::Company,
    sums::{Factor, Model},
    tensor_core::pair,
};
use crate::gpu::{Accumulators, Bytes16, Float16, Lefts, OTHER_MAJOR, Operand, Swizzle, Wgmma};

const GROUP: usize = 4 * WARP;
/// Beyond every number of a product: the registers may have been written, at the time in the low bits.
const WRITTEN: u64 = 1 << 63;

/// What a warpgroup has under way.
#[derive(Default)]
pub(super) struct Products {
    /// Counts products and touches of registers.
    time: u64,
    begun: u64,
    /// The bytes of the operands of products in no group yet, and by groups.
    open: Vec<u32>,
    /// With the last product of each.
    groups: VecDeque<(u64, Vec<u32>)>,
    /// The last product that is done.
    done: u64,
}

/// Where 8 neighbouring elements of an operand lie, along the rows of its atoms: `line` is the index across
/// (m or n when k-major), `piece` counts eights along.
fn at(operand: &Operand, other_major: bool, piece: u32, line: u32) -> u32 {
    let row_pieces = operand.swizzle.row_bytes() / 16;
    let (inside, outside) = (piece % row_pieces, piece / row_pieces);
    let row = operand.swizzle.row_bytes() * (line % 8) + 16 * inside;
    let rest = match (other_major, operand.swizzle) {
        // k16 is two pieces: one row of an atom but where there is no swizzle.
        (false, Swizzle::None) => line / 8 * operand.stride + outside * operand.leading,
        (false, _) => line / 8 * operand.stride,
        // Without a swizzle the two fields change places.
        (true, Swizzle::None) => line / 8 * operand.leading + outside * operand.stride,
        (true, _) => line / 8 * operand.stride + outside * operand.leading,
    };
    operand.swizzle.place(operand.at + operand.offset + row + rest)
}

/// Reads an operand: `lines` of 16 along k.
fn read<T: Float16>(
    company: &Company<'_>,
    operand: &Operand,
    other_major: bool,
    lines: usize,
    lent: &mut Vec<u32>,
) -> Vec<[Factor; 16]> {
    let &Company { cluster, block, first } = company;
    let mut shared = cluster.blocks[block].shared.borrow_mut();
    let clocks = cluster.clocks.borrow();
    let mut eight = |piece: usize, line: usize| {
        let at = at(operand, other_major, piece as u32, line as u32);
        let mut value = [0; 16];
        if let Err(why) = shared.lend(&clocks, first, at, &mut value) {
            panic!(
                "a product of the warpgroup at {} reads {at} of shared memory, {why}",
                cluster.name(first)
            );
        }
        lent.push(at);
        core::array::from_fn::<Factor, 8, _>(|i| {
            Factor::new::<T>(u16::from_ne_bytes([value[2 * i], value[2 * i + 1]]))
        })
    };
    let mut matrix = std::vec![[Factor::ZERO; 16]; lines];
    if other_major {
        for piece in 0..lines / 8 {
            for k in 0..16 {
                for (row, factor) in matrix[8 * piece..].iter_mut().zip(eight(piece, k)) {
                    row[k] = factor;
                }
            }
        }
    } else {
        for (line, row) in matrix.iter_mut().enumerate() {
            for piece in 0..2 {
                row[8 * piece..][..8].copy_from_slice(&eight(piece, line));
            }
        }
    }
    matrix
}

/// What a thread brings to a product.
struct Registers<const N: usize, A> {
    d: Accumulators<N>,
    a: A,
    b: Operand,
    add: bool,
}

/// Its part of a left side, and which product was the last to read it.
#[derive(Clone, Copy)]
struct Left {
    words: [u32; 4],
    product: u64,
}

fn product<T: Float16, const A_MAJOR: bool, const B_MAJOR: bool, const N: usize>(
    company: &Company<'_>,
    registers: &mut [&mut Registers<N, Operand>],
) {
    let a = registers[0].a;
    let same = registers.iter().all(|r| r.a == a);
    assert!(same, "{}", differ(company));
    multiply::<T, B_MAJOR, N, Operand>(company, registers, |lent| {
        read::<T>(company, &a, A_MAJOR == OTHER_MAJOR, 64, lent)
    });
}

fn product_left<T: Float16, const B_MAJOR: bool, const N: usize>(
    company: &Company<'_>,
    registers: &mut [&mut Registers<N, Left>],
) {
    let mut a = std::vec![[Factor::ZERO; 16]; 64];
    of(company, |products| {
        for (thread, registers) in registers.iter_mut().enumerate() {
            let Left { words, product } = &mut registers.a;
            let is_read = *product != 0 && *product & WRITTEN == 0;
            let is_ready = *product & WRITTEN != 0 && (*product & !WRITTEN) < products.begun;
            assert!(
                is_read || is_ready,
                "a product of the warpgroup at {} takes a left side that was written with no wgmma_begin after it",
                company.cluster.name(company.first)
            );
            *product = products.time + 1;
            let (warp, g, t) = (thread / WARP, thread % WARP / 4, thread % 4);
            for (i, word) in words.iter().enumerate() {
                let (row, k) = (16 * warp + g + 8 * (i % 2), 2 * t + 8 * (i / 2));
                a[row][k..k + 2].copy_from_slice(&pair::<T>(*word));
            }
        }
    });
    multiply::<T, B_MAJOR, N, Left>(company, registers, |_| a);
}

fn differ(company: &Company<'_>) -> String {
    format!("threads of the warpgroup at {} name different operands", company.cluster.name(company.first))
}

fn multiply<T: Float16, const B_MAJOR: bool, const N: usize, A>(
    company: &Company<'_>,
    registers: &mut [&mut Registers<N, A>],
    a: impl FnOnce(&mut Vec<u32>) -> Vec<[Factor; 16]>,
) {
    let &Company { cluster, block, first } = company;
    let (b, add) = (registers[0].b, registers[0].add);
    assert!(registers.iter().all(|r| (r.b, r.add) == (b, add)), "{}", differ(company));
    let warpgroup = first % cluster.launch.threads as usize / GROUP;
    let mut products = cluster.blocks[block].products.borrow_mut();
    let products = &mut products[warpgroup];
    for registers in registers.iter() {
        let written = registers.d.product & WRITTEN != 0 || registers.d.product == 0;
        assert!(
            !written || (registers.d.product & !WRITTEN) < products.begun,
            "a product of the warpgroup at {} adds to registers that were written with no wgmma_begin after it",
            cluster.name(first)
        );
    }
    products.time += 1;
    let mut lent = std::mem::take(&mut products.open);
    let a = a(&mut lent);
    let b = read::<T>(company, &b, B_MAJOR == OTHER_MAJOR, 2 * N, &mut lent);
    products.open = lent;
    for (thread, registers) in registers.iter_mut().enumerate() {
        let (warp, g, t) = (thread / WARP, thread % WARP / 4, thread % 4);
        for (i, sum) in registers.d.values.iter_mut().enumerate() {
            let (row, column) = (16 * warp + g + 8 * (i / 2 % 2), 8 * (i / 4) + 2 * t + i % 2);
            let before = if add { *sum } else { 0.0 };
            *sum = Model::HARDWARE.dot(&a[row], &b[column], before);
        }
        registers.d.product = products.time;
    }
}

/// Writes four matrices, whose rows the lanes name.
fn store(company: &Company<'_>, registers: &mut [&mut (u32, [u32; 4])]) {
    let &Company { cluster, block, first } = company;
    let mut shared = cluster.blocks[block].shared.borrow_mut();
    let clocks = cluster.clocks.borrow();
    for lane in 0..WARP {
        let (matrix, row, at) = (lane / 8, lane % 8, registers[lane].0);
        let words: [u32; 4] = core::array::from_fn(|t| registers[4 * row + t].1[matrix]);
        if let Err(why) = shared.store(&clocks, first + lane, at, &bytes(Bytes16(words))) {
            panic!("{} stores a row of a matrix at {at} of shared memory, {why}", cluster.name(first + lane));
        }
    }
}

impl Thread<'_> {
    fn with_products<R>(&self, act: impl FnOnce(&mut Products) -> R) -> R {
        act(&mut self.cluster.blocks[self.block].products.borrow_mut()[self.thread as usize / GROUP])
    }
}

/// The products of the warpgroup that has come.
fn of<R>(company: &Company<'_>, act: impl FnOnce(&mut Products) -> R) -> R {
    let warpgroup = company.first % company.cluster.launch.threads as usize / GROUP;
    act(&mut company.cluster.blocks[company.block].products.borrow_mut()[warpgroup])
}

impl Wgmma for Thread<'_> {
    fn wgmma_begin(&self) {
        self.collective(GROUP, "wgmma_begin", (), |company, _| {
            of(company, |products| {
                products.time += 1;
                products.begun = products.time;
            });
        });
    }

    unsafe fn wgmma<T: Float16, const A_MAJOR: bool, const B_MAJOR: bool, const REGISTERS: usize>(
        &self,
        d: &mut Accumulators<REGISTERS>,
        a: Operand,
        b: Operand,
        add: bool,
    ) {
        assert!([4, 8, 16, 32, 48, 64, 96, 128].contains(&REGISTERS), "no product has {REGISTERS} registers");
        let registers = Registers { d: *d, a, b, add };
        *d = self
            .collective(
                GROUP,
                "a product of a warpgroup",
                registers,
                product::<T, A_MAJOR, B_MAJOR, REGISTERS>,
            )
            .d;
    }

    unsafe fn wgmma_left<T: Float16, const B_MAJOR: bool, const K16: usize, const REGISTERS: usize>(
        &self,
        d: &mut Accumulators<REGISTERS>,
        a: &mut Lefts<K16>,
        k16: usize,
        b: Operand,
        add: bool,
    ) {
        assert!([4, 8, 16, 32, 48, 64, 96, 128].contains(&REGISTERS), "no product has {REGISTERS} registers");
        let left = Left { words: a.words[k16], product: a.product };
        let registers = Registers { d: *d, a: left, b, add };
        let name = "a product of a warpgroup with a left side in registers";
        let after = self.collective(GROUP, name, registers, product_left::<T, B_MAJOR, REGISTERS>);
        (*d, a.product) = (after.d, after.a.product);
    }

    unsafe fn store_matrix4(&self, at: u32, words: [u32; 4]) {
        self.collective(WARP, "a store of four matrices", (at, words), store);
    }

    fn wgmma_commit(&self) {
        self.collective(GROUP, "wgmma_commit", (), |company, _| {
            of(company, |products| {
                let lent = std::mem::take(&mut products.open);
                products.groups.push_back((products.time, lent));
            });
        });
    }

    fn wgmma_wait<const LEFT: u32>(&self) {
        self.collective(GROUP, "wgmma_wait", (), |company, _| {
            of(company, |products| {
                let mut shared = company.cluster.blocks[company.block].shared.borrow_mut();
                while products.groups.len() > LEFT as usize {
                    let Some((last, lent)) = products.groups.pop_front() else { break };
                    products.done = last;
                    lent.into_iter().for_each(|at| shared.give_back(at, 16));
                }
            });
        });
    }

    fn sums<'a, const REGISTERS: usize>(
        &self,
        d: &'a mut Accumulators<REGISTERS>,
    ) -> &'a mut [f32; REGISTERS] {
        let now = self.with_products(|products| {
            let done = d.product & WRITTEN != 0 || d.product <= products.done;
            assert!(done, "{} reads sums of a product that it has not waited for", self.name());
            products.time
        });
        d.product = WRITTEN | now;
        &mut d.values
    }

    fn lefts<'a, const K16: usize>(&self, a: &'a mut Lefts<K16>) -> &'a mut [[u32; 4]; K16] {
        let now = self.with_products(|products| {
            let done = a.product & WRITTEN != 0 || a.product <= products.done;
            assert!(done, "{} touches the left side of a product that it has not waited for", self.name());
            products.time
        });
        a.product = WRITTEN | now;
        &mut a.words
    }
}
