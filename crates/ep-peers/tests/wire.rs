//! Records: what is encoded comes back, and nothing else is taken for a record.

use ep_peers::wire::{
    FACTS_BYTES, Facts, Handle, Identity, RECORD_VERSION, Record, RecordError, Refusal,
};
use ep_sys::{Bytes16, Call, DevicePtr, Status};
use proptest::prelude::*;

fn record() -> Record {
    Record {
        rank: 3,
        generation: 7,
        identity: Identity {
            host: Bytes16([1; 16]),
            process: Bytes16([2; 16]),
            gpu: Bytes16([3; 16]),
            clique: Some((Bytes16([4; 16]), 32766)),
        },
        bytes: 6 << 20,
        granularity: 2 << 20,
        base: DevicePtr(0x7f00_0000_0000),
        handle: Handle::Fabric([5; 64]),
        digest: 0x1234_5678_9abc_def0,
        facts: Facts::new(b"facts of the caller").unwrap(),
    }
}

fn handles() -> impl Strategy<Value = Handle> {
    let refusal = (
        proptest::sample::select(Call::ALL),
        proptest::option::of(0..u32::MAX),
    )
        .prop_map(|(call, status)| Refusal {
            call,
            status: status.map(Status),
        });
    prop_oneof![
        proptest::option::of(refusal).prop_map(Handle::None),
        any::<[u8; 32]>().prop_map(|half| Handle::Fabric(doubled(half))),
        Just(Handle::PosixFd),
        any::<[u8; 32]>().prop_map(|half| Handle::Ipc(doubled(half))),
    ]
}

fn doubled(half: [u8; 32]) -> [u8; 64] {
    let mut whole = [0; 64];
    whole[..32].copy_from_slice(&half);
    whole[32..].copy_from_slice(&half);
    whole
}

fn uuids() -> impl Strategy<Value = Bytes16> {
    any::<[u8; 16]>().prop_map(Bytes16)
}

prop_compose! {
    fn identities()(
        host in uuids(),
        process in uuids(),
        gpu in uuids(),
        clique in proptest::option::of(
            (uuids().prop_filter("no cluster", |uuid| !uuid.is_zero()), any::<u32>()),
        ),
    ) -> Identity {
        Identity { host, process, gpu, clique }
    }
}

prop_compose! {
    fn records()(
        rank: u32,
        generation: u64,
        identity in identities(),
        (bytes, granularity, base, digest) in any::<(u64, u64, u64, u64)>(),
        handle in handles(),
        facts in proptest::collection::vec(any::<u8>(), 0..=FACTS_BYTES),
    ) -> Record {
        Record {
            rank,
            generation,
            identity,
            bytes,
            granularity,
            base: DevicePtr(base),
            handle,
            digest,
            facts: Facts::new(&facts).unwrap(),
        }
    }
}

proptest! {
    #[test]
    fn records_survive_the_wire(record in records()) {
        let bytes = record.encode();
        prop_assert_eq!(Record::decode(&bytes), Ok(record.clone()));
        prop_assert_eq!(
            Record::decode_from(&bytes, record.rank, record.generation),
            Ok(record)
        );
    }

    #[test]
    fn a_changed_byte_is_noticed(
        record in records(),
        place in 0..Record::BYTES,
        change in 1..=u8::MAX,
    ) {
        let mut bytes = record.encode();
        bytes[place] ^= change;
        prop_assert!(Record::decode(&bytes).is_err());
    }

    #[test]
    fn any_bytes_are_judged_without_panic(
        mut bytes in proptest::collection::vec(any::<u8>(), 0..=Record::BYTES + 8),
        sealed: bool,
    ) {
        if sealed {
            // Random bytes rarely pass the first checks; give these the benefit.
            bytes.resize(Record::BYTES, 0);
            seal(&mut bytes);
        }
        if let Ok(record) = Record::decode(&bytes) {
            prop_assert_eq!(record.encode().to_vec(), bytes.to_vec());
        }
    }

    #[test]
    fn fields_are_checked_one_by_one(
        record in records(),
        place in 12..Record::BYTES - 8,
        value: u8,
    ) {
        let mut bytes = record.encode();
        bytes[place] = value;
        seal(&mut bytes);
        if let Ok(record) = Record::decode(&bytes) {
            prop_assert_eq!(record.encode().to_vec(), bytes.to_vec());
        }
    }
}

