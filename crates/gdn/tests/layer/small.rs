//! Both ops on little, with scalar code and one thread: decode on so little that an interpreter of Rust goes
//! through it too, and `cargo xtask test` has Miri do so.

use gdn::{Cpu, Dtype, Packing, cpu::Isa};

use crate::{
    batch::{Batch, Form},
    setup::Options,
};

/// Every dtype in both orders of its states; in Miri, which takes minutes, each in one of them.
fn forms() -> impl Iterator<Item = (Options, Form)> {
    all_forms().enumerate().filter(|(i, _)| !cfg!(miri) || i % 4 == 0 || i % 4 == 3).map(|(_, form)| form)
}

fn all_forms() -> impl Iterator<Item = (Options, Form)> {
    let dtypes = [(Dtype::F32, Dtype::F32), (Dtype::BF16, Dtype::BF16), (Dtype::F16, Dtype::F16)];
    dtypes.into_iter().zip(Packing::ALL.into_iter().cycle()).flat_map(|((dtype, state_dtype), packing)| {
        [([2, 3], [1, 2]), ([3, 2], [2, 1])].into_iter().enumerate().map(
            move |(i, (state_order, conv_order))| {
                let options = Options {
                    packing,
                    dtype,
                    packed: i == 0,
                    conv_bias: i == 1,
                    gap: 1,
                    ..Options::new([1, 2, 5, 6])
                };
                let form = Form {
                    state_dtype,
                    conv_dtype: dtype,
                    state_order,
                    conv_order,
                    more_columns: i,
                    gap: 1,
                    ..Form::default()
                };
                (options, form)
            },
        )
    })
}

fn scalar() -> Cpu<'static> {
    Cpu::new().isa(Isa::Scalar).unwrap().threads(1)
}

#[test]
fn decode_of_a_few_tokens() {
    for (options, form) in forms() {
        let most = if form.state_dtype == Dtype::F32 { 2 } else { 1 };
        for tokens in 1..=most {
            let before = Batch::new(&options, form, &[tokens; 2]);
            let mut after = before.clone();
            after.decode(&scalar());
            after.check(&before, &format!("{options:?}, {form:?}"));
        }
    }
}

#[test]
fn prefill_of_a_few_tokens() {
    for (options, form) in forms() {
        let before = Batch::new(&options, form, &[0, 2, 17]);
        let mut after = before.clone();
        after.prefill(&scalar());
        after.check(&before, &format!("{options:?}, {form:?}"));
    }
}
