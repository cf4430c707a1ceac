//! Names of the tensors of an input projection, whole and in two parts.

use gdn::Projection;

/// The names of projections.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub(super) enum Names {
    /// As Qwen3-Next has them.
    Fused,
    /// As Qwen3.5 has them.
    Separate,
}

impl Names {
    pub(super) const ALL: [Self; 2] = [Self::Fused, Self::Separate];

    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Fused => "fused",
            Self::Separate => "separate",
        }
    }
}

/// A tensor's name that belongs to an input projection: `model.layers.0.linear_attn.in_proj_qkvz.weight`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct ModuleName<'a> {
    /// Up to and with `linear_attn.`.
    pub(super) prefix: &'a str,
    pub(super) projection: Projection,
    /// The whole, or its first or second part.
    pub(super) part: Option<usize>,
    /// After the module's name and a dot.
    pub(super) suffix: &'a str,
}

pub(super) fn fused_name(projection: Projection) -> &'static str {
    match projection {
        Projection::Qkvz => "in_proj_qkvz",
        Projection::Ba => "in_proj_ba",
    }
}

pub(super) fn part_names(projection: Projection) -> [&'static str; 2] {
    match projection {
        Projection::Qkvz => ["in_proj_qkv", "in_proj_z"],
        Projection::Ba => ["in_proj_b", "in_proj_a"],
    }
}

impl<'a> ModuleName<'a> {
    pub(super) fn parse(name: &'a str) -> Option<Self> {
        const LAYER: &str = "linear_attn.";
        let start =
            name.match_indices(LAYER).map(|(at, _)| at).find(|at| *at == 0 || name[..*at].ends_with('.'))?;
        let (prefix, rest) = name.split_at(start + LAYER.len());
        let (module, suffix) = rest.split_once('.')?;
        Projection::ALL.into_iter().find_map(|projection| {
            let part = if module == fused_name(projection) {
                None
            } else {
                Some(part_names(projection).iter().position(|part| *part == module)?)
            };
            Some(Self { prefix, projection, part, suffix })
        })
    }

    /// The module's own name.
    pub(super) fn module(&self) -> String {
        let name = self.of(self.part);
        name[..name.len() - 1 - self.suffix.len()].to_owned()
    }

    /// The name of the same tensor of the whole projection (`None`) or of a part.
    pub(super) fn of(&self, part: Option<usize>) -> String {
        let module = match part {
            None => fused_name(self.projection),
            Some(part) => part_names(self.projection)[part],
        };
        format!("{}{module}.{}", self.prefix, self.suffix)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_projections() {
        let qkvz =
            |prefix, suffix| Some(ModuleName { prefix, projection: Projection::Qkvz, part: None, suffix });
        assert_eq!(
            ModuleName::parse("model.layers.0.linear_attn.in_proj_qkvz.weight"),
            qkvz("model.layers.0.linear_attn.", "weight")
        );
        assert_eq!(
            ModuleName::parse("mtp.layers.0.linear_attn.in_proj_qkvz.weight_scale_inv"),
            qkvz("mtp.layers.0.linear_attn.", "weight_scale_inv")
        );
        assert_eq!(
            ModuleName::parse("base_model.model.x.linear_attn.in_proj_qkvz.lora_B.default.weight"),
            qkvz("base_model.model.x.linear_attn.", "lora_B.default.weight")
        );
        let z = ModuleName::parse("linear_attn.in_proj_z.bias").unwrap();
        assert_eq!((z.part, z.of(None)), (Some(1), "linear_attn.in_proj_qkvz.bias".to_owned()));
        for name in [
            "model.layers.0.linear_attn.out_proj.weight",
            "model.layers.0.linear_attn.in_proj_qkvz",
            "model.layers.0.my_linear_attn.in_proj_qkvz.weight",
            "model.layers.0.self_attn.in_proj_qkvz.weight",
        ] {
            assert_eq!(ModuleName::parse(name), None);
        }
    }
}
