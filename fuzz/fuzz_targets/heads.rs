//! Any text as a config.json, a model name, a packing: an error or a layout whose numbers add up, never a
//! panic.

#![no_main]

use gdn::{Heads, Layout, Packing};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|text: &str| {
    let _ = text.parse::<Packing>();
    let _ = Layout::from_config(text);
    for heads in [Heads::preset(text), Heads::from_config(text)].into_iter().flatten() {
        assert_eq!(heads.qkvz_features(), heads.qkv_features() + heads.z_features());
        for packing in Packing::ALL {
            let layout = Layout::new(heads, packing);
            assert_eq!(layout.qkvz_map().features(), heads.qkvz_features());
            let last = layout.ba_map().runs().last().map(|run| run.unpacked + run.len * layout.ba_map().count());
            assert_eq!(last, Some(heads.ba_features()));
        }
        if let Ok(shard) = heads.shard(2) {
            assert_eq!(shard.ratio(), heads.ratio());
        }
    }
});
