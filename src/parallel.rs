//! Sharing the chunks of a step among threads.
//!
//! The caller works too. It hands tickets to a private pool and claims chunks itself; once they are
//! all claimed it closes the job and waits only for the workers that had entered. A worker that
//! wakes up late finds the job closed and touches nothing. (rayon's `in_place_scope` waits for
//! tickets nobody has begun as well: 12 µs a step more.)
//!
//! The pool belongs to the process that made it. After `fork` the child finds another process id,
//! leaks the parent's pool, whose threads it does not have, and makes its own.

use std::sync::atomic::{AtomicUsize, Ordering};

use crate::error::Error;

/// Bytes below which a step stays on the caller: half a million f32 elements, p g v.
///
/// Waking a sleeping worker takes 25 to 40 µs. Medians of two runs after a pause of 300 µs, two
/// cores of a Zen 5, 2026-11-22, one thread against two: 262 k elements 42 to 53 µs against 45 to
/// 62; 524 k 94 to 111 against 98 to 105; 786 k 174 to 276 against 151 to 196. Hot, two were no
/// faster below 786 k.
const SERIAL_BYTES: usize = 10 << 20;

/// How many of `threads` are worth waking for work that moves `bytes`, and allowed.
pub(crate) fn useful_threads(threads: usize, bytes: usize) -> usize {
    if bytes < SERIAL_BYTES {
        1
    } else {
        let useful = threads.min(1 + bytes / (SERIAL_BYTES / 2));
        thread_limit().map_or(useful, |limit| useful.min(limit))
    }
}

/// What no step of this process may exceed; 0 for no limit.
static LIMIT: AtomicUsize = AtomicUsize::new(0);

/// The limit on the threads of every step in this process, whatever its optimizer was told.
pub(crate) fn thread_limit() -> Option<usize> {
    Some(LIMIT.load(Ordering::Relaxed)).filter(|&limit| limit > 0)
}

/// Limits the threads of every step in this process from its next step on; `None` takes the limit
/// away. It is for threadpoolctl, by which programs that nest pools of threads keep them apart.
#[cfg(feature = "python")]
pub(crate) fn set_thread_limit(limit: Option<std::num::NonZeroUsize>) {
    LIMIT.store(limit.map_or(0, usize::from), Ordering::Relaxed);
}

/// The threads of an optimizer that was not told: `RMSPROP_NUM_THREADS`, or else as many as this
/// process may use; its affinity and its cgroup's quota count. Without the feature `rayon` a step
/// stays on the caller all the same.
///
/// # Errors
/// [`Error::Threads`] if `RMSPROP_NUM_THREADS` is not a number >= 1.
pub fn default_threads() -> Result<usize, Error> {
    Ok(match threads_from_environment()? {
        Some(threads) => threads,
        None if cfg!(feature = "rayon") => {
            std::thread::available_parallelism().map_or(1, usize::from)
        }
        None => 1,
    })
}

/// What `RMSPROP_NUM_THREADS` says, if anything.
///
/// # Errors
/// As [`default_threads`].
pub(crate) fn threads_from_environment() -> Result<Option<usize>, Error> {
    let name = "RMSPROP_NUM_THREADS";
    let Some(value) = std::env::var_os(name).filter(|value| !value.is_empty()) else {
        return Ok(None);
    };
    let found = value.to_string_lossy().into_owned();
    match found.trim().parse() {
        Ok(threads) if threads >= 1 => Ok(Some(threads)),
        _ => Err(Error::Threads { name, found }),
    }
}

pub(crate) use shared::for_each;

#[cfg(not(feature = "rayon"))]
mod shared {
    use std::sync::Arc;

    /// Calls `work(shared, index)` for every index below `count`.
    pub(crate) fn for_each<S>(shared: &Arc<S>, count: usize, _threads: usize, work: fn(&S, usize)) {
        (0..count).for_each(|index| work(shared, index));
    }
}

#[cfg(feature = "rayon")]
mod shared {
    use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
    use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
    use std::sync::{Arc, Mutex, PoisonError};
    use std::thread::Thread;

    use crate::kernel::dispatch::FloatMode;

