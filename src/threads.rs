//! Who runs the chunks of a step: the caller alone, our pool, or threads that somebody lends.
//!
//! The caller works too. Each thread has a share of the chunks that lie together and begins with its
//! own, which the next step finds in that core's cache; then it takes what others have left.
//!
//! Our pool is private, made when it is first needed, idle otherwise, and belongs to the process that
//! made it: after `fork` the child finds another process id, leaks the parent's pool, whose threads
//! it does not have, and makes its own. The caller hands it a job and claims chunks itself; once they
//! are all claimed it closes the job and waits only for the workers that had entered. A worker that
//! comes late finds the job closed and touches nothing. (rayon's `in_place_scope` waits for those
//! that nobody has begun as well: milliseconds where another thread spins on the worker's core. Its
//! `spawn` does not, but its workers yield 32 times before they sleep, which Linux counts as time that
//! was used: beside BLAS threads that spin, every second one came too late.)
//!
//! What it takes for a worker to come in time where another library's threads spin on its core was
//! found by leaving out one thing at a time. NumPy's loop of three layers with OpenBLAS on two threads
//! (`benches/loop.py`, two cores, Linux 6.18), one thread's time over that of two, at 1, 4.3 and 12 M
//! elements: 1.5, 1.8, 1.25 as it is; 0.83, 0.93, 0.97 if workers may run on their caller's core
//! (`Places`); 0.92, 0.97, 1.04 with time slices of the usual length; 0.92, 0.96, 1.0 if
//! they sleep at once after a step. So these three stay. What learned from timing (how long steps take
//! alone and together, and for how long to do without threads) gained nothing beside them, and went.

use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};

use crate::error::Error;

/// Bytes below which a step stays on the caller although workers are awake: 32 Ki f32 elements, p g
/// v. Torch's own kernels begin to share at as many.
pub(crate) const SERIAL_BYTES: usize = 640 << 10;

/// The same while our workers sleep: waking one takes as long as a step of 0.4 M f32 elements.
const SERIAL_BYTES_ASLEEP: usize = 8 << 20;

/// Threads that somebody else owns.
#[cfg_attr(not(feature = "threads"), allow(dead_code))]
pub(crate) trait Lender: Sync {
    /// How many there are, the calling one included.
    fn count(&self) -> usize;

    /// Whether they can be used; else our pool is used instead of so many.
    fn is_usable(&self) -> bool;

    /// Calls `seat(k)` for every k below `seats`, on as many threads as there are, and returns when
    /// all calls have.
    fn run(&self, seats: usize, seat: &(dyn Fn(usize) + Sync));
}

/// The threads of a step; dropped when it ends.
#[cfg_attr(not(feature = "threads"), allow(dead_code))]
pub(crate) struct Threads<'t> {
    /// At most so many, the caller included.
    allowed: usize,
    /// None for our pool.
    lender: Option<&'t dyn Lender>,
    serial_bytes: usize,
}

impl<'t> Threads<'t> {
    /// The caller alone.
    pub const CALLER: Threads<'t> = Threads {
        allowed: 1,
        lender: None,
        serial_bytes: usize::MAX,
    };

    /// Those of a step that moves so many bytes and may use so many: as many as the lender has, if
    /// none are given.
    #[inline]
    pub fn of_step(allowed: Option<usize>, bytes: usize, lender: Option<&'t dyn Lender>) -> Self {
        if bytes < SERIAL_BYTES || allowed == Some(1) || cfg!(not(feature = "threads")) {
            return Threads::CALLER;
        }
        let lent = lender.map_or(allowed.unwrap_or(1), Lender::count);
        let allowed = allowed.unwrap_or(lent).min(lent);
        let allowed = thread_limit().map_or(allowed, |limit| allowed.min(limit));
        let lender = lender.filter(|lender| lender.is_usable());
        let serial_bytes = match lender {
            None if !is_pool_awake() => SERIAL_BYTES_ASLEEP,
            _ => SERIAL_BYTES,
        };
        Threads {
            allowed,
            lender,
            serial_bytes,
        }
    }

    /// How many to use for work that moves so many bytes.
    pub fn count_for(&self, bytes: usize) -> usize {
        match bytes < self.serial_bytes {
            true => 1,
            false => self.allowed.min(1 + bytes / (self.serial_bytes / 2)),
        }
    }

    /// Calls `work(index)` once for every index below `count`, on up to `threads` threads, all in the
    /// caller's floating-point mode. When it returns, nobody runs `work`.
    pub fn for_each(&self, threads: usize, count: usize, work: &(dyn Fn(usize) + Sync)) {
        #[cfg(feature = "threads")]
        {
            shared::for_each(self.lender, threads.min(count), count, work);
        }
        #[cfg(not(feature = "threads"))]
        {
            let _ = threads;
            (0..count).for_each(work);
        }
    }
}

