//! `gdn info`: this machine, and a picture of the row layouts.

use std::fmt::Write as _;

use gdn::{
    Cpu, Layout, PRESETS, Packing,
    cpu::{Isa, caches},
};

use crate::{
    device,
    layout::{LayoutArgs, start_threads},
    terminal::print,
};

#[derive(clap::Args)]
pub(crate) struct Args {
    #[command(flatten)]
    layout: LayoutArgs,
}

pub(crate) fn run(args: &Args) -> anyhow::Result<()> {
    start_threads(usize::MAX)?;
    let mut text = machine() + &device::list();
    match args.layout.named()? {
        (Some(heads), Some(packing)) => text.push_str(&picture(&Layout::new(heads, packing))),
        (Some(heads), None) => {
            Packing::ALL.iter().for_each(|packing| text.push_str(&picture(&Layout::new(heads, *packing))));
        }
        (None, _) => text.push_str(&presets()),
    }
    print(&text)
}

fn machine() -> String {
    let mut text = format!("gdn {}\n\nCPU\n", env!("CARGO_PKG_VERSION"));
    let isas: Vec<&str> = Isa::available().map(Isa::name).collect();
    let cores = std::thread::available_parallelism().map_or_else(|_| "unknown".to_owned(), |n| n.to_string());
    let cpu = Cpu::new();
    let _ = writeln!(text, "  instruction sets  {} (chosen: {})", isas.join(", "), cpu.chosen_isa());
    let _ = writeln!(text, "  cores             {cores}");
    for cache in caches() {
        let name = format!("L{} {}", cache.level, cache.kind.to_lowercase());
        let _ = writeln!(text, "  {name:<17} {}", bytes(cache.bytes));
    }
    let threads = cpu.chosen_threads(usize::MAX);
    let _ = writeln!(text, "  threads           {threads} for large work, 1 for small");
    // The smallest power of two that is streamed.
    let streamed =
        (0..usize::BITS - 1).map(|bit| 1usize << bit).find(|bytes| cpu.chosen_streaming(bytes + 1));
    if let Some(streamed) = streamed {
        let _ = writeln!(
            text,
            "  stores            past the caches for outputs of more than about {}",
            bytes(streamed)
        );
    }
    text
}

fn bytes(n: usize) -> String {
    match n {
        n if n >= 1 << 20 => format!("{} MiB", n >> 20),
        n => format!("{} KiB", n >> 10),
    }
}

fn presets() -> String {
    let mut text = "\nModels known by name (--preset)\n".to_owned();
    for &(name, [hk, hv, dk, dv], packing) in PRESETS {
        let _ =
            writeln!(text, "  {name:<20} {hk:>3} key heads of {dk}, {hv:>3} value heads of {dv}, {packing}");
    }
    text.push_str("\nName heads by --preset, --config or --num-k-heads … to see their row layouts.\n");
    text
}

/// The rows of the six tensors as boxes.
fn picture(layout: &Layout) -> String {
    let Layout { heads, packing } = layout;
    let (hk, hv) = (heads.num_k_heads(), heads.num_v_heads());
    let (dk, dv, r) = (heads.head_k_dim(), heads.head_v_dim(), heads.ratio());
    let mut text = format!(
        "\n{heads}, {packing}: {hk} key heads of {dk}, {hv} value heads of {dv}, R = {r}\n\nbefore, one row\n"
    );
    let of = |name: &str, n: usize| format!("{name} {n}");
    let (qkvz, ba, times) = match packing {
        Packing::Interleaved => (
            vec![of("q", dk), of("k", dk), of("v", r * dv), of("z", r * dv)],
            vec![of("b", r), of("a", r)],
            format!("  x {hk} key heads"),
        ),
        Packing::Contiguous => (
            vec![of("Q", hk * dk), of("K", hk * dk), of("V", hv * dv), of("Z", hv * dv)],
            vec![of("B", hv), of("A", hv)],
            String::new(),
        ),
    };
    boxes(&mut text, "mixed_qkvz", heads.qkvz_features(), &qkvz, &times);
    boxes(&mut text, "mixed_ba", heads.ba_features(), &ba, &times);
    text.push_str("\nafter, one row\n");
    let qkv = [of("Q", hk * dk), of("K", hk * dk), of("V", hv * dv)];
    boxes(&mut text, "mixed_qkv", heads.qkv_features(), &qkv, "");
    boxes(&mut text, "z", heads.z_features(), &[format!("{hv} x {dv}")], "");
    boxes(&mut text, "b", hv, &[of("B", hv)], "");
    boxes(&mut text, "a", hv, &[of("A", hv)], "");
    let segments: usize =
        [layout.qkvz_map(), layout.ba_map()].iter().map(|map| map.runs().len() * map.count()).sum();
    let _ = writeln!(text, "\n{segments} segments a row");
    text
}

fn boxes(text: &mut String, name: &str, features: usize, cells: &[String], behind: &str) {
    let row: String = cells.iter().map(|cell| format!(" {cell} |")).collect();
    let line: String = cells.iter().map(|cell| "-".repeat(cell.len() + 2) + "+").collect();
    let _ = writeln!(text, "  {:<11} {:>7}  +{line}", "", "");
    let _ = writeln!(text, "  {name:<11} {features:>7}  |{row}{behind}");
    let _ = writeln!(text, "  {:<11} {:>7}  +{line}", "", "");
}
