//! Whether software prefetch, streaming stores or huge pages help a step that memory bounds:
//! `cargo bench --bench memory`. They do not (`docs/performance.md`), so the kernel has none.
//!
//! Each variant is the same loop over arrays of its own, all of them take turns.

#[cfg(not(target_arch = "x86_64"))]
fn main() {
    println!("this bench is written for x86-64");
}

#[cfg(target_arch = "x86_64")]
fn main() {
    if !is_x86_feature_detected!("avx512f") {
        return println!("this bench is written for AVX-512");
    }
    x86::main();
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use std::arch::x86_64::*;
    use std::time::Instant;

    use memmap2::{Advice, MmapMut};

    const NUMEL: usize = 10_000_000;
    const ROUNDS: usize = 41;

    /// p, g and v in pages of a kind.
    struct Arrays([MmapMut; 3]);

    impl Arrays {
        fn new(advice: Advice) -> Self {
            Arrays(std::array::from_fn(|k| {
                let mut map = MmapMut::map_anon(NUMEL * 4).unwrap();
                map.advise(advice).unwrap();
                for (i, bytes) in map.as_chunks_mut::<4>().0.iter_mut().enumerate() {
                    *bytes = ((k + i % 7) as f32).to_ne_bytes();
                }
                map
            }))
        }

        fn pointers(&mut self) -> [*mut f32; 3] {
            self.0.each_mut().map(|map| map.as_mut_ptr().cast())
        }
    }

    /// One step. `AHEAD` bytes are prefetched, if not 0; stores go past the caches if `STREAMING`.
    ///
    /// # Safety
    /// The processor has AVX-512; the pointers are aligned to 64 bytes and valid for `NUMEL`
    /// elements, p and v for writes.
    #[target_feature(enable = "avx512f")]
    unsafe fn step<const AHEAD: usize, const STREAMING: bool>([p, g, v]: [*mut f32; 3]) {
        let hyper = [1e-3f32, 0.99, 0.01, 1e-8].map(|x| _mm512_set1_ps(x));
        let [lr, alpha, one_minus_alpha, eps] = hyper;
        for i in (0..NUMEL / 16 * 16).step_by(16) {
            // SAFETY: `i + 16 <= NUMEL`; a prefetch may be anywhere.
            unsafe {
                if AHEAD > 0 {
                    for array in [p, g, v] {
                        _mm_prefetch::<_MM_HINT_T0>(array.wrapping_add(i + AHEAD / 4).cast());
                    }
                }
                let grad = _mm512_load_ps(g.add(i));
                let kept = _mm512_mul_ps(alpha, _mm512_load_ps(v.add(i)));
                let new = _mm512_mul_ps(_mm512_mul_ps(one_minus_alpha, grad), grad);
                let average = _mm512_add_ps(kept, new);
                let divisor = _mm512_sqrt_ps(_mm512_add_ps(average, eps));
                let change = _mm512_div_ps(_mm512_mul_ps(lr, grad), divisor);
                let updated = _mm512_sub_ps(_mm512_load_ps(p.add(i)), change);
                if STREAMING {
                    _mm512_stream_ps(v.add(i), average);
                    _mm512_stream_ps(p.add(i), updated);
                } else {
                    _mm512_store_ps(v.add(i), average);
                    _mm512_store_ps(p.add(i), updated);
                }
            }
        }
        _mm_sfence();
    }

    type Step = unsafe fn([*mut f32; 3]);

    pub fn main() {
        let variants: [(&str, Advice, Step); 7] = [
            ("plain", Advice::NoHugePage, step::<0, false>),
            (
                "prefetch 512 bytes ahead",
                Advice::NoHugePage,
                step::<512, false>,
            ),
            (
                "prefetch 2 KiB ahead",
                Advice::NoHugePage,
                step::<2048, false>,
            ),
            (
                "prefetch 8 KiB ahead",
                Advice::NoHugePage,
                step::<8192, false>,
            ),
            ("streaming stores", Advice::NoHugePage, step::<0, true>),
            ("huge pages", Advice::HugePage, step::<0, false>),
            (
                "huge pages, streaming stores",
                Advice::HugePage,
                step::<0, true>,
            ),
        ];
        let mut arrays = variants.each_ref().map(|variant| Arrays::new(variant.1));
        let mut times = vec![Vec::new(); variants.len()];
        for _ in 0..ROUNDS {
            for (k, (_, _, step)) in variants.iter().enumerate() {
                let pointers = arrays[k].pointers();
                let start = Instant::now();
                // SAFETY: `main` has looked for AVX-512; maps begin on a page and are that long.
                unsafe { step(pointers) };
                times[k].push(start.elapsed().as_secs_f64() * 1e3);
            }
        }
        let medians = times.iter_mut().map(|times| {
            times.sort_by(f64::total_cmp);
            times[ROUNDS / 2]
        });
        let medians: Vec<f64> = medians.collect();
        println!("{NUMEL} elements of f32, one thread, median of {ROUNDS} interleaved steps");
        for ((name, ..), median) in variants.iter().zip(&medians) {
            println!("{name:>30} {median:>8.2} ms {:>6.2}", median / medians[0]);
        }
    }
}
