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
    waiting().clear();
}

/// How long a thread waits before it looks for signals.
const PATIENCE: Duration = Duration::from_millis(50);

/// The threads that wait, and whose turn it is where they do. The lock is taken with the GIL held,
/// and nothing that might give the GIL away is done under it.
static WAITING: Mutex<Vec<(usize, Arc<AtomicUsize>)>> = Mutex::new(Vec::new());

fn waiting() -> MutexGuard<'static, Vec<(usize, Arc<AtomicUsize>)>> {
    WAITING.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Takes note that a thread waits, while this is there. Whoever closes a circle finds it here.
struct Wait(usize);

impl Wait {
    /// None if the thread would wait for itself.
    fn begin(thread: usize, holder: &Arc<AtomicUsize>) -> Option<Wait> {
        let mut waiting = waiting();
        let mut next = holder.load(Ordering::Relaxed);
        for _ in 0..=waiting.len() {
            if next == thread {
                return None;
            }
            let Some((_, holder)) = waiting.iter().find(|(waits, _)| *waits == next) else {
                break;
            };
            next = holder.load(Ordering::Relaxed);
        }
        waiting.push((thread, Arc::clone(holder)));
        Some(Wait(thread))
    }
}

impl Drop for Wait {
    fn drop(&mut self) {
        waiting().retain(|(thread, _)| *thread != self.0);
    }
}

/// A number of this thread's own.
fn thread_token() -> usize {
    thread_local!(static TOKEN: u8 = const { 0 });
    TOKEN.with(|token| std::ptr::from_ref(token) as usize)
}

/// Something that one thread at a time works on. A thread waits for its turn without the GIL, hears
/// signals meanwhile, and is told when it would wait for ever: for itself, for one that waits for it,
/// or for a thread that only the parent of this process has.
pub(crate) struct Turns<T> {
    content: Mutex<T>,
    /// The thread whose turn it is, or 0, and the process it is in.
    thread: Arc<AtomicUsize>,
    forks: AtomicU32,
    /// What wakes one of the threads that wait. The lock is never waited for: in a child of `fork` it
    /// may be nobody's.
    waiting: AtomicUsize,
    gate: Mutex<()>,
    is_free: Condvar,
}

/// The right to work on it.
pub(crate) struct Turn<'a, T> {
    /// Dropped first.
    content: MutexGuard<'a, T>,
    ending: Ending<'a, T>,
}

/// Wakes another thread when a turn has ended.
struct Ending<'a, T>(&'a Turns<T>);

impl<T: Send> Turns<T> {
    pub fn new(content: T) -> Self {
        Turns {
            content: Mutex::new(content),
            thread: Arc::new(AtomicUsize::new(0)),
            forks: AtomicU32::new(0),
            waiting: AtomicUsize::new(0),
            gate: Mutex::new(()),
            is_free: Condvar::new(),
        }
    }

    /// Waits for a turn.
    #[inline]
    pub fn wait(&self, py: Python<'_>) -> PyResult<Turn<'_, T>> {
        let content = loop {
            match self.content.try_lock() {
                Ok(content) => break content,
                Err(TryLockError::Poisoned(poisoned)) => break poisoned.into_inner(),
                Err(TryLockError::WouldBlock) => self.wait_detached(py)?,
            }
        };
        self.thread.store(thread_token(), Ordering::Relaxed);
        self.forks
            .store(FORKS.load(Ordering::Relaxed), Ordering::Relaxed);
        Ok(Turn {
            content,
            ending: Ending(self),
        })
    }

    /// Waits until it may be free. It is not taken here, where the GIL is not held: the garbage
    /// collector looks at the content twice and must find it taken both times or neither.
    #[cold]
    fn wait_detached(&self, py: Python<'_>) -> PyResult<()> {
        if self.forks.load(Ordering::Relaxed) != FORKS.load(Ordering::Relaxed) {
            return Err(PyRuntimeError::new_err(
                "expected an optimizer at rest, got one that another thread was stepping when this \
                 process was forked",
            ));
        }
        let thread = thread_token();
        if self.thread.load(Ordering::Relaxed) == thread {
            return Err(PyRuntimeError::new_err(
                "expected one step at a time, got a call on an optimizer from inside its own step",
            ));
        }
        let Some(_wait) = Wait::begin(thread, &self.thread) else {
            return Err(PyRuntimeError::new_err(
                "expected threads that do not wait for each other, got a call on an optimizer that \
                 another thread is stepping which waits for a step of this one",
            ));
        };
        py.detach(|| {
            self.waiting.fetch_add(1, Ordering::SeqCst);
            match self.gate.try_lock() {
                Ok(gate) if self.thread.load(Ordering::SeqCst) != 0 => {
                    drop(self.is_free.wait_timeout(gate, PATIENCE));
                }
                Ok(_) => {}
                Err(_) => std::thread::sleep(PATIENCE / 50),
            }
            self.waiting.fetch_sub(1, Ordering::SeqCst);
        });
        py.check_signals()
    }

    /// A turn if nobody else has one.
    pub fn try_take(&self) -> Option<MutexGuard<'_, T>> {
        self.content.try_lock().ok()
    }
}

impl<T> Deref for Turn<'_, T> {
    type Target = T;

    fn deref(&self) -> &T {
        &self.content
    }
}

impl<T> DerefMut for Turn<'_, T> {
    fn deref_mut(&mut self) -> &mut T {
        &mut self.content
    }
}

impl<T> Drop for Turn<'_, T> {
    fn drop(&mut self) {
        self.ending.0.thread.store(0, Ordering::SeqCst);
    }
}

impl<T> Drop for Ending<'_, T> {
    fn drop(&mut self) {
        if self.0.waiting.load(Ordering::SeqCst) > 0 {
            // Who is between looking and waiting has the lock, and looks again before long.
            drop(self.0.gate.try_lock());
            self.0.is_free.notify_one();
        }
    }
}
