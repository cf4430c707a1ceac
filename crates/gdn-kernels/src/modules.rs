//! THE table of kernels: which there are, what they are compiled for, and what must hold of each. `cargo
//! xtask ptx` builds and checks from it, the library loads from it.
//!
//! `text!` and `code!` are defined by who includes this file: the library embeds the PTX and the machine's code,
//! `xtask` makes them.

/// What PTX is compiled for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Target {
    /// Compute capability 8.0 and everything later.
    Sm80,
    /// 9.0 and everything later: programmatic dependent launch, bulk copies, clusters.
    Sm90,
    /// 9.0 alone: `wgmma`.
    Sm90a,
}

impl Target {
    /// As compilers call it.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Sm80 => "sm_80",
            Self::Sm90 => "sm_90",
            Self::Sm90a => "sm_90a",
        }
    }

    /// Whether a device of this compute capability takes it.
    pub const fn runs_on(self, (major, minor): (i32, i32)) -> bool {
        match self {
            Self::Sm80 => major >= 8,
            Self::Sm90 => major >= 9,
            Self::Sm90a => major == 9 && minor == 0,
        }
    }
}

/// A kernel, and what `cargo xtask ptx` holds it to: no call, no spill, and the rest as it says.
#[derive(Clone, Copy, Debug)]
pub struct Kernel {
    /// As the driver finds it.
    pub name: &'static str,
    /// The most threads of a block, by which the compiler gives out registers; 0: it is not told.
    pub threads: u32,
    /// Blocks that a multiprocessor must have room for; 0: it is not told.
    pub blocks: u32,
    /// Whether every launch names clusters, which the compiler is told: what it does without them is left out then.
    pub in_clusters: bool,
    /// The most bytes of dynamic shared memory a launch asks for.
    pub shared: u32,
    /// Bytes of stack it may have.
    pub stack: u32,
    /// At least so many loads and stores of 16 bytes.
    pub wide: [u32; 2],
    /// At least so many `mma.sync` in the machine's code (HMMA).
    pub hmma: u32,
    /// At least so many `wgmma` in the machine's code (HGMMA).
    pub hgmma: u32,
    /// Exactly so many of each, in the PTX and in the machine's code.
    pub collectives: Option<Collectives>,
}

/// Instructions that all lanes execute together.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Collectives {
    /// Barriers.
    pub barriers: u32,
    /// Shuffles.
    pub shuffles: u32,
    /// Matrices loaded (`ldmatrix`).
    pub matrices: u32,
    /// Products by a warp (`mma.sync`).
    pub products: u32,
}

impl Collectives {
    /// Of none of them any.
    pub const NONE: Self = Self { barriers: 0, shuffles: 0, matrices: 0, products: 0 };
}

impl Kernel {
    /// One that is held to nothing more.
    pub const fn new(name: &'static str) -> Self {
        Self {
            name,
            threads: 0,
            blocks: 0,
            in_clusters: false,
            shared: 0,
            stack: 0,
            wide: [0; 2],
            hmma: 0,
            hgmma: 0,
            collectives: None,
        }
    }

    const fn threads(self, threads: u32) -> Self {
        Self { threads, ..self }
    }

    const fn hmma(self, hmma: u32) -> Self {
        Self { hmma, ..self }
    }

    const fn hgmma(self, hgmma: u32) -> Self {
        Self { hgmma, ..self }
    }

    const fn wide(self, loads: u32, stores: u32) -> Self {
        Self { wide: [loads, stores], ..self }
    }

    const fn collectives(self, collectives: Collectives) -> Self {
        Self { collectives: Some(collectives), ..self }
    }
}

/// Machine code: it runs on devices of one compute capability.
#[derive(Clone, Copy, Debug)]
pub struct Code {
    /// As ptxas calls the device.
    pub gpu: &'static str,
    /// Its compute capability.
    pub capability: (i32, i32),
    /// An ELF file.
    pub bytes: &'static [u8],
}

/// Of compute capability 9.0, as ptxas calls it, in a file. On others the driver compiles the PTX, once: it
/// keeps what it made.
macro_rules! of_hopper {
    ($gpu:literal, $file:literal) => {
        &[Code { gpu: $gpu, capability: (9, 0), bytes: code!($file) }]
    };
}

/// The kernels of an op for a target: one file of PTX.
#[derive(Clone, Copy, Debug)]
pub struct Module {
    /// The op.
    pub op: &'static str,
    /// What it is compiled for.
    pub target: Target,
    /// The PTX.
    pub ptx: &'static str,
    /// What ptxas made of it for some devices, which need not compile it then.
    pub code: &'static [Code],
    /// The kernels, in families: the driver compiles a family when one of it is first called.
    pub families: &'static [&'static [Kernel]],
}

