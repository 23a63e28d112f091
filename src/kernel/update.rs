//! The update rule, once: one line of code for each line of the formula.
//!
//! Symbols: `p` parameter, `g` gradient, `v` square_avg, `m` grad_avg, `b` momentum_buffer, all at
//! one index; `h` holds the hyperparameters, already rounded to the compute type `T`.
//!
//! Every operation rounds once. There is no `mul_add` here and Rust never contracts `a * b + c`, so
//! the bits do not depend on the instruction set that [`dispatch`](super::dispatch) compiles this
//! for.

use super::{Decay, Hyper, Momentum, Real, Rows};

/// Updates the rows in place by the rule in `h`.
#[inline(always)]
pub(super) fn rows<T: Real>(rows: Rows<'_, T>, h: &Hyper<T>) {
    match h.centered {
        false => with_momentum::<T, false>(rows, h),
        true => with_momentum::<T, true>(rows, h),
    }
}

/// Turns `h.momentum_rule` into a constant.
#[inline(always)]
fn with_momentum<T: Real, const CENTERED: bool>(rows: Rows<'_, T>, h: &Hyper<T>) {
    const OFF: u8 = Momentum::Off as u8;
    const HEAVY_BALL: u8 = Momentum::HeavyBall as u8;
    const NESTEROV: u8 = Momentum::Nesterov as u8;
    match h.momentum_rule {
        Momentum::Off => with_decay::<T, CENTERED, OFF>(rows, h),
        Momentum::HeavyBall => with_decay::<T, CENTERED, HEAVY_BALL>(rows, h),
        Momentum::Nesterov => with_decay::<T, CENTERED, NESTEROV>(rows, h),
    }
}

/// Turns `h.decay_rule` into a constant.
#[inline(always)]
fn with_decay<T: Real, const CENTERED: bool, const MOMENTUM: u8>(rows: Rows<'_, T>, h: &Hyper<T>) {
    const OFF: u8 = Decay::Off as u8;
    const L2: u8 = Decay::L2 as u8;
    const DECOUPLED: u8 = Decay::Decoupled as u8;
    let Rows { p, g, v, m, b } = rows;
    match h.decay_rule {
        Decay::Off => sweep::<T, CENTERED, MOMENTUM, OFF>(p, g, v, m, b, h),
        Decay::L2 => sweep::<T, CENTERED, MOMENTUM, L2>(p, g, v, m, b, h),
        Decay::Decoupled => sweep::<T, CENTERED, MOMENTUM, DECOUPLED>(p, g, v, m, b, h),
    }
}

/// One pass over the rows. The options are constants, so a line that is off is not computed at all:
/// `0 * inf` would be NaN.
// The slices are arguments, not fields of one struct, because only reference arguments tell LLVM
// that they do not alias; it would otherwise check that at run time, for every tensor.
#[inline(always)]
fn sweep<T: Real, const CENTERED: bool, const MOMENTUM: u8, const DECAY: u8>(
    p: &mut [T],
    g: &[T],
    v: &mut [T],
    m: &mut [T],
    b: &mut [T],
    h: &Hyper<T>,
) {
    let n = p.len();
    let (g, v) = (&g[..n], &mut v[..n]);
    let m = if CENTERED { &mut m[..n] } else { m };
    let b = if MOMENTUM != Momentum::Off as u8 {
        &mut b[..n]
    } else {
        b
    };
    let h = *h;
    for i in 0..n {
        let mut g = h.grad_scale * g[i];
        if DECAY == Decay::L2 as u8 {
            g = g + h.weight_decay * p[i];
        }
        if DECAY == Decay::Decoupled as u8 {
            p[i] = p[i] - h.lr_weight_decay * p[i];
        }
        v[i] = h.alpha * v[i] + (h.one_minus_alpha * g) * g;
        let mut d = h.correction * v[i];
        if CENTERED {
            m[i] = h.alpha * m[i] + h.one_minus_alpha * g;
            let mean = h.correction * m[i];
            d = d - mean * mean;
            // Rounding can make a variance negative. Not `max`: `f32::max(NaN, 0.0)` is 0 and would
            // hide a NaN.
            d = if d < T::ZERO { T::ZERO } else { d };
        }
        let s = (d + h.eps_in).sqrt() + h.eps_out;
        if MOMENTUM == Momentum::Off as u8 {
            p[i] = p[i] - (h.lr * g) / s;
        } else {
            let u = (h.lr_in * g) / s;
            b[i] = h.momentum * b[i] + u;
            if MOMENTUM == Momentum::Nesterov as u8 {
                p[i] = p[i] - h.lr_out * (u + h.momentum * b[i]);
            } else {
                p[i] = p[i] - h.lr_out * b[i];
            }
        }
    }
}
