//! The arithmetic of a step.
//!
//! [`update`] is the formula and [`rule`] what it needs to know; [`norm`] sums the squares of the
//! gradients; [`isa`] compiles both for each instruction set. They work on dense slices of the
//! compute type and know nothing else. [`batch`] cuts the arrays of a step into chunks, [`stage`]
//! brings what is not dense, or of another element type, into slices and back, and [`storage`] is how
//! numbers are kept in fewer bits.

#[cfg(target_arch = "x86_64")]
mod avx512;
pub(crate) mod batch;
pub(crate) mod isa;
mod lanes;
pub(crate) mod norm;
#[cfg_attr(not(feature = "python"), allow(dead_code))] // Rust's gradients are dense.
pub(crate) mod rows;
pub(crate) mod rule;
pub(crate) mod stage;
pub(crate) mod storage;
mod update;

#[cfg(feature = "python")]
use crate::config::Config;
use crate::state::StateKey;

/// The arrays of a parameter by the symbols of the formula, in the order in which addresses,
/// strides and element types are listed by role.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Role {
    Parameter,
    Gradient,
    SquareAvg,
    GradAvg,
    MomentumBuffer,
    Ema,
    /// What rounding took from the parameter: the rule does not know it.
    ErrorBits,
}

/// How many roles there are.
pub(crate) const ROLES: usize = 7;

/// Of how many the rule reads or writes arrays: the first ones.
pub(crate) const SWEPT: usize = 6;

impl Role {
    /// In their order.
    pub const ALL: [Role; ROLES] = [
        Role::Parameter,
        Role::Gradient,
        Role::SquareAvg,
        Role::GradAvg,
        Role::MomentumBuffer,
        Role::Ema,
        Role::ErrorBits,
    ];

    /// The key of the state that it is.
    #[cfg_attr(not(feature = "python"), allow(dead_code))]
    #[inline(always)]
    pub fn state_key(self) -> Option<StateKey> {
        match self {
            Role::Parameter | Role::Gradient => None,
            Role::SquareAvg => Some(StateKey::SquareAvg),
            Role::GradAvg => Some(StateKey::GradAvg),
            Role::MomentumBuffer => Some(StateKey::MomentumBuffer),
            Role::Ema => Some(StateKey::Ema),
            Role::ErrorBits => Some(StateKey::ErrorBits),
        }
    }

    /// By role, whether a step with these options reads or writes it.
    #[cfg(feature = "python")] // Rust's slices are pushed one key after the other.
    pub fn used(config: &Config) -> [bool; ROLES] {
        Role::ALL.map(|role| role.state_key().is_none_or(|key| key.is_used(config)))
    }

    /// Whether a step writes it.
    pub fn is_written(self) -> bool {
        self != Role::Gradient
    }
}

/// The element types that arrays are stored in.
#[cfg_attr(not(feature = "python"), allow(dead_code))] // Rust's slices are of the compute type.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DType {
    F16,
    BF16,
    F32,
    F64,
    /// Codes of blocks ([`storage`]).
    U8,
    /// Error bits of 24 and 32 master bits.
    I8,
    I16,
}

impl DType {
    /// Bytes of an element.
    pub const fn size(self) -> usize {
        match self {
            DType::U8 | DType::I8 => 1,
            DType::F16 | DType::BF16 | DType::I16 => 2,
            DType::F32 => 4,
            DType::F64 => 8,
        }
    }

    /// Whether parameters may be stored in it.
    pub const fn is_float(self) -> bool {
        matches!(self, DType::F16 | DType::BF16 | DType::F32 | DType::F64)
    }

    /// Whether it is one of error bits.
    pub const fn is_error_bits(self) -> bool {
        matches!(self, DType::I8 | DType::I16)
    }

    /// What is computed in where a parameter is stored in this.
    pub const fn compute(self) -> DType {
        match self {
            DType::F64 => DType::F64,
            _ => DType::F32,
        }
    }
}
