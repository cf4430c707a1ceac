//! What the caches of this machine are like.

use std::sync::OnceLock;

/// One level of cache, as the first core sees it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Cache {
    /// 1, 2, 3.
    pub level: usize,
    /// `Data`, `Instruction` or `Unified`.
    pub kind: String,
    /// Size in bytes.
    pub bytes: usize,
}

/// The caches, from Linux's `/sys`; empty on other systems. Read once.
pub fn caches() -> &'static [Cache] {
    static CACHES: OnceLock<Vec<Cache>> = OnceLock::new();
    CACHES.get_or_init(|| {
        let mut caches: Vec<Cache> = (0..16)
            .map_while(|i| {
                let read = |name: &str| {
                    std::fs::read_to_string(format!("/sys/devices/system/cpu/cpu0/cache/index{i}/{name}"))
                        .ok()
                };
                Some(Cache {
                    level: read("level")?.trim().parse().ok()?,
                    kind: read("type")?.trim().to_owned(),
                    bytes: bytes(read("size")?.trim())?,
                })
            })
            .collect();
        caches.sort_by_key(|cache| cache.level);
        caches
    })
}

/// The size of the last-level cache, where the system tells.
pub fn last_level_bytes() -> Option<usize> {
    caches().iter().filter(|cache| cache.kind != "Instruction").map(|cache| cache.bytes).next_back()
}

/// Whether memory is read fastest strictly in the order of its addresses. AMD's Zen 4 fetches ahead of such
/// reads by itself, as fast as its memory is, and hardly of any others: with 256 bytes of each 1536 read at a
/// time a copy takes 1.3 to 1.5 times as long, and 2.3 times without prefetches. Intel's Xeons read several
/// rows side by side faster. No instruction tells which of them a processor is like, so its maker has to.
pub(super) fn reads_best_in_order() -> bool {
    #[cfg(target_arch = "x86_64")]
    {
        static MAKER: OnceLock<[u32; 3]> = OnceLock::new();
        // Asking costs a virtual machine thousands of cycles.
        let maker = MAKER.get_or_init(|| {
            #[allow(unused_unsafe, reason = "safe in later versions of Rust")]
            // SAFETY: every x86-64 processor has the instruction.
            let leaf = unsafe { std::arch::x86_64::__cpuid(0) };
            [leaf.ebx, leaf.edx, leaf.ecx]
        });
        maker.map(u32::to_le_bytes).concat() == *b"AuthenticAMD"
    }
    #[cfg(not(target_arch = "x86_64"))]
    false
}

/// As in `480K` or `32M`.
fn bytes(size: &str) -> Option<usize> {
    let digits = size.trim_end_matches(|c: char| c.is_ascii_alphabetic());
    let unit = match &size[digits.len()..] {
        "" => 1,
        "K" => 1 << 10,
        "M" => 1 << 20,
        "G" => 1 << 30,
        _ => return None,
    };
    digits.parse::<usize>().ok()?.checked_mul(unit)
}

#[cfg(test)]
mod tests {
    #[test]
    fn sizes() {
        let sizes = ["64", "48K", "491520K", "1G", "x", "", "3T"].map(super::bytes);
        assert_eq!(sizes, [Some(64), Some(48 << 10), Some(480 << 20), Some(1 << 30), None, None, None]);
    }
}
