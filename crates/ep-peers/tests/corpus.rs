//! The corpora of the fuzz targets for records and frames, replayed. `fuzz/README.md` says how they
//! are made.

#[path = "../../../fuzz/properties/frame.rs"]
mod frame;
#[path = "../../../fuzz/properties/record.rs"]
mod record;
#[path = "../../../fuzz/replay.rs"]
mod replay;

use ep_peers::wire::{FACTS_BYTES, Facts, Handle, Identity, Record, Refusal};
use ep_sys::{Bytes16, Call, DevicePtr, Status};

const RECORDS: &str = "fuzz/corpus/record";
const FRAMES: &str = "fuzz/corpus/frame";

const WORDS: [&[u8]; 8] = [
    b"EPHANDLE",
    b"EPX\x1a",
    b"handles\0",
    b"rendezvous",
    &[0; 4],
    &[0xff; 4],
    &[0xff; 8],
    &[1, 0, 0, 0],
];

/// Names of inputs with the inputs.
type Seeds = Vec<(&'static str, Vec<u8>)>;

// ---- Records ----

fn record(handle: Handle) -> Record {
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
        handle,
        digest: 0x1234_5678_9abc_def0,
        facts: Facts::new(b"facts of the caller").unwrap(),
    }
}

fn record_seeds() -> Seeds {
    let refusal = |status| {
        Handle::None(Some(Refusal {
            call: Call::MemCreate,
            status,
        }))
    };
    let fabric = record(Handle::Fabric([5; 64])).encode().to_vec();
    let extreme = Record {
        rank: u32::MAX,
        generation: u64::MAX,
        identity: Identity::default(),
        facts: Facts::new(&[0xff; FACTS_BYTES]).unwrap(),
        ..record(Handle::None(None))
    };
    // A field with another value under a checksum that is right.
    let with = |at: usize, value: &[u8]| {
        let mut bytes = fabric.clone();
        bytes[at..at + value.len()].copy_from_slice(value);
        record::sealed(&bytes)
    };
    // And what the checksum, or something before it, tells.
    let spoilt = |at: usize| {
        let mut bytes = fabric.clone();
        bytes[at] ^= 0x10;
        bytes
    };
    vec![
        ("fabric", fabric.clone()),
        ("posix-fd", record(Handle::PosixFd).encode().to_vec()),
        ("ipc", record(Handle::Ipc([6; 64])).encode().to_vec()),
        ("no-memory", record(Handle::None(None)).encode().to_vec()),
        (
            "refused",
            record(refusal(Some(Status(800)))).encode().to_vec(),
        ),
        ("unanswered", record(refusal(None)).encode().to_vec()),
        ("extreme", extreme.encode().to_vec()),
        ("empty", Vec::new()),
        ("truncated", fabric[..727].to_vec()),
        ("header-only", fabric[..16].to_vec()),
        ("oversized", [fabric.as_slice(), &[0]].concat()),
        ("bad-magic", spoilt(0)),
        ("bad-version", spoilt(8)),
        ("bad-checksum", spoilt(100)),
        ("bad-checksum-itself", spoilt(727)),
        ("bad-kind", with(12, &[4])),
        ("descriptor-with-handle", with(12, &[2])),
        ("nothing-with-handle", with(12, &[0])),
        ("other-generation", with(16, &[0xff; 8])),
        ("other-rank", with(24, &[0xff; 4])),
        ("clique-without-cluster", with(80, &[0; 16])),
        ("bad-call", with(184, &[0xfe, 0xff, 0xff, 0xff])),
        ("call-with-fabric", with(184, &[0; 8])),
        ("status-without-call", with(188, &[0; 4])),
        // Once blamed on the call, which is in order.
        ("regression-refused-with-handle", {
            let mut bytes = with(12, &[0]);
            bytes[184..192].fill(0);
            record::sealed(&bytes)
        }),
        ("bytes-beyond-facts", with(200, &[18])),
        ("facts-too-long", with(200, &513_u64.to_le_bytes())),
        ("facts-far-too-long", with(200, &[0xff; 8])),
    ]
}

