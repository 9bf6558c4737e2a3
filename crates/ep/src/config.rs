//! What a buffer is made for.

use ep_kernels::Shape;

/// What a buffer is made for. The same on every rank; building compares it.
///
/// ```
/// use ep::Config;
///
/// let config = Config::new(7168, 256, 128, 8).with_slots(3);
/// assert_eq!(config.hidden, 7168);
/// assert_eq!(config.slots, 3);
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub struct Config {
    /// Experts of the layer, over all ranks; a multiple of the number of ranks. Rank `r` of `R` owns
    /// the `r`-th part of `num_experts / R`.
    pub num_experts: u32,
    /// Channels of a token; a multiple of 128.
    pub hidden: u32,
    /// Most tokens that one rank dispatches at once.
    pub max_tokens: u32,
    /// Most experts of a token; at most 32.
    pub max_top_k: u32,
    /// Dispatches that can be alive (dispatched and not yet combined) at once; 2 unless set.
    pub slots: u32,
    /// Dispatches that can be between their send and their receive part at once; 1 unless set. Two
    /// for [two batches that overlap](crate::Buffer::dispatch_send).
    pub sends_in_flight: u32,
}

impl Config {
    /// A layer of `num_experts` experts and `hidden` channels, for up to `max_tokens` tokens a rank
    /// and `max_top_k` experts a token.
    pub fn new(hidden: u32, num_experts: u32, max_tokens: u32, max_top_k: u32) -> Self {
        Self {
            num_experts,
            hidden,
            max_tokens,
            max_top_k,
            slots: 2,
            sends_in_flight: 1,
        }
    }

    /// With room for `slots` results alive at once.
    #[must_use]
    pub fn with_slots(mut self, slots: u32) -> Self {
        self.slots = slots;
        self
    }

    /// With room for `sends` dispatches sent and not yet received.
    #[must_use]
    pub fn with_sends_in_flight(mut self, sends: u32) -> Self {
        self.sends_in_flight = sends;
        self
    }

    pub(crate) fn shape(&self, num_ranks: u32) -> Shape {
        Shape {
            num_ranks,
            num_experts: self.num_experts,
            max_tokens: self.max_tokens,
            hidden: self.hidden,
            max_top_k: self.max_top_k,
            slots: self.slots,
            sends_in_flight: self.sends_in_flight,
        }
    }

    /// The fields by name, in the order in which they travel.
    pub(crate) fn fields(&self) -> [(&'static str, u32); 6] {
        [
            ("num_experts", self.num_experts),
            ("hidden", self.hidden),
            ("max_tokens", self.max_tokens),
            ("max_top_k", self.max_top_k),
            ("slots", self.slots),
            ("sends_in_flight", self.sends_in_flight),
        ]
    }
}
