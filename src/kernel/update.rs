//! The update rule, once: one line of code for each line of the formula.
//!
//! Symbols: `p` parameter, `g` gradient, `v` square_avg, `m` grad_avg, `b` momentum_buffer, `e` ema,
//! all at one index; `h` holds the hyperparameters, already rounded to the compute type `T`.
//!
//! Every operation rounds once. There is no `mul_add` here and Rust never contracts `a * b + c`, so
//! the bits do not depend on the instruction set that [`isa`](super::isa) compiles this
//! for.

use super::lanes::Lanes;
use super::rule::{Average, Decay, Momentum, Real, Rule, Slices};

/// One pass over dense arrays. The options are constants, so a line that is off is not computed at
/// all: `0 * inf` would be NaN.
// The slices are arguments, not fields of one struct, because only reference arguments tell LLVM
// that they do not alias; it would otherwise check that at run time, for every tensor.
#[inline(always)]
fn sweep<T: Real, L: Lanes<T>, const CENTERED: bool, const MOMENTUM: u8, const DECAY: u8>(
    proof: L::Proof,
    p: &mut [T],
    g: &[T],
    v: &mut [T],
    m: &mut [T],
    b: &mut [T],
    h: &Rule<T>,
) {
    // Here, and not once for all arrays: LLVM would not see that a block's vectors are alike.
    let h = h.splat::<L>(proof);
    let n = p.len();
    let (g, v) = (&g[..n], &mut v[..n]);
    let m = if CENTERED { &mut m[..n] } else { m };
    let b = if MOMENTUM != Momentum::Off as u8 {
        &mut b[..n]
    } else {
        b
    };
    for block in 0..n / L::COUNT {
        let i = block * L::COUNT;
        let mut p_i = L::load(proof, p, i);
        let mut g_i = h.grad_scale * L::load(proof, g, i);
        if DECAY == Decay::L2 as u8 {
            g_i = g_i + h.weight_decay * p_i;
        }
        if DECAY == Decay::Decoupled as u8 {
            p_i = p_i - h.lr_weight_decay * p_i;
        }
        let v_i = h.alpha * L::load(proof, v, i) + (h.one_minus_alpha * g_i) * g_i;
        v_i.store(v, i);
        let mut d = h.correction * v_i;
        if CENTERED {
            let m_i = h.alpha * L::load(proof, m, i) + h.one_minus_alpha * g_i;
            m_i.store(m, i);
            let mean = h.correction * m_i;
            // Rounding can make a variance negative.
            d = (d - mean * mean).at_least_zero();
        }
        let s = (d + h.eps_in).sqrt() + h.eps_out;
        let u_i = if MOMENTUM == Momentum::Off as u8 {
            (h.lr * g_i) / s
        } else {
            let step = (h.lr_in * g_i) / s;
            let b_i = h.momentum * L::load(proof, b, i) + step;
            b_i.store(b, i);
            if MOMENTUM == Momentum::Nesterov as u8 {
                h.lr_out * (step + h.momentum * b_i)
            } else {
                h.lr_out * b_i
            }
        };
        if DECAY == Decay::Cautious as u8 {
            p_i = p_i - (h.lr_weight_decay * p_i).where_alike(u_i, p_i);
        }
        p_i = p_i - u_i;
        p_i.store(p, i);
    }
}

/// Updates all arrays in place by the rule `h`, as many elements at a time as `L` has lanes.
#[inline(always)]
pub(super) fn sweep_all<'a, T: Real, L: Lanes<T>>(
    proof: L::Proof,
    all: impl Iterator<Item = Slices<'a, T>>,
    h: &Rule<T>,
) {
    match h.centered {
        false => with_momentum::<T, L, false>(proof, all, h),
        true => with_momentum::<T, L, true>(proof, all, h),
    }
}

