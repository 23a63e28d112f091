//! Threads that work on one optimizer take turns.

use std::ops::{Deref, DerefMut};
use std::sync::atomic::{AtomicU32, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, TryLockError};
use std::time::Duration;

use pyo3::exceptions::PyRuntimeError;
use pyo3::prelude::*;

/// Counts the forks that made this process.
static FORKS: AtomicU32 = AtomicU32::new(0);

/// Run in a child after `os.fork`: whatever other threads of the parent held is held by nobody
/// here.
#[pyfunction]
#[pyo3(name = "_after_fork")]
pub(crate) fn after_fork() {
    FORKS.fetch_add(1, Ordering::Relaxed);
}

/// A number of this thread's own, not 0.
fn thread_token() -> usize {
    thread_local!(static TOKEN: u8 = const { 0 });
    TOKEN.with(|token| std::ptr::from_ref(token) as usize)
}

/// The thread whose turn it is; 0 for none.
type Holder = Arc<AtomicUsize>;

/// The threads that wait, each for the thread that holds something.
static WAITING: Mutex<Vec<(usize, Holder)>> = Mutex::new(Vec::new());

/// Something that one thread at a time works on. A thread waits for its turn without the GIL, hears
/// signals, and is told when it would wait for ever: for itself, for a thread that waits for it in
/// turn, or for one that only the parent of this process has.
pub(crate) struct Turns<T> {
    content: Mutex<T>,
    holder: Holder,
    /// The process that the holder is in.
    forks: AtomicU32,
    /// How many wait, and what they are woken by.
    waiting: AtomicUsize,
    freed: (Mutex<()>, Condvar),
}

/// The right to work on it.
pub(crate) struct Turn<'a, T> {
    /// None once it is given up.
    content: Option<MutexGuard<'a, T>>,
    turns: &'a Turns<T>,
}

impl<T: Send> Turns<T> {
    pub fn new(content: T) -> Self {
        Turns {
            content: Mutex::new(content),
            holder: Holder::default(),
            forks: AtomicU32::new(0),
            waiting: AtomicUsize::new(0),
            freed: Default::default(),
        }
    }

    /// Waits for a turn.
    #[inline]
    pub fn wait(&self, py: Python<'_>) -> PyResult<Turn<'_, T>> {
        let content = match self.content.try_lock() {
            Ok(content) => content,
            Err(TryLockError::Poisoned(poisoned)) => poisoned.into_inner(),
            Err(TryLockError::WouldBlock) => self.wait_long(py)?,
        };
        self.holder.store(thread_token(), Ordering::Relaxed);
        self.forks
            .store(FORKS.load(Ordering::Relaxed), Ordering::Relaxed);
        Ok(Turn {
            content: Some(content),
            turns: self,
        })
    }

    /// Waits until it is free. It is taken where the GIL is held: the garbage collector looks at the
    /// content twice and must find it taken both times or neither.
    #[cold]
    fn wait_long(&self, py: Python<'_>) -> PyResult<MutexGuard<'_, T>> {
        /// Until signals are heard.
        const PAUSE: Duration = Duration::from_millis(20);
        let _registered = Registered::new(&self.holder);
        loop {
            self.check_that_it_ends()?;
            self.waiting.fetch_add(1, Ordering::SeqCst);
            let content = self.content.try_lock();
            if let Err(TryLockError::WouldBlock) = content {
                py.detach(|| {
                    let freed = lock(&self.freed.0);
                    if self.holder.load(Ordering::SeqCst) != 0 {
                        drop(self.freed.1.wait_timeout(freed, PAUSE));
                    }
                });
            }
            self.waiting.fetch_sub(1, Ordering::SeqCst);
            match content {
                Ok(content) => return Ok(content),
                Err(TryLockError::Poisoned(poisoned)) => return Ok(poisoned.into_inner()),
                Err(TryLockError::WouldBlock) => py.check_signals()?,
            }
        }
    }

    fn check_that_it_ends(&self) -> PyResult<()> {
        if self.forks.load(Ordering::Relaxed) != FORKS.load(Ordering::Relaxed) {
            return Err(PyRuntimeError::new_err(
                "expected an optimizer at rest, got one that another thread was stepping when this \
                 process was forked",
            ));
        }
        let me = thread_token();
        let mut holder = self.holder.load(Ordering::Relaxed);
        if holder == me {
            return Err(PyRuntimeError::new_err(
                "expected one step at a time, got a call on an optimizer from inside its own step",
            ));
        }
        let waiting = lock(&WAITING);
        // Whom the holder waits for, and so on; more often than there are waiting threads is for
        // ever in a circle of others.
        for _ in 0..waiting.len() {
            let Some((_, next)) = waiting.iter().find(|(thread, _)| *thread == holder) else {
                break;
            };
            holder = next.load(Ordering::Relaxed);
            if holder == me {
                return Err(PyRuntimeError::new_err(
                    "expected an optimizer that is free at some time, got one that is being stepped \
                     in a thread that waits for an optimizer which this thread is stepping",
                ));
            }
        }
        Ok(())
    }

    /// A turn if nobody else has one.
    pub fn try_take(&self) -> Option<MutexGuard<'_, T>> {
        self.content.try_lock().ok()
    }
}

/// This thread waits, until this is dropped.
struct Registered;

impl Registered {
    fn new(holder: &Holder) -> Self {
        lock(&WAITING).push((thread_token(), Arc::clone(holder)));
        Registered
    }
}

impl Drop for Registered {
    fn drop(&mut self) {
        let me = thread_token();
        lock(&WAITING).retain(|(thread, _)| *thread != me);
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl<T> Deref for Turn<'_, T> {
    type Target = T;

    fn deref(&self) -> &T {
        self.content.as_ref().expect("given up only when dropped")
    }
}

impl<T> DerefMut for Turn<'_, T> {
    fn deref_mut(&mut self) -> &mut T {
        self.content.as_mut().expect("given up only when dropped")
    }
}

impl<T> Drop for Turn<'_, T> {
    fn drop(&mut self) {
        self.turns.holder.store(0, Ordering::SeqCst);
        self.content = None;
        if self.turns.waiting.load(Ordering::SeqCst) > 0 {
            // Not between a waiting thread's look and its falling asleep.
            drop(lock(&self.turns.freed.0));
            self.turns.freed.1.notify_one();
        }
    }
}
