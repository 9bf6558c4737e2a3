//! ep-sim
