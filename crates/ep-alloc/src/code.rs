//! Small integers that travel, for types of ep-sys.
//!
//! A code means the same only to the same version of this crate; a record that carries codes
//! carries a version too. `tests/codes.rs` pins every code, so that a change of meaning is noticed.

use ep_sys::{Call, FabricState};

/// The code of a call: its position in [`Call::ALL`].
pub fn call_to_code(call: Call) -> u16 {
    let position = Call::ALL.iter().position(|&c| c == call);
    position.map_or(u16::MAX, |p| u16::try_from(p).unwrap_or(u16::MAX))
}

/// The call that [`call_to_code`] gave this code.
pub fn call_from_code(code: u16) -> Option<Call> {
    Call::ALL.get(usize::from(code)).copied()
}

/// The code of a fabric state: NVML's own number.
pub fn fabric_state_to_code(state: FabricState) -> u32 {
    match state {
        FabricState::NotSupported => 0,
        FabricState::NotStarted => 1,
        FabricState::InProgress => 2,
        FabricState::Completed => 3,
        FabricState::Other(number) => number,
    }
}

/// The fabric state that [`fabric_state_to_code`] gave this code.
pub fn fabric_state_from_code(code: u32) -> FabricState {
    match code {
        0 => FabricState::NotSupported,
        1 => FabricState::NotStarted,
        2 => FabricState::InProgress,
        3 => FabricState::Completed,
        number => FabricState::Other(number),
    }
}
