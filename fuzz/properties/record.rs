//! Whatever bytes come: decoding a record never panics, accepts only what encoding writes, and an
//! error names a fault that the bytes have.
//!
//! The rules are written down here a second time, over byte offsets, so that the decoder is not its
//! own judge.

use ep_peers::wire::{RECORD_VERSION, Record, RecordError};
use ep_sys::Call;

/// Offsets in the layout of version 1.
const VERSION: usize = 8;
const KIND: usize = 12;
const GENERATION: usize = 16;
const RANK: usize = 24;
const CLIQUE: usize = 28;
const CLUSTER: usize = 80;
const HANDLE: usize = 120;
const CALL: usize = 184;
const STATUS: usize = 188;
const FACTS_LEN: usize = 200;
const FACTS: usize = 208;
const CHECKSUM: usize = 720;
const BYTES: usize = 728;

const NONE: u32 = u32::MAX;

/// The property. Few inputs get past the checksum, so each is judged a second time with its length,
/// magic, version and checksum put right.
pub(crate) fn check(bytes: &[u8]) {
    judge(bytes);
    judge(&sealed(bytes));
}

fn judge(bytes: &[u8]) {
    match (Record::decode(bytes), outer_fault(bytes)) {
        (Ok(record), None) => {
            assert_eq!(faulty_fields(bytes), [""; 0], "accepted in spite of them");
            assert_eq!(record.encode().as_slice(), bytes, "encodes otherwise");
            check_sender(bytes, &record);
        }
        (Err(RecordError::Field { field }), None) => {
            let faulty = faulty_fields(bytes);
            assert!(faulty.contains(&field), "{field} named, {faulty:?} faulty");
        }
        (Err(error), Some(fault)) => assert_eq!(error, fault),
        (outcome, fault) => panic!("expected {fault:?}, got {outcome:?}"),
    }
}

/// A record counts only from the rank and for the generation that it states.
fn check_sender(bytes: &[u8], record: &Record) {
    let (rank, generation) = (u32_at(bytes, RANK), u64_at(bytes, GENERATION));
    assert_eq!(
        Record::decode_from(bytes, rank, generation).as_ref(),
        Ok(record)
    );
    let other = rank.wrapping_add(1);
    assert_eq!(
        Record::decode_from(bytes, other, generation),
        Err(RecordError::Rank {
            expected: other,
            actual: rank
        })
    );
    let other = generation.wrapping_add(1);
    assert_eq!(
        Record::decode_from(bytes, rank, other),
        Err(RecordError::Generation {
            expected: other,
            actual: generation
        })
    );
}

/// What is wrong before any field is read.
fn outer_fault(bytes: &[u8]) -> Option<RecordError> {
    if bytes.len() != BYTES {
        let actual = bytes.len();
        return Some(RecordError::Length { actual });
    }
    if !bytes.starts_with(b"EPHANDLE") {
        return Some(RecordError::Magic);
    }
    let actual = u32_at(bytes, VERSION);
    if actual != RECORD_VERSION {
        return Some(RecordError::Version { actual });
    }
    (u64_at(bytes, CHECKSUM) != checksum(bytes)).then_some(RecordError::Checksum)
}

/// Every field that a decoder may complain of. It has to name one of them.
fn faulty_fields(bytes: &[u8]) -> Vec<&'static str> {
    let zero = |from: usize, to: usize| bytes[from..to].iter().all(|&byte| byte == 0);
    let kind = u32_at(bytes, KIND);
    let (call, status) = (u32_at(bytes, CALL), u32_at(bytes, STATUS));
    let refused = call != NONE;
    let known = if refused {
        usize::try_from(call).is_ok_and(|call| call < Call::ALL.len())
    } else {
        status == NONE
    };
    let facts_end = usize::try_from(u64_at(bytes, FACTS_LEN))
        .ok()
        .and_then(|len| FACTS.checked_add(len))
        .filter(|&end| end <= CHECKSUM);

    let rules = [
        ("kind", kind > 3),
        (
            "clique",
            zero(CLUSTER, CLUSTER + 16) && !zero(CLIQUE, CLIQUE + 4),
        ),
        // No handle goes with no memory, nor with a descriptor.
        ("handle", matches!(kind, 0 | 2) && !zero(HANDLE, CALL)),
        // Only what has no memory can have been refused.
        ("call", !known || (refused && kind != 0)),
        ("facts", facts_end.is_none_or(|end| !zero(end, CHECKSUM))),
    ];
    rules
        .into_iter()
        .filter(|(_, faulty)| *faulty)
        .map(|(field, _)| field)
        .collect()
}

/// The bytes as a record that only its fields can spoil.
pub(crate) fn sealed(bytes: &[u8]) -> Vec<u8> {
    let mut bytes = bytes.to_vec();
    bytes.resize(BYTES, 0);
    bytes[..VERSION].copy_from_slice(b"EPHANDLE");
    bytes[VERSION..KIND].copy_from_slice(&RECORD_VERSION.to_le_bytes());
    let sum = checksum(&bytes);
    bytes[CHECKSUM..].copy_from_slice(&sum.to_le_bytes());
    bytes
}

/// FNV-1a of all that comes before the checksum.
fn checksum(bytes: &[u8]) -> u64 {
    bytes[..CHECKSUM]
        .iter()
        .fold(0xcbf2_9ce4_8422_2325, |sum: u64, &byte| {
            (sum ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3)
        })
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(std::array::from_fn(|i| bytes[at + i]))
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(std::array::from_fn(|i| bytes[at + i]))
}