/// Turns `h.momentum_form` into a constant.
#[inline(always)]
fn with_momentum<'a, T: Real, L: Lanes<T>, const CENTERED: bool>(
    proof: L::Proof,
    all: impl Iterator<Item = Slices<'a, T>>,
    h: &Rule<T>,
) {
    const OFF: u8 = Momentum::Off as u8;
    const HEAVY_BALL: u8 = Momentum::HeavyBall as u8;
    const NESTEROV: u8 = Momentum::Nesterov as u8;
    match h.momentum_form {
        Momentum::Off => with_decay::<T, L, CENTERED, OFF>(proof, all, h),
        Momentum::HeavyBall => with_decay::<T, L, CENTERED, HEAVY_BALL>(proof, all, h),
        Momentum::Nesterov => with_decay::<T, L, CENTERED, NESTEROV>(proof, all, h),
    }
}

/// Turns `h.decay_form` into a constant.
#[inline(always)]
fn with_decay<'a, T: Real, L: Lanes<T>, const CENTERED: bool, const MOMENTUM: u8>(
    proof: L::Proof,
    all: impl Iterator<Item = Slices<'a, T>>,
    h: &Rule<T>,
) {
    const OFF: u8 = Decay::Off as u8;
    const L2: u8 = Decay::L2 as u8;
    const DECOUPLED: u8 = Decay::Decoupled as u8;
    const CAUTIOUS: u8 = Decay::Cautious as u8;
    match h.decay_form {
        Decay::Off => each::<T, L, CENTERED, MOMENTUM, OFF>(proof, all, h),
        Decay::L2 => each::<T, L, CENTERED, MOMENTUM, L2>(proof, all, h),
        Decay::Decoupled => each::<T, L, CENTERED, MOMENTUM, DECOUPLED>(proof, all, h),
        Decay::Cautious => each::<T, L, CENTERED, MOMENTUM, CAUTIOUS>(proof, all, h),
    }
}

/// The arrays of one parameter after the other.
#[inline(always)]
fn each<'a, T: Real, L: Lanes<T>, const CENTERED: bool, const MOMENTUM: u8, const DECAY: u8>(
    proof: L::Proof,
    all: impl Iterator<Item = Slices<'a, T>>,
    h: &Rule<T>,
) {
    for mut slices in all {
        if h.has_second_pass() {
            while !slices.p.is_empty() {
                let len = IN_CACHE.min(slices.p.len());
                let (mut part, others) = slices.split_at(len);
                if h.average_form == Average::Begins {
                    part.e.copy_from_slice(part.p);
                }
                one::<T, L, CENTERED, MOMENTUM, DECAY>(proof, part.reborrow(), h);
                pass_again(part, h);
                slices = others;
            }
        } else {
            one::<T, L, CENTERED, MOMENTUM, DECAY>(proof, slices, h);
        }
    }
}

/// The arrays of one parameter: blocks of `L`, and what is left of them.
#[inline(always)]
fn one<T: Real, L: Lanes<T>, const CENTERED: bool, const MOMENTUM: u8, const DECAY: u8>(
    proof: L::Proof,
    slices: Slices<'_, T>,
    h: &Rule<T>,
) {
    let rest = if L::COUNT > 1 && slices.p.len() >= L::FROM {
        let len = slices.p.len() / L::COUNT * L::COUNT;
        let (Slices { p, g, v, m, b, .. }, rest) = slices.split_at(len);
        sweep::<T, L, CENTERED, MOMENTUM, DECAY>(proof, p, g, v, m, b, h);
        rest
    } else {
        slices
    };
    let Slices { p, g, v, m, b, .. } = rest;
    sweep::<T, T::One, CENTERED, MOMENTUM, DECAY>((), p, g, v, m, b, h);
}

/// Elements that are still in the first-level cache when they are passed over again.
const IN_CACHE: usize = 1024;

/// The lines of the formula that only need the new parameter. (In [`sweep`] each would double the
/// number of its forms.)
#[inline(always)]
fn pass_again<T: Real>(slices: Slices<'_, T>, h: &Rule<T>) {
    let Slices { p, e, .. } = slices;
    if let Some(limit) = h.clip_weights {
        let least = T::ZERO - limit;
        for p_i in &mut *p {
            // A NaN stays one.
            *p_i = if *p_i > limit { limit } else { *p_i };
            *p_i = if *p_i < least { least } else { *p_i };
        }
    }
    if h.average_form != Average::Off {
        for (e_i, &p_i) in e.iter_mut().zip(&*p) {
            *e_i = h.ema_decay * *e_i + h.one_minus_ema_decay * p_i;
        }
    }
}
