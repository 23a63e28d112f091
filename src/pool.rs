//! Threads that share the chunks of a step.
//!
//! The caller works too. It hands the job to a private pool and claims chunks itself; once they are
//! all claimed it closes the job and waits only for the workers that had entered. A worker that
//! comes late finds the job closed and touches nothing. (rayon's `in_place_scope` waits for tickets
//! nobody has begun as well: 12 µs a step more.)
//!
//! A worker sleeps when it has nothing to do, but while steps follow each other at once it waits
//! awake for the next one: no longer than waking it would take.
//!
//! The pool belongs to the process that made it. After `fork` the child finds another process id,
//! leaks the parent's pool, whose threads it does not have, and makes its own.

#[cfg(feature = "rayon")]
pub(crate) use shared::for_each;

/// Calls `work(shared, index)` for every index below `count`.
#[cfg(not(feature = "rayon"))]
pub(crate) fn for_each<S>(
    shared: &std::sync::Arc<S>,
    count: usize,
    _threads: usize,
    work: fn(&S, usize),
) {
    (0..count).for_each(|index| work(shared, index));
}

#[cfg(feature = "rayon")]
mod shared {
    use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
    use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
    use std::sync::{Arc, Mutex, PoisonError};
    use std::thread::Thread;
    use std::time::Instant;

    use crate::kernel::dispatch::FloatMode;
    use crate::parallel::pace;

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
        let shares = helpers + 1;
        let share = |k| Share {
            next: AtomicUsize::new(k * count / shares),
            end: (k + 1) * count / shares,
        };
        let job = Arc::new(Job {
            shared: Mutex::new(Some(Arc::clone(shared))),
            work,
            shares: (0..shares).map(share).collect(),
            entered: AtomicUsize::new(0),
            seats: AtomicUsize::new(helpers),
            gate: AtomicUsize::new(0),
            panicked: AtomicBool::new(false),
            mode: FloatMode::current(),
            caller: std::thread::current(),
        });
        pool.offer(&job, helpers);
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

    /// Chunks that lie together. Each thread begins with a share of its own: the next step finds it
    /// in that core's cache. On two threads that took 0.87 to 0.95 of the time of chunks as they
    /// come from 131 k to 4 M elements, and 0.98 beyond.
    #[repr(align(64))] // Each on a cache line of its own.
    struct Share {
        /// The next one to claim.
        next: AtomicUsize,
        end: usize,
    }

    struct Job<S> {
        /// What the chunks are of; taken away when the job is closed.
        shared: Mutex<Option<Arc<S>>>,
        work: fn(&S, usize),
        shares: Box<[Share]>,
        /// Threads that have begun to claim.
        entered: AtomicUsize,
        /// Workers that may still come.
        seats: AtomicUsize,
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
            let first = self.entered.fetch_add(1, Ordering::Relaxed) % self.shares.len();
            let (before, own) = self.shares.split_at(first);
            // The own share, then what others have left.
            for share in own.iter().chain(before) {
                loop {
                    let index = share.next.fetch_add(1, Ordering::Relaxed);
                    if index >= share.end {
                        break;
                    }
                    (self.work)(shared, index);
                }
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
            lock(&self.shared).take();
        }
    }

    /// A job as workers see it, whatever its chunks are of.
    trait Help: Send + Sync {
        /// A worker's part; nothing if the job is closed.
        fn help(&self);
    }

    impl<S: Send + Sync> Help for Job<S> {
        fn help(&self) {
            let (relaxed, acquire) = (Ordering::Relaxed, Ordering::Acquire);
            let sit = |seats: usize| seats.checked_sub(1);
            let enter = |gate| (gate & CLOSED == 0).then_some(gate + ONE_INSIDE);
            if self.seats.fetch_update(relaxed, relaxed, sit).is_err()
                || self.gate.fetch_update(acquire, relaxed, enter).is_err()
            {
                return;
            }
            let shared = lock(&self.shared).clone();
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
    }

    /// The last job offered to workers that are awake.
    #[derive(Default)]
    struct Board {
        /// Workers that look here before they go to sleep: those awake and those on their way,
        /// which may take a time slice if another thread has their core. None is called twice:
        /// every call would be answered, one after the other.
        awake: AtomicUsize,
        offers: AtomicUsize,
        job: Mutex<Option<Arc<dyn Help>>>,
        places: Mutex<Places>,
    }

    impl Board {
        /// A worker's life from waking up to falling asleep.
        ///
        /// Until its last line whoever makes an offer counts on this worker. The counters are
        /// sequentially consistent: a worker that was counted sees the offer.
        fn serve(&self, woken_for: &dyn Help) {
            let mut seen = self.offers.load(Ordering::SeqCst);
            woken_for.help();
            loop {
                if pace::is_fast() {
                    self.wait(seen);
                }
                if self.offers.load(Ordering::SeqCst) == seen {
                    self.awake.fetch_sub(1, Ordering::SeqCst);
                    if self.offers.load(Ordering::SeqCst) == seen {
                        return;
                    }
                    self.awake.fetch_add(1, Ordering::SeqCst);
                }
                // Before the job is taken: one that is offered in between is not missed.
                seen = self.offers.load(Ordering::SeqCst);
                let job = lock(&self.job).clone();
                if let Some(job) = job {
                    job.help();
                }
            }
        }

        /// Waits awake for an offer, but not for long.
        fn wait(&self, seen: usize) {
            let end = Instant::now() + pace::PAUSE;
            while self.offers.load(Ordering::Relaxed) == seen && Instant::now() < end {
                std::hint::spin_loop();
            }
        }
    }

