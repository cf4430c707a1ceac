//! [`Gpu::logistic`](super::Gpu::logistic): the nearest numbers to it, or those that a GPU has.

use std::{sync::Arc, vec::Vec};

use super::super::{LOGISTIC, LOGISTIC_MIDDLE};

/// What a machine has for [`Gpu::logistic`](super::Gpu::logistic).
#[derive(Clone, Default)]
pub struct Logistic {
    /// At all [`Logistic::places`]; `None`: the nearest.
    own: Option<Arc<[f32]>>,
}

impl Logistic {
    /// Every f32 of [`LOGISTIC`], from the smallest on: 2^25 of them.
    pub fn places() -> impl Iterator<Item = f32> {
        (LOGISTIC.start.to_bits()..LOGISTIC.end.to_bits()).map(f32::from_bits)
    }

    /// That of a machine which has these numbers at all [`Logistic::places`].
    ///
    /// # Panics
    /// Where there are more or fewer of them.
    pub fn of(own: Vec<f32>) -> Self {
        assert_eq!(own.len(), (LOGISTIC.end.to_bits() - LOGISTIC.start.to_bits()) as usize);
        Self { own: Some(own.into()) }
    }

    /// `1 / (1 + 2^(place - 32))`, as if nothing was rounded.
    pub fn exact(place: f32) -> f64 {
        1.0 / (1.0 + (f64::from(place) - f64::from(LOGISTIC_MIDDLE)).exp2())
    }

    pub(super) fn at(&self, place: f32) -> f32 {
        match &self.own {
            _ if place < LOGISTIC.start => 1.0,
            _ if place >= LOGISTIC.end => 0.0,
            _ if place.is_nan() => place,
            Some(own) => own[(place.to_bits() - LOGISTIC.start.to_bits()) as usize],
            None => Self::exact(place) as f32,
        }
    }
}