impl Module {
    /// All its kernels.
    pub fn kernels(&self) -> impl Iterator<Item = &'static Kernel> {
        self.families.iter().copied().flatten()
    }
}

/// Those of the library. Of the modules of an op the first that runs on a device is the one for it.
pub static MODULES: &[Module] = &[
    Module {
        op: "split",
        target: Target::Sm90,
        ptx: text!("split.sm_90.ptx"),
        code: of_hopper!("sm_90", "split.sm_90.sm_90.cubin"),
        families: SPLIT,
    },
    Module { op: "split", target: Target::Sm80, ptx: text!("split.sm_80.ptx"), code: &[], families: SPLIT },
    Module {
        op: "decode",
        target: Target::Sm90,
        ptx: text!("decode.sm_90.ptx"),
        code: of_hopper!("sm_90", "decode.sm_90.sm_90.cubin"),
        families: DECODE_90,
    },
    Module {
        op: "decode",
        target: Target::Sm80,
        ptx: text!("decode.sm_80.ptx"),
        code: &[],
        families: DECODE_80,
    },
    // Beside the other kernels, on devices that have clusters.
    Module {
        op: "decode_few",
        target: Target::Sm90,
        ptx: text!("decode_few.sm_90.ptx"),
        code: of_hopper!("sm_90", "decode_few.sm_90.sm_90.cubin"),
        families: DECODE_FEW,
    },
    Module {
        op: "prefill",
        target: Target::Sm90,
        ptx: text!("prefill.sm_90.ptx"),
        code: of_hopper!("sm_90", "prefill.sm_90.sm_90.cubin"),
        families: PREFILL,
    },
    Module {
        op: "prefill",
        target: Target::Sm80,
        ptx: text!("prefill.sm_80.ptx"),
        code: &[],
        families: PREFILL,
    },
    // Beside the other kernels, on devices that have it.
    Module {
        op: "prefill_wgmma",
        target: Target::Sm90a,
        ptx: text!("prefill_wgmma.sm_90a.ptx"),
        code: of_hopper!("sm_90a", "prefill_wgmma.sm_90a.sm_90a.cubin"),
        families: PREFILL_WGMMA,
    },
];

/// Those that only tests load.
pub static PROBES: &[Module] = &[
    Module {
        op: "convergence",
        target: Target::Sm80,
        ptx: text!("convergence.sm_80.ptx"),
        code: &[],
        families: CONVERGENCE,
    },
    Module { op: "probe", target: Target::Sm80, ptx: text!("probe.sm_80.ptx"), code: &[], families: PROBE },
    Module {
        op: "probe_hopper",
        target: Target::Sm90,
        ptx: text!("probe_hopper.sm_90.ptx"),
        code: &[],
        families: PROBE_HOPPER,
    },
    Module {
        op: "probe_wgmma",
        target: Target::Sm90a,
        ptx: text!("probe_wgmma.sm_90a.ptx"),
        code: &[],
        families: PROBE_WGMMA,
    },
];

const SPLIT: &[&[Kernel]] = &[
    &[Kernel::new("gdn_split_16x1").wide(1, 1), Kernel::new("gdn_split_16x2").wide(2, 2)],
    &[Kernel::new("gdn_split_narrow")],
    &[Kernel::new("gdn_merge_16x1").wide(1, 1), Kernel::new("gdn_merge_16x2").wide(2, 2)],
    &[Kernel::new("gdn_merge_narrow")],
];

/// Shared memory that a block of the decode asks for, at most: that of a Hopper's multiprocessor, or what
/// there is.
pub const DECODE_SHARED: u32 = 227 << 10;

/// Warps of a block of the decode, at most, on this target: with more, registers do not suffice. For plain
/// calls there are kernels that make do with fewer, for rows of 96 and 128 columns. The narrow kernels have
/// 8, and so do those for 256 columns.
pub const fn decode_warps(target: Target, is_plain: bool, columns: u32) -> u32 {
    match target {
        Target::Sm90 if is_plain && (columns == 96 || columns == 128) => 16,
        _ if columns == 256 => 8,
        _ => 12,
    }
}

/// The same for the kernel that takes several tokens with larger pieces.
pub const fn decode_large_warps(target: Target) -> u32 {
    match target {
        Target::Sm90 => 12,
        _ => 8,
    }
}

const fn decode(name: &'static str, warps: u32) -> Kernel {
    Kernel { threads: warps * 32, blocks: 1, shared: DECODE_SHARED, ..Kernel::new(name) }
}

const fn decode_wide(target: Target, name: &'static str, columns: u32) -> Kernel {
    decode(name, decode_warps(target, false, columns))
}

const fn decode_plain(target: Target, name: &'static str, columns: u32) -> Kernel {
    decode(name, decode_warps(target, true, columns))
}