/// Writes magic, version and checksum over what is there.
fn seal(bytes: &mut [u8]) {
    bytes[..8].copy_from_slice(b"EPHANDLE");
    bytes[8..12].copy_from_slice(&RECORD_VERSION.to_le_bytes());
    let (body, checksum) = bytes.split_at_mut(Record::BYTES - 8);
    let sum = body.iter().fold(0xcbf2_9ce4_8422_2325_u64, |sum, &byte| {
        (sum ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3)
    });
    checksum.copy_from_slice(&sum.to_le_bytes());
}

#[test]
fn every_single_bit_flip_is_noticed() {
    let bytes = record().encode();
    for place in 0..bytes.len() {
        for bit in 0..8 {
            let mut flipped = bytes;
            flipped[place] ^= 1 << bit;
            assert!(Record::decode(&flipped).is_err(), "byte {place}, bit {bit}");
        }
    }
}

#[test]
fn the_layout_is_fixed() {
    let bytes = record().encode();
    assert_eq!(Record::BYTES, 728);
    assert_eq!(&bytes[..8], b"EPHANDLE");
    assert_eq!(bytes[8..12], RECORD_VERSION.to_le_bytes());
    assert_eq!(bytes[12..16], 1_u32.to_le_bytes(), "kind");
    assert_eq!(bytes[16..24], 7_u64.to_le_bytes(), "generation");
    assert_eq!(bytes[24..28], 3_u32.to_le_bytes(), "rank");
    assert_eq!(bytes[28..32], 32766_u32.to_le_bytes(), "clique");
    assert_eq!(bytes[32..48], [1; 16], "host");
    assert_eq!(bytes[80..96], [4; 16], "cluster");
    assert_eq!(bytes[96..104], (6_u64 << 20).to_le_bytes(), "bytes");
    assert_eq!(bytes[120..184], [5; 64], "handle");
    assert_eq!(
        bytes[192..200],
        0x1234_5678_9abc_def0_u64.to_le_bytes(),
        "digest"
    );
    assert_eq!(bytes[200..208], 19_u64.to_le_bytes(), "length of the facts");
    assert_eq!(&bytes[208..227], b"facts of the caller");
}

#[test]
fn each_fault_has_its_own_error() {
    let record = record();
    let bytes = record.encode();
    let changed = |place: usize, value: u8, sealed: bool| {
        let mut bytes = bytes;
        bytes[place] = value;
        if sealed {
            seal(&mut bytes);
        }
        Record::decode(&bytes)
    };
    let field = |field| Err(RecordError::Field { field });

    assert_eq!(Record::decode(&[]), Err(RecordError::Length { actual: 0 }));
    assert_eq!(
        Record::decode(&bytes[..727]),
        Err(RecordError::Length { actual: 727 })
    );
    assert_eq!(
        Record::decode(&[bytes.as_slice(), &[0]].concat()),
        Err(RecordError::Length { actual: 729 })
    );
    assert_eq!(changed(0, b'X', false), Err(RecordError::Magic));
    assert_eq!(
        changed(8, 9, false),
        Err(RecordError::Version { actual: 9 })
    );
    assert_eq!(changed(100, 1, false), Err(RecordError::Checksum));
    assert_eq!(changed(12, 4, true), field("kind"));
    assert_eq!(
        changed(12, 2, true),
        field("handle"),
        "a handle that nobody asked for"
    );
    assert_eq!(changed(184, 0, true), field("call"), "half a refusal");
    assert_eq!(
        changed(200, 18, true),
        field("facts"),
        "a byte beyond the facts"
    );
    assert_eq!(changed(207, 1, true), field("facts"), "more facts than fit");

    assert_eq!(
        Record::decode_from(&bytes, 2, 7),
        Err(RecordError::Rank {
            expected: 2,
            actual: 3
        })
    );
    assert_eq!(
        Record::decode_from(&bytes, 3, 8),
        Err(RecordError::Generation {
            expected: 8,
            actual: 7
        })
    );
    assert_eq!(
        Facts::new(&[0; FACTS_BYTES + 1]),
        Err(RecordError::Facts {
            len: FACTS_BYTES + 1
        })
    );
}

#[test]
fn a_clique_needs_a_cluster() {
    let mut bytes = record().encode();
    bytes[80..96].fill(0);
    seal(&mut bytes);
    assert_eq!(
        Record::decode(&bytes),
        Err(RecordError::Field { field: "clique" })
    );
}

#[test]
fn a_refusal_that_the_driver_did_not_answer_stays_one() {
    for status in [None, Some(Status(800)), Some(Status(0xffff_fffe))] {
        let refusal = Refusal {
            call: Call::MemCreate,
            status,
        };
        let record = Record {
            handle: Handle::None(Some(refusal)),
            ..record()
        };
        assert_eq!(Record::decode(&record.encode()), Ok(record));
    }
}