    /// On which cores the workers may run.
    ///
    /// Linux likes to put a thread that is woken on the core of the one that woke it, above all in
    /// virtual machines, where an idle core looks as if it were taken. There the worker waits until
    /// the caller has used up its time slice, 3 ms. So it is kept off that core, on the others that
    /// the caller may use. Of many workers one that waits matters little, and telling all of them
    /// takes longer.
    #[cfg(target_os = "linux")]
    #[derive(Default)]
    struct Places {
        workers: Vec<rustix::thread::Pid>,
        /// Where they were told to run.
        told: Option<rustix::thread::CpuSet>,
    }

    #[cfg(target_os = "linux")]
    impl Places {
        /// Adds the calling worker.
        fn register(&mut self) {
            self.workers.push(rustix::thread::gettid());
            self.told = None;
        }

        fn keep_off_this_core(&mut self) {
            const MANY: usize = 16;
            if self.workers.len() > MANY {
                return;
            }
            let Ok(mut allowed) = rustix::thread::sched_getaffinity(None) else {
                return;
            };
            allowed.unset(rustix::thread::sched_getcpu());
            if allowed.count() == 0 || self.told == Some(allowed) {
                return;
            }
            for &worker in &self.workers {
                // If the system refuses, it stays where it may run now.
                let _ = rustix::thread::sched_setaffinity(Some(worker), &allowed);
            }
            self.told = Some(allowed);
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

    /// What a worker does when it is woken: it wakes some of the others, then it serves. Waking one
    /// takes 7 µs, so the caller wakes one only.
    fn arrive(board: Arc<Board>, job: Arc<dyn Help>, others: usize) {
        for share in [others / 2, others - others / 2] {
            if share > 0 {
                let (board, job) = (Arc::clone(&board), Arc::clone(&job));
                rayon::spawn(move || arrive(board, job, share - 1));
            }
        }
        board.serve(&*job);
    }

    #[derive(Clone)]
    struct Pool {
        process: u32,
        workers: usize,
        threads: Arc<rayon::ThreadPool>,
        board: Arc<Board>,
    }

    impl Pool {
        /// Offers a job to that many workers: to those awake, and to others that are woken.
        fn offer<S: Send + Sync + 'static>(&self, job: &Arc<Job<S>>, helpers: usize) {
            *lock(&self.board.job) = Some(Arc::clone(job) as Arc<dyn Help>);
            self.board.offers.fetch_add(1, Ordering::SeqCst);
            let awake = self.board.awake.fetch_max(helpers, Ordering::SeqCst);
            if let Some(others) = helpers.checked_sub(awake + 1) {
                lock(&self.board.places).keep_off_this_core();
                let (board, job) = (Arc::clone(&self.board), Arc::clone(job));
                self.threads.spawn(move || arrive(board, job, others));
            }
        }
    }

    static POOL: Mutex<Option<Pool>> = Mutex::new(None);

    /// A pool of this process with at least `workers` threads; `None` if there can be none just
    /// now.
    fn pool(workers: usize) -> Option<Pool> {
        // Never waits: should another thread hold the lock, or have held it when this process was
        // forked, the step runs on the caller.
        let mut slot = POOL.try_lock().ok()?;
        let process = std::process::id();
        match &*slot {
            Some(pool) if pool.process == process && pool.workers >= workers => {
                return Some(pool.clone());
            }
            _ => {}
        }
        let board: Arc<Board> = Arc::default();
        let registry = Arc::clone(&board);
        let threads = rayon::ThreadPoolBuilder::new()
            .num_threads(workers)
            .start_handler(move |_| lock(&registry.places).register())
            .thread_name(|index| format!("rmsprop-{index}"))
            .build()
            .ok()?;
        let new = Pool {
            process,
            workers,
            threads: Arc::new(threads),
            board,
        };
        if let Some(old) = slot.replace(new.clone())
            && old.process != process
        {
            // Dropping it would wait for threads that only the parent has.
            std::mem::forget(old);
        }
        Some(new)
    }

    fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
        mutex.lock().unwrap_or_else(PoisonError::into_inner)
    }

    #[cfg(test)]
    mod tests {
        use std::collections::HashSet;
        use std::sync::{Arc, Mutex};
        use std::thread::{ThreadId, current};
        use std::time::Duration;

        use super::{for_each, lock, pace};

        #[derive(Default)]
        struct Seen {
            indices: Mutex<Vec<usize>>,
            threads: Mutex<HashSet<ThreadId>>,
        }

        fn see(seen: &Seen, index: usize) {
            lock(&seen.indices).push(index);
            lock(&seen.threads).insert(current().id());
            std::thread::sleep(Duration::from_micros(20));
        }

        /// Each index once, on no more threads than allowed, whoever else is awake.
        #[test]
        fn jobs_that_follow_at_once() {
            for round in 0..300 {
                let (began, _) = pace::begin();
                let (count, threads) = (1 + round % 9, 1 + round % 4);
                let shared = Arc::new(Seen::default());
                for_each(&shared, count, threads, see);
                pace::end(began, 1, true);
                let seen = Arc::into_inner(shared).expect("nobody else holds it");
                let mut indices = seen.indices.into_inner().unwrap();
                indices.sort_unstable();
                assert_eq!(indices, (0..count).collect::<Vec<_>>());
                assert!(seen.threads.into_inner().unwrap().len() <= threads);
            }
        }
    }
}
