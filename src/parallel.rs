//! How many threads a step uses.
//!
//! One more pays if it saves more than waking it costs: 20 to 40 µs for a worker that sleeps, next
//! to nothing for one that is awake. While steps follow each other at once, workers stay awake
//! between them ([`crate::pool`]), and smaller steps use them.

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering::Relaxed};

use crate::error::Error;

/// Bytes below which a step stays on the caller while the workers sleep: 0.4 M f32 elements, p g v.
///
/// `python benches/threads.py --way paced`, two cores of a Zen 5, 2026-11-22, one thread against
/// two: 262 k elements 40 µs against 48, 393 k 65 against 62, 524 k 85 against 76, 1 M 183 against
/// 127.
const SERIAL_BYTES_ASLEEP: usize = 8 << 20;

/// The same while they are awake.
pub(crate) const SERIAL_BYTES: usize = 640 << 10;

/// The threads of a step, decided when it begins; dropped when it ends.
pub(crate) struct Threads {
    allowed: usize,
    /// Work that moves fewer bytes stays on the caller.
    serial_bytes: usize,
    /// Those of the step.
    bytes: usize,
    began: u64,
}

impl Threads {
    /// The caller alone.
    pub const CALLER: Threads = Threads {
        allowed: 1,
        serial_bytes: usize::MAX,
        bytes: 0,
        began: 0,
    };

    /// For a step that may use so many threads and moves so many bytes.
    #[inline]
    pub fn of_step(allowed: usize, bytes: usize) -> Self {
        let is_forced = IS_FORCED.load(Relaxed);
        if allowed <= 1 || (bytes < SERIAL_BYTES && !is_forced) || cfg!(not(feature = "rayon")) {
            return Threads::CALLER;
        }
        let allowed = thread_limit().map_or(allowed, |limit| allowed.min(limit));
        if allowed <= 1 {
            return Threads::CALLER;
        }
        let (began, is_fast) = pace::begin();
        let serial_bytes = match (is_forced, is_fast) {
            (true, _) => 1,
            (_, true) => SERIAL_BYTES,
            (_, false) => SERIAL_BYTES_ASLEEP,
        };
        Threads {
            allowed,
            serial_bytes,
            bytes,
            began,
        }
    }

    /// How many to use for work that moves so many bytes.
    pub fn useful(&self, bytes: usize) -> usize {
        match (bytes < self.serial_bytes, self.serial_bytes / 2) {
            (true, _) => 1,
            (_, 0) => self.allowed,
            (_, share) => self.allowed.min(1 + bytes / share),
        }
    }
}

impl Drop for Threads {
    fn drop(&mut self) {
        if self.allowed > 1 {
            pace::end(self.began, self.bytes, self.useful(self.bytes) > 1);
        }
    }
}

/// How fast steps follow each other in this process, and whether threads make small ones faster.
///
/// All of it is a guess about what comes next, shared by all optimizers: no order is needed.
pub(crate) mod pace {
    use std::sync::OnceLock;
    use std::sync::atomic::{AtomicI64, AtomicU32, AtomicU64, Ordering::Relaxed};
    use std::time::{Duration, Instant};

    /// The longest pause that counts as none. Waiting awake longer than it takes to wake up wins
    /// nothing.
    pub const PAUSE: Duration = Duration::from_micros(30);

    /// Steps in a row without a pause that make it likely that another one follows. Clipping and
    /// updating are one step; two optimizers, or three, may take turns in a loop that pauses then.
    const ENOUGH: u32 = 4;

    /// Nanoseconds that threads may lose before small steps do without them for a while. Waking a
    /// worker loses some 80 µs. Where something else runs on its core, steps lose milliseconds.
    const PATIENCE: i64 = 200_000;

    /// How many times as long as was lost that while is at most; at first it is as long.
    const DISTRUST: u64 = 16;

    /// When the last step began and ended, in ns since the first.
    static BEGAN: AtomicU64 = AtomicU64::new(0);
    static ENDED: AtomicU64 = AtomicU64::new(0);
    static IN_A_ROW: AtomicU32 = AtomicU32::new(0);
    /// What the last step on the caller alone took, in ns for each MiB.
    static ALONE: AtomicU64 = AtomicU64::new(0);
    /// What threads have won lately, in ns.
    static WON: AtomicI64 = AtomicI64::new(0);
    /// Until when small steps do without them.
    static ALONE_UNTIL: AtomicU64 = AtomicU64::new(0);
    /// Doubled whenever they lose, halved whenever they win.
    static WHILES: AtomicU64 = AtomicU64::new(1);

    fn now() -> u64 {
        static FIRST: OnceLock<Instant> = OnceLock::new();
        FIRST.get_or_init(Instant::now).elapsed().as_nanos() as u64
    }

    /// A step begins. When, and whether steps are fast: they follow each other without a pause, one
    /// at a time, and threads pay.
    pub fn begin() -> (u64, bool) {
        let now = now();
        let ended = ENDED.load(Relaxed);
        let is_alone = BEGAN.swap(now, Relaxed) <= ended;
        let follows = is_alone && u128::from(now.saturating_sub(ended)) <= PAUSE.as_nanos();
        let in_a_row = match follows {
            true => IN_A_ROW.load(Relaxed).saturating_add(1),
            false => 0,
        };
        IN_A_ROW.store(in_a_row, Relaxed);
        (now, in_a_row >= ENOUGH && now >= ALONE_UNTIL.load(Relaxed))
    }

    /// A step ends.
    pub fn end(began: u64, bytes: usize, was_shared: bool) {
        let now = now();
        ENDED.store(now, Relaxed);
        let took = now.saturating_sub(began);
        if !was_shared {
            ALONE.store(took.saturating_mul(1 << 20) / bytes.max(1) as u64, Relaxed);
        } else if bytes < super::SERIAL_BYTES_ASLEEP {
            let alone = ALONE.load(Relaxed).saturating_mul(bytes as u64) >> 20;
            let gain = (alone as i64).saturating_sub_unsigned(took);
            let won = WON.load(Relaxed).saturating_add(gain);
            let whiles = WHILES.load(Relaxed);
            if won < -PATIENCE {
                let lost = won.unsigned_abs().saturating_mul(whiles);
                ALONE_UNTIL.store(now.saturating_add(lost), Relaxed);
                WHILES.store((2 * whiles).min(DISTRUST), Relaxed);
                WON.store(0, Relaxed);
            } else if won > PATIENCE {
                WHILES.store((whiles / 2).max(1), Relaxed);
                WON.store(0, Relaxed);
            } else {
                WON.store(won, Relaxed);
            }
        }
    }

    /// Whether steps were fast when the last one began.
    #[cfg(feature = "rayon")]
    pub fn is_fast() -> bool {
        IN_A_ROW.load(Relaxed) >= ENOUGH
    }
}

/// Steps use all threads that they may, however small they are.
static IS_FORCED: AtomicBool = AtomicBool::new(false);

/// Lets steps use all threads that they may, however small they are, or no longer: for benchmarks
/// of where threads begin to pay.
#[cfg(feature = "python")]
pub(crate) fn force_threads(is_forced: bool) {
    IS_FORCED.store(is_forced, Relaxed);
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
        None if cfg!(feature = "rayon") => {
            std::thread::available_parallelism().map_or(1, usize::from)
        }
        None => 1,
    })
}

/// As many of these threads as this process may use.
#[cfg(feature = "python")]
pub(crate) fn usable(threads: usize) -> usize {
    match threads {
        1 => 1,
        _ => std::thread::available_parallelism().map_or(1, |most| threads.min(most.get())),
    }
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