    /// Calls `work(shared, index)` once for every index below `count`, on up to `threads` threads,
    /// the calling one included, all in its floating-point mode. When it returns, no other thread
    /// holds `shared` or runs `work`.
    pub(crate) fn for_each<S: Send + Sync + 'static>(
        shared: &Arc<S>,
        count: usize,
        threads: usize,
        work: fn(&S, usize),
    ) {
        let helpers = threads.min(count).saturating_sub(1);
        let Some(pool) = (helpers > 0).then(|| pool(helpers)).flatten() else {
            return (0..count).for_each(|index| work(shared, index));
        };
        let job = Arc::new(Job {
            shared: Mutex::new(Some(Arc::clone(shared))),
            work,
            count,
            next: AtomicUsize::new(0),
            gate: AtomicUsize::new(0),
            panicked: AtomicBool::new(false),
            mode: FloatMode::current(),
            caller: std::thread::current(),
        });
        for _ in 0..helpers {
            let job = Arc::clone(&job);
            pool.spawn(move || job.help());
        }
        let outcome = catch_unwind(AssertUnwindSafe(|| job.claim(shared)));
        job.close();
        if let Err(panic) = outcome {
            resume_unwind(panic);
        }
        assert!(
            !job.panicked.load(Ordering::Relaxed),
            "a worker of a step panicked"
        );
    }

    struct Job<S> {
        /// What the chunks are of; taken away when the job is closed.
        shared: Mutex<Option<Arc<S>>>,
        work: fn(&S, usize),
        count: usize,
        /// The next chunk to claim.
        next: AtomicUsize,
        /// Workers inside, times two; plus one once it is closed.
        gate: AtomicUsize,
        panicked: AtomicBool,
        mode: FloatMode,
        caller: Thread,
    }

    const CLOSED: usize = 1;
    const ONE_INSIDE: usize = 2;

    impl<S: Send + Sync> Job<S> {
        fn claim(&self, shared: &S) {
            loop {
                let index = self.next.fetch_add(1, Ordering::Relaxed);
                if index >= self.count {
                    return;
                }
                (self.work)(shared, index);
            }
        }

        /// A worker's part.
        fn help(&self) {
            let enter = |gate| (gate & CLOSED == 0).then_some(gate + ONE_INSIDE);
            if self
                .gate
                .fetch_update(Ordering::Acquire, Ordering::Relaxed, enter)
                .is_err()
            {
                return;
            }
            let shared = self
                .shared
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .clone();
            if let Some(shared) = shared {
                let outcome = catch_unwind(AssertUnwindSafe(|| {
                    self.mode.during(|| self.claim(&shared))
                }));
                if outcome.is_err() {
                    self.panicked.store(true, Ordering::Relaxed);
                }
            }
            if self.gate.fetch_sub(ONE_INSIDE, Ordering::Release) == ONE_INSIDE + CLOSED {
                self.caller.unpark();
            }
        }

        /// Lets nobody in any more, and waits for those inside to leave.
        fn close(&self) {
            let mut gate = self.gate.fetch_or(CLOSED, Ordering::AcqRel) | CLOSED;
            // The last chunk of a worker takes a few µs: look for it before sleeping.
            for _ in 0..1000 {
                if gate == CLOSED {
                    break;
                }
                std::hint::spin_loop();
                gate = self.gate.load(Ordering::Acquire);
            }
            while self.gate.load(Ordering::Acquire) != CLOSED {
                std::thread::park();
            }
            self.shared
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .take();
        }
    }

    struct Pool {
        process: u32,
        workers: usize,
        threads: Arc<rayon::ThreadPool>,
    }

    static POOL: Mutex<Option<Pool>> = Mutex::new(None);

    /// A pool of this process with at least `workers` threads; `None` if there can be none just
    /// now.
    fn pool(workers: usize) -> Option<Arc<rayon::ThreadPool>> {
        // Never waits: should another thread hold the lock, or have held it when this process was
        // forked, the step runs on the caller.
        let mut slot = POOL.try_lock().ok()?;
        let process = std::process::id();
        match &*slot {
            Some(pool) if pool.process == process && pool.workers >= workers => {
                return Some(Arc::clone(&pool.threads));
            }
            _ => {}
        }
        let threads = rayon::ThreadPoolBuilder::new()
            .num_threads(workers)
            .thread_name(|index| format!("rmsprop-{index}"))
            .build()
            .ok()?;
        let threads = Arc::new(threads);
        let new = Pool {
            process,
            workers,
            threads: Arc::clone(&threads),
        };
        if let Some(old) = slot.replace(new)
            && old.process != process
        {
            // Dropping it would wait for threads that only the parent has.
            std::mem::forget(old);
        }
        Some(threads)
    }
}
