//! What a combine has to know of its dispatch.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

/// A dispatch that has not been combined yet.
///
/// [`Buffer::combine`](crate::Buffer::combine) takes it, so that it is combined at most once:
///
/// ```compile_fail,E0382
/// # fn f(buffer: &ep::Buffer, stream: &ep::Stream, handle: ep::Handle, input: &ep::CombineInput<'_>,
/// #      a: &mut ep::Tensor, b: &mut ep::Tensor) -> Result<(), ep::Error> {
/// buffer.combine(stream, handle, input, a)?;
/// buffer.combine(stream, handle, input, b)?; // error: use of moved value `handle`
/// # Ok(()) }
/// ```
///
/// It holds one of the buffer's [slots](crate::Config::slots); dropping it gives the slot up without
/// a combine. Slots are chosen in order, so ranks that take and give up handles in the same order,
/// as they must, agree on them.
#[derive(Debug)]
pub struct Handle {
    pub(crate) lease: Lease,
    pub(crate) num_tokens: u32,
    pub(crate) top_k: u32,
    pub(crate) epoch: u64,
}

impl Handle {
    /// Tokens that this rank dispatched.
    pub fn num_tokens(&self) -> u32 {
        self.num_tokens
    }

    /// Experts of each of them.
    pub fn top_k(&self) -> u32 {
        self.top_k
    }

    /// The dispatch's number, counted from 1.
    pub fn epoch(&self) -> u64 {
        self.epoch
    }
}

/// A buffer's slots: a bit for each that is free.
#[derive(Debug)]
pub(crate) struct Slots(AtomicU64);

impl Slots {
    /// `count` slots, at most 64.
    pub(crate) fn new(count: u32) -> Arc<Self> {
        let free = u64::MAX >> 64_u32.saturating_sub(count).min(63);
        Arc::new(Self(AtomicU64::new(free)))
    }

    /// The lowest free slot.
    pub(crate) fn lease(self: &Arc<Self>) -> Option<Lease> {
        let lowest = |free: u64| free & free.wrapping_neg();
        let taken = self
            .0
            .fetch_update(Ordering::AcqRel, Ordering::Acquire, |free| {
                (free != 0).then_some(free & !lowest(free))
            });
        taken.ok().map(|free| Lease {
            index: lowest(free).trailing_zeros(),
            slots: Arc::clone(self),
        })
    }
}

/// A slot in use.
#[derive(Debug)]
pub(crate) struct Lease {
    index: u32,
    slots: Arc<Slots>,
}

impl Lease {
    pub(crate) fn index(&self) -> u32 {
        self.index
    }

    /// Whether it is one of these.
    pub(crate) fn is_of(&self, slots: &Arc<Slots>) -> bool {
        Arc::ptr_eq(&self.slots, slots)
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        self.slots.0.fetch_or(1 << self.index, Ordering::AcqRel);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_lowest_free_slot_is_taken() {
        let slots = Slots::new(3);
        let [a, b, c] = [(); 3].map(|()| slots.lease().unwrap());
        assert_eq!([a.index(), b.index(), c.index()], [0, 1, 2]);
        assert!(slots.lease().is_none());
        drop(b);
        drop(a);
        assert_eq!(slots.lease().unwrap().index(), 0);
    }

    #[test]
    fn as_many_slots_as_there_are_bits() {
        let slots = Slots::new(64);
        let leases: Vec<_> = (0..64).map(|_| slots.lease().unwrap()).collect();
        assert_eq!(leases[63].index(), 63);
        assert!(slots.lease().is_none());
    }
}
