//! What `gdn bench` does not show: the cost of a call by itself (N = 0), and every instruction set side by
//! side. `cargo bench` compares with its last run, for work on the kernels.

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use gdn::{Cpu, Layout, PackedBuf, Packing, UnpackedBuf, cpu::Isa};

fn split(criterion: &mut Criterion) {
    let Ok(preset) = Layout::preset("Qwen3-Next-80B-A3B") else { return };
    for packing in Packing::ALL {
        let layout = Layout::new(preset.heads, packing);
        let mut group = criterion.benchmark_group(format!("split/{packing}"));
        for num_rows in [0, 1, 8] {
            let (Ok(packed), Ok(mut unpacked)) = (
                PackedBuf::new(&layout.heads, num_rows, 2, 2),
                UnpackedBuf::new(&layout.heads, num_rows, 2, 2),
            ) else {
                return;
            };
            group.throughput(Throughput::Bytes(packed.bytes().len() as u64));
            for isa in Isa::available() {
                let Ok(cpu) = Cpu::new().isa(isa) else { continue };
                group.bench_function(BenchmarkId::new(isa.name(), num_rows), |bencher| {
                    bencher.iter(|| gdn::split(&layout, packed.as_ref(), unpacked.as_mut(), &cpu));
                });
            }
        }
        group.finish();
    }
}

criterion_group!(benches, split);
criterion_main!(benches);
