//! RMSprop for the CPU: the update as one fused pass, every framework's variant by name, the same
//! bits everywhere.
//!
//! # The rule
//!
//! For each element of a parameter `p` with gradient `grad`, where `v` is the state `square_avg`,
//! `m` `grad_avg`, `b` `momentum_buffer` and `e` `ema`, in this order, each operation rounded once in the type
//! of the parameter (no fused multiply-add):
//!
//! ```text
//! g = grad_scale * grad                  -1 to maximize, times the clipping factor; else 1
//! g = g + weight_decay * p               L2; or decoupled: p = p - (lr * weight_decay) * p
//! v = alpha * v + ((1 - alpha) * g) * g
//! m = alpha * m + (1 - alpha) * g        centered
//! d = c * v - (c * m)^2, at least 0      centered; else d = c * v.  c = 1 / (1 - alpha^t) with bias_correction, else 1
//! s = sqrt(d + eps_in) + eps_out         one of the two is eps, the other 0
//! p = p - (lr * g) / s                   without momentum; with it:
//! b = momentum * b + (lr_in * g) / s     one of lr_in and lr_out is lr, the other 1
//! p = p - lr_out * b                     nesterov: p = p - lr_out * ((lr_in * g) / s + momentum * b)
//! p = min(max(p, -limit), limit)         with clip_weights
//! e = ema_decay * e + (1 - ema_decay) * p  with ema_decay; e starts as p was before its first update
//! ```
//!
//! Decoupled decay is left out, with `cautious_weight_decay`, where what is subtracted of `p` at the
//! end has not its sign; with `corrected_weight_decay` its factor is `lr * lr / initial_lr *
//! weight_decay`. Lines of options that are off are not computed. Hyperparameters are `f64`, combined in `f64`,
//! rounded once. Every framework's RMSprop is a choice of these options ([`Config::dialect`]); the
//! kernel knows no framework.
//!
//! # Guarantees
//!
//! - The same bits for every instruction set, number of threads, alignment and cut of the work
//!   (`tests/bits.rs`).
//! - All inputs are checked before the first write: an error leaves everything as it was
//!   (`tests/errors.rs`).
//! - No allocation that grows with the parameters after construction (`tests/allocation.rs`).
//! - On x86-64 the caller's floating-point mode holds on every thread of a step, and stays the
//!   caller's.
//! - After `fork` a child steps on threads of its own.
//!
//! # Features
//!
//! `threads` (default): steps on several threads. `python`: the extension module of the Python
//! package.

#![deny(missing_docs, unsafe_code)]

mod config;
mod dialect;
mod error;
mod kernel;
mod optimizer;
#[cfg(feature = "python")]
mod python;
mod state;
mod threads;

pub use config::{Config, Nonfinite};
pub use dialect::DIALECTS;
pub use error::Error;
pub use kernel::isa::{Isa, isa};
pub use kernel::rule::Real;
pub use optimizer::RmsProp;
pub use state::StateKey;
pub use threads::default_threads;

/// Runs the Rust examples of the README.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;

/// Runs those of the documentation.
#[cfg(doctest)]
#[doc = include_str!("../docs/rust.md")]
struct Documentation;