/// Kernels of the decode.
const DECODES: usize = 29;

const fn decodes(target: Target) -> [[Kernel; 1]; DECODES] {
    [
        [decode_wide(target, "gdn_decode_f32_64", 64).wide(0, 4)],
        [decode_wide(target, "gdn_decode_f32_128", 128).wide(0, 8)],
        [decode_wide(target, "gdn_decode_f32_256", 256).wide(0, 8)],
        [decode("gdn_decode_f32_narrow", 8)],
        [decode_plain(target, "gdn_decode_f32_64_plain", 64).wide(0, 4)],
        [decode_plain(target, "gdn_decode_f32_96_plain", 96).wide(0, 6)],
        [decode_plain(target, "gdn_decode_f32_128_plain", 128).wide(0, 8)],
        [decode_plain(target, "gdn_decode_f32_256_plain", 256).wide(0, 8)],
        [decode_wide(target, "gdn_decode_f16_64", 64).wide(0, 2)],
        [decode_wide(target, "gdn_decode_f16_128", 128).wide(0, 4)],
        [decode_wide(target, "gdn_decode_f16_256", 256).wide(0, 4)],
        [decode("gdn_decode_f16_narrow", 8)],
        [decode_wide(target, "gdn_decode_bf16_64", 64).wide(0, 2)],
        [decode_wide(target, "gdn_decode_bf16_128", 128).wide(0, 4)],
        [decode_wide(target, "gdn_decode_bf16_256", 256).wide(0, 4)],
        [decode("gdn_decode_bf16_narrow", 8)],
        [decode_plain(target, "gdn_decode_bf16_64_plain", 64).wide(0, 2)],
        [decode_plain(target, "gdn_decode_bf16_96_plain", 96).wide(0, 3)],
        [decode_plain(target, "gdn_decode_bf16_128_plain", 128).wide(0, 4)],
        [decode_plain(target, "gdn_decode_bf16_256_plain", 256).wide(0, 4)],
        [decode_plain(target, "gdn_decode_f32_64_tokens", 64).wide(0, 4)],
        [decode_plain(target, "gdn_decode_f32_96_tokens", 96).wide(0, 6)],
        [decode_plain(target, "gdn_decode_f32_128_tokens", 128).wide(0, 8)],
        [decode_plain(target, "gdn_decode_f32_256_tokens", 256).wide(0, 8)],
        [decode_plain(target, "gdn_decode_bf16_64_tokens", 64).wide(0, 2)],
        [decode_plain(target, "gdn_decode_bf16_96_tokens", 96).wide(0, 3)],
        [decode_plain(target, "gdn_decode_bf16_128_tokens", 128).wide(0, 4)],
        [decode_plain(target, "gdn_decode_bf16_256_tokens", 256).wide(0, 4)],
        [decode("gdn_decode_bf16_128_tokens_large", decode_large_warps(target)).wide(0, 8)],
    ]
}

const DECODES_90: [[Kernel; 1]; DECODES] = decodes(Target::Sm90);
const DECODES_80: [[Kernel; 1]; DECODES] = decodes(Target::Sm80);

