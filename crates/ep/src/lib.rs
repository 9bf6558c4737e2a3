//! ep
