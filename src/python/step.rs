//! The third part of a step, the same for both fronts: run.

use pyo3::prelude::*;

use super::view::Quiet;
use crate::kernel::batch::Work;
use crate::optimizer::{Clipping, Gathered, Outcome, Verdict};
use crate::threads::{Lender, Threads};

/// Bytes that a step reads and writes from which on it releases the GIL: some 30 µs of work. The
/// references that it must hold while other threads run cost 5 ns a tensor.
const DETACH_BYTES: usize = 4 << 20;

/// Whether a step releases the GIL, and so must hold all that it uses.
#[inline]
pub(crate) fn is_long(work: &Work<'_, '_>) -> bool {
    work.bytes() >= DETACH_BYTES
}

/// Who may run a step.
pub(crate) struct Crew<'t> {
    /// The most threads; None for as many as the lender has.
    pub allowed: Option<usize>,
    /// Whose threads are used instead of our own.
    pub lender: Option<&'t dyn Lender>,
    /// No piece of the work writes where another one reads or writes.
    pub is_apart: bool,
}

impl<'t> Crew<'t> {
    fn threads(&self, work: &mut Work<'_, '_>) -> Threads<'t> {
        let bytes = work.bytes();
        let threads = Threads::of_step(self.allowed, bytes, self.lender);
        // One after the other, rows may share elements as in torch.
        let is_alone = threads.count_for(bytes) <= 1;
        match is_alone || self.is_apart || work.is_large() && work.is_apart() {
            true => threads,
            false => Threads::CALLER,
        }
    }
}

/// Checks and runs a step. `check` looks at all memory, and makes it work; if that is long, it holds
/// all that it uses. What it returns besides is called after an update, before any Python code runs
/// or while all is held.
///
/// # Errors
/// Those of `check`; nothing was written.
pub(crate) fn run<'w, E: Send, A: FnOnce() + Send>(
    py: Python<'_>,
    crew: &Crew<'_>,
    clipping: &Clipping,
    gathered: Option<Gathered>,
    check: impl FnOnce(&Quiet<'_>) -> Result<(Work<'w, 'w>, A), E> + Send,
) -> Result<Verdict, E> {
    enum Checked<R, L> {
        Run(R),
        Long(L),
    }
    let run = |work, threads: Threads<'_>, after: A| {
        let verdict = clipping.run(work, &threads, gathered);
        if let Outcome::Update = verdict.outcome {
            after();
        }
        verdict
    };
    let checked = Quiet::during(py, |quiet| {
        let (mut work, after) = check(quiet)?;
        let threads = crew.threads(&mut work);
        Ok(match is_long(&work) {
            false => Checked::Run(run(work, threads, after)),
            true => Checked::Long((work, threads, after)),
        })
    })?;
    Ok(match checked {
        Checked::Run(verdict) => verdict,
        Checked::Long((work, threads, after)) => py.detach(|| run(work, threads, after)),
    })
}