/// A family each.
const fn families(kernels: &'static [[Kernel; 1]; DECODES]) -> [&'static [Kernel]; DECODES] {
    let mut families: [&'static [Kernel]; DECODES] = [&[]; DECODES];
    let mut i = 0;
    while i < DECODES {
        families[i] = &kernels[i];
        i += 1;
    }
    families
}

const DECODE_90: &[&[Kernel]] = &families(&DECODES_90);
const DECODE_80: &[&[Kernel]] = &families(&DECODES_80);

/// Of `decode::few::WARPS` warps. Two blocks fit on a multiprocessor: those of the next call begin beside those of this one.
const fn decode_few(name: &'static str) -> Kernel {
    Kernel { blocks: 2, in_clusters: true, ..decode(name, 6) }
}

const DECODE_FEW: &[&[Kernel]] = &[
    &[decode_few("gdn_decode_f32_few_32").wide(0, 8)],
    &[decode_few("gdn_decode_f32_few_64").wide(0, 16)],
    &[decode_few("gdn_decode_f32_few_128").wide(0, 32)],
    &[decode_few("gdn_decode_bf16_few_32").wide(0, 4)],
    &[decode_few("gdn_decode_bf16_few_64").wide(0, 8)],
    &[decode_few("gdn_decode_bf16_few_128").wide(0, 16)],
];

/// With as much shared memory as there is.
const fn prefill(name: &'static str, threads: u32) -> Kernel {
    Kernel { threads, shared: 227 << 10, ..Kernel::new(name) }
}

/// One block a multiprocessor: a warp needs all the registers that there are.
const fn scan(name: &'static str) -> Kernel {
    Kernel { blocks: 1, ..prefill(name, 256) }
}

const PREFILL: &[&[Kernel]] = &[
    &[
        Kernel { blocks: 4, ..Kernel::new("gdn_prefill_convolve_128").threads(128) },
        Kernel { blocks: 4, ..prefill("gdn_prefill_prepare", 192).hmma(8) },
        Kernel { blocks: 4, ..prefill("gdn_prefill_norm", 256) },
    ],
    &[Kernel { blocks: 16, shared: 4 << 10, ..Kernel::new("gdn_prefill_convolve_128_ahead").threads(32) }],
    &[Kernel { blocks: 4, ..Kernel::new("gdn_prefill_convolve_256").threads(128) }],
    &[Kernel { blocks: 6, ..Kernel::new("gdn_prefill_convolve_any").threads(64) }],
    &[scan("gdn_prefill_scan_64").hmma(136)],
    &[scan("gdn_prefill_scan_96").hmma(184)],
    &[scan("gdn_prefill_scan_128").hmma(232)],
    &[scan("gdn_prefill_scan_192").hmma(272)],
    &[scan("gdn_prefill_scan_256").hmma(336)],
    &[scan("gdn_prefill_transition_64").hmma(84)],
    &[scan("gdn_prefill_transition_96").hmma(116)],
    &[scan("gdn_prefill_transition_128").hmma(148)],
    &[Kernel { blocks: 1, ..Kernel::new("gdn_prefill_combine").threads(256).hmma(48) }],
];

/// One block a multiprocessor, which has no shared memory, or registers, for another one.
const fn scan_by_group(name: &'static str) -> Kernel {
    Kernel { blocks: 1, ..prefill(name, 256) }
}

const PREFILL_WGMMA: &[&[Kernel]] = &[
    &[scan_by_group("gdn_prefill_scan_group_64").hgmma(20)],
    &[scan_by_group("gdn_prefill_scan_group_96").hgmma(28)],
    &[scan_by_group("gdn_prefill_scan_group_128").hgmma(32)],
    &[scan_by_group("gdn_prefill_transition_group_64").hgmma(12)],
    &[scan_by_group("gdn_prefill_transition_group_96").hgmma(18)],
    &[scan_by_group("gdn_prefill_transition_group_128").hgmma(20)],
];

const CONVERGENCE: &[&[Kernel]] = &[&[
    Kernel::new("gdn_convergence_barrier_and_shuffle").collectives(Collectives {
        barriers: 1,
        shuffles: 1,
        ..Collectives::NONE
    }),
    Kernel::new("gdn_convergence_product").collectives(Collectives { products: 1, ..Collectives::NONE }),
    Kernel::new("gdn_convergence_matrices").collectives(Collectives {
        barriers: 1,
        matrices: 1,
        ..Collectives::NONE
    }),
]];

const PROBE: &[&[Kernel]] = &[&[
    Kernel::new("gdn_probe_block_sums"),
    Kernel::new("gdn_probe_block_sums_static"),
    Kernel::new("gdn_probe_lanes").collectives(Collectives { shuffles: 8, ..Collectives::NONE }),
    Kernel::new("gdn_probe_pairs_of_warps"),
    Kernel::new("gdn_probe_math").collectives(Collectives::NONE),
    Kernel::new("gdn_probe_logistics").collectives(Collectives::NONE),
    Kernel::new("gdn_probe_product_bf16").collectives(Collectives { products: 1, ..Collectives::NONE }),
    Kernel::new("gdn_probe_product_f16").collectives(Collectives { products: 1, ..Collectives::NONE }),
    Kernel::new("gdn_probe_matrices_bf16").hmma(2),
    Kernel::new("gdn_probe_matrices_f16").hmma(2),
    Kernel::new("gdn_probe_pipeline"),
]];

const PROBE_HOPPER: &[&[Kernel]] = &[&[Kernel::new("gdn_probe_bulk"), Kernel::new("gdn_probe_cluster")]];

const PROBE_WGMMA: &[&[Kernel]] = &[&[
    Kernel::new("gdn_probe_wgmma_bf16_n32").threads(128).hgmma(4),
    Kernel::new("gdn_probe_wgmma_f16_n64").threads(128).hgmma(4),
    Kernel::new("gdn_probe_wgmma_bf16_n128").threads(128).hgmma(4),
    Kernel::new("gdn_probe_wgmma_f16_n128").threads(128).hgmma(4),
    Kernel::new("gdn_probe_wgmma_bf16_n192").threads(128).hgmma(4),
    Kernel::new("gdn_probe_wgmma_f16_n256").threads(128).hgmma(4),
    Kernel::new("gdn_probe_wgmma_left_f16_n64").threads(128).hgmma(4),
    Kernel::new("gdn_probe_wgmma_left_bf16_n128").threads(128).hgmma(4),
]];
