//! Work shared by a few threads.

use std::sync::{Mutex, PoisonError};
use std::thread;

/// Calls `work` on every item, from `threads` threads, in no particular order.
pub(crate) fn for_each<I: Send>(threads: usize, items: Vec<I>, work: impl Fn(I) + Sync) {
    let threads = threads.clamp(1, items.len().max(1));
    if threads == 1 {
        return items.into_iter().for_each(work);
    }
    let queue = Mutex::new(items.into_iter());
    let next = || queue.lock().unwrap_or_else(PoisonError::into_inner).next();
    thread::scope(|scope| {
        for _ in 0..threads {
            scope.spawn(|| {
                while let Some(item) = next() {
                    work(item);
                }
            });
        }
    });
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicU64, Ordering};

    use super::*;

    #[test]
    fn every_item_is_worked_on_once() {
        for threads in [0, 1, 3, 100] {
            let mut done = [0_u32; 50];
            let sum = AtomicU64::new(0);
            for_each(
                threads,
                done.iter_mut().enumerate().collect(),
                |(i, slot): (usize, _)| {
                    *slot += 1;
                    sum.fetch_add(i as u64, Ordering::Relaxed);
                },
            );
            assert!(done.iter().all(|&n| n == 1));
            assert_eq!(sum.into_inner(), 49 * 50 / 2);
        }
    }
}
