//! No allocation after construction; on several threads a few small ones that do not grow with the
//! parameters.

use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};

use rmsprop::{Config, RmsProp};

/// Counts what is allocated, by any thread.
struct Counting;

static BYTES: AtomicUsize = AtomicUsize::new(0);

// SAFETY: everything is passed on to the system's allocator.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        BYTES.fetch_add(layout.size(), Relaxed);
        // SAFETY: passed on.
        unsafe { System.alloc(layout) }
    }

    unsafe fn realloc(&self, pointer: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        BYTES.fetch_add(size, Relaxed);
        // SAFETY: passed on.
        unsafe { System.realloc(pointer, layout, size) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        // SAFETY: passed on.
        unsafe { System.dealloc(pointer, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// Bytes allocated by three steps, the second of which leaves every other parameter alone.
fn bytes_of_steps(lens: &[usize], threads: usize, config: &Config, max_norm: Option<f64>) -> usize {
    let opt = RmsProp::<f32>::new(config.clone(), lens).unwrap();
    let mut opt = opt.with_threads(threads).unwrap();
    if let Some(max_norm) = max_norm {
        opt = opt.with_max_grad_norm(max_norm).unwrap();
    }
    let mut params: Vec<Vec<f32>> = lens.iter().map(|&len| vec![1.0; len]).collect();
    let grads = params.clone();
    let some: Vec<Option<&[f32]>> = (0..lens.len())
        .map(|index| (index % 2 == 0).then(|| grads[index].as_slice()))
        .collect();
    let before = BYTES.load(Relaxed);
    opt.step(&mut params, &grads).unwrap();
    opt.step_some(&mut params, &some).unwrap();
    opt.step(&mut params, &grads).unwrap();
    BYTES.load(Relaxed) - before
}

// One test: the counter is the process's.
#[test]
fn a_step_allocates_nothing_that_grows() {
    let plain = Config::default();
    let both = Config {
        centered: true,
        momentum: 0.9,
        ..plain.clone()
    };
    let corrected = Config {
        bias_correction: true,
        ..plain.clone()
    };
    // The first step on two threads makes the pool.
    bytes_of_steps(&[4_000_000], 2, &plain, None);
    for config in [plain, both, corrected] {
        for max_norm in [None, Some(1.0)] {
            assert_eq!(bytes_of_steps(&[100; 50], 1, &config, max_norm), 0);
            assert_eq!(bytes_of_steps(&[2_000_000], 1, &config, max_norm), 0);
            let (few, many) = (vec![1_000_000; 4], vec![2_000; 6_000]);
            for lens in [few, many] {
                let bytes = bytes_of_steps(&lens, 2, &config, max_norm);
                assert!(
                    bytes < 3 * 8192,
                    "{bytes} bytes for {} tensors on two threads",
                    lens.len()
                );
            }
        }
    }
}
