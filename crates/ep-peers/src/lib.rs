//! ep-peers
