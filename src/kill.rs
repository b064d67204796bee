//! Where a test may kill a member: before each store to memory that outlives the process.
//!
//! With the feature `mutations` a test arms a countdown; when it has run out, the thread unwinds in
//! the middle of whatever it does, and what is in memory then is what a killed process leaves
//! behind. Without the feature there is nothing here but the order of those stores, which the
//! compiler must keep: a killed process has made all stores before some instruction, and none
//! behind it.

/// What the thread unwinds with.
#[cfg(feature = "mutations")]
pub struct Killed;

#[cfg(feature = "mutations")]
thread_local! {
    static LEFT: std::cell::Cell<Option<u64>> = const { std::cell::Cell::new(None) };
}

/// The thread unwinds at the `n`th store from here on; `None`: never.
#[cfg(feature = "mutations")]
pub fn arm(n: Option<u64>) {
    LEFT.set(n);
}

/// Switches the countdown off; what was left of it.
#[cfg(feature = "mutations")]
pub fn disarm() -> Option<u64> {
    LEFT.take()
}

/// A store to memory that outlives the process follows.
#[inline(always)]
pub fn kill_point() {
    std::sync::atomic::compiler_fence(std::sync::atomic::Ordering::SeqCst);
    #[cfg(feature = "mutations")]
    match LEFT.get() {
        None => {}
        Some(0) => {
            LEFT.set(None);
            std::panic::resume_unwind(Box::new(Killed));
        }
        Some(n) => LEFT.set(Some(n - 1)),
    }
}