#[test]
fn the_record_corpus_holds() {
    replay::seeds(RECORDS, &record_seeds());
    replay::replay(&[RECORDS], 1000, &WORDS, record::check);
}

// ---- Frames ----

fn frame_seeds() -> Seeds {
    const HELLO: u8 = 1;
    const WELCOME: u8 = 2;
    const RECORD: u8 = 3;
    const ALL_RECORDS: u8 = 4;
    const ABORT: u8 = 5;

    let hello = frame::hello();
    let turn = |kind, rank, payload: &[u8]| frame::frame(kind, rank, frame::STEP, payload);
    let record = turn(RECORD, 1, &frame::RECORD);
    let with = |frame: &[u8], at: usize, value: &[u8]| {
        let mut bytes = frame.to_vec();
        bytes[at..at + value.len()].copy_from_slice(value);
        bytes
    };
    // Of step "handles": the step of whom it is about, two numbers, the cause, the ranks.
    let abort = |cause: u32, number: u64, ranks: &[u32]| {
        let mut fault = frame::STEP.as_bytes().to_vec();
        fault.resize(32, 0);
        fault.extend(number.to_le_bytes());
        fault.extend(number.to_le_bytes());
        fault.extend(cause.to_le_bytes());
        ranks
            .iter()
            .for_each(|rank| fault.extend(rank.to_le_bytes()));
        turn(ABORT, 0, &fault)
    };
    vec![
        ("empty", Vec::new()),
        (
            "foreign",
            b"GET / HTTP/1.1\r\nHost: a-name-of-some-length\r\n\r\n".to_vec(),
        ),
        ("hello", hello.clone()),
        ("hello-cut", hello[..50].to_vec()),
        ("hello-cut-in-header", hello[..20].to_vec()),
        ("hello-other-version", with(&hello, 4, &[9])),
        (
            "hello-version-of-no-rank",
            with(&hello, 4, &[9, 0, 1, 0, 9]),
        ),
        ("hello-other-token", with(&hello, 48, &[0])),
        ("hello-other-size", with(&hello, 56, &[3])),
        ("hello-as-rank-0", with(&hello, 8, &[0])),
        ("hello-of-no-rank", with(&hello, 8, &[0xff; 4])),
        ("hello-out-of-time", with(&hello, 40, &[0; 8])),
        (
            "hello-too-long",
            frame::frame(HELLO, 1, "rendezvous", &[0; 13]),
        ),
        ("welcome", frame::frame(WELCOME, 0, "rendezvous", &[])),
        ("record", record.clone()),
        ("record-twice", record.repeat(2)),
        ("record-cut", record[..55].to_vec()),
        ("record-bad-magic", with(&record, 0, b"X")),
        ("record-bad-kind", with(&record, 6, &[0])),
        ("record-of-rank-0", with(&record, 8, &[0])),
        ("record-too-long", with(&record, 12, &[0xff; 4])),
        ("record-too-short", with(&record, 12, &[11])),
        ("record-of-another-turn", with(&record, 16, &[1])),
        ("record-of-another-step", with(&record, 24, b"\xff\"")),
        ("record-out-of-time", with(&record, 40, &[0; 8])),
        ("record-without-end", with(&record, 40, &[0xff; 8])),
        ("records", turn(ALL_RECORDS, 0, &frame::RECORD.repeat(2))),
        ("records-too-few", turn(ALL_RECORDS, 0, &frame::RECORD)),
        ("abort-missing", abort(1, u64::MAX, &[0, 1])),
        ("abort-lost", abort(3, 104, &[1])),
        ("abort-lost-no-errno", abort(3, u64::MAX, &[1])),
        ("abort-truncated", abort(4, 48, &[1])),
        ("abort-size", abort(10, 1 << 32, &[1])),
        ("abort-unknown", abort(12, 0, &[1])),
        ("abort-of-nobody", abort(6, 0, &[])),
        ("abort-too-many", abort(6, 0, &[1, 2, 3])),
    ]
}

#[test]
fn the_frame_corpus_holds() {
    replay::seeds(FRAMES, &frame_seeds());
    replay::replay(&[FRAMES], 20, &WORDS, frame::check);
}
