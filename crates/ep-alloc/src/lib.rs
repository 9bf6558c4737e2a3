//! ep-alloc
