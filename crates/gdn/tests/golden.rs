//! Held to Hugging Face transformers: what its own Qwen3-Next and Qwen3.5 layers made of real hidden states
//! (see testdata/README.md), bit for bit, both ways, with every instruction set.

use std::{fs, path::Path};

use gdn::{Cpu, Heads, Layout, Packed, PackedBuf, Rows, Unpacked, cpu::Isa};
use safetensors::SafeTensors;

/// A tensor as rows whose last `last` dims are one row.
fn rows<'a>(file: &SafeTensors<'a>, name: &str, last: usize) -> Rows<'a> {
    let tensor = file.tensor(name).unwrap();
    let shape = tensor.shape();
    let (leading, row) = shape.split_at(shape.len() - last);
    let (num_rows, features) = (leading.iter().product(), row.iter().product());
    Rows::from_bytes(tensor.data(), tensor.dtype().bitsize() / 8, num_rows, features).unwrap()
}

fn layout(bytes: &[u8]) -> Layout {
    let (_, header) = SafeTensors::read_metadata(bytes).unwrap();
    let metadata = header.metadata().clone().unwrap();
    let number = |key: &str| metadata[key].parse().unwrap();
    let heads =
        Heads::new(number("num_k_heads"), number("num_v_heads"), number("head_k_dim"), number("head_v_dim"));
    Layout::new(heads.unwrap(), metadata["packing"].parse().unwrap())
}

#[test]
fn transformers_own_outputs() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../testdata");
    let mut ratios = Vec::new();
    for entry in fs::read_dir(&folder).unwrap() {
        let path = entry.unwrap().path();
        let name = path.file_name().unwrap().to_str().unwrap();
        let Some(stem) = name.strip_suffix(".expected.safetensors") else { continue };
        let (input, expected) =
            (fs::read(folder.join(format!("{stem}.safetensors"))).unwrap(), fs::read(&path).unwrap());
        let layout = layout(&input);
        ratios.push(layout.heads.ratio());
        let (input, expected) =
            (SafeTensors::deserialize(&input).unwrap(), SafeTensors::deserialize(&expected).unwrap());
        let packed =
            Packed { mixed_qkvz: rows(&input, "mixed_qkvz", 1), mixed_ba: rows(&input, "mixed_ba", 1) };
        let unpacked = Unpacked {
            mixed_qkv: rows(&expected, "mixed_qkv", 1),
            z: rows(&expected, "z", 2),
            b: rows(&expected, "b", 1),
            a: rows(&expected, "a", 1),
        };
        for isa in Isa::available() {
            let cpu = Cpu::new().isa(isa).unwrap();
            let parts = gdn::split_fresh(&layout, packed, &cpu).unwrap();
            for (name, bytes) in
                [("mixed_qkv", parts.mixed_qkv()), ("z", parts.z()), ("b", parts.b()), ("a", parts.a())]
            {
                assert!(bytes == expected.tensor(name).unwrap().data(), "{stem}: {name} differs, {isa}");
            }
            let merged: PackedBuf = gdn::merge_fresh(&layout, unpacked, &cpu).unwrap();
            assert!(
                merged.mixed_qkvz() == input.tensor("mixed_qkvz").unwrap().data(),
                "{stem}: mixed_qkvz, {isa}"
            );
            assert!(merged.mixed_ba() == input.tensor("mixed_ba").unwrap().data(), "{stem}: mixed_ba, {isa}");
        }
    }
    ratios.sort_unstable();
    ratios.dedup();
    assert_eq!(ratios, [1, 2, 3, 4], "testdata has a case of each ratio");
}

#[test]
fn transformers_own_configs() {
    let read = |name: &str| {
        fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("../../testdata").join(name)).unwrap()
    };
    assert_eq!(Layout::from_config(&read("config.json")), Layout::preset("Qwen3-Next-80B-A3B"));
    assert_eq!(Layout::from_config(&read("config-text.json")), Layout::preset("Qwen3.6-27B"));
}
