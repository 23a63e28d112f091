//! Threads that work on one optimizer take turns.

use std::ops::{Deref, DerefMut};
use std::sync::atomic::{AtomicU32, AtomicUsize, Ordering};
use std::sync::{Mutex, MutexGuard, TryLockError};

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

/// A number of this thread's own.
fn thread_token() -> usize {
    thread_local!(static TOKEN: u8 = const { 0 });
    TOKEN.with(|token| std::ptr::from_ref(token) as usize)
}

/// Something that one thread at a time works on. A thread waits for its turn without the GIL, and
/// is told when it would wait for ever: for itself, or for a thread that only the parent of this
/// process has.
pub(crate) struct Turns<T> {
    content: Mutex<T>,
    /// The thread whose turn it is, and the process it is in.
    thread: AtomicUsize,
    forks: AtomicU32,
}

/// The right to work on it.
pub(crate) struct Turn<'a, T> {
    content: MutexGuard<'a, T>,
    thread: &'a AtomicUsize,
}

impl<T: Send> Turns<T> {
    pub fn new(content: T) -> Self {
        Turns {
            content: Mutex::new(content),
            thread: AtomicUsize::new(0),
            forks: AtomicU32::new(0),
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
            thread: &self.thread,
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
        if self.thread.load(Ordering::Relaxed) == thread_token() {
            return Err(PyRuntimeError::new_err(
                "expected one step at a time, got a call on an optimizer from inside its own step",
            ));
        }
        py.detach(|| drop(self.content.lock()));
        Ok(())
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
        self.thread.store(0, Ordering::Relaxed);
    }
}