impl Drop for Threads<'_> {
    fn drop(&mut self) {
        #[cfg(feature = "threads")]
        if self.allowed > 1 && self.lender.is_none() {
            shared::end_step();
        }
    }
}

#[cfg(not(feature = "threads"))]
fn is_pool_awake() -> bool {
    false
}

#[cfg(feature = "threads")]
use shared::is_pool_awake;

#[cfg(feature = "threads")]
mod shared {
    use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
    use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
    use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError};
    use std::thread::Thread;
    use std::time::{Duration, Instant};

    use super::Lender;
    use crate::kernel::isa::FloatMode;

    pub(super) fn for_each(
        lender: Option<&dyn Lender>,
        seats: usize,
        count: usize,
        work: &(dyn Fn(usize) + Sync),
    ) {
        let helpers = seats.saturating_sub(1);
        let shares = Shares::new(seats.max(1), count);
        if let (Some(lender), 1..) = (lender, helpers) {
            let (mode, panicked) = (FloatMode::current(), AtomicBool::new(false));
            lender.run(seats, &|seat| {
                // Nothing may unwind through somebody else's threads.
                let claim = || mode.during(|| shares.claim(seat, work));
                if catch_unwind(AssertUnwindSafe(claim)).is_err() {
                    panicked.store(true, Ordering::Relaxed);
                }
            });
            assert!(!panicked.into_inner(), "a thread of a step panicked");
            // All, should the lender have refused.
            return shares.claim(0, work);
        }
        match (helpers > 0).then(|| pool(helpers)).flatten() {
            Some(pool) => pool.run(helpers, shares, work),
            None => shares.claim(0, work),
        }
    }

    /// Indices that lie together.
    #[repr(align(64))] // Each on a cache line of its own.
    struct Share {
        /// The next one to claim.
        next: AtomicUsize,
        end: usize,
    }

    /// One for each thread. On two threads that took 0.87 to 0.95 of the time of chunks as they come
    /// from 131 k to 4 M elements, and 0.98 beyond.
    struct Shares(Box<[Share]>);

    impl Shares {
        fn new(seats: usize, count: usize) -> Self {
            let share = |k| Share {
                next: AtomicUsize::new(k * count / seats),
                end: (k + 1) * count / seats,
            };
            Shares((0..seats).map(share).collect())
        }

        /// Works on the share of a seat, then on what others have left.
        fn claim(&self, seat: usize, work: &(dyn Fn(usize) + Sync)) {
            let (before, own) = self.0.split_at(seat % self.0.len());
            for share in own.iter().chain(before) {
                loop {
                    let index = share.next.fetch_add(1, Ordering::Relaxed);
                    if index >= share.end {
                        break;
                    }
                    work(index);
                }
            }
        }
    }

    /// When a step that might have used the pool ended last, in ns since the first.
    static ENDED: AtomicU64 = AtomicU64::new(0);

    fn now() -> u64 {
        static FIRST: OnceLock<Instant> = OnceLock::new();
        FIRST.get_or_init(Instant::now).elapsed().as_nanos() as u64
    }

    pub(super) fn end_step() {
        ENDED.store(now(), Ordering::Relaxed);
    }

    /// How long a worker looks for more work before it sleeps.
    const AWAKE: Duration = Duration::from_micros(30);

    /// Whether workers are awake, as steps follow each other at once.
    pub(super) fn is_pool_awake() -> bool {
        u128::from(now().saturating_sub(ENDED.load(Ordering::Relaxed))) < AWAKE.as_nanos()
    }

    /// What workers of the pool are called for.
    struct Job {
        /// Outlives the job's being open.
        work: *const (dyn Fn(usize) + Sync),
        shares: Shares,
        /// Workers inside, times two; plus one once it is closed.
        gate: AtomicUsize,
        /// The next worker's seat.
        seat: AtomicUsize,
        panicked: AtomicBool,
        mode: FloatMode,
        caller: Thread,
    }

    const CLOSED: usize = 1;
    const ONE_INSIDE: usize = 2;

    // SAFETY: `work` is a reference to what is `Sync`, and is followed only while the job is open.
    #[allow(unsafe_code)]
    unsafe impl Send for Job {}
    // SAFETY: as above.
    #[allow(unsafe_code)]
    unsafe impl Sync for Job {}

    impl Job {
        /// A worker's part; nothing if the job is closed.
        #[allow(unsafe_code)]
        fn help(&self) {
            let enter = |gate| (gate & CLOSED == 0).then_some(gate + ONE_INSIDE);
            let entered = self
                .gate
                .fetch_update(Ordering::Acquire, Ordering::Relaxed, enter);
            if entered.is_err() {
                return;
            }
            let seat = self.seat.fetch_add(1, Ordering::Relaxed);
            // SAFETY: `Pool::run`, which borrows it, returns only when the job is closed and all that
            // had entered have left.
            let work = unsafe { &*self.work };
            let claim = || self.mode.during(|| self.shares.claim(seat, work));
            if catch_unwind(AssertUnwindSafe(claim)).is_err() {
                self.panicked.store(true, Ordering::Relaxed);
            }
            let gate = self.gate.fetch_sub(ONE_INSIDE, Ordering::Release);
            if gate == ONE_INSIDE + CLOSED {
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
        }
    }

    /// Workers of a process, and the job that they are offered.
    struct Pool {
        process: u32,
        workers: AtomicUsize,
        offer: Mutex<Offer>,
        /// How many offers there were, and what workers that sleep are woken by.
        offers: AtomicUsize,
        offered: Condvar,
        places: Mutex<Places>,
    }

    #[derive(Default)]
    struct Offer {
        job: Option<Arc<Job>>,
        /// How many workers may still take it.
        seats: usize,
    }

    impl Pool {
        /// Works on the shares, with so many helpers, as far as they come in time.
        #[allow(unsafe_code)]
        fn run(&self, helpers: usize, shares: Shares, work: &(dyn Fn(usize) + Sync)) {
            let job = Arc::new(Job {
                // SAFETY: only the lifetime is forgotten, and the job is closed before it ends.
                work: unsafe {
                    std::mem::transmute::<
                        *const (dyn Fn(usize) + Sync + '_),
                        *const (dyn Fn(usize) + Sync + 'static),
                    >(work)
                },
                shares,
                gate: AtomicUsize::new(0),
                seat: AtomicUsize::new(1),
                panicked: AtomicBool::new(false),
                mode: FloatMode::current(),
                caller: std::thread::current(),
            });
            lock(&self.places).keep_off_this_core();
            let replaced = {
                let mut offer = lock(&self.offer);
                offer.seats = helpers;
                self.offers.fetch_add(1, Ordering::Relaxed);
                offer.job.replace(Arc::clone(&job))
            };
            drop(replaced);
            (0..helpers).for_each(|_| self.offered.notify_one());
            let outcome = catch_unwind(AssertUnwindSafe(|| job.shares.claim(0, work)));
            job.close();
            if let Err(panic) = outcome {
                resume_unwind(panic);
            }
            let panicked = job.panicked.load(Ordering::Relaxed);
            assert!(!panicked, "a worker of a step panicked");
        }

        /// What a worker does.
        fn serve(&self) {
            ask_for_short_slices();
            lock(&self.places).register();
            loop {
                self.next().help();
                // Steps may follow each other at once, as those of several optimizers do; a worker
                // that is woken comes 20 µs later. (Not by yielding: Linux takes that for time that
                // was used, and lets the worker wait when it is woken.)
                let seen = self.offers.load(Ordering::Relaxed);
                let end = Instant::now() + AWAKE;
                while self.offers.load(Ordering::Relaxed) == seen && Instant::now() < end {
                    std::hint::spin_loop();
                }
            }
        }

        /// Waits for a job.
        fn next(&self) -> Arc<Job> {
            let mut offer = lock(&self.offer);
            loop {
                if offer.seats > 0
                    && let Some(job) = &offer.job
                {
                    let job = Arc::clone(job);
                    offer.seats -= 1;
                    return job;
                }
                let waited = self.offered.wait(offer);
                offer = waited.unwrap_or_else(PoisonError::into_inner);
            }
        }
    }

    static POOL: Mutex<Option<Arc<Pool>>> = Mutex::new(None);

    /// The pool of this process, with at least `workers` threads if there can be so many; `None` if
    /// there can be none just now.
    fn pool(workers: usize) -> Option<Arc<Pool>> {
        // Never waits: should another thread hold the lock, or have held it when this process was
        // forked, the step runs on the caller.
        let mut slot = POOL.try_lock().ok()?;
        let process = std::process::id();
        if slot.as_ref().is_none_or(|pool| pool.process != process) {
            // That of another process has threads and locks that this one does not.
            std::mem::forget(slot.replace(Arc::new(Pool {
                process,
                workers: AtomicUsize::new(0),
                offer: Mutex::default(),
                offers: AtomicUsize::new(0),
                offered: Condvar::new(),
                places: Mutex::default(),
            })));
        }
        let pool = Arc::clone(slot.as_ref()?);
        for k in pool.workers.load(Ordering::Relaxed)..workers {
            let worker = Arc::clone(&pool);
            let thread = std::thread::Builder::new().name(format!("rmsprop-{k}"));
            if thread.spawn(move || worker.serve()).is_err() {
                break;
            }
            pool.workers.store(k + 1, Ordering::Relaxed);
        }
        (pool.workers.load(Ordering::Relaxed) > 0).then_some(pool)
    }

    fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
        mutex.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// On which cores the workers may run.
    ///
    /// Linux likes to put a thread that is woken on the core of the one that woke it, above all in
    /// virtual machines, where an idle core looks as if it were taken. There both share one core. So
    /// workers are kept off that core, on the others that the caller may use. Of many workers one
    /// that waits matters little, and telling all of them takes longer.
    #[cfg(target_os = "linux")]
    #[derive(Default)]
    struct Places {
        workers: Vec<rustix::thread::Pid>,
        /// Where they may run.
        allowed: Option<rustix::thread::CpuSet>,
    }

    #[cfg(target_os = "linux")]
    impl Places {
        /// Adds the calling worker.
        fn register(&mut self) {
            self.workers.push(rustix::thread::gettid());
            self.allowed = None;
        }

        fn keep_off_this_core(&mut self) {
            const MANY: usize = 16;
            let Ok(mut allowed) = rustix::thread::sched_getaffinity(None) else {
                return;
            };
            allowed.unset(rustix::thread::sched_getcpu());
            let is_known = self.allowed == Some(allowed);
            if is_known || allowed.count() == 0 || self.workers.len() > MANY {
                return;
            }
            for &worker in &self.workers {
                // If the system refuses, it stays where it may run now.
                let _ = rustix::thread::sched_setaffinity(Some(worker), &allowed);
            }
            self.allowed = Some(allowed);
        }
    }

    #[cfg(not(target_os = "linux"))]
    #[derive(Default)]
    struct Places;

    #[cfg(not(target_os = "linux"))]
    impl Places {
        fn register(&mut self) {}

        fn keep_off_this_core(&mut self) {}
    }

    /// Asks Linux (6.12 and newer; others refuse) for short time slices: of two threads on a core it
    /// then runs this one sooner when it is woken, instead of after the other one's slice. Beside
    /// BLAS threads that spin after a product, two threads took 0.73 of the time of one with it and
    /// 0.99 without (4.3 M elements, Zen 4).
    #[cfg(target_os = "linux")]
    #[allow(unsafe_code)]
    fn ask_for_short_slices() {
        /// The kernel's `struct sched_attr`.
        #[repr(C)]
        #[derive(Default)]
        struct Attributes {
            size: u32,
            policy: u32,
            flags: u64,
            nice: i32,
            priority: u32,
            runtime: u64,
            deadline: u64,
            period: u64,
        }
        const SLICE_NS: u64 = 100_000;
        let mut own = Attributes::default();
        let size = size_of::<Attributes>() as libc::c_uint;
        // SAFETY: both calls are about this thread; the kernel reads and writes `size` bytes there.
        unsafe {
            if libc::syscall(libc::SYS_sched_getattr, 0, &mut own, size, 0) == 0 && own.policy == 0
            {
                own.runtime = SLICE_NS;
                libc::syscall(libc::SYS_sched_setattr, 0, &own, 0);
            }
        }
    }

    #[cfg(not(target_os = "linux"))]
    fn ask_for_short_slices() {}

    #[cfg(test)]
    mod tests {
        use std::collections::HashSet;
        use std::sync::Mutex;
        use std::thread::current;
        use std::time::Duration;

        use super::for_each;

        /// Each index once, on no more threads than allowed.
        #[test]
        fn jobs_that_follow_at_once() {
            for round in 0..300 {
                let (count, threads) = (1 + round % 9, 1 + round % 4);
                let seen = Mutex::new((Vec::new(), HashSet::new()));
                for_each(None, threads.min(count), count, &|index| {
                    let mut seen = seen.lock().unwrap();
                    seen.0.push(index);
                    seen.1.insert(current().id());
                    drop(seen);
                    std::thread::sleep(Duration::from_micros(20));
                });
                let (mut indices, used) = seen.into_inner().unwrap();
                indices.sort_unstable();
                assert_eq!(indices, (0..count).collect::<Vec<_>>());
                assert!(used.len() <= threads);
            }
        }

        /// The caller gets the panic of its own part, or is told of a worker's; the next job runs.
        #[test]
        fn a_panic_ends_the_job() {
            for _ in 0..20 {
                let panics = || for_each(None, 2, 8, &|index| assert!(index != 3));
                assert!(std::panic::catch_unwind(panics).is_err());
            }
            for_each(None, 2, 8, &|_| {});
        }
    }
}

/// What no step of this process may exceed; 0 for no limit.
static LIMIT: AtomicUsize = AtomicUsize::new(0);

/// The limit on the threads of every step in this process, whatever its optimizer was told.
pub(crate) fn thread_limit() -> Option<usize> {
    Some(LIMIT.load(Relaxed)).filter(|&limit| limit > 0)
}

/// Limits the threads of every step in this process from its next step on; `None` takes the limit
/// away. It is for threadpoolctl, by which programs that nest pools of threads keep them apart.
#[cfg(feature = "python")]
pub(crate) fn set_thread_limit(limit: Option<std::num::NonZeroUsize>) {
    LIMIT.store(limit.map_or(0, usize::from), Relaxed);
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
        None if cfg!(feature = "threads") => {
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
