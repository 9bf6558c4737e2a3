//! Faults to inject.

use std::time::Duration;

use ep_sys::{Call, DeviceOrdinal, Status};

/// Which calls fail, lie or take long.
///
/// Calls are counted from 0 at the moment of [`SimDriver::inject`](crate::SimDriver::inject); every
/// method of the driver counts but `host_facts`, which asks no driver, and `host_load`, which is
/// polled. (`host_load` can still be named: `FaultPlan::fail_nth_of(Call::HostLoad, ..)`.) A call
/// that fails does nothing else.
///
/// ```
/// use ep_sim::FaultPlan;
/// use ep_sys::{Call, DeviceOrdinal, Status};
///
/// let plan = FaultPlan::fail_nth(7, Status::UNKNOWN)
///     .and(FaultPlan::fail_nth_of(Call::MemUnmap, 0, Status::INVALID_VALUE))
///     .on(DeviceOrdinal(1));
/// assert_ne!(plan, FaultPlan::none());
/// ```
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct FaultPlan {
    faults: Vec<Fault>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Fault {
    selector: Selector,
    nth: usize,
    effect: Effect,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Effect {
    Fail(Status),
    Garble,
    Delay(Duration),
}

/// What happens to a call.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Effects {
    pub(crate) status: Option<Status>,
    pub(crate) garbled: bool,
    pub(crate) delay: Duration,
}

/// The calls among which a fault's call is counted: all, or those of one device, of one kind.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub(crate) struct Selector {
    pub(crate) device: Option<DeviceOrdinal>,
    pub(crate) call: Option<Call>,
}

impl FaultPlan {
    /// No faults.
    pub fn none() -> Self {
        Self::default()
    }

    /// The `n`-th call returns `status`.
    pub fn fail_nth(n: usize, status: Status) -> Self {
        Self::one(None, n, Effect::Fail(status))
    }

    /// The `n`-th call of one kind returns `status`.
    pub fn fail_nth_of(call: Call, n: usize, status: Status) -> Self {
        Self::one(Some(call), n, Effect::Fail(status))
    }

    /// The `n`-th copy to the host succeeds, but reads other bytes than the memory holds.
    pub fn garble_nth(n: usize) -> Self {
        Self::one(Some(Call::CopyToHost), n, Effect::Garble)
    }

    /// The `n`-th call takes `delay` longer.
    pub fn delay_nth(n: usize, delay: Duration) -> Self {
        Self::one(None, n, Effect::Delay(delay))
    }

    /// The `n`-th call of one kind takes `delay` longer.
    pub fn delay_nth_of(call: Call, n: usize, delay: Duration) -> Self {
        Self::one(Some(call), n, Effect::Delay(delay))
    }

    /// These faults and those of `other`.
    pub fn and(mut self, other: Self) -> Self {
        self.faults.extend(other.faults);
        self
    }

    /// The same faults, with only the calls for `device` counted. Where several threads share a
    /// driver, each with its own device, this makes the count a matter of one thread.
    pub fn on(mut self, device: DeviceOrdinal) -> Self {
        for fault in &mut self.faults {
            fault.selector.device = Some(device);
        }
        self
    }

    /// What happens to a call that is number `index(selector)` among the calls of a selector.
    pub(crate) fn decide(
        &self,
        call: Call,
        device: DeviceOrdinal,
        index: impl Fn(Selector) -> usize,
    ) -> Effects {
        let mut effects = Effects::default();
        for Fault {
            selector,
            nth,
            effect,
        } in &self.faults
        {
            let concerned = selector.device.is_none_or(|d| d == device)
                && selector.call.map_or(counts(call), |c| c == call);
            if !concerned || index(*selector) != *nth {
                continue;
            }
            match effect {
                Effect::Fail(with) => effects.status = effects.status.or(Some(*with)),
                Effect::Garble => effects.garbled = true,
                Effect::Delay(by) => effects.delay += *by,
            }
        }
        effects
    }

    fn one(call: Option<Call>, nth: usize, effect: Effect) -> Self {
        let selector = Selector { device: None, call };
        Self {
            faults: vec![Fault {
                selector,
                nth,
                effect,
            }],
        }
    }
}

/// Whether a call is counted among all calls, and journalled.
pub(crate) fn counts(call: Call) -> bool {
    call != Call::HostLoad
}
